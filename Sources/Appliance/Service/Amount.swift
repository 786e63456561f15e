import Foundation

/// Figures in words that people read.
public enum Amount {
    public static func bytes(_ count: UInt64) -> String {
        for (unit, shift) in [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)] as [(String, UInt64)] where count >= 1 << shift {
            return String(format: "%.1f \(unit)", Double(count) / Double(UInt64(1) << shift))
        }
        return "\(count) B"
    }

    /// `90 s`, `5 min`, `2 h`, `90 days`: in the largest unit that leaves no rest.
    public static func seconds(_ count: Int) -> String {
        for (unit, size) in [("days", 86_400), ("h", 3600), ("min", 60)] where count >= size && count % size == 0 { return "\(count / size) \(unit)" }
        return "\(count) s"
    }
}

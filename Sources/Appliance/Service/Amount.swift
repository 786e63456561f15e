import Foundation

/// Figures in words that people read.
public enum Amount {
    public static func bytes(_ count: UInt64) -> String {
        for (unit, shift) in [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)] as [(String, UInt64)] where count >= 1 << shift {
            return String(format: "%.1f \(unit)", Double(count) / Double(UInt64(1) << shift))
        }
        return "\(count) B"
    }
}

import Appliance
import ArgumentParser
import BlockTap
import Foundation
import Replica

/// Figures and times in words that people read.
enum Words {
    /// `1 layer`, `2 layers`
    static func count(_ number: some BinaryInteger, _ noun: String) -> String { "\(number) \(noun)\(number == 1 ? "" : "s")" }

    static func bytes(_ count: UInt64) -> String { Amount.bytes(count) }

    /// How a recovery point was proven.
    static func proof(_ proof: CutProof) -> String {
        let rounds = Words.count(proof.roundCount, "round") + (proof.collisionCount > 0 ? ", " + Words.count(proof.collisionCount, "collision") : "")
        return switch proof.method {
        case .copyBeforeWrite: "copy before write"
        case .rounds: rounds
        case .freeze: "freeze of " + String(format: "%.0f ms, ", proof.freezeMilliseconds) + rounds
        }
    }

    static func seconds(_ seconds: Double) -> String {
        switch seconds {
        case ..<10: String(format: "%.1f s", seconds)
        case ..<120: String(format: "%.0f s", seconds)
        case ..<7200: String(format: "%.0f min", seconds / 60)
        case ..<172_800: String(format: "%.1f h", seconds / 3600)
        default: String(format: "%.1f days", seconds / 86400)
        }
    }

    /// Local time to the millisecond.
    static func time(_ date: Date) -> String {
        let formatter = DateFormatter()
        formatter.locale = Locale(identifier: "en_US_POSIX")
        formatter.dateFormat = "yyyy-MM-dd HH:mm:ss.SSS"
        return formatter.string(from: date)
    }

    /// For lists.
    static func timeToSecond(_ date: Date) -> String { String(time(date).dropLast(4)) }

    static func time(nanoseconds: UInt64) -> String { time(Date(timeIntervalSince1970: Double(nanoseconds) / 1e9)) }
}

/// A number of bytes: 1048576, 512KiB, 10MiB, 2GiB.
struct ByteCount: ExpressibleByArgument, Hashable {
    var bytes: UInt64

    init(bytes: UInt64) { self.bytes = bytes }

    var defaultValueDescription: String {
        for (unit, shift) in [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)] as [(String, UInt64)] where bytes > 0 && bytes & (1 << shift - 1) == 0 {
            return "\(bytes >> shift)\(unit)"
        }
        return "\(bytes)"
    }

    init?(argument: String) {
        let units: [(String, UInt64)] = [("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("TiB", 1 << 40)]
        for (unit, factor) in units where argument.hasSuffix(unit) {
            guard let count = UInt64(argument.dropLast(unit.count)) else { return nil }
            let (bytes, overflow) = count.multipliedReportingOverflow(by: factor)
            if overflow { return nil }
            self.bytes = bytes
            return
        }
        guard let bytes = UInt64(argument) else { return nil }
        self.bytes = bytes
    }
}

/// A length of time: 90s, 10m, 24h, 7d.
struct TimeSpan: ExpressibleByArgument, Hashable {
    var seconds: Int

    init(seconds: Int) { self.seconds = seconds }

    var defaultValueDescription: String { seconds % 3600 == 0 ? "\(seconds / 3600)h" : seconds % 60 == 0 ? "\(seconds / 60)m" : "\(seconds)s" }

    init?(argument: String) {
        guard let seconds = argument.wholeMatch(of: /0+[smhd]/) != nil ? 0 : PolicyText.seconds(argument[...]) else { return nil }
        self.seconds = seconds
    }
}

extension PortForward: ExpressibleByArgument {
    /// [ADDRESS:]HOSTPORT:GUESTPORT
    public init?(argument: String) {
        let parts = argument.split(separator: ":", omittingEmptySubsequences: false)
        let ports = parts.suffix(2)
        guard (2...3).contains(parts.count), let host = ports.first.flatMap({ UInt16($0) }), let guest = ports.last.flatMap({ UInt16($0) }), host > 0, guest > 0 else { return nil }
        guard parts.count == 2 || IPv4Interface("\(parts[0])/32") != nil else { return nil }
        self.init(address: parts.count == 3 ? String(parts[0]) : nil, hostPort: host, guestPort: guest)
    }
}

extension SitePairType: ExpressibleByArgument {}
extension Consistency: ExpressibleByArgument {}
extension Role: ExpressibleByArgument {}
extension RecoveryNetwork: ExpressibleByArgument {}
extension FirmwareChoice: ExpressibleByArgument {}
extension DiskBus: ExpressibleByArgument {}
extension DiskCache: ExpressibleByArgument {}
extension NetworkModel: ExpressibleByArgument {}
extension MachineEnd: ExpressibleByArgument {}
extension AcceleratorChoice: ExpressibleByArgument {}

extension IPv4Interface: ExpressibleByArgument {
    public init?(argument: String) { self.init(argument) }
}

extension ListenAddress: ExpressibleByArgument {
    public init?(argument: String) { self.init(argument) }
}

import BlockTap
import Foundation
import Logging
import Replica
import Synchronization

/// The host's disks that could be followed and are not: those that turn up there while it is protected.
final class HostDisks: Sendable {
    private struct Known {
        /// Of `/sys/block`, with sizes: as long as it stays the same, nobody opens anything.
        var blocks: [String] = []
        var disks: [HostDisk]?
    }
    private let followed: Set<String>
    /// Devices of a kind that is not reported by itself.
    private let watched: Set<String>
    private let known = Mutex(Known())

    /// `followed`: paths.
    init(followed: [String], watched: [String]) {
        self.followed = Set(followed.compactMap { try? LiveTapInspection.device(path: $0).number })
        self.watched = Set(watched)
    }

    /// As last looked at; nil: not yet.
    var disks: [HostDisk]? { known.withLock { $0.disks } }

    /// Not for a thread that runs async code.
    func look() {
        let blocks = ((try? FileManager.default.contentsOfDirectory(atPath: "/sys/block")) ?? []).sorted().map { "\($0) \(Self.attribute($0, "size"))" }
        if known.withLock({ $0.disks != nil && $0.blocks == blocks }) { return }
        let found = LiveTapInspection.devices().filter { device in
            guard device.partitionOf == nil, device.isFollowable, !device.isReadOnly, !followed.contains(device.number) else { return false }
            if watched.contains(device.path) { return true }
            return (device.kind == .disk || device.kind == .multipath) && Self.attribute(URL(fileURLWithPath: device.path).lastPathComponent, "removable") != "1"
        }
        let disks = found.map { HostDisk(path: $0.path, serial: DiskSerial.of(path: $0.path), sizeBytes: $0.sizeBytes) }
        known.withLock { $0 = Known(blocks: blocks, disks: disks) }
    }

    private static func attribute(_ block: String, _ name: String) -> String {
        ((try? String(contentsOfFile: "/sys/block/\(block)/\(name)", encoding: .utf8)) ?? "").trimmingCharacters(in: .whitespacesAndNewlines)
    }
}

extension AddedDisk {
    /// Where it is now; nil: it is not there. Names of devices are not for ever, serials are.
    var presentPath: String? {
        guard let serial else { return FileManager.default.fileExists(atPath: path) ? path : nil }
        if DiskSerial.of(path: path) == serial { return path }
        return LiveTapInspection.devices().first { $0.partitionOf == nil && DiskSerial.of(path: $0.path) == serial }?.path
    }
}

extension AgentConfiguration {
    /// With the disks that the appliance has had added. One that is missing is left out: the appliance then says which, as of any disk that is protected.
    func withAddedDisks(_ state: AgentState, logger: Logger) throws -> AgentConfiguration {
        guard tapKind == .live, !isRescue else { return self }
        var configuration = self
        for disk in try state.addedDisks() where !configuration.disks.contains(where: { $0.name == disk.name }) {
            guard let path = disk.presentPath else {
                logger.error("disk \(disk.name) (\(disk.path)\(disk.serial.map { ", serial \($0)" } ?? "")) was added and is not there: it is not followed")
                continue
            }
            let number = try? LiveTapInspection.device(path: path).number
            if configuration.disks.contains(where: { number != nil && (try? LiveTapInspection.device(path: $0.devicePath).number) == number }) { continue }
            configuration.disks.append(Disk(name: disk.name, devicePath: path))
        }
        return configuration
    }
}

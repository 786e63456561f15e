import Glibc

/// Which block devices of this machine the live tap can follow, why not, and what to follow instead; decided by what the kernel says of them, not by their
/// names in a configuration.
public enum LiveTapInspection {
    public enum Kind: String, Sendable, Codable {
        case disk
        case partition
        case loop
        case logicalVolume
        case encrypted
        case multipath
        case multipathPath
        /// Another target of device-mapper.
        case mapped
        case raid
        case cached
        case compressedMemory
        case memory
        case persistentMemory
        case replicated
        /// Of a driver that takes bios, not requests.
        case other
    }

    public struct Device: Sendable, Codable, Hashable {
        public var path: String
        /// `major:minor`.
        public var number: String
        public var kind: Kind
        public var sizeBytes: UInt64
        public var isReadOnly: Bool
        /// Nil when the live tap can follow it.
        public var refusal: String?
        /// The disks to follow so that every write to this one is seen, all of them in one group; itself when it can be followed, none when there are none.
        public var follow: [String]
        public var partitionOf: String?
        /// Of the file systems on it, on its partitions and on what is stacked on these.
        public var mountPoints: [String]
        /// It, or one of those, is swap space.
        public var isSwap: Bool
        public var isFollowable: Bool { refusal == nil }
    }

    /// Every block device with a size, each disk before its partitions.
    public static func devices() -> [Device] {
        let all = directoryEntries("/sys/block").flatMap { name -> [Sysfs] in
            guard let disk = Sysfs(deviceFile: "/sys/block/\(name)/dev"), disk.attribute("hidden") != "1" else { return [] }
            return [disk] + disk.partitions
        }
        return all.compactMap { describe($0) }
    }

    /// The device that `path` leads to.
    public static func device(path: String) throws(SystemError) -> Device {
        guard let number = DeviceNumber(path: path), let device = describe(Sysfs(number)) else {
            throw SystemError(errno: ENOTBLK, what: "cannot inspect \(path): it is not a block device, or it has no size")
        }
        return device
    }

    private static func describe(_ device: Sysfs) -> Device? {
        let sectors = device.attribute("size").flatMap { UInt64($0) } ?? 0
        guard sectors > 0 else { return nil }
        let above = device.above
        let whole = device.disk
        return Device(
            path: device.path, number: device.number.description, kind: device.kind, sizeBytes: sectors * 512, isReadOnly: device.attribute("ro") == "1",
            refusal: LiveDisk.refusal(of: device) ?? LiveDisk.openRefusal(path: device.path), follow: LiveDisk.followable(for: device).map(\.path),
            partitionOf: whole.number == device.number ? nil : whole.path,
            mountPoints: MountedFileSystem.on(above).filter { $0.root.isEmpty }.map(\.mountPoint).sorted(),
            isSwap: DeviceUse.swapDevices().contains { above.contains($0) })
    }
}

extension LiveDisk {
    /// Why the live tap cannot follow this device, in words that go on after "…: "; nil when it can.
    static func refusal(of device: Sysfs) -> String? {
        let disk = device.disk
        if disk.number != device.number { return "it is a partition of \(disk.path) (follow the whole disk)" }
        if device.attribute("hidden") == "1" { return "it is one path of an NVMe disk that has several \(nvmeAdvice)" }
        if let multipath = device.multipath {
            return "it is one path of the multipath disk \(multipath.path), and writes by the others would not be seen (follow \(multipath.path))"
        }
        guard !directoryEntries(device.directory + "/mq").isEmpty else {
            if device.name?.hasPrefix("nvme") == true { return "it is an NVMe disk that the kernel puts together from its paths, and is not request-based \(nvmeAdvice)" }
            let below = followable(for: device)
            let advice = below.isEmpty ? "" : " (follow what is underneath: \(below.map(\.path).joined(separator: ", ")))"
            return "\(device.kind.words) and is not request-based\(advice)"
        }
        if let zoned = device.attribute("queue/zoned"), zoned != "none" { return "it is a zoned disk" }
        guard device.attribute("queue/iostats") == "1" else {
            return "its I/O statistics are off, and without them nobody would notice a missed write (echo 1 > \(device.directory)/queue/iostats)"
        }
        return nil
    }

    /// The kernel does so with every NVMe disk whose controller says that it may have several paths, also if it has one.
    private static let nvmeAdvice = "(with nvme_core.multipath=N on the kernel's command line its disks can be followed)"

    /// Why it cannot be opened, in the same words: seen only by trying.
    static func openRefusal(path: String) -> String? {
        let fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC)
        guard fd < 0 else {
            close(fd)
            return nil
        }
        return "it cannot be opened for reading: \(String(cString: strerror(errno)))\(geteuid() == 0 ? "" : " (ask as root)")"
    }

    /// The disks that see every write to this device.
    static func followable(for device: Sysfs) -> [Sysfs] {
        let disk = device.disk
        if disk.number != device.number { return followable(for: disk) }
        if let multipath = device.multipath { return followable(for: multipath) }
        if isRequestBased(device) { return [device] }
        var found: [Sysfs] = []
        for below in device.slaves {
            for disk in followable(for: below) where !found.contains(where: { $0.number == disk.number }) { found.append(disk) }
        }
        return found
    }

    private static func isRequestBased(_ device: Sysfs) -> Bool {
        !directoryEntries(device.directory + "/mq").isEmpty && device.attribute("hidden") != "1"
    }
}

extension LiveTapInspection.Kind {
    /// "it is …"
    fileprivate var words: String {
        switch self {
        case .disk, .partition, .loop, .other: "it is of a driver that takes whole bios"
        case .logicalVolume: "it is a logical volume (LVM)"
        case .encrypted: "it is an encrypted volume (dm-crypt)"
        case .multipath, .multipathPath: "it is a multipath disk that is stacked on bios"
        case .mapped: "it is a device of device-mapper"
        case .raid: "it is a software RAID (md)"
        case .cached: "it is a cache (bcache)"
        case .compressedMemory: "it is compressed memory (zram), gone with the machine,"
        case .memory: "it is memory (brd), gone with the machine,"
        case .persistentMemory: "it is persistent memory, which programs may write without the kernel,"
        case .replicated: "it is a replicated device (DRBD)"
        }
    }
}

extension Sysfs {
    /// The multipath device that this is a path of.
    var multipath: Sysfs? { holders.first { $0.attribute("dm/uuid")?.hasPrefix("mpath-") == true } }

    var kind: LiveTapInspection.Kind {
        if access(directory + "/partition", F_OK) == 0 { return .partition }
        if let uuid = attribute("dm/uuid") {
            if uuid.hasPrefix("LVM-") { return .logicalVolume }
            if uuid.hasPrefix("CRYPT-") { return .encrypted }
            return uuid.hasPrefix("mpath-") ? .multipath : .mapped
        }
        if multipath != nil || attribute("hidden") == "1" { return .multipathPath }
        if access(directory + "/md", F_OK) == 0 { return .raid }
        if access(directory + "/bcache", F_OK) == 0 { return .cached }
        let name = name ?? ""
        let kinds: [(String, LiveTapInspection.Kind)] = [
            ("loop", .loop), ("zram", .compressedMemory), ("ram", .memory), ("pmem", .persistentMemory), ("drbd", .replicated),
        ]
        if let kind = kinds.first(where: { name.hasPrefix($0.0) })?.1 { return kind }
        return directoryEntries(directory + "/mq").isEmpty ? .other : .disk
    }
}

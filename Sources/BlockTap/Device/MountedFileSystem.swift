import Glibc

/// A file system mounted from a block device, seen from any mount namespace of this machine (a container's volume, a service's private mount).
struct MountedFileSystem: Equatable {
    /// Of the block device that it is mounted from.
    var device: DeviceNumber
    /// As its namespace has it.
    var mountPoint: String
    var type: String
    /// The file system itself, not only this mount of it.
    var isReadOnly: Bool
    /// Where our path to the namespace's root begins; empty for our own.
    var root = ""
    /// Whether this mount shows the file system's own root (a bind mount may show any file of it).
    var isWhole = true
    /// `st_dev` of its files: the device's, or one that stands for no device (btrfs).
    var fileNumber: DeviceNumber

    /// A descriptor of its root, or nil when something else is mounted over it or it is gone.
    func opened() -> Int32? {
        let fd = open(root + mountPoint, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOFOLLOW)
        guard fd >= 0 else { return nil }
        var facts = stat()
        // A btrfs has numbers of its own for its subvolumes. In somebody else's namespace a path may be made to lead anywhere.
        if fstat(fd, &facts) == 0, DeviceNumber(facts.st_dev) == fileNumber || (fileNumber != device && root.isEmpty) { return fd }
        close(fd)
        return nil
    }

    /// Everything mounted from these devices: each file system once, those on loop devices first, and then those below another mount point. Whoever freezes them
    /// in this order, and thaws them in the other one, never has the file frozen that another one is written to.
    static func on(_ devices: Set<DeviceNumber>) -> [MountedFileSystem] {
        var found: [DeviceNumber: MountedFileSystem] = [:]
        for (text, root) in namespaces() {
            for mount in parse(text, root: root, resolve: { DeviceNumber(path: $0) }) where devices.contains(mount.device) {
                let known = found[mount.fileNumber]
                // Our own namespace's before another's; the whole before a part.
                if known == nil || (!known!.isWhole && mount.isWhole) { found[mount.fileNumber] = mount }
            }
        }
        let depths = found.mapValues { Sysfs($0.device).loopDepth() }
        func order(_ fileSystem: MountedFileSystem) -> (Int, Int, String) { (depths[fileSystem.fileNumber] ?? 0, fileSystem.mountPoint.utf8.count, fileSystem.mountPoint) }
        return found.values.sorted { order($0) > order($1) }
    }

    /// The mounts of every mount namespace, with the path by which its root is reached; our own first.
    private static func namespaces() -> [(text: String, root: String)] {
        var result: [(String, String)] = [(fileText("/proc/self/mountinfo") ?? "", "")]
        var seen: Set<UInt64> = []
        func identity(_ process: String) -> UInt64? {
            var facts = stat()
            return stat("/proc/\(process)/ns/mnt", &facts) == 0 ? UInt64(facts.st_ino) : nil
        }
        if let own = identity("self") { seen.insert(own) }
        for process in directoryEntries("/proc") where process.utf8.allSatisfy({ $0 >= 48 && $0 <= 57 }) {
            guard let namespace = identity(process), seen.insert(namespace).inserted else { continue }
            if let text = fileText("/proc/\(process)/mountinfo") { result.append((text, "/proc/\(process)/root")) }
        }
        return result
    }

    /// Lines of `mountinfo` (proc(5)). `resolve` gives the number of a source device's path, for file systems that do not carry it.
    static func parse(_ text: String, root: String = "", resolve: (String) -> DeviceNumber?) -> [MountedFileSystem] {
        text.split(separator: "\n").compactMap { line in
            let fields = line.split(separator: " ", omittingEmptySubsequences: false)
            guard fields.count > 6, let number = DeviceNumber(fields[2]), let separator = fields.firstIndex(of: "-"), separator + 3 < fields.count
            else { return nil }
            var device = number
            if number.major == 0 {
                let source = Mount.unescaped(fields[separator + 2])
                guard source.hasPrefix("/"), let resolved = resolve(source) else { return nil }
                device = resolved
            }
            return MountedFileSystem(
                device: device, mountPoint: Mount.unescaped(fields[4]), type: String(fields[separator + 1]),
                isReadOnly: fields[separator + 3].split(separator: ",").contains("ro"), root: root, isWhole: fields[3] == "/", fileNumber: number)
        }
    }
}

extension Sysfs {
    /// The devices that these are made of.
    var slaves: [Sysfs] { directoryEntries(directory + "/slaves").compactMap { Sysfs(deviceFile: "\(directory)/slaves/\($0)/dev") } }

    /// This device, its partitions, and everything stacked on any of them (device-mapper, md, bcache; the other devices of a btrfs).
    var above: Set<DeviceNumber> {
        var found: Set<DeviceNumber> = []
        var open: [Sysfs] = [self]
        let filesystems = Self.btrfsDevices()
        while let device = open.popLast() {
            guard found.insert(device.number).inserted else { continue }
            open += device.partitions + device.holders
            for numbers in filesystems where numbers.contains(device.number) { found.formUnion(numbers) }
        }
        return found
    }

    private static func btrfsDevices() -> [Set<DeviceNumber>] {
        directoryEntries("/sys/fs/btrfs").map { name in
            Set(directoryEntries("/sys/fs/btrfs/\(name)/devices").compactMap { fileText("/sys/fs/btrfs/\(name)/devices/\($0)/dev").flatMap { DeviceNumber($0) } })
        }.filter { $0.count > 1 }
    }
}

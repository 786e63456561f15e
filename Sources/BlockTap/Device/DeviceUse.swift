import Glibc

/// Who else uses a disk: mounts, swap, devices stacked on it, loop devices over a file. O_EXCL finds some of it too, but
/// cannot say who it is.
enum DeviceUse {
    /// The reason why this block device must not be taken, or nil.
    static func ofBlockDevice(_ number: DeviceNumber) -> String? {
        let device = Sysfs(number)
        let mounts = Mount.all()
        if let reason = use(of: device, mounts: mounts) { return "it is \(reason)" }
        for partition in device.partitions {
            if let reason = use(of: partition, mounts: mounts) {
                return "its partition /dev/\(partition.name ?? partition.number.description) is \(reason)"
            }
        }
        let disk = device.disk
        if disk.number != number, let reason = use(of: disk, mounts: mounts) {
            return "the whole disk /dev/\(disk.name ?? disk.number.description) is \(reason)"
        }
        return nil
    }

    /// The reason why this regular file must not be taken, or nil.
    static func ofFile(device: dev_t, inode: ino_t) -> String? {
        func isSame(_ path: String) -> Bool {
            var facts = stat()
            return stat(path, &facts) == 0 && facts.st_dev == device && facts.st_ino == inode
        }
        if swapPaths().contains(where: isSame) { return "it is in use as swap space (swapoff it first)" }
        for name in directoryEntries("/sys/block") where name.hasPrefix("loop") {
            if let path = fileText("/sys/block/\(name)/loop/backing_file"), isSame(String(path.trimmingNewline)) {
                return "it is attached to the loop device /dev/\(name) (use that device, or detach it with losetup -d /dev/\(name))"
            }
        }
        return nil
    }

    private static func use(of device: Sysfs, mounts: [Mount]) -> String? {
        if let mount = mounts.first(where: { $0.number == device.number }) {
            return "mounted on \(mount.mountPoint) (unmount it first)"
        }
        for path in swapPaths() where DeviceNumber(path: path) == device.number {
            return "in use as swap space (swapoff \(path) first)"
        }
        for holder in device.holders {
            let name = "/dev/\(holder.name ?? holder.number.description)"
            let mounted = mounts.first { $0.number == holder.number }.map { ", which is mounted on \($0.mountPoint)" } ?? ""
            return "held by \(name)\(mounted) (use \(name) itself, or take it down first)"
        }
        return nil
    }

    static func swapDevices() -> Set<DeviceNumber> { Set(swapPaths().compactMap { DeviceNumber(path: $0) }) }

    private static func swapPaths() -> [String] {
        (fileText("/proc/swaps") ?? "").split(separator: "\n").dropFirst().compactMap { line in
            line.split(whereSeparator: { $0 == " " || $0 == "\t" }).first.map { Mount.unescaped($0) }
        }
    }
}

/// A line of `/proc/self/mountinfo` (proc(5)).
struct Mount: Equatable {
    var number: DeviceNumber
    var mountPoint: String

    static func all() -> [Mount] { parse(fileText("/proc/self/mountinfo") ?? "") { DeviceNumber(path: $0) } }

    /// `resolve` gives the number of a source device's path: file systems such as btrfs mount under an anonymous number, only
    /// their source names the disk.
    static func parse(_ text: String, resolve: (String) -> DeviceNumber?) -> [Mount] {
        text.split(separator: "\n").flatMap { line -> [Mount] in
            let fields = line.split(separator: " ", omittingEmptySubsequences: false)
            guard fields.count > 6, let number = DeviceNumber(fields[2]) else { return [] }
            let mountPoint = unescaped(fields[4])
            var mounts = [Mount(number: number, mountPoint: mountPoint)]
            if let separator = fields.firstIndex(of: "-"), separator + 2 < fields.count {
                let source = unescaped(fields[separator + 2])
                if source.hasPrefix("/"), let resolved = resolve(source), resolved != number {
                    mounts.append(Mount(number: resolved, mountPoint: mountPoint))
                }
            }
            return mounts
        }
    }

    /// Undoes `\040` and the like.
    static func unescaped(_ text: some StringProtocol) -> String {
        var bytes: [UInt8] = []
        var rest = Array(text.utf8)[...]
        while let byte = rest.popFirst() {
            let digits = rest.prefix(3)
            if byte == UInt8(ascii: "\\"), digits.count == 3, digits.allSatisfy({ (48...55).contains($0) }) {
                bytes.append(digits.reduce(0) { $0 &* 8 &+ ($1 &- 48) })
                rest = rest.dropFirst(3)
            } else {
                bytes.append(byte)
            }
        }
        return String(decoding: bytes, as: UTF8.self)
    }
}

import CIoUring
import Glibc

/// Identity of a block device: what `/dev/sdb`, `/dev/disk/by-id/…` and `/dev/block/8:16` have in common.
struct DeviceNumber: Hashable, CustomStringConvertible {
    var major: UInt32
    var minor: UInt32

    init(major: UInt32, minor: UInt32) {
        self.major = major
        self.minor = minor
    }

    init(_ number: dev_t) {
        self.init(major: ciouring_device_major(UInt64(number)), minor: ciouring_device_minor(UInt64(number)))
    }

    /// From `8:16`, as in sysfs and mountinfo.
    init?(_ text: some StringProtocol) {
        let parts = text.split(separator: ":")
        guard parts.count == 2, let major = UInt32(parts[0]), let minor = UInt32(parts[1].trimmingNewline) else { return nil }
        self.init(major: major, minor: minor)
    }

    /// Of the block device that `path` leads to; nil when it leads elsewhere.
    init?(path: String) {
        var facts = stat()
        guard stat(path, &facts) == 0, facts.st_mode & S_IFMT == S_IFBLK else { return nil }
        self.init(facts.st_rdev)
    }

    var description: String { "\(major):\(minor)" }
}

extension StringProtocol {
    var trimmingNewline: SubSequence {
        var end = endIndex
        while end > startIndex, self[index(before: end)] == "\n" { end = index(before: end) }
        return self[..<end]
    }
}

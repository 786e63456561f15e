import Glibc

/// What `/sys/dev/block/MAJOR:MINOR` tells of a block device.
struct Sysfs {
    let number: DeviceNumber
    var directory: String { "/sys/dev/block/\(number)" }

    /// `sdb`, as the kernel calls it.
    var name: String? {
        fileText(directory + "/uevent")?.split(separator: "\n")
            .first { $0.hasPrefix("DEVNAME=") }.map { String($0.dropFirst("DEVNAME=".count)) }
    }

    var path: String { "/dev/\(name ?? "block/\(number)")" }

    /// The text of one of its files.
    func attribute(_ name: String) -> String? { fileText("\(directory)/\(name)").map { String($0.trimmingNewline) } }

    /// Partitions of this disk.
    var partitions: [Sysfs] {
        directoryEntries(directory).compactMap { entry in
            guard access("\(directory)/\(entry)/partition", F_OK) == 0 else { return nil }
            return Sysfs(deviceFile: "\(directory)/\(entry)/dev")
        }
    }

    /// Block devices stacked on this one (device-mapper, md, bcache).
    var holders: [Sysfs] {
        directoryEntries(directory + "/holders").compactMap { Sysfs(deviceFile: "\(directory)/holders/\($0)/dev") }
    }

    /// The disk that this is a partition of; itself when it is a disk.
    var disk: Sysfs {
        guard access(directory + "/partition", F_OK) == 0 else { return self }
        return Sysfs(deviceFile: directory + "/../dev") ?? self
    }

    /// How many loop devices lie between it and a disk: on a loop device over a file on a loop device it is two.
    func loopDepth(atMost limit: Int = 8) -> Int {
        guard limit > 0 else { return 0 }
        let disk = disk
        if let path = disk.attribute("loop/backing_file") {
            var facts = stat()
            guard stat(path, &facts) == 0 else { return 1 }
            return 1 + Sysfs(DeviceNumber(facts.st_dev)).loopDepth(atMost: limit - 1)
        }
        return disk.slaves.map { $0.loopDepth(atMost: limit - 1) }.max() ?? 0
    }

    /// Whether the device can unmap what it is told to zero.
    var canPunchHoles: Bool {
        let queue = disk.directory + "/queue/"
        return (number(in: queue + "write_zeroes_max_bytes") ?? 0) > 0 && (number(in: queue + "discard_max_bytes") ?? 0) > 0
    }

    private func number(in path: String) -> UInt64? {
        fileText(path).flatMap { UInt64($0.trimmingNewline) }
    }

    init(_ number: DeviceNumber) { self.number = number }

    init?(deviceFile: String) {
        guard let number = fileText(deviceFile).flatMap({ DeviceNumber($0) }) else { return nil }
        self.init(number)
    }
}

/// A small text file (procfs, sysfs), or nil when it cannot be read.
func fileText(_ path: String) -> String? {
    let fd = open(path, O_RDONLY | O_CLOEXEC)
    guard fd >= 0 else { return nil }
    defer { close(fd) }
    var bytes: [UInt8] = []
    var chunk = [UInt8](repeating: 0, count: 16384)
    while true {
        let count = read(fd, &chunk, chunk.count)
        if count < 0 && errno == EINTR { continue }
        guard count >= 0 else { return nil }
        if count == 0 { return String(decoding: bytes, as: UTF8.self) }
        bytes.append(contentsOf: chunk[..<count])
    }
}

/// Names in a directory without `.` and `..`; empty when it cannot be read.
func directoryEntries(_ path: String) -> [String] {
    guard let directory = opendir(path) else { return [] }
    defer { closedir(directory) }
    var names: [String] = []
    while let entry = readdir(directory) {
        let name = withUnsafePointer(to: &entry.pointee.d_name) {
            $0.withMemoryRebound(to: CChar.self, capacity: 256) { String(cString: $0) }
        }
        if name != "." && name != ".." { names.append(name) }
    }
    return names.sorted()
}

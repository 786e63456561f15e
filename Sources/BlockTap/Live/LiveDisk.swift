import CIoUring
import CLiveTap
import Glibc

/// A disk that the live tap can follow, and what it must know of it. Throws in words when it cannot be followed.
///
/// Followed are request-based disks (blk-mq: SCSI, NVMe, virtio, loop, nbd, …), as a whole: requests name sectors of the disk, whichever
/// partition they were for.
struct LiveDisk {
    let name: String
    let device: BlockDevice
    let number: DeviceNumber
    /// Hardware queues, and tags of each: a write in flight has one of them.
    let queueCount: Int
    let tagCount: Int
    /// Those whose requests go to each hardware queue.
    let processors: [Int: [Int]]
    /// Tells this disk from another one that had its number before (Linux 5.15; 0 when the kernel does not say).
    let sequence: UInt64
    /// `/sys/dev/block/…/stat`, open.
    let statistics: SysfsStatistics

    var geometry: BlockGeometry { device.geometry }
    var blockCount: UInt64 { geometry.blockCount }

    init(name: String, path: String) throws(SystemError) {
        func refuse(_ reason: String) -> SystemError { SystemError(errno: EOPNOTSUPP, what: "cannot follow \(path) with the live tap: \(reason)") }
        guard let number = DeviceNumber(path: path) else { throw refuse("it is not a block device") }
        let sysfs = Sysfs(number)
        if let reason = Self.refusal(of: sysfs) { throw refuse(reason) }
        let queues = directoryEntries(sysfs.directory + "/mq")
        self.name = name
        self.number = number
        device = try BlockDevice.open(path: path, access: .readOnly, exclusive: false)
        // A queue that no processor uses is left out there.
        queueCount = (queues.compactMap { Int($0) }.max() ?? -1) + 1
        tagCount = queues.compactMap { fileText("\(sysfs.directory)/mq/\($0)/nr_tags").flatMap { Int($0.trimmingNewline) } }.max() ?? 0
        processors = queues.reduce(into: [:]) { processors, queue in
            guard let number = Int(queue), let list = fileText("\(sysfs.directory)/mq/\(queue)/cpu_list") else { return }
            processors[number] = list.split(whereSeparator: { !$0.isNumber }).compactMap { Int($0) }
        }
        sequence = fileText(sysfs.directory + "/diskseq").flatMap { UInt64($0.trimmingNewline) } ?? 0
        guard tagCount > 0 else { throw refuse("its queues have no tags") }
        statistics = try SysfsStatistics(directory: sysfs.directory)
    }

    /// It may have been resized since it was opened.
    var sizeBytesNow: UInt64 {
        var size: UInt64 = 0
        return ciouring_block_size_bytes(device.fd, &size) == 0 ? size : geometry.sizeBytes
    }

    /// Every one of these disks, its partitions and what is stacked on them.
    static func devices(of disks: [LiveDisk]) -> Set<DeviceNumber> { disks.reduce(into: []) { $0.formUnion(Sysfs($1.number).above) } }

    /// As the kernel keeps it in `struct block_device`: 12 bits of major number, 20 of minor.
    var kernelNumber: UInt32 { number.major << 20 | number.minor }
}

/// The kernel's own, exact account of a disk (Documentation/block/stat.rst).
final class SysfsStatistics {
    private let stat: Int32
    private let inflight: Int32
    private let isKeptPath: String

    init(directory: String) throws(SystemError) {
        stat = open(directory + "/stat", O_RDONLY | O_CLOEXEC)
        isKeptPath = directory + "/queue/iostats"
        inflight = open(directory + "/inflight", O_RDONLY | O_CLOEXEC)
        guard stat >= 0, inflight >= 0 else { throw SystemError(errno: errno, doing: "read the statistics in \(directory)") }
    }

    deinit {
        close(stat)
        close(inflight)
    }

    /// Sectors of writes and discards that have completed since the disk appeared.
    func completedSectors() -> Int64 {
        let fields = Self.numbers(stat)
        return (fields.count > 6 ? fields[6] : 0) + (fields.count > 13 ? fields[13] : 0)
    }

    /// Milliseconds that all requests took that have completed since the disk appeared, together.
    func spentMilliseconds() -> Int64 {
        let fields = Self.numbers(stat)
        return [3, 7, 14, 16].reduce(0) { $0 + (fields.count > $1 ? fields[$1] : 0) }
    }

    /// Whether the kernel keeps it (an administrator can turn it off at any time).
    var isKept: Bool { fileText(isKeptPath)?.trimmingNewline == "1" }

    /// Writes that the driver has.
    func writesInFlight() -> Int64 { Self.numbers(inflight).dropFirst().first ?? 0 }

    private static func numbers(_ fd: Int32) -> [Int64] {
        withUnsafeTemporaryAllocation(of: UInt8.self, capacity: 512) { buffer in
            let count = pread(fd, buffer.baseAddress!, buffer.count, 0)
            var numbers: [Int64] = []
            numbers.reserveCapacity(20)
            var isInNumber = false
            for i in 0..<max(0, count) {
                if buffer[i] >= 48, buffer[i] <= 57 {
                    let digit = Int64(buffer[i] - 48)
                    if isInNumber { numbers[numbers.count - 1] = numbers[numbers.count - 1] &* 10 &+ digit } else { numbers.append(digit) }
                    isInNumber = true
                } else {
                    isInNumber = false
                }
            }
            return numbers
        }
    }
}

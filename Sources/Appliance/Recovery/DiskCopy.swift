import BlockTap
import Foundation
import Glibc
import Replica
import Synchronization

/// One disk of a recovery point, copied into a raw file or onto a block device, then read back and compared.
///
/// Two passes over the same runs of data: write and sync; then, with nothing of it left in the page cache, read both sides again and
/// compare byte by byte. The store checks every block of its side against its checksum both times. What the point does not hold is a
/// hole in a file, and zeroed (and read back) on a device, which may hold anything before. Blocks until it is done.
final class DiskCopy: Sendable {
    /// How far it has come; both passes count.
    struct Progress: Sendable {
        var step = "writing"
        var doneBytes: UInt64 = 0
        var totalBytes: UInt64 = 0
        var writtenBytes: UInt64 = 0
    }

    private static let chunkBytes = 4 << 20
    private static let zeroBytes: UInt64 = 256 << 20

    private let reader: VolumeReader
    private let isCancelled: @Sendable () -> Bool
    private let state: Mutex<Progress>
    /// Bytes that the point has something for.
    let dataBytes: UInt64

    init(reader: VolumeReader, isCancelled: @escaping @Sendable () -> Bool) {
        self.reader = reader
        self.isCancelled = isCancelled
        var total: UInt64 = 0
        var next: UInt64 = 0
        while let run = reader.nextData(from: next, bytesMax: .max) {
            total += run.upperBound - run.lowerBound
            next = run.upperBound
        }
        dataBytes = total
        state = Mutex(Progress(totalBytes: 2 * total))
    }

    var progress: Progress { state.withLock { $0 } }

    // MARK: File

    /// Makes the file `path`, which must not exist, sparse and as long as the disk.
    func writeFile(_ path: String) throws {
        let fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0o600)
        guard fd >= 0 else { throw failure("create \(path)") }
        defer { close(fd) }
        guard ftruncate(fd, off_t(reader.geometry.sizeBytes)) == 0 else { throw failure("set the length of \(path)") }
        try withBuffers { source, _ in
            try eachRun { run in
                let bytes = try read(run, into: source)
                try writeNonZero(bytes, fd, run.lowerBound, path)
            }
        }
        try sync(fd, path)
        try verifyFile(fd, path)
    }

    /// Compares a file that was finished before the appliance was restarted.
    func verifyFile(_ path: String) throws {
        let fd = open(path, O_RDONLY | O_CLOEXEC)
        guard fd >= 0 else { throw failure("open \(path)") }
        defer { close(fd) }
        try sync(fd, path)
        try verifyFile(fd, path)
    }

    private func verifyFile(_ fd: Int32, _ path: String) throws {
        state.withLock { $0.step = "reading back" }
        guard lseek(fd, 0, SEEK_END) == off_t(reader.geometry.sizeBytes) else {
            throw ApplianceError.failed("\(path) has not the length of the disk (\(reader.geometry.sizeBytes) bytes)")
        }
        // Written back by now, so that this is asked of the disk again.
        posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED)
        try withBuffers { source, target in
            try eachRun { run in try compare(run, read(run, into: source), target, fd, path) }
        }
    }

    // MARK: Device

    /// Everything on the device goes, behind the disk's end as well as before it.
    func writeDevice(_ device: BlockDevice) throws {
        let size = paddedSize(device)
        guard size <= device.geometry.sizeBytes else {
            throw ApplianceError.refused("\(device.path) has \(device.geometry.sizeBytes) bytes, disk \(reader.name) needs \(size)")
        }
        state.withLock { $0.totalBytes = device.geometry.sizeBytes + dataBytes }
        var zeroed: UInt64 = 0
        try withBuffers { source, _ in
            var next: UInt64 = 0
            while true {
                let run = reader.nextData(from: next, bytesMax: Self.chunkBytes)
                zeroed = max(zeroed, next)
                try zero(device, roundedUp(zeroed, device)..<(run?.lowerBound ?? device.geometry.sizeBytes))
                guard let run else { break }
                let bytes = try read(run, into: source)
                let length = Int(roundedUp(UInt64(bytes.count), device))
                if length > bytes.count { memset(source.baseAddress! + bytes.count, 0, length - bytes.count) }
                try write(UnsafeRawBufferPointer(start: source.baseAddress!, count: length), device.fd, run.lowerBound, device.path)
                advance(run)
                next = run.upperBound
            }
        }
        try sync(device.fd, device.path)
        try verifyDevice(device)
    }

    private func verifyDevice(_ device: BlockDevice) throws {
        state.withLock { $0.step = "reading back" }
        posix_fadvise(device.fd, 0, 0, POSIX_FADV_DONTNEED)
        try withBuffers { source, target in
            var next: UInt64 = 0
            while next < device.geometry.sizeBytes {
                try checkCancelled()
                let end = min(device.geometry.sizeBytes, next + UInt64(Self.chunkBytes))
                let inside = min(end, max(next, reader.geometry.sizeBytes))
                let length = Int(inside - next)
                if length > 0 { try reader.read(offsetBytes: next, into: UnsafeMutableRawBufferPointer(start: source.baseAddress!, count: length)) }
                memset(source.baseAddress! + length, 0, Int(end - next) - length)
                try compare(next..<end, UnsafeRawBufferPointer(start: source.baseAddress!, count: Int(end - next)), target, device.fd, device.path)
                next = end
            }
        }
    }

    /// Whether anything but zeroes is found at the beginning, the end, and 256 places between: enough to see that somebody keeps
    /// something there, not a proof that nobody does.
    static func looksEmpty(_ device: BlockDevice) throws -> Bool {
        let piece = UInt64(1 << 20)
        let size = device.geometry.sizeBytes
        let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: Int(piece), alignment: 4096)
        defer { buffer.deallocate() }
        let align = UInt64(max(4096, device.geometry.logicalBlockBytes))
        var places: [(UInt64, UInt64)] = [(0, min(piece, size)), ((size - min(piece, size)) / align * align, size)]
        for index in 1...256 as ClosedRange<UInt64> {
            let start = (size / 257 * index) / align * align
            if start + align <= size { places.append((start, start + align)) }
        }
        for (start, end) in places {
            var done = start
            while done < end {
                let count = pread(device.fd, buffer.baseAddress!, Int(min(piece, end - done)), off_t(done))
                guard count > 0 else { throw ApplianceError.failed("cannot read \(device.path): \(SystemError.text(of: errno))") }
                if !isZero(UnsafeRawBufferPointer(start: buffer.baseAddress!, count: count)) { return false }
                done += UInt64(count)
            }
        }
        return true
    }

    /// The disk's end falls inside a block of the device when that has larger ones.
    private func paddedSize(_ device: BlockDevice) -> UInt64 { roundedUp(reader.geometry.sizeBytes, device) }
    private func roundedUp(_ bytes: UInt64, _ device: BlockDevice) -> UInt64 {
        let unit = UInt64(device.geometry.logicalBlockBytes)
        return (bytes + unit - 1) / unit * unit
    }

    private func zero(_ device: BlockDevice, _ range: Range<UInt64>) throws {
        var start = range.lowerBound
        while start < range.upperBound {
            try checkCancelled()
            let end = min(range.upperBound, start + Self.zeroBytes)
            // linux/fs.h: BLKZEROOUT, _IO(0x12, 127). Zeroes are guaranteed, whatever the device does for a discard.
            var bounds: (UInt64, UInt64) = (start, end - start)
            guard ioctl(device.fd, 0x127F, &bounds) == 0 else { throw failure("zero \(device.path)") }
            start = end
        }
    }

    // MARK: The rest

    /// Brings a target, which holds what `earlier` shows and was compared, to what this reader shows: what differs is written, synced, read back and compared.
    func update(_ path: String, since earlier: VolumeReader) throws {
        let fd = open(path, O_RDWR | O_CLOEXEC)
        guard fd >= 0 else { throw failure("open \(path)") }
        defer { close(fd) }
        try update(fd, path, unit: 1, since: earlier)
    }

    func update(_ device: BlockDevice, since earlier: VolumeReader) throws {
        try update(device.fd, device.path, unit: UInt64(device.geometry.logicalBlockBytes), since: earlier)
    }

    private func update(_ fd: Int32, _ path: String, unit: UInt64, since earlier: VolumeReader) throws {
        func eachChange(_ body: (Range<UInt64>) throws -> Void) throws {
            var next: UInt64 = 0
            while let run = reader.nextChange(from: next, bytesMax: Self.chunkBytes, since: earlier) {
                try body(run)
                next = run.upperBound
            }
        }
        var changedBytes: UInt64 = 0
        try eachChange { changedBytes += $0.upperBound - $0.lowerBound }
        let total = 2 * changedBytes
        state.withLock { $0 = Progress(step: "writing the rest", totalBytes: total, writtenBytes: $0.writtenBytes) }
        try withBuffers { source, _ in
            try eachChange { run in
                let bytes = try read(run, into: source)
                // Zeroes too: something else may be there.
                let length = Int((UInt64(bytes.count) + unit - 1) / unit * unit)
                if length > bytes.count { memset(source.baseAddress! + bytes.count, 0, length - bytes.count) }
                try write(UnsafeRawBufferPointer(start: source.baseAddress!, count: length), fd, run.lowerBound, path)
                advance(run)
            }
        }
        try sync(fd, path)
        state.withLock { $0.step = "reading the rest back" }
        posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED)
        try withBuffers { source, target in
            try eachChange { run in try compare(run, read(run, into: source), target, fd, path) }
        }
    }

    // MARK: Both

    private func withBuffers(_ body: (UnsafeMutableRawBufferPointer, UnsafeMutableRawBufferPointer) throws -> Void) throws {
        let source = UnsafeMutableRawBufferPointer.allocate(byteCount: Self.chunkBytes + 4096, alignment: 4096)
        let target = UnsafeMutableRawBufferPointer.allocate(byteCount: Self.chunkBytes + 4096, alignment: 4096)
        defer {
            source.deallocate()
            target.deallocate()
        }
        try body(source, target)
    }

    private func eachRun(_ body: (Range<UInt64>) throws -> Void) throws {
        var next: UInt64 = 0
        while let run = reader.nextData(from: next, bytesMax: Self.chunkBytes) {
            try body(run)
            next = run.upperBound
        }
    }

    private func read(_ run: Range<UInt64>, into buffer: UnsafeMutableRawBufferPointer) throws -> UnsafeRawBufferPointer {
        try checkCancelled()
        let part = UnsafeMutableRawBufferPointer(rebasing: buffer[..<(Int(run.upperBound - run.lowerBound))])
        try reader.read(offsetBytes: run.lowerBound, into: part)
        return UnsafeRawBufferPointer(part)
    }

    private func writeNonZero(_ bytes: UnsafeRawBufferPointer, _ fd: Int32, _ offset: UInt64, _ path: String) throws {
        var start = 0
        while start < bytes.count {
            func end(_ from: Int) -> Int { min(from + blockBytes, bytes.count) }
            if Self.isZero(UnsafeRawBufferPointer(rebasing: bytes[start..<end(start)])) {
                start = end(start)
                continue
            }
            var stop = end(start)
            while stop < bytes.count, !Self.isZero(UnsafeRawBufferPointer(rebasing: bytes[stop..<end(stop)])) { stop = end(stop) }
            try write(UnsafeRawBufferPointer(rebasing: bytes[start..<stop]), fd, offset + UInt64(start), path)
            start = stop
        }
        advance(offset..<(offset + UInt64(bytes.count)))
    }

    private func write(_ bytes: UnsafeRawBufferPointer, _ fd: Int32, _ offset: UInt64, _ path: String) throws {
        var done = 0
        while done < bytes.count {
            let count = pwrite(fd, bytes.baseAddress! + done, bytes.count - done, off_t(offset) + off_t(done))
            if count < 0, errno == EINTR { continue }
            guard count > 0 else { throw failure("write to \(path)") }
            done += count
        }
        state.withLock { $0.writtenBytes += UInt64(bytes.count) }
    }

    private func compare(_ run: Range<UInt64>, _ expected: UnsafeRawBufferPointer, _ buffer: UnsafeMutableRawBufferPointer, _ fd: Int32, _ path: String) throws {
        var done = 0
        // Direct I/O wants whole blocks; what lies behind the disk's end is not compared.
        let wanted = (expected.count + 4095) / 4096 * 4096
        while done < expected.count {
            let count = pread(fd, buffer.baseAddress! + done, wanted - done, off_t(run.lowerBound) + off_t(done))
            if count < 0, errno == EINTR { continue }
            guard count > 0 else { throw failure("read \(path) back") }
            done += count
        }
        guard memcmp(expected.baseAddress!, buffer.baseAddress!, expected.count) == 0 else {
            let at = (0..<expected.count).first { expected[$0] != buffer[$0] } ?? 0
            throw ApplianceError.failed("\(path) does not hold what was written to it: it differs at byte \(run.lowerBound + UInt64(at)) (is its medium damaged, or does somebody else write to it?)")
        }
        advance(run)
    }

    private func sync(_ fd: Int32, _ path: String) throws {
        guard fsync(fd) == 0 else { throw failure("make \(path) durable") }
    }

    private func advance(_ run: Range<UInt64>) { state.withLock { $0.doneBytes += run.upperBound - run.lowerBound } }

    private func checkCancelled() throws { if isCancelled() { throw CancellationError() } }

    private func failure(_ action: String) -> ApplianceError { .failed("cannot \(action): \(SystemError.text(of: errno))") }

    static func isZero(_ bytes: UnsafeRawBufferPointer) -> Bool {
        guard let first = bytes.first else { return true }
        return first == 0 && memcmp(bytes.baseAddress!, bytes.baseAddress! + 1, bytes.count - 1) == 0
    }
}

import CIoUring
import CLiveTap
import Foundation
import Synchronization
import Testing

@testable import BlockTap

/// What a test of the live tap needs: loop devices, a bpffs of its own, a replica in memory; all of it goes with this object.
final class LiveTapBed: @unchecked Sendable {
    static var isAvailable: Bool { LoopDevice.isAvailable && LiveTapGroup.isAvailable }

    let loops: [LoopDevice]
    let bytes: Int
    /// The replica's disks.
    let images: [UnsafeMutableRawPointer]
    private let directory: TemporaryDirectory
    private(set) var group: LiveTapGroup!
    private var signal: AsyncStream<Void>.Iterator!
    let events = Mutex<[String]>([])
    /// Also told of each, on the tap's thread.
    var onEvent: (@Sendable (String) -> Void)?
    var configuration = LiveTapConfiguration()
    /// Bytes of the epochs carried so far, zeroes included.
    private(set) var carriedBytes: UInt64 = 0

    init(disks: Int, bytes: Int, loopOptions: [String] = []) throws {
        self.bytes = bytes
        loops = try (0..<disks).map { _ in try LoopDevice(bytes: bytes, options: loopOptions) }
        images = (0..<disks).map { _ in
            let image = UnsafeMutableRawPointer.allocate(byteCount: bytes, alignment: 4096)
            memset(image, 0xA5, bytes)
            return image
        }
        directory = try TemporaryDirectory()
        try LiveTapGroup.bpffs(at: directory.path)
        configuration.skipsFreeSpace = false                       // the whole disks are compared
    }

    deinit {
        group?.close()
        group = nil
        if FileManager.default.fileExists(atPath: pins) { LiveTapGroup.detach(pinDirectory: pins) }
        umount2(directory.path, Int32(MNT_DETACH))
        for image in images { image.deallocate() }
    }

    var pins: String { directory.path + "/group" }

    /// Attaches, or takes over what an earlier group of this bed left in the kernel.
    func start() async throws {
        group = nil
        group = try await LiveTapGroup(
            disks: loops.enumerated().map { (name: "d\($0.offset)", path: $0.element.path) }, pinDirectory: pins, configuration: configuration
        ) { [weak self] line in
            self?.events.withLock { $0.append(line) }
            self?.onEvent?(line)
        }
        let (stream, continuation) = AsyncStream<Void>.makeStream(bufferingPolicy: .bufferingNewest(1))
        signal = stream.makeAsyncIterator()
        group.setWakeup { continuation.yield() }
    }

    /// As a killed process: all that it knew is gone.
    func kill() {
        group.setWakeup(nil)
        group.close()
        group = nil
    }

    /// Cuts, applies the epoch to the images and, unless told not to, acknowledges it. Whether the images are proven to be the disks.
    @discardableResult
    func carry(acknowledges: Bool = true, consistency: CutConsistency = .crash, fuzzyBytesMax: UInt64 = 64 << 20) async throws -> Cut {
        let cut = try await group.cut(fuzzyBytesMax: fuzzyBytesMax, consistency: consistency)
        while true {
            guard let item = group.nextItem() else {
                _ = await signal.next()
                continue
            }
            switch item {
            case .data(let epoch, let buffer):
                #expect(epoch == cut.epoch)
                (images[buffer.disk] + Int(buffer.offsetBytes)).copyMemory(from: buffer.memory, byteCount: buffer.lengthBytes)
                carriedBytes += UInt64(buffer.lengthBytes)
                group.release(buffer)
            case .zero(_, let disk, let offset, let length):
                carriedBytes += length
                memset(images[disk] + Int(offset), 0, Int(length))
            case .end(let epoch):
                #expect(epoch == cut.epoch)
                if acknowledges { group.acknowledge(epoch) }
                return cut
            case .abandoned(_, let reason):
                throw SystemError(errno: EIO, what: "\(reason)")
            }
        }
    }

    func fullSync() async throws {
        group.beginFullSync()
        while await group.needsFuzzyCut { try await carry() }
    }

    /// Carries until a proven epoch, `attempts` times at most.
    func carryUntilProven(attempts: Int = 100) async throws {
        for _ in 0..<attempts where try await carry().kind == .exact { return }
        Issue.record("no proven epoch in \(attempts)")
    }

    /// The replica's disk as a device to mount.
    func copyOfImage(_ disk: Int = 0, options: [String] = []) throws -> LoopDevice {
        let copy = try LoopDevice(bytes: bytes, options: options)
        var offset = 0
        while offset < bytes {
            let count = pwrite(copy.file.fd, images[disk] + offset, min(4 << 20, bytes - offset), off_t(offset))
            guard count > 0 else { throw SystemError(errno: errno, doing: "write a copy of an image") }
            offset += count
        }
        try Program.run(["blockdev", "--flushbufs", copy.path])
        return copy
    }

    /// Carries until the images are proven and nothing has been written since, and compares. (A file system may still be mounted after `umount`, in
    /// a mount namespace that somebody made meanwhile, and write.)
    func quietImagesEqualDisks() async throws -> Bool {
        for _ in 0..<20 {
            let before = await group.liveStatistics.issuedCount
            try await carryUntilProven()
            if try imagesEqualDisks() { return true }
            if await group.liveStatistics.issuedCount == before { return false }
        }
        return false
    }

    /// Whether the images are what the disks hold now, read past the page cache.
    func imagesEqualDisks() throws -> Bool {
        for (loop, image) in zip(loops, images) {
            let device = try BlockDevice.open(path: loop.path, access: .readOnly, exclusive: false)
            let chunk = 1 << 20
            let memory = UnsafeMutableRawPointer.allocate(byteCount: chunk, alignment: 4096)
            defer { memory.deallocate() }
            var offset = 0
            while offset < bytes {
                let count = pread(device.fd, memory, min(chunk, bytes - offset), off_t(offset))
                guard count > 0 else { throw SystemError(errno: errno, doing: "read \(loop.path)") }
                if memcmp(memory, image + offset, count) != 0 { return false }
                offset += count
            }
        }
        return true
    }
}

/// What the program in the kernel has in memory.
extension LiveTapBed {
    func withPinnedState(_ change: (UnsafeMutablePointer<clivetap_state>) -> Void) throws { try withPinned("state", at: 0, change) }

    func withPinnedDisk(_ index: Int, _ change: (UnsafeMutablePointer<clivetap_disk>) -> Void) throws { try withPinned("disks", at: index, change) }

    /// Changed behind our back.
    private func withPinned<T>(_ map: String, at index: Int, _ change: (UnsafeMutablePointer<T>) -> Void) throws {
        let fd = clivetap_get("\(pins)/map-\(map)")
        guard fd >= 0 else { throw SystemError(errno: -fd, doing: "open the map \(map)") }
        defer { close(fd) }
        let bytes = MemoryLayout<T>.stride * (index + 1)
        let memory = mmap(nil, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)
        guard let memory, memory != MAP_FAILED else { throw SystemError(errno: errno, doing: "map \(map)") }
        defer { munmap(memory, bytes) }
        change(memory.assumingMemoryBound(to: T.self) + index)
    }

    /// What the program keeps, and what its slots have, when nobody writes.
    func slotSums(_ index: Int) throws -> (kept: Int64, counted: Int64) {
        var disk = clivetap_disk()
        try withPinnedDisk(index) { disk = $0.pointee }
        var sum: Int64 = 0
        for slot in Int(disk.slot_base)..<Int(disk.slot_base + disk.queue_count * disk.tag_count) {
            try withPinned("slots", at: slot) { (slot: UnsafeMutablePointer<clivetap_slot>) in sum += Int64(slot.pointee.sectors) }
        }
        return (disk.slot_sectors, sum)
    }
}

/// Chains of dependent writes straight to the disks: each write is issued only after the one before it was acknowledged, on whichever disk.
/// Every point is checked exactly.
final class DependentWriters: @unchecked Sendable {
    struct Options {
        var chains = 8
        var pauseMicroseconds: UInt32 = 0
        /// Of a hundred writes, those to eight hot blocks.
        var hotPercent = 25
    }

    private final class Chain: @unchecked Sendable {
        static let capacity = 1 << 21
        /// Write n (from 1) is `log[n - 1]`: block of the chain | count << 28.
        let log = UnsafeMutablePointer<UInt32>.allocate(capacity: capacity)
        let written = Atomic<Int>(0)
        var thread = pthread_t()
        /// The state after `modelled` writes.
        var model: [UInt64]
        var modelled = 0
        init(blocks: Int) { model = Array(repeating: 0, count: blocks) }
        deinit { log.deallocate() }
    }

    private let paths: [String]
    private let blocksPerDisk: Int
    private let perChain: Int
    private let options: Options
    private let chains: [Chain]
    private let isStopping = Atomic<Bool>(false)
    let failures = Mutex<[String]>([])

    init(_ bed: LiveTapBed, _ options: Options = Options()) {
        paths = bed.loops.map(\.path)
        self.options = options
        blocksPerDisk = bed.bytes / blockBytes
        // A chain's block k lies on disk k % disks, so that neighbours in time are on different disks.
        perChain = blocksPerDisk / options.chains * paths.count
        let perChain = perChain
        chains = (0..<options.chains).map { _ in Chain(blocks: perChain) }
    }

    /// Of `disks` that are followed and whose full sync is done. The caller stops them.
    static func followed(disks: Int, _ options: Options = Options()) async throws -> (bed: LiveTapBed, writers: DependentWriters) {
        let bed = try LiveTapBed(disks: disks, bytes: 32 << 20)
        try await bed.start()
        let writers = DependentWriters(bed, options)
        try writers.start()
        do { try await bed.fullSync() } catch {
            writers.stop()
            throw error
        }
        return (bed, writers)
    }

    var writeCount: Int { chains.reduce(0) { $0 + $1.written.load(ordering: .relaxed) } }

    /// Returns when so many more writes have been acknowledged.
    func progress(by count: Int) async throws {
        let goal = writeCount + count
        while writeCount < goal, failures.withLock({ $0.isEmpty }) { try await Task.sleep(for: .microseconds(200)) }
    }

    func start() throws {
        for (number, chain) in chains.enumerated() {
            var fds: [Int32] = []
            for path in paths {
                let fd = open(path, O_WRONLY | O_CLOEXEC | ciouring_o_direct)
                guard fd >= 0 else { throw SystemError(errno: errno, doing: "open \(path)") }
                fds.append(fd)
            }
            let opened = fds
            let thread = Thread { [self] in
                run(chain, number, opened)
                done.signal()
            }
            thread.stackSize = 1 << 20
            thread.start()
        }
    }

    private let done = DispatchSemaphore(value: 0)

    private var isStopped = false

    /// Ends and waits for them; once is enough.
    func stop() {
        if isStopped { return }
        isStopped = true
        isStopping.store(true, ordering: .relaxed)
        for _ in chains { done.wait() }
    }

    private func run(_ chain: Chain, _ number: Int, _ fds: [Int32]) {
        defer { for fd in fds { close(fd) } }
        let memory = UnsafeMutableRawPointer.allocate(byteCount: 4 * blockBytes, alignment: blockBytes)
        defer { memory.deallocate() }
        var state = UInt64(number + 1) &* 0x9E37_79B9_7F4A_7C15
        func random(_ bound: Int) -> Int {
            state ^= state << 13
            state ^= state >> 7
            state ^= state << 17
            return Int(state % UInt64(bound))
        }
        var sequence: UInt64 = 0
        while !isStopping.load(ordering: .relaxed), Int(sequence) < Chain.capacity {
            sequence += 1
            var block = random(100) < options.hotPercent ? random(8) : random(perChain)
            var count = 1
            // A longer write is one on one disk.
            if random(16) == 0, paths.count == 1 {
                count = 4
                block = min(block, perChain - 4)
            }
            chain.log[Int(sequence) - 1] = UInt32(block) | UInt32(count) << 28
            for word in 0..<count * blockBytes / 16 {
                memory.storeBytes(of: UInt64(number + 1), toByteOffset: word * 16, as: UInt64.self)
                memory.storeBytes(of: sequence, toByteOffset: word * 16 + 8, as: UInt64.self)
            }
            let (disk, offset) = place(number, block)
            let length = count * blockBytes
            if pwrite(fds[disk], memory, length, off_t(offset)) != length {
                failures.withLock { $0.append("write to disk \(disk) at \(offset): errno \(errno)") }
                return
            }
            chain.written.store(Int(sequence), ordering: .releasing)
            if options.pauseMicroseconds > 0 { usleep(options.pauseMicroseconds) }
        }
    }

    private func place(_ chain: Int, _ block: Int) -> (disk: Int, offset: Int) {
        let perDisk = perChain / paths.count
        return (block % paths.count, (chain * perDisk + block / paths.count) * blockBytes)
    }

    /// What is wrong with the images as a state of the disks at one moment; points must be checked in their order.
    func violations(in images: [UnsafeMutableRawPointer]) -> [String] {
        var violations: [String] = []
        for (number, chain) in chains.enumerated() {
            var found = [UInt64](repeating: 0, count: perChain)
            var newest: UInt64 = 0
            for block in 0..<perChain {
                let (disk, offset) = place(number, block)
                let writer = (images[disk] + offset).load(as: UInt64.self)
                let sequence = (images[disk] + offset).load(fromByteOffset: 8, as: UInt64.self)
                if sequence != 0, writer != UInt64(number + 1) { violations.append("chain \(number): block \(block) is of \(writer)") }
                found[block] = sequence
                newest = max(newest, sequence)
            }
            if newest < UInt64(chain.modelled) {
                violations.append("chain \(number): the newest write is \(newest), a point before had \(chain.modelled)")
                continue
            }
            // All but the newest write, which may have been in flight.
            let last = newest == 0 ? nil : chain.log[Int(newest) - 1]
            while chain.modelled + 1 < Int(newest) {
                apply(chain.log[chain.modelled], UInt64(chain.modelled + 1), to: &chain.model)
                chain.modelled += 1
            }
            var full = chain.model
            if let last { apply(last, newest, to: &full) }
            for block in 0..<perChain where found[block] != full[block] && found[block] != chain.model[block] {
                violations.append("chain \(number): with write \(newest), block \(block) holds write \(found[block]), not \(full[block])")
            }
        }
        return violations
    }

    private func apply(_ entry: UInt32, _ sequence: UInt64, to model: inout [UInt64]) {
        let first = Int(entry & 0x0FFF_FFFF)
        for block in first..<first + Int(entry >> 28) { model[block] = sequence }
    }
}

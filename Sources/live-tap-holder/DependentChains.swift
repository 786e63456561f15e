import BlockTap
import Glibc
import Synchronization

/// Chains of dependent writes and discards straight to disks, and the exact check of a point against them. Each write of a chain is issued only after
/// the one before it was acknowledged, on whichever disk; every sector of a written block names the chain and the write. A discard leaves zeroes
/// (which must be so on these disks). It comes after a write whose blocks it leaves alone, so that what a disk holds tells the newest
/// write that is there, and the discard after it is the only thing that may be there without a name.
///
/// A point is right when of each chain it has all up to some m and nothing later, where m alone may be there in part, in whole sectors
/// (it may have been in flight), and m is no less than what had been acknowledged when the cut was asked for.
final class DependentChains: @unchecked Sendable {
    static let blocksPerWriteMax = 4
    private static let sectorBytes = 512
    private static let sectorsPerBlock = blockBytes / sectorBytes

    private struct Write {
        private let bits: UInt32
        /// In the chain's own numbering.
        var block: Int { Int(bits & 0x0FFF_FFFF) }
        var count: Int { Int(bits >> 28 & 7) }
        var isDiscard: Bool { bits >> 31 == 1 }
        init(block: Int, count: Int, isDiscard: Bool) { bits = UInt32(block) | UInt32(count) << 28 | (isDiscard ? 1 << 31 : 0) }
    }

    private final class Chain: @unchecked Sendable {
        static let capacity = 1 << 21
        /// Write n (from 1) is `log[n - 1]`.
        let log = UnsafeMutablePointer<Write>.allocate(capacity: capacity)
        let begun = Atomic<UInt64>(0)
        let acknowledged = Atomic<UInt64>(0)
        /// The stamps after `modelled` writes; the checker's.
        var model: [UInt64]
        var modelled: UInt64 = 0
        init(blocks: Int) { model = Array(repeating: 0, count: blocks) }
        deinit { log.deallocate() }
    }

    private let devices: [BlockDevice]
    private let chains: [Chain]
    /// Blocks that a chain owns on each disk: one run, at chain × blocksPerDisk. Its own block k lies on disk k % disks.
    private let blocksPerDisk: Int
    private let pauseMicroseconds: UInt32
    private let discardPercent: Int
    private let isStopping = Atomic<Bool>(false)
    private var threads: [pthread_t] = []
    private let failure = Mutex<String?>(nil)
    private var stamps: [UInt64]

    init(paths: [String], bytesPerDisk: Int, chains count: Int, pauseMicroseconds: UInt32, discardPercent: Int) throws {
        devices = try paths.map { try BlockDevice.open(path: $0, access: count > 0 ? .readWrite : .readOnly, exclusive: false) }
        blocksPerDisk = bytesPerDisk / blockBytes / max(1, count)
        self.pauseMicroseconds = pauseMicroseconds
        self.discardPercent = discardPercent
        let blocks = blocksPerDisk * paths.count
        guard blocksPerDisk >= 16, blocks < 1 << 28 else { throw SystemError(errno: EINVAL, what: "\(count) chains do not fit on disks of \(bytesPerDisk >> 20) MiB") }
        chains = (0..<count).map { _ in Chain(blocks: blocks) }
        stamps = Array(repeating: 0, count: blocks * Self.sectorsPerBlock)
    }

    var writeCount: UInt64 { acknowledged.reduce(0, +) }
    var acknowledged: [UInt64] { chains.map { $0.acknowledged.load(ordering: .acquiring) } }
    var isWriting: Bool { problem == nil && !isStopping.load(ordering: .relaxed) }
    /// A write that failed.
    var problem: String? { failure.withLock { $0 } }

    // MARK: Writing

    /// Zeroes the disks, so that no write of an earlier run is on them.
    func wipe(bytesPerDisk: Int) throws(SystemError) {
        let chunk = 1 << 20
        let memory = UnsafeMutableRawPointer.allocate(byteCount: chunk, alignment: blockBytes)
        defer { memory.deallocate() }
        memset(memory, 0, chunk)
        for device in devices {
            var offset = 0
            while offset < bytesPerDisk {
                let count = pwrite(device.fd, memory, min(chunk, bytesPerDisk - offset), off_t(offset))
                guard count > 0 else { throw SystemError(errno: count == 0 ? EIO : errno, doing: "write to \(device.path)") }
                offset += count
            }
        }
    }

    func start() throws(SystemError) {
        for number in chains.indices {
            let argument = Unmanaged.passRetained(Argument(chains: self, number: number)).toOpaque()
            var thread = pthread_t()
            let result = pthread_create(&thread, nil, { argument in
                let argument = Unmanaged<Argument>.fromOpaque(argument!).takeRetainedValue()
                argument.chains.run(argument.number)
                return nil
            }, argument)
            guard result == 0 else { throw SystemError(errno: result, doing: "start a thread") }
            threads.append(thread)
        }
    }

    private final class Argument {
        let chains: DependentChains
        let number: Int
        init(chains: DependentChains, number: Int) { (self.chains, self.number) = (chains, number) }
    }

    /// Ends and waits for the writers. Afterwards nothing of theirs is in flight.
    func stop() {
        isStopping.store(true, ordering: .relaxed)
        for thread in threads { pthread_join(thread, nil) }
        threads.removeAll()
    }

    private func run(_ number: Int) {
        let chain = chains[number], blocks = chain.model.count, disks = devices.count
        let memory = UnsafeMutableRawPointer.allocate(byteCount: Self.blocksPerWriteMax * blockBytes, alignment: blockBytes)
        defer { memory.deallocate() }
        var generator = SystemRandomNumberGenerator()
        var state = generator.next() | 1
        func random(_ bound: Int) -> Int {
            state ^= state << 13
            state ^= state >> 7
            state ^= state << 17
            return Int(state % UInt64(bound))
        }
        var sequence: UInt64 = 0
        while !isStopping.load(ordering: .relaxed), sequence < UInt64(Chain.capacity) {
            sequence += 1
            // A quarter goes to eight hot blocks, as a log's would; a longer write is of neighbours on one disk.
            let count = random(16) == 0 ? Self.blocksPerWriteMax : 1
            let block = min(random(4) == 0 ? random(8) : random(blocks), blocks - 1 - (count - 1) * disks)
            var write = Write(block: block, count: count, isDiscard: random(100) < discardPercent)
            if write.isDiscard {
                let isFree = sequence > 1 && !chain.log[Int(sequence) - 2].isDiscard && !overlap(chain.log[Int(sequence) - 2], write)
                if !isFree { write = Write(block: block, count: count, isDiscard: false) }
            }
            chain.log[Int(sequence) - 1] = write
            chain.begun.store(sequence, ordering: .releasing)
            let device = devices[block % disks], length = count * blockBytes, start = offset(number, block)
            var isDone: Bool
            if write.isDiscard {
                isDone = withUnsafeTemporaryAllocation(of: UInt64.self, capacity: 2) { range in
                    (range[0], range[1]) = (UInt64(start), UInt64(length))
                    return ioctl(device.fd, Self.blkDiscard, range.baseAddress!) == 0
                }
            } else {
                for word in 0..<length / 16 {
                    memory.storeBytes(of: UInt64(number + 1), toByteOffset: word * 16, as: UInt64.self)
                    memory.storeBytes(of: sequence, toByteOffset: word * 16 + 8, as: UInt64.self)
                }
                isDone = pwrite(device.fd, memory, length, off_t(start)) == length
            }
            guard isDone else {
                let words = "\(write.isDiscard ? "discard" : "write") of \(length) bytes on \(device.path) at \(start): \(SystemError.text(of: errno))"
                failure.withLock { $0 = $0 ?? words }
                return
            }
            chain.acknowledged.store(sequence, ordering: .releasing)
            if pauseMicroseconds > 0 { usleep(pauseMicroseconds) }
        }
    }

    /// include/uapi/linux/fs.h: _IO(0x12, 119)
    private static let blkDiscard: UInt = 0x1277

    private func overlap(_ a: Write, _ b: Write) -> Bool {
        var result = false
        forEachBlock(of: a) { block in forEachBlock(of: b) { if $0 == block { result = true } } }
        return result
    }

    private func offset(_ chain: Int, _ block: Int) -> Int { (chain * blocksPerDisk + block / devices.count) * blockBytes }

    // MARK: Checking

    /// What is wrong with `images`, one per disk, as a state of the disks at one moment at which every chain had at least its `floor` of writes.
    /// Points must be checked in their order.
    func violations(in images: [UnsafeMutableRawPointer], floor: [UInt64]) -> [String] {
        var violations: [String] = []
        for number in chains.indices {
            if let words = violation(of: number, in: images, floor: floor[number]) { violations.append("chain \(number): \(words)") }
        }
        return violations
    }

    private func violation(of number: Int, in images: [UnsafeMutableRawPointer], floor: UInt64) -> String? {
        let chain = chains[number], disks = devices.count
        var newest: UInt64 = 0
        for block in chain.model.indices {
            let start = images[block % disks] + offset(number, block)
            for sector in 0..<Self.sectorsPerBlock {
                let writer = start.load(fromByteOffset: sector * Self.sectorBytes, as: UInt64.self)
                let sequence = start.load(fromByteOffset: sector * Self.sectorBytes + 8, as: UInt64.self)
                if sequence != 0, writer != UInt64(number + 1) { return "block \(block) holds a write of \(writer)" }
                stamps[block * Self.sectorsPerBlock + sector] = sequence
                newest = max(newest, sequence)
            }
        }
        let least = max(floor, chain.modelled)
        guard newest >= least || newest + 1 == least && chain.log[Int(newest)].isDiscard else {
            return "its newest write is \(newest), but \(least) had been acknowledged before the cut, or were in a point before"
        }
        guard newest <= chain.begun.load(ordering: .acquiring) else { return "it holds write \(newest), which was never made" }
        if newest == 0 { return nil }
        // What was acknowledged before the cut, or was followed by something that is there, is there as a whole.
        while chain.modelled < max(newest - 1, floor) {
            chain.modelled += 1
            let write = chain.log[Int(chain.modelled) - 1]
            forEachBlock(of: write) { chain.model[$0] = write.isDiscard ? 0 : chain.modelled }
        }
        // The others may be in or out, sector by sector: by the stamp that they leave.
        var open: [(write: Write, stamp: UInt64)] = []
        if floor < newest { open.append((chain.log[Int(newest) - 1], newest)) }
        if floor <= newest, newest < chain.begun.load(ordering: .acquiring), chain.log[Int(newest)].isDiscard { open.append((chain.log[Int(newest)], 0)) }
        var isNewestWhole = true, isDiscardThere = false
        for block in chain.model.indices {
            let stamp = open.first { contains($0.write, block) }?.stamp
            for sector in 0..<Self.sectorsPerBlock {
                let found = stamps[block * Self.sectorsPerBlock + sector]
                if found == chain.model[block] {
                    if stamp == newest { isNewestWhole = false }
                } else if found == stamp {
                    if found == 0 { isDiscardThere = true }
                } else {
                    let (disk, place) = (block % disks, offset(number, block) + sector * Self.sectorBytes)
                    return "write \(newest) is there, but \(devices[disk].path) at \(place) holds write \(found), not \(stamp ?? chain.model[block])"
                }
            }
        }
        return isDiscardThere && !isNewestWhole ? "the discard after write \(newest) is there, but not all of that write" : nil
    }

    private func forEachBlock(of write: Write, _ body: (Int) -> Void) {
        for i in 0..<write.count { body(write.block + i * devices.count) }
    }

    private func contains(_ write: Write, _ block: Int) -> Bool {
        block >= write.block && block <= write.block + (write.count - 1) * devices.count && (block - write.block) % devices.count == 0
    }

    /// Whether the images are what the disks hold now; nobody may be writing.
    func areDisks(_ images: [UnsafeMutableRawPointer], bytesPerDisk: Int) throws(SystemError) -> Bool {
        let chunk = 1 << 20
        let memory = UnsafeMutableRawPointer.allocate(byteCount: chunk, alignment: blockBytes)
        defer { memory.deallocate() }
        for (device, image) in zip(devices, images) {
            var offset = 0
            while offset < bytesPerDisk {
                let count = pread(device.fd, memory, min(chunk, bytesPerDisk - offset), off_t(offset))
                guard count > 0 else { throw SystemError(errno: count == 0 ? EIO : errno, doing: "read \(device.path)") }
                if memcmp(memory, image + offset, count) != 0 { return false }
                offset += count
            }
        }
        return true
    }
}

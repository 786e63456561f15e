import BlockTap
import CIoUring
import CLibNBD
import Glibc
import Synchronization

/// A writer whose every write is issued only after the one before it was acknowledged, over all disks of the group.
///
/// Each written block holds the chain's number and the write's sequence number, repeated over the block. The chain owns every
/// `chainCount`-th stripe of every disk, so chains do not touch each other's blocks. A write that fails (its server was killed) is
/// issued again, unchanged, until it is acknowledged.
final class DependentChain: @unchecked Sendable {
    struct Write: Sendable {
        var disk: UInt8
        var blockCount: UInt8
        /// In the chain's own numbering of its blocks on that disk.
        var block: UInt32
    }

    static let stripeBlocks = 16
    static let blocksPerWriteMax = 4

    let number: Int
    let chainCount: Int
    let diskBlocks: [Int]
    /// Write n is `log[n - 1]`; appended before the write is issued.
    private let log = Mutex<[Write]>([])
    private let acknowledgedCount = Atomic<UInt64>(0)
    private let isStopping = Atomic<Bool>(false)
    private let pauseMicroseconds: UInt32
    private var random: SystemRandomNumberGenerator = SystemRandomNumberGenerator()

    init(number: Int, chainCount: Int, diskBlocks: [Int], pauseMicroseconds: UInt32) {
        self.number = number
        self.chainCount = chainCount
        self.diskBlocks = diskBlocks
        self.pauseMicroseconds = pauseMicroseconds
    }

    var writes: [Write] { log.withLock { $0 } }
    var acknowledged: UInt64 { acknowledgedCount.load(ordering: .acquiring) }
    func stop() { isStopping.store(true, ordering: .releasing) }

    func ownBlockCount(disk: Int) -> Int {
        diskBlocks[disk] / (Self.stripeBlocks * chainCount) * Self.stripeBlocks
    }

    /// Where the chain's own block lies on the disk, in blocks.
    func diskBlock(_ own: Int) -> Int {
        let stripe = own / Self.stripeBlocks
        return (stripe * chainCount + number) * Self.stripeBlocks + own % Self.stripeBlocks
    }

    /// Runs until `stop`; for a thread of its own. `connect`: to the disk of that number; nil when that is not possible now.
    func run(connect: (Int) -> (any ChainTarget)?) {
        var connections = diskBlocks.indices.map(connect)
        let memory = UnsafeMutableRawPointer.allocate(byteCount: Self.blocksPerWriteMax * blockBytes, alignment: blockBytes)
        defer { memory.deallocate() }
        var sequence: UInt64 = 0
        while !isStopping.load(ordering: .acquiring) {
            sequence += 1
            let write = nextWrite(sequence)
            log.withLock { $0.append(write) }
            for word in 0..<(Int(write.blockCount) * blockBytes / 16) {
                memory.storeBytes(of: UInt64(number + 1), toByteOffset: word * 16, as: UInt64.self)
                memory.storeBytes(of: sequence, toByteOffset: word * 16 + 8, as: UInt64.self)
            }
            let disk = Int(write.disk)
            let durable = sequence % 16 == 0
            let count = Int(write.blockCount) * blockBytes
            let offset = diskBlock(Int(write.block)) * blockBytes
            while connections[disk]?.write(memory, count: count, offset: offset, durable: durable) != true {
                // The server is gone; its successor will listen on the same path.
                if isStopping.load(ordering: .acquiring) { return }
                connections[disk] = connect(disk)
                if connections[disk] == nil { usleep(20_000) }
            }
            acknowledgedCount.store(sequence, ordering: .releasing)
            if pauseMicroseconds > 0 { usleep(pauseMicroseconds) }
        }
    }

    /// A quarter of the writes go to eight hot blocks, as a log's would.
    private func nextWrite(_ sequence: UInt64) -> Write {
        let disk = Int.random(in: 0..<diskBlocks.count, using: &random)
        let own = ownBlockCount(disk: disk)
        let isHot = Int.random(in: 0..<4, using: &random) == 0
        let block = isHot ? Int.random(in: 0..<8, using: &random) : Int.random(in: 0..<own, using: &random)
        let room = Self.stripeBlocks - block % Self.stripeBlocks
        let count = min(room, Int.random(in: 0..<8, using: &random) == 0 ? Self.blocksPerWriteMax : 1)
        return Write(disk: UInt8(disk), blockCount: UInt8(count), block: UInt32(block))
    }

    enum PointVerdict { case exact(newest: UInt64), violation(String) }

    /// What a chain's blocks hold after its first `writeCount` writes; moves on as newer points are looked at, and only so.
    struct Model {
        fileprivate var writeCount = 0
        /// Of the point looked at last.
        fileprivate var newest: UInt64 = 0
        fileprivate var sequences: [[UInt64]]

        init(_ chain: DependentChain) { sequences = chain.diskBlocks.indices.map { [UInt64](repeating: 0, count: chain.ownBlockCount(disk: $0)) } }

        fileprivate mutating func advance(to count: Int, _ log: [Write]) {
            for n in writeCount..<count {
                let write = log[n]
                for block in Int(write.block)..<Int(write.block) + Int(write.blockCount) { sequences[Int(write.disk)][block] = UInt64(n + 1) }
            }
            writeCount = count
        }
    }

    /// Whether the chain's blocks in a recovery point are what they were after some write m, all earlier ones included, the last
    /// one possibly in part (it may have been in flight). `stamp` gives (chain, sequence) of a disk's block. `model`: of an older point, or new: what that has, this one has.
    /// `log`: `writes`, as they were after the point was cut.
    func check(_ model: inout Model, _ log: [Write], _ stamp: (_ disk: Int, _ diskBlock: Int) throws -> (UInt64, UInt64)) rethrows -> PointVerdict {
        var found: [[UInt64]] = []
        var newest: UInt64 = 0
        for disk in diskBlocks.indices {
            var sequences = [UInt64](repeating: 0, count: ownBlockCount(disk: disk))
            for own in sequences.indices {
                let (chain, sequence) = try stamp(disk, diskBlock(own))
                if sequence != 0 && chain != UInt64(number + 1) { return .violation("disk \(disk) block \(diskBlock(own)) holds a block of chain \(chain)") }
                if sequence > UInt64(log.count) { return .violation("disk \(disk) block \(diskBlock(own)) holds write \(sequence), which was never made") }
                sequences[own] = sequence
                newest = max(newest, sequence)
            }
            found.append(sequences)
        }
        guard newest >= model.newest else { return .violation("its newest write is \(newest); an older recovery point has \(model.newest)") }
        model.newest = newest
        let before = max(0, Int(newest) - 1)
        model.advance(to: before, log)
        let last = newest > 0 ? log[before] : nil
        for disk in diskBlocks.indices {
            for own in found[disk].indices where found[disk][own] != model.sequences[disk][own] {
                if found[disk][own] == newest, let last, Int(last.disk) == disk, (Int(last.block)..<Int(last.block) + Int(last.blockCount)).contains(own) { continue }
                return .violation(
                    "disk \(disk) block \(diskBlock(own)) holds write \(found[disk][own]) where \(model.sequences[disk][own]) was acknowledged before write \(newest), which is there")
            }
        }
        return .exact(newest: newest)
    }
}

/// Where a chain's writes go.
protocol ChainTarget {
    /// False when the write may not have happened; it is then issued again. `durable`: it survives a power cut when this returns.
    func write(_ memory: UnsafeRawPointer, count: Int, offset: Int, durable: Bool) -> Bool
}

/// A block device, or a file of a mounted file system, past the page cache.
final class DirectFile: ChainTarget {
    private let fd: Int32

    /// `isSynchronous`: every write is durable, with what leads to it.
    init?(path: String, isSynchronous: Bool) {
        fd = open(path, O_RDWR | ciouring_o_direct | O_CLOEXEC | (isSynchronous ? O_DSYNC : 0))
        guard fd >= 0 else { return nil }
    }

    deinit { close(fd) }

    func write(_ memory: UnsafeRawPointer, count: Int, offset: Int, durable: Bool) -> Bool {
        pwrite(fd, memory, count, off_t(offset)) == count && (!durable || fdatasync(fd) == 0)
    }
}

/// One libnbd connection. libnbd does not reconnect: a failed one is thrown away and made anew.
final class NBDConnection: ChainTarget {
    private let handle: OpaquePointer?

    /// Nil when nobody serves the socket now.
    init?(socketPath: String) {
        handle = nbd_create()
        guard handle != nil, nbd_connect_unix(handle, socketPath) == 0 else { return nil }
    }

    deinit { nbd_close(handle) }

    /// Durable with FUA.
    func write(_ memory: UnsafeRawPointer, count: Int, offset: Int, durable: Bool) -> Bool {
        nbd_pwrite(handle, memory, count, UInt64(offset), durable ? LIBNBD_CMD_FLAG_FUA : 0) == 0
    }
}

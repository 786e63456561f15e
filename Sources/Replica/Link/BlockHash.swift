import BlockTap
import CXXHash
import NIOCore

// Resync: what both ends of a data stream hash, and how it travels. The rules are in docs/link-protocol.md, *Resync*.

/// XXH3-128 of a block's plain bytes under the resync's key.
struct BlockHash: Hashable, Sendable {
    var low: UInt64
    var high: UInt64
    static let bytes = 16
}

/// The key of one resync: as long as XXH3's own secret, out of the system's generator. Who writes to the protected disks does not know it, and
/// so cannot make two blocks that are taken for each other.
struct BlockHasher: Hashable, Sendable {
    static let keyBytes = 192
    let key: [UInt8]

    static func random() -> BlockHasher {
        var generator = SystemRandomNumberGenerator()
        return BlockHasher(key: (0..<keyBytes).map { _ in .random(in: 0...255, using: &generator) })
    }

    func hash(_ bytes: UnsafeRawPointer, count: Int) -> BlockHash {
        let sum = cxxhash_128_keyed(bytes, count, key, key.count)
        return BlockHash(low: sum.low64, high: sum.high64)
    }
}

/// RESYNC: 1 = of the state that is the newest now, 0 = no more.
struct ResyncMeta: Hashable {
    var isWanted: Bool
    func write(_ b: inout ByteBuffer) { b.put(UInt8(isWanted ? 1 : 0)) }
    init(isWanted: Bool) { self.isWanted = isWanted }
    init(_ r: inout MetaReader) throws(FrameError) {
        let value = try r.u8()
        guard value <= 1, r.remaining == 0 else { throw r.malformed("it says neither yes nor no") }
        isWanted = value == 1
    }
}

/// RESYNC_READY: epoch u64, ready u8, 7 × 0, key 192 bytes. Not ready: nothing can be compared, all has to be copied.
struct ResyncReadyMeta: Hashable {
    var epoch: EpochNumber
    var isReady: Bool
    var hasher: BlockHasher

    func write(_ b: inout ByteBuffer) {
        b.put(epoch.rawValue, isReady ? UInt64(1) : 0)
        b.writeBytes(hasher.key)
    }
    init(epoch: EpochNumber, isReady: Bool, hasher: BlockHasher) {
        self.epoch = epoch
        self.isReady = isReady
        self.hasher = hasher
    }
    init(_ r: inout MetaReader) throws(FrameError) {
        epoch = EpochNumber(try r.u64())
        let ready = try r.u64()
        guard ready <= 1, r.remaining == BlockHasher.keyBytes else { throw r.malformed("it is \(r.remaining) bytes of key") }
        isReady = ready == 1
        var key: [UInt8] = []
        for _ in 0..<BlockHasher.keyBytes { key.append(try r.u8()) }
        hasher = BlockHasher(key: key)
    }
}

/// HASHES_WANTED: question u64, volume u32, number of blocks u32, first block u64.
struct HashesWantedMeta: Hashable {
    var question: UInt64
    var volume: Int
    var blockCount: Int
    var firstBlock: UInt64

    func write(_ b: inout ByteBuffer) {
        b.put(question)
        b.put(UInt32(volume), UInt32(blockCount))
        b.put(firstBlock)
    }
    init(question: UInt64, volume: Int, blockCount: Int, firstBlock: UInt64) {
        self.question = question
        self.volume = volume
        self.blockCount = blockCount
        self.firstBlock = firstBlock
    }
    init(_ r: inout MetaReader) throws(FrameError) {
        question = try r.u64()
        volume = Int(try r.u32())
        blockCount = Int(try r.u32())
        firstBlock = try r.u64()
        guard (1...FrameLimits.hashedBlocksMax).contains(blockCount), firstBlock < 1 << 52, r.remaining == 0 else { throw r.malformed("no such blocks") }
    }
}

/// HASHES: question u64, number of runs u32, 0 u32; the runs, u32 each (kind in the upper 4 bits, blocks in the lower 28); then a hash, low u64
/// and high u64, for each block of the runs that have any.
struct HashesMeta: Hashable {
    enum Kind: UInt8 {
        /// Nothing is stored: the blocks are zeroes.
        case zero = 0
        case hashed = 1
        /// They cannot be read as they were written: they differ, whatever the source has.
        case unreadable = 2
    }
    struct Run: Hashable {
        var kind: Kind
        var count: Int
    }
    var question: UInt64
    var runs: [Run]
    var hashes: [BlockHash]

    mutating func add(_ kind: Kind, _ count: Int) {
        if let last = runs.indices.last, runs[last].kind == kind { runs[last].count += count } else { runs.append(Run(kind: kind, count: count)) }
    }

    func write(_ b: inout ByteBuffer) {
        b.put(question)
        b.put(UInt32(runs.count), UInt32(0))
        for run in runs { b.put(UInt32(run.kind.rawValue) << 28 | UInt32(run.count)) }
        for hash in hashes { b.put(hash.low, hash.high) }
    }
    init(question: UInt64, runs: [Run] = [], hashes: [BlockHash] = []) {
        self.question = question
        self.runs = runs
        self.hashes = hashes
    }
    init(_ r: inout MetaReader) throws(FrameError) {
        question = try r.u64()
        let runCount = Int(try r.u32())
        guard try r.u32() == 0, runCount <= FrameLimits.hashedBlocksMax else { throw r.malformed("\(runCount) runs of blocks") }
        runs = []
        hashes = []
        var hashCount = 0
        var blockCount = 0
        for _ in 0..<runCount {
            let word = try r.u32()
            guard let kind = Kind(rawValue: UInt8(word >> 28)), word & 0xFFF_FFFF > 0 else { throw r.malformed("unknown kind of run") }
            let count = Int(word & 0xFFF_FFFF)
            runs.append(Run(kind: kind, count: count))
            blockCount += count
            if kind == .hashed { hashCount += count }
        }
        guard blockCount <= FrameLimits.hashedBlocksMax, r.remaining == hashCount * BlockHash.bytes else { throw r.malformed("its tables do not fit") }
        hashes.reserveCapacity(hashCount)
        for _ in 0..<hashCount { hashes.append(BlockHash(low: try r.u64(), high: try r.u64())) }
    }

    var blockCount: Int { runs.reduce(0) { $0 + $1.count } }
}

/// Mistakes that the link makes when told to: tests of the tests, which must notice each of them.
enum LinkFault: CaseIterable, Sendable {
    /// The sender takes what was answered for equal, whatever it says.
    case comparesNothing
    /// The sender compares blocks with what the replica had before they were sent.
    case comparesWhatWasSent
    /// The appliance hashes the oldest recovery point instead of the newest state.
    case hashesTheOldest
    /// What the appliance answers is not what was asked.
    case answersUnasked
    case answersLackABlock
    case answersLackAHash
    /// The appliance says nothing of resync, like one of an older release.
    case isOlder
}

import BlockTap
import Foundation
import NIOCore

// The meta parts of the frames. Fixed layouts are little-endian, in declaration order, without padding unless said; the rare
// ones (HELLO, WELCOME, REFUSED, CONTROL) are JSON, whose unknown fields are ignored.

/// First frame on a connection: says which kind of stream this is.
struct Hello: Codable, Hashable {
    /// Control stream.
    var agent: AgentHello?
    /// Data stream.
    var data: DataHello?
    /// Reverse stream.
    var reverse: ReverseHello?
}

struct DataHello: Codable, Hashable {
    var group: GroupID
    var generation: Generation
    var instance: String
    var disks: [SourceDisk]
    /// Whether this agent answers BLOCKS_WANTED; an older one does not know the frame.
    var answersWanted: Bool?
}

struct Welcome: Codable, Hashable {
    struct Position: Codable, Hashable {
        var instance: String
        var epoch: EpochNumber
        var kind: EpochKind
    }
    /// Plain bytes that may be in flight on a data stream; 0 on control streams.
    var windowBytes: UInt64 = 0
    /// What the replica of the group holds durably; nil when nothing.
    var position: Position?
    /// Whether this appliance answers RESYNC; an older one does not know the frame.
    var hashes: Bool?
    /// On a reverse stream, what HELLO says on the others.
    var reverse: DataHello?
}

/// Opens a stream on which the appliance sends and the agent receives: it says what WELCOME says on the others.
struct ReverseHello: Codable, Hashable {
    var group: GroupID
    var generation: Generation
    /// Names of the disks, in the order of the group's volumes.
    var disks: [String]
    var windowBytes: UInt64
    /// What the disks hold, if it is of this stream's history; else only a name for whatever they hold.
    var position: Welcome.Position
    /// A recovery point that the disks were, when nothing but this stream has changed them since.
    var original: Welcome.Position?
}

struct Refusal: Codable, Hashable {
    enum Code: String, Codable {
        case notAuthorized, unknownGroup, volumeMismatch, storeFull, storeError, fenced, superseded, protocolError, version, shuttingDown
    }
    /// A `Code`, or one that a newer peer knows.
    var code: String
    /// A sentence for the operator.
    var reason: String

    init(_ code: Code, _ reason: String) {
        self.code = code.rawValue
        self.reason = reason
    }
}

enum ControlMessage: Codable, Hashable {
    case status(AgentStatus)
    case command(AgentCommand)
}

/// EPOCH_BEGIN: epoch u64, cut time u64 (ns since 1970), block count u64, kind u8.
struct EpochBeginMeta: Hashable {
    var cut: Cut
    func write(_ b: inout ByteBuffer) {
        b.put(cut.epoch.rawValue, cut.timeNanoseconds, cut.blockCount)
        b.put(cut.kind.rawValue)
    }
    init(cut: Cut) { self.cut = cut }
    init(_ r: inout MetaReader) throws(FrameError) {
        let epoch = try r.u64(), time = try r.u64(), blocks = try r.u64()
        guard let kind = EpochKind(rawValue: try r.u8()) else { throw r.malformed("unknown kind of epoch") }
        guard time <= UInt64(Int64.max) else { throw r.malformed("no such time") }
        cut = Cut(epoch: EpochNumber(epoch), kind: kind, timeNanoseconds: time, blockCount: blocks)
    }
}

/// EPOCH_SEAL: epoch u64, data bytes u64, zero bytes u64, digest u64, consistency u8 (0 crash, 1 file system, 2 application).
/// The digest runs over the meta parts of the epoch's EXTENTS and ZERO frames: what is sealed is what was sent, in order.
struct EpochSealMeta: Hashable {
    var epoch: EpochNumber
    var dataBytes: UInt64
    var zeroBytes: UInt64
    var digest: UInt64
    var consistency: Consistency
    static let consistencies: [Consistency] = [.crash, .filesystem, .application]

    func write(_ b: inout ByteBuffer) {
        b.put(epoch.rawValue, dataBytes, zeroBytes, digest)
        b.put(UInt8(Self.consistencies.firstIndex(of: consistency)!))
    }
    init(epoch: EpochNumber, dataBytes: UInt64, zeroBytes: UInt64, digest: UInt64, consistency: Consistency) {
        self.epoch = epoch
        self.dataBytes = dataBytes
        self.zeroBytes = zeroBytes
        self.digest = digest
        self.consistency = consistency
    }
    init(_ r: inout MetaReader) throws(FrameError) {
        epoch = EpochNumber(try r.u64())
        dataBytes = try r.u64()
        zeroBytes = try r.u64()
        digest = try r.u64()
        let index = Int(try r.u8())
        guard index < Self.consistencies.count else { throw r.malformed("unknown consistency") }
        consistency = Self.consistencies[index]
    }
}

/// ACK: epoch u64 (durable up to and with it). EPOCH_ABANDON: epoch u64. FENCED: generation u64.
/// CREDIT: plain bytes of payload that the store has written since the stream began, u64.
struct NumberMeta: Hashable {
    var value: UInt64
    func write(_ b: inout ByteBuffer) { b.put(value) }
    init(_ value: UInt64) { self.value = value }
    init(_ r: inout MetaReader) throws(FrameError) { value = try r.u64() }
}

/// ALIVE: bytes received so far on this connection u64, working u8 (1: busy making an epoch durable).
struct AliveMeta: Hashable {
    var receivedBytes: UInt64
    var isWorking: Bool
    func write(_ b: inout ByteBuffer) {
        b.put(receivedBytes)
        b.put(isWorking ? UInt8(1) : 0)
    }
    init(receivedBytes: UInt64, isWorking: Bool) {
        self.receivedBytes = receivedBytes
        self.isWorking = isWorking
    }
    init(_ r: inout MetaReader) throws(FrameError) {
        receivedBytes = try r.u64()
        isWorking = try r.u8() != 0
    }
}

/// One run of bytes of one volume. In EXTENTS and ZERO: volume u32, length u32, offset u64 (ZERO: length in blocks of 4 KiB,
/// rounded up; the receiver clips the last block to the volume).
struct WireExtent: Hashable {
    var volume: UInt32
    var length: UInt32
    var offsetBytes: UInt64
    static let bytes = 16
    func write(_ b: inout ByteBuffer) {
        b.put(volume, length)
        b.put(offsetBytes)
    }
}

/// EXTENTS, the fixed front: epoch u64, plain payload bytes u32, extent count u32, checksum count u32, encoding u8, 3 × 0;
/// then the extents, then a u64 checksum per started 4 KiB block. The payload is the extents' bytes one after the other.
struct ExtentsFront: Hashable {
    enum Encoding: UInt8 { case plain = 0, lz4 = 1 }
    var epoch: EpochNumber
    var plainBytes: Int
    var extentCount: Int
    var checksumCount: Int
    var encoding: Encoding
    static let bytes = 24

    func write(_ b: inout ByteBuffer) {
        b.put(epoch.rawValue)
        b.put(UInt32(plainBytes), UInt32(extentCount), UInt32(checksumCount))
        b.put(encoding.rawValue, UInt8(0), UInt8(0), UInt8(0))
    }
    init(epoch: EpochNumber, plainBytes: Int, extentCount: Int, checksumCount: Int, encoding: Encoding) {
        self.epoch = epoch
        self.plainBytes = plainBytes
        self.extentCount = extentCount
        self.checksumCount = checksumCount
        self.encoding = encoding
    }
    init(_ r: inout MetaReader) throws(FrameError) {
        epoch = EpochNumber(try r.u64())
        plainBytes = Int(try r.u32())
        extentCount = Int(try r.u32())
        checksumCount = Int(try r.u32())
        guard let encoding = Encoding(rawValue: try r.u8()) else { throw r.malformed("unknown encoding") }
        self.encoding = encoding
        for _ in 0..<3 { _ = try r.u8() }
        guard plainBytes <= FrameLimits.payloadBytesMax else { throw r.malformed("\(plainBytes) bytes of data") }
        guard r.remaining == extentCount * WireExtent.bytes + checksumCount * 8 else { throw r.malformed("its tables do not fit") }
    }
}

/// BLOCKS_WANTED: question u64, volume u32, count u32; then per block: block u64, checksum u64, bytes u32, 0 u32.
struct BlocksWantedMeta: Hashable {
    struct Block: Hashable {
        var block: UInt64
        var checksum: UInt64
        /// 4096, but for the last block of a disk of odd size: as long as it was at the cut.
        var byteCount: Int
    }
    var question: UInt64
    var volume: Int
    var blocks: [Block]

    func write(_ b: inout ByteBuffer) {
        b.put(question)
        b.put(UInt32(volume), UInt32(blocks.count))
        for block in blocks {
            b.put(block.block, block.checksum)
            b.put(UInt32(block.byteCount), UInt32(0))
        }
    }
    init(question: UInt64, volume: Int, blocks: [Block]) {
        self.question = question
        self.volume = volume
        self.blocks = blocks
    }
    init(_ r: inout MetaReader) throws(FrameError) {
        question = try r.u64()
        volume = Int(try r.u32())
        let count = Int(try r.u32())
        guard (1...FrameLimits.wantedBlocksMax).contains(count), r.remaining == count * 24 else { throw r.malformed("its table does not fit") }
        blocks = []
        for _ in 0..<count {
            let block = try r.u64(), checksum = try r.u64()
            let bytes = Int(try r.u32())
            guard (1...blockBytes).contains(bytes), try r.u32() == 0, block < 1 << 52 else { throw r.malformed("no such block") }
            blocks.append(Block(block: block, checksum: checksum, byteCount: bytes))
        }
    }
}

/// BLOCKS: question u64, count u32, 0 u32; then per block that the source still has its place in the question, u32, ascending. The payload is
/// their bytes one after the other, each padded with zeroes to 4096.
struct BlocksMeta: Hashable {
    var question: UInt64
    var places: [Int]

    func write(_ b: inout ByteBuffer) {
        b.put(question)
        b.put(UInt32(places.count), UInt32(0))
        for place in places { b.put(UInt32(place)) }
    }
    init(question: UInt64, places: [Int]) {
        self.question = question
        self.places = places
    }
    init(_ r: inout MetaReader) throws(FrameError) {
        question = try r.u64()
        let count = Int(try r.u32())
        guard try r.u32() == 0, count <= FrameLimits.wantedBlocksMax, r.remaining == count * 4 else { throw r.malformed("its table does not fit") }
        places = []
        for _ in 0..<count {
            let place = Int(try r.u32())
            guard place > places.last ?? -1 else { throw r.malformed("its places are not in order") }
            places.append(place)
        }
    }
}

/// Reads a fixed layout; runs out with an error, never past the end.
struct MetaReader {
    let type: FrameType
    private let bytes: UnsafeRawBufferPointer
    private(set) var position = 0

    init(_ frame: FrameView) {
        type = frame.header.type
        bytes = frame.meta
    }

    var remaining: Int { bytes.count - position }
    func malformed(_ what: String) -> FrameError { .malformed(type, what) }

    private mutating func take<T: FixedWidthInteger>(_: T.Type) throws(FrameError) -> T {
        guard remaining >= MemoryLayout<T>.size else { throw malformed("it ends too early") }
        defer { position += MemoryLayout<T>.size }
        return T(littleEndian: bytes.loadUnaligned(fromByteOffset: position, as: T.self))
    }
    mutating func u8() throws(FrameError) -> UInt8 { try take(UInt8.self) }
    mutating func u32() throws(FrameError) -> UInt32 { try take(UInt32.self) }
    mutating func u64() throws(FrameError) -> UInt64 { try take(UInt64.self) }
    mutating func extent() throws(FrameError) -> WireExtent {
        WireExtent(volume: try u32(), length: try u32(), offsetBytes: try u64())
    }
}

extension FrameView {
    /// Decodes a JSON meta part.
    func json<T: Decodable>(_: T.Type) throws(FrameError) -> T {
        do {
            return try JSONDecoder().decode(T.self, from: Data(meta))
        } catch {
            throw .malformed(header.type, "\(error)")
        }
    }
}

extension ByteBuffer {
    mutating func put<each T: FixedWidthInteger>(_ values: repeat each T) {
        repeat _ = writeInteger(each values, endianness: .little)
    }
    mutating func putJSON(_ value: some Encodable) {
        // Our own plain structs of numbers and strings: encoding them cannot fail.
        writeBytes(try! JSONEncoder().encode(value))
    }
}

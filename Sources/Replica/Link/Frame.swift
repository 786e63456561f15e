import CXXHash

/// What a frame is. Numbers are part of the protocol (docs/link-protocol.md) and never reused.
enum FrameType: UInt8, Sendable {
    /// First frame on every connection, from the agent; JSON `Hello`.
    case hello = 1
    /// The appliance's answer; JSON `Welcome`. Only then may the agent send anything else.
    case welcome = 2
    case epochBegin = 3
    case extents = 4
    case zero = 5
    case epochSeal = 6
    case epochAbandon = 7
    case ack = 8
    case credit = 9
    /// JSON `Refusal`; the connection ends after it. Its form never changes between versions.
    case refused = 10
    case fenced = 11
    /// JSON `ControlMessage`, on control streams.
    case control = 12
    /// Sent by both sides every `LinkTiming.aliveSeconds`, so that a half-open connection is noticed.
    case alive = 13
    /// The appliance lost blocks and asks whether the source still has them.
    case blocksWanted = 14
    /// The agent's answer: those that it still has, with their bytes.
    case blocks = 15
    /// The agent wants to compare before it copies, or no more.
    case resync = 16
    /// The appliance's answer: of which state it will tell the hashes, and the key.
    case resyncReady = 17
    case hashesWanted = 18
    case hashes = 19

    /// Largest meta part in bytes; a longer one is garbage.
    var metaBytesMax: Int {
        switch self {
        case .hello, .welcome, .refused, .extents, .zero, .hashes: 64 * 1024
        case .resyncReady: 256
        case .blocksWanted, .blocks: 4096
        case .control: 1024 * 1024
        case .epochBegin, .epochSeal, .epochAbandon, .ack, .credit, .fenced, .alive, .resync, .hashesWanted: 64
        }
    }

    /// Only extents and blocks carry a payload.
    var payloadBytesMax: Int {
        switch self {
        case .extents: FrameLimits.payloadBytesMax
        case .blocks: FrameLimits.wantedBlocksMax * 4096
        default: 0
        }
    }
}

enum FrameLimits {
    static let headerBytes = 32
    /// Of one EXTENTS frame, before and after compression.
    static let payloadBytesMax = 4 * 1024 * 1024
    /// What the Sender fills a frame to.
    static let batchBytes = 1024 * 1024
    static let zeroRunsMax = 2048
    /// Together with 1 MiB in 4 KiB blocks this stays below `FrameType.metaBytesMax`.
    static let extentsMax = 1024
    /// Of one BLOCKS_WANTED, and of the answer.
    static let wantedBlocksMax = 64
    /// Of one HASHES_WANTED: 4 MiB. With a hash for each, HASHES stays below `FrameType.metaBytesMax`.
    static let hashedBlocksMax = 1024
    /// HASHES_WANTED that have not been answered.
    static let hashQuestionsMax = 24
}

/// The fixed part of every frame: 32 bytes, little-endian.
///
///     0  magic u32   4 version u16   6 type u8   7 flags u8 (0)   8 metaLength u32   12 payloadLength u32
///     16 sequence u64 (0, 1, … per direction)   24 checksum u64: XXH3-64 of bytes 0…23 and the meta part
///
/// The payload is covered by the block checksums in the meta part of EXTENTS, which the store keeps.
struct FrameHeader: Hashable, Sendable {
    static let magic: UInt32 = 0x4B4C_4941  // "AILK"
    static let version: UInt16 = 1

    var version: UInt16 = FrameHeader.version
    var type: FrameType
    var metaBytes: Int
    var payloadBytes: Int
    var sequence: UInt64

    /// Writes the header in front of `meta`, which follows it in memory directly.
    static func write(
        into frame: UnsafeMutableRawBufferPointer, type: FrameType, payloadBytes: Int, sequence: UInt64,
        version: UInt16 = FrameHeader.version
    ) {
        precondition(frame.count >= FrameLimits.headerBytes)
        func put<T: FixedWidthInteger>(_ value: T, _ offset: Int) {
            frame.storeBytes(of: value.littleEndian, toByteOffset: offset, as: T.self)
        }
        put(magic, 0)
        put(version, 4)
        put(type.rawValue, 6)
        put(UInt8(0), 7)
        put(UInt32(frame.count - FrameLimits.headerBytes), 8)
        put(UInt32(payloadBytes), 12)
        put(sequence, 16)
        put(checksum(of: UnsafeRawBufferPointer(frame)), 24)
    }

    static func checksum(of frame: UnsafeRawBufferPointer) -> UInt64 {
        let head = XXH3_64bits(frame.baseAddress, 24)
        let meta = UnsafeRawBufferPointer(rebasing: frame[FrameLimits.headerBytes...])
        return XXH3_64bits_withSeed(meta.baseAddress, meta.count, head)
    }
}

/// Why bytes are not a frame, or a frame is not acceptable; the connection ends.
enum FrameError: Error, Hashable, CustomStringConvertible {
    case notOurs(UInt32)
    case version(UInt16)
    case unknownType(UInt8)
    case flags(UInt8)
    case tooLong(FrameType, meta: Int, payload: Int)
    case checksum(FrameType)
    case sequence(expected: UInt64, got: UInt64)
    case malformed(FrameType, String)
    case unexpected(FrameType, String)

    var description: String {
        switch self {
        case .notOurs(let magic): "garbage instead of a frame (first bytes 0x\(String(magic, radix: 16)))"
        case .version(let version):
            "link protocol version \(version) is not spoken here (this side speaks \(FrameHeader.version)): install the same release at both sites"
        case .unknownType(let type): "unknown frame type \(type)"
        case .flags(let flags): "unknown frame flags \(flags)"
        case .tooLong(let type, let meta, let payload): "a frame \(type) with \(meta) + \(payload) bytes is longer than allowed"
        case .checksum(let type): "the checksum of a frame \(type) does not fit"
        case .sequence(let expected, let got): "frame \(got) arrived where \(expected) was due"
        case .malformed(let type, let what): "malformed frame \(type): \(what)"
        case .unexpected(let type, let what): "unexpected frame \(type): \(what)"
        }
    }
}

/// The border between a tap (its own thread) and whoever carries epochs away (the link's Sender).
///
/// States of an epoch: running → (cut) → draining → drained → acknowledged | abandoned.
/// Invariant: a block written since the last acknowledged epoch is always in exactly one of the running bitmap, a draining
/// epoch, or a drained-but-unacknowledged epoch; abandoning gives its blocks back to the running one.

/// What an epoch is good for once the replica has applied it.
public enum EpochKind: UInt8, Sendable, Codable, CaseIterable {
    /// Part of an initial full sync: read without copy-before-write, never a recovery point.
    case fuzzy = 0
    /// Copy-before-write: the replica equals the disks at the cut.
    case exact = 1
}

/// The instant at which an epoch closed, on all disks of the group.
public struct Cut: Sendable, Codable, Hashable {
    public var epoch: EpochNumber
    public var kind: EpochKind
    /// Wall clock, nanoseconds since 1970, read while no disk of the group admitted a write.
    public var timeNanoseconds: UInt64
    /// Blocks to be drained, all disks together.
    public var blockCount: UInt64
    /// Of an exact epoch: how it is known that the replica equals the disks at the cut.
    public var proof: CutProof?
    public init(epoch: EpochNumber, kind: EpochKind, timeNanoseconds: UInt64, blockCount: UInt64, proof: CutProof? = nil) {
        self.epoch = epoch
        self.kind = kind
        self.timeNanoseconds = timeNanoseconds
        self.blockCount = blockCount
        self.proof = proof
    }
}

/// What an exact epoch is asked to be.
public enum CutConsistency: UInt8, Sendable, Codable, CaseIterable {
    /// What a power cut at that instant would have left.
    case crash = 0
    /// The mounted file systems of the group are frozen at the cut: nothing of theirs is only in memory.
    case fileSystem = 1
    /// And the applications were told beforehand (scripts before and after).
    case application = 2
}

/// How it is known that an exact epoch is the disks at one instant.
public struct CutProof: Sendable, Codable, Hashable {
    public enum Method: String, Sendable, Codable, CaseIterable {
        /// The tap stands in the way of every write: copied before it was overwritten.
        case copyBeforeWrite
        /// Read again until nothing was written meanwhile.
        case rounds
        /// And in the end while the file systems were frozen.
        case freeze
    }
    public var method: Method
    /// Less than what was asked for when the file systems could not be frozen in time.
    public var consistency: CutConsistency
    public var roundCount: UInt32
    /// Blocks that were written again before they had been read.
    public var collisionCount: UInt64
    /// 0 unless frozen.
    public var freezeMilliseconds: Double
    public init(method: Method, consistency: CutConsistency = .crash, roundCount: UInt32 = 0, collisionCount: UInt64 = 0, freezeMilliseconds: Double = 0) {
        self.method = method
        self.consistency = consistency
        self.roundCount = roundCount
        self.collisionCount = collisionCount
        self.freezeMilliseconds = freezeMilliseconds
    }
}

/// A run of drained bytes in one of the source's fixed buffers; give it back with `EpochSource.release`.
public struct DrainBuffer: @unchecked Sendable {
    public var disk: Int
    /// Multiple of `blockBytes`.
    public var offsetBytes: UInt64
    /// At most `EpochSource.drainBufferBytes`; a multiple of `blockBytes` except at the end of a disk.
    public var lengthBytes: Int
    public var memory: UnsafeMutableRawPointer
    /// The source's name for the buffer.
    public var slot: Int
    public init(disk: Int, offsetBytes: UInt64, lengthBytes: Int, memory: UnsafeMutableRawPointer, slot: Int) {
        self.disk = disk
        self.offsetBytes = offsetBytes
        self.lengthBytes = lengthBytes
        self.memory = memory
        self.slot = slot
    }
}

public enum AbandonReason: String, Sendable, Codable {
    case preservedBudget = "copy-before-write budget exceeded"
    case readError = "read error on the source disk"
    case requested = "abandoned by the sender"
}

/// Handed out in order: after a cut its items, then exactly one `end` or `abandoned` for that epoch.
public enum DrainItem: Sendable {
    case data(EpochNumber, DrainBuffer)
    /// These bytes are zero (tombstone); nothing was read.
    case zero(EpochNumber, disk: Int, offsetBytes: UInt64, lengthBytes: UInt64)
    case end(EpochNumber)
    case abandoned(EpochNumber, AbandonReason)
}

public struct SourceDisk: Sendable, Codable, Hashable {
    public var name: String
    public var geometry: BlockGeometry
    public init(name: String, geometry: BlockGeometry) {
        self.name = name
        self.geometry = geometry
    }
}

/// Where a source is that an earlier process had: its bitmaps are relative to `acknowledged`.
public struct SourceResumption: Sendable, Hashable {
    /// The replica must hold this epoch or a later one.
    public var acknowledged: EpochNumber
    public var lastCut: EpochNumber
    public init(acknowledged: EpochNumber, lastCut: EpochNumber) {
        self.acknowledged = acknowledged
        self.lastCut = lastCut
    }
}

/// Figures of a source, for status; a snapshot.
public struct SourceStatistics: Sendable, Codable, Hashable {
    /// Bytes written through the tap by the protected machine since the tap was attached.
    public var writtenBytes: UInt64 = 0
    public var flushCount: UInt64 = 0
    /// Bytes that differ from the last acknowledged state (dirty, draining or unacknowledged), full sync not included.
    public var behindBytes: UInt64 = 0
    /// Bytes of the initial full sync not yet acknowledged.
    public var unsyncedBytes: UInt64 = 0
    public var preservedPeakBytes: UInt64 = 0
    public var abandonedCount: UInt64 = 0
    public var cutCount: UInt64 = 0
    public init() {}
}

/// A consistency group whose epochs can be carried away. Thread-safe; `nextItem`/`release` are called by one consumer at a time.
public protocol EpochSource: AnyObject, Sendable {
    /// Identity of the bitmaps: a new value whenever they start afresh (agent restart), so that a replica made under another
    /// instance is known to need a full sync.
    var instance: String { get }
    var disks: [SourceDisk] { get }
    static var drainBufferBytes: Int { get }

    /// Marks every block of every disk as not yet copied. Fuzzy epochs follow until it is done.
    func beginFullSync()
    /// Whether blocks of a full sync are still to be cut into a fuzzy epoch.
    var needsFuzzyCut: Bool { get async }
    /// Closes the running epoch. While a full sync has blocks left the epoch is fuzzy and takes at most `fuzzyBytesMax` of them;
    /// otherwise it is exact, if the source can prove it (else fuzzy, and complete). Throws `EpochError.draining` while the previous epoch
    /// has not been handed out whole.
    func cut(fuzzyBytesMax: UInt64, consistency: CutConsistency) async throws -> Cut
    /// Somebody waits for the next cuts: for some seconds they count for more than whoever else uses the disks.
    func hurry()
    /// The next item, or nil when there is none yet; `setWakeup`'s closure is called when that changes.
    func nextItem() -> DrainItem?
    func setWakeup(_ wakeup: (@Sendable () -> Void)?)
    func release(_ buffer: DrainBuffer)
    /// The replica holds this epoch (and all before it) durably.
    func acknowledge(_ epoch: EpochNumber)
    /// The replica will not get what is unacknowledged (link lost, epoch refused): drops queued items, OR-s all
    /// unacknowledged blocks back into the running bitmap. Returns when no item of an older epoch can appear any more.
    /// The caller must have released every buffer that it holds, or release it afterwards.
    func abandonAll() async
    var statistics: SourceStatistics { get async }
    /// What a disk holds at this moment, past any epoch: for whoever can tell by a checksum whether it is what it wants. Nil when it cannot be
    /// read. At most 1 MiB.
    func read(disk: Int, offsetBytes: UInt64, lengthBytes: Int) async -> [UInt8]?
}

extension EpochSource {
    public func cut(fuzzyBytesMax: UInt64) async throws -> Cut { try await cut(fuzzyBytesMax: fuzzyBytesMax, consistency: .crash) }

    public func hurry() {}

    /// A source that can only be drained.
    public func read(disk: Int, offsetBytes: UInt64, lengthBytes: Int) async -> [UInt8]? { nil }
}

public enum EpochError: Error, Sendable, Equatable {
    case draining(EpochNumber)
    case closed
}

import BlockTap

/// Where a `Receiver` puts epochs: a group in a store, or disks. Thread-safe.
protocol EpochTarget: AnyObject, Sendable {
    /// Plain bytes that it has memory for: `append` never waits while no more are under way.
    var windowBytes: UInt64 { get }
    /// `parent`: what the epoch goes on top of, see `ReplicaStore.beginEpoch`.
    func beginEpoch(_ cut: Cut, after parent: DurablePosition?) throws(StoreError) -> any TargetEpoch
    /// What is there, to be compared, and its position; nil: nothing.
    func openNewest(isOldest: Bool) throws(StoreError) -> (position: DurablePosition, volumes: [any ComparedVolume])?
    /// Comparing gives way to it.
    var isBusyElsewhere: Bool { get }
}

/// One epoch on its way: see `EpochWriter`, which is one.
protocol TargetEpoch: AnyObject, Sendable {
    var onWritten: (@Sendable (Int) -> Void)? { get set }
    var positionWhenSealed: DurablePosition { get }
    func append(volume: Int, offsetBytes: UInt64, bytes: UnsafeRawBufferPointer, checksums: UnsafeBufferPointer<UInt64>) throws(StoreError)
    func zero(volume: Int, offsetBytes: UInt64, lengthBytes: UInt64) throws(StoreError)
    func seal(consistency: Consistency, done: @escaping @Sendable (Result<RecoveryPoint?, StoreError>) -> Void)
    func abandon()
}

/// A disk whose blocks are compared with those of a sender.
protocol ComparedVolume: Sendable {
    var geometry: BlockGeometry { get }
    /// Whether there is anything from this block on, or known zeroes, and up to where.
    func piece(at block: UInt64, end: UInt64) -> (hasData: Bool, end: UInt64)
    /// Throws when what is there cannot be read, or is not what was written. `buffer` begins at a page, `offsetBytes` at a block.
    func read(offsetBytes: UInt64, into buffer: UnsafeMutableRawBufferPointer) throws(StoreError)
}

/// The group that a data stream's HELLO names.
final class GroupTarget: EpochTarget {
    let store: ReplicaStore
    private let hello: DataHello

    init(store: ReplicaStore, hello: DataHello) {
        self.store = store
        self.hello = hello
    }

    /// As much as the store has buffers for, less what partly filled ones may take at the borders of epochs and segments: `append`
    /// then never finds them all in use, and never blocks the event loop.
    var windowBytes: UInt64 { UInt64(max(store.options.writeBufferCount - 5, 4) * store.options.writeBufferBytes) }

    func beginEpoch(_ cut: Cut, after parent: DurablePosition?) throws(StoreError) -> any TargetEpoch {
        try store.beginEpoch(hello.group, generation: hello.generation, cut: cut, instance: hello.instance, after: parent)
    }

    func openNewest(isOldest: Bool) throws(StoreError) -> (position: DurablePosition, volumes: [any ComparedVolume])? {
        guard let (position, volumes) = try store.openNewest(hello.group, isOldest: isOldest) else { return nil }
        return (position, volumes)
    }

    var isBusyElsewhere: Bool { store.isWriting(besides: hello.group) }
}

extension EpochWriter: TargetEpoch {}

extension VolumeReader: ComparedVolume {
    func piece(at block: UInt64, end: UInt64) -> (hasData: Bool, end: UInt64) {
        let (extent, pieceEnd) = map.index.piece(at: block, end: end)
        return (extent != nil, pieceEnd)
    }
}

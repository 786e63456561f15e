import BlockTap

/// One volume as it was at a recovery point. Immutable and thread-safe; keeps its files until it is released.
public final class VolumeReader: @unchecked Sendable {
    public let name: String
    public let geometry: BlockGeometry
    let map: BlockMap
    private let store: ReplicaStore
    private let pin: UInt64

    init(store: ReplicaStore, spec: VolumeSpec, map: BlockMap, pin: UInt64) {
        self.store = store
        name = spec.name
        geometry = spec.geometry
        self.map = map
        self.pin = pin
    }

    deinit { store.unpin(pin) }

    /// Extents in the merged index.
    public var extentCount: Int { map.index.count }

    /// Reads bytes at any offset and of any length inside the volume; every block they touch is verified. Throws `.badBlock` when one
    /// does not match its checksum.
    public func read(offsetBytes: UInt64, into buffer: UnsafeMutableRawBufferPointer) throws(StoreError) {
        guard UInt64(buffer.count) <= geometry.sizeBytes, offsetBytes <= geometry.sizeBytes - UInt64(buffer.count) else {
            throw .invalid("bytes \(offsetBytes)+\(buffer.count) are not inside disk \(name) (\(geometry.sizeBytes) bytes)")
        }
        try map.read(offsetBytes: offsetBytes, into: buffer)
    }
}

extension ReplicaStore {
    /// Opens one volume (by its place in the group) at a recovery point. Instant for the newest point; an older one merges
    /// its layers first.
    public func openRecoveryPoint(_ group: GroupID, _ id: RecoveryPointID, volume: Int) throws(StoreError) -> VolumeReader {
        let (record, chain, pin) = try shared.withLock { shared throws(StoreError) -> (VolumeRecord, [LayerRecord], UInt64) in
            if shared.isClosed { throw .closed }
            guard let groupRecord = shared.state.groups[group] else { throw .unknownGroup(group) }
            guard let point = groupRecord.points.last(where: { $0.point.id == id }) else { throw .unknownRecoveryPoint(group, id) }
            guard point.volumes.indices.contains(volume) else { throw .invalid("group \(group) has no disk number \(volume) at \(id)") }
            let chain = shared.state.chain(point.volumes[volume].top)
            let pin = shared.add(Pin(chain))
            return (point.volumes[volume], chain, pin)
        }
        do throws(StoreError) {
            let (snapshot, table) = try open(group, volume, chain: chain)
            let map = BlockMap(spec: record.spec, snapshot: snapshot, segments: table, report: BadBlockReport(store: self, context: "recovery point \(id) of group \(group)"))
            return VolumeReader(store: self, spec: record.spec, map: map, pin: pin)
        } catch {
            unpin(pin)
            throw error
        }
    }

    /// Index and segments of a pinned chain.
    func open(_ group: GroupID, _ volume: Int, chain: [LayerRecord]) throws(StoreError) -> (IndexSnapshot, SegmentTable) {
        let snapshot = try merge(group, volume, chain: chain)
        if !indexes.covers(group, volume, top: snapshot.top) {
            // Taken when it still is of the volume's newest layers: upkeep may have replaced some meanwhile.
            thread.enqueue { [weak self] in
                guard let self else { return }
                let newest = self.read { state -> [LayerRecord] in
                    // A fork outlives its group; one of the same name may have fewer disks.
                    guard let disks = state.groups[group]?.volumes, disks.indices.contains(volume) else { return [] }
                    return state.chain(disks[volume].top)
                }
                // Of an older recovery point it would only be in the way.
                if let covered = snapshot.covered(of: newest), newest.count - covered <= Self.indexLagMax { self.indexes.offer(group, volume, snapshot, chain: newest) }
            }
        }
        return (snapshot, try segments.open(Set(chain.lazy.flatMap { $0.segments.lazy.map(\.segment) })))
    }
}

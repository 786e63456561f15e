import BlockTap

extension ReplicaStore {
    /// The newest durable state of a group, whatever made it: all its disks at `position`, which may be in the midst of a full sync and no
    /// recovery point. Nil while there is none. The readers keep their files, so what they show stays as it is while epochs go on.
    func openNewest(_ group: GroupID, isOldest: Bool = false) throws(StoreError) -> (position: DurablePosition, volumes: [VolumeReader])? {
        // Position, layers and pins under one lock: an epoch is published with all of them at once.
        let found = try shared.withLock { shared throws(StoreError) -> (DurablePosition, [(VolumeRecord, [LayerRecord], UInt64)])? in
            if shared.isClosed { throw .closed }
            guard let record = shared.state.groups[group] else { throw .unknownGroup(group) }
            guard let position = record.lastDurable else { return nil }
            let volumes = isOldest ? record.points.first?.volumes ?? record.volumes : record.volumes
            return (position, volumes.map { volume in
                let chain = shared.state.chain(volume.top)
                return (volume, chain, shared.add(Pin(chain)))
            })
        }
        guard let (position, parts) = found else { return nil }
        var volumes: [VolumeReader] = []
        do throws(StoreError) {
            for (number, (record, chain, pin)) in parts.enumerated() {
                let (snapshot, table) = try open(group, number, chain: chain)
                let map = BlockMap(
                    spec: record.spec, snapshot: snapshot, segments: table, report: BadBlockReport(store: self, context: "\(position.epoch) of group \(group), compared with its source"))
                volumes.append(VolumeReader(store: self, spec: record.spec, map: map, pin: pin))
            }
        } catch {
            // The others' readers let go of theirs.
            for (_, _, pin) in parts[volumes.count...] { unpin(pin) }
            throw error
        }
        return (position, volumes)
    }

    /// Whether epochs of other groups are being written at this moment.
    func isWriting(besides group: GroupID) -> Bool {
        shared.withLock { shared in shared.receivers.contains { $0.key != group && $0.value.writesQueued.load(ordering: .relaxed) > 0 } }
    }
}

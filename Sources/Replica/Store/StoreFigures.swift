/// What is asked of a store again and again, kept until a record changes it: to count hundreds of thousands of layers anew takes longer than all the rest of an
/// answer. Belongs to a state, and hears of every record that is applied to it.
struct StoreFigures: Sendable {
    struct Layers: Sendable {
        private var dataBytes: UInt64 = 0
        /// Blocks that layers name in a segment, and how far they reach into it.
        private var uses: [UInt32: (blocks: UInt64, end: UInt64)] = [:]
        /// Named more than once, at least: by the layers of a hydrated fork and by those of recovery points.
        private var repeatedBlocks: UInt64 = 0

        var segmentCount: Int { uses.count }
        /// What is named more than once counts once.
        var storedBytes: UInt64 { dataBytes - min(dataBytes, repeatedBlocks * UInt64(pageBytes)) }

        mutating func add(_ layer: LayerRecord) {
            dataBytes += layer.dataBytes
            for use in layer.segments {
                let before = uses[use.segment] ?? (0, 0)
                let now = (blocks: before.blocks + UInt64(use.blocks), end: max(before.end, UInt64(use.endBlock)))
                uses[use.segment] = now
                repeatedBlocks = repeatedBlocks &+ Self.excess(now) &- Self.excess(before)
            }
        }

        private static func excess(_ use: (blocks: UInt64, end: UInt64)) -> UInt64 { use.blocks > use.end ? use.blocks - use.end : 0 }
    }

    private var groups: [GroupID: GroupInfo] = [:]
    private var layers: Layers?

    mutating func info(_ id: GroupID, _ state: StoreState) -> GroupInfo? {
        if let known = groups[id] { return known }
        let info = state.info(id)
        groups[id] = info
        return info
    }

    mutating func layers(_ state: StoreState) -> Layers {
        if let layers { return layers }
        var all = Layers()
        for layer in state.layers.values { all.add(layer) }
        layers = all
        return all
    }

    mutating func changed(by record: ManifestRecord) {
        switch record {
        case .groupCreated(let id, _), .generationRaised(let id, _), .pointMarked(let id, _, _): groups[id] = nil
        case .epochSealed(let id, _, _, let added, _):
            groups[id] = nil
            for layer in added { layers?.add(layer) }
        case .forkSealed(_, let seals):
            for seal in seals { if let layer = seal.layer { layers?.add(layer) } }
        case .groupDeleted(let id), .pointsDropped(let id, _):
            groups[id] = nil
            layers = nil
        case .forked: break
        case .forkDropped: layers = nil
        // Whose layers or points they are is not in the record.
        case .snapshot, .layersMerged, .forkCommitted, .forkHydrated: self = StoreFigures()
        }
    }
}

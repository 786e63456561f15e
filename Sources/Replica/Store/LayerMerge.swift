import BlockTap

/// Several neighbouring layers as one.
enum LayerMerge {
    /// Writes layer number `id`, which says what `layers` (neighbours, oldest first) say together; synced, its directory is not. No data
    /// moves. Nothing is published. Any thread. A last block that the volume ended in, as only an older layer has it, must not come from
    /// a layer of another size: the caller does not merge such.
    static func write(_ storage: any Storage, store: StoreUUID, id: UInt64, layers: [LayerRecord]) throws(StoreError) -> LayerRecord {
        precondition(!layers.isEmpty)
        var index = ExtentIndex()
        var loaded: [LayerFile.Loaded] = []
        for (slot, record) in layers.enumerated() {
            let layer = try LayerFile.load(storage, store: store, record: record)
            for extent in layer.extents {
                if extent.isZero {
                    var start = extent.startBlock
                    while start < extent.endBlock {
                        let count = UInt32(min(extent.endBlock - start, UInt64(IndexExtent.blockCountMax)))
                        index.apply(IndexExtent(startBlock: start, blockCount: count, slot: IndexExtent.zeroSlot, segment: 0, segmentBlock: 0, checksumIndex: 0))
                        start += UInt64(count)
                    }
                } else {
                    index.apply(extent.indexed(slot: UInt32(slot)))
                }
            }
            loaded.append(layer)
        }
        var extents: [StoredExtent] = []
        var sums: [UInt64] = []
        for extent in index.extents {
            // Below the lowest layer everything is zero anyway.
            if extent.isZero, layers[0].parent == 0 { continue }
            var stored = StoredExtent(extent)
            stored.checksumIndex = extent.isZero ? 0 : UInt32(sums.count)
            if !extent.isZero {
                let from = loaded[Int(extent.slot)].checksums
                sums.append(contentsOf: UnsafeBufferPointer(start: from.resident! + Int(extent.checksumIndex), count: Int(extent.blockCount)))
            }
            extents.append(stored)
        }
        let newest = loaded.last!.header
        let identity = LayerIdentity(
            id: id, parent: layers[0].parent, volumeIndex: newest.volumeIndex, sizeBytes: newest.sizeBytes,
            cut: Cut(epoch: EpochNumber(newest.epoch), kind: EpochKind(rawValue: newest.kind) ?? .fuzzy, timeNanoseconds: newest.cutTimeNanoseconds, blockCount: 0),
            consistency: Consistency(formatValue: newest.consistency))
        let written = try sums.withUnsafeBufferPointer { sums throws(StoreError) in
            try LayerFile.write(storage, store: store, identity: identity, extents: extents, sums: sums)
        }
        return written.record(parent: layers[0].parent)
    }
}

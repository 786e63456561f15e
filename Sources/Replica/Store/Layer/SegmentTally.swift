import BlockTap

/// Which blocks of which segments the extents of a layer need, counted as they come in the order of the volume.
struct SegmentTally {
    private(set) var dataBytes: UInt64 = 0
    private(set) var zeroBytes: UInt64 = 0
    private var uses: [UInt32: SegmentUse] = [:]
    /// Clusters seen last. The parts of one lie within its 16 blocks of the volume, so that at most 15 others come between them.
    private var clusters: [(segment: UInt32, block: UInt32)] = []
    private var next = 0

    mutating func add(_ extent: StoredExtent) {
        if extent.isZero {
            zeroBytes += UInt64(extent.blockCount) * UInt64(blockBytes)
            return
        }
        if extent.isCompressed {
            // Parts of one cluster need it once.
            let place = (extent.segment, extent.segmentBlock)
            if clusters.contains(where: { $0 == place }) { return }
            if clusters.count < ClusterPart.blocksMax { clusters.append(place) } else { clusters[next] = place }
            next = (next + 1) % ClusterPart.blocksMax
        }
        let count = extent.segmentBlockCount
        uses[extent.segment, default: SegmentUse(segment: extent.segment, endBlock: 0, blocks: 0)].blocks += count
        uses[extent.segment]!.endBlock = max(uses[extent.segment]!.endBlock, extent.segmentBlock + count)
        dataBytes += UInt64(count) * UInt64(blockBytes)
    }

    /// In the order of their numbers.
    var segments: [SegmentUse] { uses.values.sorted { $0.segment < $1.segment } }
}

/// Where data is that was copied out of segments.
struct SegmentMoves {
    struct Piece: Equatable {
        var block: UInt32
        var count: UInt32
        var toSegment: UInt32
        var toBlock: UInt32
    }

    private var pieces: [UInt32: [Piece]] = [:]

    var isEmpty: Bool { pieces.isEmpty }

    /// `count` blocks of `segment` from `block` on are in another place now. In the order of the blocks.
    mutating func add(segment: UInt32, block: UInt32, count: UInt32, toSegment: UInt32, toBlock: UInt32) {
        precondition(count > 0 && (pieces[segment]?.last.map { $0.block + $0.count <= block } ?? true), "moves are noted in order")
        pieces[segment, default: []].append(Piece(block: block, count: count, toSegment: toSegment, toBlock: toBlock))
    }

    /// Of a segment that was moved every block that an extent needs was: throws when one was not.
    func forEachPlace(of extent: StoredExtent, _ body: (StoredExtent) throws(StoreError) -> Void) throws(StoreError) {
        guard !extent.isZero, let moved = pieces[extent.segment] else { return try body(extent) }
        var low = 0
        var high = moved.count
        while low < high {
            let middle = (low + high) / 2
            if moved[middle].block + moved[middle].count <= extent.segmentBlock { low = middle + 1 } else { high = middle }
        }
        var rest = extent
        while true {
            let at = rest.segmentBlock
            guard low < moved.count, moved[low].block <= at else { throw .invalid("block \(at) of segment \(extent.segment) was not moved with the rest") }
            let count = min(rest.segmentBlockCount, moved[low].block + moved[low].count - at)
            var part = rest
            part.segment = moved[low].toSegment
            part.segmentBlock = moved[low].toBlock + (at - moved[low].block)
            if count == rest.segmentBlockCount { return try body(part) }
            guard !rest.isCompressed else { throw .invalid("a cluster at block \(at) of segment \(extent.segment) was moved in parts") }
            part.blockCount = count
            part.storedBytes = count * UInt32(blockBytes)
            try body(part)
            rest.startBlock += UInt64(count)
            rest.blockCount -= count
            rest.segmentBlock += count
            rest.checksumIndex += count
            rest.storedBytes -= count * UInt32(blockBytes)
            low += 1
        }
    }
}

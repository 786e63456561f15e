import BlockTap

/// What a copy of a volume needs to know: where there is something at all.
extension VolumeReader {
    /// The next run of bytes at or after `offsetBytes` that is not a hole, at most `bytesMax` long; nil when nothing but holes follow.
    /// Begins and ends at blocks, except at the volume's end. A run may hold zeroes that were written as such.
    public func nextData(from offsetBytes: UInt64, bytesMax: Int) -> Range<UInt64>? {
        // The volume may end within a block: from there on there is none.
        guard offsetBytes < geometry.sizeBytes else { return nil }
        let blockCount = (geometry.sizeBytes + UInt64(blockBytes) - 1) / UInt64(blockBytes)
        var block = offsetBytes / UInt64(blockBytes)
        while block < blockCount {
            let (extent, end) = map.index.piece(at: block, end: blockCount)
            guard extent != nil else {
                block = end
                continue
            }
            let limit = min(blockCount, block + UInt64(max(1, bytesMax / blockBytes)))
            var last = min(end, limit)
            while last < limit {
                let (next, nextEnd) = map.index.piece(at: last, end: limit)
                guard next != nil else { break }
                last = nextEnd
            }
            return block * UInt64(blockBytes)..<min(last * UInt64(blockBytes), geometry.sizeBytes)
        }
        return nil
    }

    /// The next run of bytes at or after `offsetBytes` that may differ from what `earlier`, an older state of the same disk that is still open, shows; as long as
    /// both are held, data that lies where it lay is the same. May name runs that were only moved. Begins and ends at blocks, except at the volume's end.
    public func nextChange(from offsetBytes: UInt64, bytesMax: Int, since earlier: VolumeReader) -> Range<UInt64>? {
        guard offsetBytes < geometry.sizeBytes else { return nil }
        let blockCount = (geometry.sizeBytes + UInt64(blockBytes) - 1) / UInt64(blockBytes)
        func piece(at block: UInt64) -> (isSame: Bool, end: UInt64) {
            let (now, end) = map.index.piece(at: block, end: blockCount)
            let (then, thenEnd) = earlier.map.index.piece(at: block, end: end)
            guard let now, let then else { return (now == nil && then == nil, thenEnd) }
            let (a, b) = (now.clipped(from: block, to: thenEnd), then.clipped(from: block, to: thenEnd))
            return (a.segment == b.segment && a.segmentBlock == b.segmentBlock && a.cluster == b.cluster, thenEnd)
        }
        var block = offsetBytes / UInt64(blockBytes)
        while block < blockCount {
            let (isSame, end) = piece(at: block)
            if isSame {
                block = end
                continue
            }
            let limit = min(blockCount, block + UInt64(max(1, bytesMax / blockBytes)))
            var last = min(end, limit)
            while last < limit, case let next = piece(at: last), !next.isSame { last = min(limit, next.end) }
            return block * UInt64(blockBytes)..<min(last * UInt64(blockBytes), geometry.sizeBytes)
        }
        return nil
    }
}

import BlockTap

/// Several neighbouring layers as one, in bounded memory however large they are.
///
/// The layers are read side by side in the order of the volume and the newest one that has a block gives it. Runs of small layers are
/// first laid over each other in memory (24 bytes per extent, `overlayExtentsMax` in all); large ones are streamed. This is done
/// twice: once for the extents and once for their checksums, which follow them in a layer file.
enum LayerMerge {
    /// About 100 MiB of index.
    static let overlayExtentsMax = 4 << 20

    /// Writes layer number `id`, which says what `layers` (neighbours, oldest first) say together; synced, its directory is not. Nothing is
    /// published. Any thread. A last block that the volume ended in, as only an older layer has it, must not come from
    /// a layer of another size: the caller does not merge such. Nobody may take the file for garbage meanwhile: the caller pins `id`.
    ///
    /// No data moves; data that the caller has copied elsewhere (`moved`, synced) is pointed to there. Tombstones go when nothing lies
    /// below. `pace` is told the bytes read and written as they are, and may wait or throw: then, as after any error, there is no file.
    static func write(
        _ storage: any Storage, store: StoreUUID, id: UInt64, layers: [LayerRecord], moved: SegmentMoves = SegmentMoves(),
        overlayExtentsMax: Int = LayerMerge.overlayExtentsMax, isSynced: Bool = true, pace: (Int) throws(StoreError) -> Void = { _ in }
    ) throws(StoreError) -> LayerRecord {
        precondition(!layers.isEmpty)
        do throws(StoreError) {
            let sources = try MergeSources(storage, store: store, layers: layers, overlayExtentsMax: overlayExtentsMax)
            let writer = try LayerWriter(storage, store: store, id: id)
            // Below the lowest layer everything is zero anyway.
            let keepsTombstones = layers[0].parent != 0
            var sinceToldBytes = 0
            func tell(_ bytes: Int) throws(StoreError) {
                sinceToldBytes += bytes
                if sinceToldBytes < 1 << 20 { return }
                let told = sinceToldBytes
                sinceToldBytes = 0
                try pace(told)
            }
            try sources.forEach { extent throws(StoreError) in
                try tell(64)
                if extent.isZero, !keepsTombstones { return }
                try moved.forEachPlace(of: StoredExtent(extent)) { placed throws(StoreError) in try writer.append(placed) }
            }
            let checksums = MergeChecksums(storage, store: store, layers: layers)
            try sources.forEach { extent throws(StoreError) in
                if extent.isZero { return }
                try tell(16 * Int(extent.blockCount))
                try checksums.forEach(Int(extent.slot), first: Int(extent.checksumIndex), count: Int(extent.blockCount)) { sums throws(StoreError) in try writer.append(sums) }
            }
            let newest = try LayerReader(storage, store: store, record: layers.last!).header
            return try writer.finish(LayerIdentity(
                id: id, parent: layers[0].parent, volumeIndex: newest.volumeIndex, sizeBytes: newest.sizeBytes,
                cut: Cut(epoch: EpochNumber(newest.epoch), kind: EpochKind(rawValue: newest.kind) ?? .fuzzy, timeNanoseconds: newest.cutTimeNanoseconds, blockCount: 0),
                consistency: Consistency(formatValue: newest.consistency)), isSynced: isSynced)
        } catch {
            try? storage.remove(LayerFile.path(id))
            throw error
        }
    }
}

/// The extents of layers, merged; `slot` is the layer's place in the list.
private final class MergeSources {
    /// Newest first.
    private var sources: [MergeSource] = []

    init(_ storage: any Storage, store: StoreUUID, layers: [LayerRecord], overlayExtentsMax: Int) throws(StoreError) {
        var room = overlayExtentsMax
        var end = layers.count
        while end > 0 {
            var start = end
            while start > 0, layers[start - 1].extentCount <= min(room, overlayExtentsMax / 4) {
                start -= 1
                room -= layers[start].extentCount
            }
            if end - start > 1 {
                var index = ExtentIndex()
                for slot in start..<end {
                    let reader = try LayerReader(storage, store: store, record: layers[slot])
                    try reader.forEachExtents { extents throws(StoreError) in
                        for extent in extents { extent.forEachIndexed(slot: UInt32(slot)) { index.apply($0) } }
                    }
                }
                sources.append(OverlaySource(index))
                end = start
            } else {
                end -= 1
                sources.append(LayerSource(try LayerReader(storage, store: store, record: layers[end]), slot: UInt32(end)))
            }
        }
    }

    /// Every extent of the whole, in order, cut where another layer begins or ends.
    func forEach(_ body: (IndexExtent) throws(StoreError) -> Void) throws(StoreError) {
        for source in sources { try source.rewind() }
        var block: UInt64 = 0
        while true {
            var start = UInt64.max
            var winner = -1
            for index in sources.indices {
                let source = sources[index]
                while let extent = source.current, extent.endBlock <= block { try source.advance() }
                guard let extent = source.current else { continue }
                let from = max(extent.startBlock, block)
                if from < start {
                    start = from
                    winner = index
                }
            }
            if winner < 0 { return }
            let extent = sources[winner].current!
            var end = extent.endBlock
            // Newer ones have nothing at `start`, or they would be the winner.
            for newer in 0..<winner { if let other = sources[newer].current { end = min(end, other.startBlock) } }
            try body(extent.clipped(from: start, to: end))
            block = end
        }
    }
}

private class MergeSource {
    var buffer: ContiguousArray<IndexExtent> = []
    var position = 0

    final var current: IndexExtent? { position < buffer.count ? buffer[position] : nil }

    final func advance() throws(StoreError) {
        position += 1
        if position == buffer.count { try refill() }
    }

    /// Leaves `buffer` empty when there is no more.
    func refill() throws(StoreError) {}
    func rewind() throws(StoreError) {}
}

private final class OverlaySource: MergeSource {
    private let index: ExtentIndex
    private var next = 0
    init(_ index: ExtentIndex) { self.index = index }

    override func rewind() throws(StoreError) {
        next = 0
        try refill()
    }

    override func refill() throws(StoreError) {
        position = 0
        buffer = next < index.chunkCount ? index.chunk(next) : []
        next += 1
    }
}

private final class LayerSource: MergeSource {
    private static let batch = 4096
    private let reader: LayerReader
    private let slot: UInt32
    private var next = 0

    init(_ reader: LayerReader, slot: UInt32) {
        self.reader = reader
        self.slot = slot
    }

    override func rewind() throws(StoreError) {
        next = 0
        try refill()
    }

    override func refill() throws(StoreError) {
        position = 0
        buffer.removeAll(keepingCapacity: true)
        let count = min(Self.batch, reader.extentCount - next)
        if count <= 0 { return }
        let slot = slot
        let range = next..<next + count
        try reader.withExtents(range) { extents throws(StoreError) in
            for extent in extents { extent.forEachIndexed(slot: slot) { buffer.append($0) } }
        }
        next += count
    }
}

extension StoredExtent {
    /// As in an index; tombstones in the pieces that fit one.
    @inline(__always)
    func forEachIndexed(slot: UInt32, _ body: (IndexExtent) -> Void) {
        if !isZero { return body(indexed(slot: slot)) }
        var start = startBlock
        while start < endBlock {
            let count = UInt32(min(endBlock - start, UInt64(IndexExtent.blockCountMax)))
            body(IndexExtent(startBlock: start, blockCount: count, slot: IndexExtent.zeroSlot, segment: 0, segmentBlock: 0, checksumIndex: 0))
            start += UInt64(count)
        }
    }
}

/// Block checksums of several layers, each read mostly forward.
private final class MergeChecksums {
    private static let openReadersMax = 32
    /// Checksums that all windows hold together: 64 MiB.
    private static let windowSumsMax = 8 << 20

    private let storage: any Storage
    private let store: StoreUUID
    private let layers: [LayerRecord]
    private let windowCount: Int
    private var windows: [(first: Int, sums: ContiguousArray<UInt64>)]
    private var readers: [(slot: Int, reader: LayerReader)] = []

    init(_ storage: any Storage, store: StoreUUID, layers: [LayerRecord]) {
        self.storage = storage
        self.store = store
        self.layers = layers
        windowCount = min(max(Self.windowSumsMax / layers.count, pageBytes / 8), LayerReader.batchBytes / 8)
        windows = layers.map { _ in (0, []) }
    }

    func forEach(_ slot: Int, first: Int, count: Int, _ body: (UnsafeBufferPointer<UInt64>) throws(StoreError) -> Void) throws(StoreError) {
        var next = first
        let end = first + count
        while next < end {
            if next < windows[slot].first || next >= windows[slot].first + windows[slot].sums.count { try fill(slot, next) }
            let from = next - windows[slot].first
            let taken = min(end - next, windows[slot].sums.count - from)
            try windows[slot].sums.withUnsafeBufferPointer { sums throws(StoreError) in try body(UnsafeBufferPointer(rebasing: sums[from..<from + taken])) }
            next += taken
        }
    }

    private func fill(_ slot: Int, _ first: Int) throws(StoreError) {
        let reader = try reader(slot)
        guard first < reader.checksumCount else {
            throw .damaged(path: LayerFile.path(layers[slot].id), offsetBytes: 0, what: "an extent names checksum \(first) of \(reader.checksumCount)")
        }
        let count = min(windowCount, reader.checksumCount - first)
        var sums = ContiguousArray<UInt64>()
        swap(&sums, &windows[slot].sums)
        if sums.count != count { sums = ContiguousArray(repeating: 0, count: count) }
        windows[slot].first = first
        try sums.withUnsafeMutableBufferPointer { sums throws(StoreError) in try reader.readChecksums(first..<first + count, into: sums.baseAddress!) }
        windows[slot].sums = sums
    }

    /// A few are open at a time.
    private func reader(_ slot: Int) throws(StoreError) -> LayerReader {
        if let open = readers.first(where: { $0.slot == slot }) { return open.reader }
        let reader = try LayerReader(storage, store: store, record: layers[slot])
        if readers.count == Self.openReadersMax { readers.removeFirst() }
        // A layer that fits its window is not read again.
        if reader.checksumCount > windowCount { readers.append((slot, reader)) }
        return reader
    }
}

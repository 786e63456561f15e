/// One extent of an index. 24 bytes, packed: first block 40 bits, count 24; segment 32; place in the segment 32; first checksum 32; slot 20; where in a
/// compressed cluster 12.
struct IndexExtent: Equatable, BitwiseCopyable {
    private var place: UInt64
    var segment: UInt32
    /// Where the data is, in blocks of the segment file; of a compressed extent: where its cluster is.
    var segmentBlock: UInt32
    var checksumIndex: UInt32
    private var slotAndCluster: UInt32

    init(startBlock: UInt64, blockCount: UInt32, slot: UInt32, segment: UInt32, segmentBlock: UInt32, checksumIndex: UInt32, cluster: ClusterPart = .plain) {
        assert(startBlock < Self.blockLimit && blockCount <= Self.blockCountMax && slot <= Self.zeroSlot)
        place = startBlock << 24 | UInt64(blockCount)
        self.segment = segment
        self.segmentBlock = segmentBlock
        self.checksumIndex = checksumIndex
        slotAndCluster = slot << 12 | UInt32(cluster.bits)
    }

    var startBlock: UInt64 {
        get { place >> 24 }
        set { place = newValue << 24 | place & 0xFF_FFFF }
    }
    var blockCount: UInt32 {
        get { UInt32(place & 0xFF_FFFF) }
        set { place = place & ~0xFF_FFFF | UInt64(newValue) }
    }
    /// Which layer of the reader's table has the checksums; `zeroSlot` for a tombstone.
    var slot: UInt32 {
        get { slotAndCluster >> 12 }
        set { slotAndCluster = newValue << 12 | slotAndCluster & 0xFFF }
    }
    var cluster: ClusterPart {
        get { ClusterPart(bits: UInt16(slotAndCluster & 0xFFF)) }
        set { slotAndCluster = slotAndCluster & ~0xFFF | UInt32(newValue.bits) }
    }

    /// 2 GiB: as bytes it fits the 32 bits that a layer file has for them.
    static let blockCountMax: UInt32 = 1 << 19
    /// First block that an index has no room for: volumes have 4 PiB at most.
    static let blockLimit: UInt64 = 1 << 40
    static let zeroSlot: UInt32 = 0xF_FFFF
    /// The open layer of a fork.
    static let openSlot: UInt32 = 0xF_FFFE

    var endBlock: UInt64 { startBlock &+ UInt64(blockCount) }
    var isZero: Bool { slot == Self.zeroSlot }

    /// The part of it in `start..<end`, which it overlaps.
    func clipped(from start: UInt64, to end: UInt64) -> IndexExtent {
        var part = self
        let skipped = start > startBlock ? UInt32(start - startBlock) : 0
        part.startBlock += UInt64(skipped)
        part.blockCount = UInt32(min(end, endBlock) - part.startBlock)
        if !isZero {
            part.checksumIndex += skipped
            if cluster.isCompressed { part.cluster.skip += Int(skipped) } else { part.segmentBlock += skipped }
        }
        return part
    }

    /// Whether `next` goes on where this ends, on the volume and in the segment.
    func continues(into next: IndexExtent) -> Bool {
        guard endBlock == next.startBlock, slot == next.slot, blockCount + next.blockCount <= Self.blockCountMax else { return false }
        if isZero { return true }
        return !cluster.isCompressed && !next.cluster.isCompressed && segment == next.segment && segmentBlock &+ blockCount == next.segmentBlock
            && checksumIndex &+ blockCount == next.checksumIndex
    }
}

/// Where an extent lies in a compressed cluster: up to 16 blocks, compressed as one and stored in up to 15.
struct ClusterPart: Equatable {
    static let blocksMax = 16
    static let plain = ClusterPart(bits: 0)
    /// 4 bits each: blocks stored (0 = not compressed), blocks in the cluster less one, blocks before the extent.
    private(set) var bits: UInt16

    init(bits: UInt16) { self.bits = bits }
    init(storedBlocks: Int, blockCount: Int, skip: Int) {
        assert((1..<16).contains(storedBlocks) && (1...16).contains(blockCount) && (0..<blockCount).contains(skip))
        bits = UInt16(storedBlocks << 8 | (blockCount - 1) << 4 | skip)
    }

    var isCompressed: Bool { bits != 0 }
    var storedBlocks: Int { Int(bits >> 8) }
    var blockCount: Int { Int(bits >> 4 & 15) + 1 }
    var skip: Int {
        get { Int(bits & 15) }
        set { bits = bits & ~15 | UInt16(newValue) }
    }
}

/// Where the blocks of a volume are, merged over its layers: a sorted list of extents that do not overlap, cut into chunks.
///
/// A value: copies share chunks, and a change copies only the chunks it touches, so that every opened recovery point keeps its
/// own index while newer epochs go into theirs. 24 bytes per extent and at most a few for room: chunks are filled when
/// extents come in order, and one that is changed grows by steps. A block in no extent is zero (or, in the index of a
/// single layer, not of this layer).
struct ExtentIndex {
    typealias Chunk = ContiguousArray<IndexExtent>
    static let chunkExtentsMax = 256
    /// Room that a chunk gets beyond its need.
    private static let chunkRoom = 24

    private var chunks: ContiguousArray<Chunk> = []
    /// First block of each chunk: searched without touching the chunks.
    private var firstBlocks: ContiguousArray<UInt64> = []
    private(set) var count = 0

    var isEmpty: Bool { count == 0 }

    /// All extents in order.
    var extents: [IndexExtent] {
        var all: [IndexExtent] = []
        all.reserveCapacity(count)
        for chunk in chunks { all.append(contentsOf: chunk) }
        return all
    }

    var chunkCount: Int { chunks.count }
    func chunk(_ index: Int) -> Chunk { chunks[index] }

    /// Puts extents behind all others; they must be in order and not more than a chunk takes.
    mutating func append(_ extents: UnsafeBufferPointer<IndexExtent>) {
        if extents.isEmpty { return }
        precondition(extents.count <= Self.chunkExtentsMax && (chunks.last.map { $0[$0.count - 1].endBlock <= extents[0].startBlock } ?? true))
        chunks.append(Chunk(extents))
        firstBlocks.append(extents[0].startBlock)
        count += extents.count
    }

    mutating func reserve(chunks number: Int) {
        chunks.reserveCapacity(number)
        firstBlocks.reserveCapacity(number)
    }

    /// The chunk in which an extent that contains or follows `block` is to be looked for first.
    @inline(__always)
    private func chunkIndex(_ block: UInt64) -> Int {
        var low = 0
        var high = firstBlocks.count
        while low < high {
            let middle = (low &+ high) >> 1
            if firstBlocks[middle] <= block { low = middle &+ 1 } else { high = middle }
        }
        return max(0, low - 1)
    }

    /// First extent of the chunk whose end is beyond `block`.
    @inline(__always)
    private func position(_ block: UInt64, in chunk: Int) -> Int {
        chunks[chunk].withUnsafeBufferPointer { extents in
            var low = 0
            var high = extents.count
            while low < high {
                let middle = (low &+ high) >> 1
                if extents[middle].endBlock <= block { low = middle &+ 1 } else { high = middle }
            }
            return low
        }
    }

    /// What holds `block`: an extent clipped to begin there and to end at `end` at most, or nil with the block at which the
    /// gap ends (at most `end`).
    @inline(__always)
    func piece(at block: UInt64, end: UInt64) -> (extent: IndexExtent?, endBlock: UInt64) {
        if chunks.isEmpty { return (nil, end) }
        var chunk = chunkIndex(block)
        var index = position(block, in: chunk)
        if index == chunks[chunk].count {
            chunk += 1
            index = 0
            if chunk == chunks.count { return (nil, end) }
        }
        let extent = chunks[chunk][index]
        if extent.startBlock > block { return (nil, min(end, extent.startBlock)) }
        let part = extent.clipped(from: block, to: end)
        return (part, part.endBlock)
    }

    /// Puts an extent over whatever was there.
    mutating func apply(_ extent: IndexExtent) {
        replace(extent.startBlock, extent.endBlock, with: extent)
    }

    /// Makes the blocks absent.
    mutating func erase(from start: UInt64, to end: UInt64) {
        replace(start, end, with: nil)
    }

    private mutating func replace(_ start: UInt64, _ end: UInt64, with new: IndexExtent?) {
        precondition(start < end)
        if chunks.isEmpty {
            if let new {
                chunks.append([new])
                firstBlocks.append(start)
                count = 1
            }
            return
        }
        let first = chunkIndex(start)
        let low = position(start, in: first)

        // Appending in order is how layers are merged first.
        if low == chunks[first].count, first + 1 == chunks.count || firstBlocks[first + 1] >= end {
            guard let new else { return }
            if low > 0, chunks[first][low - 1].continues(into: new) {
                chunks[first][low - 1].blockCount += new.blockCount
                return
            }
            count += 1
            // A full last chunk is left as it is, so that bulk loads fill chunks.
            if first + 1 == chunks.count, chunks[first].count == Self.chunkExtentsMax {
                chunks.append([new])
                firstBlocks.append(new.startBlock)
                return
            }
            makeRoom(first, 1, isLast: first + 1 == chunks.count)
            chunks[first].append(new)
            if chunks[first].count > Self.chunkExtentsMax { splitChunk(first) }
            firstBlocks[first] = chunks[first][0].startBlock
            return
        }

        // Whatever of later chunks is covered goes first, so that the rest happens in one chunk.
        var right: IndexExtent?
        var next = first + 1
        while next < chunks.count, firstBlocks[next] < end {
            let last = chunks[next][chunks[next].count - 1]
            if last.endBlock <= end {
                count -= chunks[next].count
                next += 1
                continue
            }
            var covered = position(end, in: next)
            let edge = chunks[next][covered]
            if edge.startBlock < end {
                right = edge.clipped(from: end, to: edge.endBlock)
                covered += 1
            }
            chunks[next].removeSubrange(0..<covered)
            count -= covered
            if chunks[next].isEmpty { next += 1 } else { firstBlocks[next] = chunks[next][0].startBlock }
            break
        }
        if next > first + 1 {
            chunks.removeSubrange(first + 1..<next)
            firstBlocks.removeSubrange(first + 1..<next)
        }

        var high = low
        var left: IndexExtent?
        let existing = chunks[first].count
        while high < existing, chunks[first][high].startBlock < end {
            let extent = chunks[first][high]
            if extent.startBlock < start { left = extent.clipped(from: extent.startBlock, to: start) }
            if extent.endBlock > end { right = extent.clipped(from: end, to: extent.endBlock) }
            high += 1
        }
        if high == low + 1, left == nil, right == nil, let new {
            chunks[first][low] = new
        } else {
            var joined = new
            if let piece = left, let added = new, piece.continues(into: added) {
                joined = piece
                joined!.blockCount += added.blockCount
                left = nil
            }
            if let added = new, left == nil, joined == new, low > 0, chunks[first][low - 1].continues(into: added) {
                chunks[first][low - 1].blockCount += added.blockCount
                joined = nil
            }
            let added = (left == nil ? 0 : 1) + (joined == nil ? 0 : 1) + (right == nil ? 0 : 1)
            makeRoom(first, added - (high - low), isLast: false)
            chunks[first].replaceSubrange(low..<high, with: [left, joined, right].lazy.compactMap { $0 })
            count += added - (high - low)
        }
        if chunks[first].isEmpty {
            chunks.remove(at: first)
            firstBlocks.remove(at: first)
            return
        }
        firstBlocks[first] = chunks[first][0].startBlock
        if chunks[first].count > Self.chunkExtentsMax {
            splitChunk(first)
        } else if chunks[first].count < Self.chunkExtentsMax / 8, first + 1 < chunks.count, chunks[first + 1].count < Self.chunkExtentsMax / 2 {
            let moved = chunks.remove(at: first + 1)
            firstBlocks.remove(at: first + 1)
            makeRoom(first, moved.count, isLast: false)
            chunks[first].append(contentsOf: moved)
        }
    }

    /// An array that is left to itself doubles its room.
    private mutating func makeRoom(_ chunk: Int, _ more: Int, isLast: Bool) {
        let needed = chunks[chunk].count + more
        if needed <= chunks[chunk].capacity { return }
        chunks[chunk].reserveCapacity(isLast ? min(max(needed, chunks[chunk].count * 2), Self.chunkExtentsMax) : needed + Self.chunkRoom)
    }

    private mutating func splitChunk(_ index: Int) {
        let whole = chunks[index]
        let half = whole.count / 2
        chunks[index] = Self.chunk(whole[..<half])
        chunks.insert(Self.chunk(whole[half...]), at: index + 1)
        firstBlocks.insert(whole[half].startBlock, at: index + 1)
    }

    private static func chunk(_ extents: Chunk.SubSequence) -> Chunk {
        var chunk = Chunk()
        chunk.reserveCapacity(extents.count + chunkRoom)
        chunk.append(contentsOf: extents)
        return chunk
    }

    // MARK: Merged layers

    /// Extents of a layer that took the place of others: whatever of `extent` a slot in `old` holds is turned to it; the rest stays. `hint`
    /// is where the one before was, for extents that come in order.
    mutating func repoint(_ extent: IndexExtent, from old: SlotSet, hint: inout Int) {
        var block = extent.startBlock
        while block < extent.endBlock, !chunks.isEmpty {
            if hint >= chunks.count || firstBlocks[hint] > block || (hint + 1 < chunks.count && firstBlocks[hint + 1] <= block) { hint = chunkIndex(block) }
            var position = position(block, in: hint)
            if position == chunks[hint].count {
                hint += 1
                position = 0
                if hint == chunks.count { return }
            }
            let found = chunks[hint][position]
            if found.startBlock >= extent.endBlock { return }
            let start = max(block, found.startBlock)
            var end = min(found.endBlock, extent.endBlock)
            block = end
            if !old.contains(found.slot) { continue }
            // Neighbours that were of several layers may be one now.
            var next = position + 1
            while next < chunks[hint].count, end < extent.endBlock, chunks[hint][next].startBlock == end, old.contains(chunks[hint][next].slot) {
                end = min(chunks[hint][next].endBlock, extent.endBlock)
                next += 1
            }
            block = end
            let part = extent.clipped(from: start, to: end)
            if next == position + 1, start == found.startBlock, end == found.endBlock {
                chunks[hint][position] = part
            } else {
                replace(start, end, with: part)
            }
        }
    }

    /// The slots that extents are of.
    func usedSlots(below limit: Int) -> SlotSet {
        var used = SlotSet(count: limit)
        for chunk in chunks { for extent in chunk where extent.slot < limit { used.insert(extent.slot) } }
        return used
    }

    /// For tests and figures: extents that there is room for.
    var room: Int { chunks.reduce(0) { $0 + $1.capacity } }

    /// For tests: whether the order and the counts hold.
    var isConsistent: Bool {
        var end: UInt64 = 0
        var total = 0
        for (index, chunk) in chunks.enumerated() {
            if chunk.isEmpty || chunk[0].startBlock != firstBlocks[index] || chunk.count > Self.chunkExtentsMax { return false }
            for extent in chunk {
                if extent.startBlock < end || extent.blockCount == 0 { return false }
                end = extent.endBlock
            }
            total += chunk.count
        }
        return total == count && chunks.count == firstBlocks.count
    }
}

/// Slots of a reader's table.
struct SlotSet {
    private var members: ContiguousArray<Bool>
    private(set) var count = 0
    init(count: Int) { members = ContiguousArray(repeating: false, count: count) }
    @inline(__always)
    func contains(_ slot: UInt32) -> Bool { slot < members.count && members[Int(slot)] }
    mutating func insert(_ slot: UInt32) {
        if !members[Int(slot)] { count += 1 }
        members[Int(slot)] = true
    }
}

/// Giving back the space of blocks that nothing names, by punching holes into segments where they lie: no data moves, and there is nothing
/// to record. `docs/decisions/0004-gc-by-punching-holes.md` has the reasons.
///
/// Why a hole never hits what somebody reads. A segment is looked at only when nothing appends to it any more: not one that a receiver
/// holds, not that of a fork's open layer, not one that a pin holds whole. For such a segment let *alive* be all blocks in it that a layer
/// of the state, or a pinned one, names at one moment under the lock.
///
/// 1. *What is not alive then never becomes so.* A layer made later takes its places from data appended to segments that are
///    open then (not this one: segments never open again), from a copy in a new segment, or, a merged one, from layers that were in the
///    state or pinned; by induction these name alive blocks only.
/// 2. *Readers.* One that was open had pinned its layers: they were counted. One that opens later, also between the count and the punch,
///    pins layers of the state: those were counted, or are of 1.
/// 3. *Crashes.* The state is what durable records say: a record is applied after its sync. After a crash the records counted are all
///    there; one more that was being written adds only what 1 allows. So a hole is never earlier than the record that took the last name
///    away, and punching needs no order of its own, no record, and no memory: what was not punched is found again.
/// 4. *Removing layers' files meanwhile* cannot hide a name: layers that are read for the count are pinned while it lasts. One that
///    cannot be read keeps its segments from being touched.
struct SegmentLook {
    /// When it was looked at last, or punched.
    var fileBytes: UInt64
    var allocatedBytes: UInt64
    /// Blocks in use when holes were last punched; nil = not by this process.
    var liveBlocksAtPunch: UInt64?
}

/// What the layers of a state, and the pinned ones, use of segments that nothing appends to.
struct SegmentUsers {
    /// By number; pinned ones may have lost their place in the state.
    var layers: [UInt64: LayerRecord] = [:]
    /// Segments that must be left alone.
    var open: Set<UInt32> = []

    init(_ shared: ReplicaStore.Shared, ignoresPins: Bool) {
        layers = shared.state.layers
        for receiver in shared.receivers.values { open.formUnion(receiver.heldSegments) }
        for fork in shared.state.forks.values { for volume in fork.volumes { open.insert(volume.segment) } }
        if ignoresPins { return }
        for pin in shared.pins.values {
            open.formUnion(pin.segments)
            for record in pin.records { layers[record.id] = record }
        }
    }

    /// At least the blocks of it that are in use: those that two layers name count twice.
    var liveBlocks: [UInt32: UInt64] {
        var live: [UInt32: UInt64] = [:]
        for layer in layers.values {
            for use in layer.segments where !open.contains(use.segment) { live[use.segment, default: 0] += UInt64(use.blocks) }
        }
        return live
    }

    func using(_ segments: Set<UInt32>) -> [LayerRecord] {
        layers.values.filter { $0.segments.contains { segments.contains($0.segment) } }.sorted { $0.id < $1.id }
    }
}

/// One bit per block of a segment.
struct BlockBitmap {
    private var words: [UInt64]
    let count: Int

    init(count: Int) {
        self.count = count
        words = [UInt64](repeating: 0, count: (count + 63) / 64)
    }

    mutating func insert(_ blocks: Range<Int>) {
        var block = blocks.lowerBound
        while block < blocks.upperBound {
            let bit = block & 63
            let length = min(64 - bit, blocks.upperBound - block)
            words[block >> 6] |= (length == 64 ? ~0 : (1 << UInt64(length)) - 1) << UInt64(bit)
            block += length
        }
    }

    /// Runs of blocks that are in it.
    func runs() -> [Range<Int>] {
        var runs: [Range<Int>] = []
        var start = 0
        for gap in gaps() + [count..<count] {
            if gap.lowerBound > start { runs.append(start..<gap.lowerBound) }
            start = gap.upperBound
        }
        return runs
    }

    /// Runs of blocks that are not in it.
    func gaps() -> [Range<Int>] {
        var gaps: [Range<Int>] = []
        var start: Int?
        var block = 0
        while block < count {
            let word = words[block >> 6]
            if block & 63 == 0, word == 0 || word == ~0, block + 64 <= count {
                if word == 0 { start = start ?? block } else if let first = start { gaps.append(first..<block); start = nil }
                block += 64
                continue
            }
            if word >> UInt64(block & 63) & 1 == 0 { start = start ?? block } else if let first = start { gaps.append(first..<block); start = nil }
            block += 1
        }
        if let first = start { gaps.append(first..<count) }
        return gaps
    }
}

extension ReplicaStore {
    /// Segments at once, so that a layer that many of them share is read once; with so many blocks together.
    private static let reclaimSegmentsMax = 64
    private static let reclaimBlocksMax: UInt64 = 1 << 28

    /// Punches the blocks that nothing names out of segments that have more than a fifth of them.
    func reclaimSegments(_ disk: any Storage) throws(StoreError) -> UpkeepAction? {
        guard upkeep.work.canPunch else { return nil }
        let ignoresPins = options.deliberateFault == .pinsIgnored
        let (users, live) = try lookAtSegments(disk, ignoresPins: ignoresPins)
        let spoilt = Set(users.layers.values.lazy.filter { self.upkeep.work.unreadableLayers.contains($0.id) }.flatMap { $0.segments.map(\.segment) })
        var chosen: Set<UInt32> = []
        var blocks: UInt64 = 0
        let candidates = live.keys.filter { !spoilt.contains($0) && isWasteful($0, liveBlocks: live[$0]!) }
        func dead(_ segment: UInt32) -> UInt64 { upkeep.work.segments[segment]!.allocatedBytes - live[segment]! * UInt64(pageBytes) }
        for segment in candidates.sorted(by: { (dead($0), $1) > (dead($1), $0) }) {
            let size = upkeep.work.segments[segment]!.fileBytes / UInt64(pageBytes)
            if !chosen.isEmpty, blocks + size > Self.reclaimBlocksMax { continue }
            blocks += size
            chosen.insert(segment)
            if chosen.count == Self.reclaimSegmentsMax { break }
        }
        if chosen.isEmpty { return nil }

        // The moment that counts: from here on the layers are pinned, and what they do not name is dead for ever.
        let (layers, pin) = shared.withLock { shared -> ([LayerRecord], UInt64) in
            let layers = SegmentUsers(shared, ignoresPins: ignoresPins).using(chosen)
            return (layers, shared.add(Pin(layers)))
        }
        defer { unpin(pin) }
        // What lost its last name since it was looked at is removed as a file.
        chosen.formIntersection(layers.lazy.flatMap { $0.segments.lazy.map(\.segment) })
        var maps: [UInt32: BlockBitmap] = [:]
        for segment in chosen { maps[segment] = BlockBitmap(count: Int(upkeep.work.segments[segment]!.fileBytes / UInt64(pageBytes))) }
        for layer in layers {
            do throws(StoreError) { try mark(layer, disk, in: &maps) } catch {
                guard case .damaged = error else { throw error }
                upkeep.work.unreadableLayers.insert(layer.id)
                logger.error("upkeep leaves a damaged layer's segments alone", metadata: ["layer": "\(layer.id)", "error": "\(error)"])
                return nil
            }
        }
        var bytes: UInt64 = 0
        for segment in chosen.sorted() {
            do throws(StoreError) { bytes += try punch(segment, maps[segment]!, liveBlocks: live[segment]!, disk) } catch {
                guard case .damaged = error else { throw error }
                setAside(segment, because: error)
            }
            if !upkeep.work.canPunch {
                logger.notice("the store's file system cannot punch holes: sparse segments are rewritten instead", metadata: ["store": "\(storage.location)"])
                return nil
            }
        }
        upkeep.count { $0.bytesReclaimed += bytes }
        return .reclaimed(bytes: bytes)
    }

    /// Sizes of segments not looked at yet; what is gone is forgotten. One that nothing appends to only changes by being punched.
    func lookAtSegments(_ disk: any Storage, ignoresPins: Bool) throws(StoreError) -> (SegmentUsers, live: [UInt32: UInt64]) {
        // Pinned, so that none of the files goes meanwhile.
        let (users, pin) = shared.withLock { shared -> (SegmentUsers, UInt64) in
            let users = SegmentUsers(shared, ignoresPins: ignoresPins)
            return (users, shared.add(Pin(Array(users.layers.values))))
        }
        defer { unpin(pin) }
        let live = users.liveBlocks
        upkeep.work.segments = upkeep.work.segments.filter { live[$0.key] != nil }
        for segment in live.keys.sorted() where upkeep.work.segments[segment] == nil {
            do throws(StoreError) {
                let file = try disk.open(SegmentFile.path(segment), .read, direct: false)
                upkeep.work.segments[segment] = SegmentLook(fileBytes: try file.size(), allocatedBytes: try file.allocatedBytes())
            } catch {
                if case .closed = error { throw error }
                setAside(segment, because: error)
            }
        }
        return (users, live)
    }

    /// Nothing to be had from it until the store is opened again; the others must not wait for it.
    private func setAside(_ segment: UInt32, because error: StoreError) {
        upkeep.work.segments[segment] = SegmentLook(fileBytes: 0, allocatedBytes: 0)
        logger.error("upkeep leaves a segment alone", metadata: ["segment": "\(segment)", "error": "\(error)"])
    }

    private func isWasteful(_ segment: UInt32, liveBlocks: UInt64) -> Bool {
        let look = upkeep.work.segments[segment]!
        let live = liveBlocks * UInt64(pageBytes)
        guard look.allocatedBytes > live + max(live / 5, options.reclaimBytesMin) else { return false }
        // A file system with large blocks keeps some of it: not again before there is more.
        guard let before = look.liveBlocksAtPunch else { return true }
        return liveBlocks < before - before / 10
    }

    /// Blocks of the segments that the layer names; all of a cluster's, whatever part of it.
    func mark(_ layer: LayerRecord, _ disk: any Storage, in maps: inout [UInt32: BlockBitmap]) throws(StoreError) {
        let reader = try LayerReader(disk, store: uuid, record: layer)
        try reader.forEachExtents { extents throws(StoreError) in
            for extent in extents where !extent.isZero {
                guard let map = maps[extent.segment] else { continue }
                let start = Int(extent.segmentBlock)
                let count = options.deliberateFault == .clustersCutShort ? min(extent.blockCount, extent.segmentBlockCount) : extent.segmentBlockCount
                let end = min(start + Int(count), map.count)
                if start < end { maps[extent.segment]!.insert(start..<end) }
            }
        }
    }

    /// Returns how many bytes the file system gave back.
    private func punch(_ segment: UInt32, _ map: BlockBitmap, liveBlocks: UInt64, _ disk: any Storage) throws(StoreError) -> UInt64 {
        var map = map
        // The header is in use.
        map.insert(0..<1)
        let file = try SegmentFile.open(disk, store: uuid, id: segment, writable: true).file
        let before = try file.allocatedBytes()
        for gap in map.gaps() {
            guard try file.punch(offsetBytes: UInt64(gap.lowerBound * pageBytes), lengthBytes: UInt64(gap.count * pageBytes)) else {
                upkeep.work.canPunch = false
                return 0
            }
        }
        let after = try file.allocatedBytes()
        upkeep.work.segments[segment]!.allocatedBytes = after
        upkeep.work.segments[segment]!.liveBlocksAtPunch = liveBlocks
        return before > after ? before - after : 0
    }
}

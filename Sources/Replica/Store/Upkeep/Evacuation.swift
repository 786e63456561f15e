import BlockTap
import CXXHash

/// Moving what is left in sparse segments to a new one, so that the number of files stays small, and, where the file system cannot punch
/// holes, so that space comes back at all.
///
/// The layers that use such a segment are written anew with the new places, each named by a `layersMerged` record of one layer. Order: the
/// copies, synced; the new segment's name; per layer its file, its name, the record. A kill in between leaves some layers with the
/// old places and some with the new; the old segment goes when no layer, and no reader, names it.
///
/// What moving may cost is bounded by what has become free: a quarter of it where holes can be punched, one and a half of it where not.
extension ReplicaStore {
    /// Extents of the layers rewritten at once: they are held in memory.
    private static let evacuatedExtentsMax = 4 << 20

    private struct Evacuation {
        var segments: Set<UInt32> = []
        var layers: [LayerRecord] = []
    }

    func evacuateSegments(_ disk: any Storage) throws(StoreError) -> UpkeepAction? {
        let (users, live) = try lookAtSegments(disk, ignoresPins: false)
        guard let plan = planEvacuation(users, live) else { return nil }
        let pinned = shared.withLock { shared -> (fresh: UInt32, ids: [UInt64], pin: UInt64)? in
            guard plan.layers.allSatisfy({ shared.state.layers[$0.id] != nil }) else { return nil }
            let fresh = UInt32(shared.newFile())
            let ids = plan.layers.map { _ in shared.newFile() }
            var held = Pin(plan.layers)
            held.layers.formUnion(ids)
            held.segments.insert(fresh)
            return (fresh, ids, shared.add(held))
        }
        guard let (fresh, ids, pin) = pinned else { return nil }
        defer {
            unpin(pin)
            upkeep.hasUnnamedFiles.store(true, ordering: .relaxed)
        }
        let copier = SegmentCopier(from: plan.segments, to: try SegmentFile.create(disk, store: uuid, id: fresh), disk: disk, store: uuid)
        var rewritten: [(LayerFile.Loaded, [StoredExtent])] = []
        for layer in plan.layers {
            do throws(StoreError) {
                let loaded = try LayerFile.load(disk, store: uuid, record: layer)
                rewritten.append((loaded, try copier.copy(loaded.extents, loaded.checksums)))
            } catch {
                switch error {
                case .damaged: upkeep.work.unreadableLayers.insert(layer.id)
                case .badBlock(_, _, let segment, _): upkeep.work.unmovableSegments.insert(segment)
                default: throw error
                }
                logger.error("upkeep leaves damaged data where it is", metadata: ["layer": "\(layer.id)", "error": "\(error)"])
                return nil
            }
        }
        if options.deliberateFault != .movedDataNotSynced { try copier.finish() }
        try disk.syncDirectory("segments")
        if options.deliberateFault == .spaceReusedBeforeRecord {
            for segment in plan.segments { try storage.open(SegmentFile.path(segment), .readWrite, direct: false).truncate(to: UInt64(pageBytes)) }
        }
        var indexBytes: UInt64 = 0
        for (index, layer) in plan.layers.enumerated() {
            let (loaded, extents) = rewritten[index]
            let header = loaded.header
            let identity = LayerIdentity(
                id: ids[index], parent: layer.parent, volumeIndex: header.volumeIndex, sizeBytes: header.sizeBytes,
                cut: Cut(epoch: EpochNumber(header.epoch), kind: EpochKind(rawValue: header.kind) ?? .fuzzy, timeNanoseconds: header.cutTimeNanoseconds, blockCount: 0),
                consistency: Consistency(formatValue: header.consistency))
            let all = UnsafeMutableBufferPointer<UInt64>.allocate(capacity: max(1, loaded.checksums.count))
            defer { all.deallocate() }
            try loaded.checksums.copy(0, loaded.checksums.count, into: all.baseAddress!)
            let written = try LayerFile.write(disk, store: uuid, identity: identity, extents: extents, sums: UnsafeBufferPointer(rebasing: UnsafeBufferPointer(all)[..<loaded.checksums.count]))
            try disk.syncDirectory("layers")
            let record = written.record(parent: layer.parent)
            // One that went meanwhile needs nothing moved.
            if try publish([layer.id], record) { indexBytes += record.fileBytes }
        }
        upkeep.count { statistics in
            statistics.dataBytesMoved += copier.bytesMoved
            statistics.indexBytesRewritten += indexBytes
        }
        return .evacuated(bytes: copier.bytesMoved)
    }

    /// The sparsest segments that pay, as many as fit into one.
    private func planEvacuation(_ users: SegmentUsers, _ live: [UInt32: UInt64]) -> Evacuation? {
        let canPunch = upkeep.work.canPunch
        func blocks(_ segment: UInt32) -> UInt64 { upkeep.work.segments[segment]!.fileBytes / UInt64(pageBytes) }
        /// Only in the state can layers be replaced; the file itself stays as long as a reader has the old ones.
        let state = read { $0.layers }
        var usersOf: [UInt32: [UInt64]] = [:]
        for layer in state.values { for use in layer.segments { usersOf[use.segment, default: []].append(layer.id) } }
        let spoilt = upkeep.work.unreadableLayers
        let sparse = live.keys.filter { segment in
            guard let layers = usersOf[segment], !layers.contains(where: { spoilt.contains($0) }), !upkeep.work.unmovableSegments.contains(segment) else { return false }
            let (used, length) = (live[segment]!, blocks(segment))
            guard length > used, (length - used) * UInt64(pageBytes) >= options.reclaimBytesMin else { return false }
            return canPunch ? used * 8 <= length : used * 10 <= length * 6
        }
        // Together they share the cost of the layers that they have in common; but one that does not pay must not keep another from being moved.
        var plan = Evacuation()
        var paying: Evacuation?
        var chosen: Set<UInt64> = []
        var (liveBlocks, deadBlocks, extents, indexBytes) = (UInt64(0), UInt64(0), 0, UInt64(0))
        func pays(_ moved: UInt64, _ index: UInt64, _ dead: UInt64) -> Bool {
            let (cost, gain) = (moved * UInt64(pageBytes) + index, dead * UInt64(pageBytes))
            return canPunch ? cost * 4 <= gain : cost * 2 <= gain * 3
        }
        for segment in sparse.sorted(by: { (live[$0]! * blocks($1), $0) < (live[$1]! * blocks($0), $1) }) {
            let added = usersOf[segment]!.filter { !chosen.contains($0) }.compactMap { state[$0] }
            let more = added.reduce(0) { $0 + $1.extentCount }
            let (moved, dead) = (liveBlocks + live[segment]!, deadBlocks + blocks(segment) - live[segment]!)
            if extents + more > Self.evacuatedExtentsMax { continue }
            if !plan.segments.isEmpty, moved * UInt64(pageBytes) > options.segmentBytes { break }
            plan.segments.insert(segment)
            for layer in added { chosen.insert(layer.id) }
            (liveBlocks, deadBlocks, extents) = (moved, dead, extents + more)
            indexBytes += added.reduce(0) { $0 + $1.fileBytes }
            guard pays(liveBlocks, indexBytes, deadBlocks) else { continue }
            plan.layers = chosen.sorted().map { state[$0]! }
            paying = plan
        }
        if let paying { return paying }
        for segment in sparse.sorted() {
            let layers = Set(usersOf[segment]!).sorted().map { state[$0]! }
            guard layers.reduce(0, { $0 + $1.extentCount }) <= Self.evacuatedExtentsMax,
                pays(live[segment]!, layers.reduce(0) { $0 + $1.fileBytes }, blocks(segment) - live[segment]!)
            else { continue }
            return Evacuation(segments: [segment], layers: layers)
        }
        return nil
    }
}

/// Copies what extents name in some segments to the end of another.
private final class SegmentCopier {
    private static let bufferBytes = 1 << 20
    private let from: Set<UInt32>
    private let to: SegmentFile
    private let disk: any Storage
    private let store: StoreUUID
    private var opened: [UInt32: SegmentFile] = [:]
    /// Block 0 is the header.
    private var nextBlock: UInt32 = 1
    private let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: bufferBytes, alignment: pageBytes)
    private(set) var bytesMoved: UInt64 = 0

    init(from: Set<UInt32>, to: SegmentFile, disk: any Storage, store: StoreUUID) {
        self.from = from
        self.to = to
        self.disk = disk
        self.store = store
    }

    deinit { buffer.deallocate() }

    func finish() throws(StoreError) { try to.file.dataSync() }

    /// The extents with their new places. Plain blocks are verified on the way, so that damage is noticed where its history is known;
    /// clusters are moved as they are, and verified when they are read. Throws `.badBlock`.
    func copy(_ extents: [StoredExtent], _ checksums: LayerChecksums) throws(StoreError) -> [StoredExtent] {
        var moved = extents
        var clusters: [UInt64: UInt32] = [:]
        for index in extents.indices where !extents[index].isZero && from.contains(extents[index].segment) {
            let extent = extents[index]
            let key = UInt64(extent.segment) << 32 | UInt64(extent.segmentBlock)
            moved[index].segment = to.id
            if extent.isCompressed, let place = clusters[key] {
                moved[index].segmentBlock = place
                continue
            }
            moved[index].segmentBlock = nextBlock
            if extent.isCompressed { clusters[key] = nextBlock }
            try copy(extent, checksums)
        }
        return moved
    }

    private func copy(_ extent: StoredExtent, _ checksums: LayerChecksums) throws(StoreError) {
        if opened[extent.segment] == nil { opened[extent.segment] = try SegmentFile.open(disk, store: store, id: extent.segment, writable: false) }
        let file = opened[extent.segment]!.file
        var done: UInt32 = 0
        while done < extent.segmentBlockCount {
            let count = min(extent.segmentBlockCount - done, UInt32(Self.bufferBytes / pageBytes))
            let part = UnsafeMutableRawBufferPointer(rebasing: buffer[..<(Int(count) * pageBytes)])
            let offset = UInt64(extent.segmentBlock + done) * UInt64(pageBytes)
            guard try file.read(into: part, at: offset) == part.count else { throw .badBlock(volume: "", block: extent.startBlock, segment: extent.segment, layer: checksums.layer) }
            if !extent.isCompressed { try verify(part, extent, first: done, checksums) }
            try to.file.write(UnsafeRawBufferPointer(part), at: UInt64(nextBlock) * UInt64(pageBytes))
            nextBlock += count
            bytesMoved += UInt64(part.count)
            done += count
        }
    }

    private func verify(_ bytes: UnsafeMutableRawBufferPointer, _ extent: StoredExtent, first: UInt32, _ checksums: LayerChecksums) throws(StoreError) {
        var sums = [UInt64](repeating: 0, count: bytes.count / pageBytes)
        try sums.withUnsafeMutableBufferPointer { sums throws(StoreError) in try checksums.copy(extent.checksumIndex + first, sums.count, into: sums.baseAddress!) }
        for index in 0..<bytes.count / pageBytes {
            let block = extent.startBlock + UInt64(first) + UInt64(index)
            let sum = BlockChecksum.of(bytes.baseAddress! + index * pageBytes, count: blockLength(block, sizeBytes: checksums.sizeBytes), blockIndex: block)
            guard sum == sums[index] else {
                throw .badBlock(volume: "", block: block, segment: extent.segment, layer: checksums.layer)
            }
        }
    }
}

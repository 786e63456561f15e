import BlockTap

/// Moving what is left in sparse segments to a new one, so that the number of files stays small, and, where the file system cannot punch
/// holes, so that space comes back at all.
///
/// What is alive is copied in the order in which it lies there, clusters as they are. The layers that use such a segment are written anew
/// with the new places, as streams (`LayerMerge`), and what they name in the copy is read back and compared with their checksums before
/// anything is published: what a disk or memory got wrong once must not become the only copy. Each is then named by a `layersMerged`
/// record of one layer. Order: the copy, synced, and its name; the layers' files, synced, and their names; the records. A kill in
/// between leaves some layers with the old places and some with the new; the old segment goes when no layer, and no reader, names it.
///
/// What moving may cost is bounded by what has become free: a quarter of it where holes can be punched, one and a half of it where not.
extension ReplicaStore {
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
        var maps: [UInt32: BlockBitmap] = [:]
        for segment in plan.segments { maps[segment] = BlockBitmap(count: Int(upkeep.work.segments[segment]!.fileBytes / UInt64(pageBytes))) }
        for layer in plan.layers {
            do throws(StoreError) { try mark(layer, disk, in: &maps) } catch { return try leave(layer, because: error) }
        }
        guard let (moves, bytesMoved) = try copy(maps, to: fresh, disk) else { return nil }
        var written: [LayerRecord] = []
        for (layer, id) in zip(plan.layers, ids) {
            do throws(StoreError) {
                let record = try LayerMerge.write(disk, store: uuid, id: id, layers: [layer], moved: moves)
                guard try isWhole(record, [fresh], disk) else { return try leave(plan.segments, of: layer, disk) }
                written.append(record)
            } catch { return try leave(layer, because: error) }
        }
        try disk.syncDirectory("layers")
        if options.deliberateFault == .spaceReusedBeforeRecord {
            for segment in plan.segments { try storage.open(SegmentFile.path(segment), .readWrite, direct: false).truncate(to: UInt64(pageBytes)) }
        }
        var indexBytes: UInt64 = 0
        // One that went meanwhile needs nothing moved.
        for (layer, record) in zip(plan.layers, written) where try publish([layer.id], record) { indexBytes += record.fileBytes }
        upkeep.count { statistics in
            statistics.dataBytesMoved += bytesMoved
            statistics.indexBytesRewritten += indexBytes
        }
        return .evacuated(bytes: bytesMoved)
    }

    /// Writes the marked blocks one behind the other into a new segment, synced. Nil when some cannot be read.
    private func copy(_ maps: [UInt32: BlockBitmap], to fresh: UInt32, _ disk: any Storage) throws(StoreError) -> (SegmentMoves, bytes: UInt64)? {
        let target = try SegmentFile.create(disk, store: uuid, id: fresh).file
        let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: 1 << 20, alignment: pageBytes)
        defer { buffer.deallocate() }
        var moves = SegmentMoves()
        // Block 0 is the header.
        var next = 1
        for (segment, map) in maps.sorted(by: { $0.key < $1.key }) {
            let source = try SegmentFile.open(disk, store: uuid, id: segment, writable: false).file
            for run in map.runs() {
                moves.add(segment: segment, block: UInt32(run.lowerBound), count: UInt32(run.count), toSegment: fresh, toBlock: UInt32(next))
                var done = 0
                while done < run.count {
                    let part = UnsafeMutableRawBufferPointer(rebasing: buffer[..<min(buffer.count, (run.count - done) * pageBytes)])
                    do throws(StoreError) {
                        guard try source.read(into: part, at: UInt64((run.lowerBound + done) * pageBytes)) == part.count else {
                            throw .damaged(path: source.path, offsetBytes: UInt64((run.lowerBound + done) * pageBytes), what: "the file ends early")
                        }
                    } catch {
                        if case .closed = error { throw error }
                        leave(segment, because: error)
                        return nil
                    }
                    try target.write(UnsafeRawBufferPointer(part), at: UInt64(next * pageBytes))
                    next += part.count / pageBytes
                    done += part.count / pageBytes
                }
            }
        }
        if options.deliberateFault != .movedDataNotSynced { try target.dataSync() }
        try disk.syncDirectory("segments")
        return (moves, UInt64((next - 1) * pageBytes))
    }

    /// Whether what the layer names in these segments is what its checksums say.
    private func isWhole(_ layer: LayerRecord, _ segments: Set<UInt32>, _ disk: any Storage) throws(StoreError) -> Bool {
        var files: [UInt32: SegmentFile] = [:]
        let data = LayerDataReader { [uuid] id throws(StoreError) in
            if let file = files[id] { return file.file }
            let file = try SegmentFile.open(disk, store: uuid, id: id, writable: false)
            files[id] = file
            return file.file
        }
        var isWhole = true
        _ = try data.read(LayerReader(disk, store: uuid, record: layer), only: segments) { _ in isWhole = false }
        return isWhole
    }

    /// A copy of the layer's data is not what it must be: damage stays where its history is known. What was only copied wrong is tried again.
    private func leave(_ segments: Set<UInt32>, of layer: LayerRecord, _ disk: any Storage) throws(StoreError) -> UpkeepAction? {
        for segment in layer.segments.map(\.segment) where segments.contains(segment) {
            if try isWhole(layer, [segment], disk) { continue }
            leave(segment, because: .damaged(path: SegmentFile.path(segment), offsetBytes: 0, what: "it has blocks of layer \(layer.id) that do not match their checksums"))
        }
        return nil
    }

    private func leave(_ segment: UInt32, because error: StoreError) {
        upkeep.work.unmovableSegments.insert(segment)
        logger.error("upkeep leaves damaged data where it is", metadata: ["segment": "\(segment)", "error": "\(error)"])
    }

    private func leave(_ layer: LayerRecord, because error: StoreError) throws(StoreError) -> UpkeepAction? {
        guard case .damaged = error else { throw error }
        upkeep.work.unreadableLayers.insert(layer.id)
        logger.error("upkeep leaves a damaged layer alone", metadata: ["layer": "\(layer.id)", "error": "\(error)"])
        return nil
    }

    /// The sparsest segments that pay, as many as fit into one.
    private func planEvacuation(_ users: SegmentUsers, _ live: [UInt32: UInt64]) -> Evacuation? {
        let canPunch = upkeep.work.canPunch
        func blocks(_ segment: UInt32) -> UInt64 { upkeep.work.segments[segment]!.fileBytes / UInt64(pageBytes) }
        /// Only in the state can layers be replaced; the file itself stays as long as a reader has the old ones.
        let state = read { $0.layers }
        var usersOf: [UInt32: [UInt64]] = [:]
        var ends: [UInt32: UInt32] = [:]
        for layer in state.values {
            for use in layer.segments {
                usersOf[use.segment, default: []].append(layer.id)
                ends[use.segment] = max(ends[use.segment] ?? 0, use.endBlock)
            }
        }
        let spoilt = upkeep.work.unreadableLayers
        let sparse = live.keys.filter { segment in
            guard let layers = usersOf[segment], !layers.contains(where: { spoilt.contains($0) }), !upkeep.work.unmovableSegments.contains(segment) else { return false }
            let (used, length) = (live[segment]!, blocks(segment))
            // One that is shorter than its layers say is damaged.
            guard length > used, length >= UInt64(ends[segment]!), (length - used) * UInt64(pageBytes) >= options.reclaimBytesMin else { return false }
            return canPunch ? used * 8 <= length : used * 10 <= length * 6
        }
        // Together they share the cost of the layers that they have in common; but one that does not pay must not keep another from being moved.
        var plan = Evacuation()
        var paying: Evacuation?
        var chosen: Set<UInt64> = []
        var (liveBlocks, deadBlocks, indexBytes) = (UInt64(0), UInt64(0), UInt64(0))
        func pays(_ moved: UInt64, _ index: UInt64, _ dead: UInt64) -> Bool {
            let (cost, gain) = (moved * UInt64(pageBytes) + index, dead * UInt64(pageBytes))
            return canPunch ? cost * 4 <= gain : cost * 2 <= gain * 3
        }
        for segment in sparse.sorted(by: { (live[$0]! * blocks($1), $0) < (live[$1]! * blocks($0), $1) }) {
            let added = usersOf[segment]!.filter { !chosen.contains($0) }.compactMap { state[$0] }
            let (moved, dead) = (liveBlocks + live[segment]!, deadBlocks + blocks(segment) - live[segment]!)
            if !plan.segments.isEmpty, moved * UInt64(pageBytes) > options.segmentBytes { break }
            plan.segments.insert(segment)
            for layer in added { chosen.insert(layer.id) }
            (liveBlocks, deadBlocks) = (moved, dead)
            indexBytes += added.reduce(0) { $0 + $1.fileBytes }
            guard pays(liveBlocks, indexBytes, deadBlocks) else { continue }
            plan.layers = chosen.sorted().map { state[$0]! }
            paying = plan
        }
        if let paying { return paying }
        for segment in sparse.sorted() {
            let layers = Set(usersOf[segment]!).sorted().map { state[$0]! }
            guard pays(live[segment]!, layers.reduce(0) { $0 + $1.fileBytes }, blocks(segment) - live[segment]!) else { continue }
            return Evacuation(segments: [segment], layers: layers)
        }
        return nil
    }
}

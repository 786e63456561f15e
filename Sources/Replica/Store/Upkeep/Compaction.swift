import Synchronization

/// Which neighbouring layers become one. Metadata only: data stays where it is until nothing names it (see `SegmentSpace`).
///
/// A *run* is a path of layers of which only the newest is named by a volume, a recovery point or a fork, or has more than one layer on
/// top: whoever reads sees all of it or none. As points expire runs grow, at their newer ends mostly. Merging all of a run at each
/// expiry would rewrite its index as often as it has layers. Instead two bounds are kept, each with the cheapest merges:
///
/// - *Length.* A run adds its length less one to what a chain has beyond its named layers. When the runs of a tree together add
///   more than `surplusMax`, the window with the fewest bytes of index per layer saved goes; but, as long as there are any, of those
///   windows only in which no layer is larger than all others together. So a byte of index that is rewritten lands in a layer at
///   least twice as large as the one that it came from: it is rewritten O(log) times.
/// - *Garbage.* Of a run's data at most all but the largest layer's can have been overwritten with data inside the run, and at most as much as
///   its upper layers say is zero was given up (a file system that discards what it has freed). When the two, over all runs, are more
///   than 1/`garbageShare` of the data, the window with the most such data per byte of index goes.
///
/// Each merge leaves fewer layers, so this ends.
enum Compaction {
    struct Limits {
        /// Layers that a tree may have beyond those that something names. The promise is 24: the rest is room for what arrives
        /// while merges run.
        var surplusMax = 16
        var garbageShare: UInt64 = 16
        /// Less garbage than this, in the whole store, is not looked for.
        var garbageBytesMin: UInt64 = 1 << 20
        /// Layers merged at once.
        var windowMax = 128
        /// Bytes of index merged at once: block checksums, 8 bytes each, are counted with 32 bits.
        var windowBytesMax: UInt64 = 16 << 30
        /// Only the smallest merge that gives anything: there is no space for more.
        var isFrugal = false
    }

    /// Neighbours to merge, oldest first; nil when all bounds hold. `unreadable` layers are left alone.
    static func plan(_ state: StoreState, _ limits: Limits, unreadable: Set<UInt64> = []) -> [LayerRecord]? {
        let runs = runs(state, unreadable: unreadable)
        var best: (window: Range<Int>, run: Int, cost: (Int, Double))?
        func offer(_ run: Int, cost: (_ window: Window) -> (Int, Double)?) {
            let layers = runs[run].layers
            for start in layers.indices.dropLast() {
                var window = Window(layers[start])
                for end in start + 1..<min(layers.count, start + limits.windowMax) {
                    window.append(layers[end])
                    if window.indexBytes > limits.windowBytesMax { break }
                    guard let cost = cost(window) else { continue }
                    if best == nil || cost < best!.cost { best = (start..<end + 1, run, cost) }
                }
            }
        }

        var surplus: [UInt64: Int] = [:]
        for run in runs { surplus[run.root, default: 0] += run.layers.count - 1 }
        let isLong = surplus.values.contains { $0 > limits.surplusMax }
        let total = state.layers.values.reduce(0) { $0 + $1.dataBytes }
        let garbage = runs.reduce(0) { $0 + $1.garbageMax }
        let isWasteful = garbage > max(limits.garbageBytesMin, total / limits.garbageShare)
        guard isLong || isWasteful else { return nil }

        if limits.isFrugal {
            for run in runs.indices where runs[run].layers.count > 1 { offer(run) { (0, Double($0.indexBytes)) } }
        } else if isLong {
            for run in runs.indices where runs[run].layers.count > 1 && surplus[runs[run].root]! > limits.surplusMax {
                offer(run) { ($0.indexBytesLargest * 2 <= $0.indexBytes ? 0 : 1, Double($0.indexBytes) / Double($0.count - 1)) }
            }
        } else {
            for run in runs.indices where runs[run].garbageMax > 0 {
                offer(run) { $0.garbageMax > 0 ? (0, Double($0.indexBytes) / Double($0.garbageMax)) : nil }
            }
        }
        return best.map { Array(runs[$0.run].layers[$0.window]) }
    }

    /// Neighbours within a run, added up.
    private struct Window {
        var count = 1
        var indexBytes: UInt64
        var indexBytesLargest: UInt64
        var garbage: Garbage

        init(_ layer: LayerRecord) {
            (indexBytes, indexBytesLargest) = (layer.fileBytes, layer.fileBytes)
            garbage = Garbage(layer)
        }

        mutating func append(_ layer: LayerRecord) {
            count += 1
            indexBytes += layer.fileBytes
            indexBytesLargest = max(indexBytesLargest, layer.fileBytes)
            garbage.append(layer)
        }

        var garbageMax: UInt64 { garbage.most }
    }

    /// Data of neighbours that others of them, on top, may have overwritten: a bound, since nobody looks into the layers for it.
    private struct Garbage {
        private var dataBytes: UInt64
        private var dataBytesLargest: UInt64
        private var dataBytesNewest: UInt64
        private var zeroBytes: UInt64 = 0

        init(_ lowest: LayerRecord) { (dataBytes, dataBytesLargest, dataBytesNewest) = (lowest.dataBytes, lowest.dataBytes, lowest.dataBytes) }

        mutating func append(_ layer: LayerRecord) {
            dataBytes += layer.dataBytes
            dataBytesLargest = max(dataBytesLargest, layer.dataBytes)
            dataBytesNewest = layer.dataBytes
            zeroBytes += layer.zeroBytes
        }

        var most: UInt64 { min(dataBytes - dataBytesNewest, dataBytes - dataBytesLargest + zeroBytes) }
    }

    struct Run {
        /// The lowest layer of the tree.
        var root: UInt64
        /// Oldest first.
        var layers: [LayerRecord]

        /// Data that may be overwritten inside the run.
        var garbageMax: UInt64 {
            var garbage = Garbage(layers[0])
            for layer in layers.dropFirst() { garbage.append(layer) }
            return garbage.most
        }
    }

    /// All layers, each in one run, in a fixed order.
    static func runs(_ state: StoreState, unreadable: Set<UInt64> = []) -> [Run] {
        var childCount: [UInt64: Int] = [:]
        for layer in state.layers.values { childCount[layer.parent, default: 0] += 1 }
        let named = Set(state.tops)
        /// Whether a layer may become one with the only one on top of it.
        func joins(_ layer: LayerRecord, _ next: LayerRecord) -> Bool {
            if named.contains(layer.id) || childCount[layer.id] != 1 || unreadable.contains(layer.id) || unreadable.contains(next.id) { return false }
            // A last block that is not whole was hashed at its length; a merged layer has one size only.
            return layer.sizeBytes == next.sizeBytes || layer.sizeBytes % UInt64(pageBytes) == 0
        }
        var starts: [LayerRecord] = []
        var next: [UInt64: LayerRecord] = [:]
        for layer in state.layers.values {
            if let below = state.layers[layer.parent], joins(below, layer) { next[below.id] = layer } else { starts.append(layer) }
        }
        var runs: [Run] = []
        var roots: [UInt64: UInt64] = [:]
        // A layer's number is not always above its parent's (a merged one is newer than what lies on it): roots are found by walking.
        for start in starts.sorted(by: { $0.id < $1.id }) {
            var layers = [start]
            while let above = next[layers.last!.id] { layers.append(above) }
            var path: [UInt64] = []
            var id = start.id
            while roots[id] == nil, let parent = state.layers[id]?.parent, parent != 0 {
                path.append(id)
                id = parent
            }
            let root = roots[id] ?? id
            for passed in path { roots[passed] = root }
            runs.append(Run(root: root, layers: layers))
        }
        return runs
    }
}

extension ReplicaStore {
    /// One merge, when one is due. The layer files are read and written here, on the caller's thread; the record is made on the store's.
    func mergeLayers(_ disk: any Storage) throws(StoreError) -> UpkeepAction? {
        var limits = Compaction.Limits()
        limits.garbageBytesMin = options.garbageBytesMin
        limits.isFrugal = upkeep.work.isFrugal
        guard let layers = Compaction.plan(read { $0 }, limits, unreadable: upkeep.work.unreadableLayers) else { return nil }
        // Pinned while they are read, like the new one until the record names it: nothing removes them meanwhile.
        let pinned = shared.withLock { shared -> (id: UInt64, pin: UInt64)? in
            guard layers.allSatisfy({ shared.state.layers[$0.id] != nil }) else { return nil }
            let id = shared.newFile()
            var held = Pin(layers)
            held.layers.insert(id)
            return (id, shared.add(held))
        }
        guard let (id, pin) = pinned else { return nil }
        defer { unpin(pin) }
        let replaced = layers.map(\.id)
        let merged: LayerRecord
        do throws(StoreError) {
            merged = try LayerMerge.write(disk, store: uuid, id: id, layers: layers, isSynced: options.deliberateFault != .mergedLayersNotSynced)
            try disk.syncDirectory("layers")
        } catch {
            try? storage.remove(LayerFile.path(id))
            upkeep.hasUnnamedFiles.store(true, ordering: .relaxed)
            if case .damaged = error { return try setAside(layers, disk, because: error) }
            throw error
        }
        guard try publish(replaced, merged) else { return nil }
        upkeep.count { statistics in
            statistics.layersMerged += UInt64(layers.count)
            statistics.indexBytesRewritten += merged.fileBytes
        }
        return .merged(layers: layers.count, extents: merged.extentCount)
    }

    /// Names `layer` in place of `replaced`, or removes its file when something came in between. The caller has it pinned.
    func publish(_ replaced: [UInt64], _ layer: LayerRecord) throws(StoreError) -> Bool {
        try thread.perform { () throws(StoreError) -> Bool in
            var layer = layer
            // What lies below may itself have been merged meanwhile.
            if let first = replaced.first, let parent = self.read({ $0.layers[first]?.parent }) { layer.parent = parent }
            let record = ManifestRecord.layersMerged(replaced: replaced, by: layer)
            do throws(StoreError) { try self.change(record) } catch {
                // A record that may have reached the disk names the file: then it stays, and the next start decides.
                if self.manifest.failure == nil { try? self.storage.remove(LayerFile.path(layer.id)) }
                if case .invalid = error { return false }
                throw error
            }
            self.indexes.merged(replaced: replaced, by: layer)
            return true
        }
    }

    /// Finds out which of the layers cannot be read. Upkeep leaves them, and the data that they name, alone.
    private func setAside(_ layers: [LayerRecord], _ disk: any Storage, because cause: StoreError) throws(StoreError) -> UpkeepAction? {
        var found = false
        for layer in layers {
            do throws(StoreError) { _ = try LayerFile.load(disk, store: uuid, record: layer) } catch {
                guard case .damaged = error else { throw error }
                found = true
                upkeep.work.unreadableLayers.insert(layer.id)
                logger.error("upkeep leaves a damaged layer alone", metadata: ["layer": "\(layer.id)", "error": "\(error)"])
            }
        }
        if !found { throw cause }
        return nil
    }
}

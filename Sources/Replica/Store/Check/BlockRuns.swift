/// Sorted runs of blocks of one volume that do not overlap, each with the layer whose blocks they are.
struct BlockRuns: Equatable {
    struct Run: Hashable {
        var start: UInt64
        var end: UInt64
        var layer: UInt64
        var count: UInt64 { end - start }
    }

    private(set) var runs: [Run] = []

    var isEmpty: Bool { runs.isEmpty }
    var blockCount: UInt64 { runs.reduce(0) { $0 + $1.count } }

    /// Puts a run in; what it overlaps becomes part of it.
    mutating func add(_ start: UInt64, _ end: UInt64, layer: UInt64) {
        subtract(start, end)
        var index = firstIndex(endingBeyond: start)
        if index > 0, runs[index - 1].end == start, runs[index - 1].layer == layer {
            index -= 1
            runs[index].end = end
        } else {
            runs.insert(Run(start: start, end: end, layer: layer), at: index)
        }
        if index + 1 < runs.count, runs[index + 1].start == end, runs[index + 1].layer == layer {
            runs[index].end = runs[index + 1].end
            runs.remove(at: index + 1)
        }
    }

    mutating func add(_ other: BlockRuns) {
        for run in other.runs { add(run.start, run.end, layer: run.layer) }
    }

    mutating func subtract(_ start: UInt64, _ end: UInt64) {
        let low = firstIndex(endingBeyond: start)
        guard low < runs.count, runs[low].start < end else { return }
        var high = low
        var kept: [Run] = []
        while high < runs.count, runs[high].start < end {
            let run = runs[high]
            if run.start < start { kept.append(Run(start: run.start, end: start, layer: run.layer)) }
            if run.end > end { kept.append(Run(start: end, end: run.end, layer: run.layer)) }
            high += 1
        }
        runs.replaceSubrange(low..<high, with: kept)
    }

    private func firstIndex(endingBeyond block: UInt64) -> Int {
        var low = 0
        var high = runs.count
        while low < high {
            let middle = (low + high) / 2
            if runs[middle].end <= block { low = middle + 1 } else { high = middle }
        }
        return low
    }
}

/// Everything of a store that somebody can open, as the layer on top of its chain.
struct StoreView {
    enum Kind: Equatable {
        case newest
        case point(RecoveryPointID)
        case fork(ForkID)
    }
    var kind: Kind
    var group: GroupID
    var volume: Int
    var spec: VolumeSpec
    var top: UInt64
}

extension StoreState {
    /// In an order that people expect: group by group, points by age, forks last.
    var views: [StoreView] {
        var all: [StoreView] = []
        for (id, group) in groups.sorted(by: { $0.key.rawValue < $1.key.rawValue }) {
            for point in group.points {
                for (index, volume) in point.volumes.enumerated() { all.append(StoreView(kind: .point(point.point.id), group: id, volume: index, spec: volume.spec, top: volume.top)) }
            }
            for (index, volume) in group.volumes.enumerated() { all.append(StoreView(kind: .newest, group: id, volume: index, spec: volume.spec, top: volume.top)) }
        }
        for (id, fork) in forks.sorted(by: { $0.key.rawValue < $1.key.rawValue }) {
            for (index, volume) in fork.volumes.enumerated() { all.append(StoreView(kind: .fork(id), group: fork.group, volume: index, spec: volume.spec, top: volume.parent)) }
        }
        return all
    }

    /// What of `bad` (per layer) can be seen at each layer's level: a block that a newer layer has anew is not. Walks the trees of layers from
    /// below, reads the extents of a layer only when something bad lies below it. `broken`: layers that cannot be read at all, which
    /// spoils every chain through them. `extents` calls its argument for each extent, in any order.
    func reach(
        bad: [UInt64: BlockRuns], broken: Set<UInt64>,
        extents: (LayerRecord, (StoredExtent) -> Void) throws(StoreError) -> Void, visit: (_ layer: UInt64, BlockRuns, _ broken: [UInt64]) -> Void
    ) {
        var children: [UInt64: [UInt64]] = [:]
        for layer in layers.values { children[layers[layer.parent] == nil ? 0 : layer.parent, default: []].append(layer.id) }
        var open: [(layer: UInt64, runs: BlockRuns, broken: [UInt64])] = (children[0] ?? []).map { ($0, BlockRuns(), []) }
        while let last = open.popLast() {
            let id = last.layer
            var (runs, brokenBelow) = (last.runs, last.broken)
            let layer = layers[id]!
            var isBroken = broken.contains(id) || (layer.parent != 0 && layers[layer.parent] == nil)
            if !isBroken, !runs.isEmpty {
                do throws(StoreError) { try extents(layer) { runs.subtract($0.startBlock, $0.endBlock) } } catch { isBroken = true }
            }
            if let own = bad[id] { runs.add(own) }
            if isBroken { brokenBelow.append(id) }
            if !runs.isEmpty || !brokenBelow.isEmpty { visit(id, runs, brokenBelow) }
            for child in children[id] ?? [] { open.append((child, runs, brokenBelow)) }
        }
    }
}

import Synchronization

/// Merged indexes of the volumes' newest layers, brought forward with every epoch so that opening the newest recovery point is
/// instant; and of a few earlier ones, so that opening a recent one merges a few layers only. Copies share what they have in common.
///
/// Merges of layers are followed: what the cache has of the replaced ones is turned to the new one (`IndexSnapshot.rebase`). Changes are
/// made on the store's thread only, in the order of the MANIFEST. What takes long happens elsewhere: then the volume is
/// *being built* (`IndexBuild`), merges that come meanwhile are noted for it, and the cache has nothing of the volume until it is done.
final class IndexCache: Sendable {
    static let checkpointDistance = 64
    static let checkpointCount = 2

    struct Key: Hashable, Sendable {
        var group: GroupID
        var volume: Int
    }

    /// Layers that became one.
    struct LayersMerged: Sendable {
        var replaced: [UInt64]
        var layer: LayerRecord
    }

    private struct Entry {
        var newest: IndexSnapshot
        /// Oldest first.
        var checkpoints: [IndexSnapshot] = []
        var sinceCheckpoint = 0
        /// What a restart would have to merge again: `IndexCost` since the last index file.
        var unwrittenCost = 0
    }

    private struct State {
        var entries: [Key: Entry] = [:]
        /// Being built elsewhere; merges that it does not know of yet.
        var building: [Key: [LayersMerged]] = [:]
        /// Whole index files by their top layer, with the layers that they name (none: not known yet).
        var files: [UInt64: Set<UInt64>] = [:]
    }

    private let state = Mutex(State())
    /// Set once, when the store is whole.
    nonisolated(unsafe) weak var store: ReplicaStore?

    /// Whether the newest layer's index is known.
    func covers(_ group: GroupID, _ volume: Int, top: UInt64) -> Bool {
        state.withLock { $0.entries[Key(group: group, volume: volume)]?.newest.top == top }
    }

    /// A layer was sealed. False when the cache does not know its parent.
    func add(_ group: GroupID, _ volume: Int, parent: UInt64, extents: [StoredExtent], checksums: LayerChecksums) -> Bool {
        state.withLock { state in
            let key = Key(group: group, volume: volume)
            if state.entries[key] == nil, parent == 0 { state.entries[key] = Entry(newest: IndexSnapshot()) }
            guard state.entries[key]?.newest.top == parent else { return false }
            guard (try? state.entries[key]!.newest.apply(extents, checksums)) != nil else {
                state.entries[key] = nil
                return false
            }
            state.entries[key]!.unwrittenCost += IndexCost.of(extentCount: extents.count)
            state.entries[key]!.sinceCheckpoint += 1
            if state.entries[key]!.sinceCheckpoint >= Self.checkpointDistance {
                state.entries[key]!.sinceCheckpoint = 0
                state.entries[key]!.checkpoints.append(state.entries[key]!.newest)
                if state.entries[key]!.checkpoints.count > Self.checkpointCount { state.entries[key]!.checkpoints.removeFirst() }
            }
            return true
        }
    }

    /// What was merged by reading the files, of the volume as it is now or a little behind; replaces what is less far.
    func offer(_ group: GroupID, _ volume: Int, _ snapshot: IndexSnapshot, chain: [LayerRecord]) {
        guard let covered = snapshot.covered(of: chain) else { return }
        state.withLock { state in
            let key = Key(group: group, volume: volume)
            if state.building[key] != nil { return }
            if let known = state.entries[key]?.newest.covered(of: chain), known >= covered { return }
            state.entries[key] = Entry(newest: snapshot)
        }
    }

    /// The snapshot nearest below or at the top of `chain` (oldest first) and how many layers of the chain it covers.
    func nearest(_ group: GroupID, _ volume: Int, chain: [LayerRecord]) -> (IndexSnapshot, Int) {
        guard let entry = state.withLock({ $0.entries[Key(group: group, volume: volume)] }) else { return (IndexSnapshot(), 0) }
        var best = (IndexSnapshot(), 0)
        for snapshot in entry.checkpoints + [entry.newest] {
            if let covered = snapshot.covered(of: chain), covered > best.1 { best = (snapshot, covered) }
        }
        return best
    }

    /// Layers were merged, as the MANIFEST says now; on the store's thread, in the same task as the record. The work is proportional to the
    /// merged layer's extents; done elsewhere when they are many.
    func merged(replaced: [UInt64], by layer: LayerRecord) {
        let gone = Set(replaced)
        let merge = LayersMerged(replaced: replaced, layer: layer)
        var (taken, useless) = state.withLock { state -> ([(Key, Entry)], [UInt64]) in
            let useless = state.files.filter { !$0.value.isDisjoint(with: gone) }.keys.sorted()
            for top in useless { state.files[top] = nil }
            for key in state.building.keys { state.building[key]!.append(merge) }
            let keys = state.entries.filter { $0.value.newest.names(gone) || $0.value.checkpoints.contains { $0.names(gone) } }.keys
            return (keys.sorted { ($0.group.rawValue, $0.volume) < ($1.group.rawValue, $1.volume) }.map { ($0, state.entries.removeValue(forKey: $0)!) }, useless)
        }
        guard let store else { return }
        store.forgetIndexFiles(useless)
        if taken.isEmpty { return }
        if layer.extentCount > store.options.rebaseExtentsMax {
            while let (key, entry) = taken.popLast() {
                state.withLock { $0.building[key] = [merge] }
                store.buildIndex(key, from: entry.newest)
            }
            return
        }
        do throws(StoreError) {
            let reader = try LayerReader(store.storage, store: store.uuid, record: layer)
            let checksums = try store.checksums.checksums(of: reader)
            while !taken.isEmpty {
                // Moved, not copied, so that it is changed in place.
                var (key, entry) = taken.removeLast()
                let turns = store.options.deliberateFault != .indexesNotRebased
                guard try entry.newest.rebase(replaced: replaced, by: reader, checksums, turnsExtents: turns) else { continue }
                var kept: [IndexSnapshot] = []
                for var checkpoint in entry.checkpoints where try checkpoint.rebase(replaced: replaced, by: reader, checksums, turnsExtents: turns) { kept.append(checkpoint) }
                entry.checkpoints = kept
                entry.unwrittenCost += IndexCost.of(extentCount: layer.extentCount)
                state.withLock { $0.entries[key] = entry }
            }
        } catch {
            // Forgotten, then: who needs them reads the files, and gets the error.
            store.logger.warning("cannot follow a merge of layers in memory", metadata: ["layer": "\(layer.id)", "error": "\(error)"])
        }
    }

    func remove(_ group: GroupID, volumeCount: Int) {
        state.withLock { state in
            for volume in 0..<volumeCount { state.entries[Key(group: group, volume: volume)] = nil }
        }
    }

    /// For tests and figures: the slots of the newest snapshot.
    func slotCount(_ group: GroupID, _ volume: Int) -> Int? { state.withLock { $0.entries[Key(group: group, volume: volume)]?.newest.layers.count } }

    // MARK: Building

    func isBuilding(_ group: GroupID, _ volume: Int) -> Bool { state.withLock { $0.building[Key(group: group, volume: volume)] != nil } }

    /// False when it is being built already.
    func beginBuilding(_ key: Key) -> Bool {
        state.withLock { state in
            if state.building[key] != nil { return false }
            state.building[key] = []
            return true
        }
    }

    func takePendingMerges(_ key: Key) -> [LayersMerged] {
        state.withLock { state in
            defer { state.building[key]?.removeAll() }
            return state.building[key] ?? []
        }
    }

    func hasPendingMerges(_ key: Key) -> Bool { state.withLock { !($0.building[key] ?? []).isEmpty } }

    /// On the store's thread, unless there is nothing to be had.
    func endBuilding(_ key: Key, _ snapshot: IndexSnapshot?) {
        state.withLock { state in
            state.building[key] = nil
            state.entries[key] = snapshot.map { Entry(newest: $0) }
        }
    }

    // MARK: Files

    /// The volume's newest snapshot when so much came since its last index file that another is due; it counts as written then.
    func takeUnwritten(_ group: GroupID, _ volume: Int, costMin: Int) -> IndexSnapshot? {
        state.withLock { state in
            let key = Key(group: group, volume: volume)
            guard let entry = state.entries[key], entry.unwrittenCost >= max(costMin, entry.newest.index.count / 2) else { return nil }
            state.entries[key]!.unwrittenCost = 0
            return entry.newest
        }
    }

    /// For the end: newest snapshots without a file.
    func unwritten(costMin: Int, extentsMax: Int) -> [IndexSnapshot] {
        state.withLock { state in
            state.entries.values.map(\.newest).filter { snapshot in
                let count = snapshot.index.count
                return count + snapshot.layers.count * IndexCost.perLayer >= costMin && count <= extentsMax && state.files[snapshot.top] == nil
            }.sorted { $0.top < $1.top }
        }
    }

    /// Index files that are whole, by their top layer.
    var files: [UInt64] { state.withLock { $0.files.keys.sorted() } }
    func hasFile(_ top: UInt64) -> Bool { state.withLock { $0.files[top] != nil } }
    func add(file top: UInt64, layers: Set<UInt64>) { state.withLock { $0.files[top] = layers } }
    func remove(file top: UInt64) { state.withLock { _ = $0.files.removeValue(forKey: top) } }
}

/// What it takes to merge layers out of their files, in extents.
enum IndexCost {
    /// Opening a file takes about as long as so many extents.
    static let perLayer = 200

    static func of(extentCount: Int) -> Int { extentCount + perLayer }
    static func of(_ layers: some Sequence<LayerRecord>) -> Int { layers.reduce(0) { $0 + of(extentCount: $1.extentCount) } }
}

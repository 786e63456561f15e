import Synchronization

/// The merged index of a volume up to one layer.
struct IndexSnapshot: Sendable {
    /// The newest layer in it; 0 = none.
    var top: UInt64 = 0
    var index = ExtentIndex()
    /// By `IndexExtent.slot`.
    var layers: ContiguousArray<LayerChecksums> = []

    mutating func apply(_ extents: [StoredExtent], _ checksums: LayerChecksums) {
        let slot = UInt32(layers.count)
        layers.append(checksums)
        for extent in extents {
            if extent.isZero {
                // Absence reads as zeroes and nothing lies below the merged index.
                index.erase(from: extent.startBlock, to: extent.endBlock)
            } else {
                index.apply(extent.indexed(slot: slot))
            }
        }
        top = checksums.layer
    }
}

/// Merged indexes of the volumes' newest layers, brought forward with every epoch so that opening the newest recovery point is
/// instant; and of a few earlier ones, so that opening a recent one merges a few layers only. Copies share what they have in common.
final class IndexCache: Sendable {
    static let checkpointDistance = 64
    static let checkpointCount = 2

    private struct Entry {
        var newest: IndexSnapshot
        /// Oldest first.
        var checkpoints: [IndexSnapshot] = []
        var sinceCheckpoint = 0
    }

    private struct Key: Hashable {
        var group: GroupID
        var volume: Int
    }

    private let entries = Mutex<[Key: Entry]>([:])

    /// Whether the newest layer's index is known.
    func covers(_ group: GroupID, _ volume: Int, top: UInt64) -> Bool {
        entries.withLock { $0[Key(group: group, volume: volume)]?.newest.top == top }
    }

    /// A layer was sealed. False when the cache does not know its parent.
    func add(_ group: GroupID, _ volume: Int, parent: UInt64, extents: [StoredExtent], checksums: LayerChecksums) -> Bool {
        entries.withLock { entries in
            let key = Key(group: group, volume: volume)
            if entries[key] == nil, parent == 0 { entries[key] = Entry(newest: IndexSnapshot()) }
            guard entries[key]?.newest.top == parent else { return false }
            entries[key]!.newest.apply(extents, checksums)
            entries[key]!.sinceCheckpoint += 1
            if entries[key]!.sinceCheckpoint >= Self.checkpointDistance {
                entries[key]!.sinceCheckpoint = 0
                entries[key]!.checkpoints.append(entries[key]!.newest)
                if entries[key]!.checkpoints.count > Self.checkpointCount { entries[key]!.checkpoints.removeFirst() }
            }
            return true
        }
    }

    /// What was merged by reading the files; taken when it is of the volume's newest layer.
    func offer(_ group: GroupID, _ volume: Int, _ snapshot: IndexSnapshot) {
        entries.withLock { $0[Key(group: group, volume: volume)] = Entry(newest: snapshot) }
    }

    /// The snapshot nearest below or at the top of `chain` (oldest first) and how many layers of the chain it covers.
    func nearest(_ group: GroupID, _ volume: Int, chain: [LayerRecord]) -> (IndexSnapshot, Int) {
        guard let entry = entries.withLock({ $0[Key(group: group, volume: volume)] }), let last = chain.last else { return (IndexSnapshot(), 0) }
        // Upkeep may have replaced layers below the top between the two looks, and moved their data: only what is of this chain counts.
        let ids = Set(chain.lazy.map(\.id))
        func isOfChain(_ snapshot: IndexSnapshot) -> Bool { snapshot.layers.allSatisfy { ids.contains($0.layer) } }
        if entry.newest.top == last.id, isOfChain(entry.newest) { return (entry.newest, chain.count) }
        for checkpoint in entry.checkpoints.reversed() {
            if let position = chain.lastIndex(where: { $0.id == checkpoint.top }), isOfChain(checkpoint) { return (checkpoint, position + 1) }
        }
        return (IndexSnapshot(), 0)
    }

    /// Layers were merged: what still names the replaced ones is forgotten.
    func merged(replaced: [UInt64], by layer: LayerRecord) { forget(Set(replaced)) }

    /// What names one of these layers is forgotten: also when the data of a layer moved, since then every place in it is wrong.
    func forget(_ gone: Set<UInt64>) {
        entries.withLock { entries in entries = entries.filter { !$0.value.newest.layers.contains { gone.contains($0.layer) } } }
    }

    func remove(_ group: GroupID, volumeCount: Int) {
        entries.withLock { entries in
            for volume in 0..<volumeCount { entries[Key(group: group, volume: volume)] = nil }
        }
    }
}

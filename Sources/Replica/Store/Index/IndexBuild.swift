/// Merged indexes that take long to make: on a thread of their own, so that epochs go on meanwhile.
///
/// A build starts from the snapshot that it was given, or from the nearest one in the cache or on disk, and applies the layers above
/// it. Epochs and merges go on meanwhile, so it ends in steps: it follows the merges that were noted for it and applies what was
/// sealed since, until little is left; that little is applied on the store's thread, where nothing changes meanwhile, and only there is
/// the snapshot put into the cache.

extension ReplicaStore {
    /// Layers that may be left for the store's thread.
    static let indexLagMax = 4

    /// After an epoch, on the store's thread.
    func bringIndexesForward(_ group: GroupID, _ volumes: [Int], _ records: [LayerRecord], _ written: [LayerFile.Written]) {
        for (index, volume) in volumes.enumerated() {
            if indexes.add(group, volume, parent: records[index].parent, extents: written[index].extents, checksums: written[index].checksums) {
                if let snapshot = indexes.takeUnwritten(group, volume, costMin: options.indexFileCostMin) { writeIndexFile(snapshot) }
                continue
            }
            // First epoch since the store was opened.
            let key = IndexCache.Key(group: group, volume: volume)
            if indexes.beginBuilding(key) { buildIndex(key, from: nil) }
        }
    }

    /// The cache says that it is being built.
    func buildIndex(_ key: IndexCache.Key, from snapshot: IndexSnapshot?) {
        let accepted = background.enqueue { [weak self] in
            guard let self else { return }
            do throws(StoreError) { try self.build(key, from: snapshot) } catch {
                self.indexes.endBuilding(key, nil)
                if error == .closed { return }
                self.logger.error("cannot merge the layers of a disk", metadata: ["group": "\(key.group)", "volume": "\(key.volume)", "error": "\(error)"])
            }
        }
        if !accepted { indexes.endBuilding(key, nil) }
    }

    private func build(_ key: IndexCache.Key, from start: IndexSnapshot?) throws(StoreError) {
        var snapshot = start ?? IndexSnapshot()
        while true {
            for merge in indexes.takePendingMerges(key) where snapshot.names(Set(merge.replaced)) {
                let pin = shared.withLock { $0.state.layers[merge.layer.id] == nil ? nil : $0.add(Pin([merge.layer])) }
                guard let pin else {
                    // Merged with others since: there may be nothing to be read of it any more.
                    snapshot = IndexSnapshot()
                    break
                }
                defer { unpin(pin) }
                let reader = try LayerReader(storage, store: uuid, record: merge.layer)
                if try !snapshot.rebase(replaced: merge.replaced, by: reader, checksums.checksums(of: reader)) { snapshot = IndexSnapshot() }
            }
            guard let (chain, pin) = pinnedChain(key) else { return indexes.endBuilding(key, nil) }
            defer { unpin(pin) }
            if snapshot.top == 0 || snapshot.covered(of: chain) == nil {
                // Not a build that waits for itself: the nearest of what there is.
                snapshot = try merge(key.group, key.volume, chain: chain)
            } else {
                try apply(chain, to: &snapshot)
            }
            var last = IndexSnapshot()
            swap(&last, &snapshot)
            let (isDone, rest) = try thread.perform { () throws(StoreError) -> (Bool, IndexSnapshot) in
                guard let now = self.currentChain(key) else {
                    self.indexes.endBuilding(key, nil)
                    return (true, IndexSnapshot())
                }
                guard !self.indexes.hasPendingMerges(key), let covered = last.covered(of: now), now.count - covered <= Self.indexLagMax else {
                    return (false, last)
                }
                try self.apply(now, to: &last)
                self.indexes.endBuilding(key, last)
                return (true, IndexSnapshot())
            }
            if isDone { return }
            snapshot = rest
        }
    }

    private func currentChain(_ key: IndexCache.Key) -> [LayerRecord]? {
        read { state in
            guard let disks = state.groups[key.group]?.volumes, disks.indices.contains(key.volume), disks[key.volume].top != 0 else { return nil }
            return state.chain(disks[key.volume].top)
        }
    }

    private func pinnedChain(_ key: IndexCache.Key) -> ([LayerRecord], UInt64)? {
        shared.withLock { shared in
            guard !shared.isClosed, let disks = shared.state.groups[key.group]?.volumes, disks.indices.contains(key.volume), disks[key.volume].top != 0 else { return nil }
            let chain = shared.state.chain(disks[key.volume].top)
            return (chain, shared.add(Pin(chain)))
        }
    }

    /// Applies the layers of `chain` that the snapshot does not have. Their headers name the parent of the time; a merge may have taken
    /// that one's place.
    func apply(_ chain: [LayerRecord], to snapshot: inout IndexSnapshot) throws(StoreError) {
        for record in chain[(snapshot.covered(of: chain) ?? 0)...] {
            let reader = try LayerReader(storage, store: uuid, record: record)
            try snapshot.apply(reader, checksums.checksums(of: reader))
        }
    }

    /// The merged index of a pinned chain, oldest layer first; from the cache, or a file of it, as far as those reach.
    func merge(_ group: GroupID, _ volume: Int, chain: [LayerRecord]) throws(StoreError) -> IndexSnapshot {
        var (snapshot, covered) = indexes.nearest(group, volume, chain: chain)
        let costMin = options.indexFileCostMin
        if IndexCost.of(chain[covered...]) >= costMin {
            if indexes.isBuilding(group, volume), !thread.isCurrent, !background.isCurrent {
                // Somebody is at it already.
                try background.perform {}
                (snapshot, covered) = indexes.nearest(group, volume, chain: chain)
            }
            for position in chain.indices.reversed() where position >= covered && indexes.hasFile(chain[position].id) {
                guard let loaded = readIndexFile(Array(chain[...position])) else { continue }
                (snapshot, covered) = (loaded, position + 1)
                break
            }
        }
        let cost = IndexCost.of(chain[covered...])
        try apply(chain, to: &snapshot)
        if cost >= costMin { writeIndexFile(snapshot) }
        return snapshot
    }
}

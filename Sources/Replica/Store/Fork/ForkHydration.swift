import Synchronization

/// Hydration: a fork becomes independent of the recovery points that it shares layers with.
///
/// Per disk one layer is written that says what the fork's whole chain says, on top of nothing, and the fork's own newer layers, or its open one,
/// go on top of it. No data moves: the new layer names the blocks that the fork shows where they lie, as a merge does, so that it costs what the
/// index costs to write. From that record on the fork keeps alive the blocks that it shows and nothing else: when the points go, their layers go
/// whole. `docs/decisions/0015-hydration-by-reference.md` says why this, and not a copy.
///
/// A unit of upkeep, one disk at a time, paced like the others, and never beside a merge: so the layers that it reads stay the fork's until its record is
/// there. Meanwhile the fork may be written to, sealed, forked and committed; what it is sealed into lies on top of the new layer.
/// Asked for by `beginHydration`, and forgotten when the store is closed: whoever wants it keeps the wish.
public struct ForkHydration: Sendable, Equatable {
    /// Bytes of index read and written, and of all that has to be.
    public var doneBytes: UInt64 = 0
    public var totalBytes: UInt64 = 0
    public var isDone = false
    /// Why it cannot be done at all.
    public var failure: StoreError?
    /// Why it has not been done yet; tried again.
    public var delay: StoreError?
    public init() {}
}

extension ReplicaStore {
    /// Makes the fork independent, in the background. Nothing happens when it is, or is being made so.
    public func beginHydration(_ id: ForkID) throws(StoreError) {
        guard read({ $0.forks[id] != nil }) else { throw .unknownFork(id) }
        upkeep.settings.withLock { settings in
            if let known = settings.hydrations[id], !known.isDone, known.failure == nil { return }
            settings.hydrations[id] = ForkHydration()
        }
        upkeep.wake()
    }

    /// Nil: nobody asked.
    public func hydration(_ id: ForkID) -> ForkHydration? { upkeep.settings.withLock { $0.hydrations[id] } }

    /// A disk that is done stays so; the others are left as they are.
    public func endHydration(_ id: ForkID) { upkeep.settings.withLock { $0.hydrations[id] = nil } }

    /// Whether no recovery point shares a layer with the fork; nil: there is no such fork.
    public func isIndependent(_ id: ForkID) -> Bool? { read { state in state.forks[id].map { state.sharedDisks($0, belowMarks: false).isEmpty } } }

    // MARK: The unit

    /// One disk of one fork that was asked for.
    func hydrateForks(_ disk: any Storage) throws(StoreError) -> UpkeepAction? {
        let asked = upkeep.settings.withLock { $0.hydrations.filter { !$0.value.isDone && $0.value.failure == nil }.keys.sorted { $0.rawValue < $1.rawValue } }
        for id in asked {
            do throws(StoreError) {
                if let action = try hydrate(id, disk) { return action }
            } catch {
                switch error {
                case .closed: throw error
                case .full, .io, .abandoned, .busy:
                    note(id) { $0.delay = error }
                    throw error
                default:
                    note(id) { $0.failure = error }
                    logger.error("a fork cannot be made independent of recovery points", metadata: ["fork": "\(id)", "error": "\(error)"])
                }
            }
        }
        return nil
    }

    private func note(_ id: ForkID, _ change: (inout ForkHydration) -> Void) {
        upkeep.settings.withLock { if $0.hydrations[id] != nil { change(&$0.hydrations[id]!) } }
    }

    private func hydrate(_ id: ForkID, _ disk: any Storage) throws(StoreError) -> UpkeepAction? {
        // Pinned while they are read, like the new one until the record names it.
        typealias Work = (volume: Int, name: String, chain: [LayerRecord], leftBytes: UInt64, id: UInt64, pin: UInt64)
        let work = try shared.withLock { shared throws(StoreError) -> Work? in
            guard let fork = shared.state.forks[id] else { throw .unknownFork(id) }
            let left = shared.state.sharedDisks(fork, belowMarks: true)
            guard let volume = left.first else {
                guard shared.state.sharedDisks(fork, belowMarks: false).isEmpty else {
                    throw .invalid("fork \(id) shares layers with recovery points that lie above what was replicated of it last: it becomes independent once that has ended")
                }
                return nil
            }
            let chain = shared.state.chainBelowMarks(fork, volume)
            let layer = shared.newFile()
            var held = Pin(chain)
            held.layers.insert(layer)
            let bytes = left.reduce(0) { sum, volume in sum + shared.state.chainBelowMarks(fork, volume).reduce(0) { $0 + 2 * $1.fileBytes } }
            return (volume, fork.volumes[volume].spec.name, chain, bytes, layer, shared.add(held))
        }
        guard let work else {
            note(id) { hydration in
                hydration.isDone = true
                hydration.totalBytes = hydration.doneBytes
            }
            return nil
        }
        defer { unpin(work.pin) }
        try checkMergeable(work.chain, "disk \(work.name) of fork \(id)")
        note(id) { hydration in
            hydration.delay = nil
            hydration.totalBytes = hydration.doneBytes + work.leftBytes
        }
        let layer: LayerRecord
        do throws(StoreError) {
            layer = try LayerMerge.write(
                disk, store: uuid, id: work.id, layers: work.chain, isSynced: options.deliberateFault != .mergedLayersNotSynced
            ) { bytes throws(StoreError) in
                guard self.hydration(id) != nil else { throw .abandoned("it is no longer asked for") }
                self.note(id) { $0.doneBytes = min($0.totalBytes, $0.doneBytes + UInt64(bytes)) }
            }
            try disk.syncDirectory("layers")
        } catch {
            try? storage.remove(LayerFile.path(work.id))
            upkeep.hasUnnamedFiles.store(true, ordering: .relaxed)
            if case .abandoned = error { return nil }
            throw error
        }
        guard try publish(id, work.volume, work.chain.map(\.id), layer) else { return nil }
        upkeep.count { statistics in
            statistics.forkDisksHydrated += 1
            statistics.indexBytesRewritten += layer.fileBytes
        }
        return .hydrated(id, volume: work.volume)
    }

    /// False when something came in between: the next step looks again.
    private func publish(_ id: ForkID, _ volume: Int, _ replaced: [UInt64], _ layer: LayerRecord) throws(StoreError) -> Bool {
        try thread.perform { () throws(StoreError) -> Bool in
            do throws(StoreError) { try self.change(.forkHydrated(id, volume: volume, replaced: replaced, by: layer)) } catch {
                // A record that may have reached the disk names the file: then it stays, and the next start decides.
                if self.manifest.failure == nil { try? self.storage.remove(LayerFile.path(layer.id)) }
                if case .invalid = error { return false }
                throw error
            }
            // After a commit the group's disk lies on the fork's layers: its index is made anew, of the new ones.
            if let group = self.read({ $0.forks[id]?.group }), let disks = self.read({ $0.groups[group]?.volumes }),
                disks.contains(where: { disk in self.read { $0.chain(disk.top).contains { $0.id == layer.id } } }) {
                self.indexes.remove(group, volumeCount: disks.count)
            }
            self.collectGarbage()
            return true
        }
    }

    private func checkMergeable(_ chain: [LayerRecord], _ what: String) throws(StoreError) {
        // As for merges: a last block that is not whole was hashed at its length.
        if zip(chain, chain.dropFirst()).contains(where: { $0.sizeBytes != $1.sizeBytes && $0.sizeBytes % UInt64(pageBytes) != 0 }) {
            throw .invalid("\(what) has grown from a size that is no multiple of \(pageBytes) bytes: its layers cannot become one, and it stays dependent on its recovery points")
        }
        if let damaged = chain.first(where: { upkeep.work.unreadableLayers.contains($0.id) }) {
            throw .damaged(path: LayerFile.path(damaged.id), offsetBytes: 0, what: "\(what) needs it and cannot be made independent before it is repaired")
        }
        guard chain.reduce(0, { $0 + $1.fileBytes }) <= Compaction.Limits().windowBytesMax else {
            throw .invalid("\(what) has too many blocks for one layer, and stays dependent on its recovery points")
        }
    }
}

extension StoreState {
    /// Disks of a fork of which a recovery point shares a layer: any, or one that a new layer could stand for. A point that stands on what was written to the fork
    /// above its lowest mark was made by committing it: whatever the fork's layers become, they are that point's, too.
    func sharedDisks(_ fork: ForkRecord, belowMarks: Bool) -> [Int] {
        // Only its own group's can: layers do not go from one group to another.
        let points = groups[fork.group]?.points ?? []
        return fork.volumes.indices.filter { number in
            let whole = chain(fork.volumes[number].parent), below = chainBelowMarks(fork, number)
            let own = Set(whole[below.count...].lazy.map(\.id))
            var shared: Set<UInt64> = []
            // Of layers that were looked at, whether one of `own` is in their chain.
            var known: [UInt64: Bool] = [0: false]
            for volume in points.lazy.flatMap(\.volumes) {
                var path: [UInt64] = [], next = volume.top
                while known[next] == nil {
                    if own.contains(next) { known[next] = true } else {
                        path.append(next)
                        next = layers[next]?.parent ?? 0
                    }
                }
                let isOwn = known[next]!
                for layer in path { known[layer] = isOwn }
                if !isOwn { shared.formUnion(path) }
            }
            return (belowMarks ? below : whole).contains { shared.contains($0.id) }
        }
    }

    /// The chain of a fork's disk, oldest first, up to the lowest layer on which another fork stands that was made of it: what lies between two such marks
    /// is what was written between them, and stays apart.
    func chainBelowMarks(_ fork: ForkRecord, _ volume: Int) -> [LayerRecord] {
        let chain = chain(fork.volumes[volume].parent)
        let marks = Set(forks.values.lazy.filter { $0.parentFork == fork.id && $0.volumes.indices.contains(volume) }.map { $0.volumes[volume].parent })
        guard let lowest = chain.firstIndex(where: { marks.contains($0.id) }) else { return chain }
        return Array(chain[...lowest])
    }

    func hydrationConflict(_ id: ForkID, _ volume: Int, _ replaced: [UInt64], _ layer: LayerRecord) -> String? {
        guard let fork = forks[id] else { return "fork \(id) does not exist" }
        guard fork.volumes.indices.contains(volume) else { return "fork \(id) has no disk number \(volume)" }
        guard layers[layer.id] == nil else { return "layer \(layer.id) exists" }
        guard layer.parent == 0, !replaced.isEmpty, chainBelowMarks(fork, volume).map(\.id).starts(with: replaced) else {
            return "layer \(layer.id) does not say what is below disk \(volume) of fork \(id)"
        }
        return nil
    }

    /// What lies on the last of the replaced layers in the fork's chain lies on the new one, and what stood on it stands on the new one: the fork, forks that
    /// were made of it, and those that were made of these; each with its marks, so that they stay in its chain. It says the same to whoever else names it.
    mutating func hydrate(_ id: ForkID, _ volume: Int, _ replaced: [UInt64], by layer: LayerRecord) {
        let last = replaced.last!
        let own = chain(forks[id]!.volumes[volume].parent)
        add(layer)
        if own.count > replaced.count { layers[own[replaced.count].id]!.parent = layer.id }
        var moved: Set<ForkID> = [id], isMore = true
        if forks[id]!.volumes[volume].parent == last { forks[id]!.volumes[volume].parent = layer.id }
        while isMore {
            isMore = false
            for (other, fork) in forks where !moved.contains(other) && fork.parentFork.map(moved.contains) == true && fork.volumes.indices.contains(volume)
                && fork.volumes[volume].parent == last
            {
                forks[other]!.volumes[volume].parent = layer.id
                moved.insert(other)
                isMore = true
            }
        }
        dropUnreachableLayers()
    }
}

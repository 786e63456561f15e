import BlockTap
import Glibc
import Logging

/// What keeps an open fork from growing without bound, on a thread of its own (a stepped store runs it in `forkUpkeepStep`):
///
/// - A long journal, or many overwritten blocks in the open layer's segment, ask for a seal: the next open layer is empty, and the blocks that
///   the layer does not name can be given back.
/// - When layers that a fork reads through are merged, or their data is moved, its index follows to the new ones, so that the old ones and
///   what only they name can go while the fork stays open. Both are there while it does, and reads and writes go on.
extension ReplicaStore {
    /// Any thread: a disk of the fork has reached a bound.
    func askForSeal(_ id: ForkID) {
        forkThread.enqueue { [weak self] in
            guard let self else { return }
            do throws(StoreError) {
                try self.forkLocks.with(id) { () throws(StoreError) in
                    // Somebody else may have sealed it meanwhile.
                    if self.openVolumes(of: id).contains(where: { $0.isSealAsked.load(ordering: .acquiring) }) { try self.sealLocked(id) }
                }
            } catch {
                // It has told, and is asked again when more has been written.
            }
        }
    }

    /// On the store's thread: these layers are not of the state any more.
    func forksFollow(_ replaced: [UInt64]) {
        let forks = shared.withLock { shared in
            var forks: Set<ForkID> = []
            for entry in shared.openForks.values {
                guard let pin = entry.pin.flatMap({ shared.pins[$0] }), replaced.contains(where: { pin.layers.contains($0) }) else { continue }
                if shared.forksToFollow.insert(entry.fork).inserted { forks.insert(entry.fork) }
            }
            return forks
        }
        for id in forks.sorted(by: { $0.rawValue < $1.rawValue }) {
            forkThread.enqueue { [weak self] in
                guard let self else { return }
                self.shared.withLock { _ = $0.forksToFollow.remove(id) }
                do throws(StoreError) { try self.follow(id) } catch {
                    // The store, or the disk meanwhile: then it holds nothing any more.
                    if case .closed = error { return }
                    self.logger.warning("an open fork keeps layers that were merged", metadata: ["fork": "\(id)", "error": "\(error)"])
                }
            }
        }
    }

    /// Of a stepped store: one task of those that wait. Returns whether there was one.
    func forkUpkeepStep() -> Bool { forkThread.runOne() }

    private func openVolumes(of id: ForkID) -> [ForkVolume] {
        shared.withLock { shared in shared.openForks.values.compactMap { $0.fork == id ? $0.volume : nil } }
    }

    /// Turns the indexes of a fork's open disks to the layers of today.
    func follow(_ id: ForkID) throws(StoreError) {
        try forkLocks.with(id) { () throws(StoreError) in
            guard let count = read({ $0.forks[id]?.volumes.count }) else { return }
            for number in 0..<count {
                guard let volume = shared.withLock({ $0.openForks["\(id)/\(number)"]?.volume }) else { continue }
                // Until nothing is left to follow: whoever merges looks at what the disk held before, not at what it is turning to.
                while try followOnce(id, number, volume) {}
            }
        }
    }

    /// The layers are read here; what they say is handed over in parts to where the disk is used. False when the disk is where it should be.
    private func followOnce(_ id: ForkID, _ number: Int, _ volume: ForkVolume) throws(StoreError) -> Bool {
        // Both change under the fork's lock only.
        let known = Set(volume.chain.lazy.map(\.id))
        let seen = Set(volume.map.layers.lazy.map(\.layer))
        let found = shared.withLock { shared -> (chain: [LayerRecord], pin: UInt64)? in
            guard let parent = shared.state.forks[id]?.volumes[number].parent else { return nil }
            let chain = shared.state.chain(parent)
            if shared.isClosed || known.isSubset(of: chain.lazy.map(\.id)) { return nil }
            return (chain, shared.add(Pin(chain)))
        }
        guard let found else { return false }
        defer { unpin(found.pin) }
        // Newest first: what a newer one has named is not looked for in those below. None is needed when only layers went of which nothing is
        // to be seen.
        var layers: [(reader: LayerReader, checksums: LayerChecksums)] = []
        if !seen.isSubset(of: [0] + found.chain.map(\.id)) {
            for record in found.chain.reversed() where !known.contains(record.id) {
                let reader = try LayerReader(storage, store: uuid, record: record)
                layers.append((reader, try checksums.checksums(of: reader)))
            }
        }
        if options.deliberateFault == .forksFollowBackwards { layers.reverse() }
        let change = ForkFollow(
            chain: found.chain, checksums: layers.map(\.checksums), segments: try segments.open(Set(found.chain.lazy.flatMap { $0.segments.lazy.map(\.segment) })))
        nonisolated(unsafe) var step = ForkFollow.Step()
        guard volume.whereUsed({ step = volume.beginFollow(change) }) else { return false }
        for (number, layer) in layers.enumerated() {
            try layer.reader.forEachExtents { extents throws(StoreError) in
                var next = 0
                while next < extents.count {
                    nonisolated(unsafe) let part = UnsafeBufferPointer(rebasing: extents[next..<min(extents.count, next + ForkFollow.extentsMax)])
                    guard volume.whereUsed({ volume.follow(part, slot: step.slots[number], &step) }) else { throw .closed }
                    next += part.count
                }
            }
        }
        return volume.whereUsed(drained: true) { volume.endFollow(change) }
    }
}

/// The layers that a disk's index turns to.
struct ForkFollow {
    /// Handed over at once: reads and writes go on in between.
    static let extentsMax = 4096

    let chain: [LayerRecord]
    /// Of those that the disk does not know, newest first.
    let checksums: [LayerChecksums]
    /// Of the whole chain.
    let segments: SegmentTable

    struct Step {
        /// Slots whose layers are not of the chain any more.
        var gone = SlotSet(count: 0)
        /// Of the new layers.
        var slots: [UInt32] = []
        var hint = 0
    }
}

extension ForkVolume {
    /// Runs `body` where nothing else touches the disk's index: on the loop that serves it, or here; `drained`: while no read is in flight.
    /// False when the disk has been closed.
    func whereUsed(drained: Bool = false, _ body: @escaping () -> Void) -> Bool {
        while true {
            gate.wait()
            if isClosed {
                gate.signal()
                return false
            }
            guard let io else {
                body()
                gate.signal()
                return true
            }
            gate.signal()
            let ended = Semaphore()
            nonisolated(unsafe) var isDone = false
            nonisolated(unsafe) let (target, body) = (io, body)
            let accepted = io.loop.execute {
                target.whileServing(drained: drained, body) {
                    isDone = $0
                    ended.signal()
                }
            }
            if !accepted { return false }
            ended.wait()
            if isDone { return true }
            // Its server went meanwhile: somebody else has it, or nobody.
            sched_yield()
        }
    }

    /// Until the end old and new layers are read through: both are held, also if the end never comes.
    func beginFollow(_ change: ForkFollow) -> ForkFollow.Step {
        let now = Set(change.chain.lazy.map(\.id))
        var step = ForkFollow.Step(gone: SlotSet(count: map.layers.count))
        for (slot, layer) in map.layers.enumerated() where layer.layer != 0 && !now.contains(layer.layer) { step.gone.insert(UInt32(slot)) }
        step.slots = change.checksums.map { map.add($0) }
        map.segments.add(change.segments)
        hold(chain + change.chain)
        return step
    }

    /// Whatever the index finds in a layer that is gone it finds in one of the new ones.
    func follow(_ extents: UnsafeBufferPointer<StoredExtent>, slot: UInt32, _ step: inout ForkFollow.Step) {
        for extent in extents where !extent.isZero { map.index.repoint(extent.indexed(slot: slot), from: step.gone, hint: &step.hint) }
    }

    /// No read may be in flight: those that began before still use the old layers.
    func endFollow(_ change: ForkFollow) {
        chain = change.chain
        map.keep(layers: Set(chain.lazy.map(\.id)), change.segments)
        hold(chain)
    }
}

extension ForkIO {
    /// On-loop. Calls with false when the disk is not served here any more.
    func whileServing(drained: Bool, _ body: @escaping () -> Void, _ done: @escaping (Bool) -> Void) {
        if isRetired { return done(false) }
        start()
        guard drained else {
            body()
            return done(true)
        }
        reads.drain { [self] in
            // Retired while what was read ahead was waited for: the disk may be somebody else's by now.
            if isRetired { return done(false) }
            body()
            done(true)
        }
    }
}

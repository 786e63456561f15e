import BlockTap
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
                try follow(id, number, volume)
            }
        }
    }

    private func follow(_ id: ForkID, _ number: Int, _ volume: ForkVolume) throws(StoreError) {
        let seen = Set(volume.map.layers.lazy.map(\.layer))
        // Also layers of which nothing is to be seen are pinned.
        let held = volume.chain.map(\.id)
        let found = shared.withLock { shared -> (chain: [LayerRecord], pin: UInt64)? in
            guard let parent = shared.state.forks[id]?.volumes[number].parent else { return nil }
            let chain = shared.state.chain(parent)
            let now = Set(chain.lazy.map(\.id))
            if shared.isClosed || (seen.allSatisfy({ $0 == 0 || now.contains($0) }) && held.allSatisfy(now.contains)) { return nil }
            defer { shared.nextPin += 1 }
            shared.pins[shared.nextPin] = Pin(chain)
            return (chain, shared.nextPin)
        }
        guard let found else { return }
        defer { unpin(found.pin) }
        // Newest first: what a newer one has named is not looked for in those below.
        var layers: [LayerFile.Loaded] = []
        for record in found.chain.reversed() where !seen.contains(record.id) { layers.append(try LayerFile.load(storage, store: uuid, record: record)) }
        let table = try segments.open(Set(found.chain.lazy.flatMap { $0.segments.lazy.map(\.segment) }))
        if options.deliberateFault == .forksFollowBackwards { layers.reverse() }
        let change = ForkFollow(chain: found.chain, layers: layers, segments: table)
        while true {
            volume.gate.wait()
            if volume.isClosed { return volume.gate.signal() }
            guard let io = volume.io else {
                var step = volume.beginFollow(change)
                while volume.follow(change, &step, extentsMax: .max) {}
                volume.endFollow(change)
                return volume.gate.signal()
            }
            volume.gate.signal()
            let ended = Semaphore()
            nonisolated(unsafe) var isDone = false
            nonisolated(unsafe) let target = io
            guard io.loop.execute({ target.follow(change) { isDone = $0; ended.signal() } }) else { return }
            ended.wait()
            if isDone { return }
        }
    }
}

/// The layers that a disk's index turns to.
struct ForkFollow {
    let chain: [LayerRecord]
    /// Those that the disk does not know, newest first.
    let layers: [LayerFile.Loaded]
    /// Of the whole chain.
    let segments: SegmentTable

    /// How far it is.
    struct Step {
        /// By slot: its layer is not of the chain any more.
        var isGone: [Bool] = []
        /// Of `layers`.
        var slots: [UInt32] = []
        var layer = 0
        var extent = 0
    }
}

extension ForkVolume {
    func beginFollow(_ change: ForkFollow) -> ForkFollow.Step {
        let now = Set(change.chain.lazy.map(\.id))
        var step = ForkFollow.Step()
        step.isGone = map.layers.map { $0.layer != 0 && !now.contains($0.layer) }
        step.slots = change.layers.map { map.add($0.checksums) }
        map.segments.add(change.segments)
        return step
    }

    /// Whatever the index finds in a layer that is gone it finds in one of the new ones. Returns whether there is more to do.
    func follow(_ change: ForkFollow, _ step: inout ForkFollow.Step, extentsMax: Int) -> Bool {
        var left = extentsMax
        while left > 0, step.layer < change.layers.count {
            let extents = change.layers[step.layer].extents
            guard step.extent < extents.count else {
                step.layer += 1
                step.extent = 0
                continue
            }
            let stored = extents[step.extent]
            step.extent += 1
            left -= 1
            if stored.isZero { continue }
            let extent = stored.indexed(slot: step.slots[step.layer])
            var block = extent.startBlock
            while block < extent.endBlock {
                let (piece, end) = map.index.piece(at: block, end: extent.endBlock)
                if let piece, Int(piece.slot) < step.isGone.count, step.isGone[Int(piece.slot)] { map.index.apply(extent.clipped(from: block, to: end)) }
                block = end
            }
        }
        return step.layer < change.layers.count
    }

    /// No read may be in flight: those that began before still use the old layers.
    func endFollow(_ change: ForkFollow) {
        chain = change.chain
        map.keep(layers: Set(chain.lazy.map(\.id)), change.segments)
        repin()
    }
}

extension ForkIO {
    private static let followBatch = 4096

    /// On-loop. Calls with false when the disk is not served here any more.
    func follow(_ change: ForkFollow, _ done: @escaping (Bool) -> Void) {
        if isRetired { return done(false) }
        start()
        follow(change, fork.beginFollow(change), done)
    }

    private func follow(_ change: ForkFollow, _ step: ForkFollow.Step, _ done: @escaping (Bool) -> Void) {
        var step = step
        // Retired meanwhile: the layers that it knows are pinned until it is closed.
        if isRetired { return done(true) }
        if fork.follow(change, &step, extentsMax: Self.followBatch) {
            nonisolated(unsafe) let (this, next, done) = (self, step, done)
            loop.execute { this.follow(change, next, done) }
            return
        }
        reads.drain { [self] in
            fork.endFollow(change)
            done(true)
        }
    }
}

import BlockTap

@testable import Replica

/// The way back: marks of a fork, what lies between them, and a group that is turned back to what a committed fork was made of.
extension Simulation {
    private static let marksMax = 4
    private func born(_ name: String) -> String { "\(ReplicaStore.birth(of: ForkID(name)))" }

    /// Oldest first; its birth is none of them.
    private func sent(_ name: String) -> [String] {
        state.forks.keys.filter { $0.hasPrefix(name + "-") && $0 != born(name) }.sorted { Int($0.dropFirst(name.count + 1))! < Int($1.dropFirst(name.count + 1))! }
    }

    func marks(of name: String) -> [String] { sent(name) + (state.forks[born(name)] == nil ? [] : [born(name)]) }

    /// What a mark shows is what its fork was at that moment.
    func markFork() throws {
        try drain()
        guard let parent = try knownFork(), sent(parent).count < Self.marksMax else { return }
        let name = "\(parent)-\(nextEpoch)"
        nextEpoch += 1
        var fork = state.forks[parent]!
        fork.settle()
        fork.parent = parent
        let done = try attempt("mark fork \(parent) as \(name)", .fork(name, fork)) { () throws(StoreError) in
            try store.mark(ForkID(name), of: ForkID(parent), purpose: ForkSource.purpose, unlessEqual: nil)
        }
        try sealEnded(parent, done != nil)
        guard done != nil else { return }
        state.forks[name] = fork
        possible = []
        result.markCount += 1
    }

    /// As late as one likes, while the recovery point is there.
    func markBirth() throws {
        try drain()
        let found = state.machines.first { name in
            let fork = state.forks[name]!
            return fork.parent == nil && state.forks[born(name)] == nil && state.groups[fork.group]?.points.contains { $0.id == fork.point } == true
        }
        guard let name = found, let fork = state.forks[name], let point = state.groups[fork.group]?.points.last(where: { $0.id == fork.point }) else { return }
        let birth = SimulationState.Fork(group: fork.group, point: fork.point, parent: name, volumes: point.images.map { .init(flushed: $0) })
        let done: Void? = try attempt("mark the birth of fork \(name)", .fork(born(name), birth)) { () throws(StoreError) in try store.markBirth(of: ForkID(name)) }
        guard done != nil else { return }
        state.forks[born(name)] = birth
        possible = []
    }

    func dropAnyMark() throws {
        try drain()
        let marks = state.machines.flatMap { self.marks(of: $0) }
        if !marks.isEmpty { try dropMark(marks[random.below(marks.count)]) }
    }

    func dropMark(_ name: String) throws {
        if try attempt("drop mark \(name)", .drop(name), { () throws(StoreError) in try store.dropFork(ForkID(name)) }) != nil { state.forks[name] = nil }
    }

    /// What lies between two marks, on top of what the older one was, is what the newer one is.
    func checkMarks() throws {
        try drain()
        for name in state.machines {
            let sent = sent(name)
            guard let upper = sent.isEmpty ? nil : sent[random.below(sent.count)] else { continue }
            let older = sent.prefix { $0 != upper }
            let isSinceBirth = older.isEmpty || random.oneIn(3)
            let lower = isSinceBirth ? born(name) : older[random.below(older.count)]
            guard let before = state.forks[lower] else { continue }
            for volume in state.forks[upper]!.volumes.indices where !storage.isDown {
                if isSinceBirth {
                    // Not known of a fork that was hydrated before.
                    let written = try attempt("what fork \(name) wrote") { () throws(StoreError) in try store.written(to: ForkID(name), upTo: ForkID(upper), volume: volume) }
                    guard written != .some(nil), written != nil else { continue }
                }
                let opened = try attempt("open mark \(upper) above \(lower)") { () throws(StoreError) in
                    try store.openMark(ForkID(upper), volume: volume, above: ForkID(lower))
                }
                guard let (reader, changed) = opened else { continue }
                let (old, new) = (before.volumes[volume].flushed, state.forks[upper]!.volumes[volume].flushed)
                let what = "mark \(upper), disk \(volume), above \(lower)"
                guard let seen = try look(what, new.count, { bytes throws(StoreError) in try reader.read(offsetBytes: 0, into: bytes) }) else { continue }
                var image = old
                for run in changed {
                    for sector in Int(run.lowerBound) * sectorsPerBlock..<min(new.count, Int(run.upperBound) * sectorsPerBlock) { image[sector] = seen[sector] }
                }
                if let sector = new.indices.first(where: { image[$0] != new[$0] }) {
                    throw failure("\(what): sector \(sector) comes to stamp \(image[sector]), not \(new[sector]); it was \(old[sector])")
                }
                result.markCheckCount += 1
            }
        }
    }

    /// The roles turn: what the source was when it was failed over is the group's newest state again.
    func turnBack() throws {
        try drain()
        let found = state.groups.keys.sorted().first { group in
            incoming[group] == nil && state.groups[group]!.committed.map { state.forks[born($0)] != nil } == true
        }
        guard let name = found, let group = state.groups[name], let fork = group.committed, let birth = state.forks[born(fork)], birth.group == name else { return }
        let epoch = nextEpoch
        nextEpoch += 1
        let writer = try attempt("turn \(name) back to what fork \(fork) was made of") { () throws(StoreError) in
            try store.beginTurnBack(
                GroupID(name), generation: Generation(group.generation), toBirthOf: ForkID(fork), as: DurablePosition(instance: "a", epoch: EpochNumber(epoch), kind: .exact),
                cutTimeNanoseconds: epoch)
        }
        guard let writer = writer ?? nil else { return }
        var images = group.images
        for (volume, disk) in birth.volumes.enumerated() { images[volume] = disk.flushed }
        incoming[name] = Incoming(group: name, writer: writer, epoch: epoch, isExact: true, images: images, base: nil)
        result.turnBackCount += 1
        try seal(name)
    }
}

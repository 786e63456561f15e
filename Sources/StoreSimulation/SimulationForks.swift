import BlockTap

@testable import Replica

extension Simulation {
    func fork(_ group: String) throws {
        guard let name = ["f1", "f2", "f3"].first(where: { state.forks[$0] == nil }) else { return }
        try drain()
        let points = state.groups[group]!.points
        guard !points.isEmpty else { return }
        let point = points[random.below(points.count)]
        let fork = SimulationState.Fork(group: group, point: point.id!, volumes: point.images.map { .init(flushed: $0) })
        let done: Void? = try attempt("fork \(name)", .fork(name, fork)) { () throws(StoreError) in
            try store.fork(ForkID(name), of: GroupID(group), at: point.id!, purpose: "simulation")
        }
        guard done != nil else { return }
        state.forks[name] = fork
        if !storage.isDown, random.oneIn(2) { try markBirth() }
    }

    private func anyMachine() -> String? {
        let machines = state.machines
        return machines.isEmpty ? nil : machines[random.below(machines.count)]
    }

    /// Whether what the model has written is what the fork holds, on all its disks: none was opened again after a crash that nobody looked at.
    private func isKnown(_ name: String) -> Bool {
        state.forks[name]!.volumes.indices.allSatisfy { openForks["\(name)/\($0)"] != nil || state.forks[name]!.volumes[$0].writes.isEmpty }
    }

    func knownFork() throws -> String? {
        guard let name = anyMachine() else { return nil }
        if !isKnown(name) || random.oneIn(2) {
            for volume in state.forks[name]!.volumes.indices where !storage.isDown { try openFork(name, volume) }
        }
        return isKnown(name) && !state.forks[name]!.isUnclear && !storage.isDown ? name : nil
    }

    /// After something that may have sealed it.
    func sealEnded(_ name: String, _ isDone: Bool) throws {
        if isDone { return state.forks[name]!.settle() }
        for volume in state.forks[name]!.volumes.indices {
            let key = "\(name)/\(volume)"
            if let fork = openForks[key], fork.failure != nil { try closeFork(key) }
        }
    }

    func sealFork() throws {
        guard let name = try knownFork() else { return }
        let done: Void? = try attempt("seal fork \(name)") { () throws(StoreError) in try store.sealFork(ForkID(name)) }
        try sealEnded(name, done != nil)
        if done != nil { result.forkSealCount += 1 }
    }

    func forkFork() throws {
        guard let child = ["f1", "f2", "f3"].first(where: { state.forks[$0] == nil }) else { return }
        try drain()
        guard let parent = try knownFork() else { return }
        var fork = state.forks[parent]!
        fork.settle()
        fork.parent = parent
        let done: Void? = try attempt("fork \(child) of fork \(parent)", .fork(child, fork)) { () throws(StoreError) in
            try store.fork(ForkID(child), ofFork: ForkID(parent), purpose: "simulation")
        }
        try sealEnded(parent, done != nil)
        guard done != nil else { return }
        state.forks[child] = fork
        possible = []
        result.forkForkCount += 1
    }

    func commitFork() throws {
        try drain()
        guard let name = try knownFork(), let group = state.groups[state.forks[name]!.group] else { return }
        let fork = state.forks[name]!
        let images = fork.volumes.map(\.image)
        if !canCommit(fork, group) {
            return try mustRefuse("commit of a fork that does not fit") { () throws(StoreError) in try store.commitFork(ForkID(name)) }
        }
        incoming[fork.group]?.mustFail = true
        let done: Void? = try attempt("commit fork \(name)", .commit(fork: name, images)) { () throws(StoreError) in try store.commitFork(ForkID(name)) }
        try sealEnded(name, done != nil)
        incoming[fork.group] = nil
        guard done != nil else { return }
        PossibleChange.commit(fork: name, images).apply(to: &state)
        possible = []
        result.commitCount += 1
        if !storage.isDown, random.oneIn(2) { try turnBack() }
    }

    private func canCommit(_ fork: SimulationState.Fork, _ group: SimulationState.Group) -> Bool {
        group.images.count >= fork.volumes.count && zip(group.images, fork.volumes).allSatisfy { $0.count >= $1.flushed.count }
    }

    /// Asks for a fork to become independent, or no longer to; upkeep does it, some time. What it shows stays.
    func hydrateFork() throws {
        guard let name = anyMachine() else { return }
        try drain()
        if random.oneIn(8) { return store.endHydration(ForkID(name)) }
        _ = try attempt("hydrate fork \(name)") { () throws(StoreError) in try store.beginHydration(ForkID(name)) }
    }

    func dropFork() throws {
        guard let name = anyMachine() else { return }
        try drain()
        // Its marks go first: none is ever without its fork.
        for mark in marks(of: name) where !storage.isDown { try dropMark(mark) }
        guard marks(of: name).isEmpty else { return }
        // The files of an open one stay until it is closed; from here on nobody may write to it.
        for key in openForks.keys.sorted() where key.hasPrefix(name + "/") { try closeFork(key) }
        if try attempt("drop fork \(name)", .drop(name), { () throws(StoreError) in try store.dropFork(ForkID(name)) }) != nil { PossibleChange.drop(name).apply(to: &state) }
    }

    func useFork() throws {
        guard let name = anyMachine() else { return }
        let volume = random.below(state.forks[name]!.volumes.count)
        let key = "\(name)/\(volume)"
        guard let fork = openForks[key] else { return try openFork(name, volume) }
        switch random.below(20) {
        case 0: try closeFork(key)
        case 1, 2: try check(name, volume, fork)
        case 3..<6: try flush(name, volume, fork)
        case 6..<9: try write(name, volume, fork, isZero: true)
        case 9: // FUA
            try write(name, volume, fork, isZero: false)
            try flush(name, volume, fork)
        default: try write(name, volume, fork, isZero: false)
        }
    }

    /// After a crash: what was flushed and, of the writes since, those before some one. What it shows then it keeps.
    func openFork(_ name: String, _ volume: Int) throws {
        let key = "\(name)/\(volume)"
        guard openForks[key] == nil else { return }
        let opened = try attempt("open fork \(key)") { () throws(StoreError) in try store.openFork(ForkID(name), volume: volume) }
        guard let opened else { return }
        openForks[key] = opened
        try settle(name, volume, opened, from: 0, isFlushed: true)
    }

    /// Finds the moment that the fork shows, at or after write number `from`.
    private func settle(_ name: String, _ volume: Int, _ fork: ForkVolume, from: Int, isFlushed: Bool) throws {
        let disk = state.forks[name]!.volumes[volume]
        if state.forks[name]!.isUnclear { return }
        guard let seen = try look("fork \(name)/\(volume)", disk.flushed.count, { bytes throws(StoreError) in try fork.read(offsetBytes: 0, into: bytes) }) else {
            if disk.writes.count > from { state.forks[name]!.isUnclear = storage.liesTold > 0 }
            return
        }
        guard let count = (from...disk.writes.count).first(where: { disk.after($0) == seen }) else {
            let wanted = disk.image
            let sector = seen.indices.first { seen[$0] != wanted[$0] } ?? 0
            throw failure("fork \(name)/\(volume) is not as after any of its last \(disk.writes.count - from) writes: sector \(sector) has stamp \(seen[sector]), the last write gave \(wanted[sector]), the last flush \(disk.flushed[sector])")
        }
        if isFlushed {
            state.forks[name]!.volumes[volume].settle(count)
        } else {
            state.forks[name]!.volumes[volume].writes.removeLast(disk.writes.count - count)
        }
    }

    private func check(_ name: String, _ volume: Int, _ fork: ForkVolume) throws {
        let count = state.forks[name]!.volumes[volume].writes.count
        try settle(name, volume, fork, from: count, isFlushed: false)
    }

    private func write(_ name: String, _ volume: Int, _ fork: ForkVolume, isZero: Bool) throws {
        let size = state.forks[name]!.volumes[volume].flushed.count
        let start = random.below(size)
        let range = start..<min(size, start + 1 + random.below(random.oneIn(3) ? 90 : 12))
        let stamp = isZero ? 0 : newStamp()
        let before = state.forks[name]!.volumes[volume].writes.count
        if isZero {
            // Edges inside a block are writes of their own.
            let first = (range.lowerBound + sectorsPerBlock - 1) / sectorsPerBlock * sectorsPerBlock
            let last = range.upperBound == size ? size : range.upperBound / sectorsPerBlock * sectorsPerBlock
            let parts = first >= last ? [range] : [range.lowerBound..<first, first..<last, last..<range.upperBound]
            for part in parts where !part.isEmpty { state.forks[name]!.volumes[volume].writes.append((part, 0)) }
        } else {
            state.forks[name]!.volumes[volume].writes.append((range, stamp))
        }
        let done: Void? = try attempt("write to fork \(name)/\(volume)") { () throws(StoreError) in
            if isZero { return try fork.zero(offsetBytes: UInt64(range.lowerBound * sectorBytes), lengthBytes: UInt64(range.count * sectorBytes)) }
            let bytes = UnsafeMutableRawBufferPointer.allocate(byteCount: range.count * sectorBytes, alignment: 8)
            defer { bytes.deallocate() }
            fill(bytes.baseAddress!, repeatElement(stamp, count: range.count))
            try fork.write(offsetBytes: UInt64(range.lowerBound * sectorBytes), UnsafeRawBufferPointer(bytes))
        }
        // What failed happened up to some part, or not at all.
        if done == nil, !storage.isDown { try settle(name, volume, fork, from: before, isFlushed: false) }
        if done == nil, fork.failure != nil { try closeFork("\(name)/\(volume)") }
    }

    private func flush(_ name: String, _ volume: Int, _ fork: ForkVolume) throws {
        // A write that the power took was never committed: this fork has nothing to flush.
        if storage.isDown { return }
        let done: Void? = try attempt("flush fork \(name)/\(volume)") { () throws(StoreError) in try fork.flush() }
        if done != nil {
            state.forks[name]!.volumes[volume].settle(state.forks[name]!.volumes[volume].writes.count)
        } else if fork.failure != nil {
            try closeFork("\(name)/\(volume)")
        }
    }

    /// One of the tasks that open forks have asked for, while others than forks go on. Returns whether there was one.
    @discardableResult
    func forkUpkeep(isAlone: Bool = false) throws -> Bool {
        if isForkBusy || storage.isDown { return false }
        isForkBusy = true
        defer { isForkBusy = false }
        nonisolated(unsafe) var did = false
        try pausing(!isAlone) { did = store.forkUpkeepStep() }
        if did { result.forkTaskCount += 1 }
        // What was to be sealed, and may have been.
        for key in openForks.keys.sorted() where openForks[key]!.failure != nil { try closeFork(key) }
        return did
    }

    /// All that are open show what they should.
    func checkForks() throws {
        for key in openForks.keys.sorted() {
            let parts = key.split(separator: "/")
            try check(String(parts[0]), Int(parts[1])!, openForks[key]!)
        }
    }

    func closeFork(_ key: String) throws {
        guard !storage.isDown, let fork = openForks.removeValue(forKey: key) else { return }
        let parts = key.split(separator: "/")
        let (name, volume) = (String(parts[0]), Int(parts[1])!)
        let isWhole = fork.failure == nil
        let done: Void? = try attempt("close fork \(key)") { () throws(StoreError) in try fork.close() }
        if done != nil, isWhole, state.forks[name] != nil { state.forks[name]!.volumes[volume].settle(state.forks[name]!.volumes[volume].writes.count) }
    }
}

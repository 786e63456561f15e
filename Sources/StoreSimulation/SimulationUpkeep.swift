import BlockTap

@testable import Replica

/// Recovery points that come, stay and go, and what the store does for itself.
extension Simulation {
    /// What upkeep did in a run, so that a test can tell that all of it happened.
    public struct UpkeepCounts: Sendable, Hashable {
        public var expiredPoints = 0
        public var merges = 0
        public var holes = 0
        public var evacuations = 0
        public var removals = 0
        public var rewrites = 0
        public var indexes = 0
        public var hydrations = 0

        public static func += (left: inout UpkeepCounts, right: UpkeepCounts) {
            left.expiredPoints += right.expiredPoints
            left.merges += right.merges
            left.holes += right.holes
            left.evacuations += right.evacuations
            left.removals += right.removals
            left.rewrites += right.rewrites
            left.indexes += right.indexes
            left.hydrations += right.hydrations
        }

        mutating func count(_ action: UpkeepAction) {
            switch action {
            case .expired(_, let count): expiredPoints += count
            case .merged: merges += 1
            case .reclaimed: holes += 1
            case .evacuated: evacuations += 1
            case .removed: removals += 1
            case .rewroteManifest: rewrites += 1
            case .wroteIndex: indexes += 1
            case .hydrated: hydrations += 1
            }
        }
    }

    // MARK: Recovery points

    private func point(_ name: String) -> SimulationState.Point? {
        let points = state.groups[name]!.points
        return points.isEmpty ? nil : points[random.below(points.count)]
    }

    /// Drops one point or several neighbours, as people do.
    func dropPoints(_ name: String) throws {
        try drain()
        let points = state.groups[name]!.points
        guard !points.isEmpty else { return }
        let start = random.below(points.count)
        // Sometimes all but the newest.
        let chosen = random.oneIn(4) && points.count > 1 ? points.dropLast().filter { $0.hold == nil }[...] : points[start..<min(points.count, start + 1 + random.below(4))]
        if chosen.isEmpty { return }
        let ids = chosen.map { $0.id! }
        if chosen.contains(where: { $0.hold != nil }) {
            return try mustRefuse("drop of a held point") { () throws(StoreError) in try store.dropRecoveryPoints(GroupID(name), ids) }
        }
        // Only the disk has no space left, and some was kept for this.
        let mustWork = storage.capacityPages != nil && !storage.faults.isFull && storage.faults.fullOneIn == 0 && storage.hasReserve
        try change("drop points of \(name)", .dropPoints(name, ids)) { () throws(StoreError) in try store.dropRecoveryPoints(GroupID(name), ids) }
        if mustWork { try expect(!state.groups[name]!.points.contains { ids.contains($0.id!) }, "on a full disk no recovery point can be dropped") }
    }

    func markPoint(_ name: String) throws {
        try drain()
        guard let point = point(name), let id = point.id else { return }
        let group = GroupID(name)
        switch random.below(4) {
        case 0:
            let note = random.oneIn(3) ? nil : "note \(random.below(100))"
            let isOnDemand = random.oneIn(2)
            try change("mark \(id)", .mark(name, id, note: note, hold: point.hold, isOnDemand: isOnDemand)) { () throws(StoreError) in
                try store.markRecoveryPoint(group, id, note: note, isOnDemand: isOnDemand)
            }
        case 1:
            if point.hold != nil {
                return try mustRefuse("a second hold") { () throws(StoreError) in try store.holdRecoveryPoint(group, id, name: "other") }
            }
            try change("hold \(id)", .mark(name, id, note: point.note, hold: "kept", isOnDemand: point.isOnDemand)) { () throws(StoreError) in
                try store.holdRecoveryPoint(group, id, name: "kept")
            }
        default:
            guard let held = state.groups[name]!.points.first(where: { $0.hold != nil }), let id = held.id else { return }
            try change("release \(id)", .mark(name, id, note: held.note, hold: nil, isOnDemand: held.isOnDemand)) { () throws(StoreError) in
                try store.releaseRecoveryPoint(group, id)
            }
        }
    }

    func mustRefuse(_ what: String, _ body: () throws(StoreError) -> Void) throws {
        do throws(StoreError) { try body() } catch {
            if case .invalid = error { return }
            return try refused(what, error, nil)
        }
        throw failure("\(what) was not refused")
    }

    /// What people asked for is not kept by the store: it is told again whenever it was opened.
    func setPolicies() {
        for name in state.groups.keys { store.setRetention(GroupID(name), policies[name] ?? nil) }
        store.setTightening(isTightening)
    }

    func choosePolicy(_ name: String) {
        typealias Tier = RecoveryPointPolicy.Tier
        policies[name] = [
            nil, .standard,
            RecoveryPointPolicy(tiers: [Tier(everySeconds: 0, forSeconds: 60)]),
            RecoveryPointPolicy(tiers: [Tier(everySeconds: 0, forSeconds: 600), Tier(everySeconds: 3600, forSeconds: 20_000)]),
            RecoveryPointPolicy(tiers: [Tier(everySeconds: 60, forSeconds: 3600), Tier(everySeconds: 86_400, forSeconds: 864_000)]),
        ][random.below(5)]
        if weather == .full { isTightening = random.oneIn(2) }
        setPolicies()
    }

    func passTime() {
        let most = [1, 30, 600, 7200, 100_000][random.below(5)]
        clock.nanoseconds += UInt64(1 + random.below(most)) * 1_000_000_000
    }

    // MARK: Upkeep

    /// One unit, while others go on where the store lets them. Returns whether there may be more to do.
    @discardableResult
    func upkeep(isAlone: Bool = false) throws -> Bool {
        try drain()
        let expired = expiring()
        let ids = Dictionary(uniqueKeysWithValues: state.groups.map { ($0.key, $0.value.points.map { $0.id! }) })
        let couldRecord = store.manifest.failure == nil
        nonisolated(unsafe) var action: UpkeepAction?
        let done: Void? = try pausing(!isAlone) {
            try attempt("upkeep") { () throws(StoreError) in action = try store.upkeepStep() }
        }
        if couldRecord, store.manifest.failure != nil {
            // What went may come back, and the other way round.
            for (name, gone) in expired { possible.append(.dropPoints(name, gone)) }
            if isTightening { for (name, known) in ids { for id in known { possible.append(.dropPoints(name, [id])) } } }
        }
        guard done != nil, let action else { return false }
        logger.debug("upkeep: \(action)")
        result.upkeep.count(action)
        if case .expired(let group, let count) = action { try settleExpired(group.rawValue, count, due: expired) }
        return true
    }

    /// What retention is to drop next, by group.
    private func expiring() -> [(String, [RecoveryPointID])] {
        state.groups.keys.sorted().compactMap { name in
            guard let policy = policies[name] ?? nil else { return nil }
            let gone = policy.expired(store.recoveryPoints(GroupID(name)), nowNanoseconds: clock.nanoseconds)
            return gone.isEmpty ? nil : (name, gone)
        }
    }

    private func settleExpired(_ name: String, _ count: Int, due: [(String, [RecoveryPointID])]) throws {
        // What was sealed meanwhile is in the store already.
        try collect()
        if let (first, gone) = due.first {
            try expect(first == name && gone.count == count, "\(count) points of \(name) expired, not \(gone) of \(first)")
            PossibleChange.dropPoints(name, gone).apply(to: &state)
        } else {
            let now = Set(store.recoveryPoints(GroupID(name)).map(\.id))
            let gone = state.groups[name]!.points.filter { !now.contains($0.id!) }
            try expect(isTightening && gone.count == 1 && gone[0].hold == nil && gone[0].id != state.groups[name]!.points.last!.id, "\(gone.map { $0.id! }) of \(name) went before their time")
            PossibleChange.dropPoints(name, gone.map { $0.id! }).apply(to: &state)
        }
        try expect(store.recoveryPoints(GroupID(name)).map(\.id) == state.groups[name]!.points.map { $0.id! }, "other points of \(name) are left than should be")
    }

    // MARK: Meanwhile

    /// Lets others do something between the steps of `body`, wherever the store's own thread would be free.
    func pausing<T>(_ isOn: Bool, _ body: () throws -> T) throws -> T {
        if !isOn || storage.onPause != nil { return try body() }
        nonisolated(unsafe) var failed: (any Error)?
        var isBusy = false
        storage.onPause = { [unowned self] in
            guard !isBusy, failed == nil, store != nil, !store.thread.isCurrent, !storage.isDown, random.oneIn(10) else { return }
            isBusy = true
            defer { isBusy = false }
            do { try meanwhile() } catch { failed = error }
        }
        defer { storage.onPause = nil }
        let outcome = try body()
        if let failed { throw failed }
        return outcome
    }

    // MARK: At rest

    /// Upkeep until there is nothing left to do, with nobody in its way; then what the store promises about its size must hold.
    func rest() throws {
        readers = []
        try drain()
        var units = 0
        while true {
            let (did, forksDid) = (try upkeep(isAlone: true), try forkUpkeep(isAlone: true))
            try drain()
            if !did && !forksDid { break }
            units += 1
            try expect(units < 20_000, "upkeep does not come to an end")
        }
        try checkFiles()
        try checkSize()
    }

    /// No file that nothing names. A merged index may have lost its use, but not its layer.
    private func checkFiles() throws {
        let (layers, segments, journals) = store.shared.withLock { shared in
            var segments = Set(shared.state.layers.values.flatMap { $0.segments.map { UInt64($0.segment) } })
            segments.formUnion(shared.state.forks.values.flatMap { $0.volumes.map { UInt64($0.segment) } })
            for receiver in shared.receivers.values { segments.formUnion(receiver.heldSegments.map { UInt64($0) }) }
            return (Set(shared.state.layers.keys), segments, Set(shared.state.forks.values.flatMap { $0.volumes.map(\.journal) }))
        }
        for (directory, suffix, named) in [("layers", ".layer", layers), ("indexes", ".index", layers), ("segments", ".seg", segments), ("journals", ".journal", journals)] {
            for (path, _) in storage.files where path.hasPrefix(directory + "/") && path.hasSuffix(suffix) {
                let number = UInt64(path.dropFirst(directory.count + 1).dropLast(suffix.count))!
                try expect(named.contains(number), "nothing names \(path)")
            }
        }
    }

    private func checkSize() throws {
        let current = store.read { $0 }
        let named = Set(current.tops)
        var onTop: [UInt64: Int] = [:]
        for layer in current.layers.values { onTop[layer.parent, default: 0] += 1 }
        for top in named.sorted() {
            let chain = current.chain(top)
            let needed = chain.count { named.contains($0.id) || onTop[$0.id] ?? 0 > 1 }
            try expect(chain.count <= needed + 24, "\(chain.count) layers in a chain, \(needed) of them needed")
        }
        let open = store.shared.withLock { shared in
            shared.receivers.values.reduce(into: Set(shared.state.forks.values.flatMap { $0.volumes.map(\.segment) })) { $0.formUnion($1.heldSegments) }
        }
        var live: [UInt32: Int] = [:]
        var indexBytes: [UInt32: Int] = [:]
        for layer in current.layers.values {
            for use in layer.segments {
                live[use.segment, default: 0] += Int(use.blocks)
                indexBytes[use.segment, default: 0] += Int(layer.fileBytes)
            }
        }
        let slack = Int(options.reclaimBytesMin) / SimulatedStorage.pageBytes
        var (sealedPages, sealedCount) = (0, 0)
        for (path, pages) in storage.files where path.hasPrefix("segments/") {
            let number = UInt32(path.dropFirst("segments/".count).dropLast(".seg".count))!
            if open.contains(number) { continue }
            sealedPages += pages
            sealedCount += 1
            let blocks = live[number]!
            if storage.canPunch {
                try expect(pages <= 1 + blocks + max(blocks / 5, slack) + 1, "\(path) occupies \(pages) pages for \(blocks) blocks")
            } else {
                // What is left of it is moved when that costs at most one and a half of what it gives, the layers that name it included.
                let dead = pages - blocks
                let pays = (blocks * 4096 + indexBytes[number]!) * 2 <= dead * 4096 * 3
                try expect(!pays || blocks * 10 > pages * 6 || dead <= slack, "\(path) occupies \(pages) pages for \(blocks) blocks, \(indexBytes[number]!) bytes of layers name it")
            }
        }
        // Of a compressed cluster all stays while one block of it is needed. What a fork has overwritten of its origin stays while the fork does, and neighbours of different odd sizes stay apart.
        let isMixed = current.layers.values.contains { $0.sizeBytes % 4096 != 0 && !named.contains($0.id) }
        if !storage.canPunch || !state.forks.isEmpty || isMixed || hasZeroData || options.compression != .none { return }
        // The same by the model: each write has its own stamps, so that what is the same is shared.
        var blocks: Set<[UInt32]> = []
        func add(_ image: Image) {
            for start in stride(from: 0, to: image.count, by: sectorsPerBlock) {
                let block = image[start..<min(image.count, start + sectorsPerBlock)]
                if block.contains(where: { $0 != 0 }) { blocks.insert([UInt32(start)] + block) }
            }
        }
        for group in state.groups.values {
            group.images.forEach(add)
            for point in group.points { point.images.forEach(add) }
        }
        for fork in state.forks.values { for volume in fork.volumes { add(volume.image) } }
        let most = blocks.count * 13 / 10 + sealedCount * (slack + 2) + Int(options.garbageBytesMin) / SimulatedStorage.pageBytes * 13 / 10
        func words(_ layer: LayerRecord) -> String {
            "\(layer.id) on \(layer.parent)\(named.contains(layer.id) ? ", named" : ""), \(layer.sizeBytes) bytes, \(layer.segments.map { "\($0.blocks) in \($0.segment)" })"
        }
        try expect(sealedPages <= most, """
            \(sealedPages) pages in \(sealedCount) sealed segments, not \(most), for \(blocks.count) blocks that anybody can read; \
            least \(options.garbageBytesMin) and \(options.reclaimBytesMin) bytes; layers \(current.layers.values.sorted { $0.id < $1.id }.map(words))
            """)
    }
}

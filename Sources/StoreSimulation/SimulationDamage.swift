import BlockTap

@testable import Replica

/// Bits that rot, scrubbing that finds them, and repair with what the source still has.
extension Simulation {
    /// Damage of which everything is known: where it is, and that nothing else is wrong.
    struct Rot {
        var segment: UInt32
    }

    /// What a block with this checksum held, by what was received.
    func remember(_ checksum: UInt64, _ stamps: ArraySlice<UInt32>) {
        if weather == .lies { received[checksum] = Array(stamps) }
    }

    /// A bit flips in an index file: whatever becomes of it, nobody may notice.
    func rotIndex() {
        guard let place = storage.rot({ $0.hasPrefix("indexes/") }) else { return }
        logger.debug("\(step): rot in \(place.path)")
        result.indexRotCount += 1
    }

    /// A bit flips somewhere that errors may come of.
    func rotAnything() {
        // Data that only layers of the state name.
        let sealed = store.shared.withLock { shared in
            Set(shared.state.layers.values.flatMap { $0.segments.map(\.segment) }).subtracting(SegmentUsers(shared, ignoresPins: false).open)
        }
        func segment(_ path: String) -> UInt32? { path.hasPrefix("segments/") ? UInt32(path.dropFirst("segments/".count).dropLast(".seg".count)) : nil }
        let prefix = ["segments/", "segments/", "layers/", "journals/", "MANIFEST", ""][random.below(6)]
        guard let place = storage.rot({ path in isMending ? segment(path).map(sealed.contains) ?? false : path.hasPrefix(prefix) }) else { return }
        logger.debug("\(step): rot in \(place.path), page \(place.page)")
        if place.page > 0, let number = segment(place.path), sealed.contains(number) { rot = Rot(segment: number) }
    }

    /// Reads some layers, or all of them, while others go on.
    func scrub() throws {
        try drain()
        for _ in 0..<(random.oneIn(3) ? 200 : 1 + random.below(4)) {
            nonisolated(unsafe) var done: ReplicaStore.ScrubStep?
            try pausing(true) { done = store.scrubStep() }
            guard let done, done != .passEnded, !storage.isDown else { break }
        }
        try checkScrub()
    }

    /// Nothing is bad that nothing has made so.
    private func checkScrub() throws {
        if storage.isDown || storage.liesTold > 0 || weather == .faults { return }
        let figures = store.statistics().scrub
        try expect(figures.badBlockCount == 0 && figures.badFileCount == 0, "scrubbing finds damage where there is none: \(calmly { store.badExtents() })")
    }

    /// All layers, from the first to the last, with nobody in the way.
    func scrubAll() throws {
        for _ in 0..<2 {
            while case .read? = store.scrubStep() {}
        }
    }

    /// After a bit has flipped in data: scrubbing finds it if anybody reads it; with other bytes than there were it is not repaired, with the right
    /// ones it is; after that nothing is wrong any more.
    func repair() throws {
        guard let rot, storage.liesTold == 1, storage.lie == nil else { return }
        try drain()
        try scrubAll()
        var owed = 0
        for name in state.groups.keys.sorted() {
            let wanted = store.wantedBlocks(GroupID(name), limit: .max)
            // A layer at a time: one whose data has to move to be right has another number after it.
            for layer in Dictionary(grouping: wanted, by: \.layer).sorted(by: { $0.key < $1.key }) {
                let parts = layer.value.map { ($0, bytes($0)) }
                guard parts.allSatisfy({ $0.1 != nil }) else {
                    // Hashed at another size of the disk than the one that it came with.
                    owed += 1
                    continue
                }
                try repair(GroupID(name), parts.map { ($0.0, $0.1!) })
            }
        }
        try scrubAll()
        let left = store.statistics().scrub
        // What forks wrote was never at the source.
        if left.badBlockCount > 0 || left.badFileCount > 0 {
            try expect(owed > 0 || !state.forks.isEmpty, "\(left) after the repair of segment \(rot.segment): \(calmly { store.badExtents() })")
            return
        }
        // Nothing is set aside any more by those who stumbled over it.
        result.repairCount += 1
        self.rot = nil
        errorsAllowed = true
        try end(.close)
        guard store != nil else { throw failure("the store cannot be opened after a repair") }
        errorsAllowed = false
        storage.forgive()
        try checkPoints(all: true)
    }

    private func repair(_ group: GroupID, _ parts: [(WantedBlock, [UInt8])]) throws {
        var wrong = parts
        let index = random.below(parts.count)
        wrong[index].1[random.below(wrong[index].1.count)] ^= 1 << UInt8(random.below(8))
        let before = store.wantedBlocks(group, limit: .max).count
        var done: [WantedBlock] = []
        do throws(StoreError) { done = try store.repair(group, [wrong[index]]) } catch {
            throw failure("a repair with other bytes than there were ended with \(error)")
        }
        try expect(done.isEmpty, "\(wrong[index].0) was repaired with other bytes than it had")
        try expect(store.wantedBlocks(group, limit: .max).count == before, "a repair that was refused is taken for done")
        result.repairRefusedCount += 1
        do throws(StoreError) { done = try store.repair(group, parts) } catch { throw failure("repair of \(parts.map(\.0)): \(error)") }
        try expect(Set(done) == Set(parts.map(\.0)), "\(done.count) of \(parts.count) blocks were repaired: \(parts.map(\.0))")
    }

    /// What was there.
    private func bytes(_ wanted: WantedBlock) -> [UInt8]? {
        guard let stamps = received[wanted.checksum] else { return nil }
        var bytes = [UInt8](repeating: 0, count: stamps.count * sectorBytes)
        bytes.withUnsafeMutableBytes { fill($0.baseAddress!, stamps) }
        return bytes.count >= wanted.byteCount ? Array(bytes[..<wanted.byteCount]) : nil
    }
}

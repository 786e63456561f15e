import BlockTap
import Testing

@testable import Replica

/// Plans alone, over random trees of layers.
@Suite struct UpkeepCompactionTests {
    private func layer(_ id: UInt64, parent: UInt64, data: UInt64, file: UInt64, zero: UInt64 = 0, size: UInt64 = 1 << 30) -> LayerRecord {
        LayerRecord(id: id, parent: parent, sizeBytes: size, fileBytes: file, digest: 0, extentCount: 1, dataBytes: data, zeroBytes: zero, segments: [])
    }

    /// A group with points here and there, and forks with layers of their own, some of them on others.
    private func randomState(_ random: inout SeededRandom) -> StoreState {
        var state = StoreState(uuid: StoreUUID(high: 1, low: 1))
        state.apply(.groupCreated(webGroup, volumes: [spec("vda", bytes: 1 << 30)]))
        var id: UInt64 = 0
        func next(_ parent: UInt64) -> LayerRecord {
            id += 1
            let data = UInt64(1 + random.below(random.below(10) == 0 ? 10_000 : 50)) * 4096
            return layer(id, parent: parent, data: data, file: 12_000 + data / 100, size: random.below(40) == 0 ? 5000 : 1 << 30)
        }
        let keepsOneIn = 1 + random.below(40)
        for epoch in 1...(1 + random.below(400)) {
            let added = next(state.groups[webGroup]!.volumes[0].top)
            let isKept = random.below(keepsOneIn) == 0
            let position = DurablePosition(instance: "a", epoch: EpochNumber(UInt64(epoch)), kind: .exact)
            let point = RecoveryPoint(id: RecoveryPointID("rp-\(epoch)"), group: webGroup, epoch: EpochNumber(UInt64(epoch)), instance: "a", cutTimeNanoseconds: 0, consistency: .crash, receivedTimeNanoseconds: 0, dataBytes: 0)
            state.apply(.epochSealed(webGroup, position, volumes: [0], layers: [added], point: isKept ? point : nil))
        }
        for number in 0..<random.below(6) {
            guard let start = state.layers.keys.sorted().randomElement(using: &random) else { break }
            let fork = ForkID("f\(number)")
            state.apply(.forked(ForkRecord(id: fork, group: webGroup, point: RecoveryPointID("x"), purpose: "", createdTimeNanoseconds: 0, volumes: [ForkVolumeRecord(spec: spec("vda", bytes: 1 << 30), parent: start, segment: 0, journal: 0)])))
            for _ in 0..<random.below(60) {
                state.apply(.forkSealed(fork, [ForkSeal(volume: 0, layer: next(state.forks[fork]!.volumes[0].parent), segment: 0, journal: 0)]))
            }
        }
        return state
    }

    @Test(arguments: 1...150)
    func plansFitTheStateEndAndKeepTheBounds(seed: Int) throws {
        var random = SeededRandom(seed: UInt64(seed))
        var state = randomState(&random)
        var limits = Compaction.Limits()
        limits.garbageBytesMin = 1 << 18
        let before = state.layers.count
        let images = state.tops.map { state.chain($0).map(\.dataBytes).count }
        var merges = 0
        while let window = Compaction.plan(state, limits) {
            #expect(window.count > 1)
            // As much as all, when nothing was overwritten: the worst case for what is left to do.
            let id = state.nextFile
            let merged = layer(
                id, parent: window[0].parent, data: window.map(\.dataBytes).max()!, file: window.map(\.fileBytes).max()!, size: window.last!.sizeBytes)
            let record = ManifestRecord.layersMerged(replaced: window.map(\.id), by: merged)
            #expect(state.conflict(record) == nil)
            // A partial last block is never mixed with one of another length.
            for (older, newer) in zip(window, window.dropFirst()) { #expect(older.sizeBytes == newer.sizeBytes || older.sizeBytes % 4096 == 0) }
            state.apply(record)
            merges += 1
            try #require(merges <= before)
        }
        #expect(images.count == state.tops.count)
        let named = Set(state.tops).count
        for top in state.tops {
            let chain = state.chain(top)
            let breaks = zip(chain, chain.dropFirst()).filter { $0.sizeBytes != $1.sizeBytes }.count
            #expect(chain.count <= named + breaks + limits.surplusMax + 6)
        }
        let runs = Compaction.runs(state)
        #expect(runs.reduce(0) { $0 + $1.layers.count } == state.layers.count)
        #expect(runs.reduce(0) { $0 + $1.garbageMax } <= max(limits.garbageBytesMin, state.layers.values.reduce(0) { $0 + $1.dataBytes } / limits.garbageShare))
    }

    /// Equal epochs that nothing names: each byte of index is rewritten a few times only.
    @Test func indexIsRewrittenALogarithmicNumberOfTimes() {
        var state = StoreState(uuid: StoreUUID(high: 1, low: 1))
        state.apply(.groupCreated(webGroup, volumes: [spec("vda", bytes: 1 << 40)]))
        var (written, rewritten) = (UInt64(0), UInt64(0))
        for epoch in 1...5000 as ClosedRange<UInt64> {
            let added = layer(state.nextFile, parent: state.groups[webGroup]!.volumes[0].top, data: 0, file: 100_000)
            written += added.fileBytes
            state.apply(.epochSealed(webGroup, DurablePosition(instance: "a", epoch: EpochNumber(epoch), kind: .fuzzy), volumes: [0], layers: [added], point: nil))
            while let window = Compaction.plan(state, Compaction.Limits()) {
                let merged = layer(state.nextFile, parent: window[0].parent, data: 0, file: window.reduce(0) { $0 + $1.fileBytes })
                rewritten += merged.fileBytes
                state.apply(.layersMerged(replaced: window.map(\.id), by: merged))
            }
            #expect(state.layers.count <= 17)
        }
        #expect(Double(rewritten) / Double(written) < 6)
    }

    @Test func holesAreFoundBetweenBlocks() {
        for seed in 1...200 as ClosedRange<UInt64> {
            var random = SeededRandom(seed: seed)
            let count = random.below(700)
            var map = BlockBitmap(count: count)
            var plain = [Bool](repeating: false, count: count)
            for _ in 0..<random.below(12) where count > 0 {
                let start = random.below(count)
                let end = min(count, start + random.below(random.below(3) == 0 ? 300 : 20))
                map.insert(start..<end)
                for block in start..<end { plain[block] = true }
            }
            var found = [Bool](repeating: true, count: count)
            var last = -1
            for gap in map.gaps() {
                #expect(gap.lowerBound > last && !gap.isEmpty)
                last = gap.upperBound
                for block in gap { found[block] = false }
            }
            #expect(found == plain)
        }
    }

    /// A base with much data, and on top of it what a file system gave up: nothing is overwritten with data, yet most of the base is garbage.
    @Test func dataThatWasDiscardedIsMergedAway() throws {
        func state(zero: UInt64) -> StoreState {
            var state = StoreState(uuid: StoreUUID(high: 1, low: 1))
            state.apply(.groupCreated(webGroup, volumes: [spec("vda", bytes: 1 << 30)]))
            for epoch in 1...2 as ClosedRange<UInt64> {
                let added = epoch == 1 ? layer(1, parent: 0, data: 512 << 20, file: 1 << 20) : layer(2, parent: 1, data: 0, file: 12_000, zero: zero)
                state.apply(.epochSealed(webGroup, DurablePosition(instance: "a", epoch: EpochNumber(epoch), kind: .exact), volumes: [0], layers: [added], point: nil))
            }
            return state
        }
        #expect(Compaction.plan(state(zero: 400 << 20), Compaction.Limits())?.map(\.id) == [1, 2])
        #expect(Compaction.plan(state(zero: 8 << 20), Compaction.Limits()) == nil, "too little to be worth it")
    }
}

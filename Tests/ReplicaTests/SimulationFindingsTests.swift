import BlockTap
import Foundation
import Testing

@testable import Replica
@testable import StoreSimulation

/// What the simulation found, each as the shortest story that shows it.
@Suite struct SimulationFindingsTests {
    /// A stepped store on simulated files, with one group of one disk of 64 blocks.
    private final class Stage {
        let storage = SimulatedStorage(seed: 1)
        var options = StoreOptions()
        var store: ReplicaStore
        let group = GroupID("alpha")
        private var nextEpoch: UInt64 = 1

        init(_ change: (inout StoreOptions) -> Void = { _ in }) throws {
            options.isStepped = true
            options.segmentBytes = 16 * 4096
            options.preallocationBytes = 64 << 10
            options.writeBufferBytes = 4096
            options.writeBufferCount = 4096
            options.writeBytesMin = 4096
            options.newUUID = { StoreUUID(high: 1, low: 1) }
            change(&options)
            store = try ReplicaStore(storage: storage, options: options, logger: quiet)
        }

        func create(blocks: Int = 64) throws { try store.createGroup(group, volumes: [spec("vda", bytes: UInt64(blocks * 4096))]) }

        func begin() throws -> EpochWriter {
            defer { nextEpoch += 1 }
            return try store.begin(nextEpoch, group: group)
        }

        func append(_ writer: EpochWriter, _ block: Int, _ stamp: UInt32, count: Int = 1) throws {
            var bytes = [UInt8](repeating: 0, count: count * 4096)
            bytes.withUnsafeMutableBytes { fill($0.baseAddress!, repeatElement(stamp, count: count * sectorsPerBlock)) }
            try writer.append(volume: 0, offsetBytes: UInt64(block * 4096), bytes)
        }

        @discardableResult
        func seal(_ writer: EpochWriter) throws -> RecoveryPointID {
            nonisolated(unsafe) var outcome: Result<RecoveryPoint?, StoreError>?
            writer.seal(consistency: .crash) { outcome = $0 }
            store.thread.runQueued()
            return try outcome!.get()!.id
        }

        @discardableResult
        func epoch(_ block: Int, _ stamp: UInt32, count: Int = 1) throws -> RecoveryPointID {
            let writer = try begin()
            try append(writer, block, stamp, count: count)
            return try seal(writer)
        }

        /// The stamp of the first sector of each block.
        func blocks(_ point: RecoveryPointID) throws -> [UInt32] {
            let image = try store.image(point, volume: 0, group: group)
            return image.withUnsafeBytes { stamps($0) }.enumerated().filter { $0.offset % sectorsPerBlock == 0 }.map(\.element)
        }

        /// The next sync of the MANIFEST fails, although what was written reaches the disk.
        func doubtTheManifest() {
            storage.onStep = { [storage] what, path in
                storage.faults.ioErrorOneIn = what == "sync" && path.hasPrefix("MANIFEST") ? 1 : 0
            }
        }

        func restart() throws {
            storage.onStep = nil
            storage.faults = .init()
            store.close()
            storage.restart(powerLost: false)
            store = try ReplicaStore(storage: storage, options: options, logger: quiet)
        }

        func rest() throws {
            store.thread.runQueued()
            while try store.upkeepStep() != nil || store.forkUpkeepStep() { store.thread.runQueued() }
            store.thread.runQueued()
        }

        func files(_ directory: String) -> [String] { storage.files.map(\.path).filter { $0.hasPrefix(directory + "/") } }
    }

    @Test func whatARecordOfUnknownFateNamesIsNotWrittenOver() throws {
        let stage = try Stage()
        try stage.create()
        _ = try stage.epoch(0, 1)
        stage.doubtTheManifest()
        #expect(throws: StoreError.self) { try stage.epoch(1, 2) }
        // The source tries again; the store has not been opened again yet.
        #expect(throws: StoreError.self) { try stage.epoch(2, 3) }
        try stage.restart()
        for point in stage.store.recoveryPoints(stage.group) { _ = try stage.blocks(point.id) }
        if stage.store.recoveryPoints(stage.group).count == 2 { #expect(try stage.blocks(stage.store.recoveryPoints(stage.group)[1].id)[..<3] == [1, 2, 0]) }
        stage.store.close()
    }

    @Test func aForkWithASealOfUnknownFateIsNotOpenedBeforeTheStoreIs() throws {
        let stage = try Stage()
        try stage.create()
        let point = try stage.epoch(0, 1)
        try stage.store.fork(ForkID("f"), of: stage.group, at: point, purpose: "")
        var fork = try stage.store.openFork(ForkID("f"), volume: 0)
        try [UInt8](repeating: 7, count: 4096).withUnsafeBytes { try fork.write(offsetBytes: 0, $0) }
        stage.doubtTheManifest()
        #expect(throws: StoreError.self) { try stage.store.sealFork(ForkID("f")) }
        try? fork.close()
        // Whatever it promised now would be gone if the record is on the disk.
        #expect(throws: StoreError.self) { try stage.store.openFork(ForkID("f"), volume: 0) }
        try stage.restart()
        fork = try stage.store.openFork(ForkID("f"), volume: 0)
        _ = try fork.image()
        try fork.close()
        stage.store.close()
    }

    @Test func aForkIsNotCommittedToASmallerDisk() throws {
        let stage = try Stage()
        try stage.create()
        let point = try stage.epoch(40, 1)
        try stage.store.fork(ForkID("f"), of: stage.group, at: point, purpose: "")
        try stage.store.deleteGroup(stage.group)
        try stage.create(blocks: 32)
        #expect(throws: StoreError.self) { try stage.store.commitFork(ForkID("f")) }
        #expect(stage.store.recoveryPoints(stage.group).isEmpty)
        stage.store.close()
    }

    @Test func filesOfDroppedPointsGoWithTheNextUpkeep() throws {
        let stage = try Stage()
        try stage.create()
        let first = try stage.epoch(0, 1, count: 20)
        let second = try stage.epoch(0, 2, count: 20)
        try stage.store.fork(ForkID("f"), of: stage.group, at: first, purpose: "")
        try stage.store.commitFork(ForkID("f"))
        try stage.store.dropFork(ForkID("f"))
        _ = try stage.epoch(0, 3, count: 20)
        let last = try stage.epoch(0, 4, count: 20)
        #expect(!stage.store.recoveryPoints(stage.group).contains { $0.id == second })
        try stage.store.dropRecoveryPoints(stage.group, stage.store.recoveryPoints(stage.group).dropLast().map(\.id))
        try stage.rest()
        #expect(stage.files("layers").count == stage.store.read { $0.layers.count })
        #expect(try stage.blocks(last).filter { $0 != 0 } == [UInt32](repeating: 4, count: 20))
        stage.store.close()
    }

    @Test func aSegmentThatNoLayerUsesInTheEndGoes() throws {
        let stage = try Stage()
        try stage.create()
        let writer = try stage.begin()
        // More than a segment, all of it written again.
        for stamp in 1...4 as ClosedRange<UInt32> { try stage.append(writer, 0, stamp, count: 10) }
        let point = try stage.seal(writer)
        try stage.rest()
        let named = stage.store.read { Set($0.layers.values.flatMap { $0.segments.map(\.segment) }) }
        let held = stage.store.shared.withLock { shared in shared.receivers.values.reduce(into: Set<UInt32>()) { $0.formUnion($1.heldSegments) } }
        #expect(stage.files("segments").count == named.union(held).count)
        #expect(try stage.blocks(point)[..<11] == [4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 0])
        stage.store.close()
    }

    /// Its index came out of a file, which names only layers that something is to be seen of.
    @Test func anOpenForkLetsGoOfMergedLayersThatItShowsNothingOf() throws {
        let stage = try Stage {
            $0.garbageBytesMin = 0
            $0.indexFileCostMin = 1
        }
        try stage.create()
        let first = try stage.epoch(0, 1)
        try stage.epoch(0, 2)
        let last = try stage.epoch(0, 3)
        stage.store.thread.runQueued()
        try stage.restart()
        try stage.store.fork(ForkID("f"), of: stage.group, at: last, purpose: "")
        let fork = try stage.store.openFork(ForkID("f"), volume: 0)
        #expect(fork.map.layers.count == 1)
        try stage.store.dropRecoveryPoints(stage.group, [first])
        try stage.rest()
        #expect(stage.files("layers").count == 2 && stage.store.read { $0.layers.count } == 2)
        #expect(try fork.image().withUnsafeBytes { stamps($0)[0] } == 3)
        try fork.close()
        stage.store.close()
    }

    @Test func aLayerThatFoundNoSpaceIsRemovedByUpkeep() throws {
        let stage = try Stage()
        try stage.create()
        try stage.epoch(0, 1)
        let before = stage.files("layers")
        stage.storage.onStep = { [storage = stage.storage] what, path in storage.faults.isFull = what == "write" && path.hasPrefix("layers/") }
        #expect(throws: StoreError.self) { try stage.epoch(1, 2) }
        stage.storage.onStep = nil
        stage.storage.faults = .init()
        #expect(stage.files("layers").count > before.count)
        try stage.rest()
        #expect(stage.files("layers") == before)
        stage.store.close()
    }

    /// A reader looks at the state, then at the index cache; a merge and a move of data in between must not give it layers that it has not pinned.
    @Test func aReaderPinnedBeforeAMergeSeesOnlyWhatItPinned() throws {
        let stage = try Stage()
        try stage.create()
        for block in 0..<40 { _ = try stage.epoch(block % 8, UInt32(block + 1)) }
        let last = stage.store.recoveryPoints(stage.group).last!.id
        try stage.store.dropRecoveryPoints(stage.group, stage.store.recoveryPoints(stage.group).dropLast().map(\.id))
        let (chain, pin) = stage.store.shared.withLock { shared -> ([LayerRecord], UInt64) in
            let chain = shared.state.chain(shared.state.groups[stage.group]!.volumes[0].top)
            return (chain, shared.add(Pin(chain)))
        }
        try stage.rest()
        #expect(stage.store.read { $0.layers.count } < chain.count)
        _ = try stage.blocks(last)
        let (snapshot, table) = try stage.store.open(stage.group, 0, chain: chain)
        let pinned = Set(chain.map(\.id))
        #expect(snapshot.layers.allSatisfy { pinned.contains($0.layer) })
        for extent in snapshot.index.extents { #expect(table.file(extent.segment) != nil) }
        stage.store.unpin(pin)
        // What was merged by one who still sees the old layers must not be what others get.
        #expect(try stage.blocks(last)[..<9] == [33, 34, 35, 36, 37, 38, 39, 40, 0])
        stage.store.close()
    }

    /// Seed 411587: layers were merged again after an open fork had looked at which to turn to, and before it held them. It turned to layers that
    /// were gone from the state, and kept their files for as long as it was open.
    @Test func aForkThatFollowsAMergeFollowsTheOneThatCameMeanwhile() throws {
        let stage = try Stage { $0.garbageBytesMin = 0 }
        try stage.create()
        var points: [RecoveryPointID] = []
        for number in 0..<5 { points.append(try stage.epoch(number, UInt32(number + 1))) }
        try stage.store.fork(ForkID("f"), of: stage.group, at: points.last!, purpose: "")
        let fork = try stage.store.openFork(ForkID("f"), volume: 0)
        func drop(_ point: RecoveryPointID) throws {
            try stage.store.dropRecoveryPoints(stage.group, [point])
            while try stage.store.upkeepStep() != nil {}
        }
        try drop(points[0])
        #expect(stage.store.read { $0.layers.count } == 4)
        nonisolated(unsafe) var meanwhile: Result<Void, any Error>?
        stage.storage.onStep = { what, path in
            guard meanwhile == nil, what == "open", path.hasPrefix("layers/") else { return }
            meanwhile = .success(())
            meanwhile = Result { try drop(points[1]) }
        }
        while stage.store.forkUpkeepStep() {}
        stage.storage.onStep = nil
        try #require(meanwhile).get()
        try stage.rest()
        #expect(stage.store.read { $0.layers.count } == 3)
        #expect(fork.chain.map(\.id) == stage.store.read { state in state.chain(state.forks[ForkID("f")]!.volumes[0].parent).map(\.id) })
        #expect(stage.files("layers").count == 3)
        #expect(try fork.image().withUnsafeBytes { stamps($0)[0] } == 1)
        try fork.close()
        stage.store.close()
    }

    /// 708751: the model had not yet heard of an epoch sealed while upkeep dropped a point.
    @Test(arguments: [411_587, 708_751] as [UInt64])
    func seedsThatFailed(seed: UInt64) throws { _ = try Simulation.run(seed: seed, steps: 400) }
}

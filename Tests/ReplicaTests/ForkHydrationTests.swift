import BlockTap
import Synchronization
import Testing

@testable import Replica
@testable import StoreSimulation

/// A fork that becomes independent of its recovery points: in use, cut off anywhere, and what it keeps alive afterwards.
@Suite struct ForkHydrationTests {
    private static let blocks = 512

    /// Points of which the third has a fork that is open and written to.
    private struct Scene {
        let upkeep: UpkeepScene
        let fork: ForkVolume
        var model: [UInt8]
        var random = SeededRandom(seed: 9)

        init(storage: any Storage, options: StoreOptions = smallOptions, points: Int = 8) throws {
            upkeep = try UpkeepScene(seed: 4, storage: storage, blockCount: blocks, options: options)
            for _ in 0..<points { try upkeep.receive(extents: 12, blocksMax: 24) }
            try upkeep.store.fork(ForkID("f"), of: webGroup, at: upkeep.store.recoveryPoints(webGroup)[2].id, purpose: "")
            fork = try upkeep.store.openFork(ForkID("f"), volume: 0)
            model = try fork.image()
            try write(count: 10)
        }

        var store: ReplicaStore { upkeep.store }

        mutating func write(count: Int) throws {
            for _ in 0..<count {
                let start = random.below(blocks - 8) * 4096
                let bytes = noise((1 + random.below(8)) * 4096, &random)
                try bytes.withUnsafeBytes { try fork.write(offsetBytes: UInt64(start), $0) }
                model.replaceSubrange(start..<start + bytes.count, with: bytes)
            }
            try fork.flush()
        }

        /// Upkeep until it is done, and the index has followed.
        func hydrate() throws {
            try store.beginHydration(ForkID("f"))
            try upkeep.upkeep()
            try store.forkThread.perform { () throws(StoreError) in }
            #expect(store.hydration(ForkID("f"))?.isDone == true, "\(store.hydration(ForkID("f")) as Any)")
        }

        func end() throws {
            try fork.close()
            store.close()
        }
    }

    @Test func aForkIsIndependentWhileItIsUsed() throws {
        let directory = TemporaryDirectory()
        var scene = try Scene(storage: FileStorage(directory: directory.path))
        #expect(scene.store.isIndependent(ForkID("f")) == false)
        try scene.hydrate()
        #expect(scene.store.isIndependent(ForkID("f")) == true)
        let progress = try #require(scene.store.hydration(ForkID("f")))
        #expect(progress.doneBytes == progress.totalBytes && progress.failure == nil)
        #expect(scene.store.read { $0.chain($0.forks[ForkID("f")]!.volumes[0].parent).count } == 1)
        #expect(try scene.fork.image() == scene.model)
        try scene.upkeep.check("beside a hydrated fork")
        // It goes on as any other.
        try scene.write(count: 10)
        try scene.store.sealFork(ForkID("f"))
        try scene.write(count: 3)
        #expect(try scene.fork.image() == scene.model)
        // All points go, the newest too, and what they had with them.
        try scene.store.dropRecoveryPoints(webGroup, scene.store.recoveryPoints(webGroup).map(\.id))
        try scene.store.deleteGroup(webGroup)
        try scene.upkeep.upkeep()
        try scene.store.forkThread.perform { () throws(StoreError) in }
        #expect(scene.store.read { $0.layers.count } <= 2)
        #expect(try scene.fork.image() == scene.model)
        try scene.fork.close()
        scene.store.close()
        try scene.upkeep.open()
        let again = try scene.store.openFork(ForkID("f"), volume: 0)
        #expect(try again.image() == scene.model)
        try again.close()
        scene.store.close()
        let report = try StoreCheck.run(directory: directory.path, readsData: true)
        #expect(report.isClean, "\(report.damages) \(report.views)")
    }

    /// The seal comes while the new layer is being written, and lies on top of it.
    @Test func aSealInTheMiddleLiesOnTop() throws {
        let directory = TemporaryDirectory()
        let storage = HookedStorage(try FileStorage(directory: directory.path))
        var scene = try Scene(storage: storage)
        try scene.store.sealFork(ForkID("f"))
        try scene.write(count: 5)
        let store = scene.store
        let sealed = Atomic<Bool>(false)
        storage.onStep { step throws(StoreError) in
            guard case .create(let path) = step, path.hasPrefix("layers/"), !sealed.exchange(true, ordering: .relaxed) else { return }
            try store.sealFork(ForkID("f"))
        }
        try scene.hydrate()
        storage.onStep(nil)
        let wasSealed = sealed.load(ordering: .relaxed)
        #expect(wasSealed)
        #expect(scene.store.read { $0.chain($0.forks[ForkID("f")]!.volumes[0].parent).map(\.parent).first } == 0)
        #expect(scene.store.isIndependent(ForkID("f")) == true)
        #expect(try scene.fork.image() == scene.model)
        try scene.write(count: 5)
        #expect(try scene.fork.image() == scene.model)
        try scene.upkeep.check("after a seal in the middle")
        try scene.end()
    }

    /// What is replicated of a fork is what lies between two marks: they stay apart, and stand on the new layer too.
    @Test func marksOfReplicationStay() throws {
        let directory = TemporaryDirectory()
        var scene = try Scene(storage: FileStorage(directory: directory.path))
        let (store, fork) = (scene.store, ForkID("f"))
        func mark(_ name: String, unlessEqual previous: ForkID? = nil) throws -> Bool { try store.mark(ForkID(name), of: fork, purpose: "reverse", unlessEqual: previous) }
        #expect(try mark("m1"))
        let first = scene.model
        let before = try store.openMark(ForkID("m1"), volume: 0, above: nil).reader
        try scene.write(count: 4)
        #expect(try mark("m2"))
        let second = scene.model
        let changed = try store.openMark(ForkID("m2"), volume: 0, above: ForkID("m1")).changed
        try scene.write(count: 2)
        try scene.hydrate()
        #expect(store.isIndependent(fork) == true && store.isIndependent(ForkID("m1")) == true)
        #expect(try store.openMark(ForkID("m2"), volume: 0, above: ForkID("m1")).changed == changed)
        #expect(try scene.fork.image() == scene.model)
        for (name, image) in [("m1", first), ("m2", second)] {
            var bytes = [UInt8](repeating: 0, count: image.count)
            let reader = try store.openMark(ForkID(name), volume: 0, above: nil).reader
            try bytes.withUnsafeMutableBytes { try reader.read(offsetBytes: 0, into: $0) }
            #expect(bytes == image, "\(name)")
        }
        var bytes = [UInt8](repeating: 0, count: first.count)
        try bytes.withUnsafeMutableBytes { try before.read(offsetBytes: 0, into: $0) }
        #expect(bytes == first, "what was open")
        #expect(try mark("m3"))
        #expect(try !mark("m4", unlessEqual: ForkID("m3")))
        try scene.upkeep.check("beside a hydrated fork with marks")
        try scene.end()
    }

    /// Dropped, or not wanted any more, in the middle: nothing is left of it.
    @Test(arguments: [true, false])
    func itEndsInTheMiddle(isDropped: Bool) throws {
        let directory = TemporaryDirectory()
        let storage = HookedStorage(try FileStorage(directory: directory.path))
        let scene = try Scene(storage: storage)
        let store = scene.store
        try scene.fork.close()
        let layers = try storage.list("layers").count
        storage.onStep { step throws(StoreError) in
            guard case .sync(let path) = step, path.hasPrefix("layers/") else { return }
            if isDropped { try? store.dropFork(ForkID("f")) } else { store.endHydration(ForkID("f")) }
        }
        try store.beginHydration(ForkID("f"))
        try scene.upkeep.upkeep()
        storage.onStep(nil)
        #expect(store.hydration(ForkID("f")) == nil)
        if isDropped {
            #expect(throws: StoreError.unknownFork(ForkID("f"))) { try store.beginHydration(ForkID("f")) }
            #expect(try storage.list("layers").count <= layers)
        }
        try scene.upkeep.check("after a hydration that ended in the middle")
        store.close()
    }

    /// Power is lost at each change, one after the other, from the wish to the points' end.
    @Test(arguments: 1...3)
    func afterPowerLossAtAnyChangeForkAndPointsAreExact(seed: UInt64) throws {
        var downAt = Int(seed)
        while true {
            let storage = SimulatedStorage(seed: seed)
            var options = smallOptions
            options.isStepped = true
            options.newUUID = { StoreUUID(high: seed, low: 1) }
            let scene = try UpkeepScene(seed: seed, storage: storage, blockCount: 64, options: options)
            for _ in 0..<5 { try scene.receive(extents: 4, blocksMax: 6) }
            let points = scene.store.recoveryPoints(webGroup).map(\.id)
            try scene.store.fork(ForkID("f"), of: webGroup, at: points[2], purpose: "")
            func whole(_ bytes: [UInt8], _ point: RecoveryPointID) -> Bool {
                (0..<64).allSatisfy { block in
                    var expected = [UInt8](repeating: 0, count: 4096)
                    expected.withUnsafeMutableBytes { scene.bytes(block: block, version: scene.points[point]![block], into: $0) }
                    return bytes[block * 4096..<(block + 1) * 4096].elementsEqual(expected)
                }
            }
            storage.operationsUntilDown = downAt
            do {
                try scene.store.beginHydration(ForkID("f"))
                try scene.upkeep()
                try scene.store.dropRecoveryPoints(webGroup, Array(points.dropLast()))
                try scene.upkeep()
                try scene.store.commitFork(ForkID("f"))
                try scene.upkeep()
            } catch let error as StoreError { #expect(storage.isDown, "\(error)") }
            let wasDown = storage.isDown
            if !wasDown { scene.store.close() }
            scene.store = nil
            storage.restart(powerLost: wasDown)
            storage.isCalm = true
            try scene.open()
            for round in 0..<2 {
                let fork = try scene.store.openFork(ForkID("f"), volume: 0)
                #expect(whole(try fork.image(), points[2]), "seed \(seed), down at \(downAt)")
                try fork.close()
                for id in scene.store.recoveryPoints(webGroup).map(\.id) { #expect(try scene.isExact(id), "seed \(seed), down at \(downAt): \(id)") }
                // Once more from where it was cut off.
                if round == 0 { try scene.store.beginHydration(ForkID("f")) }
                try scene.upkeep()
            }
            #expect(scene.store.isIndependent(ForkID("f")) == true)
            scene.store.close()
            if !wasDown { break }
            downAt += 3
        }
        #expect(downAt > 20)
    }

    /// What is kept alive after the commit: the blocks that the fork shows, against what merging leaves of its parents' chain.
    @Test func aCommitFreesTheRest() throws {
        func dead(hydrates: Bool) throws -> Double {
            let directory = TemporaryDirectory()
            let scene = try Scene(storage: FileStorage(directory: directory.path), points: 40)
            if hydrates { try scene.hydrate() }
            try scene.store.commitFork(ForkID("f"))
            try scene.upkeep.upkeep()
            try scene.store.forkThread.perform { () throws(StoreError) in }
            try scene.upkeep.upkeep()
            let named = scene.store.read { state in state.layers.values.reduce(0) { $0 + $1.dataBytes } }
            var shown: UInt64 = 0
            for start in stride(from: 0, to: scene.model.count, by: 4096) where scene.model[start..<start + 4096].contains(where: { $0 != 0 }) { shown += 4096 }
            #expect(try scene.fork.image() == scene.model)
            try scene.end()
            return Double(named) / Double(shown) - 1
        }
        // Its own writes before the commit lie over some of what it shows.
        #expect(try dead(hydrates: true) < 0.25)
        #expect(try dead(hydrates: false) < 0.35)
    }

    @Test func whatCannotBeOneLayerIsSaid() throws {
        let directory = TemporaryDirectory()
        let store = try openStore(directory)
        try store.createGroup(webGroup, volumes: [spec("vda", bytes: 10_000)])
        func seal(_ epoch: UInt64) throws -> RecoveryPoint {
            let writer = try store.begin(epoch)
            try writer.append(volume: 0, offsetBytes: 4096, [UInt8](repeating: UInt8(epoch), count: 4096))
            return try writer.seal()!
        }
        _ = try seal(1)
        try store.createGroup(webGroup, volumes: [spec("vda", bytes: 20_000)])
        try store.fork(ForkID("f"), of: webGroup, at: try seal(2).id, purpose: "")
        try store.beginHydration(ForkID("f"))
        while try store.upkeepStep() != nil {}
        let failure = try #require(store.hydration(ForkID("f"))?.failure)
        #expect("\(failure)".contains("disk vda of fork f has grown from a size that is no multiple of 4096"))
        #expect(store.isIndependent(ForkID("f")) == false)
        store.close()
    }
}

/// What a copy of a disk in use has to write again.
@Suite struct ForkReadingTests {
    @Test func whatWasWrittenSinceASealIsNamedAndNothingThatStayed() throws {
        let directory = TemporaryDirectory()
        let store = try openStore(directory)
        try store.createGroup(webGroup, volumes: [spec("vda", bytes: 100 * 4096 + 512)])
        let writer = try store.begin(1)
        var random = SeededRandom(seed: 6)
        try writer.append(volume: 0, offsetBytes: 0, noise(60 * 4096, &random))
        try store.fork(ForkID("f"), of: webGroup, at: try writer.seal()!.id, purpose: "")
        let fork = try store.openFork(ForkID("f"), volume: 0)
        let before = try store.openSealed(ForkID("f"))[0]
        func runs(_ now: VolumeReader, since then: VolumeReader, bytesMax: Int = 1 << 20) -> [Range<UInt64>] {
            var runs: [Range<UInt64>] = []
            while let run = now.nextChange(from: runs.last?.upperBound ?? 0, bytesMax: bytesMax, since: then) { runs.append(run) }
            return runs
        }
        func write(_ block: Int, _ count: Int) throws { try noise(count * 4096, &random).withUnsafeBytes { try fork.write(offsetBytes: UInt64(block * 4096), $0) } }
        try write(3, 2)
        try write(80, 1)
        try fork.zero(offsetBytes: 10 * 4096, lengthBytes: 4096)
        try [UInt8](repeating: 1, count: 512).withUnsafeBytes { try fork.write(offsetBytes: 100 * 4096, $0) }
        let after = try store.openSealed(ForkID("f"))[0]
        let bounds = runs(after, since: before).flatMap { [$0.lowerBound, $0.upperBound] }
        let end: UInt64 = 100 * 4096 + 512
        #expect(bounds == [12_288, 20_480, 40_960, 45_056, 327_680, 331_776, 409_600, end])
        #expect(runs(after, since: before, bytesMax: 4096).count == 5)
        #expect(runs(before, since: before).isEmpty)
        // What was sealed stays as it was, and so does what a copy is made of.
        try write(3, 2)
        var old = [UInt8](repeating: 0, count: 4096), new = old
        try old.withUnsafeMutableBytes { try before.read(offsetBytes: 3 * 4096, into: $0) }
        try new.withUnsafeMutableBytes { try after.read(offsetBytes: 3 * 4096, into: $0) }
        #expect(old != new)
        try fork.close()
        // Merged and moved meanwhile: both show what they did, and the difference is no smaller.
        try store.dropRecoveryPoints(webGroup, store.recoveryPoints(webGroup).map(\.id))
        while try store.upkeepStep() != nil {}
        let again = try store.openSealed(ForkID("f"))[0]
        #expect(runs(again, since: before).contains { $0.contains(10 * 4096) })
        store.close()
    }
}

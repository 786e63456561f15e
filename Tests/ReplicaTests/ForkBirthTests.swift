import BlockTap
import Foundation
import Testing

@testable import Replica

/// The way back where it is known in what the original disks can differ: only that is handed out.
@Suite(.timeLimit(.minutes(20))) struct ForkBirthTests {
    /// A failed-over fork that was committed, and original disks that went on by themselves.
    final class Scene {
        let base: ForkSourceTests.Scene
        var store: ReplicaStore { base.store }
        /// What the fork was made of.
        let born: [[UInt8]]
        var disks: [[UInt8]]
        var committed: RecoveryPoint!
        /// Before the fork was hydrated.
        let isBirthMarked: Bool

        init(seed: UInt64) throws {
            base = try ForkSourceTests.Scene(seed: seed)
            born = base.images
            disks = base.images
            isBirthMarked = base.random.below(2) == 0
            if isBirthMarked { try base.store.markBirth(of: base.fork) }
        }

        /// Point in time of the machine's own writes, with whatever upkeep does meanwhile.
        func live(_ count: Int) throws {
            for _ in 0..<count {
                try base.write()
                if base.random.below(6) == 0 { try store.sealFork(base.fork) }
                if base.random.below(6) == 0 { try upkeep() }
            }
        }

        func upkeep() throws { for _ in 0..<8 { if try store.upkeepStep() == nil { break } } }

        func commit() throws {
            // At the latest while the point is there; that the machine has written makes no difference.
            try store.markBirth(of: base.fork)
            try store.commitFork(base.fork)
            committed = try store.sealNothing(
                webGroup, generation: store.group(webGroup)!.generation, cut: Cut(epoch: EpochNumber(1), kind: .exact, timeNanoseconds: 5, blockCount: 0), instance: "committed-1")!
        }

        /// The original's own blocks; returns them.
        func diverge(_ count: Int) -> [(disk: Int, block: Int)] {
            var blocks: [(disk: Int, block: Int)] = []
            for _ in 0..<count {
                let disk = base.random.below(disks.count)
                let block = base.random.below((disks[disk].count + 4095) / 4096)
                let range = block * 4096..<min((block + 1) * 4096, disks[disk].count)
                disks[disk].replaceSubrange(range, with: base.random.below(3) == 0 ? [UInt8](repeating: 0, count: range.count) : noise(range.count, &base.random))
                blocks.append((disk, block))
            }
            return blocks
        }

        /// These blocks of the original become the group's newest state, in an epoch with a recovery point.
        func keep(_ blocks: [(disk: Int, block: Int)], epoch: UInt64) throws -> RecoveryPoint {
            let writer = try store.begin(epoch, instance: "a")
            for (disk, block) in blocks {
                let range = block * 4096..<min((block + 1) * 4096, disks[disk].count)
                try writer.append(volume: disk, offsetBytes: UInt64(range.lowerBound), Array(disks[disk][range]))
            }
            return try writer.seal()!
        }

        var allBlocks: [(disk: Int, block: Int)] { disks.indices.flatMap { disk in (0..<(disks[disk].count + 4095) / 4096).map { (disk, $0) } } }
        func differing(_ a: [[UInt8]], _ b: [[UInt8]]) -> [(disk: Int, block: Int)] {
            allBlocks.filter { disk, block in
                let range = block * 4096..<min((block + 1) * 4096, disks[disk].count)
                return a[disk][range] != b[disk][range]
            }
        }

        func source(_ kept: RecoveryPoint) throws -> ForkSource {
            try ForkSource(store: store, fork: base.fork, instance: "r", original: .init(committed: committed.id, kept: kept), logger: quiet)
        }

        func end() throws {
            try base.close()
            store.close()
        }
    }

    /// Onto disks that hold the original until the fork has been handed out whole.
    static func sync(_ source: ForkSource, _ target: inout [[UInt8]]) async throws -> UInt64 {
        source.beginFullSync()
        var blocks: UInt64 = 0
        while true {
            let cut = try await source.cut(fuzzyBytesMax: 32 * 4096)
            #expect(try await ForkSourceTests.take(source, cut.epoch, onto: &target) != nil)
            source.acknowledge(cut.epoch)
            if cut.kind == .exact { return blocks }
            blocks += cut.blockCount
        }
    }

    @Test(arguments: Array(1...24) as [UInt64])
    func theForkArrivesWholeThoughOnlyWhatMayDifferIsHandedOut(seed: UInt64) async throws {
        let scene = try Scene(seed: seed)
        let context = Comment(rawValue: "seed \(seed)")
        try scene.live(scene.base.random.below(12))
        if seed % 3 == 0 { try scene.store.beginHydration(scene.base.fork) }
        try scene.upkeep()
        try scene.commit()
        let committed = scene.base.images
        if seed % 4 == 0 { try scene.base.restart() }
        try scene.live(scene.base.random.below(12))
        // What the original wrote since; either known block by block, or found by comparing with what was committed.
        let own = scene.diverge(scene.base.random.below(10))
        let kept: RecoveryPoint
        if seed % 2 == 0 {
            let position = DurablePosition(instance: "a", epoch: EpochNumber(1), kind: .exact)
            let back = try #require(
                try scene.store.turnBack(
                    webGroup, generation: scene.store.group(webGroup)!.generation, toBirthOf: scene.base.fork, as: position, cutTimeNanoseconds: 7))
            for disk in scene.born.indices { #expect(try scene.store.image(back.id, volume: disk) == scene.born[disk], context) }
            #expect(scene.store.group(webGroup)!.lastDurable == position)
            kept = try scene.keep(own, epoch: 2)
        } else {
            kept = try scene.keep(scene.differing(committed, scene.disks), epoch: 2)
        }
        for disk in scene.disks.indices { #expect(try scene.store.image(kept.id, volume: disk) == scene.disks[disk], context) }
        // An epoch with nothing in it, whose acknowledgement is lost or not.
        if seed % 5 == 0 { _ = try scene.keep([], epoch: 3) }
        let kept2 = DurablePosition(instance: "a", epoch: EpochNumber(seed % 10 == 0 ? 3 : 2), kind: .exact)
        try scene.live(scene.base.random.below(6))

        // One that was hydrated before its birth was marked does not know any more what it wrote.
        let isKnown = seed % 3 != 0 || scene.isBirthMarked
        var target = scene.disks
        var source = try scene.source(kept)
        #expect(source.peerWas(kept2) == isKnown, context)
        if seed % 7 == 0 {
            // Cut off in the middle, after which it goes on with more written, and another process of the appliance.
            source.beginFullSync()
            let cut = try await source.cut(fuzzyBytesMax: 8 * 4096)
            _ = try await ForkSourceTests.take(source, cut.epoch, onto: &target, limit: 2)
            await source.abandonAll()
            source.close()
            try scene.base.restart()
            try scene.live(6)
            source = try scene.source(kept)
            #expect(source.peerWas(kept2) == isKnown, context)
        }
        try scene.upkeep()
        let differing = scene.differing(scene.disks, scene.base.images).count
        let blocks = try await Self.sync(source, &target)
        #expect(target == scene.base.images, context)
        // Every block that was written since the fork was made, or by the original: some more than differ now.
        #expect(blocks >= UInt64(differing), context)
        #expect(isKnown == (blocks < UInt64(scene.allBlocks.count)), context)
        source.close()
        try scene.end()
    }

    @Test func disksThatAreNotKnownToHoldTheOriginalAreComparedAsAWhole() async throws {
        let scene = try Scene(seed: 100)
        try scene.live(4)
        try scene.commit()
        _ = scene.diverge(3)
        let kept = try scene.keep(scene.differing(scene.base.images, scene.disks), epoch: 2)
        let whole = UInt64(scene.allBlocks.count)
        func blocks(_ position: DurablePosition?) async throws -> UInt64 {
            let source = try scene.source(kept)
            defer { source.close() }
            let isKnown = source.peerWas(position)
            var target = scene.disks
            let blocks = try await Self.sync(source, &target)
            #expect(target == scene.base.images && isKnown == (blocks < whole))
            try ForkSource.forget(scene.base.fork, in: scene.store)
            return blocks
        }
        func at(_ instance: String, _ epoch: UInt64) -> DurablePosition { DurablePosition(instance: instance, epoch: EpochNumber(epoch), kind: .exact) }
        #expect(try await blocks(at("a", 2)) < whole)
        #expect(try await blocks(nil) == whole)
        #expect(try await blocks(at("b", 2)) == whole)
        #expect(try await blocks(at("a", 1)) == whole)
        #expect(try await blocks(at("a", 3)) == whole, "it was told of an epoch that is not here")
        // The point of what was committed is gone: nobody knows in what it differed.
        try scene.store.dropRecoveryPoints(webGroup, [scene.committed.id])
        #expect(try await blocks(at("a", 2)) == whole)
        try scene.end()
    }

    @Test func itsBirthIsNotKnown() async throws {
        let scene = try Scene(seed: 101)
        try scene.store.forgetBirth(of: scene.base.fork)
        try scene.live(3)
        try scene.store.commitFork(scene.base.fork)
        // The point that it was made of is gone: it is too late.
        try scene.store.markBirth(of: scene.base.fork)
        #expect(!scene.store.hasBirth(scene.base.fork))
        let generation = scene.store.group(webGroup)!.generation
        let position = DurablePosition(instance: "a", epoch: EpochNumber(1), kind: .exact)
        #expect(try scene.store.turnBack(webGroup, generation: generation, toBirthOf: scene.base.fork, as: position, cutTimeNanoseconds: 7) == nil)
        #expect(scene.store.group(webGroup)!.lastDurable == nil, "nothing was done")
        try scene.end()
    }

    @Test func nothingDiffers() async throws {
        let scene = try Scene(seed: 102)
        try scene.commit()
        let kept = try scene.keep([], epoch: 2)
        let source = try scene.source(kept)
        #expect(source.peerWas(DurablePosition(instance: "a", epoch: EpochNumber(2), kind: .exact)))
        var target = scene.disks
        #expect(try await Self.sync(source, &target) == 0)
        try scene.live(3)
        let cut = try await source.cut(fuzzyBytesMax: 1 << 20)
        #expect(cut.kind == .exact)
        #expect(try await ForkSourceTests.take(source, cut.epoch, onto: &target) != nil)
        #expect(target == scene.base.images)
        source.close()
        try scene.end()
    }
}

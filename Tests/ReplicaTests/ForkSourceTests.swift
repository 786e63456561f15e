import BlockTap
import Foundation
import Testing

@testable import Replica

/// What a fork hands out as a source, applied to plain arrays.
@Suite(.timeLimit(.minutes(20))) struct ForkSourceTests {
    static let specs = [spec("vda", bytes: 300 * 4096 + 512), spec("vdb", bytes: 64 * 4096)]

    /// A fork of a group with something in it, and what it holds.
    final class Scene {
        let directory = TemporaryDirectory()
        var store: ReplicaStore
        let fork = ForkID("failover-1")
        var images: [[UInt8]]
        var volumes: [ForkVolume] = []
        var random: SeededRandom

        init(seed: UInt64) throws {
            random = SeededRandom(seed: seed)
            store = try openStore(directory)
            try store.createGroup(webGroup, volumes: ForkSourceTests.specs)
            images = ForkSourceTests.specs.map { [UInt8](repeating: 0, count: Int($0.geometry.sizeBytes)) }
            let writer = try store.begin(1)
            for disk in images.indices {
                let bytes = noise(40 * 4096, &random)
                try writer.append(volume: disk, offsetBytes: 8 * 4096, bytes)
                images[disk].replaceSubrange(8 * 4096..<48 * 4096, with: bytes)
            }
            let point = try writer.seal()!
            try store.fork(fork, of: webGroup, at: point.id, purpose: "failover")
            try open()
        }

        func open() throws { volumes = try images.indices.map { try store.openFork(fork, volume: $0) } }

        func close() throws {
            for volume in volumes { try volume.close() }
            volumes = []
        }

        func restart() throws {
            try close()
            store.close()
            store = try openStore(directory)
            try open()
        }

        func write() throws {
            let disk = random.below(images.count)
            let start = random.below(images[disk].count / 512) * 512
            let count = min(images[disk].count - start, (1 + random.below(40)) * 512)
            if random.below(4) == 0 {
                try volumes[disk].zero(offsetBytes: UInt64(start), lengthBytes: UInt64(count))
                images[disk].replaceSubrange(start..<start + count, with: repeatElement(0, count: count))
            } else {
                let bytes = noise(count, &random)
                try bytes.withUnsafeBytes { try volumes[disk].write(offsetBytes: UInt64(start), $0) }
                images[disk].replaceSubrange(start..<start + count, with: bytes)
            }
        }
    }

    /// All items of the epoch that was cut, onto `target`; returns the bytes of data. `limit`: stops in the middle.
    static func take(_ source: ForkSource, _ epoch: EpochNumber, onto target: inout [[UInt8]], limit: Int = .max) async throws -> Int? {
        var bytes = 0, items = 0
        while items < limit {
            guard let item = source.nextItem() else {
                await Task.yield()
                continue
            }
            items += 1
            switch item {
            case .data(let number, let buffer):
                #expect(number == epoch)
                let place = Int(buffer.offsetBytes)
                target[buffer.disk].replaceSubrange(place..<place + buffer.lengthBytes, with: UnsafeRawBufferPointer(start: buffer.memory, count: buffer.lengthBytes))
                bytes += buffer.lengthBytes
                source.release(buffer)
            case .zero(let number, let disk, let offset, let length):
                #expect(number == epoch)
                target[disk].replaceSubrange(Int(offset)..<Int(offset + length), with: repeatElement(0, count: Int(length)))
            case .end(let number):
                #expect(number == epoch)
                return bytes
            case .abandoned(_, let why):
                Issue.record("abandoned: \(why)")
                return nil
            }
        }
        return nil
    }

    @Test(arguments: [1, 2, 3, 4, 5, 6, 7, 8] as [UInt64])
    func whatItHandsOutIsTheForkAtEachCutThroughAbandonsSealsMergesAndRestarts(seed: UInt64) async throws {
        let scene = try Scene(seed: seed)
        var source = try ForkSource(store: scene.store, fork: scene.fork, instance: "r", logger: quiet)
        #expect(source.resumption == nil)
        var target = scene.images.map { [UInt8](repeating: 0xAA, count: $0.count) }
        source.beginFullSync()
        var exact = 0
        for step in 0..<160 {
            let context = Comment(rawValue: "seed \(seed), step \(step)")
            for _ in 0..<scene.random.below(6) { try scene.write() }
            if scene.random.below(8) == 0 { try scene.store.sealFork(scene.fork) }
            if scene.random.below(20) == 0 { for _ in 0..<8 { if try scene.store.upkeepStep() == nil { break } } }
            if scene.random.below(25) == 0 {
                source.close()
                try scene.restart()
                source = try ForkSource(store: scene.store, fork: scene.fork, instance: "r", logger: quiet)
                if source.resumption == nil { source.beginFullSync() }
            }
            let isFullSync = source.needsFuzzyCut
            let cut = try await source.cut(fuzzyBytesMax: 64 * 4096)
            #expect((cut.kind == .fuzzy) == isFullSync, context)
            let snapshot = scene.images
            try scene.write()
            if scene.random.below(6) == 0 {
                _ = try await Self.take(source, cut.epoch, onto: &target, limit: scene.random.below(3))
                await source.abandonAll()
                continue
            }
            let bytes = try await Self.take(source, cut.epoch, onto: &target)
            #expect(try #require(bytes) <= Int(cut.blockCount) * 4096, context)
            if scene.random.below(8) == 0 {
                await source.abandonAll()
                continue
            }
            source.acknowledge(cut.epoch)
            if cut.kind == .exact {
                exact += 1
                #expect(target == snapshot, context)
            }
        }
        #expect(exact > 10)
        // Nothing written, nothing sent, no mark left behind.
        for _ in 0..<3 {
            let cut = try await source.cut(fuzzyBytesMax: 1 << 30)
            #expect(try await Self.take(source, cut.epoch, onto: &target) != nil)
            source.acknowledge(cut.epoch)
        }
        let last = try await source.cut(fuzzyBytesMax: 1 << 30)
        #expect(last.blockCount == 0 && last.kind == .exact)
        #expect(try await Self.take(source, last.epoch, onto: &target) == 0)
        source.acknowledge(last.epoch)
        await source.abandonAll()
        #expect(target == scene.images)
        #expect(ForkSource.marks(of: scene.fork, in: scene.store).count == 1)
        source.close()
        try ForkSource.forget(scene.fork, in: scene.store)
        #expect(scene.store.forks().map(\.id) == [scene.fork])
        try scene.close()
        scene.store.close()
    }

    @Test func aRestartGoesOnFromWhatWasAcknowledgedAndSendsOnlyWhatWasWrittenSince() async throws {
        let scene = try Scene(seed: 9)
        var source = try ForkSource(store: scene.store, fork: scene.fork, instance: "r", logger: quiet)
        var target = scene.images.map { [UInt8](repeating: 0, count: $0.count) }
        source.beginFullSync()
        while source.needsFuzzyCut {
            let cut = try await source.cut(fuzzyBytesMax: 1 << 30)
            #expect(try await Self.take(source, cut.epoch, onto: &target) != nil)
            source.acknowledge(cut.epoch)
        }
        await source.abandonAll()
        source.close()
        try scene.restart()
        try [UInt8](repeating: 7, count: 4096).withUnsafeBytes { try scene.volumes[0].write(offsetBytes: 40960, $0) }
        scene.images[0].replaceSubrange(40960..<45056, with: repeatElement(7, count: 4096))
        source = try ForkSource(store: scene.store, fork: scene.fork, instance: "r", logger: quiet)
        let resumption = try #require(source.resumption)
        #expect(resumption.lastCut > resumption.acknowledged)
        let cut = try await source.cut(fuzzyBytesMax: 1 << 30)
        #expect(cut.epoch > resumption.lastCut && cut.blockCount == 1)
        #expect(try await Self.take(source, cut.epoch, onto: &target) == 4096)
        #expect(target == scene.images)
        source.close()
        try scene.close()
        scene.store.close()
    }

    @Test func aForkThatIsGoneAndOneThatIsNowhereElseYetAreSaidSo() async throws {
        let scene = try Scene(seed: 10)
        #expect(throws: StoreError.unknownFork(ForkID("none"))) { _ = try ForkSource(store: scene.store, fork: ForkID("none"), instance: "r", logger: quiet) }
        let source = try ForkSource(store: scene.store, fork: scene.fork, instance: "r", logger: quiet)
        await #expect(throws: StoreError.self) { _ = try await source.cut(fuzzyBytesMax: 1 << 20) }
        source.close()
        await #expect(throws: EpochError.closed) { _ = try await source.cut(fuzzyBytesMax: 1 << 20) }
        try scene.close()
        scene.store.close()
    }
}

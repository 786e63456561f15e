import BlockTap
import Foundation
import Synchronization
import Testing

@testable import Replica

@Suite struct StoreLifecycleTests {
    let directory = TemporaryDirectory()
    let size = 64 * 4096

    func makeStore(_ options: StoreOptions = smallOptions) throws -> ReplicaStore {
        let store = try openStore(directory, options)
        try store.createGroup(webGroup, volumes: [spec("vda", bytes: UInt64(size))])
        return store
    }

    /// Fills the whole disk with one byte.
    func receive(_ store: ReplicaStore, _ epoch: UInt64, _ byte: UInt8, _ kind: EpochKind = .exact) throws -> RecoveryPoint? {
        let writer = try store.begin(epoch, kind)
        try writer.append(volume: 0, offsetBytes: 0, [UInt8](repeating: byte, count: size))
        return try writer.seal()
    }

    func expect(_ error: StoreError, _ body: () throws -> Void) {
        #expect(throws: error) { try body() }
    }

    @Test func groupsAreMadeOnceMayGrowAndNeverShrink() throws {
        let store = try makeStore()
        try store.createGroup(webGroup, volumes: [spec("vda", bytes: UInt64(size))])
        expect(.shrunk(volume: "vda", nowBytes: 4096, wasBytes: UInt64(size))) { try store.createGroup(webGroup, volumes: [spec("vda", bytes: 4096)]) }
        #expect("\(StoreError.shrunk(volume: "vda", nowBytes: 4 << 20, wasBytes: 8 << 20))".hasPrefix("disk vda is 4 MiB now, was 8 MiB"))
        let point = try receive(store, 1, 7)!
        try store.createGroup(webGroup, volumes: [spec("vda", bytes: UInt64(size) + 512), spec("vdb", bytes: 4096)])
        let later = try store.begin(2).seal()!
        #expect(try store.image(point.id, volume: 0) == [UInt8](repeating: 7, count: size))
        #expect(try store.image(later.id, volume: 0) == [UInt8](repeating: 7, count: size) + [UInt8](repeating: 0, count: 512))
        #expect(try store.image(later.id, volume: 1) == [UInt8](repeating: 0, count: 4096))
        #expect(throws: StoreError.self) { try store.image(point.id, volume: 1) }
        #expect(throws: StoreError.self) { try store.createGroup(webGroup, volumes: [spec("sda", bytes: 1 << 30)]) }
        #expect(throws: StoreError.self) { try store.createGroup(GroupID("../x"), volumes: [spec("vda", bytes: 4096)]) }
        store.close()
    }

    @Test func aVolumeThatGrowsKeepsItsPartialLastBlock() throws {
        let store = try openStore(directory)
        try store.createGroup(webGroup, volumes: [spec("vda", bytes: 4096 + 1024)])
        var writer = try store.begin(1)
        try writer.append(volume: 0, offsetBytes: 4096, [UInt8](repeating: 9, count: 1024))
        _ = try writer.seal()
        try store.createGroup(webGroup, volumes: [spec("vda", bytes: 3 * 4096)])
        writer = try store.begin(2)
        let point = try writer.seal()!
        let expected = [UInt8](repeating: 0, count: 4096) + [UInt8](repeating: 9, count: 1024) + [UInt8](repeating: 0, count: 3072 + 4096)
        #expect(try store.image(point.id, volume: 0) == expected)
        try store.fork(ForkID("f"), of: webGroup, at: point.id, purpose: "")
        let fork = try store.openFork(ForkID("f"), volume: 0)
        #expect(try fork.image() == expected)
        try fork.close()
        store.close()
    }

    @Test func anOlderGenerationIsFencedEvenInTheMiddleOfAnEpoch() throws {
        var store = try makeStore()
        let writer = try store.begin(1)
        #expect(try store.raiseGeneration(webGroup) == Generation(2))
        expect(.fenced(webGroup, current: Generation(2))) { _ = try writer.seal() }
        expect(.fenced(webGroup, current: Generation(2))) {
            _ = try store.beginEpoch(webGroup, generation: Generation(1), cut: Cut(epoch: EpochNumber(2), kind: .exact, timeNanoseconds: 0, blockCount: 0), instance: "a", after: nil)
        }
        store.close()
        store = try openStore(directory)
        #expect(store.group(webGroup)?.generation == Generation(2))
        #expect(try receive(store, 1, 1) != nil)
        store.close()
    }

    @Test func epochsThatAreDurableAreNotTakenTwice() throws {
        let store = try makeStore()
        _ = try receive(store, 5, 1)
        #expect(throws: StoreError.self) { try store.begin(5) }
        _ = try store.begin(1, instance: "b").seal()
        #expect(store.group(webGroup)?.lastDurable == DurablePosition(instance: "b", epoch: EpochNumber(1), kind: .exact))
        store.close()
    }

    @Test func anEpochMayBeReceivedWhileTheOneBeforeIsBeingSealed() throws {
        let store = try makeStore()
        let sealed = Mutex<[String]>([])
        let done = Replica.Semaphore()
        for epoch in 1...50 as ClosedRange<UInt64> {
            let writer = try store.begin(epoch)
            try writer.append(volume: 0, offsetBytes: 4096 * (epoch % 64), [UInt8](repeating: UInt8(epoch), count: 4096))
            writer.seal(consistency: .crash) { result in
                sealed.withLock { $0.append((try? result.get())?.id.rawValue ?? "failed") }
                done.signal()
            }
        }
        for _ in 1...50 { done.wait() }
        #expect(sealed.withLock { $0 } == store.recoveryPoints(webGroup).map(\.id.rawValue))
        #expect(store.recoveryPoints(webGroup).count == 50)
        var expected = [UInt8](repeating: 0, count: size)
        for epoch in 1...50 { expected.replaceSubrange(4096 * epoch..<4096 * (epoch + 1), with: repeatElement(UInt8(epoch), count: 4096)) }
        #expect(try store.image(store.recoveryPoints(webGroup).last!.id, volume: 0) == expected)
        store.close()
    }

    @Test func everyAppendedByteIsGivenBackAsCreditWhateverBecomesOfTheEpoch() throws {
        let store = try makeStore()
        let written = Mutex(0)
        var appended = 0
        var random = SeededRandom(seed: 5)
        for epoch in 1...30 as ClosedRange<UInt64> {
            let writer = try store.begin(epoch)
            writer.onWritten = { count in written.withLock { $0 += count } }
            for _ in 0..<random.below(12) {
                let count = 4096 * (1 + random.below(12))
                try writer.append(volume: 0, offsetBytes: 0, [UInt8](repeating: 1, count: count))
                appended += count
            }
            if epoch % 3 == 0 { writer.abandon() } else { _ = try writer.seal() }
        }
        store.close()
        #expect(written.withLock { $0 } == appended)
    }

    @Test func anAbandonedEpochLeavesNoTraceAndGivesItsSpaceBack() throws {
        let store = try makeStore()
        let point = try receive(store, 1, 1)!
        let before = try directory.files()
        let writer = try store.begin(2)
        for _ in 0..<8 { try writer.append(volume: 0, offsetBytes: 0, [UInt8](repeating: 2, count: size)) }
        writer.abandon()
        #expect(throws: StoreError.self) { try writer.append(volume: 0, offsetBytes: 0, [UInt8](repeating: 2, count: size)) }
        expect(.abandoned("by its sender")) { _ = try writer.seal() }
        try store.thread.perform {}
        #expect(try directory.files() == before)
        // A newer one takes the place of one still being received.
        let left = try store.begin(3)
        try left.append(volume: 0, offsetBytes: 0, [UInt8](repeating: 3, count: size))
        let newer = try receive(store, 4, 4)!
        expect(.abandoned("a newer epoch of the group began")) { _ = try left.seal() }
        #expect(try store.image(point.id, volume: 0) == [UInt8](repeating: 1, count: size))
        #expect(try store.image(newer.id, volume: 0) == [UInt8](repeating: 4, count: size))
        #expect(store.statistics().abandonedEpochCount == 2)
        store.close()
    }

    @Test func pointsOfALongChainOpenExactlyFromTheCacheAndFromTheFiles() throws {
        var store = try makeStore()
        var random = SeededRandom(seed: 6)
        var model = [UInt8](repeating: 0, count: size)
        var images: [(RecoveryPointID, [UInt8])] = []
        for epoch in 1...300 as ClosedRange<UInt64> {
            let writer = try store.begin(epoch)
            let start = random.below(64) * 4096
            let bytes = noise(min(size - start, 4096 * (1 + random.below(4))), &random)
            try writer.append(volume: 0, offsetBytes: UInt64(start), bytes)
            model.replaceSubrange(start..<start + bytes.count, with: bytes)
            images.append((try writer.seal()!.id, model))
        }
        for (id, image) in images { #expect(try store.image(id, volume: 0) == image) }
        store.close()
        store = try openStore(directory)
        for (id, image) in images.reversed() where random.below(10) == 0 { #expect(try store.image(id, volume: 0) == image) }
        store.close()
    }

    @Test func whatIsReadOutlivesItsGroupAndIsRemovedAfterwards() throws {
        let store = try makeStore()
        let point = try receive(store, 1, 1)!
        try store.fork(ForkID("keep"), of: webGroup, at: point.id, purpose: "failover")
        _ = try receive(store, 2, 2)
        var reader: VolumeReader? = try store.openRecoveryPoint(webGroup, store.recoveryPoints(webGroup).last!.id, volume: 0)
        try store.deleteGroup(webGroup)
        #expect(store.groups().isEmpty)
        expect(.unknownRecoveryPoint(webGroup, point.id)) {
            try store.createGroup(webGroup, volumes: [spec("vda", bytes: UInt64(size))])
            _ = try store.openRecoveryPoint(webGroup, point.id, volume: 0)
        }
        var bytes = [UInt8](repeating: 0, count: size)
        try bytes.withUnsafeMutableBytes { try reader!.read(offsetBytes: 0, into: $0) }
        #expect(bytes == [UInt8](repeating: 2, count: size))
        #expect(try directory.files().filter { $0.hasPrefix("layers/") }.count == 2)
        reader = nil
        try store.thread.perform {}
        #expect(try directory.files().filter { $0.hasPrefix("layers/") }.count == 1)
        let fork = try store.openFork(ForkID("keep"), volume: 0)
        #expect(try fork.image() == [UInt8](repeating: 1, count: size))
        try store.dropFork(ForkID("keep"))
        #expect(try fork.image() == [UInt8](repeating: 1, count: size))
        try fork.close()
        try store.thread.perform {}
        #expect(try directory.files().filter { $0.contains("/") } == [])
        store.close()
    }

    @Test func forksAreMadeOnceAndHaveOneWriter() throws {
        var store = try makeStore()
        let point = try receive(store, 1, 1)!
        let id = ForkID("f")
        try store.fork(id, of: webGroup, at: point.id, purpose: "drill")
        try store.fork(id, of: webGroup, at: point.id, purpose: "drill")
        let later = try receive(store, 2, 2)!
        #expect(throws: StoreError.self) { try store.fork(id, of: webGroup, at: later.id, purpose: "drill") }
        expect(.unknownRecoveryPoint(webGroup, RecoveryPointID("rp-99"))) { try store.fork(ForkID("g"), of: webGroup, at: RecoveryPointID("rp-99"), purpose: "") }
        expect(.unknownFork(ForkID("g"))) { _ = try store.openFork(ForkID("g"), volume: 0) }
        let fork = try store.openFork(id, volume: 0)
        expect(.busy("disk vda of fork f is open already: one writer at a time")) { _ = try store.openFork(id, volume: 0) }
        try [UInt8](repeating: 8, count: 512).withUnsafeBytes { try fork.write(offsetBytes: 512, $0) }
        try fork.close()
        store.close()
        store = try openStore(directory)
        #expect(store.forks().map(\.id) == [id] && store.forks()[0].recoveryPoint == point.id && store.forks()[0].ownBytes > 4096)
        let again = try store.openFork(id, volume: 0)
        #expect(try again.image() == [UInt8](repeating: 1, count: 512) + [UInt8](repeating: 8, count: 512) + [UInt8](repeating: 1, count: size - 1024))
        try again.close()
        store.close()
    }

    @Test func callsThatBreakTheRulesAreRefused() throws {
        let store = try makeStore()
        let writer = try store.begin(1)
        let block = [UInt8](repeating: 1, count: 4096)
        #expect(throws: StoreError.self) { try writer.append(volume: 1, offsetBytes: 0, block) }
        #expect(throws: StoreError.self) { try writer.append(volume: 0, offsetBytes: 512, block) }
        #expect(throws: StoreError.self) { try writer.append(volume: 0, offsetBytes: UInt64(size), block) }
        #expect(throws: StoreError.self) { try writer.append(volume: 0, offsetBytes: 0, [UInt8](repeating: 1, count: 100)) }
        #expect(throws: StoreError.self) { try writer.zero(volume: 0, offsetBytes: 4096, lengthBytes: UInt64.max) }
        try writer.append(volume: 0, offsetBytes: 0, block)
        let point = try writer.seal()!
        let reader = try store.openRecoveryPoint(webGroup, point.id, volume: 0)
        var small = [UInt8](repeating: 0, count: 10)
        #expect(throws: StoreError.self) { try small.withUnsafeMutableBytes { try reader.read(offsetBytes: UInt64(size) - 9, into: $0) } }
        expect(.unknownGroup(GroupID("none"))) { _ = try store.raiseGeneration(GroupID("none")) }
        store.close()
        expect(.closed) { try store.createGroup(webGroup, volumes: [spec("vda", bytes: 1 << 30)]) }
    }
}

import BlockTap
import Glibc
import Synchronization
import Testing

@testable import Replica

/// The way of epochs into the store: what they go on top of, and how their data gets to the disk.
@Suite struct StoreApplyTests {
    let directory = TemporaryDirectory()
    let size = 64 * 4096

    /// Were the third taken, the replica would miss the second's blocks for ever.
    @Test func anEpochOnTopOfOneThatFailedIsRefused() throws {
        let storage = try FaultyStorage(directory: directory.path)
        let store = try ReplicaStore(storage: storage, options: smallOptions, logger: quiet)
        try store.createGroup(webGroup, volumes: [spec("vda", bytes: UInt64(size))])
        var random = SeededRandom(seed: 70)
        let first = try store.begin(1, after: nil)
        try first.append(volume: 0, offsetBytes: 0, noise(8 * 4096, &random))
        _ = try first.seal()

        let second = try store.begin(2, after: first.positionWhenSealed)
        try second.append(volume: 0, offsetBytes: 0, noise(4096, &random))
        storage.arm(after: 1, .full(what: "no space"), isSticky: true)
        #expect(throws: StoreError.full(what: "no space")) { try second.seal() }
        storage.disarm()

        for wrong in [second.positionWhenSealed, nil] {
            do {
                _ = try store.begin(3, after: wrong)
                Issue.record("taken on top of \(String(describing: wrong))")
            } catch StoreError.abandoned {}
        }
        let again = try store.begin(3, after: first.positionWhenSealed)
        #expect(try again.seal() != nil)
        #expect(store.group(webGroup)?.lastDurable == again.positionWhenSealed)
        store.close()
    }

    /// What is being sealed counts as what it will be; an older position does not any more.
    @Test func anEpochGoesOnTopOfTheOneBeingSealed() throws {
        let store = try openStore(directory)
        try store.createGroup(webGroup, volumes: [spec("vda", bytes: UInt64(size))])
        let (held, reached) = (Replica.Semaphore(), Replica.Semaphore())
        store.thread.enqueue {
            reached.signal()
            held.wait()
        }
        reached.wait()
        let answered = Replica.Semaphore()
        let first = try store.begin(1, after: nil)
        first.seal(consistency: .crash) { _ in answered.signal() }
        #expect(throws: StoreError.self) { try store.begin(2, after: nil) }
        let second = try store.begin(2, after: first.positionWhenSealed)
        held.signal()
        #expect(try second.seal() != nil)
        answered.wait()
        #expect(store.recoveryPoints(webGroup).map(\.epoch) == [EpochNumber(1), EpochNumber(2)])
        store.close()
    }
}

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

    /// The record of the second is in the MANIFEST although its sync failed: whoever opens the store next finds it. The third, which will
    /// not be sealed, must not have gone over its data meanwhile; its buffers are written without the store's thread.
    @Test func dataThatARecordWithAnUnknownFateNamesIsNotWrittenOver() throws {
        let storage = try HeldWritesStorage(directory: directory.path)
        storage.writes.isHolding = false
        let store = try ReplicaStore(storage: storage, options: smallOptions, logger: quiet)
        try store.createGroup(webGroup, volumes: [spec("vda", bytes: UInt64(size))])
        var random = SeededRandom(seed: 71)
        let first = try store.begin(1, after: nil)
        try first.append(volume: 0, offsetBytes: 0, noise(8 * 4096, &random))
        _ = try first.seal()
        let wanted = noise(8 * 4096, &random)
        let second = try store.begin(2, after: first.positionWhenSealed)
        try second.append(volume: 0, offsetBytes: 0, wanted)
        storage.manifestSyncFails.store(true, ordering: .relaxed)
        #expect(throws: StoreError.self) { try second.seal() }
        storage.manifestSyncFails.store(false, ordering: .relaxed)
        let third = try store.begin(3, after: first.positionWhenSealed)
        try third.append(volume: 0, offsetBytes: 0, noise(8 * 4096, &random))
        #expect(throws: StoreError.self) { try third.seal() }
        store.close()

        let again = try openStore(directory)
        let point = try #require(again.recoveryPoints(webGroup).last)
        #expect(point.epoch == EpochNumber(2), "or this shows nothing")
        #expect(try Array(again.image(point.id, volume: 0)[..<(8 * 4096)]) == wanted)
        again.close()
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

    /// Several writes are under way; nothing is sealed before the last of them has ended, in whatever order they do.
    @Test func anEpochIsSealedWhenAllOfItIsWritten() throws {
        let storage = try HeldWritesStorage(directory: directory.path)
        let store = try ReplicaStore(storage: storage, options: smallOptions, logger: quiet)
        try store.createGroup(webGroup, volumes: [spec("vda", bytes: UInt64(size))])
        var random = SeededRandom(seed: 71)
        let bytes = noise(32 * 4096, &random)
        let written = Atomic<Int>(0)
        let writer = try store.begin(1)
        writer.onWritten = { written.add($0, ordering: .relaxed) }
        // Four buffers: all there are.
        try writer.append(volume: 0, offsetBytes: 0, bytes)
        let answered = Replica.Semaphore()
        nonisolated(unsafe) var result: Result<RecoveryPoint?, StoreError>?
        writer.seal(consistency: .crash) {
            result = $0
            answered.signal()
        }
        storage.writes.waitFor(4)
        for place in [2, 0, 1] {
            storage.writes.finish(place)
            #expect(store.recoveryPoints(webGroup).isEmpty)
        }
        #expect(written.load(ordering: .relaxed) == 24 * 4096)
        storage.writes.finish(0)
        answered.wait()
        let point = try #require(try result!.get())
        #expect(written.load(ordering: .relaxed) == bytes.count)
        #expect(try Array(store.image(point.id, volume: 0)[..<bytes.count]) == bytes)
        store.close()
    }

    /// The next epoch begins where the failed one did: what that one still has under way must not land in it.
    @Test(arguments: [StoreError.full(what: "no space"), StoreError.io(errno: EIO, what: "cannot write")], [false, true])
    func aWriteThatFailsAmongOthersEndsItsEpochAndHarmsNoOther(fault: StoreError, isAbandoned: Bool) throws {
        let storage = try HeldWritesStorage(directory: directory.path)
        let store = try ReplicaStore(storage: storage, options: smallOptions, logger: quiet)
        try store.createGroup(webGroup, volumes: [spec("vda", bytes: UInt64(size))])
        var random = SeededRandom(seed: 72)
        var image = [UInt8](repeating: 0, count: size)
        func append(_ writer: EpochWriter, _ count: Int) throws -> [UInt8] {
            let bytes = noise(count * 4096, &random)
            try writer.append(volume: 0, offsetBytes: 0, bytes)
            return bytes
        }
        storage.writes.isHolding = false
        let first = try store.begin(1)
        image.replaceSubrange(0..<8 * 4096, with: try append(first, 8))
        _ = try first.seal()

        storage.writes.isHolding = true
        let second = try store.begin(2)
        let written = Atomic<Int>(0)
        second.onWritten = { written.add($0, ordering: .relaxed) }
        _ = try append(second, 24)
        storage.writes.waitFor(3)
        storage.writes.finish(1, fault)
        #expect(throws: fault) { try second.append(volume: 0, offsetBytes: 0, [UInt8](repeating: 1, count: 4096)) }
        if isAbandoned { second.abandon() }
        let third = try store.begin(3, after: first.positionWhenSealed)
        let bytes = try append(third, 16)
        image.replaceSubrange(0..<bytes.count, with: bytes)
        // Nothing of the third is under way before the last of the second is out of the way.
        #expect(storage.writes.count == 2)
        storage.writes.isHolding = false
        storage.writes.finish(1)
        storage.writes.finish(0)
        let point = try #require(try third.seal())
        #expect(written.load(ordering: .relaxed) == 24 * 4096)
        #expect(try store.image(point.id, volume: 0) == image)
        store.close()
        let again = try openStore(directory)
        #expect(try again.image(point.id, volume: 0) == image)
        again.close()
    }

    @Test func dataFlowsWhileTheStoresThreadIsBusy() throws {
        let storage = try HeldWritesStorage(directory: directory.path)
        let store = try ReplicaStore(storage: storage, options: smallOptions, logger: quiet)
        try store.createGroup(webGroup, volumes: [spec("vda", bytes: UInt64(size))])
        var random = SeededRandom(seed: 73)
        storage.writes.isHolding = false
        let first = try store.begin(1)
        try first.append(volume: 0, offsetBytes: 0, noise(4096, &random))
        _ = try first.seal()
        storage.writes.isHolding = true
        let (held, reached) = (Replica.Semaphore(), Replica.Semaphore())
        store.thread.enqueue {
            reached.signal()
            held.wait()
        }
        reached.wait()
        let second = try store.begin(2)
        try second.append(volume: 0, offsetBytes: 0, noise(8 * 4096, &random))
        #expect(storage.writes.count == 1)
        storage.writes.isHolding = false
        storage.writes.finish(0)
        held.signal()
        #expect(try second.seal() != nil)
        store.close()
    }

    /// The real thing: epochs in a pipeline through the ring, some given up, against a plain array.
    @Test(arguments: [74, 75, 76, 77] as [UInt64])
    func epochsThroughTheRingEqualThePlainArray(seed: UInt64) throws {
        var random = SeededRandom(seed: seed)
        let size = 512 * 4096
        let store = try openStore(directory)
        try store.createGroup(webGroup, volumes: [spec("vda", bytes: UInt64(size))])
        var image = [UInt8](repeating: 0, count: size)
        var sealed: [(EpochNumber, [UInt8])] = []
        let answered = Replica.Semaphore()
        var asked = 0
        for epoch in 1...60 as ClosedRange<UInt64> {
            let writer = try store.begin(epoch)
            var next = image
            for _ in 0..<random.below(6) {
                let start = random.below(480)
                let bytes = noise((1 + random.below(32)) * 4096, &random)
                try writer.append(volume: 0, offsetBytes: UInt64(start * 4096), bytes)
                next.replaceSubrange(start * 4096..<start * 4096 + bytes.count, with: bytes)
            }
            if random.below(4) == 0 {
                if random.below(2) == 0 { writer.abandon() }
                continue
            }
            image = next
            sealed.append((EpochNumber(epoch), image))
            asked += 1
            writer.seal(consistency: .crash) { result in
                if case .failure(let error) = result { Issue.record("epoch \(epoch): \(error)") }
                answered.signal()
            }
        }
        for _ in 0..<asked { answered.wait() }
        #expect(store.recoveryPoints(webGroup).map(\.epoch) == sealed.map(\.0))
        for (point, (_, image)) in zip(store.recoveryPoints(webGroup), sealed) { #expect(try store.image(point.id, volume: 0) == image) }
        store.close()
        let again = try openStore(directory)
        for (point, (_, image)) in zip(again.recoveryPoints(webGroup), sealed) { #expect(try again.image(point.id, volume: 0) == image) }
        again.close()
    }
}

/// A write queue that lets go of a write when it is told to.
final class HeldWrites: StorageWriteQueue {
    private struct Held {
        var bytes: UnsafeRawBufferPointer
        var file: any StorageFile
        var offset: UInt64
        var done: @Sendable (StoreError?) -> Void
    }
    private struct State: @unchecked Sendable {
        var held: [Held] = []
        var isHolding = true
    }
    private let state = Mutex(State())
    private let arrived = Replica.Semaphore()

    var isConcurrent: Bool { true }
    var isHolding: Bool {
        get { state.withLock { $0.isHolding } }
        set { state.withLock { $0.isHolding = newValue } }
    }
    var count: Int { state.withLock { $0.held.count } }

    func add(_ memory: WriteMemory) {}
    func remove(_ memory: WriteMemory) {}
    func close() {}

    func write(_ bytes: UnsafeRawBufferPointer, to file: any StorageFile, at offsetBytes: UInt64, done: @escaping @Sendable (StoreError?) -> Void) -> Bool {
        nonisolated(unsafe) let bytes = bytes
        let isHeld = state.withLock { state -> Bool in
            if state.isHolding { state.held.append(Held(bytes: bytes, file: file, offset: offsetBytes, done: done)) }
            return state.isHolding
        }
        if isHeld {
            arrived.signal()
        } else {
            perform(Held(bytes: bytes, file: file, offset: offsetBytes, done: done), nil)
        }
        return true
    }

    func sync(_ file: any StorageFile, done: @escaping @Sendable (StoreError?) -> Void) -> Bool {
        do throws(StoreError) {
            try file.dataSync()
            done(nil)
        } catch { done(error) }
        return true
    }

    /// Until so many have been held, from the beginning on.
    func waitFor(_ count: Int) { for _ in 0..<count { arrived.wait() } }

    /// The write at this place among those held now.
    func finish(_ place: Int, _ error: StoreError? = nil) { perform(state.withLock { $0.held.remove(at: place) }, error) }

    private func perform(_ held: Held, _ error: StoreError?) {
        var error = error
        if error == nil { do throws(StoreError) { try held.file.write(held.bytes, at: held.offset) } catch let failure { error = failure } }
        held.done(error)
    }
}

final class HeldWritesStorage: Storage {
    private let real: FileStorage
    let writes = HeldWrites()
    let manifestSyncFails = Atomic(false)
    var location: String { real.location }

    init(directory: String) throws(StoreError) { real = try FileStorage(directory: directory) }

    func makeWriteQueue() -> any StorageWriteQueue { writes }
    func lock() throws(StoreError) { try real.lock() }
    func unlock() { real.unlock() }
    func createDirectory(_ path: String) throws(StoreError) { try real.createDirectory(path) }
    func open(_ path: String, _ mode: StorageOpenMode, direct: Bool) throws(StoreError) -> any StorageFile {
        let file = try real.open(path, mode, direct: direct)
        return path.hasPrefix(Manifest.path) ? FailingSync(file, self) : file
    }
    func exists(_ path: String) throws(StoreError) -> Bool { try real.exists(path) }
    func remove(_ path: String) throws(StoreError) { try real.remove(path) }
    func rename(_ from: String, to: String) throws(StoreError) { try real.rename(from, to: to) }
    func list(_ directory: String) throws(StoreError) -> [String] { try real.list(directory) }
    func syncDirectory(_ path: String) throws(StoreError) { try real.syncDirectory(path) }
    func space() -> (freeBytes: UInt64, capacityBytes: UInt64) { real.space() }
}

private final class FailingSync: StorageFile {
    private let real: any StorageFile
    private let storage: HeldWritesStorage
    init(_ real: any StorageFile, _ storage: HeldWritesStorage) { (self.real, self.storage) = (real, storage) }

    var path: String { real.path }
    var descriptor: Int32 { real.descriptor }
    func dataSync() throws(StoreError) {
        if storage.manifestSyncFails.load(ordering: .relaxed) { throw .io(errno: EIO, what: "cannot sync \(path)") }
        try real.dataSync()
    }
    func size() throws(StoreError) -> UInt64 { try real.size() }
    func read(into buffer: UnsafeMutableRawBufferPointer, at offsetBytes: UInt64) throws(StoreError) -> Int { try real.read(into: buffer, at: offsetBytes) }
    func write(_ buffer: UnsafeRawBufferPointer, at offsetBytes: UInt64) throws(StoreError) { try real.write(buffer, at: offsetBytes) }
    func truncate(to sizeBytes: UInt64) throws(StoreError) { try real.truncate(to: sizeBytes) }
    func preallocate(offsetBytes: UInt64, lengthBytes: UInt64) -> Bool { real.preallocate(offsetBytes: offsetBytes, lengthBytes: lengthBytes) }
    func punch(offsetBytes: UInt64, lengthBytes: UInt64) throws(StoreError) -> Bool { try real.punch(offsetBytes: offsetBytes, lengthBytes: lengthBytes) }
    func allocatedBytes() throws(StoreError) -> UInt64 { try real.allocatedBytes() }
}

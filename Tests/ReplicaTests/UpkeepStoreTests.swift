import BlockTap
import Foundation
import Glibc
import Synchronization
import Testing

@testable import Replica
@testable import StoreSimulation

@Suite struct UpkeepStoreTests {
    let directory = TemporaryDirectory()

    func scene(_ seed: UInt64, blocks: Int = 512, _ options: StoreOptions = smallOptions) throws -> UpkeepScene {
        try UpkeepScene(seed: seed, storage: FileStorage(directory: directory.path), blockCount: blocks, options: options)
    }

    @Test func marksHoldsAndDropsAreRecordedAndRefusedWithReasons() throws {
        let scene = try scene(1)
        for _ in 0..<4 { try scene.receive(extents: 3, blocksMax: 8) }
        let ids = scene.store.recoveryPoints(webGroup).map(\.id)
        var store = scene.store!
        try store.markRecoveryPoint(webGroup, ids[0], note: "nightly", isOnDemand: true)
        try store.holdRecoveryPoint(webGroup, ids[1], name: "before the upgrade")
        try store.holdRecoveryPoint(webGroup, ids[1], name: "before the upgrade")
        try store.markRecoveryPoint(webGroup, ids[1], note: "by hand", isOnDemand: false)
        var error = try #require(throws: StoreError.self) { try store.holdRecoveryPoint(webGroup, ids[1], name: "other") }
        #expect("\(error)".contains("is held as \"before the upgrade\" already"))
        error = try #require(throws: StoreError.self) { try store.dropRecoveryPoints(webGroup, [ids[0], ids[1]]) }
        #expect("\(error)".contains("release it first"))
        error = try #require(throws: StoreError.self) { try store.deleteGroup(webGroup) }
        #expect("\(error)".contains("release it before the group is deleted"))
        #expect(throws: StoreError.unknownRecoveryPoint(webGroup, RecoveryPointID("rp-99"))) { try store.dropRecoveryPoints(webGroup, [ids[0], RecoveryPointID("rp-99")]) }
        #expect(throws: StoreError.unknownGroup(GroupID("x"))) { try store.releaseRecoveryPoint(GroupID("x"), ids[0]) }
        #expect(throws: StoreError.self) { try store.holdRecoveryPoint(webGroup, ids[2], name: "a\nb") }
        #expect(throws: StoreError.self) { try store.holdRecoveryPoint(webGroup, ids[2], name: "") }
        #expect(store.recoveryPoints(webGroup).map(\.id) == ids)
        store.close()

        try scene.open()
        store = scene.store
        let points = store.recoveryPoints(webGroup)
        #expect(points[0].note == "nightly" && points[0].isOnDemand && points[0].hold == nil)
        #expect(points[1].note == "by hand" && points[1].hold == "before the upgrade")
        try store.releaseRecoveryPoint(webGroup, ids[1])
        try store.dropRecoveryPoints(webGroup, [ids[1], ids[0], ids[1]])
        try store.dropRecoveryPoints(webGroup, [])
        #expect(store.recoveryPoints(webGroup).map(\.id) == [ids[2], ids[3]])
        try scene.check()
        store.close()
    }

    /// Dropping points, merging and punching while readers and forks stand on dropped points: all stay exact, and when they go so does the space.
    @Test(arguments: 1...12)
    func readersAndForksOnDroppedPointsKeepTheirData(seed: UInt64) throws {
        let scene = try scene(seed)
        let store = scene.store!
        for _ in 0..<60 { try scene.receive(extents: 4, blocksMax: 20) }
        var readers: [(VolumeReader, [UInt32], RecoveryPointID)] = []
        var forks: [(ForkID, [UInt32])] = []
        for round in 0..<12 {
            let kept = store.recoveryPoints(webGroup)
            let chosen = kept[scene.random.below(kept.count)].id
            readers.append((try store.openRecoveryPoint(webGroup, chosen, volume: 0), scene.points[chosen]!, chosen))
            if round % 3 == 0 {
                let other = kept[scene.random.below(kept.count)].id
                try store.fork(ForkID("f\(round)"), of: webGroup, at: other, purpose: "")
                forks.append((ForkID("f\(round)"), scene.points[other]!))
            }
            let gone = kept.dropLast().filter { _ in scene.random.below(3) == 0 }.map(\.id)
            try store.dropRecoveryPoints(webGroup, gone)
            try scene.upkeep()
            for _ in 0..<6 { try scene.receive(extents: 4, blocksMax: 20) }
            try scene.upkeep()
            try scene.check("round \(round)")
            for (reader, model, id) in readers { try scene.check(reader, model, "reader of \(id)") }
            for (id, model) in forks {
                let fork = try store.openFork(id, volume: 0)
                let image = try fork.image()
                var expected = [UInt8](repeating: 0, count: 4096)
                for block in 0..<scene.blockCount {
                    expected.withUnsafeMutableBytes { scene.bytes(block: block, version: model[block], into: $0) }
                    guard image[block * 4096..<(block + 1) * 4096].elementsEqual(expected) else {
                        Issue.record("fork \(id), block \(block)")
                        break
                    }
                }
                try fork.close()
            }
            if scene.random.below(3) == 0, !readers.isEmpty { readers.remove(at: scene.random.below(readers.count)) }
            if scene.random.below(4) == 0, let last = forks.popLast() { try store.dropFork(last.0) }
        }
        readers = []
        for (id, _) in forks { try store.dropFork(id) }
        try store.dropRecoveryPoints(webGroup, store.recoveryPoints(webGroup).dropLast().map(\.id))
        try scene.upkeep()
        try scene.check()
        #expect(store.statistics().layerCount <= 17)
        let statistics = store.statistics().upkeep
        #expect(statistics.layersMerged > 30 && statistics.bytesReclaimed > 0)
        store.close()
        // What is left on disk is what the records name.
        try scene.open()
        let files = try directory.files()
        #expect(files.filter { $0.hasPrefix("layers/") }.count == scene.store.statistics().layerCount)
        #expect(files.filter { $0.hasPrefix("segments/") }.count == scene.store.statistics().segmentCount)
        try scene.check()
        scene.store.close()
    }

    /// Where holes cannot be punched the same space comes back by moving what is left.
    @Test func withoutPunchingSparseSegmentsAreEvacuated() throws {
        let storage = try LimitedStorage(directory: directory.path)
        storage.canPunch = false
        let scene = try UpkeepScene(seed: 5, storage: storage, blockCount: 512)
        for _ in 0..<40 {
            for _ in 0..<5 { try scene.receive(extents: 6, blocksMax: 20) }
            let kept = scene.store.recoveryPoints(webGroup)
            try scene.store.dropRecoveryPoints(webGroup, kept.dropLast(2).map(\.id))
            try scene.upkeep()
        }
        try scene.check()
        let statistics = scene.store.statistics()
        #expect(statistics.upkeep.dataBytesMoved > 0 && statistics.upkeep.bytesReclaimed == 0)
        #expect(Double(statistics.upkeep.dataBytesMoved) < 1.5 * Double(statistics.appendedBytes))
        let allocated = try scene.allocatedBytes("segments")
        #expect(allocated < UInt64(scene.liveBlocks * 4096) * 2 + 3 * smallOptions.segmentBytes)
        scene.store.close()
        try scene.open()
        try scene.check()
        scene.store.close()
    }

    /// What is not what its checksums say is not moved, compressed or not: where it lies it may still be put right, or have been misread.
    @Test(arguments: [true, false]) func damagedDataIsNotMoved(shrinks: Bool) throws {
        let storage = try LimitedStorage(directory: directory.path)
        storage.canPunch = false
        let scene = try UpkeepScene(seed: 8, storage: storage, blockCount: 512)
        var random = SeededRandom(seed: 8)
        func data(_ blocks: Int) -> [UInt8] { shrinks ? [UInt8](repeating: UInt8(truncatingIfNeeded: random.next()) | 1, count: blocks * 4096) : noise(blocks * 4096, &random) }
        var writer = try scene.store.begin(1)
        let first = data(16)
        try writer.append(volume: 0, offsetBytes: 0, first)
        for cluster in 1..<32 { try writer.append(volume: 0, offsetBytes: UInt64(cluster * 16 * 4096), data(16)) }
        let old = try writer.seal()!.id
        writer = try scene.store.begin(2)
        for cluster in 1..<32 { try writer.append(volume: 0, offsetBytes: UInt64(cluster * 16 * 4096), data(16)) }
        let new = try writer.seal()!.id
        scene.store.close()
        let name = try #require(try directory.files().first { $0.hasPrefix("segments/") })
        func flip() throws {
            let handle = try FileHandle(forUpdating: URL(fileURLWithPath: directory.path + "/" + name))
            try handle.seek(toOffset: 4096 + 20)
            let byte = try #require(try handle.read(upToCount: 1))[0]
            try handle.seek(toOffset: 4096 + 20)
            try handle.write(contentsOf: Data([byte ^ 1]))
            try handle.close()
        }
        try flip()
        try scene.open()
        try scene.store.dropRecoveryPoints(webGroup, [old])
        try scene.upkeep()
        #expect(scene.store.upkeep.work.unmovableSegments.count == 1)
        #expect(throws: StoreError.self) { try scene.store.image(new, volume: 0) }
        scene.store.close()
        try flip()
        try scene.open()
        #expect(Array(try scene.store.image(new, volume: 0)[..<first.count]) == first)
        scene.store.close()
    }

    /// A damaged layer costs its own readers; upkeep leaves it and its segments alone and goes on with the rest.
    @Test func damagedLayersAreLeftAlone() throws {
        let scene = try scene(9)
        for _ in 0..<80 { try scene.receive(extents: 4, blocksMax: 20) }
        scene.store.close()
        let layers = try directory.files().filter { $0.hasPrefix("layers/") }
        let path = directory.path + "/" + layers[20]
        let handle = try FileHandle(forUpdating: URL(fileURLWithPath: path))
        try handle.seek(toOffset: 4100)
        try handle.write(contentsOf: Data([0xFF, 0xFF, 0xFF]))
        try handle.close()
        try scene.open()
        let all = scene.store.recoveryPoints(webGroup)
        try scene.store.dropRecoveryPoints(webGroup, all[1..<79].map(\.id))
        try scene.upkeep()
        #expect(scene.chainLength() <= 20)
        try scene.check(all[0].id)
        #expect(throws: StoreError.self) { try scene.check(all.last!.id) }
        scene.store.close()
    }

    @Test func theManifestIsRewrittenWhileRecordsGoOn() throws {
        var options = smallOptions
        options.manifestRewriteBytes = 20_000
        let scene = try scene(11, options)
        scene.store.setRetention(webGroup, RecoveryPointPolicy(tiers: [.init(everySeconds: 0, forSeconds: 20)]))
        var rewrites = 0
        var longest = 0
        for _ in 0..<150 {
            scene.clock.now += 1_000_000_000
            try scene.receive(extents: 2, blocksMax: 4)
            while let action = try scene.store.upkeepStep() { if action == .rewroteManifest { rewrites += 1 } }
            longest = max(longest, try Data(contentsOf: URL(fileURLWithPath: directory.path + "/MANIFEST")).count)
        }
        #expect(rewrites > 2 && longest < 80_000)
        scene.store.close()
        try scene.open()
        try scene.check()
        #expect(scene.store.recoveryPoints(webGroup).count == 21)
        scene.store.close()
    }

    /// A record that comes between the copy of the state and the new file's name is in both.
    @Test func recordsDuringARewriteAreInTheNewManifest() throws {
        let scene = try scene(12)
        let store = scene.store!
        try scene.receive(extents: 2, blocksMax: 4)
        let state = try store.thread.perform { () throws(StoreError) -> StoreState in
            store.manifest.beginRewrite()
            return store.read { $0 }
        }
        let rewritten = try Manifest.prepareRewrite(scene.storage, state: state)
        for _ in 0..<3 { try scene.receive(extents: 2, blocksMax: 4) }
        nonisolated(unsafe) let handed = rewritten
        try store.thread.perform { () throws(StoreError) in try store.manifest.finishRewrite(handed) }
        try scene.receive(extents: 2, blocksMax: 4)
        store.close()
        try scene.open()
        #expect(scene.store.recoveryPoints(webGroup).count == 5)
        try scene.check()
        scene.store.close()
    }

    @Test func lowSpaceIsToldBeforeAnythingIsRefusedAndTighteningMakesRoom() throws {
        let storage = try LimitedStorage(directory: directory.path)
        var options = smallOptions
        options.lowSpaceBytes = 0
        let scene = try UpkeepScene(seed: 6, storage: storage, blockCount: 512, options: options)
        storage.capacityBytes = 100 << 20
        storage.freeBytes = 50 << 20
        let told = Mutex<[SpaceState]>([])
        scene.store.onSpaceChange = { state in told.withLock { $0.append(state) } }
        for _ in 0..<10 { try scene.receive(extents: 4, blocksMax: 20) }
        let ids = scene.store.recoveryPoints(webGroup).map(\.id)
        try scene.upkeep()
        #expect(scene.store.spaceState == .ok && told.withLock { $0 } == [])
        storage.freeBytes = 4 << 20
        try scene.upkeep()
        #expect(scene.store.spaceState == .low && scene.store.recoveryPoints(webGroup).count == 10)

        try scene.store.holdRecoveryPoint(webGroup, ids[2], name: "kept")
        try scene.store.markRecoveryPoint(webGroup, ids[0], note: nil, isOnDemand: true)
        scene.store.setTightening(true)
        var order: [RecoveryPointID] = []
        for _ in 0..<100 {
            let before = scene.store.recoveryPoints(webGroup).map(\.id)
            guard try scene.store.upkeepStep() != nil else { break }
            order += Set(before).subtracting(scene.store.recoveryPoints(webGroup).map(\.id))
        }
        #expect(order == [ids[1]] + ids[3...8] + [ids[0]])
        #expect(scene.store.recoveryPoints(webGroup).map(\.id) == [ids[2], ids[9]])

        storage.isFull = true
        #expect(throws: StoreError.self) { try scene.receive(extents: 4, blocksMax: 20) }
        // The sender may hear of it first.
        try scene.store.thread.perform { () throws(StoreError) in }
        #expect(scene.store.spaceState == .full)
        storage.isFull = false
        storage.freeBytes = 50 << 20
        try scene.receive(extents: 4, blocksMax: 20)
        #expect(scene.store.spaceState == .ok)
        #expect(told.withLock { $0 } == [.low, .full, .ok])
        try scene.check()
        scene.store.close()
    }

    /// On a disk that is full for everything but what makes room, dropping, merging and punching make it.
    @Test func upkeepGoesOnAfterSpaceIsBack() throws {
        let storage = try LimitedStorage(directory: directory.path)
        let scene = try UpkeepScene(seed: 7, storage: storage, blockCount: 512)
        for _ in 0..<60 { try scene.receive(extents: 4, blocksMax: 20) }
        storage.isFull = true
        #expect(throws: StoreError.self) { try scene.receive(extents: 4, blocksMax: 20) }
        storage.isFull = false
        try scene.store.dropRecoveryPoints(webGroup, scene.store.recoveryPoints(webGroup).dropLast().map(\.id))
        storage.isFull = true
        #expect(throws: StoreError.self) { try scene.upkeep() }
        storage.isFull = false
        try scene.upkeep()
        try scene.receive(extents: 4, blocksMax: 20)
        #expect(scene.store.statistics().layerCount <= 17 && scene.store.statistics().upkeep.bytesReclaimed > 0)
        try scene.check()
        scene.store.close()
    }

    /// Whatever comes first in a round always has something to do: the rest gets its turn all the same.
    @Test func upkeepThatIsNeverDoneDoesAllOfIt() throws {
        let scene = try scene(77)
        scene.options.manifestRewriteBytes = 32 << 10
        scene.store.close()
        try scene.open()
        scene.store.setRetention(webGroup, RecoveryPointPolicy(tiers: [.init(everySeconds: 0, forSeconds: 4)]))
        var done: Set<String> = []
        for _ in 0..<300 {
            scene.clock.now += 1_000_000_000
            try scene.receive(extents: 12, blocksMax: 6)
            // The first has something to expire.
            for _ in 0..<2 { if let action = try scene.store.upkeepStep() { done.insert(String("\(action)".prefix { $0 != "(" })) } }
        }
        #expect(done.isSuperset(of: ["expired", "merged", "removed", "reclaimed", "rewroteManifest"]), "\(done)")
        try scene.check()
        scene.store.close()
    }

    /// The thread beside everything else: epochs, readers, drops; and closing breaks it off wherever it is.
    @Test(arguments: 1...6)
    func theThreadWorksBesideEpochsAndReadersAndStopsAtClose(seed: UInt64) throws {
        let scene = try scene(seed)
        scene.store.setRetention(webGroup, RecoveryPointPolicy(tiers: [.init(everySeconds: 0, forSeconds: 5), .init(everySeconds: 10, forSeconds: 60)]))
        scene.store.startUpkeep(everySeconds: 0.001, bytesPerSecond: 0)
        for round in 0..<200 {
            scene.clock.now += 1_000_000_000
            try scene.receive(extents: 4, blocksMax: 20)
            if round % 20 == 0, let id = scene.store.recoveryPoints(webGroup).randomElement(using: &scene.random)?.id, let model = scene.points[id],
                let reader = try? scene.store.openRecoveryPoint(webGroup, id, volume: 0)
            {
                try scene.check(reader, model, "beside the thread")
            }
        }
        if seed > 3 { scene.store.startUpkeep(everySeconds: 1000, bytesPerSecond: 1) }
        scene.store.close()
        try scene.open()
        try scene.check()
        scene.store.close()
    }
}

/// A real directory with as much space as a test says.
final class LimitedStorage: Storage, @unchecked Sendable {
    private let real: FileStorage
    private struct State {
        var isFull = false
        var canPunch = true
        var free: UInt64 = 50 << 30
        var capacity: UInt64 = 100 << 30
    }
    private let state = Mutex(State())
    var isFull: Bool { get { state.withLock { $0.isFull } } set { state.withLock { $0.isFull = newValue } } }
    var canPunch: Bool { get { state.withLock { $0.canPunch } } set { state.withLock { $0.canPunch = newValue } } }
    var freeBytes: UInt64 { get { state.withLock { $0.free } } set { state.withLock { $0.free = newValue } } }
    var capacityBytes: UInt64 { get { state.withLock { $0.capacity } } set { state.withLock { $0.capacity = newValue } } }
    var location: String { real.location }

    init(directory: String) throws(StoreError) { real = try FileStorage(directory: directory) }

    final class File: StorageFile, @unchecked Sendable {
        let real: any StorageFile
        let storage: LimitedStorage
        init(_ real: any StorageFile, _ storage: LimitedStorage) {
            self.real = real
            self.storage = storage
        }
        var path: String { real.path }
        var descriptor: Int32 { real.descriptor }
        func size() throws(StoreError) -> UInt64 { try real.size() }
        func read(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(StoreError) -> Int { try real.read(into: buffer, at: offset) }
        func write(_ buffer: UnsafeRawBufferPointer, at offset: UInt64) throws(StoreError) {
            if storage.isFull { throw .full(what: path) }
            try real.write(buffer, at: offset)
        }
        func dataSync() throws(StoreError) { try real.dataSync() }
        func truncate(to size: UInt64) throws(StoreError) { try real.truncate(to: size) }
        func preallocate(offsetBytes: UInt64, lengthBytes: UInt64) -> Bool { !storage.isFull && real.preallocate(offsetBytes: offsetBytes, lengthBytes: lengthBytes) }
        func punch(offsetBytes: UInt64, lengthBytes: UInt64) throws(StoreError) -> Bool {
            storage.canPunch ? try real.punch(offsetBytes: offsetBytes, lengthBytes: lengthBytes) : false
        }
        func allocatedBytes() throws(StoreError) -> UInt64 { try real.allocatedBytes() }
    }

    func lock() throws(StoreError) { try real.lock() }
    func unlock() { real.unlock() }
    func createDirectory(_ path: String) throws(StoreError) { try real.createDirectory(path) }
    func open(_ path: String, _ mode: StorageOpenMode, direct: Bool) throws(StoreError) -> any StorageFile { File(try real.open(path, mode, direct: direct), self) }
    func exists(_ path: String) throws(StoreError) -> Bool { try real.exists(path) }
    func remove(_ path: String) throws(StoreError) { try real.remove(path) }
    func rename(_ from: String, to: String) throws(StoreError) { try real.rename(from, to: to) }
    func list(_ directory: String) throws(StoreError) -> [String] { try real.list(directory) }
    func syncDirectory(_ path: String) throws(StoreError) { try real.syncDirectory(path) }
    func space() -> (freeBytes: UInt64, capacityBytes: UInt64) { state.withLock { ($0.free, $0.capacity) } }
}

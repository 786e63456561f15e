import BlockTap
import Foundation
import Glibc
import Synchronization
import Testing

@testable import Replica

/// A real directory whose n-th change fails.
final class FaultyStorage: Storage, @unchecked Sendable {
    private let real: FileStorage
    private let state = Mutex((left: Int.max, fault: StoreError.closed, isSticky: false, count: 0))
    var location: String { real.location }

    init(directory: String) throws(StoreError) { real = try FileStorage(directory: directory) }

    /// The `after`-th change from now on fails, and with `isSticky` all that follow.
    func arm(after: Int, _ fault: StoreError, isSticky: Bool = false) { state.withLock { $0 = (after, fault, isSticky, 0) } }
    func disarm() { state.withLock { $0.left = Int.max } }
    var changes: Int { state.withLock { $0.count } }

    func step() throws(StoreError) {
        try state.withLock { state throws(StoreError) in
            state.count += 1
            state.left -= 1
            if state.left == 0 || (state.left < 0 && state.isSticky) { throw state.fault }
        }
    }

    final class File: StorageFile, @unchecked Sendable {
        let real: any StorageFile
        let storage: FaultyStorage
        init(_ real: any StorageFile, _ storage: FaultyStorage) {
            self.real = real
            self.storage = storage
        }
        var path: String { real.path }
        var descriptor: Int32 { real.descriptor }
        func size() throws(StoreError) -> UInt64 { try real.size() }
        func read(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(StoreError) -> Int { try real.read(into: buffer, at: offset) }
        func write(_ buffer: UnsafeRawBufferPointer, at offset: UInt64) throws(StoreError) {
            try storage.step()
            try real.write(buffer, at: offset)
        }
        func dataSync() throws(StoreError) {
            try storage.step()
            try real.dataSync()
        }
        func truncate(to size: UInt64) throws(StoreError) { try real.truncate(to: size) }
        func punch(offsetBytes: UInt64, lengthBytes: UInt64) throws(StoreError) -> Bool { try real.punch(offsetBytes: offsetBytes, lengthBytes: lengthBytes) }
        func allocatedBytes() throws(StoreError) -> UInt64 { try real.allocatedBytes() }
        func preallocate(offsetBytes: UInt64, lengthBytes: UInt64) -> Bool { real.preallocate(offsetBytes: offsetBytes, lengthBytes: lengthBytes) }
    }

    func lock() throws(StoreError) { try real.lock() }
    func unlock() { real.unlock() }
    func createDirectory(_ path: String) throws(StoreError) { try real.createDirectory(path) }
    func open(_ path: String, _ mode: StorageOpenMode, direct: Bool) throws(StoreError) -> any StorageFile {
        if mode == .create { try step() }
        return File(try real.open(path, mode, direct: direct), self)
    }
    func exists(_ path: String) throws(StoreError) -> Bool { try real.exists(path) }
    func remove(_ path: String) throws(StoreError) { try real.remove(path) }
    func rename(_ from: String, to: String) throws(StoreError) { try real.rename(from, to: to) }
    func list(_ directory: String) throws(StoreError) -> [String] { try real.list(directory) }
    func syncDirectory(_ path: String) throws(StoreError) {
        try step()
        try real.syncDirectory(path)
    }
    func space() -> (freeBytes: UInt64, capacityBytes: UInt64) { real.space() }
}

@Suite struct StoreFaultTests {
    /// One change after the other fails while epochs, forks and drops go on: whatever was acknowledged stays exact, at once and
    /// after reopening, and with space again the store goes on.
    @Test(arguments: [StoreError.full(what: "no space"), StoreError.io(errno: EIO, what: "cannot write")])
    func aFaultAtAnyChangeLosesNothingThatWasAcknowledged(fault: StoreError) throws {
        var faultsHit = 0
        for after in 1... {
            let directory = TemporaryDirectory()
            let storage = try FaultyStorage(directory: directory.path)
            var random = SeededRandom(seed: 50)
            let size = 40 * 4096
            var store = try ReplicaStore(storage: storage, options: smallOptions, logger: quiet)
            try store.createGroup(webGroup, volumes: [spec("vda", bytes: UInt64(size)), spec("vdb", bytes: UInt64(size))])
            var model = [[UInt8]](repeating: [UInt8](repeating: 0, count: size), count: 2)
            var acknowledged: [(RecoveryPointID, [[UInt8]])] = []
            var failed = 0
            storage.arm(after: after, fault)
            for epoch in 1...4 as ClosedRange<UInt64> {
                var next = model
                do {
                    let writer = try store.begin(epoch)
                    for volume in 0..<2 {
                        let bytes = noise(12 * 4096, &random)
                        try writer.append(volume: volume, offsetBytes: 4 * 4096, bytes)
                        next[volume].replaceSubrange(4 * 4096..<16 * 4096, with: bytes)
                    }
                    let point = try writer.seal()!
                    model = next
                    acknowledged.append((point.id, model))
                } catch let error as StoreError {
                    failed += 1
                    if case .full = fault { guard case .full = error else { throw error } }
                }
                if epoch == 2, let point = acknowledged.last {
                    do {
                        try store.fork(ForkID("f"), of: webGroup, at: point.0, purpose: "")
                        let fork = try store.openFork(ForkID("f"), volume: 0)
                        #expect(try fork.image() == point.1[0])
                        try fork.close()
                        try store.dropFork(ForkID("f"))
                    } catch is StoreError { failed += 1 }
                }
            }
            let hit = storage.changes >= after
            storage.disarm()
            if case .full = fault { #expect(failed <= 1, "after \(after)") }
            // A MANIFEST that could not be synced may hold one more than was acknowledged, never fewer.
            func check(_ store: ReplicaStore) throws {
                let points = store.recoveryPoints(webGroup).map(\.id)
                #expect(Set(acknowledged.map(\.0)).isSubset(of: points), "after \(after)")
                for (id, images) in acknowledged {
                    for volume in 0..<2 { #expect(try store.image(id, volume: volume) == images[volume], "after \(after)") }
                }
            }
            try check(store)
            store.close()
            store = try ReplicaStore(storage: FaultyStorage(directory: directory.path), options: smallOptions, logger: quiet)
            try check(store)
            #expect(try store.begin(100).seal() != nil)
            try? store.dropFork(ForkID("f"))
            let files = try directory.files()
            #expect(files.filter { $0.hasPrefix("journals/") }.isEmpty)
            #expect(files.filter { $0.hasPrefix("layers/") }.count == store.statistics().layerCount, "after \(after)")
            store.close()
            if !hit { break }
            faultsHit += 1
        }
        #expect(faultsHit > 30)
    }

    @Test func aForkThatCannotBeSyncedPromisesNothingAnyMore() throws {
        let directory = TemporaryDirectory()
        let storage = try FaultyStorage(directory: directory.path)
        let store = try ReplicaStore(storage: storage, options: smallOptions, logger: quiet)
        try store.createGroup(webGroup, volumes: [spec("vda", bytes: 40960)])
        let point = try store.begin(1).seal()!
        try store.fork(ForkID("f"), of: webGroup, at: point.id, purpose: "")
        let fork = try store.openFork(ForkID("f"), volume: 0)
        let block = [UInt8](repeating: 1, count: 4096)
        try block.withUnsafeBytes { try fork.write(offsetBytes: 0, $0) }
        // Lack of space may pass: the flush is tried again and loses nothing.
        storage.arm(after: 2, .full(what: "no space"))
        #expect(throws: StoreError.full(what: "no space")) { try fork.flush() }
        try fork.flush()
        try fork.close()
        let again = try store.openFork(ForkID("f"), volume: 0)
        #expect(try again.image() == block + [UInt8](repeating: 0, count: 9 * 4096))
        try block.withUnsafeBytes { try again.write(offsetBytes: 4096, $0) }
        storage.arm(after: 1, .io(errno: EIO, what: "sync"))
        #expect(throws: StoreError.self) { try again.flush() }
        #expect(throws: StoreError.self) { try again.flush() }
        #expect(throws: StoreError.self) { try block.withUnsafeBytes { try again.write(offsetBytes: 4096, $0) } }
        try? again.close()
        store.close()
    }

    /// What mounting needs; nil when it is there.
    static let mountLacks: String? = {
        if getuid() != 0 { return "root" }
        for tool in ["/sbin/mkfs.ext4", "/bin/mount", "/bin/umount"] where access(tool, X_OK) != 0 { return tool }
        return access("/dev/loop-control", W_OK) == 0 ? nil : "/dev/loop-control"
    }()

    static func run(_ tool: String, _ arguments: [String]) throws {
        let process = Process()
        process.executableURL = URL(fileURLWithPath: tool)
        process.arguments = arguments
        process.standardOutput = FileHandle.nullDevice
        process.standardError = FileHandle.nullDevice
        try process.run()
        process.waitUntilExit()
        try #require(process.terminationStatus == 0, "\(tool) \(arguments) failed")
    }

    @Test(.enabled(if: mountLacks == nil, "needs root, mkfs.ext4, mount and loop devices"))
    func aFullFileSystemRefusesEpochsAndTakesThemAgainWhenThereIsSpace() throws {
        let directory = TemporaryDirectory()
        let image = directory.path + "/image"
        let mounted = directory.path + "/mounted"
        #expect(FileManager.default.createFile(atPath: image, contents: nil))
        #expect(truncate(image, 64 << 20) == 0)
        try Self.run("/sbin/mkfs.ext4", ["-q", "-F", "-m", "0", image])
        #expect(mkdir(mounted, 0o700) == 0)
        try Self.run("/bin/mount", ["-o", "loop", image, mounted])
        var store: ReplicaStore!
        defer {
            store?.close()
            store = nil
            try? Self.run("/bin/umount", [mounted])
        }

        let size = 8 << 20
        let ballast = mounted + "/ballast"
        try Data(count: 20 << 20).write(to: URL(fileURLWithPath: ballast))
        store = try ReplicaStore.open(directory: mounted + "/store", logger: quiet)
        try store.createGroup(webGroup, volumes: [spec("vda", bytes: UInt64(size))])
        var random = SeededRandom(seed: 60)
        var acknowledged: [(RecoveryPointID, [UInt8])] = []
        func receive(_ epoch: UInt64) throws {
            let bytes = noise(size, &random)
            let writer = try store.begin(epoch)
            for start in stride(from: 0, to: size, by: 1 << 20) { try writer.append(volume: 0, offsetBytes: UInt64(start), Array(bytes[start..<start + (1 << 20)])) }
            acknowledged.append((try writer.seal()!.id, bytes))
        }
        var epoch: UInt64 = 0
        var refused: StoreError?
        while refused == nil {
            epoch += 1
            try #require(epoch < 20)
            do { try receive(epoch) } catch let error as StoreError { refused = error }
        }
        guard case .full = refused else { throw refused! }
        #expect(acknowledged.count >= 2)
        // Refused again, as often as it is tried, and what is there stays whole.
        for _ in 0..<3 {
            epoch += 1
            #expect(throws: StoreError.self) { try receive(epoch) }
        }
        for (id, bytes) in acknowledged { #expect(try store.image(id, volume: 0) == bytes) }

        // Forking and dropping still work, since the reserve is there for it.
        try? store.fork(ForkID("f"), of: webGroup, at: acknowledged[0].0, purpose: "")
        try? store.dropFork(ForkID("f"))

        try FileManager.default.removeItem(atPath: ballast)
        epoch += 1
        try receive(epoch)
        store.close()
        store = try ReplicaStore.open(directory: mounted + "/store", logger: quiet)
        #expect(store.recoveryPoints(webGroup).map(\.id) == acknowledged.map(\.0))
        for (id, bytes) in acknowledged { #expect(try store.image(id, volume: 0) == bytes) }
        try store.deleteGroup(webGroup)
        #expect(store.statistics().freeBytes > 50 << 20)
    }
}

import BlockTap
import Foundation
import Glibc
import Synchronization
import Testing

@testable import Replica

/// What happened to a store whose disk fails: everything that was promised, and everything that may be there although nobody was told.
private final class FaultScene {
    static let sizeBytes = 40 * 4096
    static let fork = ForkID("f")
    var store: ReplicaStore
    private let storage: any Storage
    private let options: StoreOptions
    private var random = SeededRandom(seed: 70)
    private var epoch: UInt64 = 0
    private var disk = [UInt8](repeating: 0, count: FaultScene.sizeBytes)
    /// By epoch, asked for.
    private var attempted: [EpochNumber: [UInt8]] = [:]
    private var acknowledged: Set<EpochNumber> = []
    private var maybeDropped: Set<EpochNumber> = []
    private var dropped: Set<EpochNumber> = []
    private(set) var isForked = false
    private var mayBeForked = false
    /// After each write, and how many of them were promised to be durable.
    private var forkImages: [[UInt8]] = []
    private var flushed = 0
    private var volume: ForkVolume?
    private(set) var failures: [StoreError] = []

    init(_ storage: any Storage) throws {
        var options = smallOptions
        options.isStepped = true
        options.garbageBytesMin = 1
        options.reclaimBytesMin = 1
        options.indexFileCostMin = 1
        options.manifestRewriteBytes = 4096
        self.options = options
        self.storage = storage
        store = try ReplicaStore(storage: storage, options: options, logger: quiet)
        try store.createGroup(webGroup, volumes: [spec("vda", bytes: UInt64(Self.sizeBytes))])
    }

    private func attempt(_ body: () throws -> Void) throws {
        do { try body() } catch let error as StoreError { failures.append(error) }
    }

    func receive() throws {
        epoch += 1
        var next = disk
        do {
            let writer = try store.begin(epoch)
            for _ in 0..<2 {
                let start = random.below(36) * 4096
                let bytes = random.below(2) == 0 ? noise(4 * 4096, &random) : [UInt8](repeating: UInt8(epoch), count: 4 * 4096)
                try writer.append(volume: 0, offsetBytes: UInt64(start), bytes)
                next.replaceSubrange(start..<start + bytes.count, with: bytes)
            }
            attempted[EpochNumber(epoch)] = next
            _ = try CheckBitFlipTests.sealStepped(store, writer)
            acknowledged.insert(EpochNumber(epoch))
            disk = next
        } catch let error as StoreError { failures.append(error) }
    }

    func drop() throws {
        let gone = store.recoveryPoints(webGroup).dropFirst().prefix(2)
        if gone.isEmpty { return }
        maybeDropped.formUnion(gone.map(\.epoch))
        try attempt {
            try store.dropRecoveryPoints(webGroup, gone.map(\.id))
            dropped.formUnion(gone.map(\.epoch))
        }
    }

    func upkeep() throws {
        for _ in 0..<20 {
            var isDone = false
            try attempt { isDone = try store.upkeepStep() == nil }
            if isDone || !failures.isEmpty { return }
        }
    }

    func forkIt() throws {
        guard let point = store.recoveryPoints(webGroup).last, let image = attempted[point.epoch] else { return }
        mayBeForked = true
        forkImages = [image]
        try attempt {
            try store.fork(Self.fork, of: webGroup, at: point.id, purpose: "test")
            isForked = true
        }
    }

    func writeFork(seals: Bool) throws {
        guard isForked else { return }
        try attempt {
            if volume == nil { volume = try store.openFork(Self.fork, volume: 0) }
            for _ in 0..<3 {
                let start = random.below(38) * 4096 + 100
                let bytes = noise(5000, &random)
                var image = forkImages.last!
                image.replaceSubrange(start..<start + bytes.count, with: bytes)
                try bytes.withUnsafeBytes { try volume!.write(offsetBytes: UInt64(start), $0) }
                forkImages.append(image)
            }
            // What a failed flush or seal meant to make durable may be so.
            if seals { try store.sealFork(Self.fork) } else { try volume!.flush() }
            flushed = forkImages.count - 1
        }
    }

    func closeFork() throws {
        try attempt { try volume?.close() }
        volume = nil
    }

    func work() throws {
        for _ in 0..<3 { try receive() }
        try forkIt()
        try writeFork(seals: false)
        try receive()
        try upkeep()
        try writeFork(seals: true)
        try drop()
        try upkeep()
        try receive()
        try writeFork(seals: false)
        for _ in 0..<3 { try receive() }
        try drop()
        try upkeep()
        try closeFork()
    }

    /// Promised and there, exactly; or there and exactly what was asked for.
    func check(_ comment: String, isReopened: Bool) throws {
        let points = store.recoveryPoints(webGroup)
        for point in points {
            let image = try #require(attempted[point.epoch], "\(comment): \(point.epoch)")
            #expect(try store.image(point.id, volume: 0) == image, "\(comment): \(point.epoch)")
        }
        let have = Set(points.map(\.epoch))
        #expect(acknowledged.subtracting(maybeDropped).isSubset(of: have), "\(comment): \(acknowledged), \(have)")
        #expect(dropped.isDisjoint(with: have), "\(comment): dropped points are there")
        #expect(have.subtracting(acknowledged).count <= 1, "\(comment): nobody was told of \(have.subtracting(acknowledged))")
        guard isReopened else { return }
        let isThere = store.forks().contains { $0.id == Self.fork }
        #expect(isForked ? isThere : !isThere || mayBeForked, "\(comment): the fork")
        if isThere {
            let fork = try store.openFork(Self.fork, volume: 0)
            let image = try fork.image()
            try fork.close()
            #expect(forkImages[flushed...].contains(image) || torn(image), "\(comment): the fork is none of what it was since the last flush")
        }
        // The position from which the next epoch goes on.
        if let last = store.group(webGroup)?.lastDurable?.epoch, let image = attempted[last] {
            epoch = max(epoch, last.rawValue)
            disk = image
        }
    }

    /// A write that failed in the middle may be there in part, block by block: it was not answered.
    private func torn(_ image: [UInt8]) -> Bool {
        let unit = 4096
        return stride(from: 0, to: image.count, by: unit).allSatisfy { start in
            forkImages[flushed...].contains { $0[start..<start + unit] == image[start..<start + unit] }
        }
    }

    func reopen() throws {
        volume = nil
        store.close()
        store = try ReplicaStore(storage: storage, options: options, logger: quiet)
    }
}

extension HookedStorage.Step {
    /// Shortening a file, and giving one the name of another, do not.
    fileprivate var needsSpace: Bool {
        switch self {
        case .truncate, .rename, .syncDirectory(""), .punch: false
        default: true
        }
    }
}

/// A disk that fails ends what is being written, with an error, and never what was promised.
@Suite(.timeLimit(.minutes(10))) struct CheckFaultTests {
    enum Fault: CaseIterable {
        /// One change cannot be made.
        case once
        /// From then on none can.
        case broken
        /// From then on nothing fits, until there is space again.
        case full

        var error: StoreError { self == .full ? .full(what: "no space") : .io(errno: EIO, what: "the disk is broken") }
    }

    @Test(arguments: Fault.allCases) func aFaultAtAnyChangeLosesNothingThatWasPromised(fault: Fault) throws {
        var hits = 0
        for after in 0... {
            let memory = MemoryStorage()
            let storage = HookedStorage(memory)
            let scene = try FaultScene(storage)
            let count = Mutex(0)
            storage.onStep { step throws(StoreError) in
                guard step.isChange, fault != .full || step.needsSpace else { return }
                let number = count.withLock { count in
                    count += 1
                    return count - 1
                }
                if fault == .once ? number == after : number >= after { throw fault.error }
            }
            try scene.work()
            let isHit = count.withLock { $0 } > after
            let comment = "\(fault), change \(after)"
            // Still broken: what is there can be read.
            try scene.check(comment, isReopened: false)
            storage.onStep(nil)
            if fault == .full {
                // Only refused, and taken again without anybody's help.
                #expect(scene.failures.allSatisfy { if case .full = $0 { true } else { false } }, "\(comment): \(scene.failures)")
                let before = scene.failures.count
                try scene.receive()
                #expect(scene.failures.count == before, "\(comment): there is space again, but \(scene.failures.last!)")
                try scene.check(comment, isReopened: false)
            }
            try scene.reopen()
            try scene.check(comment + ", opened again", isReopened: true)
            let before = scene.failures.count
            try scene.receive()
            try scene.upkeep()
            #expect(scene.failures.count == before, "\(comment): \(scene.failures.last!)")
            try scene.check(comment + ", going on", isReopened: true)
            try scene.reopen()
            let report = try StoreCheck.run(memory, readsData: true)
            #expect(report.isClean && report.unnamedFiles.isEmpty, "\(comment): \(report.damages) \(report.unnamedFiles)")
            scene.store.close()
            if !isHit { break }
            hits += 1
        }
        #expect(hits > 60)
    }

    static let mountLacks: String? = StoreFaultTests.mountLacks ?? (access("/sbin/mkfs.xfs", X_OK) == 0 ? nil : "mkfs.xfs")

    /// A small file system of its own.
    private final class Mounted {
        let directory = TemporaryDirectory()
        var path: String { directory.path + "/mounted" }
        init(_ system: String) throws {
            let image = directory.path + "/image"
            #expect(FileManager.default.createFile(atPath: image, contents: nil))
            #expect(truncate(image, 320 << 20) == 0)
            try StoreFaultTests.run("/sbin/mkfs.\(system)", system == "ext4" ? ["-q", "-F", "-m", "0", image] : ["-q", image])
            #expect(mkdir(path, 0o700) == 0)
            try StoreFaultTests.run("/bin/mount", ["-o", "loop", image, path])
        }
        // Goes when the last file in it is closed.
        deinit { try? StoreFaultTests.run("/bin/umount", ["-l", path]) }
    }

    /// Epochs, forks and upkeep on a file system without space: all refused with that as the reason, all of it readable; what is dropped comes
    /// back as space, and then all goes on, without a restart.
    @Test(.enabled(if: mountLacks == nil, "needs root, mkfs.ext4, mkfs.xfs, mount and loop devices"), arguments: ["ext4", "xfs"])
    func aFullFileSystemStopsWritersAndGivesSpaceBackForWhatIsDropped(system: String) throws {
        let mounted = try Mounted(system)
        defer { withExtendedLifetime(mounted) {} }
        let size = 8 << 20
        var options = StoreOptions()
        options.segmentBytes = 16 << 20
        let store = try ReplicaStore(storage: FileStorage(directory: mounted.path + "/store"), options: options, logger: quiet)
        defer { store.close() }
        // Most of it is somebody else's.
        let free = store.storage.space().freeBytes
        let ballast = open(mounted.path + "/ballast", O_RDWR | O_CREAT, 0o600)
        #expect(posix_fallocate(ballast, 0, off_t(free - (72 << 20))) == 0)
        close(ballast)
        try store.createGroup(webGroup, volumes: [spec("vda", bytes: UInt64(size))])
        var random = SeededRandom(seed: 61)
        var model = [UInt8](repeating: 0, count: size)
        var points: [(RecoveryPointID, [UInt8])] = []
        var epoch: UInt64 = 0
        /// Half of the disk, every second block: so that dead blocks lie between live ones.
        func receive() throws {
            epoch += 1
            let writer = try store.begin(epoch)
            var next = model
            for start in stride(from: Int(epoch % 2) * 4096, to: size, by: 8192) {
                let bytes = noise(4096, &random)
                try writer.append(volume: 0, offsetBytes: UInt64(start), bytes)
                next.replaceSubrange(start..<start + 4096, with: bytes)
            }
            points.append((try writer.seal()!.id, next))
            model = next
        }
        for _ in 0..<4 { try receive() }
        try store.fork(ForkID("f"), of: webGroup, at: points[1].0, purpose: "test")
        let fork = try store.openFork(ForkID("f"), volume: 0)
        var forkImage = points[1].1
        func write() throws {
            let start = random.below(size - (256 << 10))
            let bytes = noise(256 << 10, &random)
            try bytes.withUnsafeBytes { try fork.write(offsetBytes: UInt64(start), $0) }
            forkImage.replaceSubrange(start..<start + bytes.count, with: bytes)
        }
        for _ in 0..<8 { try write() }
        try fork.flush()
        // By turns until neither gets any more.
        var (epochRefused, forkRefused): (StoreError?, StoreError?)
        for _ in 0..<400 where epochRefused == nil || forkRefused == nil {
            if epochRefused == nil { do { try receive() } catch let error as StoreError { epochRefused = error } }
            if forkRefused == nil {
                for _ in 0..<4 where forkRefused == nil { do { try write() } catch let error as StoreError { forkRefused = error } }
            }
        }
        guard case .full = try #require(epochRefused), case .full = try #require(forkRefused) else {
            Issue.record("\(String(describing: epochRefused)), \(String(describing: forkRefused))")
            return
        }
        for _ in 0..<3 { #expect(throws: StoreError.self) { try receive() } }
        func check(_ comment: String) throws {
            for (id, image) in points where store.recoveryPoints(webGroup).contains(where: { $0.id == id }) { #expect(try store.image(id, volume: 0) == image, "\(comment): \(id)") }
            #expect(try fork.image() == forkImage, "\(comment): the fork")
        }
        try check("full")
        // Points in the middle go: nothing but upkeep can make space of that.
        let gone = points.dropFirst(2).dropLast().map(\.0)
        try store.dropRecoveryPoints(webGroup, gone)
        while try store.upkeepStep() != nil {}
        try check("after upkeep")
        #expect(store.storage.space().freeBytes > 4 << 20)
        try receive()
        try write()
        try fork.flush()
        try check("with space again")
        try fork.close()
        store.close()
        let report = try StoreCheck.run(directory: mounted.path + "/store", readsData: true)
        #expect(report.isClean, "\(report.damages.prefix(3)) \(report.badExtents.prefix(3))")
        let again = try ReplicaStore.open(directory: mounted.path + "/store", logger: quiet)
        for (id, image) in points where !gone.contains(id) { #expect(try again.image(id, volume: 0) == image, "\(id), opened again") }
        let reopened = try again.openFork(ForkID("f"), volume: 0)
        #expect(try reopened.image() == forkImage)
        try reopened.close()
        again.close()
    }
}

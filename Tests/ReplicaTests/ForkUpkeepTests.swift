import BlockTap
import Foundation
import Glibc
import Testing

@testable import Replica

/// The bounds of an open fork, and what faults and kills leave of a seal.
@Suite struct ForkUpkeepTests {
    private static func open(_ store: ReplicaStore, sizes: [UInt64]) throws -> [ForkVolume] {
        try store.createGroup(webGroup, volumes: sizes.enumerated().map { spec("vd\($0.offset)", bytes: $0.element) })
        let writer = try store.begin(1)
        try writer.append(volume: 0, offsetBytes: 0, [UInt8](repeating: 3, count: 4096))
        let point = try writer.seal()!
        try store.fork(ForkID("f"), of: webGroup, at: point.id, purpose: "")
        return try sizes.indices.map { try store.openFork(ForkID("f"), volume: $0) }
    }

    @Test func aLongJournalIsSealedByItself() throws {
        let directory = TemporaryDirectory()
        var options = smallOptions
        options.forkJournalBytesMax = 4096
        let store = try openStore(directory, options)
        let volume = try Self.open(store, sizes: [1 << 20])[0]
        var model = try volume.image()
        var random = SeededRandom(seed: 1)
        for _ in 0..<400 {
            let start = random.below(256) * 4096
            let bytes = noise(4096, &random)
            try bytes.withUnsafeBytes { try volume.write(offsetBytes: UInt64(start), $0) }
            try volume.flush()
            model.replaceSubrange(start..<start + 4096, with: bytes)
            // As if the machine were slow enough for the store to keep up.
            try store.forkThread.perform { () throws(StoreError) in }
            #expect(volume.log.endBytes < 8192)
        }
        #expect(store.statistics().sealedForkCount > 5)
        #expect(try volume.image() == model)
        try volume.close()
        store.close()
    }

    @Test func overwrittenBlocksAreSealedAwayByThemselves() throws {
        let directory = TemporaryDirectory()
        var options = smallOptions
        options.forkDeadBytesMax = 1 << 20
        let store = try openStore(directory, options)
        let volume = try Self.open(store, sizes: [1 << 20])[0]
        var random = SeededRandom(seed: 2)
        var last: [UInt8] = []
        for _ in 0..<400 {
            last = noise(64 << 10, &random)
            try last.withUnsafeBytes { try volume.write(offsetBytes: 0, $0) }
            try volume.flush()
            try store.forkThread.perform { () throws(StoreError) in }
            #expect(try volume.open.segment.file.size() < 4 << 20)
        }
        #expect(store.statistics().sealedForkCount > 10)
        #expect(Array(try volume.image()[..<(64 << 10)]) == last)
        try volume.close()
        store.close()
    }

    /// Some neighbours become one, as upkeep does it.
    private static func merge(_ store: ReplicaStore, _ layers: [LayerRecord]) throws {
        let id = store.shared.withLock { $0.newFile() }
        let pin = store.pin({ var pin = Pin(layers); pin.layers.insert(id); return pin }())
        let merged = try LayerMerge.write(store.storage, store: store.uuid, id: id, layers: layers)
        try store.storage.syncDirectory("layers")
        #expect(try store.publish(layers.map(\.id), merged))
        store.unpin(pin)
        try store.forkThread.perform { () throws(StoreError) in }
        try store.thread.perform { () throws(StoreError) in store.collectGarbage() }
    }

    /// Whatever was written, and whatever is followed, only small layers' checksums are in memory as a whole.
    @Test func checksumsOfSealedAndMergedLayersOfAnOpenForkArePaged() throws {
        let directory = TemporaryDirectory()
        var options = smallOptions
        options.residentChecksumCountMax = 64
        options.checksumCacheBytes = 64 << 10
        let store = try openStore(directory, options)
        let volume = try Self.open(store, sizes: [1 << 20])[0]
        var random = SeededRandom(seed: 3)
        var model = try volume.image()
        for round in 0..<2 {
            let bytes = noise(150 * 4096, &random)
            try bytes.withUnsafeBytes { try volume.write(offsetBytes: UInt64(round * 100 * 4096), $0) }
            model.replaceSubrange(round * 100 * 4096..<round * 100 * 4096 + bytes.count, with: bytes)
            try store.sealFork(ForkID("f"))
            #expect(volume.map.layers.last!.count == 150 && volume.map.layers.last!.resident == nil)
        }
        #expect(try volume.image() == model)
        try Self.merge(store, Array(volume.chain.suffix(2)))
        #expect(volume.chain.count == 2 && volume.map.layers.contains { $0.layer == volume.chain[1].id && $0.count == 250 && $0.resident == nil })
        #expect(try volume.image() == model)
        #expect(try directory.files().filter { $0.hasPrefix("layers/") }.count == store.statistics().layerCount)
        try volume.close()
        store.close()
    }

    /// Layers that are hidden by others are not in an index that was read from its file: they go all the same when they are merged.
    @Test func anOpenForkLetsMergedLayersGoOfWhichItSeesNothing() throws {
        let directory = TemporaryDirectory()
        var options = smallOptions
        options.indexFileCostMin = 1
        var store = try openStore(directory, options)
        try store.createGroup(webGroup, volumes: [spec("vda", bytes: 1 << 20)])
        var random = SeededRandom(seed: 4)
        var points: [RecoveryPointID] = []
        for epoch in 1...3 {
            let writer = try store.begin(UInt64(epoch))
            try writer.append(volume: 0, offsetBytes: 0, noise(epoch * 10 * 4096, &random))
            points.append(try writer.seal()!.id)
        }
        let model = try store.image(points[2], volume: 0)
        try store.fork(ForkID("f"), of: webGroup, at: points[2], purpose: "")
        store.close()
        store = try openStore(directory, options)
        let volume = try store.openFork(ForkID("f"), volume: 0)
        #expect(volume.chain.count == 3 && volume.map.layers.count == 1)
        try store.dropRecoveryPoints(webGroup, Array(points.prefix(2)))
        try Self.merge(store, Array(volume.chain.prefix(2)))
        #expect(volume.chain.count == 2)
        #expect(try directory.files().filter { $0.hasPrefix("layers/") }.count == 2)
        #expect(try volume.image() == model)
        try volume.close()
        store.close()
    }

    /// The n-th change of a seal fails: for lack of space the fork goes on as if nothing had been, and in no case anything is lost that was
    /// promised, or promised that might be lost.
    @Test(arguments: [StoreError.full(what: "test"), .io(errno: EIO, what: "test")])
    func aFaultWithinASealLosesNothing(fault: StoreError) throws {
        var failed = 0
        for change in 1...80 {
            let directory = TemporaryDirectory()
            let storage = try FaultyStorage(directory: directory.path)
            var store = try ReplicaStore(storage: storage, options: smallOptions, logger: quiet)
            var volumes = try Self.open(store, sizes: [256 << 10, 128 << 10])
            var random = SeededRandom(seed: UInt64(change))
            func write() throws {
                for volume in volumes {
                    let bytes = noise(8192, &random)
                    try bytes.withUnsafeBytes { try volume.write(offsetBytes: UInt64(random.below(30)) * 4096, $0) }
                }
            }
            try write()
            for volume in volumes { try volume.flush() }
            try write()
            let context = Comment(rawValue: "change \(change), \(fault)")
            storage.arm(after: change, fault)
            var isSealed = true
            do { try store.sealFork(ForkID("f")) } catch { isSealed = false }
            storage.disarm()
            if !isSealed { failed += 1 }
            var expected = try volumes.map { try $0.image() }
            var promised = isSealed
            do {
                try write()
                let images = try volumes.map { try $0.image() }
                for volume in volumes { try volume.flush() }
                expected = images
                promised = true
            } catch {
                if case .full = fault { Issue.record("\(error)", sourceLocation: #_sourceLocation) }
            }
            if case .full = fault, !isSealed {
                // Nothing of the attempt is left behind.
                #expect(try directory.files().filter { $0.hasPrefix("journals/") }.count == 2, context)
                try store.sealFork(ForkID("f"))
            }
            for volume in volumes { try? volume.close() }
            volumes = []
            store.close()
            store = try openStore(directory)
            for index in 0..<2 {
                let volume = try store.openFork(ForkID("f"), volume: index)
                if promised { #expect(try volume.image() == expected[index], context) } else { _ = try volume.image() }
                try volume.close()
            }
            try store.sealFork(ForkID("f"))
            store.close()
            if isSealed, storage.changes < change { break }
            #expect(change < 80)
        }
        #expect(failed > 8)
    }

    // MARK: Kills

    static let size = 64 * 4096

    /// Writes numbers to two disks in turn, seals and makes forks of the fork for ever; what was flushed is noted, a byte per number.
    static func work(in path: String, killAfterMicroseconds: UInt32) throws -> Never {
        let store = try ReplicaStore(storage: FileStorage(directory: path + "/store"), options: smallOptions, logger: quiet)
        let log = Glibc.open(path + "/acknowledged", O_WRONLY | O_CREAT | O_APPEND, 0o600)
        var number = try String(contentsOfFile: path + "/acknowledged", encoding: .utf8).utf8.count
        let id = ForkID("f")
        try store.createGroup(webGroup, volumes: [spec("vda", bytes: UInt64(size)), spec("vdb", bytes: UInt64(size))])
        if store.recoveryPoints(webGroup).isEmpty { _ = try store.begin((store.group(webGroup)!.lastDurable?.epoch.rawValue ?? 0) + 1).seal() }
        try store.fork(id, of: webGroup, at: store.recoveryPoints(webGroup)[0].id, purpose: "")
        let volumes = try [0, 1].map { try store.openFork(id, volume: $0) }
        Thread.detachNewThread {
            usleep(killAfterMicroseconds)
            kill(getpid(), SIGKILL)
        }
        while true {
            number += 1
            for volume in volumes { try [UInt8](repeating: UInt8(truncatingIfNeeded: number), count: 4096).withUnsafeBytes { try volume.write(offsetBytes: UInt64(number % 64) * 4096, $0) } }
            switch number % 7 {
            case 0: try store.sealFork(id)
            case 3:
                let child = ForkID("c-\(number)")
                try store.fork(child, ofFork: id, purpose: "")
                for other in store.forks() where other.parentFork == id && other.id != child { try store.dropFork(other.id) }
            default: for volume in volumes { try volume.flush() }
            }
            write(log, "f", 1)
        }
    }

    @Test func whatWasFlushedOrSealedSurvivesTenKills() async throws {
        let directory = TemporaryDirectory()
        FileManager.default.createFile(atPath: directory.path + "/acknowledged", contents: nil)
        var random = SeededRandom(seed: 71)
        for round in 0..<10 {
            let path = directory.path
            let delay = UInt32(10_000 + random.below(80_000))
            await #expect(processExitsWith: .signal(SIGKILL)) { [path = path as String, delay = delay as UInt32] in try ForkUpkeepTests.work(in: path, killAfterMicroseconds: delay) }
            let acknowledged = try String(contentsOfFile: path + "/acknowledged", encoding: .utf8).utf8.count
            let store = try ReplicaStore(storage: FileStorage(directory: path + "/store"), options: smallOptions, logger: quiet)
            if store.forks().contains(where: { $0.id == ForkID("f") }) {
                for disk in 0..<2 {
                    let volume = try store.openFork(ForkID("f"), volume: disk)
                    let image = try volume.image()
                    // One more may have become durable than was noted.
                    #expect((acknowledged...acknowledged + 1).contains { count in
                        var expected = [UInt8](repeating: 0, count: Self.size)
                        if count > 0 { for number in max(1, count - 63)...count { expected.replaceSubrange((number % 64) * 4096..<(number % 64 + 1) * 4096, with: repeatElement(UInt8(truncatingIfNeeded: number), count: 4096)) } }
                        return expected == image
                    }, "round \(round), disk \(disk)")
                    try volume.close()
                }
            }
            store.close()
            // The next round goes on from what is there, whatever was noted.
        }
        #expect(try String(contentsOfFile: directory.path + "/acknowledged", encoding: .utf8).count > 10)
    }
}

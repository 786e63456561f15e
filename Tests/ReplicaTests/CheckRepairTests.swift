import BlockTap
import Foundation
import Synchronization
import Testing

@testable import Replica

/// A store with one disk whose data compresses by half, with all versions of every block that anybody may ask for.
private final class RepairScene {
    static let blockCount = 160
    static let sizeBytes = blockCount * 4096 - 3000
    let storage: any Storage
    let options: StoreOptions
    var store: ReplicaStore
    var random: SeededRandom
    var disk = [UInt8](repeating: 0, count: RepairScene.sizeBytes)
    var points: [RecoveryPointID: [UInt8]] = [:]
    private var epoch: UInt64 = 0

    init(seed: UInt64, storage: any Storage, compression: StoreCompression, isStepped: Bool = true) throws {
        var options = smallOptions
        options.isStepped = isStepped
        // A stepped store has nobody who would make room in the middle of an epoch.
        options.writeBufferCount = 64
        options.compression = compression
        options.garbageBytesMin = 1
        options.reclaimBytesMin = 1
        self.options = options
        self.storage = storage
        random = SeededRandom(seed: seed)
        store = try ReplicaStore(storage: storage, options: options, logger: quiet)
        try store.createGroup(webGroup, volumes: [spec("vda", bytes: UInt64(Self.sizeBytes))])
    }

    func reopen() throws {
        store.close()
        store = try ReplicaStore(storage: storage, options: options, logger: quiet)
    }

    /// The whole disk, or some extents.
    func receive(_ extents: Int = 4, all: Bool = false) throws {
        epoch += 1
        let writer = try store.begin(epoch)
        for _ in 0..<(all ? 1 : extents) {
            let start = all ? 0 : random.below(Self.blockCount)
            let count = all ? Self.blockCount : 1 + random.below(min(24, Self.blockCount - start))
            let range = start * 4096..<min(Self.sizeBytes, (start + count) * 4096)
            var bytes: [UInt8] = []
            while bytes.count < range.count {
                // Blocks that compress beside some that do not.
                bytes += random.below(3) == 0 ? noise(4096, &random) : noise(1024, &random) + [UInt8](repeating: UInt8(random.below(256)), count: 3072)
            }
            bytes.removeLast(bytes.count - range.count)
            try writer.append(volume: 0, offsetBytes: UInt64(range.lowerBound), bytes)
            disk.replaceSubrange(range, with: bytes)
        }
        let point = options.isStepped ? try CheckBitFlipTests.sealStepped(store, writer) : try writer.seal()
        points[point!.id] = disk
    }

    func block(_ block: UInt64, of image: [UInt8]) -> [UInt8] { Array(image[Int(block) * 4096..<min(image.count, Int(block + 1) * 4096)]) }

    /// The bytes that are wanted, as some recovery point had them.
    func bytes(_ wanted: WantedBlock) -> [UInt8]? {
        for image in points.values {
            let bytes = block(wanted.block, of: image)
            if bytes.count == wanted.byteCount, bytes.withUnsafeBytes({ BlockChecksum.of($0.baseAddress!, count: $0.count, blockIndex: wanted.block) }) == wanted.checksum { return bytes }
        }
        return nil
    }

    func scrub() { while case .read? = store.scrubStep() {} }

    /// All that is wanted, from the model. Returns how many blocks are right again.
    func repairAll() throws -> Int {
        let wanted = store.wantedBlocks(webGroup, limit: .max)
        return try store.repair(webGroup, wanted.map { ($0, try #require(bytes($0), "block \($0.block) of layer \($0.layer)")) }).count
    }

    /// Every kept point is exact; with `allowsErrors` a block that is not is an error.
    func check(_ comment: String = "", allowsErrors: Bool = false) throws {
        var block = [UInt8](repeating: 0, count: 4096)
        for point in store.recoveryPoints(webGroup) {
            let image = try #require(points[point.id])
            let reader = try store.openRecoveryPoint(webGroup, point.id, volume: 0)
            for start in stride(from: 0, to: image.count, by: 4096) {
                let count = min(4096, image.count - start)
                do {
                    try block.withUnsafeMutableBytes { try reader.read(offsetBytes: UInt64(start), into: UnsafeMutableRawBufferPointer(rebasing: $0[..<count])) }
                } catch {
                    if allowsErrors, case .badBlock = error as? StoreError { continue }
                    Issue.record("\(comment): \(point.id), block \(start / 4096): \(error)")
                    return
                }
                if block[..<count] != image[start..<start + count] {
                    Issue.record("\(comment): \(point.id), block \(start / 4096) is wrong")
                    return
                }
            }
        }
    }

    /// What is there is named, and nothing is missing or damaged.
    func checkClean(_ comment: String = "") throws {
        try reopen()
        let report = try StoreCheck.run(storage, readsData: true)
        #expect(report.isClean && report.unnamedFiles.isEmpty, "\(comment): \(report.damages.prefix(3)) \(report.badExtents.prefix(3)) \(report.unnamedFiles)")
    }

    /// Where data of the state's layers lies.
    func places() throws -> [(path: String, byte: Int)] {
        var all: [(String, Int)] = []
        for layer in store.read({ $0.layers.values.sorted { $0.id < $1.id } }) {
            try LayerReader(storage, store: store.uuid, record: layer).forEachExtents { extents in
                for extent in extents where !extent.isZero {
                    for block in 0..<extent.segmentBlockCount { all.append((SegmentFile.path(extent.segment), Int(extent.segmentBlock + block) * 4096)) }
                }
            }
        }
        return all
    }
}

/// Repair against everything else that goes on, crashes and disks that fail.
@Suite(.timeLimit(.minutes(10))) struct CheckRepairTests {
    /// Blocks of a compressed cluster are put right one by one, and those that are left stay known.
    @Test(arguments: [StoreCompression.lz4, .zstd]) func blocksOfACompressedClusterMoveOut(compression: StoreCompression) throws {
        let storage = MemoryStorage()
        let scene = try RepairScene(seed: 1, storage: storage, compression: compression)
        try scene.receive(all: true)
        try scene.receive()
        let layer = try #require(scene.store.read { $0.layers.keys.min() })
        let record = try #require(scene.store.read { $0.layers[layer] })
        nonisolated(unsafe) var found: StoredExtent?
        try LayerReader(storage, store: scene.store.uuid, record: record).forEachExtents { extents in found = found ?? extents.first { $0.isCompressed && $0.blockCount > 4 } }
        let cluster = try #require(found)
        // Its header: nothing of it can be decompressed.
        storage.flip(SegmentFile.path(cluster.segment), byte: Int(cluster.segmentBlock) * 4096 + 5)
        scene.scrub()
        let wanted = scene.store.wantedBlocks(webGroup, limit: 64)
        #expect(wanted.map(\.block) == Array(cluster.startBlock..<cluster.endBlock))
        let middle = wanted[2]
        #expect(try scene.store.repair(webGroup, [(middle, try #require(scene.bytes(middle)))]) == [middle])
        // The layer is another one now; the rest of the cluster is as bad as it was.
        #expect(scene.store.read { $0.layers[layer] } == nil)
        let left = scene.store.wantedBlocks(webGroup, limit: 64)
        #expect(left.map(\.block) == wanted.map(\.block).filter { $0 != middle.block } && left.allSatisfy { $0.layer != layer })
        #expect(scene.store.statistics().scrub.badBlockCount == UInt64(left.count))
        try scene.check("one of them", allowsErrors: true)
        let first = try #require(scene.store.recoveryPoints(webGroup).first)
        let reader = try scene.store.openRecoveryPoint(webGroup, first.id, volume: 0)
        var bytes = [UInt8](repeating: 0, count: 4096)
        try bytes.withUnsafeMutableBytes { try reader.read(offsetBytes: middle.block * 4096, into: $0) }
        #expect(bytes == scene.block(middle.block, of: scene.points[first.id]!))
        scene.scrub()
        #expect(scene.store.wantedBlocks(webGroup, limit: 64).map(\.block) == left.map(\.block), "a pass finds the same")
        #expect(try scene.repairAll() == left.count)
        #expect(scene.store.badExtents().isEmpty)
        try scene.check("all of them")
        scene.scrub()
        #expect(scene.store.badExtents().isEmpty)
        try scene.checkClean()
        scene.store.close()
    }

    /// Anything in the data, in a store with merged layers and parts of clusters: repaired, all of it is as it was.
    @Test(arguments: [StoreCompression.lz4, .zstd, .none]) func whateverRotsInTheDataIsRepaired(compression: StoreCompression) throws {
        for seed in 0..<12 as Range<UInt64> {
            let storage = MemoryStorage()
            let scene = try RepairScene(seed: seed, storage: storage, compression: compression)
            try scene.receive(all: true)
            for round in 0..<8 {
                try scene.receive()
                if round % 3 == 2 {
                    try scene.store.dropRecoveryPoints(webGroup, [scene.store.recoveryPoints(webGroup)[1].id])
                    while try scene.store.upkeepStep() != nil {}
                }
            }
            let places = try scene.places()
            for _ in 0..<20 {
                let place = places[scene.random.below(places.count)]
                storage.flip(place.path, byte: place.byte + scene.random.below(4096), bit: UInt8(scene.random.below(8)))
            }
            try scene.check("seed \(seed), damaged", allowsErrors: true)
            scene.scrub()
            let known = scene.store.statistics().scrub.badBlockCount
            let repaired = try UInt64(scene.repairAll())
            #expect(known > 0 && repaired == known, "seed \(seed)")
            #expect(scene.store.badExtents().isEmpty)
            try scene.check("seed \(seed), repaired")
            try scene.checkClean("seed \(seed)")
            // Upkeep minds what repair has made.
            try scene.store.dropRecoveryPoints(webGroup, scene.store.recoveryPoints(webGroup).dropLast(2).map(\.id))
            while try scene.store.upkeepStep() != nil {}
            try scene.check("seed \(seed), after upkeep")
            try scene.checkClean("seed \(seed), after upkeep")
            scene.store.close()
        }
    }

    /// The layers that were asked about are gone when the answer comes, or go while it is being put in place.
    @Test(arguments: [StoreCompression.lz4, .none], [false, true]) func layersThatAreMergedMeanwhileAreLeftAlone(compression: StoreCompression, isDuring: Bool) throws {
        let memory = MemoryStorage()
        let storage = HookedStorage(memory)
        let scene = try RepairScene(seed: 7, storage: storage, compression: compression)
        try scene.receive(all: true)
        for _ in 0..<4 { try scene.receive() }
        for place in try scene.places().prefix(6) { memory.flip(place.path, byte: place.byte + 11, bit: 3) }
        scene.scrub()
        let wanted = scene.store.wantedBlocks(webGroup, limit: .max)
        #expect(!wanted.isEmpty)
        let answer = try wanted.map { ($0, try #require(scene.bytes($0))) }
        let ids = scene.store.recoveryPoints(webGroup).map(\.id)
        let store = scene.store
        @Sendable func merge() throws(StoreError) {
            try store.dropRecoveryPoints(webGroup, Array(ids.dropLast()))
            let layers = store.read { state in state.chain(state.groups[webGroup]!.volumes[0].top) }
            let merged = try LayerMerge.write(storage, store: store.uuid, id: store.shared.withLock { $0.newFile() }, layers: layers)
            _ = try store.publish(layers.map(\.id), merged)
        }
        if isDuring {
            // As the repaired layer is about to be named, or when bytes are about to be written in place.
            let isMerged = Mutex(false)
            storage.onStep { step throws(StoreError) in
                let isMoment = if case .syncDirectory("segments") = step { true } else if case .write(let path, let offset) = step { path.hasPrefix("segments/") && offset > 0 } else { false }
                guard isMoment, !isMerged.withLock({ was in
                    defer { was = true }
                    return was
                }) else { return }
                try merge()
            }
        } else {
            try merge()
        }
        let repaired = try scene.store.repair(webGroup, answer)
        storage.onStep(nil)
        if !isDuring { #expect(repaired.isEmpty) }
        try scene.check("merged meanwhile", allowsErrors: true)
        scene.scrub()
        _ = try scene.repairAll()
        #expect(scene.store.badExtents().isEmpty)
        try scene.check("after the next pass")
        try scene.checkClean()
        scene.store.close()
    }

    /// One change of a repair after the other fails, and all after it: nothing is lost that was right, and the next start repairs the rest.
    @Test(arguments: [StoreCompression.lz4, .none], [StoreError.io(errno: 5, what: "broken"), .full(what: "no space")])
    func aFailureAtAnyStepOfARepairLosesNothing(compression: StoreCompression, fault: StoreError) throws {
        var stepCount = 0
        for after in 0... {
            let memory = MemoryStorage()
            let storage = HookedStorage(memory)
            let scene = try RepairScene(seed: 9, storage: storage, compression: compression)
            try scene.receive(all: true)
            try scene.receive()
            let places = try scene.places()
            for index in 0..<6 { memory.flip(places[index * 7].path, byte: places[index * 7].byte + 500, bit: 1) }
            scene.scrub()
            let wanted = scene.store.wantedBlocks(webGroup, limit: .max)
            let damaged = memory.files
            let answer = try wanted.map { ($0, try #require(scene.bytes($0))) }
            let left = Mutex(after)
            storage.onStep { step throws(StoreError) in
                guard step.isChange else { return }
                let fails = left.withLock { left in
                    left -= 1
                    return left < 0
                }
                if fails { throw fault }
            }
            let repaired = (try? scene.store.repair(webGroup, answer)) ?? []
            storage.onStep(nil)
            #expect(damaged.keys.allSatisfy { memory.files[$0] != nil || !$0.hasPrefix("segments/") })
            try scene.check("step \(after), at once", allowsErrors: true)
            try scene.reopen()
            try scene.check("step \(after), opened again", allowsErrors: true)
            scene.scrub()
            _ = try scene.repairAll()
            try scene.check("step \(after), repaired")
            try scene.checkClean("step \(after)")
            scene.store.close()
            stepCount = after
            if left.withLock({ $0 }) >= 0 {
                #expect(repaired.count == wanted.count)
                break
            }
        }
        #expect(stepCount > 3)
    }

    /// What could not be read for a moment only is not written over.
    @Test(arguments: [StoreCompression.lz4, .none]) func whatWasOnlyUnreadableForAMomentIsLeftAsItIs(compression: StoreCompression) throws {
        let memory = MemoryStorage()
        let storage = HookedStorage(memory)
        let scene = try RepairScene(seed: 11, storage: storage, compression: compression)
        try scene.receive(all: true)
        let place = try scene.places()[40]
        storage.onStep { step throws(StoreError) in
            if case .read(place.path, _) = step { throw .io(errno: 5, what: "cannot read") }
        }
        scene.scrub()
        storage.onStep(nil)
        let known = scene.store.statistics().scrub.badBlockCount
        #expect(known > 0)
        let before = memory.files[place.path]
        let repaired = try UInt64(scene.repairAll())
        #expect(repaired == known)
        #expect(memory.files[place.path] == before)
        try scene.check()
        try scene.checkClean()
        scene.store.close()
    }

    /// On real files: data rots and is repaired while epochs arrive, points go, layers are merged, holes punched and segments evacuated.
    @Test(arguments: [StoreCompression.lz4, .none]) func repairBesideUpkeep(compression: StoreCompression) throws {
        let directory = TemporaryDirectory()
        let scene = try RepairScene(seed: 21, storage: FileStorage(directory: directory.path), compression: compression, isStepped: false)
        try scene.receive(all: true)
        scene.store.startUpkeep(everySeconds: 0.001, bytesPerSecond: 0)
        var repaired = 0
        for round in 0..<60 {
            try scene.receive(6)
            let points = scene.store.recoveryPoints(webGroup)
            if points.count > 6 {
                let gone = points.dropLast().filter { _ in scene.random.below(2) == 0 }.map(\.id)
                try scene.store.dropRecoveryPoints(webGroup, gone)
            }
            // Layers may go while they are looked at.
            if round % 2 == 0, let places = try? scene.places(), !places.isEmpty {
                for _ in 0..<4 {
                    let place = places[scene.random.below(places.count)]
                    let file = open(directory.path + "/" + place.path, O_RDWR)
                    if file < 0 { continue }
                    var byte: UInt8 = 0
                    if pread(file, &byte, 1, off_t(place.byte + 8)) == 1 {
                        byte ^= 0x40
                        pwrite(file, &byte, 1, off_t(place.byte + 8))
                    }
                    close(file)
                }
            }
            scene.scrub()
            repaired += try scene.repairAll()
            try scene.check("round \(round)", allowsErrors: true)
        }
        #expect(repaired > 20)
        // What was merged between a question and its answer is found by the next pass.
        for _ in 0..<10 {
            scene.scrub()
            if scene.store.badExtents().isEmpty { break }
            _ = try scene.repairAll()
        }
        try scene.check("at the end")
        try scene.checkClean()
        let statistics = scene.store.statistics()
        scene.store.close()
        #expect(statistics.layerCount > 0)
    }
}

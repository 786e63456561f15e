import BlockTap
import Foundation
import Testing

@testable import Replica
@testable import StoreSimulation

extension IndexSnapshot {
    /// Block by block: where its data is and what it hashes to.
    func blocks(_ count: Int, sums: (UInt64) -> [UInt64]) -> [ModelBlock?] {
        var all = [ModelBlock?](repeating: nil, count: count)
        var cached: [UInt64: [UInt64]] = [:]
        for extent in index.extents {
            let layer = layers[Int(extent.slot)].layer
            if cached[layer] == nil { cached[layer] = sums(layer) }
            for place in 0..<Int(extent.blockCount) {
                let part = extent.cluster
                all[Int(extent.startBlock) + place] = ModelBlock(
                    segment: extent.segment, segmentBlock: extent.segmentBlock + (part.isCompressed ? 0 : UInt32(place)), storedBlocks: part.storedBlocks,
                    clusterBlocks: part.isCompressed ? part.blockCount : 0, clusterPlace: part.isCompressed ? part.skip + place : 0,
                    sum: cached[layer]![Int(extent.checksumIndex) + place])
            }
        }
        return all
    }
}

@Suite struct IndexRebaseTests {
    let directory = TemporaryDirectory()
    static let blocks = 600

    /// Layers of one volume as files and as plain arrays, and the snapshot that follows them.
    final class Chain {
        let storage: FileStorage
        var records: [LayerRecord] = []
        var models: [ModelLayer] = []
        var snapshot = IndexSnapshot()
        var nextID: UInt64 = 1

        init(_ path: String) throws {
            storage = try FileStorage(directory: path)
            try storage.createDirectory("layers")
        }

        func checksums(_ record: LayerRecord) throws -> LayerChecksums { try LayerFile.load(storage, store: LayerModel.uuid, record: record).checksums }

        func sums(_ id: UInt64) -> [UInt64] {
            let record = records.first { $0.id == id }!
            let reader = try! LayerReader(storage, store: LayerModel.uuid, record: record)
            var sums = [UInt64](repeating: 0, count: reader.checksumCount)
            try! sums.withUnsafeMutableBufferPointer { if $0.count > 0 { try reader.readChecksums(0..<$0.count, into: $0.baseAddress!) } }
            return sums
        }

        func seal(writes: Int, _ random: inout SeededRandom) throws {
            let (extents, sums, model) = LayerModel.random(blocks: blocks, writes: writes, segment: UInt32(nextID), &random)
            let written = try sums.withUnsafeBufferPointer {
                try LayerFile.write(storage, store: LayerModel.uuid, identity: LayerModel.identity(nextID, parent: records.last?.id ?? 0, blocks: blocks), extents: extents, sums: $0, isSynced: false)
            }
            records.append(written.record(parent: records.last?.id ?? 0))
            models.append(model)
            try snapshot.apply(written.extents, written.checksums)
            nextID += 1
        }

        func merge(_ range: Range<Int>) throws -> (replaced: [UInt64], reader: LayerReader, LayerChecksums) {
            let run = Array(records[range])
            let record = try LayerMerge.write(storage, store: LayerModel.uuid, id: nextID, layers: run)
            nextID += 1
            let model = models[range].dropFirst().reduce(models[range.lowerBound]) { LayerModel.over($1, $0) }
            records.replaceSubrange(range, with: [record])
            models.replaceSubrange(range, with: [model])
            if range.lowerBound + 1 < records.count { records[range.lowerBound + 1].parent = record.id }
            for old in run { try storage.remove(LayerFile.path(old.id)) }
            return (run.map(\.id), try LayerReader(storage, store: LayerModel.uuid, record: record), try checksums(record))
        }

        /// What all layers say one over the other.
        var model: [ModelBlock?] {
            models.reduce(ModelLayer(repeating: nil, count: blocks)) { LayerModel.over($1, $0) }.map { $0 ?? nil }
        }

        var blocks: Int { IndexRebaseTests.blocks }
    }

    @Test(arguments: [1, 2, 3, 4, 5, 6] as [UInt64])
    func aSnapshotFollowsMergesOfItsLayers(seed: UInt64) throws {
        var random = SeededRandom(seed: seed)
        let chain = try Chain(directory.path)
        for _ in 0..<120 {
            for _ in 0...random.below(4) { try chain.seal(writes: random.below(25), &random) }
            // One that ends below is not touched, one that ends among the replaced is refused.
            let start = random.below(chain.records.count)
            let count = min(chain.records.count - start, 1 + random.below(6))
            let inner = chain.records[start..<start + count].map(\.id)
            let (replaced, reader, checksums) = try chain.merge(start..<start + count)
            #expect(replaced == inner)
            #expect(try chain.snapshot.rebase(replaced: replaced, by: reader, checksums))
            #expect(chain.snapshot.index.isConsistent)
            #expect(chain.snapshot.covered(of: chain.records) == chain.records.count)
            #expect(chain.snapshot.blocks(chain.blocks, sums: chain.sums) == chain.model, "seed \(seed)")
        }
    }

    @Test func slotsStayBoundedByTheLiveLayersForThousandsOfEpochs() throws {
        var random = SeededRandom(seed: 21)
        let chain = try Chain(directory.path)
        var most = 0
        for epoch in 1...6000 {
            try chain.seal(writes: 3, &random)
            if chain.records.count > 24 {
                let start = random.below(12)
                let (replaced, reader, checksums) = try chain.merge(start..<start + 12)
                #expect(try chain.snapshot.rebase(replaced: replaced, by: reader, checksums))
            }
            most = max(most, chain.snapshot.layers.count)
            if epoch % 1000 == 0 { #expect(chain.snapshot.blocks(chain.blocks, sums: chain.sums) == chain.model) }
        }
        #expect(most <= 26)
    }

    @Test func aSnapshotThatEndsAmongTheReplacedLayersIsGivenUp() throws {
        var random = SeededRandom(seed: 5)
        let chain = try Chain(directory.path)
        var snapshots = [chain.snapshot]
        for _ in 0..<8 {
            try chain.seal(writes: 10, &random)
            snapshots.append(chain.snapshot)
        }
        let (replaced, reader, checksums) = try chain.merge(2..<6)
        for (covered, snapshot) in snapshots.enumerated() {
            var snapshot = snapshot
            let isGood = try snapshot.rebase(replaced: replaced, by: reader, checksums)
            #expect(isGood == !(3...5).contains(covered))
            if isGood { #expect(snapshot.covered(of: chain.records) == (covered <= 2 ? covered : covered - 3)) }
        }
        // Before it follows the merge it is no snapshot of the chain.
        #expect(snapshots[8].covered(of: chain.records) == nil)
    }

    @Test func slotsThatRunOutAreTakenFromLayersThatNothingIsSeenOf() throws {
        var random = SeededRandom(seed: 6)
        let chain = try Chain(directory.path)
        chain.snapshot.slotsMax = 8
        func cover(_ start: Int, _ count: Int) throws {
            let sums = (0..<count).map { _ in random.next() }
            let extent = StoredExtent(startBlock: UInt64(start), blockCount: UInt32(count), segment: 9, segmentBlock: 1, checksumIndex: 0, storedBytes: UInt32(count) * 4096, encoding: 0)
            let record = try LayerModel.write(chain.storage, chain.nextID, parent: chain.records.last?.id ?? 0, blocks: chain.blocks, [extent], sums)
            chain.records.append(record)
            chain.nextID += 1
            try chain.snapshot.apply([extent], try chain.checksums(record))
        }
        for _ in 0..<30 { try cover(0, 10) }
        #expect(chain.snapshot.layers.count == 8 && chain.snapshot.covered(of: chain.records) == 30)
        for index in 1..<8 { try cover(index * 20, 3) }
        let before = chain.snapshot
        #expect(throws: StoreError.self) { try cover(400, 1) }
        #expect(chain.snapshot.index.extents == before.index.extents && chain.snapshot.top == before.top)
    }
}

/// The cache of a store follows what happens to its layers.
@Suite struct IndexCacheTests {
    let directory = TemporaryDirectory()
    static let size = 200 * 4096

    /// Merges layers `range` of the newest chain, as upkeep does.
    static func merge(_ store: ReplicaStore, _ range: Range<Int>) throws {
        try store.thread.perform { () throws(StoreError) in
            let run = Array(store.read { $0.chain($0.groups[webGroup]!.volumes[0].top) }[range])
            let id = store.shared.withLock { $0.newFile() }
            let layer = try LayerMerge.write(store.storage, store: store.uuid, id: id, layers: run)
            try store.storage.syncDirectory("layers")
            try store.change(.layersMerged(replaced: run.map(\.id), by: layer))
            store.indexes.merged(replaced: run.map(\.id), by: layer)
            store.collectGarbage()
        }
    }

    final class Run {
        let store: ReplicaStore
        var model = [UInt8](repeating: 0, count: IndexCacheTests.size)
        var random: SeededRandom
        var epoch: UInt64
        var points: [(RecoveryPointID, [UInt8])] = []

        init(_ store: ReplicaStore, seed: UInt64, epoch: UInt64 = 0) throws {
            self.store = store
            self.epoch = epoch
            random = SeededRandom(seed: seed)
            try store.createGroup(webGroup, volumes: [spec("vda", bytes: UInt64(IndexCacheTests.size))])
        }

        func receive(isPoint: Bool = false) throws {
            epoch += 1
            let writer = try store.begin(epoch, isPoint ? .exact : .fuzzy)
            for _ in 0...random.below(5) {
                let start = random.below(195)
                let count = 1 + random.below(5)
                if random.below(4) == 0 {
                    try writer.zero(volume: 0, offsetBytes: UInt64(start) * 4096, lengthBytes: UInt64(count) * 4096)
                    model.replaceSubrange(start * 4096..<(start + count) * 4096, with: repeatElement(0, count: count * 4096))
                } else {
                    let bytes = noise(count * 4096, &random)
                    try writer.append(volume: 0, offsetBytes: UInt64(start) * 4096, bytes)
                    model.replaceSubrange(start * 4096..<(start + count) * 4096, with: bytes)
                }
            }
            let done = Replica.Semaphore()
            nonisolated(unsafe) var result: Result<RecoveryPoint?, StoreError>!
            writer.seal(consistency: .crash) {
                result = $0
                done.signal()
            }
            if store.options.isStepped { store.thread.runQueued() } else { done.wait() }
            if let point = try result.get() { points.append((point.id, model)) }
        }

        var chain: [LayerRecord] { store.read { $0.chain($0.groups[webGroup]!.volumes[0].top) } }

        /// The longest run of layers that no recovery point separates, when it has more than `count`.
        func mergeable(_ count: Int) -> Range<Int>? {
            let named = Set(store.read { $0.tops })
            var start = 0
            for (index, layer) in chain.enumerated() {
                if index + 1 - start > count { return start..<index + 1 }
                if named.contains(layer.id) { start = index + 1 }
            }
            return nil
        }
    }

    @Test func whatTheCacheHoldsFollowsMergesAndRestarts() throws {
        // In the task and in the background; with and without a file.
        for (seed, (extentsMax, costMin)) in [(200_000, 100_000), (0, 100_000), (200_000, 1), (0, 1)].enumerated() {
            var options = smallOptions
            options.isStepped = true
            options.writeBufferCount = 4096
            options.rebaseExtentsMax = extentsMax
            options.indexFileCostMin = costMin
            let storage = SimulatedStorage(seed: UInt64(seed))
            var run = try Run(ReplicaStore(storage: storage, options: options, logger: quiet), seed: UInt64(seed + 1))
            var most = 0
            for step in 1...700 {
                try run.receive(isPoint: run.random.below(20) == 0)
                most = max(most, run.chain.count)
                if run.random.below(4) == 0, let range = run.mergeable(6) {
                    try Self.merge(run.store, range)
                    run.store.thread.runQueued()
                }
                let top = run.chain.last!.id
                #expect(run.store.indexes.covers(webGroup, 0, top: top), "step \(step)")
                #expect(run.store.indexes.nearest(webGroup, 0, chain: run.chain).1 == run.chain.count, "step \(step)")
                #expect(run.store.indexes.slotCount(webGroup, 0)! <= most + 1, "step \(step)")
                if step % 50 == 0 {
                    for (id, image) in run.points.suffix(6) { #expect(try run.store.image(id, volume: 0) == image, "seed \(seed), step \(step)") }
                }
                if step % 350 == 0 {
                    let old = run
                    run.store.close()
                    storage.restart(powerLost: false)
                    run = try Run(ReplicaStore(storage: storage, options: options, logger: quiet), seed: UInt64(seed + 100), epoch: old.epoch)
                    (run.model, run.points) = (old.model, old.points)
                    for (id, image) in run.points { #expect(try run.store.image(id, volume: 0) == image, "seed \(seed), step \(step)") }
                }
            }
            #expect(most < 400)
            run.store.close()
        }
    }

    /// Layers are merged while readers that began before read on, and while epochs come.
    @Test func openersAndEpochsMeetMerges() throws {
        var options = smallOptions
        options.rebaseExtentsMax = 0
        options.indexFileCostMin = 1
        let run = try Run(try openStore(directory, options), seed: 3)
        var readers: [(VolumeReader, [UInt8])] = []
        for step in 1...150 {
            try run.receive(isPoint: step % 10 == 0)
            if step % 7 == 0, let range = run.mergeable(3) { try Self.merge(run.store, range) }
            if step % 10 == 0, let (id, image) = run.points.randomElement(using: &run.random) {
                readers.append((try run.store.openRecoveryPoint(webGroup, id, volume: 0), image))
            }
            if step % 25 == 0 {
                for (reader, image) in readers {
                    var bytes = [UInt8](repeating: 1, count: Self.size)
                    try bytes.withUnsafeMutableBytes { try reader.read(offsetBytes: 0, into: $0) }
                    #expect(bytes == image)
                }
                readers.removeFirst(readers.count / 2)
            }
        }
        for (id, image) in run.points { #expect(try run.store.image(id, volume: 0) == image) }
        try run.store.background.perform {}
        try run.store.thread.perform {}
        #expect(run.store.indexes.covers(webGroup, 0, top: run.chain.last!.id))
        readers = []
        run.store.close()
    }

    @Test func aSnapshotThatIsBehindIsBroughtForward() throws {
        var options = smallOptions
        options.isStepped = true
        options.writeBufferCount = 4096
        let storage = SimulatedStorage(seed: 1)
        let run = try Run(ReplicaStore(storage: storage, options: options, logger: quiet), seed: 9)
        for _ in 0..<10 { try run.receive() }
        let store = run.store
        let behind = try store.merge(webGroup, 0, chain: Array(run.chain.dropLast(3)))
        store.indexes.remove(webGroup, volumeCount: 1)
        store.indexes.offer(webGroup, 0, behind, chain: run.chain)
        #expect(store.indexes.nearest(webGroup, 0, chain: run.chain).1 == run.chain.count - 3)
        // What is less far does not take its place.
        store.indexes.offer(webGroup, 0, try store.merge(webGroup, 0, chain: Array(run.chain.dropLast(5))), chain: run.chain)
        #expect(store.indexes.nearest(webGroup, 0, chain: run.chain).1 == run.chain.count - 3)
        try run.receive(isPoint: true)
        store.thread.runQueued()
        #expect(store.indexes.covers(webGroup, 0, top: run.chain.last!.id))
        #expect(try store.image(run.points[0].0, volume: 0) == run.model)
        store.close()
    }
}

/// Merged indexes on disk.
@Suite struct IndexFileTests {
    let directory = TemporaryDirectory()

    func options(costMin: Int) -> StoreOptions {
        var options = smallOptions
        options.indexFileCostMin = costMin
        return options
    }

    func indexFiles() throws -> [String] { try directory.files().filter { $0.hasPrefix("indexes/") } }

    @Test func theNewestAndOlderPointsOpenFromTheFileBelowThem() throws {
        var run = try IndexCacheTests.Run(try openStore(directory, options(costMin: 100_000)), seed: 1)
        for step in 1...60 { try run.receive(isPoint: step % 20 == 0) }
        run.store.close()
        #expect(try indexFiles() == [])
        let (model, points, epoch) = (run.model, run.points, run.epoch)
        run = try IndexCacheTests.Run(try openStore(directory, options(costMin: 30 * 200)), seed: 2, epoch: epoch)
        for (id, image) in points {
            #expect(try run.store.image(id, volume: 0) == image)
            // What it writes in the background the next one opens from.
            try run.store.background.perform {}
        }
        // The first lay below the minimum, the last is near the second.
        let top = run.store.read { $0.groups[webGroup]!.points[1].volumes[0].top }
        #expect(try indexFiles() == [IndexFile.path(top)])
        let chain = run.store.read { $0.chain(top) }
        let read = run.store.readIndexFile(chain)
        let merged = try run.store.merge(webGroup, 0, chain: chain)
        #expect(read?.covered(of: chain) == chain.count && read?.index.count == merged.index.count)
        (run.model, run.points) = (model, points)
        try run.receive(isPoint: true)
        run.store.close()
        let store = try openStore(directory, options(costMin: 1))
        for (id, image) in run.points { #expect(try store.image(id, volume: 0) == image) }
        // Whatever names them is gone.
        try store.deleteGroup(webGroup)
        #expect(try indexFiles() == [])
        store.close()
    }

    @Test func aDamagedFileIsNoticedAndMadeAnew() throws {
        var random = SeededRandom(seed: 7)
        let run = try IndexCacheTests.Run(try openStore(directory, options(costMin: 1)), seed: 4)
        for step in 1...40 { try run.receive(isPoint: step == 40) }
        let (id, image) = run.points[0]
        let top = run.chain.last!.id
        let path = directory.path + "/" + IndexFile.path(top)
        run.store.close()
        let good = try Data(contentsOf: URL(fileURLWithPath: path))
        #expect(good.count > 4096 + IndexFile.pageBytes)
        var store = try openStore(directory, options(costMin: 1))
        let extents = store.readIndexFile(run.chain)!.index.extents
        store.close()
        for round in 0..<300 {
            var bad = good
            switch round % 3 {
            case 0: bad[random.below(bad.count)] ^= 1 << UInt8(random.below(8))
            case 1: bad = bad.prefix(random.below(bad.count))
            default:
                // Torn: a page that never came.
                let page = random.below((bad.count + 4095) / 4096) * 4096
                bad.replaceSubrange(page..<min(bad.count, page + 4096), with: repeatElement(0, count: min(4096, bad.count - page)))
            }
            try bad.write(to: URL(fileURLWithPath: path))
            if round % 20 == 0 {
                store = try openStore(directory, options(costMin: 1))
                #expect(try store.image(id, volume: 0) == image)
                store.close()
                // It was made anew, unless nothing of the damage mattered.
                #expect(store.indexes.hasFile(top))
            }
            try bad.write(to: URL(fileURLWithPath: path))
            let storage = try FileStorage(directory: directory.path)
            let read = try? IndexFile.read(storage, store: store.uuid, chain: run.chain) { record throws(StoreError) in
                try LayerFile.load(storage, store: store.uuid, record: record).checksums
            }
            // Only padding may differ unnoticed.
            if let read { #expect(read.index.extents == extents) }
            if round % 3 == 1 { #expect(read == nil) }
        }
    }

    @Test func aFileOfLayersThatWereMergedIsOfNoUse() throws {
        let run = try IndexCacheTests.Run(try openStore(directory, options(costMin: 1)), seed: 5)
        for step in 1...30 { try run.receive(isPoint: step == 30) }
        let top = run.chain.last!.id
        _ = try run.store.merge(webGroup, 0, chain: run.chain)
        run.store.indexes.remove(webGroup, volumeCount: 1)
        _ = try run.store.merge(webGroup, 0, chain: run.chain)
        try run.store.background.perform {}
        #expect(run.store.indexes.hasFile(top))
        try IndexCacheTests.merge(run.store, 3..<9)
        #expect(!run.store.indexes.hasFile(top))
        #expect(run.store.readIndexFile(run.chain) == nil)
        #expect(try run.store.image(run.points[0].0, volume: 0) == run.model)
        run.store.close()
    }

    /// The power goes, or the disk is full, while one is written: nothing but a slower opening.
    /// Its top layer may live for long.
    @Test func aFileOfLayersThatWereMergedIsRemoved() throws {
        let directory = TemporaryDirectory()
        var options = smallOptions
        options.indexFileCostMin = 1
        let scene = try UpkeepScene(seed: 12, storage: FileStorage(directory: directory.path), blockCount: 512, options: options)
        for _ in 0..<40 { try scene.receive(extents: 6, blocksMax: 8) }
        let points = scene.store.recoveryPoints(webGroup).map(\.id)
        for id in points[30...35] { try scene.check(id) }
        try scene.store.background.perform { () throws(StoreError) in }
        let before = scene.store.indexes.files
        #expect(before.count > 6)
        try scene.store.dropRecoveryPoints(webGroup, Array(points[..<30]))
        try scene.upkeep()
        try scene.store.background.perform { () throws(StoreError) in }
        let after = scene.store.indexes.files
        #expect(after.count < before.count)
        #expect(try scene.storage.list("indexes").sorted() == after.map { "\(fileNumber($0)).index" }.sorted())
        try scene.check()
        scene.store.close()
    }

    @Test func aFileThatWasNeverFinishedDoesNoHarm() throws {
        for seed in 1...30 as ClosedRange<UInt64> {
            var options = options(costMin: 1)
            options.isStepped = true
            options.writeBufferCount = 4096
            let storage = SimulatedStorage(seed: seed)
            let run = try IndexCacheTests.Run(ReplicaStore(storage: storage, options: options, logger: quiet), seed: seed)
            for step in 1...12 { try run.receive(isPoint: step == 12) }
            run.store.indexes.remove(webGroup, volumeCount: 1)
            _ = try run.store.merge(webGroup, 0, chain: run.chain)
            if seed % 3 == 0 { storage.faults.isFull = true } else { storage.operationsUntilDown = Int(seed % 7) }
            run.store.thread.runQueued()
            storage.faults.isFull = false
            run.store.close()
            storage.restart(powerLost: true)
            let store = try ReplicaStore(storage: storage, options: options, logger: quiet)
            for _ in 1...2 { #expect(try store.image(run.points[0].0, volume: 0) == run.model, "seed \(seed)") }
            store.close()
        }
    }
}

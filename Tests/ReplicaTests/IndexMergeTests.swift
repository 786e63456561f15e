import BlockTap
import Foundation
import Testing

@testable import Replica
@testable import StoreSimulation

/// What one block of a volume is: where its data lies and what it hashes to.
struct ModelBlock: Equatable {
    var segment: UInt32
    /// Of a plain block: its own place. Of a compressed one: its cluster's, and which block of it.
    var segmentBlock: UInt32
    var storedBlocks: Int
    var clusterBlocks: Int
    var clusterPlace: Int
    var sum: UInt64
}

/// One layer as a plain array: nil = not in the layer, `.some(nil)` = zero.
typealias ModelLayer = [ModelBlock??]

enum LayerModel {
    static let uuid = StoreUUID(high: 7, low: 9)

    /// A random layer of `blocks` blocks: plain runs, clusters, parts of clusters, tombstones.
    static func random(blocks: Int, writes: Int, segment: UInt32, _ random: inout SeededRandom) -> (extents: [StoredExtent], sums: [UInt64], model: ModelLayer) {
        var index = ExtentIndex()
        var sums: [UInt64] = []
        var model = ModelLayer(repeating: nil, count: blocks)
        var place: UInt32 = 1
        for _ in 0..<writes {
            let start = random.below(blocks)
            let count = min(blocks - start, 1 + random.below(random.below(8) == 0 ? 60 : 16))
            let kind = random.below(5)
            if kind == 0 {
                index.apply(IndexExtent(startBlock: UInt64(start), blockCount: UInt32(count), slot: IndexExtent.zeroSlot, segment: 0, segmentBlock: 0, checksumIndex: 0))
                for block in start..<start + count { model[block] = .some(nil) }
                continue
            }
            let first = sums.count
            for _ in 0..<count { sums.append(random.next()) }
            if kind <= 2, count > 1, count <= 16 {
                let stored = 1 + random.below(count - 1)
                index.apply(IndexExtent(
                    startBlock: UInt64(start), blockCount: UInt32(count), slot: 0, segment: segment, segmentBlock: place, checksumIndex: UInt32(first),
                    cluster: ClusterPart(storedBlocks: stored, blockCount: count, skip: 0)))
                for block in start..<start + count {
                    model[block] = ModelBlock(segment: segment, segmentBlock: place, storedBlocks: stored, clusterBlocks: count, clusterPlace: block - start, sum: sums[first + block - start])
                }
                place += UInt32(stored)
            } else {
                index.apply(IndexExtent(startBlock: UInt64(start), blockCount: UInt32(count), slot: 0, segment: segment, segmentBlock: place, checksumIndex: UInt32(first)))
                for block in start..<start + count {
                    model[block] = ModelBlock(segment: segment, segmentBlock: place + UInt32(block - start), storedBlocks: 0, clusterBlocks: 0, clusterPlace: 0, sum: sums[first + block - start])
                }
                place += UInt32(count)
            }
        }
        return (index.extents.map { StoredExtent($0) }, sums, model)
    }

    static func identity(_ id: UInt64, parent: UInt64, blocks: Int) -> LayerIdentity {
        LayerIdentity(
            id: id, parent: parent, volumeIndex: 0, sizeBytes: UInt64(blocks) * 4096, cut: Cut(epoch: EpochNumber(id), kind: .exact, timeNanoseconds: id * 1000, blockCount: 0),
            consistency: .filesystem)
    }

    static func write(_ storage: any Storage, _ id: UInt64, parent: UInt64, blocks: Int, _ extents: [StoredExtent], _ sums: [UInt64]) throws -> LayerRecord {
        try sums.withUnsafeBufferPointer {
            try LayerFile.write(storage, store: uuid, identity: identity(id, parent: parent, blocks: blocks), extents: extents, sums: $0).record(parent: parent)
        }
    }

    static func over(_ upper: ModelLayer, _ lower: ModelLayer) -> ModelLayer { zip(upper, lower).map { $0 ?? $1 } }

    /// A layer file as a plain array.
    static func read(_ storage: any Storage, _ record: LayerRecord, blocks: Int) throws -> ModelLayer {
        var model = ModelLayer(repeating: nil, count: blocks)
        let loaded = try LayerFile.load(storage, store: uuid, record: record)
        #expect(loaded.extents.count == record.extentCount && loaded.header.parent == record.parent)
        let reader = try LayerReader(storage, store: uuid, record: record)
        var sums = [UInt64](repeating: 0, count: reader.checksumCount)
        try sums.withUnsafeMutableBufferPointer { if $0.count > 0 { try reader.readChecksums(0..<$0.count, into: $0.baseAddress!) } }
        var end: UInt64 = 0
        for extent in loaded.extents {
            #expect(extent.startBlock >= end)
            end = extent.endBlock
            for index in 0..<Int(extent.blockCount) {
                let block = Int(extent.startBlock) + index
                if extent.isZero {
                    model[block] = .some(nil)
                } else {
                    model[block] = ModelBlock(
                        segment: extent.segment, segmentBlock: extent.segmentBlock + (extent.isCompressed ? 0 : UInt32(index)),
                        storedBlocks: extent.isCompressed ? Int(extent.segmentBlockCount) : 0, clusterBlocks: Int(extent.clusterBlocks),
                        clusterPlace: extent.isCompressed ? Int(extent.clusterSkip) + index : 0, sum: sums[Int(extent.checksumIndex) + index])
                }
            }
        }
        return model
    }
}

@Suite struct IndexMergeTests {
    let directory = TemporaryDirectory()

    func makeStorage() throws -> FileStorage {
        let storage = try FileStorage(directory: directory.path)
        try storage.createDirectory("layers")
        return storage
    }

    /// Random layers merged in random groups say, block by block, what they said one over the other.
    @Test(arguments: Array(1...24) as [UInt64])
    func mergedLayersSayWhatTheySaidBefore(seed: UInt64) throws {
        var random = SeededRandom(seed: seed)
        let storage = try makeStorage()
        let blocks = 50 + random.below(random.below(4) == 0 ? 20_000 : 500)
        var chain: [(record: LayerRecord, model: ModelLayer)] = []
        let bottom: UInt64 = random.below(2) == 0 ? 0 : 99
        for id in 1...(3 + random.below(12)) {
            let (extents, sums, model) = LayerModel.random(blocks: blocks, writes: random.below(random.below(3) == 0 ? 400 : 20), segment: UInt32(1000 + id), &random)
            chain.append((try LayerModel.write(storage, UInt64(id), parent: chain.last?.record.id ?? bottom, blocks: blocks, extents, sums), model))
        }
        var nextID: UInt64 = 100
        while chain.count > 1 {
            let start = random.below(chain.count - 1)
            let count = 1 + random.below(chain.count - start)
            let run = Array(chain[start..<start + count])
            let expected = run.dropFirst().reduce(run[0].model) { LayerModel.over($1.model, $0) }
            let record = try LayerMerge.write(
                storage, store: LayerModel.uuid, id: nextID, layers: run.map(\.record), overlayExtentsMax: [0, 10, 200, 1 << 20][random.below(4)])
            #expect(record.parent == run[0].record.parent && record.id == nextID)
            let merged = try LayerModel.read(storage, record, blocks: blocks)
            // At the bottom a tombstone says nothing.
            #expect(merged == (record.parent == 0 ? expected.map { $0 == .some(nil) ? nil : $0 } : expected), "seed \(seed)")
            // What the record says of segments is what the extents need.
            var needed: [UInt32: Set<UInt32>] = [:]
            for case .some(.some(let block)) in merged {
                let range = block.storedBlocks > 0 ? block.segmentBlock..<block.segmentBlock + UInt32(block.storedBlocks) : block.segmentBlock..<block.segmentBlock + 1
                needed[block.segment, default: []].formUnion(range)
            }
            #expect(record.segments.map(\.segment) == needed.keys.sorted())
            for use in record.segments { #expect(Int(use.blocks) == needed[use.segment]!.count && use.endBlock == needed[use.segment]!.max()! + 1) }
            #expect(record.dataBytes == UInt64(needed.values.reduce(0) { $0 + $1.count }) * 4096)
            chain.replaceSubrange(start..<start + count, with: [(record, merged)])
            if start + 1 < chain.count { chain[start + 1].record.parent = nextID }
            nextID += 1
        }
    }

    @Test func aStreamedLayerIsTheSameFileAsOneWrittenAtOnce() throws {
        var random = SeededRandom(seed: 4)
        let storage = try makeStorage()
        for id in 1...6 as ClosedRange<UInt64> {
            let blocks = 40_000
            let (extents, sums, _) = LayerModel.random(blocks: blocks, writes: [0, 1, 60, 900, 6000, 20_000][Int(id) - 1], segment: 5, &random)
            let writer = try LayerWriter(storage, store: LayerModel.uuid, id: id)
            var ordered: [UInt64] = []
            for extent in extents {
                try writer.append(extent)
                if !extent.isZero { ordered += sums[Int(extent.checksumIndex)..<Int(extent.checksumIndex + extent.blockCount)] }
            }
            var done = 0
            while done < ordered.count {
                let count = min(ordered.count - done, 1 + random.below(5000))
                try ordered[done..<done + count].withUnsafeBufferPointer { try writer.append($0) }
                done += count
            }
            let streamed = try writer.finish(LayerModel.identity(id, parent: 3, blocks: blocks))
            let bytes = try Data(contentsOf: URL(fileURLWithPath: directory.path + "/" + LayerFile.path(id)))
            // Of its own extents, since neighbours have been joined.
            let joined = try LayerFile.load(storage, store: LayerModel.uuid, record: streamed).extents
            #expect(joined.count <= extents.count)
            let whole = try LayerModel.write(storage, id, parent: 3, blocks: blocks, joined, ordered)
            #expect(try Data(contentsOf: URL(fileURLWithPath: directory.path + "/" + LayerFile.path(id))) == bytes)
            #expect(streamed.digest == whole.digest && streamed.fileBytes == whole.fileBytes && streamed.extentCount == whole.extentCount)
        }
    }

    /// Data that was copied elsewhere: extents point to where each block is now, cut where the copies lie apart.
    @Test func movedDataIsPointedTo() throws {
        var random = SeededRandom(seed: 12)
        let storage = try makeStorage()
        let blocks = 3000
        let (extents, sums, model) = LayerModel.random(blocks: blocks, writes: 600, segment: 5, &random)
        let (others, otherSums, otherModel) = LayerModel.random(blocks: blocks, writes: 200, segment: 6, &random)
        let first = try LayerModel.write(storage, 1, parent: 99, blocks: blocks, extents, sums)
        let second = try LayerModel.write(storage, 2, parent: 1, blocks: blocks, others, otherSums)
        // Whole clusters, and pieces of what is plain, each to another place.
        var needed: Set<UInt32> = []
        var clusters: [UInt32: UInt32] = [:]
        for extent in extents where !extent.isZero {
            if extent.isCompressed { clusters[extent.segmentBlock] = extent.segmentBlockCount } else { needed.formUnion(extent.segmentBlock..<extent.segmentBlock + extent.blockCount) }
        }
        var moves = SegmentMoves()
        var places: [UInt32: (segment: UInt32, block: UInt32)] = [:]
        var target: UInt32 = 1
        for block in 1...UInt32(blocks * 40) {
            let count = clusters[block] ?? (needed.contains(block) ? 1 : 0)
            if count == 0 { continue }
            if random.below(3) == 0 { target += 7 }
            let segment: UInt32 = target % 2 == 0 ? 71 : 70
            moves.add(segment: 5, block: block, count: count, toSegment: segment, toBlock: target)
            for index in 0..<count { places[block + index] = (segment, target + index) }
            target += count
        }
        let record = try LayerMerge.write(storage, store: LayerModel.uuid, id: 3, layers: [first, second], moved: moves)
        let expected = LayerModel.over(otherModel, model).map { block -> ModelBlock?? in
            guard case .some(.some(var data)) = block, data.segment == 5 else { return block }
            (data.segment, data.segmentBlock) = places[data.segmentBlock]!
            return data
        }
        #expect(try LayerModel.read(storage, record, blocks: blocks) == expected)
        #expect(record.segments.map(\.segment) == [6, 70, 71])

        // A block that was left behind would be lost with its segment.
        var short = SegmentMoves()
        short.add(segment: 5, block: 1, count: 1, toSegment: 70, toBlock: 1)
        #expect(throws: StoreError.self) { try LayerMerge.write(storage, store: LayerModel.uuid, id: 4, layers: [first, second], moved: short) }
        #expect(try !storage.exists(LayerFile.path(4)))
    }

    @Test func aMergeThatIsStoppedLeavesNoFile() throws {
        var random = SeededRandom(seed: 8)
        let storage = try makeStorage()
        var records: [LayerRecord] = []
        for id in 1...4 as ClosedRange<UInt64> {
            let (extents, sums, _) = LayerModel.random(blocks: 200_000, writes: 20_000, segment: 5, &random)
            records.append(try LayerModel.write(storage, id, parent: id - 1, blocks: 200_000, extents, sums))
        }
        var told = 0
        #expect(throws: StoreError.closed) {
            _ = try LayerMerge.write(storage, store: LayerModel.uuid, id: 9, layers: records, pace: { count throws(StoreError) in
                told += count
                if told > 1 << 20 { throw .closed }
            })
        }
        #expect(told > 1 << 20)
        #expect(try !storage.exists(LayerFile.path(9)))
    }

    /// The power goes at every operation of a merge: the layers that it read are untouched, and what it wrote is removed at the next start.
    @Test func aMergeThatACrashEndsLeavesOnlyWhatStartUpRemoves() throws {
        for operation in 1...12 {
            let storage = SimulatedStorage(seed: UInt64(operation))
            var options = smallOptions
            options.isStepped = true
            options.writeBufferCount = 4096
            var store = try ReplicaStore(storage: storage, options: options, logger: quiet)
            try store.createGroup(webGroup, volumes: [spec("vda", bytes: 1 << 20)])
            for epoch in 1...4 as ClosedRange<UInt64> {
                let writer = try store.begin(epoch)
                try writer.append(volume: 0, offsetBytes: 4096 * epoch, [UInt8](repeating: UInt8(epoch), count: 4096 * 3))
                nonisolated(unsafe) var result: Result<RecoveryPoint?, StoreError>?
                writer.seal(consistency: .crash) { result = $0 }
                store.thread.runQueued()
                _ = try result!.get()
            }
            let chain = store.read { $0.chain($0.groups[webGroup]!.volumes[0].top) }
            let image = try store.image(store.recoveryPoints(webGroup).last!.id, volume: 0)
            storage.operationsUntilDown = operation
            _ = try? LayerMerge.write(storage, store: store.uuid, id: 77, layers: chain)
            storage.operationsUntilDown = nil
            store.close()
            storage.restart(powerLost: true)
            store = try ReplicaStore(storage: storage, options: options, logger: quiet)
            #expect(try !storage.exists(LayerFile.path(77)))
            #expect(try store.image(store.recoveryPoints(webGroup).last!.id, volume: 0) == image)
            store.close()
        }
    }
}

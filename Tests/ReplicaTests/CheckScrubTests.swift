import BlockTap
import Foundation
import Synchronization
import Testing

@testable import Replica

/// Where a layer has a block, for tests that damage it.
func place(_ store: ReplicaStore, layer: UInt64, block: UInt64) throws -> (path: String, byte: Int)? {
    let record = try #require(store.read { $0.layers[layer] })
    nonisolated(unsafe) var found: (String, Int)?
    try LayerReader(store.storage, store: store.uuid, record: record).forEachExtents { extents in
        for extent in extents where !extent.isZero && extent.startBlock <= block && block < extent.endBlock {
            found = (SegmentFile.path(extent.segment), (Int(extent.segmentBlock) + (extent.isCompressed ? 0 : Int(block - extent.startBlock))) * 4096)
        }
    }
    return found
}

/// Scrubbing finds what rots, says what it touches, and repair puts right what the right bytes are there for.
@Suite struct CheckScrubTests {
    private func options() -> StoreOptions {
        var options = smallOptions
        options.isStepped = true
        return options
    }

    /// One disk of odd size; three points. Returns the contents at each.
    private func sample(_ storage: MemoryStorage) throws -> (ReplicaStore, [[UInt8]]) {
        let store = try ReplicaStore(storage: storage, options: options(), logger: quiet)
        try store.createGroup(webGroup, volumes: [spec("vda", bytes: 20 * 4096 + 1024)])
        var random = SeededRandom(seed: 3)
        var model = [UInt8](repeating: 0, count: 20 * 4096 + 1024)
        var images: [[UInt8]] = []
        for (epoch, range) in [(1, 0..<model.count), (2, 4096..<3 * 4096), (3, 2 * 4096..<3 * 4096)] {
            let writer = try store.begin(UInt64(epoch))
            let bytes = noise(range.count, &random)
            try writer.append(volume: 0, offsetBytes: UInt64(range.lowerBound), bytes)
            model.replaceSubrange(range, with: bytes)
            _ = try CheckBitFlipTests.sealStepped(store, writer)
            images.append(model)
        }
        return (store, images)
    }

    @discardableResult
    private func pass(_ store: ReplicaStore) -> Int {
        var layers = 0
        while case .read? = store.scrubStep() { layers += 1 }
        return layers
    }

    private func layers(_ store: ReplicaStore) -> [UInt64] { store.read { $0.layers.keys.sorted() } }

    @Test func whatRotsIsFoundWithWhatItTouchesAndRepaired() throws {
        let storage = MemoryStorage()
        let (store, images) = try sample(storage)
        #expect(pass(store) == 3)
        #expect(store.badExtents().isEmpty && store.statistics().scrub.passCount == 1)
        #expect(store.statistics().scrub.readBytes > 23 * 4096)
        // Blocks 1 and 2 as of the first epoch: later points have newer ones. And the partial last block.
        for block in [1, 2, 20] as [UInt64] {
            let (path, byte) = try #require(try place(store, layer: layers(store)[0], block: block))
            storage.flip(path, byte: byte + 77)
        }
        let ids = store.recoveryPoints(webGroup).map(\.id)
        pass(store)
        let bad = store.badExtents()
        #expect(bad.map(\.block) == [1, 20] && bad.map(\.count) == [2, 1])
        #expect(bad.map(\.recoveryPoints) == [[ids[0]], ids])
        #expect(bad.allSatisfy { $0.group == webGroup && $0.disk == "vda" && $0.layers == [layers(store)[0]] && $0.forks.isEmpty })
        #expect(store.statistics().scrub.badBlockCount == 3)
        #expect(throws: StoreError.self) { try store.image(ids[2], volume: 0) }

        // The newest contents of block 1 are not what the first point held.
        let files = storage.files
        images[2].withUnsafeBytes { image in
            let block = UnsafeRawBufferPointer(rebasing: image[4096..<8192])
            #expect(throws: StoreError.self) { try store.repair(webGroup, volume: 0, block: 1, bytes: block) }
            #expect(throws: StoreError.self) { try store.repair(webGroup, volume: 0, block: 5, bytes: block) }
        }
        #expect(storage.files == files)
        for block in [1, 2, 20] as [UInt64] {
            let start = Int(block) * 4096
            try Array(images[0][start..<min(start + 4096, images[0].count)]).withUnsafeBytes { try store.repair(webGroup, volume: 0, block: block, bytes: $0) }
        }
        #expect(store.badExtents().isEmpty && store.statistics().scrub.repairedBlockCount == 3 && store.statistics().scrub.badBlockCount == 0)
        for (id, image) in zip(ids, images) { #expect(try store.image(id, volume: 0) == image) }
        #expect(pass(store) == 3)
        #expect(store.badExtents().isEmpty)
        store.close()
        #expect(try StoreCheck.run(storage, readsData: true).isClean)
    }

    @Test func aDamagedLayerFileIsToldWithItsPoints() throws {
        let storage = MemoryStorage()
        let (store, _) = try sample(storage)
        let told = Mutex<[String]>([])
        store.scrubber.state.withLock { $0.onFinding = { finding in
            if case .badFile(let path, let what, let group, let points, _) = finding { told.withLock { $0.append("\(path) \(what) \(group) \(points)") } }
        } }
        storage.flip(LayerFile.path(layers(store)[1]), byte: 4096 + 3)
        pass(store)
        pass(store)
        #expect(told.withLock { $0.count } == 1, "told once")
        #expect(told.withLock { $0[0] }.contains("a page of extents does not match its checksum"))
        let ids = store.recoveryPoints(webGroup).map(\.id)
        #expect(told.withLock { $0[0] }.hasSuffix("\(webGroup) \([ids[1], ids[2]])"))
        #expect(store.statistics().scrub.badFileCount == 1)
        store.close()
    }

    /// Merging puts new layers in the place of those that the pass has not come to: they are read in the same pass.
    @Test func layersThatAreMergedMeanwhileAreNotPassedOver() throws {
        let storage = MemoryStorage()
        let (store, _) = try sample(storage)
        let old = layers(store)
        #expect(store.scrubStep() == .read(layer: old[0]))
        let (path, byte) = try #require(try place(store, layer: old[2], block: 2))
        storage.flip(path, byte: byte)
        // Nothing may name the layer between.
        let between = store.recoveryPoints(webGroup)[1].id
        try store.thread.perform { () throws(StoreError) in
            try store.change(.pointsDropped(webGroup, [between]))
            let records = store.read { state in [old[1], old[2]].map { state.layers[$0]! } }
            let merged = try LayerMerge.write(store.storage, store: store.uuid, id: store.shared.withLock { $0.newFile() }, layers: records)
            try store.change(.layersMerged(replaced: [old[1], old[2]], by: merged))
        }
        let new = try #require(layers(store).last)
        #expect(store.scrubStep() == .read(layer: new))
        #expect(store.badExtents().map(\.block) == [2])
        #expect(store.scrubStep() == .passEnded)
        store.close()
    }

    @Test func theThreadReadsEverythingAndEndsWithTheStore() throws {
        let directory = TemporaryDirectory()
        let store = try openStore(directory)
        try store.createGroup(webGroup, volumes: [spec("vda", bytes: 64 * 4096)])
        var random = SeededRandom(seed: 8)
        for epoch in 1...5 as ClosedRange<UInt64> {
            let writer = try store.begin(epoch)
            try writer.append(volume: 0, offsetBytes: epoch * 8192, noise(8 * 4096, &random))
            _ = try writer.seal()
        }
        let first = try #require(store.read { $0.layers.keys.min() })
        let (path, byte) = try #require(try place(store, layer: first, block: 2))
        let file = open(directory.path + "/" + path, O_RDWR)
        var bad: UInt8 = 0
        pread(file, &bad, 1, off_t(byte))
        bad ^= 4
        pwrite(file, &bad, 1, off_t(byte))
        close(file)
        let ended = Replica.Semaphore()
        let found = Mutex<[BadExtent]>([])
        store.startScrub(bytesPerSecond: 1 << 30, pauseSeconds: 3600) { finding in
            switch finding {
            case .bad(let extent): found.withLock { $0.append(extent) }
            case .passEnded: ended.signal()
            default: break
            }
        }
        ended.wait()
        #expect(found.withLock { $0 }.map(\.block) == [2])
        #expect(found.withLock { $0 }.first?.recoveryPoints.map(\.rawValue) == (1...5).map { "rp-\($0)" }, "nothing was written over block 2")
        // It sleeps until the next pass; closing wakes it.
        store.close()
        #expect(store.scrubStep() == nil)
    }
}

import BlockTap
import Foundation
import Synchronization
import Testing

@testable import Replica

/// Writes numbers one after the other, first to one disk, then to the other: each only after the one before was acknowledged.
private final class StampChain: BlockRequestOwner, @unchecked Sendable {
    let stores: [ForkStore]
    let loops: [EventLoop]
    let offset: Int
    let count: Int
    private let request = BlockRequestPointer.allocate(capacity: 1)
    private let buffer = UnsafeMutableRawPointer.allocate(byteCount: 4096, alignment: 4096)
    /// Writes that were acknowledged.
    let acknowledged = Atomic<Int>(0)
    private let isStopping = Atomic(false)
    private let ended = Replica.Semaphore()

    init(stores: [ForkStore], loops: [EventLoop], offset: Int, count: Int, fua: Bool) {
        self.stores = stores
        self.loops = loops
        self.offset = offset
        self.count = count
        super.init()
        request.initialize(to: BlockRequest(owner: .passUnretained(self), token: 0))
        request.pointee.operation = .write
        request.pointee.buffer = buffer
        request.pointee.offsetBytes = UInt64(offset)
        request.pointee.lengthBytes = UInt32(count)
        if fua { request.pointee.flags = .fua }
    }

    deinit {
        request.deallocate()
        buffer.deallocate()
    }

    func next() {
        let number = acknowledged.load(ordering: .relaxed)
        for index in 0..<count / 8 { buffer.storeBytes(of: number / 2 + 1, toByteOffset: index * 8, as: Int.self) }
        loops[number % 2].execute { self.stores[number % 2].submit(self.request) }
    }

    override func requestCompleted(_ request: BlockRequestPointer, error: Int32) {
        precondition(error == 0)
        acknowledged.add(1, ordering: .sequentiallyConsistent)
        if isStopping.load(ordering: .relaxed) { ended.signal() } else { next() }
    }

    func stop() {
        isStopping.store(true, ordering: .relaxed)
        ended.wait()
    }
}

/// Forks that are written through rings while they are sealed, and while what lies below them changes.
@Suite struct ForkRingTests {
    /// A fork of a fork is the cut: on each pair of dependent writes the second is never there without the first, and what was
    /// acknowledged before the cut was asked for is.
    @Test(arguments: [1, 2])
    func aSealIsOneCutOverTheDisksOfAForkInUse(loopCount: Int) async throws {
        let directory = TemporaryDirectory()
        let store = try openStore(directory)
        try store.createGroup(webGroup, volumes: [spec("vda", bytes: 1 << 20), spec("vdb", bytes: 1 << 20)])
        let point = try store.begin(1).seal()!
        let id = ForkID("f")
        try store.fork(id, of: webGroup, at: point.id, purpose: "test")
        let own = try (0..<loopCount).map { try EventLoop(name: "test-\($0)") }
        defer { for loop in own { loop.shutdown() } }
        let loops = [own[0], own[loopCount - 1]]
        let stores = try [0, 1].map { ForkStore(fork: try store.openFork(id, volume: $0), loop: loops[$0]) }
        // Whole blocks, parts of blocks that share one, with and without FUA.
        let chains = (0..<12).map { StampChain(stores: stores, loops: loops, offset: $0 < 6 ? $0 * 4096 : 1 << 16 + ($0 - 6) * 512, count: $0 < 6 ? 4096 : 512, fua: $0 % 3 == 0) }
        for chain in chains { chain.next() }
        var cuts: [[Int]] = []
        for round in 0..<30 {
            let before = chains.map { $0.acknowledged.load(ordering: .sequentiallyConsistent) }
            try store.fork(ForkID("c-\(round)"), ofFork: id, purpose: "test")
            let after = chains.map { $0.acknowledged.load(ordering: .sequentiallyConsistent) }
            let disks = try [0, 1].map { try store.openFork(ForkID("c-\(round)"), volume: $0) }
            let images = try disks.map { try $0.image() }
            for disk in disks { try disk.close() }
            var cut: [Int] = []
            for (number, chain) in chains.enumerated() {
                let stamps = images.map { image in image[chain.offset..<chain.offset + chain.count].withUnsafeBytes { $0.loadUnaligned(as: Int.self) } }
                #expect(stamps[0] == stamps[1] || stamps[0] == stamps[1] + 1, "round \(round), chain \(number)")
                let written = stamps[0] + stamps[1]
                // One more may have been written than was acknowledged.
                #expect(written >= before[number] && written <= after[number] + 1, "round \(round), chain \(number)")
                cut.append(written)
            }
            cuts.append(cut)
        }
        #expect(zip(cuts, cuts.dropFirst()).contains { $0.0 != $0.1 })
        for chain in chains { chain.stop() }
        for face in stores { try await face.close() }
        let ends = try [0, 1].map { disk in
            let volume = try store.openFork(id, volume: disk)
            defer { try? volume.close() }
            return try volume.image()
        }
        for chain in chains {
            let stamps = ends.map { image in image[chain.offset..<chain.offset + chain.count].withUnsafeBytes { $0.loadUnaligned(as: Int.self) } }
            #expect(stamps[0] + stamps[1] == chain.acknowledged.load(ordering: .relaxed))
        }
        store.close()
    }

    /// Merges a run of neighbours that nothing names between, as upkeep does.
    private static func mergeSomething(_ store: ReplicaStore, _ random: inout SeededRandom) throws -> Bool {
        let state = store.read { $0 }
        for top in state.tops.shuffled(using: &random) {
            let chain = state.chain(top)
            guard chain.count >= 2 else { continue }
            let end = 1 + random.below(chain.count - 1)
            for start in max(0, end - 5)..<end {
                let run = Array(chain[start...end])
                guard Set(run.map(\.sizeBytes)).count == 1 else { continue }
                let id = store.shared.withLock { $0.newFile() }
                var probe = run.last!
                probe.id = id
                probe.parent = run[0].parent
                if state.conflict(.layersMerged(replaced: run.map(\.id), by: probe)) != nil { continue }
                let pin = store.pin({ var pin = Pin(run); pin.layers.insert(id); return pin }())
                defer { store.unpin(pin) }
                let merged = try LayerMerge.write(store.storage, store: store.uuid, id: id, layers: run)
                try store.storage.syncDirectory("layers")
                try store.thread.perform { () throws(StoreError) in
                    try store.change(.layersMerged(replaced: run.map(\.id), by: merged))
                    store.indexes.merged(replaced: run.map(\.id), by: merged)
                }
                return true
            }
        }
        return false
    }

    /// The fork is written as fast as its ring goes, and sealed when its journal grows, while its group receives epochs, layers are merged
    /// and points dropped: it equals its model, the points that are left theirs, and nothing that was replaced is kept.
    @Test(arguments: [51, 52] as [UInt64])
    func aForkInUseAndItsParentStayExactWhileLayersAreMergedAndPointsDropped(seed: UInt64) async throws {
        var random = SeededRandom(seed: seed)
        let directory = TemporaryDirectory()
        var options = smallOptions
        options.forkJournalBytesMax = 16 << 10
        options.forkDeadBytesMax = 256 << 10
        let size = 300 * 4096 + 1024
        let log = LogCapture()
        let store = try ReplicaStore(storage: FileStorage(directory: directory.path), options: options, logger: log.logger)
        try store.createGroup(webGroup, volumes: [spec("vda", bytes: UInt64(size))])
        var parent = [UInt8](repeating: 0, count: size)
        var points: [(RecoveryPointID, [UInt8])] = []
        func receive() throws {
            let writer = try store.begin(UInt64(points.last.map { Int($0.0.rawValue.dropFirst(3))! } ?? 0) + 1)
            for _ in 0..<12 {
                let start = random.below(size / 4096)
                let range = start * 4096..<min(size, (start + 1 + random.below(12)) * 4096)
                let bytes = noise(range.count, &random)
                try writer.append(volume: 0, offsetBytes: UInt64(range.lowerBound), bytes)
                parent.replaceSubrange(range, with: bytes)
            }
            points.append((try writer.seal()!.id, parent))
        }
        for _ in 0..<8 { try receive() }
        let id = ForkID("f")
        try store.fork(id, of: webGroup, at: points[5].0, purpose: "test")
        let loop = try EventLoop(name: "test")
        defer { loop.shutdown() }
        let face = ForkStore(fork: try store.openFork(id, volume: 0), loop: loop)

        final class Load: @unchecked Sendable {
            var model: [UInt8]
            var bad: [String] = []
            var rounds = 0
            let isStopping = Atomic(false)
            let ended = Replica.Semaphore()
            init(_ model: [UInt8]) { self.model = model }
        }
        let load = Load(points[5].1)
        nonisolated(unsafe) let target = face
        Thread.detachNewThread {
            var random = SeededRandom(seed: seed ^ 77)
            let batch = RequestBatch(loop: loop)
            while !load.isStopping.load(ordering: .relaxed) {
                // Writes, reads of what was there before, trims and flushes, none of which overlap, all in flight together.
                var items: [RequestBatch.Item] = []
                var block = random.below(20)
                while block < 300 {
                    let count = min(300 - block, 1 + random.below(6))
                    let (offset, length) = (block * 4096, count * 4096)
                    switch random.below(10) {
                    case 0: items.append(.init(operation: .trim, offset: offset, count: length))
                    case 1, 2, 3: items.append(.init(operation: .read, offset: offset, count: length))
                    case 4: items.append(.init(operation: .write, offset: offset + 512, count: length - 512, bytes: noise(length - 512, &random)))
                    default: items.append(.init(operation: .write, offset: offset, count: length, bytes: noise(length, &random), fua: random.below(20) == 0))
                    }
                    block += count + random.below(8)
                }
                if random.below(4) == 0 { items.append(.init(operation: .flush)) }
                for (item, result) in zip(items, batch.run(target, items)) {
                    let range = item.offset..<item.offset + item.count
                    if result.0 != 0 { load.bad.append("round \(load.rounds): \(item.operation) at \(item.offset): errno \(result.0)") }
                    switch item.operation {
                    case .read:
                        if result.0 == 0, result.1 != Array(load.model[range]) { load.bad.append("round \(load.rounds): \(item.offset)+\(item.count) differs") }
                    case .write: load.model.replaceSubrange(range, with: item.bytes)
                    case .trim: load.model.replaceSubrange(range, with: repeatElement(0, count: item.count))
                    default: break
                    }
                }
                load.rounds += 1
            }
            load.ended.signal()
        }

        var merges = 0
        for step in 0..<150 {
            try receive()
            for _ in 0..<2 where try Self.mergeSomething(store, &random) { merges += 1 }
            if points.count > 4 {
                let gone = points.remove(at: random.below(points.count - 1)).0
                try store.thread.perform { () throws(StoreError) in
                    try store.change(.pointsDropped(webGroup, [gone]))
                    store.collectGarbage()
                }
            }
            if step % 25 == 0 {
                let (point, image) = points[random.below(points.count)]
                #expect(try store.image(point, volume: 0) == image, "seed \(seed), step \(step)")
            }
        }
        load.isStopping.store(true, ordering: .relaxed)
        load.ended.wait()
        #expect(load.bad.isEmpty, "\(load.bad.prefix(5)), \(log.text.split(separator: "\n").filter { $0.hasPrefix("error") || $0.hasPrefix("warning") }.prefix(5))")
        #expect(load.rounds > 10 && merges > 50, "\(load.rounds) rounds, \(merges) merges, \(store.statistics().sealedForkCount) seals")
        #expect(store.statistics().sealedForkCount > 2)
        for (point, image) in points { #expect(try store.image(point, volume: 0) == image, "seed \(seed)") }
        let whole = RequestBatch(loop: loop).run(face, [.init(operation: .read, offset: 0, count: 300 * 4096)])[0]
        #expect(whole.0 == 0 && whole.1 == Array(load.model[..<(300 * 4096)]))

        // What was replaced has gone although the fork is still open.
        try store.forkThread.perform { () throws(StoreError) in }
        try store.thread.perform { () throws(StoreError) in store.collectGarbage() }
        #expect(try directory.files().filter { $0.hasPrefix("layers/") }.count == store.statistics().layerCount)
        try await face.close()
        let again = try store.openFork(id, volume: 0)
        #expect(try again.image() == load.model)
        try again.close()
        store.close()
    }

    @Test func aBlockServerThatIsClosedWhileItsForkIsSealedLeavesItWhole() async throws {
        let directory = TemporaryDirectory()
        let store = try openStore(directory)
        try store.createGroup(webGroup, volumes: [spec("vda", bytes: 1 << 20)])
        let point = try store.begin(1).seal()!
        let id = ForkID("f")
        try store.fork(id, of: webGroup, at: point.id, purpose: "test")
        let loop = try EventLoop(name: "test")
        defer { loop.shutdown() }
        var model = [UInt8](repeating: 0, count: 1 << 20)
        var random = SeededRandom(seed: 5)
        for round in 0..<60 {
            let face = ForkStore(fork: try store.openFork(id, volume: 0), loop: loop)
            let start = random.below(200) * 4096
            let bytes = noise(8192, &random)
            #expect(RequestBatch(loop: loop).run(face, [.init(operation: .write, offset: start, count: 8192, bytes: bytes)])[0].0 == 0)
            model.replaceSubrange(start..<start + 8192, with: bytes)
            let sealed = Replica.Semaphore()
            Thread.detachNewThread {
                do { try store.sealFork(id) } catch { Issue.record("round \(round): \(error)") }
                sealed.signal()
            }
            try await face.close()
            // The seal may have opened the disk by itself for a moment: opening waits for it.
            let volume = try store.openFork(id, volume: 0)
            #expect(try volume.image() == model, "round \(round)")
            try volume.close()
            sealed.wait()
        }
        store.close()
    }
}

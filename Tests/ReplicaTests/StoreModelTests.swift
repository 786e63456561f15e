import BlockTap
import Testing

@testable import Replica

/// The store against a model that is a plain array of bytes per volume and point.
@Suite struct StoreModelTests {
    @Test(arguments: [1, 2, 3, 4, 5, 6, 7, 8] as [UInt64])
    func randomEpochsEqualThePlainArrayAtEveryPoint(seed: UInt64) throws {
        var random = SeededRandom(seed: seed)
        let directory = TemporaryDirectory()
        // Sizes that end within a block too.
        let specs = [spec("vda", bytes: 1 << 20), spec("vdb", bytes: 300 * 4096 + 1536)]
        var model = specs.map { [UInt8](repeating: 0, count: Int($0.geometry.sizeBytes)) }
        var points: [(RecoveryPointID, [[UInt8]])] = []
        var store = try openStore(directory)
        try store.createGroup(webGroup, volumes: specs)

        for epoch in 1...40 as ClosedRange<UInt64> {
            if random.below(6) == 0 {
                store.close()
                store = try openStore(directory)
            }
            let kind: EpochKind = random.below(4) == 0 ? .fuzzy : .exact
            let writer = try store.begin(epoch, kind)
            let old = model
            for _ in 0..<random.below(30) {
                let volume = random.below(2)
                let size = model[volume].count
                let blocks = (size + 4095) / 4096
                let start = random.below(blocks)
                let count = min(blocks - start, 1 + random.below(random.below(4) == 0 ? 40 : 4))
                let range = start * 4096..<min(size, (start + count) * 4096)
                if random.below(5) == 0 {
                    try writer.zero(volume: volume, offsetBytes: UInt64(range.lowerBound), lengthBytes: UInt64(range.count))
                    model[volume].replaceSubrange(range, with: repeatElement(0, count: range.count))
                } else {
                    let bytes = noise(range.count, &random)
                    try writer.append(volume: volume, offsetBytes: UInt64(range.lowerBound), bytes)
                    model[volume].replaceSubrange(range, with: bytes)
                }
            }
            if random.below(6) == 0 {
                if random.below(2) == 0 { writer.abandon() }
                model = old
                continue
            }
            let point = try writer.seal()
            #expect((point != nil) == (kind == .exact))
            if let point { points.append((point.id, model)) }
            #expect(store.group(webGroup)?.lastDurable == DurablePosition(instance: "a", epoch: EpochNumber(epoch), kind: kind))
        }
        store.close()
        store = try openStore(directory)
        #expect(store.recoveryPoints(webGroup).map(\.id) == points.map(\.0))
        for (id, images) in points.shuffled(using: &random) {
            for volume in 0..<2 { #expect(try store.image(id, volume: volume) == images[volume], "seed \(seed), \(id), volume \(volume)") }
        }
        store.close()
    }

    @Test(arguments: [11, 12, 13, 14, 15, 16] as [UInt64])
    func forksEqualThePlainArrayWhileTheGroupGoesOn(seed: UInt64) throws {
        var random = SeededRandom(seed: seed)
        let directory = TemporaryDirectory()
        let size = 200 * 4096 + 512
        var store = try openStore(directory)
        try store.createGroup(webGroup, volumes: [spec("vda", bytes: UInt64(size))])
        var parent = [UInt8](repeating: 0, count: size)
        func receive(_ epoch: UInt64) throws -> RecoveryPoint {
            let writer = try store.begin(epoch)
            for _ in 0..<10 {
                let start = random.below(201)
                let range = start * 4096..<min(size, (start + 1 + random.below(8)) * 4096)
                let bytes = noise(range.count, &random)
                try writer.append(volume: 0, offsetBytes: UInt64(range.lowerBound), bytes)
                parent.replaceSubrange(range, with: bytes)
            }
            return try writer.seal()!
        }
        let point = try receive(1)
        var model = parent
        try store.fork(ForkID("drill"), of: webGroup, at: point.id, purpose: "drill")
        var fork = try store.openFork(ForkID("drill"), volume: 0)
        for step in 2...200 as ClosedRange<UInt64> {
            switch random.below(10) {
            case 0:
                _ = try receive(step)
            case 1:
                try fork.flush()
            case 2:
                try fork.close()
                if random.below(2) == 0 {
                    store.close()
                    store = try openStore(directory)
                }
                fork = try store.openFork(ForkID("drill"), volume: 0)
            case 3, 4:
                let start = random.below(size / 512) * 512
                let count = min(size - start, (1 + random.below(100)) * 512)
                try fork.zero(offsetBytes: UInt64(start), lengthBytes: UInt64(count))
                model.replaceSubrange(start..<start + count, with: repeatElement(0, count: count))
            default:
                let start = random.below(size / 512) * 512
                let count = min(size - start, (1 + random.below(random.below(3) == 0 ? 200 : 10)) * 512)
                let bytes = noise(count, &random)
                try bytes.withUnsafeBytes { try fork.write(offsetBytes: UInt64(start), $0) }
                model.replaceSubrange(start..<start + count, with: bytes)
            }
            if step % 20 == 0 { #expect(try fork.image() == model, "seed \(seed), step \(step)") }
        }
        #expect(try fork.image() == model)
        let last = store.recoveryPoints(webGroup).last!
        #expect(try store.image(last.id, volume: 0) == parent)
        try fork.close()
        try store.dropFork(ForkID("drill"))
        #expect(try directory.files().filter { $0.hasPrefix("journals/") } == [])
        store.close()
    }

    @Test func theMergedIndexHoldsItsOrderAndContents() {
        var random = SeededRandom(seed: 99)
        var index = ExtentIndex()
        var model = [UInt32](repeating: 0, count: 20_000)
        for step in 1...30_000 {
            let start = random.below(19_900)
            let count = 1 + random.below(random.below(20) == 0 ? 100 : 3)
            if random.below(4) == 0 {
                index.erase(from: UInt64(start), to: UInt64(start + count))
                for block in start..<start + count { model[block] = 0 }
            } else {
                index.apply(IndexExtent(startBlock: UInt64(start), blockCount: UInt32(count), slot: 0, segment: UInt32(step), segmentBlock: 1000, checksumIndex: 0))
                for block in start..<start + count { model[block] = UInt32(step) }
            }
            if step % 3000 == 0 {
                #expect(index.isConsistent)
                for block in model.indices {
                    let extent = index.piece(at: UInt64(block), end: UInt64(block + 1)).extent
                    #expect((extent?.segment ?? 0) == model[block])
                }
            }
        }
        let copy = index
        index.erase(from: 0, to: 20_000)
        #expect(index.isEmpty && copy.isConsistent && !copy.isEmpty)
    }
}

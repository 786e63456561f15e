import BlockTap
import Testing

@testable import Replica
@testable import StoreSimulation

/// Sealing, forking and committing forks against plain arrays.
@Suite struct ForkSealTests {
    static let specs = [spec("vda", bytes: 200 * 4096 + 512), spec("vdb", bytes: 64 * 4096)]

    /// A fork, what it holds, and its disks that are open.
    final class Model {
        let id: ForkID
        var images: [[UInt8]]
        var open: [ForkVolume?]
        init(_ id: ForkID, _ images: [[UInt8]]) {
            self.id = id
            self.images = images
            open = images.map { _ in nil }
        }

        func close() throws {
            for index in open.indices {
                try open[index]?.close()
                open[index] = nil
            }
        }

        func change(_ store: ReplicaStore, _ random: inout SeededRandom) throws {
            let disk = random.below(open.count)
            if open[disk] == nil { open[disk] = try store.openFork(id, volume: disk) }
            let size = images[disk].count
            let start = random.below(size / 512) * 512
            let count = min(size - start, (1 + random.below(random.below(3) == 0 ? 200 : 10)) * 512)
            if random.below(4) == 0 {
                try open[disk]!.zero(offsetBytes: UInt64(start), lengthBytes: UInt64(count))
                images[disk].replaceSubrange(start..<start + count, with: repeatElement(0, count: count))
            } else {
                let bytes = noise(count, &random)
                try bytes.withUnsafeBytes { try open[disk]!.write(offsetBytes: UInt64(start), $0) }
                images[disk].replaceSubrange(start..<start + count, with: bytes)
            }
        }

        func check(_ store: ReplicaStore, _ context: Comment) throws {
            for disk in images.indices {
                let volume = try open[disk] ?? store.openFork(id, volume: disk)
                #expect(try volume.image() == images[disk], context)
                if open[disk] == nil { try volume.close() }
            }
        }
    }

    @Test(arguments: [1, 2, 3, 4, 5, 6] as [UInt64])
    func forksOfForksEqualThePlainArraysThroughSealsCrashesAndCommits(seed: UInt64) throws {
        var random = SeededRandom(seed: seed)
        let directory = TemporaryDirectory()
        var store = try openStore(directory)
        try store.createGroup(webGroup, volumes: Self.specs)
        var parent = Self.specs.map { [UInt8](repeating: 0, count: Int($0.geometry.sizeBytes)) }
        var epoch: UInt64 = 0
        func receive() throws -> RecoveryPoint {
            epoch += 1
            let writer = try store.begin(epoch)
            for disk in parent.indices {
                for _ in 0..<6 {
                    let size = parent[disk].count
                    let start = random.below(size / 4096)
                    let range = start * 4096..<min(size, (start + 1 + random.below(8)) * 4096)
                    let bytes = noise(range.count, &random)
                    try writer.append(volume: disk, offsetBytes: UInt64(range.lowerBound), bytes)
                    parent[disk].replaceSubrange(range, with: bytes)
                }
            }
            return try writer.seal()!
        }
        let point = try receive()
        var forks = [Model(ForkID("f-0"), parent)]
        try store.fork(forks[0].id, of: webGroup, at: point.id, purpose: "test")
        var made = 1
        for step in 1...400 {
            let context = Comment(rawValue: "seed \(seed), step \(step)")
            let fork = forks[random.below(forks.count)]
            switch random.below(30) {
            case 0:
                _ = try receive()
            case 1...4:
                try store.sealFork(fork.id)
                if random.below(4) == 0 {
                    let copy = try directory.copy()
                    let crashed = try openStore(copy)
                    try Model(fork.id, fork.images).check(crashed, context)
                    crashed.close()
                    withExtendedLifetime(copy) {}
                }
            case 5:
                for fork in forks { try fork.close() }
                store.close()
                store = try openStore(directory)
            case 6:
                try fork.close()
            case 7 where forks.count < 5:
                forks.append(Model(ForkID("f-\(made)"), fork.images))
                made += 1
                try store.fork(forks.last!.id, ofFork: fork.id, purpose: "test")
            case 8 where forks.count > 1:
                try fork.close()
                try store.dropFork(fork.id)
                forks.removeAll { $0 === fork }
            case 9 where random.below(3) == 0:
                let generation = store.group(webGroup)!.generation
                try store.commitFork(fork.id)
                parent = fork.images
                #expect(store.group(webGroup)!.generation == generation.next && store.recoveryPoints(webGroup).isEmpty, context)
                let whole = try receive()
                for disk in parent.indices { #expect(try store.image(whole.id, volume: disk) == parent[disk], context) }
            case 10:
                for volume in fork.open { try volume?.flush() }
            default:
                try fork.change(store, &random)
            }
            if step % 40 == 0 { for fork in forks { try fork.check(store, context) } }
        }
        for fork in forks {
            try fork.check(store, "seed \(seed), end")
            try fork.close()
        }
        let last = try receive()
        for disk in parent.indices { #expect(try store.image(last.id, volume: disk) == parent[disk]) }
        store.close()
        store = try openStore(directory)
        for fork in forks { try fork.check(store, "seed \(seed), reopened") }
        store.close()
    }

    @Test func anEmptyOpenLayerMakesNoLayerAndNoRecord() throws {
        let directory = TemporaryDirectory()
        let store = try openStore(directory)
        try store.createGroup(webGroup, volumes: Self.specs)
        let point = try store.begin(1).seal()!
        try store.fork(ForkID("f"), of: webGroup, at: point.id, purpose: "")
        let files = try directory.files()
        try store.sealFork(ForkID("f"))
        #expect(try directory.files() == files && store.statistics().layerCount == 0)
        // Tombstones over nothing leave an empty open layer and no layer either.
        let volume = try store.openFork(ForkID("f"), volume: 0)
        try volume.zero(offsetBytes: 0, lengthBytes: 1 << 16)
        try store.sealFork(ForkID("f"))
        #expect(store.statistics().layerCount == 0 && !volume.hasOwnBlocks)
        try [UInt8](repeating: 1, count: 4096).withUnsafeBytes { try volume.write(offsetBytes: 0, $0) }
        try store.sealFork(ForkID("f"))
        #expect(store.statistics().layerCount == 1 && store.forks()[0].ownBytes > 4096)
        try volume.close()
        #expect(try directory.files().filter { $0.hasPrefix("journals/") }.count == 2)
        #expect(throws: StoreError.unknownFork(ForkID("g"))) { try store.sealFork(ForkID("g")) }
        store.close()
    }

    @Test func aHeldPointStaysWhenAForkIsCommittedAndTheOldSourceIsFenced() throws {
        let directory = TemporaryDirectory()
        let store = try openStore(directory)
        try store.createGroup(webGroup, volumes: [Self.specs[1]])
        func receive(_ epoch: UInt64, _ byte: UInt8) throws -> RecoveryPoint {
            let writer = try store.begin(epoch)
            try writer.append(volume: 0, offsetBytes: 0, [UInt8](repeating: byte, count: 8192))
            return try writer.seal()!
        }
        let held = try receive(1, 1)
        let other = try receive(2, 2)
        try store.thread.perform { () throws(StoreError) in try store.change(.pointMarked(webGroup, held.id, PointMarks(hold: "keep"))) }
        try store.fork(ForkID("f"), of: webGroup, at: other.id, purpose: "")
        let volume = try store.openFork(ForkID("f"), volume: 0)
        try [UInt8](repeating: 9, count: 4096).withUnsafeBytes { try volume.write(offsetBytes: 4096, $0) }
        // One is being received and one is queued to be sealed when the fork takes over.
        let late = try store.begin(3)
        try late.append(volume: 0, offsetBytes: 0, [UInt8](repeating: 7, count: 4096))
        try store.commitFork(ForkID("f"))
        #expect(throws: StoreError.self) { try late.seal() }
        #expect(throws: StoreError.fenced(webGroup, current: Generation(2))) {
            try store.beginEpoch(webGroup, generation: Generation(1), cut: Cut(epoch: EpochNumber(4), kind: .exact, timeNanoseconds: 0, blockCount: 0), instance: "a", after: nil)
        }
        let group = store.group(webGroup)!
        #expect(group.lastDurable == nil && group.generation == Generation(2))
        #expect(store.recoveryPoints(webGroup).map(\.id) == [held.id])
        #expect(try store.image(held.id, volume: 0)[4096] == 1)
        // The fork goes on, and the group from where it was.
        try [UInt8](repeating: 5, count: 4096).withUnsafeBytes { try volume.write(offsetBytes: 0, $0) }
        let point = try store.begin(1, instance: "b").seal()!
        let image = try store.image(point.id, volume: 0)
        #expect(image[0] == 2 && image[4096] == 9)
        #expect(try volume.image()[0] == 5)
        try volume.close()
        store.close()
    }

    /// Two disks, flushed once, written again, then sealed; the machine goes down at every operation of the seal.
    @Test(arguments: [false, true])
    func aCrashWithinASealLeavesTheOldOpenLayersOrTheNewLayers(powerLost: Bool) throws {
        var seen: Set<Bool> = []
        for operation in 1...400 {
            let storage = SimulatedStorage(seed: UInt64(operation))
            var options = smallOptions
            options.isStepped = true
            var store = try ReplicaStore(storage: storage, options: options, logger: quiet)
            try store.createGroup(webGroup, volumes: Self.specs)
            var random = SeededRandom(seed: UInt64(operation))
            let point = try { () throws in
                let writer = try store.begin(1)
                try writer.append(volume: 0, offsetBytes: 0, noise(20 * 4096, &random))
                nonisolated(unsafe) var point: RecoveryPoint?
                writer.seal(consistency: .crash) { point = try! $0.get() }
                store.thread.runQueued()
                return point!
            }()
            let id = ForkID("f")
            try store.fork(id, of: webGroup, at: point.id, purpose: "")
            var volumes = try [0, 1].map { try store.openFork(id, volume: $0) }
            func write() throws {
                for volume in volumes {
                    for _ in 0..<5 {
                        let bytes = noise(4096 * (1 + random.below(3)), &random)
                        try bytes.withUnsafeBytes { try volume.write(offsetBytes: UInt64(random.below(60)) * 4096, $0) }
                    }
                }
            }
            try write()
            for volume in volumes { try volume.flush() }
            let flushed = try volumes.map { try $0.image() }
            try write()
            let written = try volumes.map { try $0.image() }
            storage.operationsUntilDown = operation
            var isSealed = true
            do { try store.sealFork(id) } catch { isSealed = false }
            let isDone = !storage.isDown
            storage.operationsUntilDown = nil
            storage.goDown()
            volumes = []
            store.close()
            storage.restart(powerLost: powerLost)
            store = try ReplicaStore(storage: storage, options: options, logger: quiet)
            let reopened = try [0, 1].map { try store.openFork(id, volume: $0) }
            let images = try reopened.map { try $0.image() }
            if isSealed { #expect(images == written, "operation \(operation)") } else { #expect(images == flushed || images == written, "operation \(operation)") }
            seen.insert(images == written)
            for volume in reopened { try volume.close() }
            try store.sealFork(id)
            store.close()
            if isDone { break }
            #expect(operation < 400)
        }
        #expect(seen == [true, false])
    }
}

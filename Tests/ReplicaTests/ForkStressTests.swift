import BlockTap
import Foundation
import Glibc
import Synchronization
import Testing

@testable import Replica

/// Everything that a store does at the same time, on real files and with its real threads: epochs arrive, points expire by a policy, are held
/// and released, upkeep merges, punches, moves and rewrites, forks and forks of forks are written and read through rings as fast as those go
/// and are sealed, points old and new are read, in sequence and at random. Whatever is read is exact at any moment, and at the end a fork
/// becomes the group.
///
/// `AFTERIMAGE_STRESS_SECONDS` and `AFTERIMAGE_STRESS_SEEDS` make it longer.
@Suite(.serialized) struct ForkStressTests {
    private static func number(_ name: String, or value: Int) -> Int { Int(ProcessInfo.processInfo.environment[name] ?? "") ?? value }

    @Test(arguments: 0..<number("AFTERIMAGE_STRESS_SEEDS", or: 2))
    func aForkInFullUseAndItsParentUnderUpkeepAreBothExact(seed: Int) async throws {
        let scene = try StressScene(seed: UInt64(seed) + 1000)
        try scene.run(seconds: Double(Self.number("AFTERIMAGE_STRESS_SECONDS", or: 5)))
        #expect(scene.problems.isEmpty, "seed \(seed): \(scene.problems.prefix(6).joined(separator: "\n"))\n\(scene.log.lines.prefix(6).joined(separator: "\n"))")
    }
}

private typealias Image = [UInt8]

private final class StressScene: @unchecked Sendable {
    static let sizes = [700 * 4096 + 1024, 256 * 4096]

    let seed: UInt64
    let directory = TemporaryDirectory()
    let log = StressLog()
    private(set) var store: ReplicaStore
    private let options: StoreOptions
    private let clock = StressClock()
    private let loops: [EventLoop]
    private let state = Mutex(State())
    private let isStopping = Atomic(false)
    let readsAhead = Atomic<Int>(0)
    let pagedLayers = Atomic<Int>(0)
    let indexFiles = Atomic<Int>(0)

    private struct State {
        var problems: [String] = []
        var points: [RecoveryPointID: [Image]] = [:]
        /// Forks that nobody has open.
        var atRest: [ForkID: [Image]] = [:]
        var current: [Image]
        var received = 0
        var pointsRead = 0
        var rounds: [ForkID: Int] = [:]
        init() { current = StressScene.sizes.map { Image(repeating: 0, count: $0) } }
    }

    final class StressClock: Sendable {
        let now = Atomic<UInt64>(1_700_000_000_000_000_000)
    }

    var problems: [String] { state.withLock { $0.problems } }
    func problem(_ what: String) { state.withLock { if $0.problems.count < 100 { $0.problems.append(what) } } }
    private var isOver: Bool { isStopping.load(ordering: .relaxed) || !problems.isEmpty }

    init(seed: UInt64) throws {
        self.seed = seed
        var options = smallOptions
        options.compression = seed % 2 == 0 ? .lz4 : .zstd
        // Everything that has a limit reaches it.
        options.residentChecksumCountMax = 64
        options.checksumCacheBytes = 128 << 10
        options.layerFilesOpenMax = 4
        options.indexFileCostMin = 400
        options.rebaseExtentsMax = 300
        options.forkJournalBytesMax = 64 << 10
        options.forkDeadBytesMax = 1 << 20
        options.manifestRewriteBytes = 32 << 10
        options.garbageBytesMin = 64 << 10
        options.reclaimBytesMin = 16 << 10
        let clock = clock
        options.now = { clock.now.load(ordering: .relaxed) }
        self.options = options
        loops = try (0..<3).map { try EventLoop(name: "test-\($0)") }
        store = try ReplicaStore(storage: FileStorage(directory: directory.path), options: options, logger: log.logger)
        try store.createGroup(webGroup, volumes: Self.sizes.enumerated().map { spec("vd\($0.offset)", bytes: UInt64($0.element)) })
    }

    deinit { for loop in loops { loop.shutdown() } }

    // MARK: Data

    /// Whole blocks, some of which shrink.
    static func data(_ count: Int, _ random: inout SeededRandom) -> [UInt8] {
        var bytes: [UInt8] = []
        bytes.reserveCapacity(count)
        let shrinks = random.below(4) != 0
        while bytes.count < count {
            let part = min(4096, count - bytes.count)
            if shrinks {
                let noisy = min(part, 256 + random.below(2048))
                bytes += noise(noisy, &random)
                bytes += repeatElement(UInt8(truncatingIfNeeded: bytes.count >> 12), count: part - noisy)
            } else {
                bytes += noise(part, &random)
            }
        }
        return bytes
    }

    static func difference(_ a: some Collection<UInt8>, _ b: some Collection<UInt8>) -> String? {
        let isSame = a.withContiguousStorageIfAvailable { a in b.withContiguousStorageIfAvailable { b in a.count == b.count && memcmp(a.baseAddress!, b.baseAddress!, a.count) == 0 } }
        if isSame == true { return nil }
        let first = zip(a, b).enumerated().first { $0.element.0 != $0.element.1 }?.offset ?? min(a.count, b.count)
        return "byte \(first) of \(a.count) (block \(first / 4096)) differs"
    }

    // MARK: The group

    private func receive(_ number: UInt64, instance: String, _ random: inout SeededRandom) throws {
        clock.now.add(1_000_000_000, ordering: .relaxed)
        var next = state.withLock { $0.current }
        let writer = try store.begin(number, random.below(12) == 0 ? .fuzzy : .exact, instance: instance)
        for _ in 0..<1 + random.below(16) {
            let disk = random.below(3) == 0 ? 1 : 0
            let size = Self.sizes[disk]
            // Half of it goes to a tenth of the disk.
            let blocks = (size + 4095) / 4096
            let start = random.below(2) == 0 ? random.below(blocks) : random.below(blocks / 10)
            let range = start * 4096..<min(size, (start + 1 + random.below(random.below(8) == 0 ? 80 : 12)) * 4096)
            if random.below(12) == 0 {
                try writer.zero(volume: disk, offsetBytes: UInt64(range.lowerBound), lengthBytes: UInt64(range.count))
                next[disk].replaceSubrange(range, with: repeatElement(0, count: range.count))
            } else {
                let bytes = Self.data(range.count, &random)
                try writer.append(volume: disk, offsetBytes: UInt64(range.lowerBound), bytes)
                next[disk].replaceSubrange(range, with: bytes)
            }
        }
        if random.below(30) == 0 { return writer.abandon() }
        let point = try writer.seal()
        let image = next
        state.withLock { state in
            state.current = image
            state.received += 1
            if let point { state.points[point.id] = image }
        }
    }

    private func receiveAll() throws {
        var random = SeededRandom(seed: seed)
        var number: UInt64 = 1
        while !isOver {
            number += 1
            try receive(number, instance: "a", &random)
            if number % 8 == 0 {
                let have = Set(store.recoveryPoints(webGroup).map(\.id))
                state.withLock { state in state.points = state.points.filter { have.contains($0.key) } }
                indexFiles.store(max(indexFiles.load(ordering: .relaxed), store.indexes.files.count), ordering: .relaxed)
                pagedLayers.store(max(pagedLayers.load(ordering: .relaxed), store.checksums.layersInUse.count), ordering: .relaxed)
            }
            if number % 20 == 0, let point = store.recoveryPoints(webGroup).randomElement(using: &random) {
                do throws(StoreError) {
                    if point.hold != nil { try store.releaseRecoveryPoint(webGroup, point.id) } else { try store.holdRecoveryPoint(webGroup, point.id, name: "kept") }
                } catch { guard case .unknownRecoveryPoint = error else { throw error } }
            }
        }
    }

    // MARK: Readers

    private func somePoint(_ random: inout SeededRandom) -> (RecoveryPointID, [Image])? {
        state.withLock { state in
            let ids = state.points.keys.sorted { $0.rawValue < $1.rawValue }
            guard let id = ids.randomElement(using: &random) else { return nil }
            return (id, state.points[id]!)
        }
    }

    private func readPoints() throws {
        var random = SeededRandom(seed: seed ^ 99)
        let batch = RequestBatch(loop: loops[2])
        while !isOver {
            guard let (id, images) = somePoint(&random) else { sched_yield(); continue }
            let disk = random.below(2)
            let reader: VolumeReader
            do throws(StoreError) { reader = try store.openRecoveryPoint(webGroup, id, volume: disk) } catch {
                if case .unknownRecoveryPoint = error { continue }
                throw error
            }
            let face = RecoveryPointStore(reader: reader, loop: loops[2])
            for round in 0..<1 + random.below(6) {
                if random.below(4) == 0 {
                    var bytes = Image(repeating: 0xEE, count: Self.sizes[disk])
                    try bytes.withUnsafeMutableBytes { try reader.read(offsetBytes: 0, into: $0) }
                    if let what = Self.difference(bytes, images[disk]) { problem("\(id), disk \(disk), round \(round), all of it: \(what)") }
                    continue
                }
                let sectors = Self.sizes[disk] / 512
                let isSequential = random.below(3) != 0
                let step = [4096, 8192, 16384, 65536, 6144][random.below(5)]
                var offset = random.below(sectors / 2) * 512
                var items: [RequestBatch.Item] = []
                for _ in 0..<40 {
                    if !isSequential { offset = random.below(sectors) * 512 }
                    let count = min(step, sectors * 512 - offset)
                    if count <= 0 { break }
                    items.append(.init(operation: .read, offset: offset, count: count))
                    offset += count
                }
                // One after the other, as a client that waits, or all at once.
                let results = random.below(2) == 0 ? batch.run(face, items) : items.map { batch.run(face, [$0])[0] }
                for (item, result) in zip(items, results) {
                    if result.0 != 0 { problem("\(id), disk \(disk), round \(round), \(item.offset)+\(item.count): errno \(result.0)") }
                    else if let what = Self.difference(result.1, images[disk][item.offset..<item.offset + item.count]) { problem("\(id), disk \(disk), round \(round), \(item.offset)+\(item.count): \(what)") }
                }
            }
            readsAhead.add(face.readAheadCount, ordering: .relaxed)
            state.withLock { $0.pointsRead += 1 }
        }
    }

    // MARK: Forks

    private func openFaces(_ id: ForkID, _ loop: EventLoop) throws -> [ForkStore] {
        try Self.sizes.indices.map { ForkStore(fork: try store.openFork(id, volume: $0), loop: loop) }
    }

    /// As a server does that goes away: what was written is flushed and the disks closed in the background.
    private func close(_ faces: inout [ForkStore], of id: ForkID) {
        faces = []
        while store.shared.withLock({ shared in Self.sizes.indices.contains { shared.openForks["\(id)/\($0)"] != nil } }) { usleep(200) }
    }

    /// Requests that do not overlap, all in flight together; the model follows.
    private func exercise(_ face: ForkStore, _ batch: RequestBatch, _ model: inout Image, _ random: inout SeededRandom, _ what: String) {
        let size = model.count
        var items: [RequestBatch.Item] = []
        var sector = random.below(200)
        let isSequential = random.below(6) == 0
        while sector < size / 512, items.count < 300 {
            let count = min(size / 512 - sector, isSequential ? 64 : 1 + random.below(random.below(6) == 0 ? 200 : 24))
            let (offset, length) = (sector * 512, count * 512)
            switch isSequential ? 7 : random.below(10) {
            case 0: items.append(.init(operation: .trim, offset: offset, count: length))
            case 1: items.append(.init(operation: .writeZeroes, offset: offset, count: length))
            case 2: items.append(.init(operation: .flush))
            case 3, 4, 7, 8: items.append(.init(operation: .read, offset: offset, count: length))
            default: items.append(.init(operation: .write, offset: offset, count: length, bytes: Self.data(length, &random), fua: random.below(20) == 0))
            }
            sector += count + (isSequential ? 0 : random.below(80))
        }
        for (item, result) in zip(items, batch.run(face, items)) {
            let range = item.offset..<item.offset + item.count
            if result.0 != 0 { problem("\(what): \(item.operation) at \(item.offset)+\(item.count): errno \(result.0)") }
            switch item.operation {
            case .read: if result.0 == 0, let found = Self.difference(result.1, model[range]) { problem("\(what): \(item.offset)+\(item.count): \(found)") }
            case .write: model.replaceSubrange(range, with: item.bytes)
            case .writeZeroes: model.replaceSubrange(range, with: repeatElement(0, count: item.count))
            case .trim:
                let first = (range.lowerBound + 4095) / 4096 * 4096
                let last = range.upperBound == size ? size : range.upperBound / 4096 * 4096
                if first < last { model.replaceSubrange(first..<last, with: repeatElement(0, count: last - first)) }
            case .flush: break
            }
        }
    }

    /// Until the end; then the fork is left at rest with its model.
    private func useFork(_ id: ForkID, _ start: [Image], loop: EventLoop, seed: UInt64, ready: (() -> Void)? = nil) throws {
        var random = SeededRandom(seed: seed)
        var images = start
        let batch = RequestBatch(loop: loop)
        var faces = try openFaces(id, loop)
        var children: [ForkID] = []
        var round = 0
        while !isOver {
            round += 1
            for disk in Self.sizes.indices { exercise(faces[disk], batch, &images[disk], &random, "fork \(id), disk \(disk), round \(round)") }
            switch random.below(60) {
            case 0, 1: try store.sealFork(id)
            case 2, 3:
                let child = ForkID("\(id)-\(round)")
                try store.fork(child, ofFork: id, purpose: "test")
                children.append(child)
                try look(at: child, images, &random)
                if children.count > 2 {
                    let oldest = children.removeFirst()
                    _ = state.withLock { $0.atRest.removeValue(forKey: oldest) }
                    try store.dropFork(oldest)
                }
            case 4:
                close(&faces, of: id)
                let volumes = try Self.sizes.indices.map { try store.openFork(id, volume: $0) }
                for (disk, volume) in volumes.enumerated() {
                    if let what = Self.difference(try volume.image(), images[disk]) { problem("fork \(id), disk \(disk), round \(round), opened again: \(what)") }
                    try volume.close()
                }
                faces = try openFaces(id, loop)
            case 5:
                // The server goes and another comes, while the disk stays open.
                let volumes = try Self.sizes.indices.map { disk in store.shared.withLock { $0.openForks["\(id)/\(disk)"]!.volume! } }
                faces = []
                for volume in volumes {
                    while true {
                        volume.gate.wait()
                        let isServed = volume.io != nil
                        volume.gate.signal()
                        if !isServed { break }
                        sched_yield()
                    }
                }
                faces = volumes.map { ForkStore(fork: $0, loop: loop) }
            default: break
            }
            if round == 10 {
                let other = ForkID("\(id)-in-use")
                if ready != nil { try store.fork(other, ofFork: id, purpose: "test") }
                state.withLock { $0.atRest[other] = ready == nil ? nil : images }
                ready?()
            }
        }
        for disk in Self.sizes.indices {
            let whole = batch.run(faces[disk], [.init(operation: .read, offset: 0, count: Self.sizes[disk])])[0]
            if whole.0 != 0 { problem("fork \(id), disk \(disk): errno \(whole.0)") } else if let what = Self.difference(whole.1, images[disk]) { problem("fork \(id), disk \(disk), at the end: \(what)") }
        }
        close(&faces, of: id)
        let last = images
        state.withLock { state in
            state.atRest[id] = last
            state.rounds[id] = round
        }
    }

    /// A fork of a fork, looked at and written through its synchronous interface, and closed again.
    private func look(at id: ForkID, _ images: [Image], _ random: inout SeededRandom) throws {
        var images = images
        for disk in Self.sizes.indices {
            let volume = try store.openFork(id, volume: disk)
            if let what = Self.difference(try volume.image(), images[disk]) { problem("fork \(id), disk \(disk): \(what)") }
            let start = random.below(images[disk].count / 4096 - 8) * 4096
            let bytes = Self.data(8 * 4096, &random)
            try bytes.withUnsafeBytes { try volume.write(offsetBytes: UInt64(start), $0) }
            images[disk].replaceSubrange(start..<start + bytes.count, with: bytes)
            try volume.close()
        }
        let written = images
        state.withLock { $0.atRest[id] = written }
    }

    /// Forks of recovery points that come and go.
    private func forkPoints() throws {
        var random = SeededRandom(seed: seed ^ 55)
        var number = 0
        var forks: [ForkID] = []
        while !isOver {
            guard let (point, images) = somePoint(&random) else { sched_yield(); continue }
            number += 1
            let id = ForkID("p-\(number)")
            do throws(StoreError) { try store.fork(id, of: webGroup, at: point, purpose: "test") } catch {
                if case .unknownRecoveryPoint = error { continue }
                throw error
            }
            try look(at: id, images, &random)
            forks.append(id)
            if forks.count > 3 {
                let old = forks.removeFirst()
                let images = state.withLock { $0.atRest.removeValue(forKey: old) }!
                for disk in Self.sizes.indices {
                    let volume = try store.openFork(old, volume: disk)
                    if let what = Self.difference(try volume.image(), images[disk]) { problem("fork \(old), disk \(disk), opened again: \(what)") }
                    try volume.close()
                }
                try store.dropFork(old)
            }
            usleep(3000)
        }
    }

    // MARK: All of it

    private func start(_ ended: Replica.Semaphore, _ what: String, _ body: @escaping @Sendable () throws -> Void) {
        Thread.detachNewThread { [self] in
            do { try body() } catch { problem("\(what): \(error)") }
            ended.signal()
        }
    }

    func run(seconds: Double) throws {
        var random = SeededRandom(seed: seed ^ 11)
        for number in 1...6 { try receive(UInt64(number), instance: "0", &random) }
        store.setRetention(webGroup, RecoveryPointPolicy(tiers: [.init(everySeconds: 0, forSeconds: 8), .init(everySeconds: 8, forSeconds: 64), .init(everySeconds: 64, forSeconds: 256)]))
        store.startUpkeep(everySeconds: 0.002, bytesPerSecond: 0)
        let id = ForkID("f")
        let (point, images) = try #require(somePoint(&random))
        try store.fork(id, of: webGroup, at: point, purpose: "test")
        let ended = Replica.Semaphore()
        var count = 4
        start(ended, "receiver") { try self.receiveAll() }
        start(ended, "reader") { try self.readPoints() }
        start(ended, "forks of points") { try self.forkPoints() }
        let isReady = Replica.Semaphore()
        start(ended, "fork \(id)") {
            defer { isReady.signal() }
            try self.useFork(id, images, loop: self.loops[0], seed: self.seed ^ 22) { isReady.signal() }
        }
        isReady.wait()
        if let images = state.withLock({ $0.atRest.removeValue(forKey: ForkID("f-in-use")) }) {
            count += 1
            start(ended, "fork of a fork") { try self.useFork(ForkID("f-in-use"), images, loop: self.loops[1], seed: self.seed ^ 33) }
        }
        let end = ContinuousClock.now + .seconds(seconds)
        while ContinuousClock.now < end, problems.isEmpty { usleep(20_000) }
        isStopping.store(true, ordering: .relaxed)
        for _ in 0..<count { ended.wait() }
        guard problems.isEmpty else { return store.close() }
        try finish(id)
    }

    /// The fork becomes the group, which goes on from there; everything is still what it was, now and after opening the store again.
    private func finish(_ id: ForkID) throws {
        var random = SeededRandom(seed: seed ^ 44)
        var faces = try openFaces(id, loops[0])
        let committed = state.withLock { $0.atRest[id]! }
        try store.commitFork(id)
        let held = Set(store.recoveryPoints(webGroup).map(\.id))
        state.withLock { state in
            state.current = committed
            state.points = state.points.filter { held.contains($0.key) }
        }
        for number in 1...30 { try receive(UInt64(number), instance: "b", &random) }
        close(&faces, of: id)
        // So that what is looked at stays.
        store.setRetention(webGroup, nil)
        try store.thread.perform { () throws(StoreError) in }
        try checkAll("")
        try checkFigures()
        store.close()
        let report = try StoreCheck.run(directory: directory.path, readsData: true)
        if !report.isClean { problem("store check: \(report.damages.prefix(3)), \(report.badExtents.prefix(3))") }
        store = try ReplicaStore(storage: FileStorage(directory: directory.path), options: options, logger: log.logger)
        try checkAll("opened again")
        let files = try directory.files()
        let layers = files.filter { $0.hasPrefix("layers/") }.count
        if layers != store.statistics().layerCount { problem("\(layers) layer files of \(store.statistics().layerCount) layers") }
        store.close()
        if !log.lines.isEmpty { problem("it has told of problems") }
    }

    private func checkAll(_ when: String) throws {
        let have = store.recoveryPoints(webGroup).map(\.id)
        for id in have {
            guard store.recoveryPoints(webGroup).contains(where: { $0.id == id }) else { continue }
            guard let images = state.withLock({ $0.points[id] }) else { problem("\(id) \(when): nobody knows it"); continue }
            for disk in Self.sizes.indices { if let what = Self.difference(try store.image(id, volume: disk), images[disk]) { problem("\(id) \(when), disk \(disk): \(what)") } }
        }
        for (id, images) in state.withLock({ $0.atRest }) {
            for disk in Self.sizes.indices {
                let volume = try store.openFork(id, volume: disk)
                if let what = Self.difference(try volume.image(), images[disk]) { problem("fork \(id) \(when), disk \(disk): \(what)") }
                try volume.close()
            }
        }
    }

    /// All of it has happened.
    private func checkFigures() throws {
        let figures = store.statistics()
        let upkeep = figures.upkeep
        let (received, pointsRead, rounds) = state.withLock { ($0.received, $0.pointsRead, $0.rounds) }
        let counts: [(String, Int)] = [
            ("epochs", received), ("points read", pointsRead), ("rounds of the fork", rounds[ForkID("f")] ?? 0), ("rounds of its fork", rounds[ForkID("f-in-use")] ?? 0),
            ("seals", Int(figures.sealedForkCount)), ("layers merged", Int(upkeep.layersMerged)), ("points expired", Int(upkeep.pointsExpired)), ("bytes punched", Int(upkeep.bytesReclaimed)),
            ("bytes moved", Int(upkeep.dataBytesMoved)), ("files removed", log.count("removed")), ("MANIFESTs", log.count("rewroteManifest")), ("runs read ahead", readsAhead.load(ordering: .relaxed)),
            ("layers with paged checksums", pagedLayers.load(ordering: .relaxed)), ("index files", indexFiles.load(ordering: .relaxed)),
        ]
        print("stress, seed \(seed): " + counts.map { "\($0.1) \($0.0)" }.joined(separator: ", "))
        for (what, count) in counts where count == 0 { problem("no \(what)") }
    }
}

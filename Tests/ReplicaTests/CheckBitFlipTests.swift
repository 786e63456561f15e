import BlockTap
import Foundation
import Testing

@testable import Replica

/// One bit of one file of a store is another: reads give the right bytes or an error, and `store check` knows which.
@Suite(.timeLimit(.minutes(10))) struct CheckBitFlipTests {
    static let sizes = [24 * 4096, 9 * 4096 + 512]

    /// What a store must read as, by recovery point and volume, and by fork and volume.
    struct Expected: Sendable {
        var points: [RecoveryPointID: [[UInt8]]] = [:]
        var forks: [ForkID: [[UInt8]]] = [:]
    }

    /// A small store with all that there is: several layers and segments, compressed clusters, tombstones, overwritten blocks, merged layers,
    /// holes, forks with a sealed layer and an open one, one of a fork, and merged indexes on disk.
    static func make(seed: UInt64) throws -> (MemoryStorage, Expected) {
        let storage = MemoryStorage()
        var random = SeededRandom(seed: seed)
        var expected = Expected()
        var options = smallOptions
        options.isStepped = true
        options.segmentBytes = 64 << 10
        options.newUUID = { StoreUUID(high: 1, low: 2) }
        options.now = { 1_000_000_000 }
        options.compression = seed % 2 == 0 ? .lz4 : .zstd
        options.garbageBytesMin = 1
        options.reclaimBytesMin = 1
        options.indexFileCostMin = 1
        let store = try ReplicaStore(storage: storage, options: options, logger: quiet)
        try store.createGroup(webGroup, volumes: [spec("vda", bytes: UInt64(sizes[0])), spec("vdb", bytes: UInt64(sizes[1]))])
        var model = sizes.map { [UInt8](repeating: 0, count: $0) }
        for epoch in 1...8 as ClosedRange<UInt64> {
            let writer = try store.begin(epoch)
            for volume in 0..<2 {
                for _ in 0..<3 {
                    let block = random.below(sizes[volume] / 4096)
                    let offset = block * 4096
                    let length = min(sizes[volume] - offset, (1 + random.below(4)) * 4096)
                    if random.below(5) == 0 {
                        try writer.zero(volume: volume, offsetBytes: UInt64(offset), lengthBytes: UInt64(length))
                        model[volume].replaceSubrange(offset..<offset + length, with: repeatElement(0, count: length))
                    } else {
                        // Half of it compresses.
                        let bytes = random.below(2) == 0 ? noise(length, &random) : [UInt8](repeating: UInt8(truncatingIfNeeded: random.next()) | 1, count: length)
                        try writer.append(volume: volume, offsetBytes: UInt64(offset), bytes)
                        model[volume].replaceSubrange(offset..<offset + length, with: bytes)
                    }
                }
            }
            if let point = try sealStepped(store, writer) { expected.points[point.id] = model }
        }
        let gone = [1, 2, 4].map { store.recoveryPoints(webGroup)[$0].id }
        try store.dropRecoveryPoints(webGroup, gone)
        for id in gone { expected.points[id] = nil }
        var merged = 0
        while let action = try store.upkeepStep() { if case .merged(let layers, _) = action { merged += layers } }
        precondition(merged > 1, "nothing was merged")
        for (number, point) in [store.recoveryPoints(webGroup)[1], store.recoveryPoints(webGroup)[4]].enumerated() {
            let id = ForkID("fork-\(number)")
            try store.fork(id, of: webGroup, at: point.id, purpose: "test")
            var images = expected.points[point.id]!
            for volume in 0..<2 {
                let fork = try store.openFork(id, volume: volume)
                for _ in 0..<3 {
                    let offset = random.below(sizes[volume] - 3000)
                    let bytes = noise(1 + random.below(min(9000, sizes[volume] - offset)), &random)
                    try bytes.withUnsafeBytes { try fork.write(offsetBytes: UInt64(offset), $0) }
                    images[volume].replaceSubrange(offset..<offset + bytes.count, with: bytes)
                    try fork.flush()
                }
                try fork.zero(offsetBytes: 4096, lengthBytes: 8192)
                images[volume].replaceSubrange(4096..<4096 + 8192, with: repeatElement(0, count: 8192))
                try fork.close()
            }
            expected.forks[id] = images
            if number == 1 { continue }
            // Sealed, and the base of another one; both are written on.
            let child = ForkID("fork-of-0")
            try store.fork(child, ofFork: id, purpose: "test")
            for (id, first) in [(id, 0), (child, 8192)] {
                for volume in 0..<2 {
                    let fork = try store.openFork(id, volume: volume)
                    let bytes = noise(6000, &random)
                    try bytes.withUnsafeBytes { try fork.write(offsetBytes: UInt64(first + 1000), $0) }
                    var image = images[volume]
                    image.replaceSubrange(first + 1000..<first + 7000, with: bytes)
                    expected.forks[id, default: images][volume] = image
                    try fork.close()
                }
            }
        }
        store.close()
        return (storage, expected)
    }

    static func sealStepped(_ store: ReplicaStore, _ writer: EpochWriter) throws -> RecoveryPoint? {
        nonisolated(unsafe) var result: Result<RecoveryPoint?, StoreError>?
        writer.seal(consistency: .crash) { result = $0 }
        while result == nil { store.thread.runQueued() }
        return try result!.get()
    }

    /// What reading gave.
    struct Outcome {
        var wrong: [String] = []
        /// "recovery point rp-1/0" and so on that could not be read.
        var unreadable: Set<String> = []
        var failedToOpen = false
    }

    static func readAll(_ files: [String: [UInt8]], _ expected: Expected) -> Outcome {
        var outcome = Outcome()
        var options = smallOptions
        options.isStepped = true
        guard let store = try? ReplicaStore(storage: MemoryStorage(files), options: options, logger: quiet) else {
            outcome.failedToOpen = true
            return outcome
        }
        defer { store.close() }
        if store.recoveryPoints(webGroup).map(\.id).sorted(by: { $0.rawValue < $1.rawValue }) != expected.points.keys.sorted(by: { $0.rawValue < $1.rawValue }) {
            outcome.wrong.append("the recovery points are \(store.recoveryPoints(webGroup).map(\.id))")
        }
        if Set(store.forks().map(\.id)) != Set(expected.forks.keys) { outcome.wrong.append("the forks are \(store.forks().map(\.id))") }
        // Block by block, so that one bad block hides nothing.
        for (id, images) in expected.points {
            for (volume, image) in images.enumerated() {
                guard let reader = try? store.openRecoveryPoint(webGroup, id, volume: volume) else {
                    outcome.unreadable.insert("recovery point \(id)/\(volume)")
                    continue
                }
                compare(image, "recovery point \(id)/\(volume)", &outcome) { try reader.read(offsetBytes: $0, into: $1) }
            }
        }
        for (id, images) in expected.forks {
            for (volume, image) in images.enumerated() {
                guard let fork = try? store.openFork(id, volume: volume) else {
                    outcome.unreadable.insert("fork \(id)/\(volume)")
                    continue
                }
                compare(image, "fork \(id)/\(volume)", &outcome) { try fork.read(offsetBytes: $0, into: $1) }
                try? fork.close()
            }
        }
        return outcome
    }

    private static func compare(_ image: [UInt8], _ name: String, _ outcome: inout Outcome, _ read: (UInt64, UnsafeMutableRawBufferPointer) throws -> Void) {
        var block = [UInt8](repeating: 0, count: 4096)
        for offset in stride(from: 0, to: image.count, by: 4096) {
            let count = min(4096, image.count - offset)
            do {
                try block.withUnsafeMutableBytes { try read(UInt64(offset), UnsafeMutableRawBufferPointer(rebasing: $0[..<count])) }
                if block[..<count] != image[offset..<offset + count] { outcome.wrong.append("\(name) at byte \(offset)") }
            } catch is StoreError {
                outcome.unreadable.insert(name)
            } catch { outcome.wrong.append("\(name): \(error)") }
        }
    }

    @Test func theUndamagedStoreIsRightAndClean() throws {
        let (storage, expected) = try Self.make(seed: 1)
        let outcome = Self.readAll(storage.files, expected)
        #expect(outcome.wrong.isEmpty && outcome.unreadable.isEmpty && !outcome.failedToOpen)
        let report = try StoreCheck.run(storage, readsData: true)
        #expect(report.isClean, "\(report.damages) \(report.badExtents)")
        #expect(report.unnamedFiles.isEmpty)
        #expect(storage.files.keys.contains { $0.hasPrefix("indexes/") } && report.notes.isEmpty, "\(report.notes)")
        #expect(report.views.allSatisfy { $0.state == .exact })
        #expect(report.views.filter { $0.kind == "recovery point" }.count == expected.points.count * 2)
    }

    /// Whatever bit it is. What a read cannot give, `store check` says is unreadable, and of nothing else.
    @Test(arguments: 0..<4 as Range<UInt64>) func anyBit(seed: UInt64) throws {
        let (storage, expected) = try Self.make(seed: seed)
        let good = storage.files
        let paths = good.keys.filter { $0 != "RESERVE" && !good[$0]!.isEmpty }.sorted()
        var random = SeededRandom(seed: seed &+ 1000)
        var noticed = 0
        for round in 0..<750 {
            // Every kind of file as often, whatever their sizes.
            let kinds = Dictionary(grouping: paths) { String($0.split(separator: "/")[0]) }
            let kind = kinds.keys.sorted()[random.below(kinds.count)]
            let path = kinds[kind]![random.below(kinds[kind]!.count)]
            let byte = random.below(good[path]!.count)
            let bit = random.below(8)
            var files = good
            files[path]![byte] ^= 1 << UInt8(bit)
            let place = "seed \(seed), round \(round): bit \(bit) of byte \(byte) of \(path)"
            let outcome = Self.readAll(files, expected)
            #expect(outcome.wrong.isEmpty, "\(place): \(outcome.wrong.prefix(3))")
            if path.hasPrefix("indexes/") { #expect(outcome.unreadable.isEmpty && !outcome.failedToOpen, "\(place): an index is only a copy") }
            let report: StoreCheck.Report
            do { report = try StoreCheck.run(MemoryStorage(files), readsData: true) } catch {
                // Only a MANIFEST that says not even what it is.
                #expect(path == "MANIFEST" && outcome.failedToOpen, "\(place): \(error)")
                noticed += 1
                continue
            }
            if path.hasPrefix("indexes/") { #expect(report.isClean, "\(place): \(report.damages)") }
            if outcome.failedToOpen || !outcome.unreadable.isEmpty {
                noticed += 1
                #expect(!report.isClean, "\(place): check finds nothing, but reading fails")
            }
            guard !outcome.failedToOpen else { continue }
            for view in report.views where view.kind != "newest" {
                let name = "\(view.kind) \(view.name)/\(view.volume)"
                #expect((view.state == .unreadable) == outcome.unreadable.contains(name), "\(place): \(name) is \(view.state), \(view.problems)")
            }
        }
        #expect(noticed > 400, "most bits of such a store matter")
    }
}

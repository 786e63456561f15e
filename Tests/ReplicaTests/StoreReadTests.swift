import BlockTap
import Foundation
import Glibc
import Testing

@testable import Replica

/// Compressed clusters, zeroes and paged checksums: what comes back through both ways of reading.
@Suite struct StoreReadTests {
    struct Setting: CustomTestStringConvertible, Sendable {
        var compression: StoreCompression
        var isPaged: Bool
        var seed: UInt64
        var testDescription: String { "\(compression), checksums \(isPaged ? "in pages" : "resident"), seed \(seed)" }

        var options: StoreOptions {
            var options = smallOptions
            options.compression = compression
            // Larger than a cluster here, smaller there: clusters go over the ends of buffers and segments.
            options.writeBufferBytes = seed % 2 == 0 ? 20 << 10 : 256 << 10
            options.segmentBytes = seed % 2 == 0 ? 256 << 10 : 4 << 20
            if isPaged {
                options.residentChecksumCountMax = 0
                // One page in each part of the cache, and fewer files than layers.
                options.checksumCacheBytes = 2 * 8 * 4096
                options.layerFilesOpenMax = 2
            }
            return options
        }

        static let all = StoreCompression.allCases.flatMap { compression in
            [false, true].flatMap { isPaged in (1...3).map { Setting(compression: compression, isPaged: isPaged, seed: UInt64($0)) } }
        }
    }

    /// Blocks of every kind side by side: noise, text, half and half, zeroes.
    static func mixture(_ count: Int, _ random: inout SeededRandom) -> [UInt8] {
        var bytes: [UInt8] = []
        while bytes.count < count {
            let run = 4096 * (1 + random.below(random.below(3) == 0 ? 40 : 5))
            switch random.below(5) {
            case 0: bytes += noise(run, &random)
            case 1: bytes += [UInt8](repeating: 0, count: run)
            case 2:
                let words = noise(96, &random)
                for index in 0..<run { bytes.append(words[index * 7 / 5 % 96]) }
            default:
                for _ in 0..<run / 4096 { bytes += noise(2048, &random) + [UInt8](repeating: UInt8(random.below(256)), count: 2048) }
            }
        }
        return Array(bytes[..<count])
    }

    @Test(arguments: Setting.all)
    func whatCameInComesOutThroughBothPaths(setting: Setting) async throws {
        var random = SeededRandom(seed: setting.seed)
        let directory = TemporaryDirectory()
        let size = 1500 * 4096 + 512 * (1 + random.below(7))
        var store = try openStore(directory, setting.options)
        try store.createGroup(webGroup, volumes: [spec("vda", bytes: UInt64(size))])
        var model = [UInt8](repeating: 0, count: size)
        var points: [(RecoveryPointID, [UInt8])] = []
        for epoch in 1...6 as ClosedRange<UInt64> {
            let writer = try store.begin(epoch)
            nonisolated(unsafe) var credited = 0
            let lock = NSLock()
            writer.onWritten = { count in lock.withLock { credited += count } }
            var appended = 0
            for _ in 0..<(epoch == 1 ? 8 : 20) {
                let start = random.below(1501)
                let count = min(1501 - start, 1 + random.below(random.below(3) == 0 ? 400 : 20))
                let range = start * 4096..<min(size, (start + count) * 4096)
                if random.below(8) == 0 {
                    try writer.zero(volume: 0, offsetBytes: UInt64(range.lowerBound), lengthBytes: UInt64(range.count))
                    model.replaceSubrange(range, with: repeatElement(0, count: range.count))
                } else {
                    let bytes = Self.mixture(range.count, &random)
                    try writer.append(volume: 0, offsetBytes: UInt64(range.lowerBound), bytes)
                    model.replaceSubrange(range, with: bytes)
                    appended += bytes.count
                }
            }
            points.append((try writer.seal()!.id, model))
            #expect(lock.withLock { credited } == appended)
        }
        let loop = try EventLoop(name: "test")
        defer { loop.shutdown() }
        let batch = RequestBatch(loop: loop)
        for isReopened in [false, true] {
            if isReopened {
                store.close()
                store = try openStore(directory, setting.options)
            }
            for (id, image) in points {
                let reader = try store.openRecoveryPoint(webGroup, id, volume: 0)
                #expect(try store.image(id, volume: 0) == image)
                // By its runs of data, as a copy takes it. They end, though the volume ends within a block.
                var copy = [UInt8](repeating: 0, count: size)
                var offset: UInt64 = 0
                while let run = reader.nextData(from: offset, bytesMax: 256 << 10) {
                    try #require(run.lowerBound >= offset && run.upperBound <= UInt64(size))
                    let part = Int(run.lowerBound)..<Int(run.upperBound)
                    copy.replaceSubrange(part, with: image[part])
                    offset = run.upperBound
                }
                #expect(copy == image)
                let face = RecoveryPointStore(reader: reader, loop: loop)
                var items: [RequestBatch.Item] = [.init(operation: .read, offset: 0, count: size)]
                for _ in 0..<150 {
                    let start = random.below(size / 512)
                    items.append(.init(operation: .read, offset: start * 512, count: 512 * (1 + random.below(min(size / 512 - start, random.below(4) == 0 ? 2000 : 20)))))
                }
                for (item, result) in zip(items, batch.run(face, items)) {
                    #expect(result.0 == 0 && result.1 == Array(image[item.offset..<item.offset + item.count]), "\(id) \(item.offset)+\(item.count)")
                    var bytes = [UInt8](repeating: 0xEE, count: item.count)
                    try bytes.withUnsafeMutableBytes { try reader.read(offsetBytes: UInt64(item.offset), into: $0) }
                    #expect(bytes == result.1)
                }
            }
            // Blocks at the edges of small writes come out of the parent's clusters.
            let fork = ForkID("f\(isReopened)")
            var (id, image) = points[3]
            try store.fork(fork, of: webGroup, at: id, purpose: "test")
            let face = ForkStore(fork: try store.openFork(fork, volume: 0), loop: loop)
            for _ in 0..<8 {
                var items: [RequestBatch.Item] = []
                var sector = random.below(40)
                while sector < size / 512 {
                    let count = min(size / 512 - sector, 1 + random.below(12))
                    items.append(.init(operation: .write, offset: sector * 512, count: count * 512, bytes: noise(count * 512, &random)))
                    sector += count + random.below(120)
                }
                for (item, result) in zip(items, batch.run(face, items)) {
                    #expect(result.0 == 0)
                    image.replaceSubrange(item.offset..<item.offset + item.count, with: item.bytes)
                }
            }
            let whole = batch.run(face, [.init(operation: .read, offset: 0, count: size)])
            #expect(whole[0].0 == 0 && whole[0].1 == image)
            try await face.close()
            let again = try store.openFork(fork, volume: 0)
            #expect(try again.image() == image)
            try again.close()
            try store.dropFork(fork)
        }
        #expect(store.statistics().badBlockCount == 0)
        store.close()
    }

    @Test(arguments: StoreCompression.allCases)
    func dataThatShrinksTakesLessAndZeroesTakeNothing(compression: StoreCompression) throws {
        let directory = TemporaryDirectory()
        var options = smallOptions
        options.compression = compression
        let store = try openStore(directory, options)
        try store.createGroup(webGroup, volumes: [spec("vda", bytes: 4 << 20)])
        let writer = try store.begin(1)
        var random = SeededRandom(seed: 3)
        var image: [UInt8] = []
        for _ in 0..<256 { image += noise(1024, &random) + [UInt8](repeating: 7, count: 3072) }
        image += noise(1 << 20, &random)
        image += [UInt8](repeating: 0, count: 2 << 20)
        try writer.append(volume: 0, offsetBytes: 0, image)
        let point = try writer.seal()!
        #expect(try store.image(point.id, volume: 0) == image)
        let stored = store.statistics().storedBytes
        if compression == .none { #expect(stored == 2 << 20) } else { #expect(stored > 1 << 20 && stored < (1 << 20) + (512 << 10)) }
        // As many bytes as the segments hold beside their headers.
        let segments = try directory.files().filter { $0.hasPrefix("segments/") }
        store.close()
        try openStore(directory, options).close()
        let lengths = try segments.map { try FileManager.default.attributesOfItem(atPath: directory.path + "/" + $0)[.size] as! Int - 4096 }
        #expect(UInt64(lengths.reduce(0, +)) == stored)
    }

    @Test func aBlockThatIsZeroButWasNotWhenItWasHashedIsABadBlock() throws {
        let directory = TemporaryDirectory()
        let store = try openStore(directory)
        try store.createGroup(webGroup, volumes: [spec("vda", bytes: 8 * 4096)])
        let writer = try store.begin(1)
        let zeroes = [UInt8](repeating: 0, count: 8 * 4096)
        var checksums = sums(zeroes, offset: 0)
        checksums[5] = sums([UInt8](repeating: 1, count: 4096), offset: 5 * 4096)[0]
        try zeroes.withUnsafeBytes { bytes in try checksums.withUnsafeBufferPointer { try writer.append(volume: 0, offsetBytes: 0, bytes: bytes, checksums: $0) } }
        let point = try writer.seal()!
        #expect(throws: StoreError.self) { try store.image(point.id, volume: 0) }
        #expect(store.statistics().storedBytes == 4096)
        store.close()
    }

    /// The sender waits to hear of what it sent, however little of a buffer that fills.
    @Test func bytesThatShrankAreCreditedWithoutWaitingForAFullBuffer() throws {
        let directory = TemporaryDirectory()
        var options = smallOptions
        options.writeBufferBytes = 256 << 10
        options.writeBytesMin = 256 << 10
        let store = try openStore(directory, options)
        try store.createGroup(webGroup, volumes: [spec("vda", bytes: 16 << 20)])
        let writer = try store.begin(1)
        let credits = Replica.Semaphore()
        let lock = NSLock()
        nonisolated(unsafe) var credited = 0
        writer.onWritten = { count in
            lock.withLock { credited += count }
            credits.signal()
        }
        let zeroes = [UInt8](repeating: 0, count: 64 << 10)
        try writer.append(volume: 0, offsetBytes: 0, zeroes)
        #expect(lock.withLock { credited } == 64 << 10)
        let text = [UInt8](repeating: 9, count: 64 << 10)
        for index in 1...4 { try writer.append(volume: 0, offsetBytes: UInt64(index) << 16, text) }
        credits.wait()
        credits.wait()
        #expect(lock.withLock { credited } == 5 << 16)
        writer.abandon()
        store.close()
    }

    /// A page of checksums is read when it is needed: damage to it is told by who reads those blocks, and by nobody else.
    @Test func aDamagedPageOfChecksumsIsNamedAndTheOtherBlocksAreServed() async throws {
        let directory = TemporaryDirectory()
        var options = smallOptions
        options.compression = .none
        options.residentChecksumCountMax = 0
        var store = try openStore(directory, options)
        let size = 1200 * 4096
        try store.createGroup(webGroup, volumes: [spec("vda", bytes: UInt64(size))])
        var random = SeededRandom(seed: 4)
        let image = noise(size, &random)
        let writer = try store.begin(1)
        try writer.append(volume: 0, offsetBytes: 0, image)
        let point = try writer.seal()!
        store.close()
        let layer = try #require(try directory.files().first { $0.hasPrefix("layers/") })
        let descriptor = open(directory.path + "/" + layer, O_RDWR)
        // Header, one page of extents, then pages of 512 checksums: one in the second.
        var byte: UInt8 = 0
        #expect(pread(descriptor, &byte, 1, 2 * 4096 + 4096 + 80) == 1)
        byte ^= 4
        #expect(pwrite(descriptor, &byte, 1, 2 * 4096 + 4096 + 80) == 1)
        close(descriptor)
        store = try openStore(directory, options)
        let loop = try EventLoop(name: "test")
        defer { loop.shutdown() }
        let reader = try store.openRecoveryPoint(webGroup, point.id, volume: 0)
        let face = RecoveryPointStore(reader: reader, loop: loop)
        let batch = RequestBatch(loop: loop)
        for round in 0..<2 {
            let results = batch.run(face, [0, 511, 512, 1023, 1024].map { .init(operation: .read, offset: $0 * 4096, count: 4096) })
            #expect(results.map(\.0) == [0, 0, EIO, EIO, 0], "round \(round)")
        }
        var block = [UInt8](repeating: 0, count: 4096)
        func readBlock(_ number: Int) throws { try block.withUnsafeMutableBytes { try reader.read(offsetBytes: UInt64(number * 4096), into: $0) } }
        #expect(throws: StoreError.damaged(path: directory.path + "/" + layer, offsetBytes: 3 * 4096, what: "a page of block checksums does not match its checksum")) { try readBlock(700) }
        try readBlock(1100)
        #expect(block == Array(image[1100 * 4096..<1101 * 4096]))
        store.close()
    }

    /// A layer that nothing names any more is read as long as somebody holds an index that does.
    @Test func theFileOfADroppedLayerStaysWhileItsChecksumsAreRead() throws {
        let directory = TemporaryDirectory()
        var options = smallOptions
        options.residentChecksumCountMax = 0
        let store = try openStore(directory, options)
        try store.createGroup(webGroup, volumes: [spec("vda", bytes: 64 * 4096)])
        var random = SeededRandom(seed: 5)
        let image = noise(64 * 4096, &random)
        let writer = try store.begin(1)
        try writer.append(volume: 0, offsetBytes: 0, image)
        let point = try writer.seal()!
        func layers() throws -> Int { try directory.files().filter { $0.hasPrefix("layers/") }.count }
        let record = store.read { $0.layers.values.first! }
        var held: LayerChecksums? = store.checksums.known(record.id, digest: record.digest)
        #expect(held != nil && held!.resident == nil)
        var sums = [UInt64](repeating: 0, count: 64)
        try store.deleteGroup(webGroup)
        #expect(try layers() == 1)
        try sums.withUnsafeMutableBufferPointer { try held!.copy(0, 64, into: $0.baseAddress!) }
        #expect(sums == expectedSums(image))
        held = nil
        try store.thread.perform {}
        #expect(try layers() == 0)
        _ = point
        store.close()
    }

    /// Clients that read on and on, several at once, in pieces that fit neither blocks nor clusters.
    @Test(arguments: StoreCompression.allCases)
    func whatIsReadAheadIsWhatIsThere(compression: StoreCompression) async throws {
        var random = SeededRandom(seed: 6)
        let directory = TemporaryDirectory()
        var options = smallOptions
        options.compression = compression
        options.writeBufferBytes = 1 << 20
        options.segmentBytes = 64 << 20
        let size = 2000 * 4096 + 1024
        let store = try openStore(directory, options)
        try store.createGroup(webGroup, volumes: [spec("vda", bytes: UInt64(size))])
        var image = Self.mixture(size, &random)
        var writer = try store.begin(1)
        try writer.append(volume: 0, offsetBytes: 0, image)
        _ = try writer.seal()
        writer = try store.begin(2)
        for _ in 0..<40 {
            let start = random.below(1900)
            let bytes = Self.mixture(4096 * (1 + random.below(30)), &random)
            try writer.append(volume: 0, offsetBytes: UInt64(start * 4096), bytes)
            image.replaceSubrange(start * 4096..<start * 4096 + bytes.count, with: bytes)
        }
        let point = try writer.seal()!
        let loop = try EventLoop(name: "test")
        defer { loop.shutdown() }
        let batch = RequestBatch(loop: loop)
        let reader = try store.openRecoveryPoint(webGroup, point.id, volume: 0)
        for _ in 0..<4 {
            let face = RecoveryPointStore(reader: reader, loop: loop)
            var cursors = (0..<6).map { _ in random.below(size / 512) * 512 }
            // Small ones are read ahead of wherever they are, large ones where they fall into many pieces.
            let lengths = (0..<6).map { _ in 512 * (1 + random.below([16, 256, 2048][random.below(3)])) }
            for _ in 0..<250 {
                var items: [RequestBatch.Item] = []
                for index in cursors.indices where random.below(4) > 0 {
                    for _ in 0...random.below(3) {
                        let count = min(lengths[index], size - cursors[index])
                        items.append(.init(operation: .read, offset: cursors[index], count: count))
                        cursors[index] = (cursors[index] + count) % (size / 512 * 512)
                    }
                }
                if items.isEmpty { continue }
                for (item, result) in zip(items, batch.run(face, items)) {
                    #expect(result.0 == 0 && result.1 == Array(image[item.offset..<item.offset + item.count]), "\(item.offset)+\(item.count)")
                }
            }
            // Goes while something is being read ahead.
        }
        #expect(store.statistics().badBlockCount == 0)
        store.close()
    }

    @Test func largeRequestsAreReadAheadOfWhereTheyFallIntoManyPieces() {
        let length: UInt32 = 1 << 20
        #expect(ReadAhead.isWorthwhile(lengthBytes: 64 << 10, pieceCount: 1))
        #expect(ReadAhead.isWorthwhile(lengthBytes: length, pieceCount: 16))
        // In one place: two long pieces; or as many as it lies in buffers, beginning anywhere, when it was in many before.
        #expect(!ReadAhead.isWorthwhile(lengthBytes: length, pieceCount: 2))
        #expect(!ReadAhead.isWorthwhile(lengthBytes: length, pieceCount: Int(length) / (ReadAhead.bufferBlocks * 4096) + 1))
    }

    /// A block that was put right is served although it was wrong when it was read ahead.
    @Test func aBadBlockReadAheadIsReadAgainBeforeItIsRefused() async throws {
        var random = SeededRandom(seed: 7)
        let directory = TemporaryDirectory()
        let store = try openStore(directory, StoreOptions())
        let size = 256 * 4096
        try store.createGroup(webGroup, volumes: [spec("vda", bytes: UInt64(size))])
        let image = noise(size, &random)
        let writer = try store.begin(1)
        try writer.append(volume: 0, offsetBytes: 0, image)
        let point = try writer.seal()!
        let segment = directory.path + "/" + (try #require(try directory.files().first { $0.hasPrefix("segments/") }))
        let descriptor = open(segment, O_RDWR)
        defer { close(descriptor) }
        // Block 60 of the volume is block 61 of the segment.
        #expect(pwrite(descriptor, "x", 1, 61 * 4096 + 5) == 1)
        let loop = try EventLoop(name: "test")
        defer { loop.shutdown() }
        let batch = RequestBatch(loop: loop)
        let face = RecoveryPointStore(reader: try store.openRecoveryPoint(webGroup, point.id, volume: 0), loop: loop)
        func read(_ blocks: Range<Int>) -> [Int32] { blocks.map { batch.run(face, [.init(operation: .read, offset: $0 * 4096, count: 4096)])[0].0 } }
        #expect(read(0..<40).allSatisfy { $0 == 0 })
        var byte = image[60 * 4096 + 5]
        #expect(pwrite(descriptor, &byte, 1, 61 * 4096 + 5) == 1)
        #expect(read(40..<128).allSatisfy { $0 == 0 })
        #expect(pwrite(descriptor, "y", 1, 201 * 4096 + 5) == 1)
        let again = RecoveryPointStore(reader: try store.openRecoveryPoint(webGroup, point.id, volume: 0), loop: loop)
        #expect((150..<256).map { batch.run(again, [.init(operation: .read, offset: $0 * 4096, count: 4096)])[0].0 }.enumerated().allSatisfy { $1 == ($0 == 50 ? EIO : 0) })
        #expect(store.statistics().badBlockCount == 1)
        store.close()
    }

    private func expectedSums(_ bytes: [UInt8]) -> [UInt64] { sums(bytes, offset: 0) }
}

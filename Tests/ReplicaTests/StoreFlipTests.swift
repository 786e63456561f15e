import BlockTap
import Foundation
import Glibc
import Testing

@testable import Replica

/// Bits flip and garbage comes where compressed data and layers are: a read gives the right data or a named error.
@Suite struct StoreFlipTests {
    @Test(arguments: [StoreCompression.lz4, .zstd], [0, 64 << 10])
    func damageToSegmentsAndLayersGivesTheRightDataOrAnError(compression: StoreCompression, residentMax: Int) throws {
        var random = SeededRandom(seed: UInt64(residentMax) + 7)
        let directory = TemporaryDirectory()
        var options = smallOptions
        options.compression = compression
        options.residentChecksumCountMax = residentMax
        let size = 96 * 4096 + 1024
        var store = try openStore(directory, options)
        try store.createGroup(webGroup, volumes: [spec("vda", bytes: UInt64(size))])
        var image: [UInt8] = []
        while image.count < size { image += noise(1024, &random) + [UInt8](repeating: UInt8(random.below(256)), count: 3072) }
        image.removeLast(image.count - size)
        var point: RecoveryPoint!
        for epoch in 1...3 as ClosedRange<UInt64> {
            let writer = try store.begin(epoch)
            if epoch == 1 { try writer.append(volume: 0, offsetBytes: 0, image) }
            // Leaves parts of clusters.
            for block in [20, 37, 38, 70] as [Int] where epoch > 1 {
                let bytes = [UInt8](repeating: UInt8(epoch), count: 4096 * Int(epoch))
                try writer.append(volume: 0, offsetBytes: UInt64(block * 4096), bytes)
                image.replaceSubrange(block * 4096..<block * 4096 + bytes.count, with: bytes)
            }
            point = try writer.seal()!
        }
        #expect(try store.image(point.id, volume: 0) == image)
        store.close()
        let files = try directory.files().filter { $0.hasPrefix("segments/") || $0.hasPrefix("layers/") }
        var (right, refused) = (0, 0)
        var buffer = [UInt8](repeating: 0, count: 7 * 4096)
        for _ in 0..<1500 {
            let path = directory.path + "/" + files[random.below(files.count)]
            let descriptor = open(path, O_RDWR)
            defer { close(descriptor) }
            var status = stat()
            fstat(descriptor, &status)
            // Headers of clusters are hit often: they are where decompression begins.
            var offset = random.below(Int(status.st_size))
            if random.below(3) == 0 { offset = min(Int(status.st_size) - 1, offset / 4096 * 4096 + random.below(12)) }
            let count = random.below(2) == 0 ? 1 : min(Int(status.st_size) - offset, 1 + random.below(300))
            var old = [UInt8](repeating: 0, count: count)
            #expect(pread(descriptor, &old, count, off_t(offset)) == count)
            var new = count == 1 ? [old[0] ^ 1 << UInt8(random.below(8))] : noise(count, &random)
            #expect(pwrite(descriptor, &new, count, off_t(offset)) == count)
            do {
                store = try openStore(directory, options)
                defer { store.close() }
                let reader = try store.openRecoveryPoint(webGroup, point.id, volume: 0)
                for start in stride(from: 0, to: size, by: buffer.count) {
                    let part = min(buffer.count, size - start)
                    do {
                        try buffer.withUnsafeMutableBytes { try reader.read(offsetBytes: UInt64(start), into: UnsafeMutableRawBufferPointer(rebasing: $0[..<part])) }
                        #expect(buffer[..<part] == image[start..<start + part], "\(path) \(offset)+\(count)")
                        right += 1
                    } catch is StoreError { refused += 1 }
                }
            } catch is StoreError { refused += 1 }
            #expect(pwrite(descriptor, &old, count, off_t(offset)) == count)
        }
        #expect(right > 1000 && refused > 500)
        store = try openStore(directory, options)
        #expect(try store.image(point.id, volume: 0) == image)
        store.close()
    }

    /// The same through the ring, and forks made of what is damaged.
    @Test(arguments: [StoreCompression.lz4, .zstd], [0, 64 << 10])
    func damageGivesTheRightDataOrAnErrorThroughTheRing(compression: StoreCompression, residentMax: Int) throws {
        var random = SeededRandom(seed: UInt64(residentMax) + 8)
        let directory = TemporaryDirectory()
        var options = smallOptions
        options.compression = compression
        options.residentChecksumCountMax = residentMax
        let size = 160 * 4096
        let store = try openStore(directory, options)
        try store.createGroup(webGroup, volumes: [spec("vda", bytes: UInt64(size))])
        var image: [UInt8] = []
        while image.count < size { image += noise(1024, &random) + [UInt8](repeating: UInt8(random.below(256)), count: 3072) }
        let writer = try store.begin(1)
        try writer.append(volume: 0, offsetBytes: 0, image)
        let point = try writer.seal()!
        let segment = directory.path + "/" + (try #require(try directory.files().first { $0.hasPrefix("segments/") }))
        let loop = try EventLoop(name: "test")
        defer { loop.shutdown() }
        let batch = RequestBatch(loop: loop)
        let reader = try store.openRecoveryPoint(webGroup, point.id, volume: 0)
        let descriptor = open(segment, O_RDWR)
        defer { close(descriptor) }
        var refused = 0
        for _ in 0..<1000 {
            var status = stat()
            fstat(descriptor, &status)
            var offset = 4096 + random.below(Int(status.st_size) - 4096 - 300)
            if random.below(3) == 0 { offset = offset / 4096 * 4096 + random.below(12) }
            let count = random.below(2) == 0 ? 1 : 1 + random.below(300)
            var old = [UInt8](repeating: 0, count: count)
            #expect(pread(descriptor, &old, count, off_t(offset)) == count)
            var new = count == 1 ? [old[0] ^ 1 << UInt8(random.below(8))] : noise(count, &random)
            #expect(pwrite(descriptor, &new, count, off_t(offset)) == count)
            // One that has read nothing yet; in order it reads ahead.
            let face = RecoveryPointStore(reader: reader, loop: loop)
            var items = stride(from: 0, to: size, by: 8192).map { RequestBatch.Item(operation: .read, offset: $0, count: 8192) }
            if random.below(2) == 0 { items.shuffle(using: &random) }
            for (item, result) in zip(items, batch.run(face, items)) {
                if result.0 == 0 { #expect(result.1 == Array(image[item.offset..<item.offset + item.count])) } else { refused += 1 }
            }
            #expect(pwrite(descriptor, &old, count, off_t(offset)) == count)
        }
        #expect(refused > 200)
        store.close()
    }

    @Test func decompressionStaysInItsBoundsWhateverItIsGiven() {
        var random = SeededRandom(seed: 1)
        let stored = UnsafeMutableRawPointer.allocate(byteCount: ClusterCodec.storedBytesMax, alignment: 4096)
        // The byte behind the cluster is watched.
        let target = UnsafeMutableRawPointer.allocate(byteCount: ClusterCodec.bytesMax + 4096, alignment: 4096)
        defer {
            stored.deallocate()
            target.deallocate()
        }
        for codec in [StoreCompression.lz4, .zstd] {
            let encoder = ClusterEncoder(codec, volumeCount: 1)
            var plain: [UInt8] = []
            for _ in 0..<16 { plain += noise(1500, &random) + [UInt8](repeating: 3, count: 2596) }
            for round in 0..<20_000 {
                let blocks = 2 + random.below(15)
                let encoded = plain.withUnsafeBytes { encoder.encode($0.baseAddress!, blockCount: blocks, volume: 0) }!
                stored.copyMemory(from: encoded.baseAddress!, byteCount: encoded.count)
                let part = ClusterPart(storedBlocks: encoded.count / 4096, blockCount: blocks, skip: 0)
                let needed = 1 + random.below(blocks)
                let watched = target + blocks * 4096
                watched.storeBytes(of: 0x1122_3344_5566_7788, as: UInt64.self)
                if round % 4 != 0 {
                    for _ in 0...random.below(4) {
                        let at = random.below(2) == 0 ? random.below(encoded.count) : random.below(64)
                        stored.storeBytes(of: UInt8(random.below(256)), toByteOffset: at, as: UInt8.self)
                    }
                }
                let isWhole = ClusterCodec.decode(stored, part, neededBlocks: needed, into: target)
                #expect(watched.load(as: UInt64.self) == 0x1122_3344_5566_7788)
                if round % 4 == 0 { #expect(isWhole && plain.withUnsafeBytes { memcmp($0.baseAddress!, target, needed * 4096) } == 0) }
            }
        }
    }
}

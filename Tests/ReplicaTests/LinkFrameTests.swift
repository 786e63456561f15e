import BlockTap
import CLZ4
import NIOCore
import Testing

@testable import Replica

@Suite struct LinkFrameTests {
    private func frame(_ type: FrameType, sequence: UInt64, meta: [UInt8], payload: [UInt8] = []) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: FrameLimits.headerBytes) + meta
        bytes.withUnsafeMutableBytes { FrameHeader.write(into: $0, type: type, payloadBytes: payload.count, sequence: sequence) }
        return bytes + payload
    }

    @Test(arguments: 0..<20) func framesSurviveAnyCuttingOfTheStream(seed: UInt64) throws {
        var random = SeededRandom(seed: seed)
        var stream: [UInt8] = []
        var expected: [(FrameType, [UInt8], [UInt8])] = []
        for sequence in 0..<40 {
            let types: [FrameType] = [.extents, .ack, .control, .zero]
            let type = types[random.below(types.count)]
            let meta = noise(random.below(min(type.metaBytesMax, 5000) + 1), &random)
            let payload = type == .extents ? noise(random.below(20_000), &random) : []
            expected.append((type, meta, payload))
            stream += frame(type, sequence: UInt64(sequence), meta: meta, payload: payload)
        }
        var assembler = FrameAssembler()
        var index = 0
        var position = 0
        while position < stream.count {
            let count = min(stream.count - position, random.below(3) == 0 ? 1 : random.below(9000))
            var chunk = ByteBuffer(bytes: stream[position..<(position + count)])
            try assembler.consume(&chunk) { view in
                #expect(view.header.type == expected[index].0)
                #expect(Array(view.meta) == expected[index].1)
                #expect(Array(view.payload) == expected[index].2)
                index += 1
            }
            #expect(chunk.readableBytes == 0)
            position += count
        }
        #expect(index == expected.count)
        #expect(assembler.receivedBytes == UInt64(stream.count))
    }

    private func error(_ bytes: [UInt8]) -> FrameError? {
        var assembler = FrameAssembler()
        var buffer = ByteBuffer(bytes: bytes)
        do {
            try assembler.consume(&buffer) { _ in }
            return nil
        } catch { return error as? FrameError }
    }

    @Test func everyFlippedBitOfTheHeadIsNoticed() {
        let good = frame(.ack, sequence: 0, meta: [1, 2, 3, 4, 5, 6, 7, 8])
        #expect(error(good) == nil)
        for bit in 0..<(good.count * 8) {
            var bad = good
            bad[bit / 8] ^= 1 << UInt8(bit % 8)
            // A longer length only makes the receiver wait; everything else fails at once.
            let isLength = (8..<12).contains(bit / 8)
            #expect(error(bad) != nil || isLength, "bit \(bit)")
        }
    }

    @Test func longFramesAreRefusedBeforeMemoryIsSetAside() {
        var bytes = frame(.extents, sequence: 0, meta: [])
        bytes.replaceSubrange(12..<16, with: [0, 0, 0, 0xFF])
        #expect(error(bytes) == .tooLong(.extents, meta: 0, payload: 0xFF00_0000))
        bytes.replaceSubrange(8..<12, with: [0, 0, 0, 0x7F])
        #expect(error(bytes) == .tooLong(.extents, meta: 0x7F00_0000, payload: 0xFF00_0000))
    }

    @Test func repeatedAndMissingFramesAreNoticed() {
        let first = frame(.ack, sequence: 0, meta: [1])
        #expect(error(first + first) == .sequence(expected: 1, got: 0))
        #expect(error(first + frame(.ack, sequence: 2, meta: [1])) == .sequence(expected: 1, got: 2))
    }

    @Test func versionIsNoticedBeforeTheChecksum() {
        var bytes = frame(.hello, sequence: 0, meta: [])
        bytes[4] = 7
        #expect(error(bytes) == .version(7))
    }

    // MARK: Batches

    @Test func zeroRunsAreTakenOutAndNeighboursJoined() {
        var batch = ExtentBatch(allocator: ByteBufferAllocator())
        var bytes = [UInt8](repeating: 1, count: 40 * blockBytes)
        // A short run stays, a long one goes.
        for index in (3 * blockBytes)..<(5 * blockBytes) { bytes[index] = 0 }
        for index in (10 * blockBytes)..<(30 * blockBytes) { bytes[index] = 0 }
        bytes.withUnsafeBytes { batch.append(disk: 2, offsetBytes: 8192, bytes: $0) }
        bytes.withUnsafeBytes { batch.append(disk: 2, offsetBytes: 8192 + UInt64(bytes.count), bytes: UnsafeRawBufferPointer(rebasing: $0[..<blockBytes])) }
        #expect(
            batch.extents == [
                WireExtent(volume: 2, length: UInt32(10 * blockBytes), offsetBytes: 8192),
                WireExtent(volume: 2, length: UInt32(11 * blockBytes), offsetBytes: UInt64(8192 + 30 * blockBytes)),
            ])
        #expect(batch.zeroRuns == [WireExtent(volume: 2, length: 20, offsetBytes: UInt64(8192 + 10 * blockBytes))])
        #expect(batch.checksums.count == 21)
        #expect(batch.zeroBytes == UInt64(20 * blockBytes))
    }

    @Test func zeroTailsAndSingleZeroBlocksAreRuns() {
        var batch = ExtentBatch(allocator: ByteBufferAllocator())
        let zeroes = [UInt8](repeating: 0, count: 512)
        zeroes.withUnsafeBytes { batch.append(disk: 0, offsetBytes: 4096, bytes: $0) }
        #expect(!batch.hasData)
        #expect(batch.zeroRuns == [WireExtent(volume: 0, length: 1, offsetBytes: 4096)])
        #expect(batch.zeroBytes == 512)
    }

    @Test(arguments: 0..<30) func batchKeepsEveryByte(seed: UInt64) {
        var random = SeededRandom(seed: seed)
        let count = (1 + random.below(100)) * blockBytes - (random.below(2) == 0 ? 512 : 0)
        var bytes = noise(count, &random)
        for _ in 0..<random.below(6) {
            let start = random.below(count)
            let end = min(count, start + random.below(30 * blockBytes))
            for index in start..<end { bytes[index] = 0 }
        }
        var batch = ExtentBatch(allocator: ByteBufferAllocator())
        bytes.withUnsafeBytes { batch.append(disk: 0, offsetBytes: 0, bytes: $0) }
        var rebuilt = [UInt8](repeating: 0xEE, count: count)
        for run in batch.zeroRuns {
            let end = min(count, Int(run.offsetBytes) + Int(run.length) * blockBytes)
            for index in Int(run.offsetBytes)..<end { rebuilt[index] = 0 }
        }
        var position = 0
        for extent in batch.extents {
            let data = batch.payload.getBytes(at: batch.payload.readerIndex + position, length: Int(extent.length))!
            rebuilt.replaceSubrange(Int(extent.offsetBytes)..<(Int(extent.offsetBytes) + data.count), with: data)
            position += data.count
        }
        #expect(rebuilt == bytes)
        #expect(position == batch.dataBytes)
    }

    // MARK: Compression

    private func compressionAfter(rate bytesPerWindow: Int, busyPercent: Int64, windows: Int) -> Compression {
        var compression = Compression(allocator: ByteBufferAllocator())
        var now: Int64 = 0
        for _ in 0...windows {
            now += Compression.windowNanoseconds
            compression.account(begin: now - Compression.windowNanoseconds * busyPercent / 100, end: now, wireBytes: bytesPerWindow)
        }
        return compression
    }

    @Test func slowLinksAreCompressedAndFastOnesAreNot() {
        #expect(compressionAfter(rate: 1_000_000, busyPercent: 5, windows: 3).isOn)
        #expect(!compressionAfter(rate: 60_000_000, busyPercent: 50, windows: 3).isOn)
        #expect(!compressionAfter(rate: 1_000_000, busyPercent: 95, windows: 3).isOn)
    }

    @Test func onlyPayloadsThatShrinkArePacked() throws {
        var compression = compressionAfter(rate: 0, busyPercent: 0, windows: 3)
        var random = SeededRandom(seed: 1)
        #expect(compression.pack(ByteBuffer(bytes: noise(100_000, &random))) == nil)
        let text = ByteBuffer(string: String(repeating: "afterimage follows the writes. ", count: 4000))
        let attempt = compression.pack(text)
        let packed = try #require(attempt)
        #expect(packed.readableBytes < text.readableBytes / 4)
        var plain = [UInt8](repeating: 0, count: text.readableBytes)
        let count = packed.withUnsafeReadableBytes { source in
            plain.withUnsafeMutableBytes { target in
                LZ4_decompress_safe(
                    source.baseAddress!.assumingMemoryBound(to: CChar.self), target.baseAddress!.assumingMemoryBound(to: CChar.self),
                    Int32(source.count), Int32(target.count))
            }
        }
        #expect(count == Int32(text.readableBytes))
        #expect(plain == Array(text.readableBytesView))
    }

    // MARK: Throttle

    @Test func throttleGivesTheRateOverTime() {
        var throttle = Throttle(bytesPerSecond: 1_000_000)
        var now: Int64 = 0
        var sent = 0
        while now < 10_000_000_000 {
            let delay = throttle.delay(now: now)
            if delay > 0 {
                now += delay
            } else {
                throttle.spend(throttle.frameBytes)
                sent += throttle.frameBytes
            }
        }
        #expect((9_500_000...10_500_000).contains(sent))
    }
}

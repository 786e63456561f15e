import CLZ4
import NIOCore

/// LZ4 for EXTENTS payloads, where it pays.
///
/// Two decisions. *Does this payload shrink?* Two samples of 4 KiB are tried, which costs microseconds. *Is the link what we
/// wait for?* Compressing costs more processor time than encrypting, so on a link as fast as the processors it only slows a full
/// sync down. Windows of time are therefore judged by where the sender's time went: compress while bytes leave slower than
/// `linkBytesPerSecondMax`, and stop, for a doubling number of windows, when compressing keeps the sender itself busy.
struct Compression {
    static let windowNanoseconds: Int64 = 100_000_000
    static let linkBytesPerSecondMax = 250_000_000.0
    static let sampleBytes = 4096
    /// Sizes after compression that are worth it, in percent.
    static let payingPercent = 85

    /// `auto` is what is described above.
    var choice: CompressionChoice
    private(set) var isOn = false
    private var windowStart: Int64 = 0
    private var windowWireBytes = 0
    private var windowBusyNanoseconds: Int64 = 0
    private var pauseWindows = 0
    private var pauseLength = 1
    private var packed: ByteBuffer

    init(allocator: ByteBufferAllocator, choice: CompressionChoice = .auto) {
        self.choice = choice
        packed = allocator.buffer(capacity: 0)
    }

    /// After every turn of the sender's pump: when it began and ended, and what it put on the wire. Times in nanoseconds of one
    /// monotonic clock.
    mutating func account(begin: Int64, end: Int64, wireBytes: Int) {
        windowWireBytes += wireBytes
        windowBusyNanoseconds += end - begin
        let length = end - windowStart
        guard length >= Self.windowNanoseconds else { return }
        let rate = Double(windowWireBytes) * 1e9 / Double(length)
        let isBusy = windowBusyNanoseconds * 10 > length * 7
        windowStart = end
        windowWireBytes = 0
        windowBusyNanoseconds = 0
        if isOn, isBusy || rate > Self.linkBytesPerSecondMax {
            isOn = false
            pauseWindows = pauseLength
            pauseLength = min(pauseLength * 2, 128)
        } else if isOn {
            pauseLength = 1
        } else if pauseWindows > 0 {
            pauseWindows -= 1
        } else {
            isOn = rate < Self.linkBytesPerSecondMax && !isBusy
        }
    }

    /// The payload's LZ4 block, or nil when it is to be sent as it is.
    mutating func pack(_ payload: ByteBuffer) -> ByteBuffer? {
        guard choice == .always || (choice == .auto && isOn), payload.readableBytes > 512 else { return nil }
        let limit = payload.readableBytes * Self.payingPercent / 100
        packed.clear(minimumCapacity: limit)
        packed.writeWithUnsafeMutableBytes(minimumWritableBytes: limit) { target in
            payload.withUnsafeReadableBytes { plain in
                guard Self.looksCompressible(plain) else { return 0 }
                return Int(Self.compress(plain, into: UnsafeMutableRawBufferPointer(rebasing: target[..<limit])))
            }
        }
        return packed.readableBytes > 0 ? packed : nil
    }

    private static func looksCompressible(_ plain: UnsafeRawBufferPointer) -> Bool {
        guard plain.count > 4 * sampleBytes else { return true }
        return withUnsafeTemporaryAllocation(byteCount: sampleBytes * payingPercent / 100, alignment: 16) { scratch in
            [plain.count / 3, plain.count / 3 * 2].contains { offset in
                compress(UnsafeRawBufferPointer(rebasing: plain[offset..<(offset + sampleBytes)]), into: scratch) > 0
            }
        }
    }

    /// 0 when the result does not fit.
    private static func compress(_ plain: UnsafeRawBufferPointer, into target: UnsafeMutableRawBufferPointer) -> Int32 {
        LZ4_compress_fast(
            plain.baseAddress?.assumingMemoryBound(to: CChar.self), target.baseAddress?.assumingMemoryBound(to: CChar.self),
            Int32(plain.count), Int32(target.count), 2)
    }
}

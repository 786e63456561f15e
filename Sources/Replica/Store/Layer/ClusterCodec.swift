import BlockTap
import CLZ4
import CZstd
import Glibc
import Synchronization

/// How a store compresses the data that it receives from now on; it reads all of them.
public enum StoreCompression: String, Sendable, Codable, CaseIterable {
    case none, lz4, zstd
}

/// The first 8 bytes of a compressed cluster in its segment; the compressed bytes follow, then zeroes up to a whole block.
struct ClusterHeader {
    var compressedBytes: UInt32
    /// 1 = LZ4 block, 2 = zstd frame.
    var codec: UInt8
    /// Blocks when decompressed.
    var blockCount: UInt8
    var reserved: UInt16 = 0
}

/// Clusters: up to 16 whole blocks that lie side by side on the volume, compressed as one and stored in fewer blocks. Nothing here says
/// whether what comes out is right: the checksums of the blocks do, which are of the uncompressed ones.
enum ClusterCodec {
    static let headerBytes = 8
    /// Of a decompressed cluster.
    static let bytesMax = ClusterPart.blocksMax * blockBytes
    static let storedBytesMax = (ClusterPart.blocksMax - 1) * blockBytes
    static let lz4: UInt8 = 1
    static let zstd: UInt8 = 2

    /// In how many blocks `blockCount` may be stored at most, to be worth it: one of eight is saved, and at least one.
    static func storedBlocksMax(_ blockCount: Int) -> Int { blockCount - max(1, blockCount / 8) }

    /// Decompresses at least the cluster's first `neededBlocks` blocks; `target` has room for all of it. False when this is no such
    /// cluster. Safe for any bytes: reads nothing behind `stored`, writes nothing behind the cluster.
    static func decode(_ stored: UnsafeRawPointer, _ part: ClusterPart, neededBlocks: Int, into target: UnsafeMutableRawPointer) -> Bool {
        let header = stored.loadUnaligned(as: ClusterHeader.self)
        let capacity = part.blockCount * blockBytes
        let needed = neededBlocks * blockBytes
        guard Int(header.blockCount) == part.blockCount, header.reserved == 0, header.compressedBytes > 0,
            Int(header.compressedBytes) <= part.storedBlocks * blockBytes - headerBytes
        else { return false }
        let source = stored + headerBytes
        switch header.codec {
        case lz4:
            let from = source.assumingMemoryBound(to: CChar.self)
            let to = target.assumingMemoryBound(to: CChar.self)
            if needed == capacity { return Int(LZ4_decompress_safe(from, to, Int32(header.compressedBytes), Int32(capacity))) == capacity }
            return Int(LZ4_decompress_safe_partial(from, to, Int32(header.compressedBytes), Int32(needed), Int32(capacity))) >= needed
        case zstd:
            let context = ZstdContexts.take()
            defer { ZstdContexts.give(context) }
            return ZSTD_decompressDCtx(context, target, capacity, source, Int(header.compressedBytes)) == capacity
        default:
            return false
        }
    }
}

/// Decompression contexts (some 100 KB each), as many as threads ever decompressed at once.
private enum ZstdContexts {
    private static let free = Mutex<[UInt]>([])

    static func take() -> OpaquePointer {
        if let kept = free.withLock({ $0.popLast() }) { return OpaquePointer(bitPattern: kept)! }
        guard let context = ZSTD_createDCtx() else { fatalError("no memory to decompress with") }
        return context
    }

    static func give(_ context: OpaquePointer) {
        let kept = UInt(bitPattern: context)
        free.withLock { $0.append(kept) }
    }
}

/// Compresses what one epoch brings, where that pays. Most of what does not shrink is found out by compressing one block of sixteen, and
/// who finds nothing pauses for longer and longer, so that incompressible data costs next to nothing. One thread at a time.
final class ClusterEncoder {
    /// Clusters left alone after a try that did not pay: doubled with each up to this.
    static let pauseMax = 32

    private struct Trial {
        var pause = 1
        var left = 0
    }

    private let compression: StoreCompression
    private var trials: [Trial]
    private let scratch: UnsafeMutableRawPointer
    private var context: OpaquePointer?

    init(_ compression: StoreCompression, volumeCount: Int) {
        self.compression = compression
        trials = Array(repeating: Trial(), count: volumeCount)
        scratch = .allocate(byteCount: ClusterCodec.storedBytesMax, alignment: pageBytes)
    }

    deinit {
        scratch.deallocate()
        if let context { ZSTD_freeCCtx(context) }
    }

    /// These blocks as a cluster of whole blocks, padded with zeroes, or nil when they are better stored as they are. Valid until the next call.
    func encode(_ plain: UnsafeRawPointer, blockCount: Int, volume: Int) -> UnsafeRawBufferPointer? {
        guard compression != .none, blockCount >= 2 else { return nil }
        if trials[volume].left > 0 {
            trials[volume].left -= 1
            return nil
        }
        let limit = ClusterCodec.storedBlocksMax(blockCount) * blockBytes - ClusterCodec.headerBytes
        // One block from the middle says whether the rest is worth the time.
        let sample = blockCount > 3 ? compress(plain + blockCount / 2 * blockBytes, blockBytes, limit: blockBytes * 7 / 8) : 1
        let count = sample > 0 ? compress(plain, blockCount * blockBytes, limit: limit) : 0
        guard count > 0 else {
            trials[volume].pause = min(trials[volume].pause * 2, Self.pauseMax)
            trials[volume].left = trials[volume].pause
            return nil
        }
        trials[volume].pause = 1
        let header = ClusterHeader(compressedBytes: UInt32(count), codec: compression == .lz4 ? ClusterCodec.lz4 : ClusterCodec.zstd, blockCount: UInt8(blockCount))
        scratch.storeBytes(of: header, as: ClusterHeader.self)
        let used = ClusterCodec.headerBytes + count
        let stored = roundUp(used, to: blockBytes)
        memset(scratch + used, 0, stored - used)
        return UnsafeRawBufferPointer(start: scratch, count: stored)
    }

    /// Into the scratch, behind the header; 0 when the result is longer than `limit`.
    private func compress(_ plain: UnsafeRawPointer, _ count: Int, limit: Int) -> Int {
        let target = scratch + ClusterCodec.headerBytes
        if compression == .lz4 {
            return Int(LZ4_compress_fast(plain.assumingMemoryBound(to: CChar.self), target.assumingMemoryBound(to: CChar.self), Int32(count), Int32(limit), 1))
        }
        if context == nil { context = ZSTD_createCCtx() }
        guard let context else { return 0 }
        let result = ZSTD_compressCCtx(context, target, limit, plain, count, 1)
        return ZSTD_isError(result) != 0 ? 0 : Int(result)
    }
}

/// Whether all bytes (a multiple of 8, at least 16) are zero.
@inline(__always)
func isAllZero(_ bytes: UnsafeRawPointer, count: Int) -> Bool {
    bytes.loadUnaligned(as: UInt64.self) == 0 && memcmp(bytes, bytes + 8, count - 8) == 0
}

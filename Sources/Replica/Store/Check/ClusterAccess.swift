import BlockTap
import CLZ4
import CZstd
import Glibc

/// What checks and repair need of compressed clusters: a header of 8 bytes {compressed bytes u32, codec u8, blocks u8, 0 u16}, then the
/// compressed bytes, padded with zeroes to whole blocks.
enum ClusterAccess {
    private static let headerBytes = 8
    private static let lz4: UInt8 = 1
    private static let zstd: UInt8 = 2

    /// The cluster's blocks, all of them, into room for 16. False when these bytes are no such cluster.
    static func unpack(_ stored: UnsafeRawBufferPointer, _ part: ClusterPart, into target: UnsafeMutableRawBufferPointer) -> Bool {
        guard stored.count > headerBytes, target.count >= part.blockCount * blockBytes else { return false }
        let length = Int(stored.loadUnaligned(as: UInt32.self))
        let codec = stored.loadUnaligned(fromByteOffset: 4, as: UInt8.self)
        let blocks = Int(stored.loadUnaligned(fromByteOffset: 5, as: UInt8.self))
        let reserved = stored.loadUnaligned(fromByteOffset: 6, as: UInt16.self)
        guard blocks == part.blockCount, reserved == 0, length > 0, length <= stored.count - headerBytes else { return false }
        let source = stored.baseAddress! + headerBytes
        let wanted = blocks * blockBytes
        switch codec {
        case lz4:
            return LZ4_decompress_safe(source.assumingMemoryBound(to: CChar.self), target.baseAddress!.assumingMemoryBound(to: CChar.self), Int32(length), Int32(wanted)) == Int32(wanted)
        case zstd:
            return ZSTD_decompress(target.baseAddress!, wanted, source, length) == wanted
        default:
            return false
        }
    }

    /// A cluster of these blocks in `storedBlocks` whole blocks; nil when it does not fit.
    static func pack(_ plain: UnsafeRawBufferPointer, storedBlocks: Int) -> [UInt8]? {
        var bytes = [UInt8](repeating: 0, count: storedBlocks * blockBytes)
        let room = bytes.count - headerBytes
        var length = 0
        var codec = lz4
        bytes.withUnsafeMutableBytes { bytes in
            let target = bytes.baseAddress! + headerBytes
            length = Int(LZ4_compress_fast(plain.baseAddress!.assumingMemoryBound(to: CChar.self), target.assumingMemoryBound(to: CChar.self), Int32(plain.count), Int32(room), 1))
            // What zstd had made smaller may take it again, at the level it was made with or a higher one.
            for level in [1, 3, 9] as [Int32] where length <= 0 {
                let count = ZSTD_compress(target, room, plain.baseAddress!, plain.count, level)
                if ZSTD_isError(count) == 0 { (length, codec) = (count, zstd) }
            }
            guard length > 0 else { return }
            memset(target + length, 0, room - length)
            bytes.storeBytes(of: UInt32(length), as: UInt32.self)
            bytes.storeBytes(of: codec, toByteOffset: 4, as: UInt8.self)
            bytes.storeBytes(of: UInt8(plain.count / blockBytes), toByteOffset: 5, as: UInt8.self)
        }
        return length > 0 ? bytes : nil
    }
}

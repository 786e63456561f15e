import BlockTap
import CLZ4
import CZstd
import Glibc

/// What checks need of compressed clusters: a header of 8 bytes {compressed bytes u32, codec u8, blocks u8, 0 u16}, then the
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
}

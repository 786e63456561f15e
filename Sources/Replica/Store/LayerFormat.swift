/// How an extent's bytes lie in its segment. Only `plain` and `zero` are written so far.
enum ExtentEncoding: UInt8 {
    case plain = 0, lz4 = 1, zstd = 2
    /// A tombstone: the blocks are zero, there is nothing in a segment.
    case zero = 3
}

/// One extent of a layer, as it is stored (32 bytes, little-endian).
struct StoredExtent: Equatable {
    /// First block on the volume.
    var startBlock: UInt64
    var blockCount: UInt32
    var segment: UInt32
    /// Where the extent starts in the segment file, in blocks from the file's beginning.
    var segmentBlock: UInt32
    /// Its first entry in the layer's checksum section; one entry per block. Zero for tombstones, which have none.
    var checksumIndex: UInt32
    /// Bytes in the segment; `blockCount` × 4096 when plain, 0 for tombstones.
    var storedBytes: UInt32
    var encoding: UInt8
    var flags: UInt8 = 0
    var reserved: UInt16 = 0

    var endBlock: UInt64 { startBlock + UInt64(blockCount) }
    var isZero: Bool { encoding == ExtentEncoding.zero.rawValue }
}

/// Follows the `FileHeader` of a layer file, at byte 64 (128 bytes, little-endian).
struct LayerHeader {
    /// 0 = none below.
    var parent: UInt64
    /// Size of the volume at the cut.
    var sizeBytes: UInt64
    var extentCount: UInt64
    var checksumCount: UInt64
    /// Offsets of the sections in the file, multiples of 4096.
    var extentsOffset: UInt64
    var checksumsOffset: UInt64
    var fencesOffset: UInt64
    var fileBytes: UInt64
    var cutTimeNanoseconds: UInt64
    var epoch: UInt64
    var volumeIndex: UInt32
    var blockBytes: UInt32
    /// `EpochKind`.
    var kind: UInt8
    /// 0 crash, 1 file system, 2 application.
    var consistency: UInt8
    var reserved0: UInt16 = 0
    var reserved1: UInt32 = 0
    var reserved2: (UInt64, UInt64, UInt64) = (0, 0, 0)
    /// XXH3-64 of the file's bytes 0..<184.
    var checksum: UInt64 = 0
}

/// Per 4096-byte page of the extent section.
struct LayerFence {
    var firstBlock: UInt64
    /// XXH3-64 of the page.
    var checksum: UInt64
}

/// The last 32 bytes of a layer file.
struct LayerTrailer {
    static let magicNow: UInt64 = 0x444E_4552_5941_4C41  // "ALAYREND"
    var magic: UInt64
    var headerChecksum: UInt64
    /// XXH3-64 of the fence section.
    var fencesChecksum: UInt64
    /// XXH3-64 of the 24 bytes before; the MANIFEST repeats it.
    var checksum: UInt64
}

let pageBytes = 4096

@inline(__always)
func roundUp(_ value: Int, to unit: Int) -> Int { (value + unit - 1) / unit * unit }

/// Bytes of a volume's block that exist: less than 4096 only for the last one of a volume of odd size.
@inline(__always)
func blockLength(_ block: UInt64, sizeBytes: UInt64) -> Int {
    let start = block &* 4096
    return start >= sizeBytes ? 0 : Int(min(4096, sizeBytes - start))
}

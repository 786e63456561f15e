/// How an extent's bytes lie in its segment.
enum ExtentEncoding: UInt8 {
    case plain = 0
    /// Part of a compressed cluster (or all of it); the cluster's own header says how it is compressed.
    case cluster = 1
    /// A tombstone: the blocks are zero, there is nothing in a segment.
    case zero = 3
}

/// One extent of a layer, as it is stored (32 bytes, little-endian).
struct StoredExtent: Equatable {
    /// First block on the volume.
    var startBlock: UInt64
    var blockCount: UInt32
    var segment: UInt32
    /// Where the extent starts in the segment file, in blocks from the file's beginning; of a compressed one: where its cluster starts.
    var segmentBlock: UInt32
    /// Its first entry in the layer's checksum section; one entry per block. Zero for tombstones, which have none.
    var checksumIndex: UInt32
    /// Bytes in the segment; `blockCount` × 4096 when plain, 0 for tombstones; of a compressed one: of its whole cluster, in whole blocks.
    var storedBytes: UInt32
    var encoding: UInt8
    /// Compressed: blocks of the cluster before the extent's first one, and blocks in the whole cluster. Else 0.
    var clusterSkip: UInt8 = 0
    var clusterBlocks: UInt8 = 0
    var reserved: UInt8 = 0

    var endBlock: UInt64 { startBlock + UInt64(blockCount) }
    var isZero: Bool { encoding == ExtentEncoding.zero.rawValue }
    var isCompressed: Bool { encoding == ExtentEncoding.cluster.rawValue }
    /// Blocks of the segment that it needs: all of its cluster's when it is compressed.
    var segmentBlockCount: UInt32 { (storedBytes + 4095) / 4096 }

    var cluster: ClusterPart {
        isCompressed ? ClusterPart(storedBlocks: Int(segmentBlockCount), blockCount: Int(clusterBlocks), skip: Int(clusterSkip)) : .plain
    }
    /// With the index's `checksumIndex`.
    init(_ extent: IndexExtent) {
        let part = extent.cluster
        let blocks = extent.isZero ? 0 : part.isCompressed ? UInt32(part.storedBlocks) : extent.blockCount
        let encoding: ExtentEncoding = extent.isZero ? .zero : part.isCompressed ? .cluster : .plain
        self.init(
            startBlock: extent.startBlock, blockCount: extent.blockCount, segment: extent.isZero ? 0 : extent.segment, segmentBlock: extent.isZero ? 0 : extent.segmentBlock,
            checksumIndex: extent.checksumIndex, storedBytes: blocks * 4096, encoding: encoding.rawValue,
            clusterSkip: part.isCompressed ? UInt8(part.skip) : 0, clusterBlocks: part.isCompressed ? UInt8(part.blockCount) : 0)
    }

    init(startBlock: UInt64, blockCount: UInt32, segment: UInt32, segmentBlock: UInt32, checksumIndex: UInt32, storedBytes: UInt32, encoding: UInt8, clusterSkip: UInt8 = 0, clusterBlocks: UInt8 = 0) {
        self.startBlock = startBlock
        self.blockCount = blockCount
        self.segment = segment
        self.segmentBlock = segmentBlock
        self.checksumIndex = checksumIndex
        self.storedBytes = storedBytes
        self.encoding = encoding
        self.clusterSkip = clusterSkip
        self.clusterBlocks = clusterBlocks
    }

    /// As in an index; not for tombstones, which an index has no room for at any length.
    func indexed(slot: UInt32) -> IndexExtent {
        IndexExtent(startBlock: startBlock, blockCount: blockCount, slot: slot, segment: segment, segmentBlock: segmentBlock, checksumIndex: checksumIndex, cluster: cluster)
    }
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

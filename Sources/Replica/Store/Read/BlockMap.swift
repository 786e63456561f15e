import BlockTap
import Glibc
import Logging

/// Where a volume's blocks are and what they must hash to. Of a recovery point it never changes; of a fork it is the fork's, used by
/// one thread at a time.
final class BlockMap: @unchecked Sendable {
    let volume: String
    let sizeBytes: UInt64
    var index: ExtentIndex
    private(set) var layers: ContiguousArray<LayerChecksums>
    var segments: SegmentTable
    let report: BadBlockReport
    /// The open layer of a fork.
    var open: OpenLayerData?

    init(spec: VolumeSpec, snapshot: IndexSnapshot, segments: SegmentTable, report: BadBlockReport, open: OpenLayerData? = nil) {
        volume = spec.name
        sizeBytes = spec.geometry.sizeBytes
        index = snapshot.index
        layers = snapshot.layers
        self.segments = segments
        self.report = report
        self.open = open
    }

    /// A layer joins those of a fork. Returns the slot for its extents.
    func add(_ checksums: LayerChecksums) -> UInt32 {
        if let slot = layers.firstIndex(where: { $0.layer == 0 }) {
            layers[slot] = checksums
            return UInt32(slot)
        }
        layers.append(checksums)
        return UInt32(layers.count - 1)
    }

    /// Of the layers below a fork's open one only `kept` are used any more, with their data in `segments`; the slots of others are free.
    func keep(layers kept: Set<UInt64>, _ segments: SegmentTable) {
        for slot in layers.indices where !kept.contains(layers[slot].layer) {
            layers[slot] = LayerChecksums(layer: 0, sizeBytes: 0, copying: UnsafeBufferPointer(start: nil, count: 0))
        }
        self.segments = segments
    }

    /// Descriptor of the segment that an extent lies in; -1 when it is not a local file.
    @inline(__always)
    func descriptor(_ extent: IndexExtent) -> Int32 {
        extent.slot == IndexExtent.openSlot ? open!.segment.file.descriptor : segments.descriptor(extent.segment)
    }

    /// The checksums of an extent, when they are in memory as a whole. Valid while nothing is written to the open layer.
    @inline(__always)
    func residentSums(_ extent: IndexExtent) -> UnsafePointer<UInt64>? {
        if extent.slot == IndexExtent.openSlot { return open!.base(extent.checksumIndex) }
        return layers[Int(extent.slot)].resident.map { UnsafePointer($0 + Int(extent.checksumIndex)) }
    }

    /// The index (within the extent) of the first block that does not match, or nil. What lies behind the end of the volume becomes zero.
    @inline(__always)
    func firstBadBlock(_ extent: IndexExtent, _ bytes: UnsafeMutableRawPointer, _ sums: UnsafePointer<UInt64>) -> Int? {
        let hashedBytes = extent.slot == IndexExtent.openSlot ? sizeBytes : layers[Int(extent.slot)].sizeBytes
        for index in 0..<Int(extent.blockCount) {
            let block = extent.startBlock &+ UInt64(index)
            let length = blockLength(block, sizeBytes: hashedBytes)
            let start = bytes + index &* blockBytes
            if BlockChecksum.of(start, count: length, blockIndex: block) != sums[index] { return index }
            if length < blockBytes { memset(start + length, 0, blockBytes - length) }
        }
        return nil
    }

    /// Logs and returns the error for a block that does not match.
    func badBlock(_ extent: IndexExtent, _ index: Int) -> StoreError {
        let layer = extent.slot == IndexExtent.openSlot ? 0 : layers[Int(extent.slot)].layer
        let error = StoreError.badBlock(volume: volume, block: extent.startBlock + UInt64(index), segment: extent.segment, layer: layer)
        report.found(error)
        return error
    }

    // MARK: Synchronous

    static let runBytesMax = 1 << 20

    /// Extents that follow each other in one segment are read together.
    func read(offsetBytes: UInt64, into buffer: UnsafeMutableRawBufferPointer) throws(StoreError) {
        if buffer.count == 0 { return }
        let endBlock = (offsetBytes + UInt64(buffer.count) + UInt64(blockBytes) - 1) / UInt64(blockBytes)
        let blocksMax = min(Self.runBytesMax / blockBytes, max(ClusterPart.blocksMax, Int(endBlock - offsetBytes / UInt64(blockBytes))))
        let scratch = ReadScratch(blockCount: blocksMax)
        var run: [IndexExtent] = []
        var done = 0
        while done < buffer.count {
            let offset = offsetBytes + UInt64(done)
            var block = offset / UInt64(blockBytes)
            run.removeAll(keepingCapacity: true)
            var stored = 0
            var gapEnd: UInt64?
            while block < endBlock, stored < blocksMax {
                let (extent, pieceEnd) = index.piece(at: block, end: min(endBlock, block + UInt64(blocksMax - stored)))
                guard let extent else {
                    // As far as it goes, not only as far as the memory would.
                    if run.isEmpty { gapEnd = index.piece(at: block, end: endBlock).endBlock }
                    break
                }
                guard stored + extent.storedBlockCount <= blocksMax, run.last.map({ $0.isFollowedInSegment(by: extent) }) ?? true else { break }
                run.append(extent)
                stored += extent.storedBlockCount
                block = pieceEnd
            }
            var skip = Int(offset % UInt64(blockBytes))
            if let gapEnd {
                let count = min(Int(gapEnd - block) * blockBytes - skip, buffer.count - done)
                memset(buffer.baseAddress! + done, 0, count)
                done += count
                continue
            }
            try fetch(run[0], blockCount: stored, into: scratch.memory)
            var memory = scratch.memory
            for extent in run {
                let bytes = try verified(extent, memory, scratch)
                let count = min(Int(extent.blockCount) * blockBytes - skip, buffer.count - done)
                memcpyBytes(buffer.baseAddress! + done, bytes + skip, count)
                done += count
                skip = 0
                memory += extent.storedBlockCount * blockBytes
            }
        }
    }

    /// A whole extent of at most a cluster's length, verified.
    func read(_ extent: IndexExtent, into memory: UnsafeMutableRawPointer) throws(StoreError) {
        let scratch = ReadScratch(blockCount: extent.storedBlockCount)
        try fetch(extent, blockCount: extent.storedBlockCount, into: scratch.memory)
        memcpyBytes(memory, try verified(extent, scratch.memory, scratch), Int(extent.blockCount) * blockBytes)
    }

    /// What is stored from the beginning of an extent's place on, as it is.
    private func fetch(_ extent: IndexExtent, blockCount: Int, into memory: UnsafeMutableRawPointer) throws(StoreError) {
        guard let file = extent.slot == IndexExtent.openSlot ? open?.segment : segments.file(extent.segment) else {
            throw .io(errno: ENOENT, what: "segment \(extent.segment) of disk \(volume) is not open")
        }
        let length = blockCount * blockBytes
        let count = try file.file.read(into: UnsafeMutableRawBufferPointer(start: memory, count: length), at: UInt64(extent.segmentBlock) * UInt64(blockBytes))
        // Nothing is there: which block that is, its checksum tells.
        if count < length { memset(memory + count, 0, length - count) }
        if count == 0 { throw badBlock(extent, 0) }
    }

    /// The blocks of an extent, out of what is stored for it.
    private func verified(_ extent: IndexExtent, _ stored: UnsafeMutableRawPointer, _ scratch: ReadScratch) throws(StoreError) -> UnsafeMutableRawPointer {
        var bytes = stored
        if extent.cluster.isCompressed {
            let part = extent.cluster
            guard ClusterCodec.decode(stored, part, neededBlocks: part.skip + Int(extent.blockCount), into: scratch.cluster) else { throw badBlock(extent, 0) }
            bytes = scratch.cluster + part.skip * blockBytes
        }
        var sums = residentSums(extent)
        if sums == nil {
            try layers[Int(extent.slot)].copy(extent.checksumIndex, Int(extent.blockCount), into: scratch.sums)
            sums = UnsafePointer(scratch.sums)
        }
        if let index = firstBadBlock(extent, bytes, sums!), report.store?.options.deliberateFault != .blocksNotChecked { throw badBlock(extent, index) }
        return bytes
    }
}

/// Memory of one synchronous read.
private final class ReadScratch {
    let memory: UnsafeMutableRawPointer
    let sums: UnsafeMutablePointer<UInt64>
    /// Of a decompressed cluster. Untouched it is only an address range.
    let cluster = UnsafeMutableRawPointer.allocate(byteCount: ClusterCodec.bytesMax, alignment: pageBytes)

    init(blockCount: Int) {
        memory = .allocate(byteCount: blockCount * blockBytes, alignment: pageBytes)
        sums = .allocate(capacity: max(blockCount, ClusterPart.blocksMax))
    }

    deinit {
        memory.deallocate()
        sums.deallocate()
        cluster.deallocate()
    }
}

extension IndexExtent {
    /// Blocks that it takes in its segment; all of its cluster's when it is compressed.
    @inline(__always)
    var storedBlockCount: Int { cluster.isCompressed ? cluster.storedBlocks : Int(blockCount) }

    /// Whether what is stored for `next` goes on where this ends.
    @inline(__always)
    func isFollowedInSegment(by next: IndexExtent) -> Bool {
        segment == next.segment && (slot == IndexExtent.openSlot) == (next.slot == IndexExtent.openSlot) && Int(segmentBlock) + storedBlockCount == Int(next.segmentBlock)
    }
}

/// Where bad blocks are told.
struct BadBlockReport: Sendable {
    weak var store: ReplicaStore?
    var context: String

    func found(_ error: StoreError) {
        guard let store else { return }
        store.shared.withLock { $0.statistics.badBlockCount += 1 }
        store.logger.error("a block is damaged", metadata: ["error": "\(error)", "of": "\(context)", "store": "\(store.storage.location)"])
    }
}

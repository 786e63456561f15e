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
    private(set) var segments: SegmentTable
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

    /// A fork's open layer was sealed. Returns the slot for its extents.
    func add(_ checksums: LayerChecksums, _ segment: SegmentFile) -> UInt32 {
        layers.append(checksums)
        segments.add([segment])
        return UInt32(layers.count - 1)
    }

    /// Descriptor of the segment that an extent lies in; -1 when it is not a local file.
    @inline(__always)
    func descriptor(_ extent: IndexExtent) -> Int32 {
        extent.slot == IndexExtent.openSlot ? open!.segment.file.descriptor : segments.descriptor(extent.segment)
    }

    /// The index (within the extent) of the first block that does not match, or nil. What lies behind the end of the volume becomes zero.
    @inline(__always)
    func firstBadBlock(_ extent: IndexExtent, _ bytes: UnsafeMutableRawPointer) -> Int? {
        let isOpen = extent.slot == IndexExtent.openSlot
        let sums = isOpen ? open!.base(extent.checksumIndex) : UnsafePointer(layers[Int(extent.slot)].sums + Int(extent.checksumIndex))
        let hashedBytes = isOpen ? sizeBytes : layers[Int(extent.slot)].sizeBytes
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

    func read(offsetBytes: UInt64, into buffer: UnsafeMutableRawBufferPointer) throws(StoreError) {
        if buffer.count == 0 { return }
        let bounceBytes = 1 << 20
        let bounce = UnsafeMutableRawPointer.allocate(byteCount: bounceBytes, alignment: pageBytes)
        defer { bounce.deallocate() }
        var done = 0
        while done < buffer.count {
            let offset = offsetBytes + UInt64(done)
            let block = offset / UInt64(blockBytes)
            let skip = Int(offset % UInt64(blockBytes))
            let end = min((offsetBytes + UInt64(buffer.count) + UInt64(blockBytes) - 1) / UInt64(blockBytes), block + UInt64(bounceBytes / blockBytes))
            let (extent, pieceEnd) = index.piece(at: block, end: end)
            let count = min(Int(pieceEnd - block) * blockBytes - skip, buffer.count - done)
            if let extent {
                try read(extent, into: bounce)
                memcpyBytes(buffer.baseAddress! + done, bounce + skip, count)
            } else {
                memset(buffer.baseAddress! + done, 0, count)
            }
            done += count
        }
    }

    /// A whole extent, verified, into aligned memory.
    func read(_ extent: IndexExtent, into memory: UnsafeMutableRawPointer) throws(StoreError) {
        guard let file = extent.slot == IndexExtent.openSlot ? open?.segment : segments.file(extent.segment) else {
            throw .io(errno: ENOENT, what: "segment \(extent.segment) of disk \(volume) is not open")
        }
        let length = Int(extent.blockCount) * blockBytes
        let count = try file.file.read(into: UnsafeMutableRawBufferPointer(start: memory, count: length), at: UInt64(extent.segmentBlock) * UInt64(blockBytes))
        if count < length { throw badBlock(extent, count / blockBytes) }
        if let index = firstBadBlock(extent, memory), report.store?.options.deliberateFault != .blocksNotChecked { throw badBlock(extent, index) }
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

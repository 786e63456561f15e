import BlockTap
import CXXHash
import Glibc

/// Writes a layer file of any size in pieces: first the extents in order, then their block checksums in the same order. The same format as
/// `LayerFile.write`; the header goes in last. Memory: a buffer, and 8 to 16 bytes per page for the fences.
final class LayerWriter {
    private static let bufferBytes = 1 << 20

    let id: UInt64
    private let store: StoreUUID
    private let file: any StorageFile
    private let buffer: UnsafeMutableRawPointer
    private var used = 0
    private var offset = UInt64(pageBytes)
    private var extentFences: ContiguousArray<LayerFence> = []
    private var checksumPages: ContiguousArray<UInt64> = []
    /// The last extent, which the next may go on.
    private var last: StoredExtent?
    private var tally = SegmentTally()
    private(set) var extentCount = 0
    /// Checksums that the extents so far need, and those that have come.
    private(set) var checksumCount = 0
    private var checksumsWritten = 0
    private var checksumsOffset: UInt64?

    /// An existing file of the number is emptied.
    init(_ storage: any Storage, store: StoreUUID, id: UInt64) throws(StoreError) {
        self.id = id
        self.store = store
        file = try storage.open(LayerFile.path(id), .create, direct: false)
        buffer = .allocate(byteCount: Self.bufferBytes, alignment: pageBytes)
    }

    deinit { buffer.deallocate() }

    /// Takes extents in order; `checksumIndex` is given anew. Neighbours that go on on the volume and in the segment become one.
    func append(_ extent: StoredExtent) throws(StoreError) {
        precondition(checksumsOffset == nil && (last.map { $0.endBlock <= extent.startBlock } ?? true) && extent.blockCount > 0)
        if !extent.isZero {
            checksumCount += Int(extent.blockCount)
            guard checksumCount <= UInt32.max else { throw .invalid("layer \(id) would have more blocks than a layer can") }
        }
        tally.add(extent)
        if let last, Self.continues(last, extent) {
            self.last!.blockCount += extent.blockCount
            self.last!.storedBytes += extent.storedBytes
            return
        }
        try putLast()
        last = extent
        last!.checksumIndex = extent.isZero ? 0 : UInt32(checksumCount - Int(extent.blockCount))
    }

    private static func continues(_ a: StoredExtent, _ b: StoredExtent) -> Bool {
        guard a.endBlock == b.startBlock, a.encoding == b.encoding, !a.isCompressed, UInt64(a.blockCount) + UInt64(b.blockCount) <= UInt64(IndexExtent.blockCountMax) else { return false }
        return a.isZero || (a.segment == b.segment && a.segmentBlock + a.blockCount == b.segmentBlock)
    }

    private func putLast() throws(StoreError) {
        guard var extent = last else { return }
        last = nil
        extentCount += 1
        try withUnsafeBytes(of: &extent) { bytes throws(StoreError) in try put(bytes) }
    }

    /// The checksums of the extents, in their order, in pieces of any size.
    func append(_ sums: UnsafeBufferPointer<UInt64>) throws(StoreError) {
        if checksumsOffset == nil { try endExtents() }
        checksumsWritten += sums.count
        precondition(checksumsWritten <= checksumCount)
        try put(UnsafeRawBufferPointer(sums))
    }

    private func endExtents() throws(StoreError) {
        try putLast()
        try endSection()
        checksumsOffset = offset
    }

    private func put(_ bytes: UnsafeRawBufferPointer) throws(StoreError) {
        var done = 0
        while done < bytes.count {
            let count = min(bytes.count - done, Self.bufferBytes - used)
            memcpyBytes(buffer + used, bytes.baseAddress! + done, count)
            used += count
            done += count
            if used == Self.bufferBytes { try writeBuffer() }
        }
    }

    private func endSection() throws(StoreError) {
        let padded = roundUp(used, to: pageBytes)
        memset(buffer + used, 0, padded - used)
        used = padded
        try writeBuffer()
    }

    /// Whole pages.
    private func writeBuffer() throws(StoreError) {
        if used == 0 { return }
        for page in stride(from: 0, to: used, by: pageBytes) {
            let sum = cxxhash_64(buffer + page, pageBytes)
            if checksumsOffset == nil {
                extentFences.append(LayerFence(firstBlock: buffer.load(fromByteOffset: page, as: UInt64.self), checksum: sum))
            } else {
                checksumPages.append(sum)
            }
        }
        try file.write(UnsafeRawBufferPointer(start: buffer, count: used), at: offset)
        offset += UInt64(used)
        used = 0
    }

    /// Fences, trailer and header; synced, its directory is not.
    func finish(_ identity: LayerIdentity, isSynced: Bool = true) throws(StoreError) -> LayerRecord {
        precondition(identity.id == id && checksumsWritten == checksumCount)
        if checksumsOffset == nil { try endExtents() }
        try endSection()
        let fencesOffset = offset
        let fenceBytes = extentFences.count * 16 + checksumPages.count * 8
        let fileBytes = fencesOffset + UInt64(fenceBytes) + 32
        var header = LayerHeader(
            parent: identity.parent, sizeBytes: identity.sizeBytes, extentCount: UInt64(extentCount), checksumCount: UInt64(checksumCount),
            extentsOffset: UInt64(pageBytes), checksumsOffset: checksumsOffset!, fencesOffset: fencesOffset, fileBytes: fileBytes,
            cutTimeNanoseconds: identity.cut.timeNanoseconds, epoch: identity.cut.epoch.rawValue, volumeIndex: identity.volumeIndex,
            blockBytes: UInt32(blockBytes), kind: identity.cut.kind.rawValue, consistency: identity.consistency.formatValue)
        memset(buffer, 0, pageBytes)
        buffer.storeBytes(of: FileHeader(kind: .layer, id: id, store: store), as: FileHeader.self)
        buffer.storeBytes(of: header, toByteOffset: 64, as: LayerHeader.self)
        header.checksum = cxxhash_64(buffer, 184)
        buffer.storeBytes(of: header, toByteOffset: 64, as: LayerHeader.self)

        let tail = UnsafeMutableRawBufferPointer.allocate(byteCount: fenceBytes + 32, alignment: 16)
        defer { tail.deallocate() }
        extentFences.withUnsafeBytes { if $0.count > 0 { memcpyBytes(tail.baseAddress!, $0.baseAddress!, $0.count) } }
        checksumPages.withUnsafeBytes { if $0.count > 0 { memcpyBytes(tail.baseAddress! + extentFences.count * 16, $0.baseAddress!, $0.count) } }
        var trailer = LayerTrailer(
            magic: LayerTrailer.magicNow, headerChecksum: header.checksum, fencesChecksum: cxxhash_64(tail.baseAddress!, fenceBytes), checksum: 0)
        trailer.checksum = withUnsafeBytes(of: &trailer) { cxxhash_64($0.baseAddress!, 24) }
        tail.storeBytes(of: trailer, toByteOffset: fenceBytes, as: LayerTrailer.self)
        try file.write(UnsafeRawBufferPointer(tail), at: fencesOffset)
        try file.write(UnsafeRawBufferPointer(start: buffer, count: pageBytes), at: 0)
        if isSynced { try file.dataSync() }
        return LayerRecord(
            id: id, parent: identity.parent, sizeBytes: identity.sizeBytes, fileBytes: fileBytes, digest: trailer.checksum, extentCount: extentCount,
            dataBytes: tally.dataBytes, zeroBytes: tally.zeroBytes, segments: tally.segments)
    }
}

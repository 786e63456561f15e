import BlockTap
import CXXHash
import Glibc

/// A layer file read page by page, each page verified when it is read: for layers too large to be held in memory. Thread-safe.
final class LayerReader: Sendable {
    static let batchBytes = 1 << 20

    let record: LayerRecord
    let header: LayerHeader
    private let file: any StorageFile
    /// Checksums of the pages of extents, and of the pages of checksums.
    private let extentPages: [UInt64]
    let checksumPages: [UInt64]

    /// Verifies header, trailer and fences.
    init(_ storage: any Storage, store: StoreUUID, record: LayerRecord) throws(StoreError) {
        let file = try storage.open(LayerFile.path(record.id), .read, direct: false)
        func damaged(_ offset: UInt64, _ what: String) -> StoreError { .damaged(path: file.path, offsetBytes: offset, what: what) }
        let size = try file.size()
        guard size == record.fileBytes, size >= UInt64(pageBytes + 32) else {
            throw damaged(min(size, record.fileBytes), "the file has \(size) bytes, the MANIFEST says \(record.fileBytes)")
        }
        let head = UnsafeMutableRawBufferPointer.allocate(byteCount: pageBytes, alignment: pageBytes)
        defer { head.deallocate() }
        guard try file.read(into: head, at: 0) == pageBytes else { throw damaged(0, "the file ends early") }
        _ = try FileHeader.verify(UnsafeRawBufferPointer(head), path: file.path, kind: .layer, id: record.id, store: store)
        let header = head.load(fromByteOffset: 64, as: LayerHeader.self)
        guard header.checksum == cxxhash_64(head.baseAddress!, 184) else { throw damaged(64, "the layer header does not match its checksum") }
        guard header.blockBytes == UInt32(blockBytes), header.fileBytes == size, header.extentsOffset == UInt64(pageBytes),
            header.extentsOffset <= header.checksumsOffset, header.checksumsOffset <= header.fencesOffset, header.fencesOffset <= size - 32
        else { throw damaged(64, "the layer header contradicts the file") }

        let tail = UnsafeMutableRawBufferPointer.allocate(byteCount: Int(size - header.fencesOffset), alignment: pageBytes)
        defer { tail.deallocate() }
        guard try file.read(into: tail, at: header.fencesOffset) == tail.count else { throw damaged(header.fencesOffset, "the file ends early") }
        let fenceBytes = tail.count - 32
        let trailer = tail.loadUnaligned(fromByteOffset: fenceBytes, as: LayerTrailer.self)
        guard trailer.magic == LayerTrailer.magicNow, trailer.checksum == cxxhash_64(tail.baseAddress! + fenceBytes, 24), trailer.checksum == record.digest,
            trailer.headerChecksum == header.checksum
        else { throw damaged(size - 32, "the trailer does not match the MANIFEST") }
        guard trailer.fencesChecksum == cxxhash_64(tail.baseAddress!, fenceBytes) else { throw damaged(header.fencesOffset, "the fences do not match their checksum") }
        let extentPageCount = Int(header.checksumsOffset - header.extentsOffset) / pageBytes
        let checksumPageCount = Int(header.fencesOffset - header.checksumsOffset) / pageBytes
        guard fenceBytes == extentPageCount * 16 + checksumPageCount * 8, Int(header.extentCount) * 32 <= extentPageCount * pageBytes,
            Int(header.checksumCount) * 8 <= checksumPageCount * pageBytes
        else { throw damaged(64, "the layer header contradicts the file") }
        extentPages = (0..<extentPageCount).map { tail.loadUnaligned(fromByteOffset: $0 * 16 + 8, as: UInt64.self) }
        checksumPages = (0..<checksumPageCount).map { tail.loadUnaligned(fromByteOffset: extentPageCount * 16 + $0 * 8, as: UInt64.self) }
        self.record = record
        self.header = header
        self.file = file
    }

    var extentCount: Int { Int(header.extentCount) }
    var checksumCount: Int { Int(header.checksumCount) }

    /// All extents in order, in batches.
    func forEachExtents(_ body: (UnsafeBufferPointer<StoredExtent>) throws(StoreError) -> Void) throws(StoreError) {
        let memory = UnsafeMutableRawBufferPointer.allocate(byteCount: Self.batchBytes, alignment: pageBytes)
        defer { memory.deallocate() }
        let perPage = pageBytes / MemoryLayout<StoredExtent>.size
        var page = 0
        while page < extentPages.count {
            let pages = min(Self.batchBytes / pageBytes, extentPages.count - page)
            try readPages(page..<page + pages, of: extentPages, from: header.extentsOffset, "extents", into: memory.baseAddress!)
            let count = min(pages * perPage, extentCount - page * perPage)
            let extents = UnsafeRawBufferPointer(start: memory.baseAddress!, count: count * MemoryLayout<StoredExtent>.size).withMemoryRebound(to: StoredExtent.self) { $0 }
            for (index, extent) in extents.enumerated() where !extent.isSound(checksumCount: checksumCount) {
                throw .damaged(path: file.path, offsetBytes: header.extentsOffset + UInt64((page * perPage + index) * 32), what: "an extent contradicts itself")
            }
            try body(extents)
            page += pages
        }
    }

    /// Extents `range` (of 0..<extentCount), at once.
    func withExtents(_ range: Range<Int>, _ body: (UnsafeBufferPointer<StoredExtent>) throws(StoreError) -> Void) throws(StoreError) {
        precondition(range.lowerBound >= 0 && range.upperBound <= extentCount)
        if range.isEmpty { return }
        let perPage = pageBytes / MemoryLayout<StoredExtent>.size
        let first = range.lowerBound / perPage
        let end = (range.upperBound + perPage - 1) / perPage
        let memory = UnsafeMutableRawBufferPointer.allocate(byteCount: (end - first) * pageBytes, alignment: pageBytes)
        defer { memory.deallocate() }
        try readPages(first..<end, of: extentPages, from: header.extentsOffset, "extents", into: memory.baseAddress!)
        let start = (memory.baseAddress! + (range.lowerBound - first * perPage) * MemoryLayout<StoredExtent>.size).assumingMemoryBound(to: StoredExtent.self)
        try body(UnsafeBufferPointer(start: start, count: range.count))
    }

    /// Block checksums `range` (of 0..<checksumCount).
    func readChecksums(_ range: Range<Int>, into sums: UnsafeMutablePointer<UInt64>) throws(StoreError) {
        precondition(range.lowerBound >= 0 && range.upperBound <= checksumCount)
        let perPage = pageBytes / 8
        let memory = UnsafeMutableRawBufferPointer.allocate(byteCount: min(Self.batchBytes, (range.count / perPage + 2) * pageBytes), alignment: pageBytes)
        defer { memory.deallocate() }
        var next = range.lowerBound
        while next < range.upperBound {
            let first = next / perPage
            let pages = min(memory.count / pageBytes, (range.upperBound + perPage - 1) / perPage - first)
            try readPages(first..<first + pages, of: checksumPages, from: header.checksumsOffset, "block checksums", into: memory.baseAddress!)
            let end = min(range.upperBound, (first + pages) * perPage)
            memcpy(sums + (next - range.lowerBound), memory.baseAddress! + (next - first * perPage) * 8, (end - next) * 8)
            next = end
        }
    }

    private func readPages(_ pages: Range<Int>, of expected: [UInt64], from sectionOffset: UInt64, _ what: String, into memory: UnsafeMutableRawPointer) throws(StoreError) {
        let offset = sectionOffset + UInt64(pages.lowerBound * pageBytes)
        let count = pages.count * pageBytes
        guard try file.read(into: UnsafeMutableRawBufferPointer(start: memory, count: count), at: offset) == count else {
            throw .damaged(path: file.path, offsetBytes: offset, what: "the file ends early")
        }
        for (index, page) in pages.enumerated() where cxxhash_64(memory + index * pageBytes, pageBytes) != expected[page] {
            throw .damaged(path: file.path, offsetBytes: offset + UInt64(index * pageBytes), what: "a page of \(what) does not match its checksum")
        }
    }
}

extension StoredExtent {
    /// Whether its fields can be reckoned with. They are as they were written; this is for files that somebody else wrote.
    func isSound(checksumCount: Int) -> Bool {
        guard blockCount > 0, startBlock < 1 << 40, UInt64(blockCount) <= 1 << 40 - startBlock else { return false }
        switch ExtentEncoding(rawValue: encoding) {
        case .zero: return true
        case .plain:
            return blockCount <= IndexExtent.blockCountMax && segmentBlock > 0 && storedBytes == blockCount * 4096 && UInt64(checksumIndex) + UInt64(blockCount) <= UInt64(checksumCount)
        case .cluster:
            return clusterBlocks <= ClusterPart.blocksMax && UInt32(clusterSkip) + blockCount <= UInt32(clusterBlocks) && segmentBlock > 0
                && storedBytes % 4096 == 0 && storedBytes >= 4096 && storedBytes < UInt32(clusterBlocks) * 4096
                && UInt64(checksumIndex) + UInt64(blockCount) <= UInt64(checksumCount)
        case nil: return false
        }
    }
}

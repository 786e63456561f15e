import BlockTap
import CXXHash
import Glibc

/// What identifies a layer, beside its extents.
struct LayerIdentity {
    var id: UInt64
    var parent: UInt64
    var volumeIndex: UInt32
    var sizeBytes: UInt64
    var cut: Cut
    var consistency: Consistency
}

/// Writing and reading of layer files; `docs/store-format.md` has the layout.
enum LayerFile {
    static func path(_ id: UInt64) -> String { "layers/\(fileNumber(id)).layer" }

    struct Written {
        var fileBytes: UInt64
        /// The trailer's checksum.
        var digest: UInt64
        var checksums: LayerChecksums
        /// With `checksumIndex` as in the file.
        var extents: [StoredExtent]
    }

    /// `extents` are sorted and do not overlap; their `checksumIndex` points into `sums`. Written and synced; its directory is not.
    static func write(_ storage: any Storage, store: StoreUUID, identity: LayerIdentity, extents: [StoredExtent], sums: UnsafeBufferPointer<UInt64>, isSynced: Bool = true) throws(StoreError) -> Written {
        var extents = extents
        var checksumCount = 0
        for extent in extents where !extent.isZero { checksumCount += Int(extent.blockCount) }

        let extentBytes = roundUp(extents.count * 32, to: pageBytes)
        let checksumBytes = roundUp(checksumCount * 8, to: pageBytes)
        let fenceCount = extentBytes / pageBytes
        let fenceBytes = fenceCount * 16 + checksumBytes / pageBytes * 8
        let extentsOffset = pageBytes
        let checksumsOffset = extentsOffset + extentBytes
        let fencesOffset = checksumsOffset + checksumBytes
        let fileBytes = fencesOffset + fenceBytes + 32

        let bytes = UnsafeMutableRawBufferPointer.allocate(byteCount: fileBytes, alignment: pageBytes)
        defer { bytes.deallocate() }
        memset(bytes.baseAddress!, 0, fileBytes)
        let base = bytes.baseAddress!

        var next = 0
        for index in extents.indices where !extents[index].isZero {
            let count = Int(extents[index].blockCount)
            memcpyBytes(base + checksumsOffset + next * 8, sums.baseAddress! + Int(extents[index].checksumIndex), count * 8)
            extents[index].checksumIndex = UInt32(next)
            next += count
        }
        extents.withUnsafeBytes { if $0.count > 0 { memcpyBytes(base + extentsOffset, $0.baseAddress!, $0.count) } }

        var header = LayerHeader(
            parent: identity.parent, sizeBytes: identity.sizeBytes, extentCount: UInt64(extents.count), checksumCount: UInt64(checksumCount),
            extentsOffset: UInt64(extentsOffset), checksumsOffset: UInt64(checksumsOffset), fencesOffset: UInt64(fencesOffset), fileBytes: UInt64(fileBytes),
            cutTimeNanoseconds: identity.cut.timeNanoseconds, epoch: identity.cut.epoch.rawValue, volumeIndex: identity.volumeIndex,
            blockBytes: UInt32(blockBytes), kind: identity.cut.kind.rawValue, consistency: identity.consistency.formatValue)
        bytes.storeBytes(of: FileHeader(kind: .layer, id: identity.id, store: store), as: FileHeader.self)
        bytes.storeBytes(of: header, toByteOffset: 64, as: LayerHeader.self)
        header.checksum = XXH3_64bits(base, 184)
        bytes.storeBytes(of: header.checksum, toByteOffset: 184, as: UInt64.self)

        for page in 0..<fenceCount {
            let start = base + extentsOffset + page * pageBytes
            let fence = LayerFence(firstBlock: extents[page * (pageBytes / 32)].startBlock, checksum: XXH3_64bits(start, pageBytes))
            bytes.storeBytes(of: fence, toByteOffset: fencesOffset + page * 16, as: LayerFence.self)
        }
        for page in 0..<checksumBytes / pageBytes {
            let sum = XXH3_64bits(base + checksumsOffset + page * pageBytes, pageBytes)
            bytes.storeBytes(of: sum, toByteOffset: fencesOffset + fenceCount * 16 + page * 8, as: UInt64.self)
        }
        var trailer = LayerTrailer(magic: LayerTrailer.magicNow, headerChecksum: header.checksum, fencesChecksum: XXH3_64bits(base + fencesOffset, fenceBytes), checksum: 0)
        trailer.checksum = withUnsafeBytes(of: &trailer) { XXH3_64bits($0.baseAddress!, 24) }
        bytes.storeBytes(of: trailer, toByteOffset: fileBytes - 32, as: LayerTrailer.self)

        let file = try storage.open(path(identity.id), .create, direct: false)
        try file.write(UnsafeRawBufferPointer(bytes), at: 0)
        if isSynced { try file.dataSync() }
        let kept = UnsafeBufferPointer(start: UnsafePointer<UInt64>(OpaquePointer(base + checksumsOffset)), count: checksumCount)
        return Written(
            fileBytes: UInt64(fileBytes), digest: trailer.checksum,
            checksums: LayerChecksums(layer: identity.id, sizeBytes: identity.sizeBytes, copying: kept), extents: extents)
    }

    struct Loaded {
        var header: LayerHeader
        var extents: [StoredExtent]
        var checksums: LayerChecksums
    }

    /// Reads and verifies a whole layer file. `digest` is what the MANIFEST says.
    static func load(_ storage: any Storage, store: StoreUUID, record: LayerRecord) throws(StoreError) -> Loaded {
        let file = try storage.open(path(record.id), .read, direct: false)
        let size = try file.size()
        guard size == record.fileBytes else {
            throw .damaged(path: file.path, offsetBytes: min(size, record.fileBytes), what: "the file has \(size) bytes, the MANIFEST says \(record.fileBytes)")
        }
        let bytes = try readWhole(file, size: size)
        defer { bytes.deallocate() }
        let base = bytes.baseAddress!
        func damaged(_ offset: Int, _ what: String) -> StoreError { .damaged(path: file.path, offsetBytes: UInt64(offset), what: what) }

        _ = try FileHeader.verify(UnsafeRawBufferPointer(bytes), path: file.path, kind: .layer, id: record.id, store: store)
        guard bytes.count >= pageBytes + 32 else { throw damaged(bytes.count, "the file ends early") }
        let header = bytes.load(fromByteOffset: 64, as: LayerHeader.self)
        guard header.checksum == XXH3_64bits(base, 184) else { throw damaged(64, "the layer header does not match its checksum") }
        guard header.blockBytes == UInt32(blockBytes), header.fileBytes == size else { throw damaged(64, "the layer header contradicts the file") }

        let trailer = bytes.loadUnaligned(fromByteOffset: bytes.count - 32, as: LayerTrailer.self)
        guard trailer.magic == LayerTrailer.magicNow, trailer.checksum == XXH3_64bits(base + bytes.count - 32, 24), trailer.checksum == record.digest,
            trailer.headerChecksum == header.checksum
        else { throw damaged(bytes.count - 32, "the trailer does not match the MANIFEST") }

        let extentsOffset = Int(header.extentsOffset)
        let checksumsOffset = Int(header.checksumsOffset)
        let fencesOffset = Int(header.fencesOffset)
        let fenceCount = (checksumsOffset - extentsOffset) / pageBytes
        let fenceBytes = bytes.count - 32 - fencesOffset
        guard trailer.fencesChecksum == XXH3_64bits(base + fencesOffset, fenceBytes) else { throw damaged(fencesOffset, "the fences do not match their checksum") }
        for page in 0..<fenceCount {
            let fence = bytes.loadUnaligned(fromByteOffset: fencesOffset + page * 16, as: LayerFence.self)
            let offset = extentsOffset + page * pageBytes
            guard fence.checksum == XXH3_64bits(base + offset, pageBytes) else { throw damaged(offset, "a page of extents does not match its checksum") }
        }
        for page in 0..<(fencesOffset - checksumsOffset) / pageBytes {
            let sum = bytes.loadUnaligned(fromByteOffset: fencesOffset + fenceCount * 16 + page * 8, as: UInt64.self)
            let offset = checksumsOffset + page * pageBytes
            guard sum == XXH3_64bits(base + offset, pageBytes) else { throw damaged(offset, "a page of block checksums does not match its own checksum") }
        }
        // Padding of the first page is the only part that no sum covers, and nothing reads it.
        let extents = [StoredExtent](UnsafeRawBufferPointer(start: base + extentsOffset, count: Int(header.extentCount) * 32).bindMemory(to: StoredExtent.self))
        let sums = UnsafeRawBufferPointer(start: base + checksumsOffset, count: Int(header.checksumCount) * 8).bindMemory(to: UInt64.self)
        return Loaded(header: header, extents: extents, checksums: LayerChecksums(layer: record.id, sizeBytes: header.sizeBytes, copying: sums))
    }
}

func fileNumber(_ id: UInt64) -> String {
    let digits = String(id)
    return String(repeating: "0", count: max(0, 8 - digits.count)) + digits
}

extension Consistency {
    /// As in a layer file's header.
    var formatValue: UInt8 {
        switch self {
        case .crash: 0
        case .filesystem: 1
        case .application: 2
        }
    }

    init(formatValue: UInt8) {
        switch formatValue {
        case 2: self = .application
        case 1: self = .filesystem
        default: self = .crash
        }
    }
}

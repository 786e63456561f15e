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
        /// For whoever syncs it.
        var file: any StorageFile
        var checksums: LayerChecksums
        /// With `checksumIndex` as in the file.
        var extents: [StoredExtent]
    }

    /// `extents` are sorted and do not overlap; their `checksumIndex` points into `sums`. Written and synced; its directory is not. With a
    /// cache, that says which checksums stay in memory.
    static func write(_ storage: any Storage, store: StoreUUID, identity: LayerIdentity, extents: [StoredExtent], sums: UnsafeBufferPointer<UInt64>, isSynced: Bool = true, cache: ChecksumCache? = nil) throws(StoreError) -> Written {
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
        header.checksum = cxxhash_64(base, 184)
        bytes.storeBytes(of: header.checksum, toByteOffset: 184, as: UInt64.self)

        for page in 0..<fenceCount {
            let start = base + extentsOffset + page * pageBytes
            let fence = LayerFence(firstBlock: extents[page * (pageBytes / 32)].startBlock, checksum: cxxhash_64(start, pageBytes))
            bytes.storeBytes(of: fence, toByteOffset: fencesOffset + page * 16, as: LayerFence.self)
        }
        var pageSums: [UInt64] = []
        for page in 0..<checksumBytes / pageBytes {
            let sum = cxxhash_64(base + checksumsOffset + page * pageBytes, pageBytes)
            pageSums.append(sum)
            bytes.storeBytes(of: sum, toByteOffset: fencesOffset + fenceCount * 16 + page * 8, as: UInt64.self)
        }
        var trailer = LayerTrailer(magic: LayerTrailer.magicNow, headerChecksum: header.checksum, fencesChecksum: cxxhash_64(base + fencesOffset, fenceBytes), checksum: 0)
        trailer.checksum = withUnsafeBytes(of: &trailer) { cxxhash_64($0.baseAddress!, 24) }
        bytes.storeBytes(of: trailer, toByteOffset: fileBytes - 32, as: LayerTrailer.self)

        let file = try storage.open(path(identity.id), .create, direct: false)
        try file.write(UnsafeRawBufferPointer(bytes), at: 0)
        if isSynced { try file.dataSync() }
        let kept = UnsafeBufferPointer(start: UnsafePointer<UInt64>(OpaquePointer(base + checksumsOffset)), count: checksumCount)
        let checksums = cache?.written(
            layer: identity.id, digest: trailer.checksum, sizeBytes: identity.sizeBytes, sums: kept, sectionOffset: UInt64(checksumsOffset), pageSums: pageSums)
        return Written(
            fileBytes: UInt64(fileBytes), digest: trailer.checksum, file: file,
            checksums: checksums ?? LayerChecksums(layer: identity.id, sizeBytes: identity.sizeBytes, copying: kept, digest: trailer.checksum), extents: extents)
    }

    struct Loaded {
        var header: LayerHeader
        var extents: [StoredExtent]
        var checksums: LayerChecksums
    }

    /// Reads and verifies all extents of a layer file. With a cache, checksums of a large layer stay in the file; without, all are read.
    static func load(_ storage: any Storage, store: StoreUUID, record: LayerRecord, cache: ChecksumCache? = nil) throws(StoreError) -> Loaded {
        let reader = try LayerReader(storage, store: store, record: record)
        var extents: [StoredExtent] = []
        extents.reserveCapacity(reader.extentCount)
        try reader.forEachExtents { extents.append(contentsOf: $0) }
        if let cache { return Loaded(header: reader.header, extents: extents, checksums: try cache.checksums(of: reader)) }
        let sums = UnsafeMutableBufferPointer<UInt64>.allocate(capacity: max(1, reader.checksumCount))
        defer { sums.deallocate() }
        try reader.readChecksums(0..<reader.checksumCount, into: sums.baseAddress!)
        let all = UnsafeBufferPointer(start: UnsafePointer(sums.baseAddress!), count: reader.checksumCount)
        return Loaded(header: reader.header, extents: extents, checksums: LayerChecksums(layer: record.id, sizeBytes: reader.header.sizeBytes, copying: all, digest: record.digest))
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

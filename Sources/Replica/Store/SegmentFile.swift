/// Data of layers: a header block, then blocks of 4096 bytes, appended. What lies where is known by the layers only.
final class SegmentFile: @unchecked Sendable {
    static func path(_ id: UInt32) -> String { "segments/\(fileNumber(UInt64(id))).seg" }

    let id: UInt32
    let file: any StorageFile

    private init(id: UInt32, file: any StorageFile) {
        self.id = id
        self.file = file
    }

    /// Makes the file with its header; neither it nor its directory is synced.
    static func create(_ storage: any Storage, store: StoreUUID, id: UInt32) throws(StoreError) -> SegmentFile {
        let file = try storage.open(path(id), .create, direct: true)
        var header = FileHeader(kind: .segment, id: UInt64(id), store: store)
        try header.write(to: file, paddedTo: pageBytes)
        return SegmentFile(id: id, file: file)
    }

    static func open(_ storage: any Storage, store: StoreUUID, id: UInt32, writable: Bool) throws(StoreError) -> SegmentFile {
        let file = try storage.open(path(id), writable ? .readWrite : .read, direct: true)
        let bytes = UnsafeMutableRawBufferPointer.allocate(byteCount: pageBytes, alignment: pageBytes)
        defer { bytes.deallocate() }
        let count = try file.read(into: bytes, at: 0)
        _ = try FileHeader.verify(UnsafeRawBufferPointer(rebasing: bytes[..<count]), path: file.path, kind: .segment, id: UInt64(id), store: store)
        return SegmentFile(id: id, file: file)
    }
}

import CXXHash
import Glibc

/// What a file of the store is; its magic number, as it reads in a dump.
enum FileKind: UInt64 {
    case manifest = 0x5346_494E_414D_4641  // "AFMANIFS"
    case segment = 0x544E_454D_4753_4641  // "AFSGMENT"
    case layer = 0x3152_4559_414C_4641  // "AFLAYER1"
    case index = 0x3158_4544_4E49_4641  // "AFINDEX1"
    case journal = 0x4C41_4E52_554F_4A46  // "FJOURNAL"
}

/// Ties every file to its store, so that a file copied in from another one is noticed.
struct StoreUUID: Hashable, Codable, Sendable {
    var high: UInt64
    var low: UInt64
    static func random() -> StoreUUID { StoreUUID(high: .random(in: 1...UInt64.max), low: .random(in: 0...UInt64.max)) }
}

/// The first 64 bytes of every file of a store, little-endian:
///
///     offset size
///          0    8  magic (`FileKind`)
///          8    4  format version of this kind of file
///         12    4  zero
///         16   16  UUID of the store
///         32    8  number of the file (the one in its name; 0 for the MANIFEST)
///         40   16  zero
///         56    8  XXH3-64 of bytes 0..<56
struct FileHeader {
    static let versionNow: UInt32 = 2
    static let byteCount = 64

    var magic: UInt64
    var version: UInt32
    var reserved0: UInt32 = 0
    var storeHigh: UInt64
    var storeLow: UInt64
    var id: UInt64
    var reserved1: UInt64 = 0
    var reserved2: UInt64 = 0
    var checksum: UInt64 = 0

    init(kind: FileKind, id: UInt64, store: StoreUUID, version: UInt32 = FileHeader.versionNow) {
        magic = kind.rawValue
        self.version = version
        storeHigh = store.high
        storeLow = store.low
        self.id = id
        var copy = self
        checksum = withUnsafeBytes(of: &copy) { XXH3_64bits($0.baseAddress!, 56) }
    }

    /// `paddedTo`: zeroes follow up to this many bytes.
    mutating func write(to file: any StorageFile, paddedTo byteCount: Int) throws(StoreError) {
        let bytes = UnsafeMutableRawBufferPointer.allocate(byteCount: byteCount, alignment: 4096)
        defer { bytes.deallocate() }
        memset(bytes.baseAddress!, 0, byteCount)
        bytes.storeBytes(of: self, as: FileHeader.self)
        try file.write(UnsafeRawBufferPointer(bytes), at: 0)
    }

    /// Magic and version are looked at before the sum: a newer version may have another header.
    static func verify(_ bytes: UnsafeRawBufferPointer, path: String, kind: FileKind, id: UInt64?, store: StoreUUID?) throws(StoreError) -> FileHeader {
        guard bytes.count >= byteCount else { throw .damaged(path: path, offsetBytes: 0, what: "the file is shorter than its header") }
        let header = bytes.loadUnaligned(as: FileHeader.self)
        guard header.magic == kind.rawValue else { throw .damaged(path: path, offsetBytes: 0, what: "this is no \(kind) file") }
        let sum = XXH3_64bits(bytes.baseAddress!, 56)
        if header.version > versionNow {
            // A version that only a flipped bit made new is damage.
            guard sum == header.checksum else { throw .damaged(path: path, offsetBytes: 0, what: "the header does not match its checksum") }
            throw .versionTooNew(path: path, found: header.version, supported: versionNow)
        }
        guard sum == header.checksum else { throw .damaged(path: path, offsetBytes: 0, what: "the header does not match its checksum") }
        if header.version < versionNow { throw .versionTooOld(path: path, found: header.version, supported: versionNow) }
        if let id, header.id != id { throw .damaged(path: path, offsetBytes: 32, what: "the file says that it is number \(header.id)") }
        if let store, header.storeHigh != store.high || header.storeLow != store.low {
            throw .damaged(path: path, offsetBytes: 16, what: "the file belongs to another store")
        }
        return header
    }

    var store: StoreUUID { StoreUUID(high: storeHigh, low: storeLow) }
}

/// Called once when a store opens: the structures are written to disk as they lie in memory.
func assertFormatSizes() {
    precondition(MemoryLayout<FileHeader>.size == 64 && MemoryLayout<FileHeader>.stride == 64)
    precondition(MemoryLayout<StoredExtent>.size == 32 && MemoryLayout<StoredExtent>.stride == 32)
    precondition(MemoryLayout<LayerHeader>.size == 128 && MemoryLayout<LayerHeader>.stride == 128)
    precondition(1.littleEndian == 1, "the store's files are little-endian and this machine is not")
}

@inline(__always)
func memcpyBytes(_ to: UnsafeMutableRawPointer, _ from: UnsafeRawPointer, _ count: Int) {
    memcpy(to, from, count)
}

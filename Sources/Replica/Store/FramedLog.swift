import CXXHash
import Glibc

/// An append-only file of checksummed frames: the MANIFEST and the forks' journals.
///
/// File header (64 bytes), then frames, each at a multiple of 8:
///
///     offset size
///          0    4  magic "AFRM"
///          4    4  type, the owner's
///          8    4  payload length in bytes
///         12    4  zero
///         16    8  XXH3-64 of bytes 0..<16, then of the payload, seeded with the frame's offset in the file
///         24    8  sequence, 1 for the first frame
///         32    …  payload, padded with zeroes to a multiple of 8 (the sum covers the padding)
///
/// What follows the last valid frame is a *torn tail* when no valid `synced` frame can be found after it: a crash before its sync; it
/// is cut off. A bad frame with a valid `synced` one after it is *damage*: the file is refused, with the offset. So that the very last
/// synced frame is not mistaken for a torn one, each sync is followed by a small `synced` frame which itself is not synced: it
/// proves that everything before it was.
final class FramedLog {
    static let headerBytes = 64
    static let frameHeaderBytes = 32
    static let frameMagic: UInt32 = 0x4D52_4641
    /// Frame type of the synced marker; types of owners start at 1.
    static let syncedType: UInt32 = 0
    static let payloadBytesMax = 1 << 30

    struct Frame {
        var type: UInt32
        var offsetBytes: UInt64
        var sequence: UInt64
        /// A synced marker follows: whatever this frame names was durable.
        var isSynced: Bool
        var payload: [UInt8]
    }

    let file: any StorageFile
    /// Where the next frame goes.
    private(set) var endBytes: UInt64
    private(set) var sequence: UInt64
    /// Bytes of a torn tail that opening cut off.
    private(set) var tornBytes: UInt64 = 0

    private init(file: any StorageFile, endBytes: UInt64, sequence: UInt64) {
        self.file = file
        self.endBytes = endBytes
        self.sequence = sequence
    }

    /// Writes the header; the caller syncs file and directory.
    static func create(_ file: any StorageFile, header: FileHeader) throws(StoreError) -> FramedLog {
        var header = header
        try header.write(to: file, paddedTo: headerBytes)
        return FramedLog(file: file, endBytes: UInt64(headerBytes), sequence: 0)
    }

    /// Reads the whole log, cuts off a torn tail.
    static func open(_ file: any StorageFile, expecting kind: FileKind, id: UInt64, store: StoreUUID) throws(StoreError) -> (FramedLog, [Frame]) {
        let size = try file.size()
        let bytes = try readWhole(file, size: size)
        defer { bytes.deallocate() }
        _ = try FileHeader.verify(UnsafeRawBufferPointer(bytes), path: file.path, kind: kind, id: id, store: store)

        var frames: [Frame] = []
        var offset = headerBytes
        var sequence: UInt64 = 0
        var lastMarker = headerBytes
        while let end = validFrame(bytes, at: offset, sequence: sequence + 1) {
            let type = bytes.loadUnaligned(fromByteOffset: offset + 4, as: UInt32.self)
            let length = Int(bytes.loadUnaligned(fromByteOffset: offset + 8, as: UInt32.self))
            if type == syncedType {
                lastMarker = offset
                var index = frames.count - 1
                while index >= 0, !frames[index].isSynced {
                    frames[index].isSynced = true
                    index -= 1
                }
            } else {
                let start = offset + frameHeaderBytes
                frames.append(Frame(type: type, offsetBytes: UInt64(offset), sequence: sequence + 1, isSynced: false, payload: [UInt8](bytes[start..<start + length])))
            }
            sequence += 1
            offset = end
        }
        let log = FramedLog(file: file, endBytes: UInt64(offset), sequence: sequence)
        if offset < bytes.count {
            var probe = offset + 8
            while probe + frameHeaderBytes <= bytes.count {
                // A marker proves that all before it was durable. A record alone may have reached the disk before the unsynced marker
                // in front of it.
                if validFrame(bytes, at: probe, sequence: nil) != nil, bytes.loadUnaligned(fromByteOffset: probe + 4, as: UInt32.self) == syncedType {
                    throw .damaged(path: file.path, offsetBytes: UInt64(offset), what: "a record does not match its checksum, but all up to byte \(probe) was synced")
                }
                probe += 8
            }
            log.tornBytes = UInt64(bytes.count - offset)
            try file.truncate(to: UInt64(offset))
        }
        // A sync that failed leaves pages in the cache that are neither on disk nor dirty: the next sync would succeed without them.
        if lastMarker < offset { try file.write(UnsafeRawBufferPointer(rebasing: bytes[lastMarker..<offset]), at: UInt64(lastMarker)) }
        return (log, frames)
    }

    /// The end of a valid frame at `offset`, or nil. Without `sequence` any sequence is taken.
    static func validFrame(_ bytes: UnsafeMutableRawBufferPointer, at offset: Int, sequence: UInt64?) -> Int? {
        guard offset + frameHeaderBytes <= bytes.count,
            bytes.loadUnaligned(fromByteOffset: offset, as: UInt32.self) == frameMagic
        else { return nil }
        let length = Int(bytes.loadUnaligned(fromByteOffset: offset + 8, as: UInt32.self))
        let padded = (length + 7) & ~7
        guard length <= payloadBytesMax, offset + frameHeaderBytes + padded <= bytes.count else { return nil }
        if let sequence, bytes.loadUnaligned(fromByteOffset: offset + 24, as: UInt64.self) != sequence { return nil }
        let stored = bytes.loadUnaligned(fromByteOffset: offset + 16, as: UInt64.self)
        return stored == checksum(bytes.baseAddress! + offset, paddedBytes: padded, offset: UInt64(offset)) ? offset + frameHeaderBytes + padded : nil
    }

    /// Everything of the frame but the sum itself.
    private static func checksum(_ frame: UnsafeRawPointer, paddedBytes: Int, offset: UInt64) -> UInt64 {
        let head = XXH3_64bits_withSeed(frame, 16, offset)
        return XXH3_64bits_withSeed(frame + 24, 8 + paddedBytes, head)
    }

    /// Lays out the next frame without writing it: for owners that write through a ring. `commit` or `rewind` follows.
    func encode(type: UInt32, payload: UnsafeRawBufferPointer, into out: inout [UInt8]) {
        precondition(payload.count <= Self.payloadBytesMax)
        let padded = (payload.count + 7) & ~7
        let start = out.count
        let offset = endBytes
        out.append(contentsOf: repeatElement(0, count: Self.frameHeaderBytes + padded))
        out.withUnsafeMutableBytes { bytes in
            let frame = UnsafeMutableRawPointer(bytes.baseAddress! + start)
            frame.storeBytes(of: Self.frameMagic, toByteOffset: 0, as: UInt32.self)
            frame.storeBytes(of: type, toByteOffset: 4, as: UInt32.self)
            frame.storeBytes(of: UInt32(payload.count), toByteOffset: 8, as: UInt32.self)
            frame.storeBytes(of: sequence + 1, toByteOffset: 24, as: UInt64.self)
            if payload.count > 0 { memcpyBytes(frame + Self.frameHeaderBytes, payload.baseAddress!, payload.count) }
            frame.storeBytes(of: Self.checksum(frame, paddedBytes: padded, offset: offset), toByteOffset: 16, as: UInt64.self)
        }
        endBytes += UInt64(Self.frameHeaderBytes + padded)
        sequence += 1
    }

    /// Cuts the log off before `frame`; the caller syncs.
    func cut(at frame: Frame) throws(StoreError) {
        try file.truncate(to: frame.offsetBytes)
        rewind(to: frame.offsetBytes, sequence: frame.sequence - 1)
    }

    /// Forgets an encoded frame that could not be written.
    func rewind(to endBytes: UInt64, sequence: UInt64) {
        self.endBytes = endBytes
        self.sequence = sequence
    }

    /// Writes one frame and makes it durable. On an error that left the file as it was (`.full`) the log can go on;
    /// on any other the owner must stop using it.
    func append(type: UInt32, payload: [UInt8]) throws(StoreError) {
        let (oldEnd, oldSequence) = (endBytes, sequence)
        var bytes: [UInt8] = []
        payload.withUnsafeBytes { encode(type: type, payload: $0, into: &bytes) }
        do {
            try write(bytes, at: oldEnd)
            try file.dataSync()
        } catch {
            rewind(to: oldEnd, sequence: oldSequence)
            guard case .full = error else { throw error }
            // When the frame cannot be taken back it may count: that is no lack of space any more, which would mean that nothing happened.
            do { try file.truncate(to: oldEnd) } catch let failure { throw .io(errno: EIO, what: "cannot take back a record of \(file.path) for which there was no space: \(failure)") }
            throw error
        }
        try? markSynced()
    }

    /// Notes, without a sync, that everything before was synced. Losing it only costs certainty about the last frame.
    func markSynced() throws(StoreError) {
        let (oldEnd, oldSequence) = (endBytes, sequence)
        var bytes: [UInt8] = []
        encode(type: Self.syncedType, payload: UnsafeRawBufferPointer(start: nil, count: 0), into: &bytes)
        do { try write(bytes, at: oldEnd) } catch {
            rewind(to: oldEnd, sequence: oldSequence)
            throw error
        }
    }

    private func write(_ bytes: [UInt8], at offset: UInt64) throws(StoreError) {
        try bytes.withBytes { bytes throws(StoreError) in try file.write(bytes, at: offset) }
    }
}

extension Array where Element == UInt8 {
    /// `withUnsafeBytes` with the store's errors.
    func withBytes<R>(_ body: (UnsafeRawBufferPointer) throws(StoreError) -> R) throws(StoreError) -> R {
        try withUnsafeBufferPointer { buffer throws(StoreError) in try body(UnsafeRawBufferPointer(buffer)) }
    }
}

/// The whole file in memory that the caller deallocates.
func readWhole(_ file: any StorageFile, size: UInt64) throws(StoreError) -> UnsafeMutableRawBufferPointer {
    let bytes = UnsafeMutableRawBufferPointer.allocate(byteCount: Int(size), alignment: 4096)
    do throws(StoreError) {
        let count = try file.read(into: bytes, at: 0)
        guard count == Int(size) else { throw .damaged(path: file.path, offsetBytes: UInt64(count), what: "the file ends early") }
    } catch {
        bytes.deallocate()
        throw error
    }
    return bytes
}

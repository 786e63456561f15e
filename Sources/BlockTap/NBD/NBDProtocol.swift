import Glibc

/// Numbers of the NBD protocol (https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md). All on the wire are
/// big-endian.
enum NBD {
    static let initMagic: UInt64 = 0x4e42_444d_4147_4943            // "NBDMAGIC"
    static let optionMagic: UInt64 = 0x4948_4156_454f_5054          // "IHAVEOPT"
    static let optionReplyMagic: UInt64 = 0x0003_e889_0455_65a9
    static let requestMagic: UInt32 = 0x2560_9513
    static let replyMagic: UInt32 = 0x6744_6698

    static let requestHeaderBytes = 28
    static let replyHeaderBytes = 16

    /// Handshake flags, the server's and the client's.
    static let flagFixedNewstyle: UInt16 = 1 << 0
    static let flagNoZeroes: UInt16 = 1 << 1

    enum Option: UInt32 {
        case exportName = 1
        case abort = 2
        case list = 3
        case startTLS = 5
        case info = 6
        case go = 7
        case structuredReply = 8
    }

    enum OptionReply: UInt32 {
        case ack = 1
        case server = 2
        case info = 3
        case errorUnsupported = 0x8000_0001
        case errorInvalid = 0x8000_0003
        case errorUnknown = 0x8000_0006
    }

    enum Info: UInt16 {
        case export = 0
        case name = 1
        case blockSize = 3
    }

    struct TransmissionFlags: OptionSet {
        let rawValue: UInt16
        static let hasFlags = Self(rawValue: 1 << 0)
        static let readOnly = Self(rawValue: 1 << 1)
        static let sendFlush = Self(rawValue: 1 << 2)
        static let sendFUA = Self(rawValue: 1 << 3)
        static let sendTrim = Self(rawValue: 1 << 5)
        static let sendWriteZeroes = Self(rawValue: 1 << 6)
        static let canMultiConn = Self(rawValue: 1 << 8)
    }

    enum Command: UInt16 {
        case read = 0
        case write = 1
        case disconnect = 2
        case flush = 3
        case trim = 4
        case writeZeroes = 6
    }

    struct CommandFlags: OptionSet {
        let rawValue: UInt16
        static let fua = Self(rawValue: 1 << 0)
        static let noHole = Self(rawValue: 1 << 1)
    }

    /// The errors that the protocol knows; everything else travels as EIO.
    static func wireError(_ error: Int32) -> UInt32 {
        switch error {
        case 0, EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOPNOTSUPP, ESHUTDOWN: UInt32(error)
        case EROFS, EACCES: UInt32(EPERM)
        case EDQUOT, EFBIG: UInt32(ENOSPC)
        default: UInt32(EIO)
        }
    }
}

/// A request as it came over the wire, and what is wrong with it.
struct NBDRequestHeader {
    var flags: UInt16
    var type: UInt16
    /// The client's, handed back as it came.
    var cookie: UInt64
    var offsetBytes: UInt64
    var lengthBytes: UInt32

    /// nil when the magic number is wrong. `bytes` holds `NBD.requestHeaderBytes`, not necessarily aligned.
    @inline(__always) init?(_ bytes: UnsafeRawPointer) {
        guard UInt32(bigEndian: bytes.loadUnaligned(as: UInt32.self)) == NBD.requestMagic else { return nil }
        flags = UInt16(bigEndian: bytes.loadUnaligned(fromByteOffset: 4, as: UInt16.self))
        type = UInt16(bigEndian: bytes.loadUnaligned(fromByteOffset: 6, as: UInt16.self))
        cookie = bytes.loadUnaligned(fromByteOffset: 8, as: UInt64.self)
        offsetBytes = UInt64(bigEndian: bytes.loadUnaligned(fromByteOffset: 16, as: UInt64.self))
        lengthBytes = UInt32(bigEndian: bytes.loadUnaligned(fromByteOffset: 24, as: UInt32.self))
    }

    /// Bytes that follow the header on the wire, whether the request is good or not.
    @inline(__always) var payloadBytes: Int { type == NBD.Command.write.rawValue ? Int(lengthBytes) : 0 }

    /// The one place where a request is judged: 0, or the errno that the specification wants ("Request types", "Error values").
    /// After this, everybody may rely on what `BlockRequest` promises.
    @inline(__always) func error(for export: NBDExport) -> Int32 {
        guard let command = NBD.Command(rawValue: type) else { return EINVAL }
        // FUA is valid, and without meaning, on commands that write nothing.
        var allowed = NBD.CommandFlags.fua
        let isWriting: Bool
        switch command {
        case .read:
            isWriting = false
        case .flush:
            return offsetBytes == 0 && lengthBytes == 0 && flags & ~allowed.rawValue == 0 ? 0 : EINVAL
        case .write:
            isWriting = true
        case .trim, .writeZeroes:
            if !export.supportsTrim && !export.isReadOnly { return EINVAL }
            if command == .writeZeroes { allowed.insert(.noHole) }
            isWriting = true
        case .disconnect:
            return EINVAL
        }
        if isWriting && export.isReadOnly { return EPERM }
        if flags & ~allowed.rawValue != 0 { return EINVAL }
        let size = export.geometry.sizeBytes
        if offsetBytes > size || UInt64(lengthBytes) > size - offsetBytes {
            return command == .write || command == .writeZeroes ? ENOSPC : EINVAL
        }
        let misaligned = (offsetBytes | UInt64(lengthBytes)) & UInt64(export.geometry.logicalBlockBytes - 1)
        if lengthBytes == 0 || misaligned != 0 { return EINVAL }
        if (command == .read || command == .write) && lengthBytes > NBDArena.requestBytesMax { return EINVAL }
        return 0
    }
}

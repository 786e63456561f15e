import CZlib
import Foundation

/// A .tar.gz that is written as it goes: what comes out is to be sent on, nothing is kept.
final class TarStream {
    private var stream = z_stream()
    private var pending: [UInt8] = []
    private let time: Int
    private static let blockBytes = 512

    init() throws {
        time = Int(Date().timeIntervalSince1970)
        // 15 + 16: a gzip header (zlib.h, deflateInit2).
        guard deflateInit2_(&stream, Z_DEFAULT_COMPRESSION, Z_DEFLATED, 15 + 16, 8, Z_DEFAULT_STRATEGY, ZLIB_VERSION, Int32(MemoryLayout<z_stream>.size)) == Z_OK else {
            throw ApplianceError.failed("cannot compress: no memory")
        }
    }

    deinit { deflateEnd(&stream) }

    /// A file; its name has at most 100 bytes.
    func add(_ name: String, _ content: [UInt8]) throws {
        var header = [UInt8](repeating: 0, count: Self.blockBytes)
        func put(_ text: String, at offset: Int, _ count: Int) { for (place, byte) in text.utf8.prefix(count).enumerated() { header[offset + place] = byte } }
        func octal(_ value: Int, _ digits: Int) -> String {
            let text = String(value, radix: 8)
            return String(repeating: "0", count: max(0, digits - text.count)) + text
        }
        // POSIX.1-1988, "ustar Interchange Format".
        put(name, at: 0, 100)
        put(octal(0o600, 7), at: 100, 8)
        put(octal(0, 7), at: 108, 8)
        put(octal(0, 7), at: 116, 8)
        put(octal(content.count, 11), at: 124, 12)
        put(octal(time, 11), at: 136, 12)
        put("        ", at: 148, 8)
        put("0", at: 156, 1)
        put("ustar", at: 257, 6)
        put("00", at: 263, 2)
        put(octal(header.reduce(0) { $0 + Int($1) }, 6), at: 148, 7)
        header[154] = 0
        header[155] = 32
        try deflate(header, Z_NO_FLUSH)
        try deflate(content, Z_NO_FLUSH)
        let rest = content.count % Self.blockBytes
        if rest > 0 { try deflate([UInt8](repeating: 0, count: Self.blockBytes - rest), Z_NO_FLUSH) }
    }

    func end() throws { try deflate([UInt8](repeating: 0, count: 2 * Self.blockBytes), Z_FINISH) }

    /// What has come out since the last time.
    func take() -> [UInt8] {
        defer { pending = [] }
        return pending
    }

    private func deflate(_ bytes: [UInt8], _ flush: Int32) throws {
        var input = bytes, output = [UInt8](repeating: 0, count: 64 << 10)
        try input.withUnsafeMutableBufferPointer { source in
            stream.next_in = source.baseAddress
            stream.avail_in = UInt32(source.count)
            var isDone = false
            while !isDone {
                let result = output.withUnsafeMutableBufferPointer { target in
                    stream.next_out = target.baseAddress
                    stream.avail_out = UInt32(target.count)
                    return CZlib.deflate(&stream, flush)
                }
                guard result == Z_OK || result == Z_STREAM_END || result == Z_BUF_ERROR else { throw ApplianceError.failed("cannot compress: zlib says \(result)") }
                pending += output[..<(output.count - Int(stream.avail_out))]
                isDone = stream.avail_out > 0 || result == Z_STREAM_END
            }
        }
    }
}

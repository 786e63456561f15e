import Glibc

/// Writes and reads the small PEM files of a state directory: durable, never half-written, keys unreadable for others.
public enum KeyFile {
    /// Writes `text` to `path` by way of a temporary file beside it: write, fsync, rename, fsync of the directory.
    /// `mode` is what the file has from its first moment (0600 for keys).
    public static func write(_ text: String, to path: String, mode: mode_t) throws(PKIError) {
        let temporary = path + ".tmp"
        unlink(temporary)
        let fd = open(temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode)
        guard fd >= 0 else { throw failure("write", temporary) }
        var bytes = Array(text.utf8)[...]
        while !bytes.isEmpty {
            let written = bytes.withUnsafeBytes { Glibc.write(fd, $0.baseAddress, $0.count) }
            if written < 0 && errno == EINTR { continue }
            guard written > 0 else {
                let error = failure("write", temporary)
                close(fd)
                unlink(temporary)
                throw error
            }
            bytes = bytes.dropFirst(written)
        }
        let synced = fsync(fd)
        let syncError = failure("sync", temporary)
        close(fd)
        guard synced == 0 else {
            unlink(temporary)
            throw syncError
        }
        guard rename(temporary, path) == 0 else { throw failure("rename", temporary) }
        let directory = open(parent(of: path), O_RDONLY | O_DIRECTORY | O_CLOEXEC)
        guard directory >= 0 else { throw failure("open", parent(of: path)) }
        defer { close(directory) }
        guard fsync(directory) == 0 else { throw failure("sync", parent(of: path)) }
    }

    /// Reads a text file of at most 1 MiB.
    public static func read(_ path: String) throws(PKIError) -> String {
        let fd = open(path, O_RDONLY | O_CLOEXEC)
        guard fd >= 0 else { throw failure("read", path) }
        defer { close(fd) }
        var bytes: [UInt8] = []
        var chunk = [UInt8](repeating: 0, count: 16384)
        while true {
            let count = chunk.withUnsafeMutableBytes { Glibc.read(fd, $0.baseAddress, $0.count) }
            if count < 0 && errno == EINTR { continue }
            guard count >= 0 else { throw failure("read", path) }
            if count == 0 { break }
            bytes += chunk[..<count]
            guard bytes.count <= 1 << 20 else { throw PKIError("cannot read \(path): larger than 1 MiB, not a PEM file") }
        }
        return String(decoding: bytes, as: UTF8.self)
    }

    static func exists(_ path: String) -> Bool { access(path, F_OK) == 0 }

    private static func parent(of path: String) -> String {
        guard let slash = path.lastIndex(of: "/") else { return "." }
        return slash == path.startIndex ? "/" : String(path[..<slash])
    }

    private static func failure(_ verb: String, _ path: String) -> PKIError {
        PKIError("cannot \(verb) \(path): \(String(cString: strerror(errno)))")
    }
}

import AsyncHTTPClient
import Foundation
import Glibc
import NIOCore

extension APIClient {
    /// Writes an answer into a new file that only its owner can read, as it comes. No half of it is left under its name.
    public func download(_ path: String, to file: String) async throws {
        let partial = file + ".afterimage-partial"
        guard !FileManager.default.fileExists(atPath: file) else { throw Failure.local("there is a file \(file) already") }
        unlink(partial)
        let fd = open(partial, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0o600)
        guard fd >= 0 else { throw Failure.local("cannot write \(partial): \(String(cString: strerror(errno)))") }
        defer {
            close(fd)
            unlink(partial)
        }
        try await stream(path) { buffer in
            var rest = buffer
            while rest.readableBytes > 0 {
                let count = rest.withUnsafeReadableBytes { write(fd, $0.baseAddress, $0.count) }
                guard count > 0 else { throw Failure.local("cannot write \(partial): \(String(cString: strerror(errno)))") }
                rest.moveReaderIndex(forwardBy: count)
            }
        }
        guard fsync(fd) == 0, link(partial, file) == 0 else { throw Failure.local("cannot write \(file): \(String(cString: strerror(errno)))") }
    }
}

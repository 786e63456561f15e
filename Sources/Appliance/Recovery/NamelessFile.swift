import Foundation

/// A temporary file that has no name any more: nothing of it is left, however this process ends.
struct NamelessFile {
    let fd: Int32
    /// By which other processes of this user open it, as long as it is not closed.
    var path: String { "/proc/\(getpid())/fd/\(fd)" }

    init(_ purpose: String) throws(ApplianceError) {
        var template = Array((NSTemporaryDirectory() + "/\(purpose)-XXXXXX").utf8CString)
        fd = mkstemp(&template)
        guard fd >= 0, fcntl(fd, F_SETFD, FD_CLOEXEC) == 0 else { throw .failed("cannot make a temporary file in \(NSTemporaryDirectory()): \(String(cString: strerror(errno)))") }
        unlink(template)
    }

    func write(_ text: String) throws {
        try FileHandle(fileDescriptor: fd, closeOnDealloc: false).write(contentsOf: Data(text.utf8))
    }

    func close() { _ = Glibc.close(fd) }
}

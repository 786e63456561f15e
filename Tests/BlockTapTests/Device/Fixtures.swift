import Glibc

@testable import BlockTap

/// A file under the temporary directory that goes with this object.
final class TemporaryFile: @unchecked Sendable {
    let path: String
    let fd: Int32

    init(bytes: Int) throws {
        var template = Array("\(temporaryDirectory())/afterimage-test-XXXXXX".utf8CString)
        fd = mkstemp(&template)
        path = String(decoding: template.dropLast().map { UInt8(bitPattern: $0) }, as: UTF8.self)
        guard fd >= 0, ftruncate(fd, bytes) == 0 else { throw SystemError(errno: errno, doing: "make a temporary file") }
    }

    deinit {
        close(fd)
        unlink(path)
    }
}

func temporaryDirectory() -> String {
    getenv("TMPDIR").map { String(cString: $0) } ?? "/tmp"
}

/// Page-aligned memory that tests share with a loop.
final class SharedMemory: @unchecked Sendable {
    let start: UnsafeMutableRawPointer
    init(bytes: Int) {
        start = .allocate(byteCount: bytes, alignment: 4096)
        start.initializeMemory(as: UInt8.self, repeating: 0, count: bytes)
    }
    deinit { start.deallocate() }
}

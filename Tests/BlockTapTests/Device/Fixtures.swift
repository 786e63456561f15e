import Foundation
import Testing

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

/// A directory under the temporary directory that goes, with its files, with this object.
final class TemporaryDirectory: @unchecked Sendable {
    let path: String

    init() throws {
        var template = Array("\(temporaryDirectory())/afterimage-test-XXXXXX".utf8CString)
        guard mkdtemp(&template) != nil else { throw SystemError(errno: errno, doing: "make a temporary directory") }
        path = String(decoding: template.dropLast().map { UInt8(bitPattern: $0) }, as: UTF8.self)
    }

    deinit { try? FileManager.default.removeItem(atPath: path) }
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

/// A loop device with direct I/O over a temporary file; detached with this object.
final class LoopDevice: @unchecked Sendable {
    let file: TemporaryFile
    let path: String

    static var isAvailable: Bool { geteuid() == 0 && Program.exists("losetup") && access("/dev/loop-control", F_OK) == 0 }

    init(bytes: Int, options: [String] = []) throws {
        file = try TemporaryFile(bytes: bytes)
        path = try Program.run(["losetup", "--find", "--show", "--direct-io=on"] + options + [file.path])
            .trimmingCharacters(in: .whitespacesAndNewlines)
    }

    /// Only while it is still ours: somebody may have detached it, and the number may be another's disk by now.
    deinit {
        guard fileText("/sys/block/\(path.dropFirst("/dev/".count))/loop/backing_file")?.trimmingNewline == file.path[...] else { return }
        _ = try? Program.run(["losetup", "--detach", path])
    }
}

/// Other people's programs.
enum Program {
    struct Failure: Error, CustomStringConvertible {
        var description: String
    }

    static func exists(_ name: String) -> Bool {
        let path = (getenv("PATH").map { String(cString: $0) } ?? "") + ":/usr/sbin:/sbin"
        return path.split(separator: ":").contains { access("\($0)/\(name)", X_OK) == 0 }
    }

    /// Its output, standard error included; throws when it does not exit with 0.
    @discardableResult
    static func run(_ command: [String]) throws -> String {
        let process = Process()
        process.executableURL = URL(fileURLWithPath: "/usr/bin/env")
        process.arguments = ["PATH=\(ProcessInfo.processInfo.environment["PATH"] ?? ""):/usr/sbin:/sbin", "timeout", "60"] + command
        let pipe = Pipe()
        process.standardOutput = pipe
        process.standardError = pipe
        process.standardInput = FileHandle.nullDevice
        try process.run()
        let output = String(decoding: pipe.fileHandleForReading.readDataToEndOfFile(), as: UTF8.self)
        process.waitUntilExit()
        guard process.terminationStatus == 0 else {
            throw Failure(description: "\(command.joined(separator: " ")) exited with \(process.terminationStatus): \(output)")
        }
        return output
    }
}

import Foundation
import Glibc
import Synchronization

/// A process of the product, which only we may end.
final class Daemon: @unchecked Sendable {
    private let process = Process()
    let logPath: String
    let name: String

    init(_ name: String, _ program: String, _ arguments: [String], logPath: String) throws {
        (self.name, self.logPath) = (name, logPath)
        if !FileManager.default.fileExists(atPath: logPath) { _ = FileManager.default.createFile(atPath: logPath, contents: nil) }
        guard let log = FileHandle(forWritingAtPath: logPath) else { throw Trouble("cannot write \(logPath)") }
        try log.seekToEnd()
        process.executableURL = URL(fileURLWithPath: program)
        process.arguments = arguments
        process.standardOutput = log
        process.standardError = log
        process.standardInput = FileHandle.nullDevice
        try Self.start(process)
        try log.close()
    }

    private static let isOver = Mutex(false)

    /// From now on none can be started.
    static func startNone() { isOver.withLock { $0 = true } }

    private static func start(_ process: Process) throws {
        try isOver.withLock { isOver in
            guard !isOver else { throw Trouble("the run is over") }
            try process.run()
        }
    }

    var isRunning: Bool { process.isRunning }

    /// Returns its exit status, or minus the signal that ended it. What ended before that is an error: nobody asked for it.
    @discardableResult
    func end(_ signal: Int32) async throws -> Int32 {
        guard process.isRunning else { throw Trouble("\(name) ended by itself (\(status)): \(tail)") }
        kill(process.processIdentifier, signal)
        try await until("\(name) ends after signal \(signal)", seconds: 120) { !process.isRunning }
        return status
    }

    func killAtOnce() { if process.isRunning { kill(process.processIdentifier, SIGKILL) } }

    private var status: Int32 { process.terminationReason == .uncaughtSignal ? -process.terminationStatus : process.terminationStatus }
    var tail: String { String((try? String(contentsOfFile: logPath, encoding: .utf8))?.suffix(1500) ?? "") }

    /// Runs a program to its end.
    static func run(_ program: String, _ arguments: [String]) async throws -> (status: Int32, output: String) {
        let process = Process(), output = Pipe()
        process.executableURL = URL(fileURLWithPath: program)
        process.arguments = arguments
        process.standardOutput = output
        process.standardError = output
        process.standardInput = FileHandle.nullDevice
        return try await withCheckedThrowingContinuation { done in
            DispatchQueue.global().async {
                do {
                    try start(process)
                    let said = output.fileHandleForReading.readDataToEndOfFile()
                    process.waitUntilExit()
                    done.resume(returning: (process.terminationStatus, String(decoding: said, as: UTF8.self)))
                } catch { done.resume(throwing: error) }
            }
        }
    }
}

/// A recovery machine, as /proc shows it.
struct Machine: Hashable {
    var instance: String
    var pid: pid_t
    var startTicks: UInt64

    /// The living ones with sockets below `directory`.
    static func all(below directory: String) -> [Machine] {
        ((try? FileManager.default.contentsOfDirectory(atPath: "/proc")) ?? []).compactMap { entry in
            guard let pid = pid_t(entry), let data = FileManager.default.contents(atPath: "/proc/\(pid)/cmdline"), !data.isEmpty else { return nil }
            let words = data.split(separator: 0).map { String(decoding: $0, as: UTF8.self) }
            guard let name = words.firstIndex(of: "-name"), name + 1 < words.count, words[name + 1].hasPrefix("afterimage-"),
                words.contains(where: { $0.contains("unix:\(directory)/") }), let ticks = startTicks(pid),
                // A script that starts QEMU has its words too, and so have the children of that.
                (try? FileManager.default.destinationOfSymbolicLink(atPath: "/proc/\(pid)/exe"))?.split(separator: "/").last?.hasPrefix("qemu") == true
            else { return nil }
            return Machine(instance: String(words[name + 1].dropFirst("afterimage-".count)), pid: pid, startTicks: ticks)
        }
    }

    var isAlive: Bool { Self.startTicks(pid) == startTicks }

    /// nil: there is no such process, or it is only waited for.
    private static func startTicks(_ pid: pid_t) -> UInt64? {
        guard let data = FileManager.default.contents(atPath: "/proc/\(pid)/stat") else { return nil }
        let text = String(decoding: data, as: UTF8.self)
        guard let close = text.lastIndex(of: ")") else { return nil }
        let fields = text[text.index(after: close)...].split(separator: " ")
        return fields.count > 19 && fields[0] != "Z" ? UInt64(fields[19]) : nil
    }
}

/// TCP ports of 127.0.0.1, below the range that the system hands out.
enum Ports {
    static func freePair(_ random: inout SplitMix) throws -> UInt16 {
        for _ in 0..<1000 {
            let port = UInt16(20_000 + random.below(6000) * 2)
            if isFree(port), isFree(port + 1) { return port }
        }
        throw Trouble("no two free TCP ports between 20000 and 32000")
    }

    private static func isFree(_ port: UInt16) -> Bool {
        let fd = socket(AF_INET, Int32(SOCK_STREAM.rawValue), 0)
        defer { close(fd) }
        var yes: Int32 = 1
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, socklen_t(MemoryLayout<Int32>.size))
        var address = sockaddr_in()
        address.sin_family = sa_family_t(AF_INET)
        address.sin_port = port.bigEndian
        address.sin_addr.s_addr = UInt32(INADDR_LOOPBACK).bigEndian
        return withUnsafePointer(to: &address) {
            $0.withMemoryRebound(to: sockaddr.self, capacity: 1) { bind(fd, $0, socklen_t(MemoryLayout<sockaddr_in>.size)) == 0 }
        }
    }
}

/// A reason why a sequence failed.
struct Trouble: Error, CustomStringConvertible {
    var description: String
    init(_ description: String) { self.description = description }
}

func until(_ what: String, seconds: Double = 120, isolation: isolated (any Actor)? = #isolation, _ condition: () async throws -> Bool) async throws {
    // So many questions, not so much time: a busy machine may keep us from asking.
    var questions = Int(seconds * 20)
    while !(try await condition()) {
        questions -= 1
        if questions <= 0 { throw Trouble("waited \(Int(seconds)) s in vain: \(what)") }
        try await Task.sleep(for: .milliseconds(50))
    }
}

struct SplitMix: RandomNumberGenerator {
    private var state: UInt64
    init(seed: UInt64) { state = seed }
    mutating func next() -> UInt64 {
        state &+= 0x9e37_79b9_7f4a_7c15
        var z = state
        z = (z ^ (z >> 30)) &* 0xbf58_476d_1ce4_e5b9
        z = (z ^ (z >> 27)) &* 0x94d0_49bb_1331_11eb
        return z ^ (z >> 31)
    }
    mutating func below(_ limit: Int) -> Int { Int(next() % UInt64(limit)) }
    mutating func chance(_ percent: Int) -> Bool { below(100) < percent }
    mutating func pick<T>(_ from: [T]) -> T { from[below(from.count)] }
}

import Foundation
import Glibc

/// A client of the guest agent (qemu-guest-agent; QEMU: docs/interop/qemu-ga-ref.rst) that runs in a machine, over the unix socket behind its virtio-serial port.
///
/// The port is there whether or not anybody listens in the machine, so a connection proves nothing: each one begins with
/// guest-sync-delimited, whose answer comes behind a byte 0xFF that no JSON has. What an earlier, slower answer has left in the port ends there.
struct GuestAgent: Sendable {
    var socketPath: String

    struct Interface: Sendable, Hashable, Decodable {
        struct Address: Sendable, Hashable, Decodable {
            var type: String
            var address: String
            var prefixLength: Int
            enum CodingKeys: String, CodingKey {
                case type = "ip-address-type"
                case address = "ip-address"
                case prefixLength = "prefix"
            }
        }
        var name: String
        var mac: String?
        var addresses: [Address]?
        enum CodingKeys: String, CodingKey {
            case name
            case mac = "hardware-address"
            case addresses = "ip-addresses"
        }
    }

    struct Execution: Sendable, Hashable {
        /// nil when a signal ended it.
        var exitCode: Int?
        var signal: Int?
        /// Both streams, one after the other.
        var output: String
        var isTruncated: Bool
    }

    /// Whether it answers within so many seconds.
    func answers(within seconds: Double) async -> Bool {
        (try? await session(seconds) { _ in true }) ?? false
    }

    func interfaces(within seconds: Double) async throws -> [Interface] {
        try await session(seconds) { try $0.execute("guest-network-get-interfaces", as: [Interface].self) }
    }

    /// Asks the machine's system to shut down. Nothing answers when it does.
    func shutDown(within seconds: Double) async throws {
        try await session(seconds) { try $0.send("guest-shutdown", ["mode": .string("powerdown")]) }
    }

    /// Runs a program in the machine to its end; one that takes longer than `seconds` is killed, and that is an error.
    func run(_ path: String, _ arguments: [String], input: String? = nil, within seconds: Double) async throws -> Execution {
        do { return try await execution(path, arguments, input, seconds) } catch let error as GuestAgentError {
            // Only now: a port takes one client at a time.
            if case .overdue(let pid) = error { _ = try? await session(5) { try $0.kill(pid) } }
            throw error
        }
    }

    private func execution(_ path: String, _ arguments: [String], _ input: String?, _ seconds: Double) async throws -> Execution {
        try await session(seconds) { session in
            var order: [String: JSONValue] = ["path": .string(path), "arg": .array(arguments.map { .string($0) }), "capture-output": .bool(true)]
            if let input { order["input-data"] = .string(Data(input.utf8).base64EncodedString()) }
            struct Started: Decodable { var pid: Int }
            let pid = try session.execute("guest-exec", order, as: Started.self).pid
            do { return try session.waitForEnd(of: pid) } catch let error as GuestAgentError {
                if case .timeout = error { throw GuestAgentError.overdue(pid: pid) }
                throw error
            }
        }
    }

    private func session<T: Sendable>(_ seconds: Double, _ body: @escaping @Sendable (GuestAgentSession) throws -> T) async throws -> T {
        let path = socketPath
        return try await onThread("guest-agent") { isCancelled in
            let session = try GuestAgentSession(path: path, deadline: .now + .milliseconds(Int(seconds * 1000)), isCancelled: isCancelled)
            try session.synchronize()
            return try body(session)
        }
    }
}

enum GuestAgentError: Error, CustomStringConvertible {
    case timeout(String)
    /// A program has not ended in time.
    case overdue(pid: Int)
    case refused(command: String, why: String)
    case broken(String)

    var description: String {
        switch self {
        case .timeout(let what): "the machine's guest agent did not answer \(what) in time (is qemu-guest-agent installed in it, and running?)"
        case .overdue: "the program did not end in time, and was killed"
        case .refused(let command, let why): "the machine's guest agent refused \(command): \(why)"
        case .broken(let why): "cannot talk to the machine's guest agent: \(why)"
        }
    }
}

private struct GuestAgentAnswer<Value: Decodable>: Decodable {
    var `return`: Value?
    var error: QMPIncoming.Failure?
}

/// One connection, used by one thread.
final class GuestAgentSession {
    private let fd: Int32
    private let deadline: ContinuousClock.Instant
    private let isCancelled: @Sendable () -> Bool
    private var received: [UInt8] = []
    private static let answerBytesMax = 32 << 20
    /// With which every connection begins.
    static let greeting = "guest-sync-delimited"

    init(path: String, deadline: ContinuousClock.Instant, isCancelled: @escaping @Sendable () -> Bool) throws {
        self.deadline = deadline
        self.isCancelled = isCancelled
        var address = sockaddr_un()
        address.sun_family = sa_family_t(AF_UNIX)
        let name = Array(path.utf8)
        guard name.count < MemoryLayout.size(ofValue: address.sun_path) else { throw GuestAgentError.broken("\(path) is too long for a unix socket") }
        withUnsafeMutableBytes(of: &address.sun_path) { $0.copyBytes(from: name) }
        fd = socket(AF_UNIX, Int32(SOCK_STREAM.rawValue) | Int32(SOCK_CLOEXEC.rawValue) | Int32(SOCK_NONBLOCK.rawValue), 0)
        guard fd >= 0 else { throw GuestAgentError.broken(String(cString: strerror(errno))) }
        let connected = withUnsafePointer(to: &address) {
            $0.withMemoryRebound(to: sockaddr.self, capacity: 1) { connect(fd, $0, socklen_t(MemoryLayout<sockaddr_un>.size)) }
        }
        guard connected == 0 else {
            throw GuestAgentError.broken("\(path): \(String(cString: strerror(errno)))")
        }
    }

    deinit { close(fd) }

    func synchronize() throws {
        let id = Double(UInt32.random(in: 1...UInt32.max))
        try write([0xFF])
        try send(Self.greeting, ["id": .number(id)])
        while true {
            // What comes before the mark is an answer to somebody else.
            if let mark = received.lastIndex(of: 0xFF) { received.removeFirst(mark + 1) }
            if let line = takeLine() {
                if let answer = try? JSONDecoder().decode(QMPIncoming.self, from: line), answer.return?.number == id { return }
                continue
            }
            try read(Self.greeting)
        }
    }

    func send(_ command: String, _ arguments: [String: JSONValue] = [:]) throws {
        struct Order: Encodable {
            var execute: String
            var arguments: [String: JSONValue]
        }
        try write(Array(try JSONEncoder().encode(Order(execute: command, arguments: arguments))) + [UInt8(ascii: "\n")])
    }

    func execute<T: Decodable>(_ command: String, _ arguments: [String: JSONValue] = [:], as type: T.Type) throws -> T {
        try send(command, arguments)
        while true {
            if let line = takeLine() {
                let answer: GuestAgentAnswer<T>
                do { answer = try JSONDecoder().decode(GuestAgentAnswer<T>.self, from: line) } catch { throw GuestAgentError.broken("an answer to \(command) that is not understood: \(error)") }
                if let failure = answer.error { throw GuestAgentError.refused(command: command, why: failure.desc) }
                guard let value = answer.return else { throw GuestAgentError.broken("an answer to \(command) without a value") }
                return value
            }
            try read(command)
        }
    }

    func waitForEnd(of pid: Int) throws -> GuestAgent.Execution {
        struct Status: Decodable {
            var exited: Bool
            var exitcode: Int?
            var signal: Int?
            var output: String?
            var errors: String?
            var isOutputTruncated: Bool?
            var isErrorsTruncated: Bool?
            enum CodingKeys: String, CodingKey {
                case exited, exitcode, signal
                case output = "out-data"
                case errors = "err-data"
                case isOutputTruncated = "out-truncated"
                case isErrorsTruncated = "err-truncated"
            }
        }
        var pauseMicroseconds: UInt32 = 20_000
        while true {
            let status = try execute("guest-exec-status", ["pid": .number(Double(pid))], as: Status.self)
            if status.exited {
                let texts = [status.output, status.errors].compactMap { $0.flatMap { Data(base64Encoded: $0) } }.map { String(decoding: $0, as: UTF8.self) }
                return GuestAgent.Execution(
                    exitCode: status.signal == nil ? status.exitcode : nil, signal: status.signal, output: texts.joined(),
                    isTruncated: status.isOutputTruncated == true || status.isErrorsTruncated == true)
            }
            try checkTime("the end of a program")
            // The agent sends nothing by itself: a program's end can only be asked for.
            usleep(pauseMicroseconds)
            pauseMicroseconds = min(pauseMicroseconds * 2, 500_000)
        }
    }

    /// A program that was started, and what that has started in a session of its own.
    func kill(_ pid: Int) throws {
        struct Started: Decodable { var pid: Int }
        let order = "kill -KILL -- -\(pid) 2>/dev/null; kill -KILL \(pid)"
        _ = try execute("guest-exec", ["path": .string("/bin/sh"), "arg": .array([.string("-c"), .string(order)])], as: Started.self)
    }

    // MARK: Bytes

    private func takeLine() -> Data? {
        guard let end = received.firstIndex(of: UInt8(ascii: "\n")) else { return nil }
        defer { received.removeFirst(end + 1) }
        return Data(received[..<end])
    }

    private func checkTime(_ what: String) throws {
        if isCancelled() { throw CancellationError() }
        if ContinuousClock.now >= deadline { throw GuestAgentError.timeout(what) }
    }

    /// Waits for more, a short while at a time, so that the end of the task is seen.
    private func read(_ what: String) throws {
        var buffer = [UInt8](repeating: 0, count: 65536)
        while true {
            try wait(Int16(POLLIN), what)
            let count = Glibc.read(fd, &buffer, buffer.count)
            if count < 0, errno == EINTR || errno == EAGAIN { continue }
            guard count > 0 else { throw GuestAgentError.broken("the machine's QEMU closed its port") }
            received += buffer[..<count]
            guard received.count <= Self.answerBytesMax else { throw GuestAgentError.broken("an answer of more than \(Self.answerBytesMax) bytes") }
            return
        }
    }

    private func write(_ bytes: [UInt8]) throws {
        var done = 0
        while done < bytes.count {
            let count = bytes[done...].withUnsafeBytes { Glibc.send(fd, $0.baseAddress!, $0.count, Int32(MSG_NOSIGNAL)) }
            if count > 0 {
                done += count
                continue
            }
            guard count < 0, errno == EINTR || errno == EAGAIN else { throw GuestAgentError.broken("the machine's QEMU closed its port") }
            try wait(Int16(POLLOUT), "an order")
        }
    }

    private func wait(_ events: Int16, _ what: String) throws {
        while true {
            try checkTime(what)
            var slot = pollfd(fd: fd, events: events, revents: 0)
            if poll(&slot, 1, 100) > 0 { return }
        }
    }
}

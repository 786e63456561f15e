import Foundation
import Synchronization
import Testing

@testable import Appliance

@Suite("Guest agent")
struct GuestAgentTests {
    /// A machine's port with an agent in it that answers by `reply`; nil: it is silent.
    private final class FakeAgent: Sendable {
        let path: String
        private let listener: Int32
        private let seen = Mutex<[String]>([])
        var commands: [String] { seen.withLock { $0 } }

        init(directory: String, reply: @escaping @Sendable (_ command: String, _ arguments: JSONValue) -> String?) throws {
            path = directory + "/agent.sock"
            listener = socket(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0)
            var address = sockaddr_un()
            address.sun_family = sa_family_t(AF_UNIX)
            withUnsafeMutableBytes(of: &address.sun_path) { $0.copyBytes(from: Array(directory.utf8) + Array("/agent.sock".utf8)) }
            let fd = listener
            let isBound = withUnsafePointer(to: &address) { $0.withMemoryRebound(to: sockaddr.self, capacity: 1) { bind(fd, $0, socklen_t(MemoryLayout<sockaddr_un>.size)) == 0 } }
            try #require(isBound && listen(listener, 4) == 0)
            Thread { [self] in
                while true {
                    let connection = accept(fd, nil, nil)
                    if connection < 0 { return }
                    serve(connection, reply)
                    close(connection)
                }
            }.start()
        }

        func end() { shutdown(listener, Int32(SHUT_RDWR)) }

        private func serve(_ fd: Int32, _ reply: (String, JSONValue) -> String?) {
            var bytes: [UInt8] = []
            var buffer = [UInt8](repeating: 0, count: 4096)
            // Of a client that was here before: half an answer, and a whole one.
            func say(_ text: String, mark: Bool = false) {
                let bytes: [UInt8] = (mark ? [0xFF] : []) + Array(text.utf8) + [10]
                _ = bytes.withUnsafeBytes { write(fd, $0.baseAddress!, $0.count) }
            }
            say(#"urn": {}}"#)
            say(#"{"return": 12345}"#)
            while true {
                let count = read(fd, &buffer, buffer.count)
                if count <= 0 { return }
                bytes += buffer[..<count].filter { $0 != 0xFF }
                while let end = bytes.firstIndex(of: 10) {
                    struct Order: Decodable {
                        var execute: String
                        var arguments: JSONValue?
                    }
                    let order = try? JSONDecoder().decode(Order.self, from: Data(bytes[..<end]))
                    bytes.removeFirst(end + 1)
                    guard let order else { continue }
                    seen.withLock { $0.append(order.execute) }
                    let arguments = order.arguments ?? .null
                    if order.execute == "guest-sync-delimited" {
                        if reply("guest-sync-delimited", arguments) != nil { say("{\"return\": \(Int(arguments["id"]?.number ?? 0))}", mark: true) }
                    } else if let text = reply(order.execute, arguments) {
                        say(text)
                    }
                }
            }
        }
    }

    private func withAgent(_ reply: @escaping @Sendable (String, JSONValue) -> String?, _ body: (GuestAgent, FakeAgent) async throws -> Void) async throws {
        let directory = try TemporaryDirectory()
        let fake = try FakeAgent(directory: directory.path, reply: reply)
        defer { fake.end() }
        try await body(GuestAgent(socketPath: fake.path), fake)
    }

    @Test("answers of before are not taken for its own")
    func synchronization() async throws {
        try await withAgent({ _, _ in #"{"return": [{"name": "eth0", "hardware-address": "52:54:00:00:00:01", "ip-addresses": [{"ip-address-type": "ipv4", "ip-address": "10.0.2.15", "prefix": 24}]}, {"name": "lo"}]}"# }) { agent, _ in
            #expect(await agent.answers(within: 60))
            let interfaces = try await agent.interfaces(within: 60)
            #expect(interfaces.map(\.name) == ["eth0", "lo"] && interfaces[0].mac == "52:54:00:00:00:01" && interfaces[0].addresses?.first?.address == "10.0.2.15")
        }
    }

    @Test("a program's end, output and exit code; what it reads is its input")
    func run() async throws {
        final class Counter: Sendable { let value = Atomic(0) }
        let asked = Counter()
        try await withAgent({ command, arguments in
            switch command {
            case "guest-exec": return arguments["input-data"]?.string == "ZWNobw==" ? #"{"return": {"pid": 7}}"# : #"{"error": {"class": "GenericError", "desc": "no input"}}"#
            case "guest-exec-status":
                return asked.value.add(1, ordering: .relaxed).newValue < 3
                    ? #"{"return": {"exited": false}}"# : #"{"return": {"exited": true, "exitcode": 3, "out-data": "b3V0", "err-data": "ZXJy"}}"#
            default: return ""
            }
        }) { agent, _ in
            let ended = try await agent.run("/bin/sh", ["-s"], input: "echo", within: 60)
            #expect(ended == GuestAgent.Execution(exitCode: 3, signal: nil, output: "outerr", isTruncated: false))
            let refused = await #expect(throws: GuestAgentError.self) { try await agent.run("/bin/sh", [], within: 60) }
            let why = try #require(refused)
            #expect("\(why)".contains("no input"))
        }
    }

    @Test("a program that does not end is killed; a machine without an agent is said to have none")
    func limits() async throws {
        try await withAgent({ command, _ in command == "guest-exec" ? #"{"return": {"pid": 7}}"# : #"{"return": {"exited": false}}"# }) { agent, fake in
            await #expect(throws: GuestAgentError.self) { try await agent.run("/bin/sleep", ["1000"], within: 3) }
            #expect(fake.commands.filter { $0 == "guest-exec" }.count == 2, "the second one kills")
        }
        try await withAgent({ _, _ in nil }) { agent, _ in #expect(await !agent.answers(within: 0.2)) }
        #expect(await !GuestAgent(socketPath: "/nowhere").answers(within: 1))
    }
}

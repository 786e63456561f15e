import Foundation
import Synchronization
import Testing

@testable import Appliance

/// The built program, run as processes of its own: appliance, agent, and the commands of an operator.
enum Program {
    /// Beside the test bundle.
    static let path: String = {
        let bundle = URL(fileURLWithPath: CommandLine.arguments[0]).deletingLastPathComponent()
        return bundle.appendingPathComponent("afterimage").path
    }()
    static let qemuIO = "/usr/bin/qemu-io"
    static var canBoot: Bool { TestQEMU.path != nil && FileManager.default.isExecutableFile(atPath: qemuIO) }
    static let missing: Comment = "needs QEMU (see TestQEMU) and /usr/bin/qemu-io"

    struct Outcome {
        var code: Int32
        var output: String
        var errors: String
    }

    static func run(_ arguments: [String], environment: [String: String] = [:]) async throws -> Outcome {
        try await run(path, arguments, environment: environment)
    }

    static func run(_ executable: String, _ arguments: [String], environment: [String: String] = [:]) async throws -> Outcome {
        let process = Process()
        process.executableURL = URL(fileURLWithPath: executable)
        process.arguments = arguments
        process.environment = ProcessInfo.processInfo.environment.merging(environment) { $1 }
        let output = Pipe(), errors = Pipe()
        process.standardOutput = output
        process.standardError = errors
        process.standardInput = FileHandle.nullDevice
        return try await withCheckedThrowingContinuation { done in
            DispatchQueue.global().async {
                do {
                    try process.run()
                    let said = output.fileHandleForReading.readDataToEndOfFile()
                    let complained = errors.fileHandleForReading.readDataToEndOfFile()
                    process.waitUntilExit()
                    done.resume(returning: Outcome(
                        code: process.terminationStatus, output: String(decoding: said, as: UTF8.self), errors: String(decoding: complained, as: UTF8.self)))
                } catch { done.resume(throwing: error) }
            }
        }
    }
}

/// A daemon of the product; killed when the test ends, whatever happened.
final class Daemon: @unchecked Sendable {
    let process = Process()
    let logPath: String

    /// `wrapper`: a program that becomes this one.
    init(_ arguments: [String], environment: [String: String] = [:], wrapper: [String] = [], logPath: String) throws {
        self.logPath = logPath
        if !FileManager.default.fileExists(atPath: logPath) { _ = FileManager.default.createFile(atPath: logPath, contents: nil) }
        let log = try #require(FileHandle(forWritingAtPath: logPath))
        try log.seekToEnd()
        let words = wrapper + [Program.path] + arguments
        process.executableURL = URL(fileURLWithPath: words[0])
        process.arguments = Array(words.dropFirst())
        process.environment = ProcessInfo.processInfo.environment.merging(environment) { $1 }
        process.standardOutput = log
        process.standardError = log
        process.standardInput = FileHandle.nullDevice
        try process.run()
    }

    deinit { end(SIGKILL) }

    func end(_ signal: Int32) {
        guard process.isRunning else { return }
        kill(process.processIdentifier, signal)
        process.waitUntilExit()
    }

    var log: String { (try? String(contentsOfFile: logPath, encoding: .utf8)) ?? "" }
}

/// Asks until the answer is yes. Throws after so many questions as fit into the limit: other tests may keep this one from asking for
/// longer than that.
func until(_ what: String, seconds: Double = 60, _ condition: () async throws -> Bool) async throws {
    var questions = Int(seconds * 20)
    while !(try await condition()) {
        questions -= 1
        try #require(questions > 0, "waited \(seconds) s for \(what)")
        try await Task.sleep(for: .milliseconds(50))
    }
}

/// Both sites on this computer: a disk (a file), an agent that serves it, an appliance; an operator's commands.
final class TwoSites {
    let directory: TemporaryDirectory
    private(set) var appliance: Daemon?
    private(set) var agent: Daemon?
    /// In rescue mode, with the same disk.
    private(set) var rescue: Daemon?
    let server = "shop"

    init() throws {
        directory = try TemporaryDirectory()
        _ = FileManager.default.createFile(atPath: disk, contents: nil)
        guard truncate(disk, 8 << 20) == 0 else { throw ApplianceError.failed("cannot make \(disk)") }
    }

    deinit {
        agent?.end(SIGKILL)
        rescue?.end(SIGKILL)
        appliance?.end(SIGKILL)
        // Machines survive their appliance; a test that failed leaves them to us.
        for id in (try? FileManager.default.contentsOfDirectory(atPath: state + "/instances")) ?? [] {
            if let process = QEMUProcess.find(name: "afterimage-\(id)") { kill(process.pid, SIGKILL) }
        }
    }

    var disk: String { directory.path + "/disk.img" }
    var state: String { directory.path + "/a" }
    var runtime: String { directory.path + "/r" }
    var profile: String { state + "/client.json" }
    var tapSocket: String { directory.path + "/t/vda.sock" }

    func applianceArguments(qemu: String? = TestQEMU.path) -> [String] {
        ["appliance", "--state", state, "--runtime-dir", runtime, "--listen", "127.0.0.1:\(apiPort)", "--link", "127.0.0.1:\(linkPort)",
         "--qemu", qemu ?? "/nonexistent", "--accel", "tcg"]
    }
    // Fixed once taken, since the agent keeps the link's port. Below the range that the system hands out, and nobody else's in this process.
    private let apiPort = TwoSites.freePorts()
    private static let nextPort = Atomic(Int.random(in: 0..<6000))
    private static func freePorts() -> UInt16 {
        while true {
            let port = UInt16(20_000 + nextPort.wrappingAdd(1, ordering: .relaxed).newValue % 6000 * 2)
            if isFree(port), isFree(port + 1) { return port }
        }
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
    private var linkPort: UInt16 { apiPort + 1 }

    func startAppliance(qemu: String? = TestQEMU.path, options: [String] = [], environment: [String: String] = [:], wrapper: [String] = []) async throws {
        let daemon = try Daemon(applianceArguments(qemu: qemu) + options, environment: environment, wrapper: wrapper, logPath: directory.path + "/appliance.log")
        appliance = daemon
        try await until("the appliance to answer") {
            try #require(daemon.process.isRunning, "the appliance ended: \(daemon.log.suffix(2000))")
            return try await cli("status").code == 0
        }
    }

    func endAppliance(_ signal: Int32) {
        appliance?.end(signal)
        appliance = nil
    }

    func startAgent() throws {
        agent = try Daemon(
            ["agent", "run", "--tap", "nbd", "--state", directory.path + "/g", "--socket-dir", directory.path + "/t", "--disk", "vda=\(disk)"],
            logPath: directory.path + "/agent.log")
    }

    func endAgent(_ signal: Int32) {
        agent?.end(signal)
        agent = nil
    }

    func startRescue() throws {
        rescue = try Daemon(["agent", "rescue", "--state", directory.path + "/rescue", "--disk", "vda=\(disk)"], logPath: directory.path + "/rescue.log")
    }

    func endRescue(_ signal: Int32) {
        rescue?.end(signal)
        rescue = nil
    }

    @discardableResult
    func cli(_ words: String...) async throws -> Program.Outcome {
        try await Program.run(words.flatMap { $0.split(separator: " ").map(String.init) }, environment: ["AFTERIMAGE_PROFILE": profile])
    }

    /// Succeeds, and gives the JSON.
    func json<T: Decodable>(_ type: T.Type, _ words: String...) async throws -> T {
        let outcome = try await Program.run(
            words.flatMap { $0.split(separator: " ").map(String.init) } + ["--json"], environment: ["AFTERIMAGE_PROFILE": profile])
        try #require(outcome.code == 0, "\(words): \(outcome.errors) \(outcome.output)")
        return try APIJSON.decoder().decode(type, from: Data(outcome.output.utf8))
    }

    func view() async throws -> ServerView { try await json(ServerView.self, "server show \(server)") }

    /// Appliance, agent, pair, server, enrolment, replication with the first recovery point there.
    func protect() async throws {
        try await startAppliance()
        try startAgent()
        try await until("the tap's socket") { FileManager.default.fileExists(atPath: tapSocket) }
        try await write(version: 1)
        #expect(try await cli("site-pair create pair").code == 0)
        let token = try #require(try await json([EnrolledServer].self, "server add \(server) --pair pair").first).token
        let enrolled = try await cli("agent enroll --token \(token) --state \(directory.path)/g")
        try #require(enrolled.code == 0, "\(enrolled.errors)")
        try await until("Initialized") { try await view().state == .initialized }
        let started = try await cli("replication start \(server) --epoch-ms 200 --cpus 1 --memory 64 --wait")
        try #require(started.code == 0, "\(started.errors)")
        #expect(try await view().state == .replicating)
    }
    struct EnrolledServer: Decodable { var token: String }

    /// Writes boot code that says VERSION n through the tap.
    func write(version: Int, panics: Bool = false) async throws {
        let file = directory.path + "/boot-\(version)"
        try BootSector.image("VERSION \(version) RUNS", panics: panics).write(to: URL(fileURLWithPath: file))
        let outcome = try await Program.run(Program.qemuIO, ["-f", "raw", "-c", "write -f -s \(file) 0 4096", "nbd+unix:///vda?socket=\(tapSocket)"])
        try #require(outcome.code == 0, "\(outcome.errors) \(outcome.output)")
    }

    /// The first recovery point that holds everything written before this call.
    func point() async throws -> String {
        let now = UInt64(Date().timeIntervalSince1970 * 1e9)
        var found: String?
        try await until("a recovery point") {
            found = try await json([Point].self, "recovery-point list \(server)").first { $0.cutTimeNanoseconds > now }?.id
            return found != nil
        }
        return try #require(found)
    }
    struct Point: Decodable {
        var id: String
        var cutTimeNanoseconds: UInt64
        var note: String?
        var hold: String?
    }

    /// Nothing of any machine is left: processes, forks' sockets, files.
    func expectNoMachines() throws {
        #expect(try FileManager.default.contentsOfDirectory(atPath: state + "/instances") == [])
        #expect(try FileManager.default.contentsOfDirectory(atPath: runtime) == [])
    }
}

/// A boot sector that writes a line to the first serial port and halts: a machine that boots in a second.
enum BootSector {
    /// `panics`: it tells QEMU that its kernel panics, as pvpanic has it, after the line.
    static func image(_ line: String, panics: Bool = false) -> Data {
        // cli; xor ax,ax; mov ds,ax; mov si,text; next: lodsb; test al,al; jz done; mov ah,al; mov dx,3fd; wait: in al,dx;
        // test al,20; jz wait; mov al,ah; mov dx,3f8; out dx,al; jmp next; done: hlt; jmp done; text:
        var code: [UInt8] = [
            0xFA, 0x31, 0xC0, 0x8E, 0xD8, 0xBE, 0x22, 0x7C, 0xAC, 0x84, 0xC0, 0x74, 0x12, 0x88, 0xC4, 0xBA, 0xFD, 0x03, 0xEC, 0xA8, 0x20, 0x74, 0xFB,
            0x88, 0xE0, 0xBA, 0xF8, 0x03, 0xEE, 0xEB, 0xE9, 0xF4, 0xEB, 0xFD,
        ]
        precondition(code.count == 0x22)
        if panics {
            // mov dx,505; mov al,1; out dx,al: where done was; the text is so much later.
            code.insert(contentsOf: [0xBA, 0x05, 0x05, 0xB0, 0x01, 0xEE], at: 0x1F)
            code[6] += 6
        }
        var sector = Data(code + Array("\(line)\r\n".utf8) + [0])
        sector.append(Data(count: 510 - sector.count))
        sector.append(contentsOf: [0x55, 0xAA])
        return sector + Data(count: 4096 - 512)
    }
}

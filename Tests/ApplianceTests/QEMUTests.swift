import Foundation
import NIOCore
import NIOPosix
import Testing

@testable import Appliance

/// The QEMU that tests use: AFTERIMAGE_QEMU, the cache of tools/, or the system's.
enum TestQEMU {
    static let path: String? = {
        let cache = ProcessInfo.processInfo.environment["AFTERIMAGE_CACHE"] ?? "/var/cache/afterimage"
        let places = [ProcessInfo.processInfo.environment["AFTERIMAGE_QEMU"], cache + "/qemu/bin/qemu-system-x86_64", "/usr/bin/qemu-system-x86_64"]
        return places.compactMap { $0 }.first { FileManager.default.isExecutableFile(atPath: $0) }
    }()
    static let missing: Comment = "needs QEMU: none at AFTERIMAGE_QEMU, in the cache of tools/, or at /usr/bin/qemu-system-x86_64"
}

@Suite("QEMU and QMP")
struct QEMUTests {
    @Test("starts in a session of its own, is found by name, answers QMP, ends on quit", .enabled(if: TestQEMU.path != nil, TestQEMU.missing))
    func control() async throws {
        let directory = try TemporaryDirectory()
        let name = "afterimage-test-\(UInt32.random(in: 0...UInt32.max))"
        let socket = directory.path + "/qmp.sock"
        let process = try QEMUProcess.spawn(
            executable: try #require(TestQEMU.path),
            arguments: ["-name", name, "-nodefaults", "-no-user-config", "-display", "none", "-machine", "none", "-qmp", "unix:\(socket),server=on,wait=off"],
            logPath: directory.path + "/qemu.log")
        defer { if process.isAlive { kill(process.pid, SIGKILL) } }
        #expect(getsid(process.pid) == process.pid)
        let client = try await connect(socket, while: process)
        #expect(QEMUProcess.find(name: name) == process)
        #expect(try await client.runState() == "running")
        await #expect(throws: QMPError.self) { try await client.execute("no-such-command") }
        try await client.execute("stop")
        #expect(try await client.runState() == "paused")
        try await client.execute("quit")
        var names: [String] = []
        for await event in client.events { names.append(event.name) }
        #expect(names.contains("STOP") && names.contains("SHUTDOWN"))
        #expect(await process.waitForEnd(seconds: 10))
        #expect(QEMUProcess.find(name: name) == nil)
        await #expect(throws: QMPError.self) { try await client.execute("query-status") }
    }

    @Test("terminate ends a QEMU that does not listen", .enabled(if: TestQEMU.path != nil, TestQEMU.missing))
    func terminate() async throws {
        let directory = try TemporaryDirectory()
        let name = "afterimage-test-\(UInt32.random(in: 0...UInt32.max))"
        let process = try QEMUProcess.spawn(
            executable: try #require(TestQEMU.path), arguments: ["-name", name, "-nodefaults", "-display", "none", "-machine", "none"],
            logPath: directory.path + "/qemu.log")
        kill(process.pid, SIGSTOP)
        await process.terminate(graceSeconds: 0.1)
        #expect(!process.isAlive)
    }

    @Test("garbage instead of QMP is an error, not a wait")
    func garbage() async throws {
        let directory = try TemporaryDirectory()
        let socket = directory.path + "/s"
        let listener = try await ServerBootstrap(group: MultiThreadedEventLoopGroup.singleton)
            .childChannelInitializer { channel in
                channel.eventLoop.makeCompletedFuture { try channel.pipeline.syncOperations.addHandler(Greeter()) }
            }.bind(unixDomainSocketPath: socket).get()
        await #expect(throws: QMPError.self) { _ = try await QMPClient.connect(path: socket) }
        await #expect(throws: QMPError.self) { _ = try await QMPClient.connect(path: directory.path + "/missing") }
        try await listener.close()
    }

    private final class Greeter: ChannelInboundHandler {
        typealias InboundIn = ByteBuffer
        func channelActive(context: ChannelHandlerContext) {
            context.writeAndFlush(NIOAny(ByteBuffer(string: "hello, I am no QEMU\n")), promise: nil)
        }
    }

    private func connect(_ socket: String, while process: QEMUProcess) async throws -> QMPClient {
        while true {
            do { return try await QMPClient.connect(path: socket) } catch {
                try #require(process.isAlive, "QEMU ended")
                await Task.yield()
            }
        }
    }

    @Test("the version decides on the warning")
    func version() {
        #expect(QEMUVersion(parsing: "QEMU emulator version 7.2.22 (Debian 1:7.2)")?.warning(.tcg) != nil)
        #expect(QEMUVersion(parsing: "QEMU emulator version 7.2.22 (Debian 1:7.2)")?.warning(.kvm) == nil)
        #expect(QEMUVersion(parsing: "QEMU emulator version 10.0.2")?.warning(.tcg) == nil)
        #expect(QEMUVersion(parsing: "bash 5") == nil)
    }

    @Test("the command line says what was asked for")
    func commandLine() {
        let command = QEMUCommand(
            name: "afterimage-drill-1", machine: MachineSettings(cpus: 3, memoryMiB: 256, network: .isolated, forwards: [], bootCheck: .running, bootSecondsMax: 1),
            accelerator: .tcg, dataDirectories: ["/d"], nbdSocketPath: "/r/a,b/nbd.sock", exports: ["vda", "vdb"], qmpSocketPath: "/r/a,b/q",
            consolePath: "/c", vncSocketPath: "/v", agentSocketPath: "/a")
        let words = command.arguments
        #expect(words.contains("user,id=net0,restrict=on") && words.contains("qemu64,+rdrand") && words.contains("unix:/r/a,,b/q,server=on,wait=off"))
        #expect(words.filter { $0.hasPrefix("virtio-blk-pci") }.count == 2 && words.contains { $0.contains(#""export":"vdb""#) && $0.contains("/r/a,b/nbd.sock") })
        var forwarding = command
        forwarding.machine.network = .user
        forwarding.machine.forwards = [PortForward(hostPort: 2222, guestPort: 22)]
        #expect(forwarding.arguments.contains("user,id=net0,hostfwd=tcp:127.0.0.1:2222-:22"))
        forwarding.machine.forwards = [PortForward(address: "192.0.2.7", hostPort: 80, guestPort: 8080)]
        #expect(forwarding.arguments.contains("user,id=net0,hostfwd=tcp:192.0.2.7:80-:8080"))
        forwarding.machine.network = .none
        #expect(!forwarding.arguments.contains("-netdev"))
    }
}

@Suite("Boot check")
struct BootCheckTests {
    @Test("finds a line that arrives in pieces, without control sequences, and a prompt without an end")
    func follow() throws {
        let directory = try TemporaryDirectory()
        let path = directory.path + "/console.log"
        var follower = try SerialFollower(path: path, pattern: "READY n=[0-9]+$")
        #expect(try follower.poll() == nil)
        _ = FileManager.default.createFile(atPath: path, contents: Data("boot\r\n\u{1b}[1mREADY".utf8))
        #expect(try follower.poll() == nil)
        let file = try #require(FileHandle(forWritingAtPath: path))
        try file.seekToEnd()
        try file.write(contentsOf: Data(" n=12\u{1b}[0m\r\nmore\n".utf8))
        #expect(try follower.poll() == "READY n=12")
        #expect(follower.tail == ["boot", "READY n=12"])
        var prompt = try SerialFollower(path: path, pattern: "login:")
        try file.write(contentsOf: Data("host login: ".utf8))
        #expect(try prompt.poll() == "host login:")
    }

    @Test("boot checks in words", arguments: [("none", true), ("serial:x", true), ("serial:", false), ("serial:(", false), ("ping", false), ("agent", true), ("tcp:22", true), ("tcp:0", false), ("tcp:65536", false), ("script:/x", true), ("script:x", false)])
    func words(text: String, isGood: Bool) throws {
        if isGood { #expect(try BootCheck(text: text).text == text) } else { #expect(throws: ApplianceError.self) { try BootCheck(text: text) } }
    }
}

import BlockTap
import Foundation
import Logging
import Replica
import Synchronization
import Testing

@testable import Appliance

/// The appliance's commands at a real tap, over a real link.
@Suite struct AgentReplicationTests {
    @Test func aChangedOrderGoesOnWithoutAFullSync() async throws {
        try await withBench { bench in
            await bench.replication.carryOut(.startReplication(bench.order(epochMilliseconds: 20)))
            try await bench.morePoints()
            for (milliseconds, throttle) in [(30, 0), (30, 50_000_000)] as [(UInt32, UInt64)] {
                await bench.replication.carryOut(.startReplication(bench.order(epochMilliseconds: milliseconds, throttle: throttle)))
                try await bench.morePoints()
            }
            #expect(bench.lines.withLock { $0.filter { $0.contains("full sync") }.count } == 1)
            #expect(bench.lines.withLock { $0.filter { $0.contains("starts, ") }.count } == 1, "the stream goes on")
        }
    }

    @Test func aThrottleWindowIsInForceAtOnceAndWithoutInterruption() async throws {
        try await withBench { bench in
            var order = bench.order(epochMilliseconds: 20)
            await bench.replication.carryOut(.startReplication(order))
            try await bench.morePoints()
            #expect(await bench.replication.status().throttleBytesPerSecond == 0)
            // Of all day, whatever the time is.
            order.throttleWindows = [ThrottleWindow(startMinute: 0, endMinute: 1440, bytesPerSecond: 5_000_000)]
            order.compression = .always
            await bench.replication.carryOut(.startReplication(order))
            for _ in 0..<5000 where await bench.replication.status().throttleBytesPerSecond != 5_000_000 { try await Task.sleep(for: .milliseconds(2)) }
            #expect(await bench.replication.status().throttleBytesPerSecond == 5_000_000)
            try await bench.morePoints()
            order.throttleWindows = []
            await bench.replication.carryOut(.startReplication(order))
            for _ in 0..<5000 where await bench.replication.status().throttleBytesPerSecond != 0 { try await Task.sleep(for: .milliseconds(2)) }
            try await bench.morePoints()
            #expect(bench.lines.withLock { $0.filter { $0.contains("starts, ") }.count } == 1)
        }
    }

    /// One that was on its way when the source was fenced must not let go of the writes that the failover counts on.
    @Test func anOrderFromBeforeAFenceComesTooLate() async throws {
        try await withBench { bench in
            await bench.replication.carryOut(.startReplication(bench.order(epochMilliseconds: 20)))
            try await bench.morePoints()
            await bench.replication.carryOut(.holdWrites(HoldOrder(id: "move", seconds: 3600)))
            for _ in 0..<5000 where await bench.replication.status().hold?.isQuiet != true { try await Task.sleep(for: .milliseconds(2)) }
            #expect(try bench.store.raiseGeneration(GroupID(bench.id.rawValue)) == Generation(2))
            await bench.replication.carryOut(.fenced(Generation(2)))
            await bench.replication.carryOut(.startReplication(bench.order(epochMilliseconds: 30)))
            let held = await bench.replication.status()
            #expect(held.hold?.isFinal == true && held.phase != .replicating, "\(held)")
            // The failover was rolled back.
            var order = bench.order(epochMilliseconds: 30)
            order.generation = Generation(2)
            await bench.replication.carryOut(.startReplication(order))
            #expect(await bench.replication.status().hold == nil)
            try await bench.morePoints()
        }
    }

    @Test func theSameOrderRestartsWhatMayNotRestartByItself() async throws {
        try await withBench { bench in
            let order = bench.order(epochMilliseconds: 20, automaticRestart: false)
            await bench.replication.carryOut(.startReplication(order))
            try await bench.morePoints()
            await bench.server.endReplication(of: GroupID(bench.id.rawValue), reason: "interrupted by the test")
            for _ in 0..<5000 where await bench.replication.status().phase != .interrupted { try await Task.sleep(for: .milliseconds(2)) }
            await bench.replication.carryOut(.startReplication(order))
            try await bench.morePoints()
        }
    }

    private func withBench(_ body: (Bench) async throws -> Void) async throws {
        let bench = try await Bench.make()
        let result: Result<Void, any Error>
        do { result = .success(try await body(bench)) } catch { result = .failure(error) }
        await bench.replication.stop()
        await bench.server.stop()
        bench.store.close()
        bench.loop.shutdown()
        try FileManager.default.removeItem(at: bench.directory)
        try result.get()
    }

    private final class Bench {
        let id = ServerID("web-1")
        let directory: URL
        let store: ReplicaStore
        let server: LinkServer
        let loop: EventLoop
        let replication: AgentReplication
        let lines: LogLines
        private let policy: Permissive

        private init(directory: URL, store: ReplicaStore, server: LinkServer, loop: EventLoop, replication: AgentReplication, lines: LogLines, policy: Permissive) {
            self.directory = directory
            self.store = store
            self.server = server
            self.loop = loop
            self.replication = replication
            self.lines = lines
            self.policy = policy
        }

        static func make() async throws -> Bench {
            let id = ServerID("web-1")
            let lines = LogLines()
            let policy = Permissive()
            let directory = FileManager.default.temporaryDirectory.appendingPathComponent("afterimage-agent-\(UUID().uuidString)")
            try FileManager.default.createDirectory(at: directory, withIntermediateDirectories: true)
            let disk = directory.appendingPathComponent("disk").path
            try Data(count: 1 << 20).write(to: URL(fileURLWithPath: disk))
            let logger = lines.logger
            let store = try ReplicaStore.open(directory: directory.appendingPathComponent("store").path, logger: logger)
            let authority = try CertificateAuthority.create(directory: directory.appendingPathComponent("ca").path)
            let server = LinkServer(
                store: store, identity: try authority.issueServer(hosts: ["127.0.0.1"]), caCertificatePEM: authority.certificatePEM, host: "127.0.0.1",
                port: 0, delegate: policy, logger: logger)
            let port = try await server.start()
            let agent = try AgentIdentity.makeKeyAndCSR(name: id.rawValue)
            let issued = try authority.issueClient(csrPEM: agent.csrPEM, server: id)
            let device = try BlockDevice.open(path: disk, access: .readWrite, exclusive: true)
            let loop = try EventLoop(name: "tap")
            let group = await TapGroup(loop: loop, disks: [(name: "root", device: device)], instance: UUID().uuidString)
            let replication = AgentReplication(
                tap: PlainTap(source: group),
                endpoint: LinkEndpoint(
                    host: "127.0.0.1", port: port, identity: TLSIdentity(certificatePEM: issued.certificatePEM, keyPEM: agent.keyPEM),
                    caCertificatePEM: authority.certificatePEM),
                logger: logger)
            return Bench(directory: directory, store: store, server: server, loop: loop, replication: replication, lines: lines, policy: policy)
        }

        func order(epochMilliseconds: UInt32, throttle: UInt64 = 0, automaticRestart: Bool = true) -> ReplicationOrder {
            ReplicationOrder(
                group: GroupID(id.rawValue), generation: Generation(1), disks: ["root"], epochMilliseconds: epochMilliseconds,
                throttleBytesPerSecond: throttle, automaticRestart: automaticRestart)
        }

        func morePoints() async throws {
            // Long: only so that what will never come does not hang the tests.
            let limit = ContinuousClock.now + .seconds(120)
            let before = store.recoveryPoints(GroupID(id.rawValue)).count
            while store.recoveryPoints(GroupID(id.rawValue)).count < before + 2 {
                let status = await replication.status()
                try #require(ContinuousClock.now < limit, "no new recovery point: \(status)")
                try await Task.sleep(for: .milliseconds(2))
            }
        }
    }

    private struct PlainTap: AgentTap {
        let source: any EpochSource
        let base = ReplicationBase()
        var hello: AgentHello { AgentHello(agentVersion: "test", hostName: "test", kernel: "", instance: source.instance, disks: []) }
        let canHoldWrites = true
        func holdWrites(_ id: String) async -> [String] { [] }
        func stop() async {}
    }

    private final class Permissive: LinkServerDelegate {
        func authorize(_ server: ServerID, certificateSerial: String) async -> Bool { true }
        func agentConnected(_ server: ServerID, _ hello: AgentHello) async -> [AgentCommand] { [] }
        func agentDisconnected(_ server: ServerID) async {}
        func agentStatus(_ server: ServerID, _ status: AgentStatus) async {}
        func mayReplicate(_ server: ServerID, group: GroupID, generation: Generation) async -> Bool { true }
    }
}

/// Keeps what is logged.
private final class LogLines: Sendable {
    private let lines = Mutex<[String]>([])
    func withLock<T>(_ body: (inout [String]) -> T) -> T where T: Sendable { lines.withLock { body(&$0) } }
    var logger: Logger { Logger(label: "test") { _ in Handler(lines: self) } }

    private struct Handler: LogHandler {
        let lines: LogLines
        var metadata: Logger.Metadata = [:]
        var logLevel = Logger.Level.info
        subscript(metadataKey key: String) -> Logger.Metadata.Value? {
            get { metadata[key] }
            set { metadata[key] = newValue }
        }
        func log(event: LogEvent) { lines.withLock { $0.append("\(event.message)") } }
    }
}

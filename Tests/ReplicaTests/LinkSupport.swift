import BlockTap
import Foundation
import Logging
import NIOCore
import NIOPosix
import Synchronization
import Testing

@testable import Replica

/// A directory for one test, removed with it.
final class ScratchDirectory: Sendable {
    let path: String
    init() {
        path = FileManager.default.temporaryDirectory.appendingPathComponent("afterimage-link-\(UUID().uuidString)").path
        try! FileManager.default.createDirectory(atPath: path, withIntermediateDirectories: true)
    }
    deinit { try? FileManager.default.removeItem(atPath: path) }
}

/// Keeps log lines, so that tests can ask whether a refusal said why.
final class LogCapture: Sendable {
    private let lines = Mutex<[String]>([])
    var text: String { lines.withLock { $0.joined(separator: "\n") } }
    var logger: Logger {
        Logger(label: "test") { _ in Handler(capture: self) }
    }

    private struct Handler: LogHandler {
        let capture: LogCapture
        var metadata: Logger.Metadata = [:]
        var logLevel = Logger.Level.debug
        subscript(metadataKey key: String) -> Logger.Metadata.Value? {
            get { metadata[key] }
            set { metadata[key] = newValue }
        }
        func log(event: LogEvent) {
            capture.lines.withLock { $0.append("\(event.level) \(event.message) \(metadata)") }
        }
    }
}

/// Waits for a condition that has no event to wait for. The limit is generous, and of questions: other tests may have all processors.
func eventually(_ what: String, within seconds: Double = 120, _ condition: () async -> Bool) async throws {
    var questions = Int(seconds * 500)
    while !(await condition()) {
        questions -= 1
        guard questions > 0 else {
            Issue.record("\(what) did not happen within \(seconds) s")
            throw CancellationError()
        }
        try await Task.sleep(for: .milliseconds(2))
    }
}

/// What the appliance's catalogue would decide.
final class TestPolicy: LinkServerDelegate {
    struct State {
        var removed: Set<ServerID> = []
        var replicates = true
        var commands: [AgentCommand] = []
        /// Runs while a hello is being answered.
        var beforeAnswer: (@Sendable () async -> Void)?
        var hellos: [AgentHello] = []
        var statuses: [AgentStatus] = []
        var disconnects = 0
    }

    private let state = Mutex(State())
    func withLock<T: Sendable>(_ body: (inout sending State) -> sending T) -> T { state.withLock(body) }

    func authorize(_ server: ServerID, certificateSerial: String) async -> Bool {
        state.withLock { !$0.removed.contains(server) }
    }
    func agentConnected(_ server: ServerID, _ hello: AgentHello) async -> [AgentCommand] {
        await state.withLock { $0.beforeAnswer }?()
        return state.withLock { state in
            state.hellos.append(hello)
            return state.commands
        }
    }
    func agentDisconnected(_ server: ServerID) async { state.withLock { $0.disconnects += 1 } }
    func agentStatus(_ server: ServerID, _ status: AgentStatus) async { state.withLock { $0.statuses.append(status) } }
    func mayReplicate(_ server: ServerID, group: GroupID, generation: Generation) async -> Bool {
        state.withLock { $0.replicates }
    }
}

/// An appliance's link with its own CA and store, and what agents need to talk to it.
final class TestAppliance: Sendable {
    let directory = ScratchDirectory()
    let log = LogCapture()
    let authority: CertificateAuthority
    let store: ReplicaStore
    let policy = TestPolicy()
    private let serverSlot = Mutex<LinkServer?>(nil)
    private let portSlot = Mutex(0)
    let timing: LinkTiming

    static var quick: LinkTiming {
        var timing = LinkTiming()
        timing.retryFirst = .milliseconds(1)
        timing.retryLast = .milliseconds(20)
        timing.alive = .milliseconds(50)
        timing.silence = .seconds(60)
        timing.greeting = .seconds(60)
        timing.repair = .milliseconds(5)
        return timing
    }

    init(timing: LinkTiming = TestAppliance.quick, options: StoreOptions = StoreOptions(), storage: (any Storage)? = nil) throws {
        self.timing = timing
        authority = try CertificateAuthority.create(directory: directory.path + "/ca")
        store = try ReplicaStore(
            storage: storage ?? FileStorage(directory: directory.path + "/store"), options: options, logger: log.logger)
    }

    var server: LinkServer { serverSlot.withLock { $0! } }
    var port: Int { portSlot.withLock { $0 } }

    /// On the same port each time, below the range that the system hands out: somebody's connection could have it at the next start.
    func start(_ other: LinkTiming? = nil) async throws {
        let identity = try authority.issueServer(hosts: ["127.0.0.1"])
        for attempt in 1... {
            let port = port == 0 ? Int.random(in: 20000..<32000) : port
            let server = LinkServer(
                store: store, identity: identity, caCertificatePEM: authority.certificatePEM,
                host: "127.0.0.1", port: port, delegate: policy, logger: log.logger, timing: other ?? timing)
            do { _ = try await server.start() } catch {
                guard self.port == 0, attempt < 20 else { throw error }
                continue
            }
            serverSlot.withLock { $0 = server }
            portSlot.withLock { $0 = port }
            return
        }
    }

    func stop() async {
        await server.stop()
        store.close()
    }

    func endpoint(server: ServerID = ServerID("web-1"), port: Int? = nil, authority other: CertificateAuthority? = nil) throws -> LinkEndpoint {
        let agent = try AgentIdentity.makeKeyAndCSR(name: server.rawValue)
        let issued = try (other ?? authority).issueClient(csrPEM: agent.csrPEM, server: server)
        return LinkEndpoint(
            host: "127.0.0.1", port: port ?? self.port,
            identity: TLSIdentity(certificatePEM: issued.certificatePEM, keyPEM: agent.keyPEM),
            caCertificatePEM: authority.certificatePEM)
    }

    func sender(
        _ source: any EpochSource, endpoint: LinkEndpoint? = nil, generation: Generation = Generation(1), epochMilliseconds: UInt32 = 5,
        throttle: UInt64 = 0, automaticRestart: Bool = true, base: ReplicationBase = ReplicationBase(), timing: LinkTiming? = nil
    ) throws -> Sender {
        let order = ReplicationOrder(
            group: Self.group, generation: generation, disks: source.disks.map(\.name), epochMilliseconds: epochMilliseconds,
            throttleBytesPerSecond: throttle, automaticRestart: automaticRestart)
        return Sender(
            source: source, endpoint: try endpoint ?? self.endpoint(), order: order, logger: log.logger, base: base,
            timing: timing ?? self.timing)
    }

    static let group = GroupID("web-1")

    /// Every recovery point in the store equals the source's disks at its cut; returns how many there are.
    func checkRecoveryPoints(_ source: ModelSource, _ comment: Comment? = nil) throws -> Int {
        let points = store.recoveryPoints(Self.group).filter { $0.instance == source.instance }
        let snapshots = source.exactSnapshots
        for point in points {
            let expected = try #require(snapshots[point.epoch], "\(point.epoch) was never cut exactly")
            for (volume, bytes) in expected.enumerated() {
                let reader = try store.openRecoveryPoint(Self.group, point.id, volume: volume)
                var actual = [UInt8](repeating: 0xEE, count: bytes.count)
                try actual.withUnsafeMutableBytes { try reader.read(offsetBytes: 0, into: $0) }
                if memcmp(actual, bytes, bytes.count) == 0 { continue }
                let difference = zip(actual, bytes).enumerated().first { $1.0 != $1.1 }?.offset
                Issue.record("\(point.epoch), disk \(volume) differs at byte \(difference ?? 0). \(comment?.rawValue ?? "")")
            }
        }
        return points.count
    }
}

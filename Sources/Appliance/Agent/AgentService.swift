import BlockTap
import Foundation
import Logging
import Replica
import ServiceLifecycle

/// The agent: has the disks behind their taps from its first moment, enrolled or not, connected or not; and carries their
/// epochs to the appliance when that asks for it. Nothing that happens on the link reaches whoever writes to the disks.
public struct AgentService: Service {
    let configuration: AgentConfiguration
    let logger: Logger

    public init(configuration: AgentConfiguration, logger: Logger) {
        self.configuration = configuration
        self.logger = logger
    }

    /// Runs until cancelled or told to shut down gracefully.
    public func run() async throws {
        let state = try AgentState(directory: configuration.stateDirectory)
        let tap = try await configuration.open(state, logger: logger)
        do {
            try await replicate(state, tap)
        } catch is CancellationError {
        }
        await tap.stop()
    }

    private func replicate(_ state: AgentState, _ tap: any AgentTap) async throws {
        try await cancelWhenGracefulShutdown {
            let (endpoint, serverName) = try await enrolment(state)
            logger.info("server \(serverName) replicates to \(endpoint.host):\(endpoint.port)")
            let replication = AgentReplication(tap: tap, endpoint: endpoint, logger: logger)
            let hello = tap.hello
            let control = AgentControlClient(
                endpoint: endpoint, hello: { hello }, status: { await replication.status() }, onCommand: { await replication.carryOut($0) }, logger: logger)
            control.start()
            // Until cancelled.
            try? await Task.sleep(for: .seconds(UInt32.max))
            await control.stop()
            await replication.stop()
        }
    }

    /// Waits for `afterimage agent enroll`, which may be run while the agent already serves.
    private func enrolment(_ state: AgentState) async throws -> (endpoint: LinkEndpoint, serverName: String) {
        var hasSaid = false
        while true {
            if let enrolment = try state.enrolment() { return enrolment }
            if !hasSaid {
                logger.notice("not enrolled yet: the disks are not replicated; run the command that `afterimage server add` prints")
                hasSaid = true
            }
            try await Task.sleep(for: .milliseconds(300))
        }
    }
}

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
        var ending = Ending.tapOutdated
        while ending == .tapOutdated {
            let tap = try await configuration.open(state, logger: logger)
            do {
                ending = try await replicate(state, tap)
            } catch is CancellationError {
                ending = .stopped
            }
            await tap.stop()
        }
    }

    private enum Ending: Sendable { case stopped, tapOutdated }

    private func replicate(_ state: AgentState, _ tap: any AgentTap) async throws -> Ending {
        try await cancelWhenGracefulShutdown {
            try await withThrowingTaskGroup(of: Ending.self) { group in
                group.addTask {
                    await tap.untilOutdated()
                    return Task.isCancelled ? .stopped : .tapOutdated
                }
                group.addTask { try await self.carry(state, tap) }
                defer { group.cancelAll() }
                return try await group.next() ?? .stopped
            }
        }
    }

    /// Until cancelled, or told to open the disks again.
    private func carry(_ state: AgentState, _ tap: any AgentTap) async throws -> Ending {
        let (endpoint, serverName) = try await enrolment(state)
        logger.info("server \(serverName) replicates to \(endpoint.host):\(endpoint.port)")
        while !Task.isCancelled {
            let replication: any CommandedReplication =
                if let disks = tap as? RescueDisks { RescueReplication(disks: disks, endpoint: endpoint, logger: logger) } else {
                    AgentReplication(tap: tap, endpoint: endpoint, logger: logger)
                }
            let hello = tap.hello
            let (restarts, restart) = AsyncStream.makeStream(of: Void.self, bufferingPolicy: .bufferingNewest(1))
            let control = AgentControlClient(
                endpoint: endpoint, hello: { hello }, status: { await replication.status() },
                onCommand: { command in
                    switch command {
                    case .restart: restart.yield()
                    case .keepConfiguration(let text):
                        await replication.unlessHeld("configuration") {
                            do { try state.keepConfiguration(text) } catch { logger.error("cannot keep the appliance's configuration: \(error)") }
                        }
                    case .followDisks(let disks):
                        await replication.unlessHeld("disks") {
                            do {
                                try state.addDisks(disks)
                                logger.notice("the appliance asks to follow \(disks.map { "\($0.name) (\($0.path))" }.joined(separator: ", ")), too")
                                restart.yield()
                            } catch { logger.error("cannot write down which disks are to be followed, too: \(error)") }
                        }
                    default: await replication.carryOut(command)
                    }
                }, logger: logger)
            control.start()
            for await _ in restarts {
                logger.notice("the appliance asks to begin anew")
                break
            }
            await control.stop()
            await replication.shutDown()
            if tap.mayReopen { return Task.isCancelled ? .stopped : .tapOutdated }
        }
        return .stopped
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

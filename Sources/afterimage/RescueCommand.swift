import Appliance
import ArgumentParser
import Foundation
import Logging

extension AgentCommand {
    struct Rescue: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Hold the original disks of a server that was failed over, to be brought up to what runs at the appliance.",
            discussion: """
                Rescue mode: on the original machine, booted from other media, or wherever its disks are attached. The disks are claimed, and refused when they are \
                mounted or held. Nothing is written before an operator confirms each by its serial (afterimage reverse start). Enrol it with the token of \
                afterimage reverse register first, into a state directory of its own.
                """)
        @Option(help: "State directory: enrolment.") var state: String = "/var/lib/afterimage/rescue"
        @Option(help: ArgumentHelp("State directory of the agent that followed these disks on this machine, and has ended: what its live tap knows need not be found by comparing.", valueName: "directory"))
        var followedBy: String = "/var/lib/afterimage/agent"
        @Option(help: ArgumentHelp("A disk to bring back; repeat it, all disks of the server in their order.", valueName: "name=device")) var disk: [String]
        @Option(help: "trace, debug, info, notice, warning or error.") var logLevel: Logger.Level = .info

        func agentConfiguration() throws -> AgentConfiguration {
            var configuration = AgentConfiguration(stateDirectory: absolute(state), tapKind: .nbd, socketDirectory: "", disks: try AgentCommand.disks(disk))
            configuration.isRescue = true
            configuration.followerStateDirectory = absolute(followedBy)
            return configuration
        }

        func validate() throws { _ = try agentConfiguration() }

        func run() async throws {
            let configuration = try agentConfiguration()
            try await runDaemon("agent", logLevel: logLevel) { AgentService(configuration: configuration, logger: $0) }
        }
    }
}

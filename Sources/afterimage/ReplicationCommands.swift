import Appliance
import ArgumentParser
import Foundation
import Replica

struct ReplicationCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "replication", abstract: "Following a server's disks.", subcommands: [Start.self, Stop.self, Pause.self, Resume.self])

    struct Start: ClientCommand {
        static let configuration = CommandConfiguration(
            abstract: "Start Replication; with --wait until the first recovery point is there.",
            discussion: "What is not given stays as it was; at first: all disks, 1000 ms, no throttle, automatic restart, CPUs and memory of the host that is protected (2 and 1024 MiB for a served disk), policy standard.")
        @OptionGroup var global: GlobalOptions
        @OptionGroup var waiting: WaitOption
        @Argument(help: "The server's name.") var name: String
        @Option(help: "A disk to follow; repeat it. Default: all that the agent reports.") var disk: [String] = []
        @Option(name: .customLong("epoch-ms"), help: "Length of an epoch in milliseconds: how far behind recovery points are.") var epochMilliseconds: UInt32?
        @Option(help: "At most so many bytes per second: 10MiB; 0 for no limit.") var throttle: ByteCount?
        @Flag(inversion: .prefixedNo, help: "Automatic restart after replication interruption.") var automaticRestart: Bool?
        @Option(help: "CPUs of its recovery machines.") var cpus: Int?
        @Option(name: .customLong("memory"), help: "Memory of its recovery machines, MiB.") var memoryMiB: Int?

        @Option(help: "The tap that its agent must have: live or nbd. Default: whichever it has (live, unless it was told otherwise).") var tap: String?
        @Option(help: ArgumentHelp("Make a recovery point that is more than crash-consistent every so often: 1h; 0s for none.", valueName: "span")) var consistentEvery: TimeSpan?
        @Option(help: "What those are: filesystem or application.") var consistency: Consistency?

        @Option(help: ArgumentHelp(PolicyHelp.text, valueName: "policy")) var policy: String?

        var request: StartReplication {
            var request = StartReplication()
            request.policy = policy
            request.disks = disk.isEmpty ? nil : disk
            request.epochMilliseconds = epochMilliseconds
            request.throttleBytesPerSecond = throttle?.bytes
            request.automaticRestart = automaticRestart
            request.cpus = cpus
            request.memoryMiB = memoryMiB
            request.tap = tap
            request.consistentEverySeconds = consistentEvery?.seconds
            request.consistency = consistency
            return request
        }

        func validate() throws { try PolicyHelp.check(policy) }

        func run(_ client: APIClient) async throws {
            let task: TaskView = try await client.post("/v1/servers/\(APIClient.segment(name))/replication", request)
            try await TaskFollower(client: client, json: global.json).finish(task, wait: waiting.wait)
        }
    }

    struct Stop: ClientCommand {
        static let configuration = CommandConfiguration(abstract: "Stop Replication; the recovery points stay.")
        @OptionGroup var global: GlobalOptions
        @Argument(help: "The server's name.") var name: String

        func run(_ client: APIClient) async throws {
            let task: TaskView = try await client.delete("/v1/servers/\(APIClient.segment(name))/replication")
            try await TaskFollower(client: client, json: global.json).finish(task, wait: false)
        }
    }
    struct Pause: ClientCommand {
        static let configuration = CommandConfiguration(
            abstract: "Pause Replication: nothing more is sent until it is resumed. What is written meanwhile is marked, and only that is sent then.")
        @OptionGroup var global: GlobalOptions
        @Argument(help: "The server's name.") var name: String

        func run(_ client: APIClient) async throws {
            let server: ServerView = try await client.post("/v1/servers/\(APIClient.segment(name))/replication/pause")
            try show(server) { ["\(server.name): \(server.state.rawValue), \(server.reason ?? "paused"); go on with afterimage replication resume \(server.name)"] }
        }
    }

    struct Resume: ClientCommand {
        static let configuration = CommandConfiguration(abstract: "Resume replication that is paused; with --wait until the next recovery point is there.")
        @OptionGroup var global: GlobalOptions
        @OptionGroup var waiting: WaitOption
        @Argument(help: "The server's name.") var name: String

        func run(_ client: APIClient) async throws {
            let task: TaskView = try await client.post("/v1/servers/\(APIClient.segment(name))/replication/resume")
            try await TaskFollower(client: client, json: global.json).finish(task, wait: waiting.wait)
        }
    }
}

import Appliance
import ArgumentParser
import Foundation
import Replica

struct ReplicationCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "replication", abstract: "Following a server's disks.", subcommands: [Start.self, Set.self, Stop.self, Pause.self, Resume.self])

    struct Start: ClientCommand {
        static let configuration = CommandConfiguration(
            abstract: "Start Replication; with --wait until the first recovery point is there.",
            discussion: "What is not given stays as it was; at first: all disks, 1000 ms, throttle and compression as the site pair's type has them (datacenter-to-zone: 32 MiB/s, others none; zone-to-zone: auto, others always), automatic restart, CPUs and memory of the host that is protected (2 and 1024 MiB for a served disk), policy standard.")
        @OptionGroup var global: GlobalOptions
        @OptionGroup var waiting: WaitOption
        @Argument(help: "The server's name.") var name: String
        @Option(help: "A disk to follow; repeat it. Default: all that the agent reports.") var disk: [String] = []
        @OptionGroup var transfer: TransferOptions
        @Option(help: ArgumentHelp("The network that its agent sends over (afterimage network list); default: the site pair's.", valueName: "network")) var replicationNetwork: String?
        @Option(help: ArgumentHelp("The network of its recovery machines unless told otherwise; default: the site pair's. Both must be in the same zone.", valueName: "network")) var recoveryNetwork: String?
        @Flag(inversion: .prefixedNo, help: "Automatic restart after replication interruption.") var automaticRestart: Bool?
        @Option(help: "What the store must be on: ssd or hdd; refused when it is not.") var storageClass: StorageClass?
        @Option(help: "CPUs of its recovery machines.") var cpus: Int?
        @Option(name: .customLong("memory"), help: "Memory of its recovery machines, MiB.") var memoryMiB: Int?

        @Option(help: "A disk that turns up on its host later: ask (an alert, until it is added or left out) or add. At first: ask.") var newDisks: NewDisks?
        @Option(help: "The tap that its agent must have: live or nbd. Default: whichever it has (live, unless it was told otherwise).") var tap: String?
        @Option(help: ArgumentHelp("Make a recovery point that is more than crash-consistent every so often: 1h; 0s for none.", valueName: "span")) var consistentEvery: TimeSpan?
        @Option(help: "What those are: filesystem or application.") var consistency: Consistency?

        @Option(help: ArgumentHelp(PolicyHelp.text, valueName: "policy")) var policy: String?

        var request: StartReplication {
            var request = StartReplication()
            request.policy = policy
            request.disks = disk.isEmpty ? nil : disk
            request.epochMilliseconds = transfer.epochMilliseconds
            request.throttleBytesPerSecond = transfer.throttle?.bytes
            request.throttleWindows = transfer.windows
            request.compression = transfer.compression
            request.storageClass = storageClass
            request.replicationNetwork = replicationNetwork
            request.recoveryNetwork = recoveryNetwork
            request.automaticRestart = automaticRestart
            request.cpus = cpus
            request.memoryMiB = memoryMiB
            request.tap = tap
            request.consistentEverySeconds = consistentEvery?.seconds
            request.consistency = consistency
            request.newDisks = newDisks
            return request
        }

        func validate() throws { try PolicyHelp.check(policy) }

        func run(_ client: APIClient) async throws {
            let task: TaskView = try await client.post("/v1/servers/\(APIClient.segment(name))/replication", request)
            try await TaskFollower(client: client, json: global.json).finish(task, wait: waiting.wait)
        }
    }

    struct Set: ClientCommand {
        static let configuration = CommandConfiguration(
            abstract: "Set how a protected server sends, while it replicates: nothing is interrupted. What is not given stays as it is.")
        @OptionGroup var global: GlobalOptions
        @OptionGroup var transfer: TransferOptions
        @Option(help: "A disk that turns up on its host: ask or add.") var newDisks: NewDisks?
        @Argument(help: "The server's name.") var name: String

        func validate() throws {
            guard newDisks != nil || transfer.epochMilliseconds != nil || transfer.throttle != nil || transfer.windows != nil || transfer.compression != nil else {
                throw ValidationError("say what is to be set: --throttle, --throttle-window, --no-throttle-windows, --compression, --epoch-ms or --new-disks")
            }
        }

        func run(_ client: APIClient) async throws {
            var request = SetReplication()
            request.epochMilliseconds = transfer.epochMilliseconds
            request.throttleBytesPerSecond = transfer.throttle?.bytes
            request.throttleWindows = transfer.windows
            request.compression = transfer.compression
            request.newDisks = newDisks
            let server: ServerView = try await client.put("/v1/servers/\(APIClient.segment(name))/replication", request)
            try show(server) { ["replication of \(server.name): \(server.settings?.transferText ?? "-")"] }
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

/// How things are sent.
struct TransferOptions: ParsableArguments {
    @Option(name: .customLong("epoch-ms"), help: "Length of an epoch in milliseconds: how far behind recovery points are.") var epochMilliseconds: UInt32?
    @Option(help: "At most so many bytes per second: 10MiB; 0 for no limit.") var throttle: ByteCount?
    @Option(
        help: ArgumentHelp(
            "Another limit at a time of the day, in the agent's local time: 08:00-18:00=5MiB, mon-fri@22:00-06:00=0; repeat it. The first that holds the time counts.",
            valueName: "[days@]from-to=rate"))
    var throttleWindow: [WindowArgument] = []
    @Flag(help: "No windows any more.") var noThrottleWindows = false
    @Option(help: "auto (where it makes the stream faster), off, or always (whatever shrinks).") var compression: CompressionChoice?

    func validate() throws {
        guard throttleWindow.isEmpty || !noThrottleWindows else { throw ValidationError("give --throttle-window or --no-throttle-windows") }
    }

    var windows: [ThrottleWindow]? { throttleWindow.isEmpty ? (noThrottleWindows ? [] : nil) : throttleWindow.map(\.window) }
}

struct WindowArgument: ExpressibleByArgument {
    var window: ThrottleWindow

    init?(argument: String) {
        guard let window = ThrottleWindow(text: argument, bytes: { ByteCount(argument: $0)?.bytes }) else { return nil }
        self.window = window
    }
}

extension CompressionChoice: ExpressibleByArgument {}
extension StorageClass: ExpressibleByArgument {}
extension NewDisks: ExpressibleByArgument {}

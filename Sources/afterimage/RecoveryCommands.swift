import Appliance
import ArgumentParser
import Foundation

/// Settings of the machine that a drill or a failover starts.
struct MachineOptions: ParsableArguments {
    @Option(help: "CPUs; default: as recorded at Start Replication.") var cpus: Int?
    @Option(name: .customLong("memory"), help: "Memory in MiB; default: as recorded at Start Replication.") var memoryMiB: Int?
    @Option(help: "Recovery network: isolated, user, bridge or none, or a network's name; default: the server's, then the site pair's.") var network: NetworkChoice?
    @Option(help: ArgumentHelp("With network bridge: a bridge of this host that is there already.", valueName: "name")) var bridge: String?
    @Option(help: ArgumentHelp("With network bridge: an own one with this network; the address is this host's in it.", valueName: "10.80.0.1/24"))
    var bridgeSubnet: IPv4Interface?
    @Flag(inversion: .prefixedNo, help: "Give out addresses of --bridge-subnet.") var dhcp = true
    @Option(help: ArgumentHelp("With network user: a port of this host's 127.0.0.1 that leads to the machine; repeat it.", valueName: "hostport:port"))
    var forward: [PortForward] = []
    @Option(help: "What makes the machine ready: none (QEMU runs it) or serial:REGEX (a line of its serial console).") var bootCheck: String?
    @Option(help: ArgumentHelp("Time limit of the boot check in seconds; default 120.", valueName: "seconds")) var bootTimeout: Int?

    func validate() throws {
        guard bridge == nil || bridgeSubnet == nil else { throw ValidationError("--bridge is one that is there already, --bridge-subnet makes one: give one of them") }
    }

    func request(point: String?) -> Appliance.StartMachine {
        var request = Appliance.StartMachine()
        request.recoveryPoint = point
        request.cpus = cpus
        request.memoryMiB = memoryMiB
        request.network = network?.mode
        request.networkName = network?.name
        request.forwards = forward.isEmpty ? nil : forward
        request.bridge = bridge.map { BridgeSettings(name: $0) } ?? bridgeSubnet.map { BridgeSettings(subnet: $0, dhcp: dhcp) }
        request.bootCheck = bootCheck
        request.bootSecondsMax = bootTimeout
        return request
    }
}

struct DrillCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "drill", abstract: "Disaster recovery drills: a machine from a recovery point, beside running replication.",
        subcommands: [Start.self, Clear.self])

    struct Start: ClientCommand {
        static let configuration = CommandConfiguration(abstract: "Start a Disaster Recovery Drill.")
        @OptionGroup var global: GlobalOptions
        @OptionGroup var waiting: WaitOption
        @OptionGroup var machine: MachineOptions
        @Argument(help: "The server's name.") var name: String
        @Option(help: "A recovery point's ID, or latest.") var point: String = "latest"

        func run(_ client: APIClient) async throws {
            let task: TaskView = try await client.post("/v1/servers/\(APIClient.segment(name))/drill", machine.request(point: point))
            try await TaskFollower(client: client, json: global.json).finish(task, wait: waiting.wait)
        }
    }

    struct Clear: ClientCommand {
        static let configuration = CommandConfiguration(abstract: "Clear Test Failover Environment: the drill's machine, disks and network go.")
        @OptionGroup var global: GlobalOptions
        @OptionGroup var waiting: WaitOption
        @Argument(help: "The server's name.") var name: String

        func run(_ client: APIClient) async throws {
            let task: TaskView = try await client.delete("/v1/servers/\(APIClient.segment(name))/drill")
            try await TaskFollower(client: client, json: global.json).finish(task, wait: waiting.wait)
        }
    }
}

struct FailoverCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "failover", abstract: "Bring a server up here, for good.", 
        subcommands: [Start.self, ChangeRecoveryPoint.self, StartMachine.self, Commit.self])

    struct Start: ClientCommand {
        static let configuration = CommandConfiguration(
            abstract: "Start a failover: the source is fenced, replication stops, the machine boots here.",
            discussion: """
                Works with the source dead. Until the commit the recovery point can still be changed. Says first what stops and stays, and asks for the server's \
                name; --preview only says it.
                """)
        @OptionGroup var global: GlobalOptions
        @OptionGroup var confirmation: ConfirmOption
        @OptionGroup var waiting: WaitOption
        @OptionGroup var machine: MachineOptions
        @Argument(help: "The server's name.") var name: String
        @Option(help: "A recovery point's ID, or latest (the current point in time).") var point: String = "latest"
        @Flag(help: "A planned move: the source's writes are held, a last point is made of all that it has, and nothing is lost. Needs the source alive.") var graceful = false
        @Flag(help: "Only say what would stop, stay and go.") var preview = false

        func run(_ client: APIClient) async throws {
            let path = "/v1/servers/\(APIClient.segment(name))/failover"
            let plan: OperationPreview = try await client.get("\(path)?point=\(APIClient.segment(point))\(graceful ? "&graceful=true" : "")")
            if preview {
                try show(plan) { plan.words }
                return
            }
            try confirmation.agree(to: plan, quietly: global.json)
            var request = machine.request(point: point)
            request.graceful = graceful ? true : nil
            let task: TaskView = try await client.post(path, request)
            try await TaskFollower(client: client, json: global.json).finish(task, wait: waiting.wait)
        }
    }

    struct ChangeRecoveryPoint: ClientCommand {
        static let configuration = CommandConfiguration(
            commandName: "change-recovery-point",
            abstract: "Start again from another point; what the machine has written until now is deleted.",
            discussion: "Settings that are not given stay as they were. Says first what goes, and asks for the server's name; --preview only says it.")
        @OptionGroup var global: GlobalOptions
        @OptionGroup var confirmation: ConfirmOption
        @OptionGroup var waiting: WaitOption
        @OptionGroup var machine: MachineOptions
        @Argument(help: "The server's name.") var name: String
        @Option(help: "A recovery point's ID.") var point: String
        @Flag(help: "Only say what would stay and go.") var preview = false

        func run(_ client: APIClient) async throws {
            let path = "/v1/servers/\(APIClient.segment(name))/failover/recovery-point"
            let plan: OperationPreview = try await client.get("\(path)?point=\(APIClient.segment(point))")
            if preview {
                try show(plan) { plan.words }
                return
            }
            try confirmation.agree(to: plan, quietly: global.json)
            let task: TaskView = try await client.post(path, machine.request(point: point))
            try await TaskFollower(client: client, json: global.json).finish(task, wait: waiting.wait)
        }
    }

    struct StartMachine: ClientCommand {
        static let configuration = CommandConfiguration(
            commandName: "start-machine", abstract: "Start a failed-over machine that has stopped, with all that it had written.")
        @OptionGroup var global: GlobalOptions
        @OptionGroup var waiting: WaitOption
        @Argument(help: "The server's name.") var name: String

        func run(_ client: APIClient) async throws {
            let task: TaskView = try await client.post("/v1/servers/\(APIClient.segment(name))/failover/machine")
            try await TaskFollower(client: client, json: global.json).finish(task, wait: waiting.wait)
        }
    }

    struct Commit: ClientCommand {
        static let configuration = CommandConfiguration(
            abstract: "Commit Failover: irrevocable, the recovery point can no longer be changed.",
            discussion: """
                Says first what stays and what goes: every recovery point but held ones. When some go it asks for the server's name; \
                --preview only says it.
                """)
        @OptionGroup var global: GlobalOptions
        @OptionGroup var confirmation: ConfirmOption
        @Argument(help: "The server's name.") var name: String
        @Flag(help: "Only say what would stay and go.") var preview = false

        func run(_ client: APIClient) async throws {
            let path = "/v1/servers/\(APIClient.segment(name))/failover/commit"
            let plan: CommitPreview = try await client.get(path)
            if preview {
                try show(plan) { plan.words }
                return
            }
            if !global.json { for line in plan.words { print("  \(line)") } }
            let answer = plan.needsConfirmation ? confirmation.answer("committing for good: type the server's name") : nil
            let task: TaskView = try await client.post(path, Confirmation(confirm: answer))
            try await TaskFollower(client: client, json: global.json).finish(task, wait: true)
        }
    }
}

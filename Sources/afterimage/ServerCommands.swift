import Appliance
import ArgumentParser
import Foundation

struct ServerCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "server", abstract: "Protected servers.", subcommands: [Add.self, List.self, Show.self, SetPolicy.self, SetAlerts.self, AddDisk.self, LeaveOutDisk.self, Restart.self, Token.self, Remove.self])

    struct Add: ClientCommand {
        static let configuration = CommandConfiguration(abstract: "Add 1 to 10 servers; prints the command that enrols each one's agent.")
        @OptionGroup var global: GlobalOptions
        @Argument(help: "Names of the servers.") var names: [String]
        @Option(help: "The site pair that protects them.") var pair: String

        func run(_ client: APIClient) async throws {
            let added: [Enrolment] = try await client.post("/v1/servers", AddServers(sitePair: pair, names: names))
            try show(added) { added.flatMap(ServerCommand.words) }
        }
    }

    struct Token: ClientCommand {
        static let configuration = CommandConfiguration(abstract: "Make a new enrolment command; the old one is worthless from then on.")
        @OptionGroup var global: GlobalOptions
        @Argument(help: "The server's name.") var name: String

        func run(_ client: APIClient) async throws {
            let enrolment: Enrolment = try await client.post("/v1/servers/\(APIClient.segment(name))/enrolment")
            try show(enrolment) { ServerCommand.words(enrolment) }
        }
    }

    static func words(_ enrolment: Enrolment) -> [String] {
        ["\(enrolment.server): run this on it before \(Words.time(enrolment.expires)); it works once:", "  \(enrolment.command)"]
    }

    struct List: ClientCommand {
        static let configuration = CommandConfiguration(abstract: "List the servers.")
        @OptionGroup var global: GlobalOptions

        func run(_ client: APIClient) async throws {
            let servers: [ServerView] = try await client.get("/v1/servers")
            try show(servers) {
                servers.isEmpty
                    ? ["no servers yet: afterimage server add NAME --pair PAIR"]
                    : Terminal.table(
                        ["NAME", "PAIR", "STATE", "DRILL", "AGENT", "POINTS"],
                        servers.map {
                            [
                                $0.name, $0.sitePair, $0.state.rawValue, $0.drill?.rawValue ?? "-", $0.agentConnected ? "connected" : "away",
                                "\($0.recoveryPointCount)",
                            ]
                        })
            }
        }
    }

    struct Show: ClientCommand {
        static let configuration = CommandConfiguration(abstract: "Show a server with its disks and machines.")
        @OptionGroup var global: GlobalOptions
        @Argument(help: "The server's name.") var name: String

        func run(_ client: APIClient) async throws {
            let server: ServerView = try await client.get("/v1/servers/\(APIClient.segment(name))")
            try show(server) { StatusCommand.words(server) + ServerCommand.details(server) }
        }
    }

    static func details(_ server: ServerView) -> [String] {
        var lines = ["  id            \(server.id)", "  site pair     \(server.sitePair)"]
        if let host = server.hostName { lines.append("  host          \(host), agent \(server.agentVersion ?? "?")") }
        if let host = server.specification {
            lines += Terminal.field(
                "specification", "\(Words.count(host.cpus, "CPU")), \(host.memoryMiB) MiB, \(host.firmware == .uefi ? "UEFI" : "BIOS"), Linux \(host.kernel)"
                    + host.networkCards.map { ", \($0.name) \(($0.addresses + [$0.mac]).joined(separator: " "))" }.joined())
        }
        if let generation = server.generation { lines.append("  generation    \(generation)") }
        if let stored = server.storedBytes { lines.append("  stored        \(Words.bytes(stored))" + (server.layerCount.map { " in \(Words.count($0, "layer"))" } ?? "")) }
        lines.append("  policy        \(PolicyHelp.words(server.policy))" + (server.heldPointCount > 0 ? ", \(Words.count(server.heldPointCount, "held point"))" : ""))
        lines.append("  alerts        \(server.alertSettings.text)")
        if let settings = server.settings {
            lines += Terminal.field(
                "replication", settings.transferText
                    + (settings.throttleWindows?.isEmpty == false ? server.agent?.throttleBytesPerSecond.map { ", now \($0 == 0 ? "none" : "\(Words.bytes($0))/s")" } ?? "" : "")
                    + (settings.replicationNetwork.map { ", replication network \($0)" } ?? "") + (settings.recoveryNetwork.map { ", recovery network \($0)" } ?? "")
                    + ", automatic restart \(settings.automaticRestart ? "on" : "off"), machine \(settings.cpus) CPUs \(settings.memoryMiB) MiB")
        }
        for disk in server.disks {
            lines.append("  disk \(disk.name)  \(disk.devicePath), \(Words.bytes(disk.geometry.sizeBytes)), tap \(disk.tap)" + (disk.socketPath.map { " \($0)" } ?? ""))
        }
        for disk in server.newDisks ?? [] {
            lines += Terminal.field("not protected", "\(disk.path), \(Words.bytes(disk.sizeBytes))\(disk.serial.map { ", serial \($0)" } ?? ""): afterimage server add-disk \(server.name) \(disk.path)")
        }
        for machine in server.instances {
            lines.append("  machine \(machine.id)  \(machine.kind.rawValue), \(machine.step.rawValue)" + (machine.reason.map { ": \($0)" } ?? ""))
            lines.append("    console     \(machine.consolePath)")
            lines.append("    disks       \(machine.nbdSocketPath)")
            if let hydration = machine.hydration { lines += Terminal.field("  hydration", MachineCommand.words(hydration)) }
        }
        if let reverse = server.reverse { lines += reverse.lines }
        return lines
    }

    struct SetPolicy: ClientCommand {
        static let configuration = CommandConfiguration(
            abstract: "Set a server's Recovery Point Policy; points that it does not want go soon, held ones stay.")
        @OptionGroup var global: GlobalOptions
        @Argument(help: "The server's name.") var name: String
        @Argument(help: ArgumentHelp(PolicyHelp.text)) var policy: String

        func validate() throws { try PolicyHelp.check(policy) }

        func run(_ client: APIClient) async throws {
            var before = ""
            let server: ServerView = try await client.change("/v1/servers/\(APIClient.segment(name))/policy") { (now: Appliance.SetPolicy) in
                before = now.policy
                return Appliance.SetPolicy(policy: policy)
            }
            try show(server) {
                ["Recovery Point Policy of \(server.name): \(PolicyHelp.words(server.policy))"] + (before == server.policy ? [] : ["  before: \(PolicyHelp.words(before))"])
            }
        }
    }

    struct SetAlerts: ClientCommand {
        static let configuration = CommandConfiguration(abstract: "Set from when on alerts of a server are raised. What is not given stays as it is.")
        @OptionGroup var global: GlobalOptions
        @Argument(help: "The server's name.") var name: String
        @Option(help: ArgumentHelp("Its newest recovery point is older than this: 60s, 5m; 0s for never.", valueName: "span")) var rpoTarget: TimeSpan?
        @Option(help: ArgumentHelp("No machine of it has passed a boot check for this long: 90d; 0s for never.", valueName: "span")) var drillEvery: TimeSpan?

        func run(_ client: APIClient) async throws {
            let request = Appliance.SetAlerts(rpoTargetSeconds: rpoTarget?.seconds, drillEverySeconds: drillEvery?.seconds)
            var before = AlertSettings.standard
            let server: ServerView = try await client.change("/v1/servers/\(APIClient.segment(name))/alerts") { (now: AlertSettings) in
                before = now
                return request
            }
            try show(server) { ["alerts of \(server.name): \(server.alertSettings.text)"] + (before == server.alertSettings ? [] : ["  before: \(before.text)"]) }
        }
    }

    struct AddDisk: ClientCommand {
        static let configuration = CommandConfiguration(
            abstract: "Protect a disk that has turned up on the server's host, too.",
            discussion: "Its agent opens the disks anew, the new one after the others; all are compared with the replica, and the next recovery point has the new one. Points from before do not have it.")
        @OptionGroup var global: GlobalOptions
        @Argument(help: "The server's name.") var name: String
        @Argument(help: "The disk, as afterimage server show names it.") var device: String
        @Option(name: .customLong("name"), help: ArgumentHelp("Its name in recovery; default: the device's.", valueName: "name")) var diskName: String?

        func run(_ client: APIClient) async throws {
            let server: ServerView = try await client.post("/v1/servers/\(APIClient.segment(name))/disks", Appliance.AddDisk(path: device, name: diskName))
            try show(server) { ["the agent of \(server.name) was told to follow \(device), too: afterimage server show \(server.name)"] }
        }
    }

    struct LeaveOutDisk: ClientCommand {
        static let configuration = CommandConfiguration(abstract: "Knowingly leave out a disk that has turned up on the server's host: no alert any more.")
        @OptionGroup var global: GlobalOptions
        @Argument(help: "The server's name.") var name: String
        @Argument(help: "The disk, as afterimage server show names it.") var device: String

        func run(_ client: APIClient) async throws {
            let server: ServerView = try await client.post("/v1/servers/\(APIClient.segment(name))/disks/left-out", Appliance.LeaveOutDisk(path: device))
            try show(server) { ["\(device) of \(server.name) stays unprotected"] }
        }
    }

    struct Restart: ClientCommand {
        static let configuration = CommandConfiguration(abstract: "Restart Server: its agent looks at its disks anew and says what it has; replication goes on.")
        @OptionGroup var global: GlobalOptions
        @Argument(help: "The server's name.") var name: String

        func run(_ client: APIClient) async throws {
            let server: ServerView = try await client.post("/v1/servers/\(APIClient.segment(name))/restart")
            try show(server) { ["the agent of \(server.name) begins anew: afterimage server show \(server.name)"] }
        }
    }

    struct Remove: ClientCommand {
        static let configuration = CommandConfiguration(
            abstract: "Unregister a server.", discussion: "Says first what goes, and asks for the server's name when something does; --preview only says it.")
        @OptionGroup var global: GlobalOptions
        @OptionGroup var confirmation: ConfirmOption
        @OptionGroup var waiting: WaitOption
        @Argument(help: "The server's name.") var name: String
        @Flag(help: "Its recovery points are deleted: needed when it has any.") var deletePoints = false
        @Flag(help: "Its committed recovery machine is stopped and deleted: needed when there is one.") var stopMachine = false
        @Flag(help: "Only say what would go.") var preview = false

        func run(_ client: APIClient) async throws {
            let plan: OperationPreview = try await client.get("/v1/servers/\(APIClient.segment(name))/removal")
            if preview {
                try show(plan) { plan.words }
                return
            }
            try confirmation.agree(to: plan, quietly: global.json)
            let task: TaskView = try await client.delete(
                "/v1/servers/\(APIClient.segment(name))", RemoveServer(deletePoints: deletePoints, stopMachine: stopMachine))
            try await TaskFollower(client: client, json: global.json).finish(task, wait: waiting.wait)
        }
    }
}

import Appliance
import ArgumentParser
import Foundation

struct DrillCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "drill", abstract: "Disaster recovery drills: a machine from a recovery point, beside running replication.",
        subcommands: [Start.self, Clear.self, Schedule.self, Report.self])

    struct Start: ClientCommand {
        static let configuration = CommandConfiguration(abstract: "Start a Disaster Recovery Drill.")
        @OptionGroup var global: GlobalOptions
        @OptionGroup var waiting: WaitOption
        @OptionGroup var machine: MachineOptions
        @Argument(help: "The server's name.") var name: String
        @Option(help: "A recovery point's ID, or latest.") var point: String = "latest"

        func run(_ client: APIClient) async throws {
            let task: TaskView = try await client.post("/v1/servers/\(APIClient.segment(name))/drill", try machine.request(point: point))
            try await TaskFollower(client: client, json: global.json).finish(task, wait: waiting.wait)
        }
    }

    struct Clear: ClientCommand {
        static let configuration = CommandConfiguration(abstract: "Clear Test Failover Environment: the drill's machine, disks and network go.")
        @OptionGroup var global: GlobalOptions
        @OptionGroup var waiting: WaitOption
        @Argument(help: "The server's name.") var name: String
        @Flag(help: "Shut the machine's system down first, by its guest agent or power button.") var graceful = false

        func run(_ client: APIClient) async throws {
            let task: TaskView = try await client.delete("/v1/servers/\(APIClient.segment(name))/drill", ClearDrill(graceful: graceful ? true : nil))
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
            var request = try machine.request(point: point)
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
            let task: TaskView = try await client.post(path, try machine.request(point: point))
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

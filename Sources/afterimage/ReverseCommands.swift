import Appliance
import ArgumentParser
import Foundation

struct ReverseCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "reverse", abstract: "Reverse replication: what runs here goes back to where it was.", subcommands: [Register.self, Start.self, Stop.self])

    struct Register: ClientCommand {
        static let configuration = CommandConfiguration(
            abstract: "Reversed Register: print the token for the agent that holds the original disks, or register another appliance.",
            discussion: """
                The failover must be committed. Back to another appliance: --appliance with the token that it printed (there: afterimage server add, or afterimage \
                server token, or afterimage registration); this appliance is then its server's agent. Back to the original disks: on a machine with the original disks (the original one, booted from other media, or any other that they are \
                attached to): afterimage agent enroll with this token and a state directory of its own, then afterimage agent rescue.
                """)
        @OptionGroup var global: GlobalOptions
        @Argument(help: "The server's name.") var name: String
        @Option(help: ArgumentHelp("Into the store of another appliance: the one-time token of its server.", valueName: "token")) var appliance: String?

        func run(_ client: APIClient) async throws {
            if let appliance {
                let server: ServerView = try await client.post("/v1/servers/\(APIClient.segment(name))/reverse/appliance", RegisterReverse(token: appliance))
                try show(server) { ["\(server.name): \(server.state.rawValue), as \(server.reverse?.applianceServer ?? "-") at \(server.reverse?.applianceURL ?? "-")"] }
                return
            }
            let enrolment: Enrolment = try await client.post("/v1/servers/\(APIClient.segment(name))/reverse/registration")
            try show(enrolment) { ["On the machine with the disks of \(enrolment.server), until \(Words.timeToSecond(enrolment.expires)):", "  \(enrolment.command)"] }
        }
    }

    struct Start: ClientCommand {
        static let configuration = CommandConfiguration(
            abstract: "Initiate Reverse Replication: the original disks, or another appliance, are brought up to what runs here, and follow it.",
            discussion: """
                Only what differs is sent. --original-machine: what the disks hold is kept first, as a held recovery point. Each disk is confirmed by its serial, or \
                its path where it has none; --preview says them, and what happens. --to-appliance: confirmed by the server's name; the other appliance follows once it \
                is asked to there (afterimage replication start).
                """)
        @OptionGroup var global: GlobalOptions
        @OptionGroup var waiting: WaitOption
        @Argument(help: "The server's name.") var name: String
        @Flag(help: "Original machine recovery: its disks are overwritten.") var originalMachine = false
        @Flag(help: "Into the store of the appliance that was registered.") var toAppliance = false
        @OptionGroup var confirmation: ConfirmOption
        @Option(help: ArgumentHelp("A disk's serial; repeat it for each disk.", valueName: "serial")) var confirm: [String] = []
        @Flag(help: "Keep nothing of what the disks hold.") var discardOriginal = false
        @Option(help: "At most so many bytes per second: 10MiB; 0 for no limit.") var throttle: ByteCount?
        @Flag(help: "Only say what would be overwritten and kept.") var preview = false

        func run(_ client: APIClient) async throws {
            let path = "/v1/servers/\(APIClient.segment(name))/reverse"
            if preview {
                let plan: OperationPreview = try await client.get(path)
                try show(plan) { plan.words }
                return
            }
            var confirm = confirm
            if toAppliance, confirm.isEmpty {
                let plan: OperationPreview = try await client.get(path)
                try confirmation.agree(to: plan, quietly: global.json)
                confirm = [plan.server]
            }
            let request = StartReverse(
                originalMachine: originalMachine ? true : nil, toAppliance: toAppliance ? true : nil, confirm: confirm, discardsOriginal: discardOriginal ? true : nil, throttleBytesPerSecond: throttle?.bytes)
            let task: TaskView = try await client.post(path, request)
            try await TaskFollower(client: client, json: global.json).finish(task, wait: waiting.wait)
        }
    }

    struct Stop: ClientCommand {
        static let configuration = CommandConfiguration(
            abstract: "Stop reverse replication, or take its registration back; the machine goes on here.",
            discussion: "Disks that were being overwritten are left as they are: in the middle of it.")
        @OptionGroup var global: GlobalOptions
        @Argument(help: "The server's name.") var name: String

        func run(_ client: APIClient) async throws {
            let server: ServerView = try await client.delete("/v1/servers/\(APIClient.segment(name))/reverse")
            try show(server) { ["\(server.name): \(server.state.rawValue)"] }
        }
    }
}

struct FailbackCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "failback", abstract: "Go back to the original machine: the machine here stops, its disks have everything.", subcommands: [Start.self, Cancel.self])

    struct Start: ClientCommand {
        static let configuration = CommandConfiguration(
            abstract: "Failback: the machine here shuts down, a last cut is brought onto the original disks; nothing is lost.",
            discussion: "Possible in Reversed Replicating. Says first what stops and goes, and asks for the server's name; --preview only says it.")
        @OptionGroup var global: GlobalOptions
        @OptionGroup var confirmation: ConfirmOption
        @OptionGroup var waiting: WaitOption
        @Argument(help: "The server's name.") var name: String
        @Flag(help: "Stop the machine at once, without asking its guest: what that had only in memory is lost.") var forced = false
        @Flag(help: "Only say what would stop and go.") var preview = false

        func run(_ client: APIClient) async throws {
            let path = "/v1/servers/\(APIClient.segment(name))/failback"
            let plan: OperationPreview = try await client.get(path + (forced ? "?forced=true" : ""))
            if preview {
                try show(plan) { plan.words }
                return
            }
            try confirmation.agree(to: plan, quietly: global.json)
            let task: TaskView = try await client.post(path, StartFailback(forced: forced ? true : nil, confirm: plan.server))
            try await TaskFollower(client: client, json: global.json).finish(task, wait: waiting.wait)
        }
    }

    struct Cancel: ClientCommand {
        static let configuration = CommandConfiguration(abstract: "Cancel a failback that has not ended: the machine starts here again, nothing is lost.")
        @OptionGroup var global: GlobalOptions
        @Argument(help: "The server's name.") var name: String

        func run(_ client: APIClient) async throws {
            let server: ServerView = try await client.delete("/v1/servers/\(APIClient.segment(name))/failback")
            try show(server) { ["\(server.name): \(server.state.rawValue)"] }
        }
    }
}

struct RegistrationCommand: ClientCommand {
    static let configuration = CommandConfiguration(
        commandName: "registration", abstract: "Registration: protect a server again that has failed back; prints the token for its agent.")
    @OptionGroup var global: GlobalOptions
    @Argument(help: "The server's name.") var name: String

    func run(_ client: APIClient) async throws {
        let enrolment: Enrolment = try await client.post("/v1/servers/\(APIClient.segment(name))/registration")
        try show(enrolment) { ["On \(enrolment.server), until \(Words.timeToSecond(enrolment.expires)):", "  \(enrolment.command)"] }
    }
}

extension ReverseView {
    /// Of a server that is shown.
    var lines: [String] {
        var lines = disks.map { "  goes back to  \($0.name) on \($0.devicePath), \(Words.bytes($0.sizeBytes)), confirmed by \($0.confirmation)" }
        if let applianceURL { lines.append("  goes back to  the appliance at \(applianceURL), as \(applianceServer ?? "-")") }
        let line = isConnected ? phase.rawValue : applianceURL == nil ? "the rescue agent is not connected" : "the other appliance is not connected"
        lines.append("  reverse       \(step.rawValue), \(line)\(reason.map { ": \($0)" } ?? ""); \(Words.bytes(sentBytes)) sent, \(Words.bytes(equalBytes)) alike, \(Words.bytes(behindBytes)) behind")
        if let lastCutTime { lines.append("  last cut      \(Words.time(lastCutTime))") }
        if let originalPoint { lines.append("  original      kept as recovery point \(originalPoint)") }
        return lines
    }
}

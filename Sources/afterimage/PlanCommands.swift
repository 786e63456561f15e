import Appliance
import ArgumentParser
import Foundation

struct PlanCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "plan", abstract: "Recovery plans: several servers, in their order, as a drill or as a failover.",
        subcommands: [Create.self, Edit.self, List.self, Show.self, Runs.self, Run.self, Continue.self, Resume.self, Stop.self, Clear.self, Delete.self])

    /// A file of this host; - is what comes in.
    static func read(_ file: String) throws -> PlanDefinition {
        let data: Data
        if file == "-" {
            data = FileHandle.standardInput.readDataToEndOfFile()
        } else {
            guard let content = FileManager.default.contents(atPath: file) else {
                Terminal.error("cannot read \(file)")
                throw Exit.failed
            }
            data = content
        }
        do { return try PlanText.definition(data) } catch {
            Terminal.error("\(file): \(error)")
            throw Exit.usage
        }
    }

    static func path(_ name: String, _ rest: String = "") -> String { "/v1/plans/\(APIClient.segment(name))\(rest)" }

    struct Create: ClientCommand {
        static let configuration = CommandConfiguration(
            abstract: "Create a recovery plan from a file.",
            discussion: """
                The file is JSON, as afterimage plan show NAME --json prints it:

                {"name": "shop", "groups": [
                  {"name": "databases", "servers": [{"server": "db", "machine": {"bootCheck": "serial:login:", "memoryMiB": 4096}}], "waitSeconds": 30},
                  {"name": "front", "servers": [{"server": "web1"}, {"server": "web2"}],
                   "scripts": [{"path": "/usr/local/sbin/turn-dns", "arguments": ["shop"], "limitSeconds": 60, "isRepeatable": true, "only": "failover"}],
                   "manualSteps": [{"text": "Log in to the shop and place an order"}]}]}

                Groups follow one another. A group starts its servers together; when all their machines are ready (their boot checks have passed; without one: QEMU runs \
                them) it waits for waitSeconds, runs its scripts one after the other, and asks for its manual steps. machine has what drills and failovers are told: recoveryPoint, \
                cpus, memoryMiB, network, forwards, bootCheck, bootSecondsMax. Scripts are programs on the appliance's host (absolute path); they run as the appliance does, \
                with AFTERIMAGE_PLAN, AFTERIMAGE_PLAN_RUN and AFTERIMAGE_PLAN_KIND (drill or failover). only restricts a script or a manual step to drills or to failovers.
                """)
        @OptionGroup var global: GlobalOptions
        @Argument(help: "The file; - for standard input.") var file: String

        func run(_ client: APIClient) async throws {
            let plan: PlanView = try await client.post("/v1/plans", try PlanCommand.read(file))
            try show(plan.definition) { ["the plan \(plan.name) is there; what a drill of it would do: afterimage plan run \(plan.name) --as drill --preview"] }
        }
    }

    struct Edit: ClientCommand {
        static let configuration = CommandConfiguration(abstract: "Give a recovery plan other steps, from a file as of afterimage plan create. A run that goes on keeps its own.")
        @OptionGroup var global: GlobalOptions
        @Argument(help: "The file; - for standard input.") var file: String

        func run(_ client: APIClient) async throws {
            let definition = try PlanCommand.read(file)
            let plan: PlanView = try await client.put(PlanCommand.path(definition.name), definition)
            try show(plan.definition) { ["the plan \(plan.name) is changed"] }
        }
    }

    struct List: ClientCommand {
        static let configuration = CommandConfiguration(abstract: "List recovery plans.")
        @OptionGroup var global: GlobalOptions

        func run(_ client: APIClient) async throws {
            let plans: [PlanView] = try await client.get("/v1/plans")
            try show(plans) {
                plans.isEmpty
                    ? ["no recovery plan (afterimage plan create FILE)"]
                    : Terminal.table(
                        ["NAME", "GROUPS", "SERVERS", "LAST RUN"],
                        plans.map { plan in
                            let servers = plan.groups.reduce(0) { $0 + ($1.servers ?? []).count }
                            let last = plan.lastRun.map { "\(Words.timeToSecond($0.started)) as \($0.kind.rawValue): \(PlanCommand.words($0))" } ?? "never"
                            return [plan.name, "\(plan.groups.count)", "\(servers)", last + PlanCommand.missing(plan).map { "; \($0)" }.joined()]
                        })
            }
        }
    }

    struct Show: ClientCommand {
        static let configuration = CommandConfiguration(
            abstract: "Show a recovery plan and its last run, step by step. --json prints the plan as its file has it; the runs: afterimage plan runs.")
        @OptionGroup var global: GlobalOptions
        @Argument(help: "The plan's name.") var name: String

        func run(_ client: APIClient) async throws {
            let plan: PlanView = try await client.get(PlanCommand.path(name))
            try show(plan.definition) {
                var lines = [plan.name] + PlanCommand.missing(plan).map { "  \($0)" }
                for group in plan.groups { lines += ["  \(group.name)"] + PlanCommand.words(group).map { "    \($0)" } }
                guard let run = plan.lastRun else { return lines + ["never run"] }
                return lines + [""] + PlanCommand.lines(run)
            }
        }
    }

    struct Runs: ClientCommand {
        static let configuration = CommandConfiguration(abstract: "List a recovery plan's runs, newest first; --json has their steps.")
        @OptionGroup var global: GlobalOptions
        @Argument(help: "The plan's name.") var name: String
        @Option(help: "At most so many.") var limit: Int = 50

        func run(_ client: APIClient) async throws {
            let runs: [PlanRunView] = try await client.get(PlanCommand.path(name, "/runs?limit=\(limit)"))
            try show(runs) {
                Terminal.table(
                    ["ID", "STARTED", "ENDED", "AS", "TASK", "STATUS"],
                    runs.map { ["\($0.id)", Words.timeToSecond($0.started), $0.ended.map(Words.timeToSecond) ?? "-", $0.kind.rawValue, $0.task.map { "\($0)" } ?? "-", PlanCommand.words($0)] })
            }
        }
    }

    struct Run: ClientCommand {
        static let configuration = CommandConfiguration(
            abstract: "Run a recovery plan, as a drill or as a failover.",
            discussion: """
                Says first what will happen, server by server, and why not if it cannot be now; as a failover it then asks for the plan's name. --preview only says it. \
                It goes on when the appliance was restarted in between. A step that fails ends the run: afterimage plan resume.
                """)
        @OptionGroup var global: GlobalOptions
        @OptionGroup var confirmation: ConfirmOption
        @OptionGroup var waiting: WaitOption
        @Argument(help: "The plan's name.") var name: String
        @Option(name: .customLong("as"), help: "drill or failover.") var kind: InstanceKind
        @Flag(help: "As a failover: each source's writes are held for a last point, and nothing is lost. Needs the sources alive.") var graceful = false
        @Option(help: ArgumentHelp("Leave this server out; repeat it.", valueName: "server")) var without: [String] = []
        @Flag(help: "Only say what would happen.") var preview = false

        func run(_ client: APIClient) async throws {
            let left = without.isEmpty ? "" : "&without=" + without.map(APIClient.segment).joined(separator: ",")
            let plan: PlanPreview = try await client.get(PlanCommand.path(name, "/run?kind=\(kind.rawValue)\(graceful ? "&graceful=true" : "")\(left)"))
            if preview {
                try show(plan) { plan.words + plan.obstacles.map { "NOT NOW: \($0)" } }
                return
            }
            var request = RunPlan(kind: kind, graceful: graceful ? true : nil, without: without.isEmpty ? nil : without)
            // What cannot be run now is not worth a question: the appliance says why.
            if plan.needsConfirmation && plan.obstacles.isEmpty {
                if !global.json { for line in plan.words { print("  \(line)") } }
                request.confirm = confirmation.answer("Failover of the whole plan: type its name")
            }
            let task: TaskView = try await client.post(PlanCommand.path(name, "/run"), request)
            try await TaskFollower(client: client, json: global.json).finish(task, wait: waiting.wait)
        }
    }

    struct Continue: ClientCommand {
        static let configuration = CommandConfiguration(abstract: "The manual step that the run waits for is done.")
        @OptionGroup var global: GlobalOptions
        @Argument(help: "The plan's name.") var name: String

        func run(_ client: APIClient) async throws {
            let run: PlanRunView = try await client.post(PlanCommand.path(name, "/run/continue"))
            try show(run) { PlanCommand.lines(run) }
        }
    }

    struct Resume: ClientCommand {
        static let configuration = CommandConfiguration(
            abstract: "Go on with a run that has failed or was stopped: what has failed is tried again, what is done is not.",
            discussion: """
                A script that was at work when the appliance ended is run again only by this command, unless the plan says that it is repeatable. A drill of a failed attempt is \
                cleared before the next one.
                """)
        @OptionGroup var global: GlobalOptions
        @OptionGroup var waiting: WaitOption
        @Argument(help: "The plan's name.") var name: String
        @Flag(help: "Go on without the steps that failed.") var skip = false

        func run(_ client: APIClient) async throws {
            let task: TaskView = try await client.post(PlanCommand.path(name, "/run/resume"), ResumePlan(skip: skip ? true : nil))
            try await TaskFollower(client: client, json: global.json).finish(task, wait: waiting.wait)
        }
    }

    struct Stop: ClientCommand {
        static let configuration = CommandConfiguration(abstract: "Begin nothing more of a run. Drills and failovers that have begun go on; a script is killed.")
        @OptionGroup var global: GlobalOptions
        @Argument(help: "The plan's name.") var name: String

        func run(_ client: APIClient) async throws {
            let run: PlanRunView = try await client.post(PlanCommand.path(name, "/run/stop"))
            try show(run) { PlanCommand.lines(run) }
        }
    }

    struct Clear: ClientCommand {
        static let configuration = CommandConfiguration(abstract: "Clear all drills of the last run; one that goes on is stopped.")
        @OptionGroup var global: GlobalOptions
        @OptionGroup var waiting: WaitOption
        @Argument(help: "The plan's name.") var name: String

        func run(_ client: APIClient) async throws {
            let task: TaskView = try await client.delete(PlanCommand.path(name, "/run"))
            try await TaskFollower(client: client, json: global.json).finish(task, wait: waiting.wait)
        }
    }

    struct Delete: ClientCommand {
        static let configuration = CommandConfiguration(abstract: "Delete a recovery plan and the record of its runs; asks for its name.")
        @OptionGroup var global: GlobalOptions
        @OptionGroup var confirmation: ConfirmOption
        @Argument(help: "The plan's name.") var name: String

        func run(_ client: APIClient) async throws {
            try await client.deleteNoContent(PlanCommand.path(name), Confirmation(confirm: confirmation.answer("Delete the plan and the record of its runs: type its name")))
            say("the plan \(name) is deleted")
        }
    }
}

extension PlanCommand {
    static func missing(_ plan: PlanView) -> [String] {
        plan.missingServers.isEmpty ? [] : ["NOT HERE ANY MORE: \(plan.missingServers.joined(separator: ", ")) (afterimage plan edit)"]
    }

    /// How a run is, in a few words.
    static func words(_ run: PlanRunView) -> String {
        if let waitsFor = run.waitsFor { return "waits for somebody: \(waitsFor) (then afterimage plan continue \(run.plan))" }
        return run.status.rawValue + (run.error.map { ": \($0)" } ?? "")
    }

    static func words(_ group: PlanGroup) -> [String] {
        func only(_ kind: InstanceKind?) -> String { kind.map { " (in a \($0.rawValue) only)" } ?? "" }
        return (group.servers ?? []).map { "start \($0.server)" + ($0.machine?.bootCheck.map { ", boot check \($0)" } ?? "") }
            + (group.waitSeconds.map { ["wait \(Amount.seconds($0))"] } ?? [])
            + (group.scripts ?? []).map { "run " + ([$0.path] + ($0.arguments ?? [])).joined(separator: " ") + only($0.only) }
            + (group.manualSteps ?? []).map { "ask: \($0.text)" + only($0.only) }
    }

    static func lines(_ run: PlanRunView) -> [String] {
        ["run \(run.id), as \(run.isGraceful ? "graceful " : "")\(run.kind.rawValue), by \(run.who), \(Words.timeToSecond(run.started)): \(words(run))"]
            + Terminal.table(
                ["STEP", "GROUP", "STATUS", "SINCE", "TASKS", "WHAT"],
                run.steps.map { step in
                    [
                        "\(step.number)", step.group, step.status.rawValue, step.since.map { String(Words.timeToSecond($0).suffix(8)) } ?? "-",
                        step.tasks.isEmpty ? "-" : step.tasks.map(String.init).joined(separator: " "),
                        step.what + (step.error.map { ": \($0.split(whereSeparator: \.isNewline).first ?? "")" } ?? (step.status == .running ? step.until.map { ", until \(Words.timeToSecond($0))" } ?? "" : "")),
                    ]
                })
    }
}

extension InstanceKind: ExpressibleByArgument {}

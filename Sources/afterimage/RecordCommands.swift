import Appliance
import ArgumentParser
import BlockTap
import Foundation

struct TaskCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "task", abstract: "What the appliance does and did.", subcommands: [List.self, Show.self, Cancel.self, Screenshot.self])

    struct List: ClientCommand {
        static let configuration = CommandConfiguration(abstract: "List tasks, newest first.")
        @OptionGroup var global: GlobalOptions
        @Option(help: "Only this server's.") var server: String?
        @Option(help: "At most so many.") var limit: Int = 50

        func run(_ client: APIClient) async throws {
            let tasks: [TaskView] = try await client.get("/v1/tasks?limit=\(limit)" + (server.map { "&server=\(APIClient.segment($0))" } ?? ""))
            try show(tasks) {
                Terminal.table(
                    ["ID", "CREATED", "SERVER", "OPERATION", "STATUS", "ERROR"],
                    tasks.map { ["\($0.id)", Words.timeToSecond($0.created), $0.server ?? "-", $0.operation.rawValue, $0.status.rawValue, firstLine($0.error)] })
            }
        }

        private func firstLine(_ text: String?) -> String { text?.split(separator: "\n").first.map(String.init) ?? "" }
    }

    struct Show: ClientCommand {
        static let configuration = CommandConfiguration(abstract: "Show a task with its log and result; with --wait until it has ended.")
        @OptionGroup var global: GlobalOptions
        @OptionGroup var waiting: WaitOption
        @Argument(help: "The task's number.") var id: Int64

        func run(_ client: APIClient) async throws {
            let task: TaskView = try await client.get("/v1/tasks/\(id)")
            if waiting.wait {
                try await TaskFollower(client: client, json: global.json).finish(task, wait: true)
                return
            }
            try show(task) {
                TaskFollower.outcome(task) + (task.hasScreenshot == true ? ["  screenshot      afterimage task screenshot \(task.id) FILE.png"] : [])
                    + (task.error.map { ["  error           \($0)"] } ?? [])
                    + (task.log ?? []).map { "  \(Words.time($0.time))  \($0.line)" }
            }
        }
    }
}

extension TaskCommand {
    struct Cancel: ClientCommand {
        static let configuration = CommandConfiguration(abstract: "End an export, a promotion, a hydration, or the making of a recovery point; what is half made is removed.")
        @OptionGroup var global: GlobalOptions
        @Argument(help: "The task's number.") var id: Int64

        func run(_ client: APIClient) async throws {
            let task: TaskView = try await client.delete("/v1/tasks/\(id)")
            try show(task) { ["task \(task.id) (\(task.operation.rawValue)) is cancelled"] }
        }
    }
}

extension TaskCommand {
    struct Screenshot: ClientCommand {
        static let configuration = CommandConfiguration(abstract: "What a task's machine showed when its boot check ended, as a PNG file.")
        @OptionGroup var global: GlobalOptions
        @Argument(help: "The task's number.") var id: Int64
        @Argument(help: "The file to write; one that is there is replaced.") var file: String

        func run(_ client: APIClient) async throws {
            let image = try await client.data("/v1/tasks/\(id)/screenshot")
            do { try image.write(to: URL(fileURLWithPath: file), options: .atomic) } catch {
                Terminal.error("cannot write \(file): \(error.localizedDescription)")
                throw Exit.failed
            }
            say("\(file): \(Words.bytes(UInt64(image.count)))")
        }
    }
}

struct EventCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(commandName: "event", abstract: "The audit log, and what happens.", subcommands: [List.self, Follow.self])

    struct List: ClientCommand {
        static let configuration = CommandConfiguration(abstract: "List events, newest first.")
        @OptionGroup var global: GlobalOptions
        @Option(help: "Only this server's.") var server: String?
        @Option(help: "At most so many.") var limit: Int = 50

        func run(_ client: APIClient) async throws {
            let events: [EventRecord] = try await client.get("/v1/events?limit=\(limit)" + (server.map { "&server=\(APIClient.segment($0))" } ?? ""))
            try show(events) {
                Terminal.table(
                    ["TIME", "WHO", "SERVER", "WHAT", "DETAIL"],
                    events.map { [Words.timeToSecond($0.time), $0.who, $0.server ?? "-", $0.what, detail($0)] })
            }
        }

        private func detail(_ event: EventRecord) -> String { EventCommand.detail(event) }
    }

    struct Follow: ClientCommand {
        static let configuration = CommandConfiguration(
            abstract: "Show what happens while it does: audit log, tasks and alerts.",
            discussion: "Goes on when the appliance is restarted, without missing anything, until it is interrupted. With --json: one object a line.")
        @OptionGroup var global: GlobalOptions

        func run(_ client: APIClient) async throws {
            try await client.follow(
                { message in
                    if global.json {
                        print("{\"event\":\"\(message.kind)\",\"data\":\(String(decoding: message.data, as: UTF8.self))}")
                    } else if let line = try? Self.line(message) {
                        print(line)
                    }
                    fflush(nil)
                }, onLost: { Terminal.error("\($0); trying again") })
        }

        /// nil: a task's progress, and what a later version tells.
        static func line(_ message: APIClient.StreamMessage) throws -> String? {
            let decoder = APIJSON.decoder()
            switch message.kind {
            case "audit":
                let event = try decoder.decode(EventRecord.self, from: message.data), detail = EventCommand.detail(event)
                return "\(Words.timeToSecond(event.time))  \(event.who)  \(event.server.map { "\($0): " } ?? "")\(event.what)" + (detail.isEmpty ? "" : "  \(detail)")
            case "task-log":
                let line = try decoder.decode(TaskLine.self, from: message.data)
                return "\(Words.timeToSecond(line.time))  task \(line.task)  \(line.line)"
            case "alert":
                let alert = try decoder.decode(AlertRecord.self, from: message.data)
                return "\(Words.timeToSecond(alert.cleared ?? alert.raised))  ALERT  \(alert.cleared == nil ? "" : "over: ")\(alert.text)"
            default: return nil
            }
        }
    }

    /// `Replicating → Initialized: why`
    private static func detail(_ event: EventRecord) -> String {
        let change: String? =
            switch (event.before, event.after) {
            case (let before?, let after?): before == after ? before : "\(before) → \(after)"
            case (let before?, nil): before
            case (nil, let after?): after
            case (nil, nil): nil
            }
        return [change, event.detail].compactMap { $0 }.joined(separator: ": ")
    }
}

struct StatusCommand: ClientCommand {
    static let configuration = CommandConfiguration(commandName: "status", abstract: "Am I protected?")
    @OptionGroup var global: GlobalOptions

    func run(_ client: APIClient) async throws {
        let status: StatusView = try await client.get("/v1/status")
        try show(status) {
            let first =
                status.servers.isEmpty
                ? "no server is protected yet: " + (status.sitePairs == 0 ? "afterimage site-pair create NAME" : "afterimage server add NAME --pair PAIR")
                : status.protected ? "all servers are protected" : "NOT every server is protected"
            return [first] + status.alerts.flatMap { Terminal.isInteractive ? Terminal.wrapped("ALERT: \($0.text)", Terminal.columns) : ["ALERT: \($0.text)"] }
                + status.servers.flatMap(Self.words) + Self.words(status.store)
        }
    }

    static func words(_ store: StoreView) -> [String] {
        var lines = ["", "store \(store.directory): \(store.space.rawValue)" + (store.storageClass.map { ", on \($0.rawValue)" } ?? "")]
        lines += Terminal.field("space", "\(Words.bytes(store.freeBytes)) of \(Words.bytes(store.capacityBytes)) free" + (store.tightensWhenLow ? "; when low, points go before their time" : ""))
        lines += Terminal.field("data", "\(Words.bytes(store.storedBytes)) in \(Words.count(store.layerCount, "layer")), \(Words.count(store.segmentCount, "segment"))" + (store.forkCount > 0 ? "; \(Words.count(store.forkCount, "fork"))" : ""))
        let upkeep = store.upkeep
        lines += Terminal.field("upkeep", "\(Words.count(upkeep.expiredPointCount, "point")) expired, \(Words.count(upkeep.mergedLayerCount, "layer")) merged, \(Words.bytes(upkeep.reclaimedBytes)) given back")
        lines += Terminal.field("scrub", words(store.scrub))
        return lines
    }

    private static func words(_ scrub: ScrubView) -> String {
        guard scrub.isOn else { return "off" }
        var parts = [scrub.lastPassEnd.map { "last pass ended \(Words.timeToSecond($0))" } ?? "no pass has ended yet"]
        if scrub.readBytes > 0 { parts.append("\(Words.bytes(scrub.readBytes)) read since the start") }
        parts.append(scrub.badBlockCount == 0 && scrub.badFileCount == 0 ? "no damage known" : "DAMAGE: \(Words.count(scrub.badBlockCount, "block")), \(Words.count(scrub.badFileCount, "layer"))")
        if scrub.repairedBlockCount > 0 { parts.append("\(Words.count(scrub.repairedBlockCount, "block")) repaired") }
        return parts.joined(separator: ", ")
    }

    static func words(_ server: ServerView) -> [String] {
        var lines = ["", "\(server.name): \(server.state.rawValue)" + (server.drill.map { " + \($0.rawValue)" } ?? "")]
        if let reason = server.reason { lines += Terminal.field("why", reason) }
        if let reason = server.drillReason { lines += Terminal.field("drill", reason) }
        if let rpo = server.rpoSeconds { lines.append("  RPO now       \(Words.seconds(rpo))") }
        if let id = server.lastRecoveryPoint, let time = server.lastRecoveryPointTime {
            let held = server.heldPointCount > 0 ? ", \(server.heldPointCount) held" : ""
            lines += Terminal.field("last point", "\(id), cut \(Words.time(time)) (\(Words.count(server.recoveryPointCount, "point"))\(held); policy \(server.policy))")
        } else {
            let isHere = server.state == .failoverCommitted
            lines.append("  last point    none" + (isHere ? ": the machine runs here, and is not protected" : ": nothing to recover from"))
        }
        if server.state == .initialFullSync, let agent = server.agent {
            lines.append(
                "  full sync     \(Words.bytes(agent.fullSyncDoneBytes)) of \(Words.bytes(agent.fullSyncTotalBytes))"
                    + (server.secondsLeft.map { ", \(Words.seconds($0)) left" } ?? ""))
        }
        if server.state != .replicationInterrupted, let reason = server.agent?.reason { lines += Terminal.field("source", reason) }
        if let behind = server.behindBytes { lines.append("  behind        \(Words.bytes(behind))") }
        if let live = server.agent?.live { lines += liveTap(live) }
        for warning in server.specification?.warnings ?? [] { lines += Terminal.field("recovery", warning) }
        for machine in server.instances {
            var line = "  \(machine.kind == .drill ? "drill" : "machine")".padding(toLength: 16, withPad: " ", startingAt: 0)
            let hasFailed = machine.kind == .drill && machine.step == .starting && server.drillReason != nil
            line += (hasFailed ? "did not start" : machine.step.rawValue) + (machine.recoveryPoint.map { ", from \($0)" } ?? "")
            if let rto = machine.rtoSeconds { line += ", ready after \(Words.seconds(rto))" }
            lines.append(line)
        }
        if let proven = server.lastProven {
            lines += Terminal.field(
                "proven", "\(Words.time(proven.time)): a \(proven.kind.rawValue) from \(proven.recoveryPoint) booted in \(Words.seconds(proven.rtoSeconds))")
        } else if server.recoveryPointCount > 0 {
            lines += Terminal.field("proven", "never: no machine of it has passed a boot check yet (afterimage drill start \(server.name) --boot-check …)")
        }
        lines += Terminal.field("next", server.next)
        return lines
    }

    /// What the live tap can prove, and what the kernel kept from it.
    private static func liveTap(_ live: LiveTapStatistics) -> [String] {
        let cuts = live.provenCount + live.unprovenCount
        var words = "\(live.provenCount) of \(Words.count(cuts, "cut")) proven"
        if cuts > 0 { words += String(format: ", %.1f rounds each (%d at most)", Double(live.roundCount) / Double(cuts), live.roundsMax) }
        words += ", \(Words.count(live.collisionCount, "collision"))"
        if live.freezeCount > 0 { words += String(format: "; froze %d times, %.0f ms at most", live.freezeCount, live.freezeMillisecondsMax) }
        if live.freezeFailedCount > 0 { words += "; \(Words.count(live.freezeFailedCount, "freeze")) did not hold" }
        if live.unseenCompletionCount > 0 { words += "; \(Words.count(live.unseenCompletionCount, "completion")) of \(live.completedCount) not shown by the kernel (harmless)" }
        if let skipped = live.skippedProgramCount, skipped > 0 { words += "; \(Words.count(skipped, "program")) skipped by the kernel (each has copies)" }
        if live.openReconciliationCount > 0 { words += "; the kernel's account was asked again \(Words.count(live.openReconciliationCount, "time"))" }
        var lines = Terminal.field("live tap", words)
        if live.resyncCount > 0 { lines += Terminal.field("missed", "\(Words.count(live.resyncCount, "time")): \(live.resyncReason ?? "?")") }
        return lines
    }
}

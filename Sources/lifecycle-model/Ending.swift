import Foundation
import Glibc

/// Nobody is killed any more: what was begun must come to its end, everything must be possible that the model permits, and nothing may be left.
struct Ending: Sendable {
    let asks: Operator

    /// Every task ends, and whoever is followed replicates again.
    func heal() async throws {
        do {
            try await until("all tasks have ended, and all are Replicating again that are followed", seconds: 240) { try await late().isEmpty }
        } catch { throw Trouble("\(error): \(try await late().joined(separator: "; "))") }
    }

    /// What is still owed.
    private func late() async throws -> [String] {
        let servers: [ServerAnswer] = try await asks.get("/v1/servers")
        let behind = servers.filter { ["Enable Replicating", "Initial Full Sync"].contains($0.state) || $0.state == "Replication Interrupted" && $0.settings?.isPaused != true }
        return behind.map { "\($0.name) is \($0.place) (\($0.reason ?? "no reason"))" }
            + (try await asks.tasks()).filter { $0.status == "running" }.map { "task \($0.id), \($0.operation) of \($0.server ?? "?")" }
    }

    /// Takes everything back to nothing by what the model permits.
    func clear() async throws {
        for export in try await asks.get("/v1/exports", [ExportAnswer].self) {
            _ = await asks.ask(.unexport, of: export.server, Order(method: "DELETE", path: "/v1/servers/\(export.server)/recovery-points/\(export.recoveryPoint)/export"))
        }
        let servers: [ServerAnswer] = try await asks.get("/v1/servers")
        for server in servers {
            // So many steps are enough from everywhere: drill cleared, point changed, committed or stopped, unregistered.
            for step in 0... {
                guard let view = try await asks.serverWhenUp(server.name) else { break }
                guard step < 12 else { throw Trouble("\(view.name) does not come to an end; it is \(view.place)\(view.reason.map { ": " + $0 } ?? "")") }
                try await stepTowardsEnd(view)
            }
        }
    }

    private func stepTowardsEnd(_ view: ServerAnswer) async throws {
        let root = "/v1/servers/\(view.name)"
        func must(_ operation: Operation, _ method: String, _ path: String, _ body: JSON? = nil) async throws {
            switch await asks.ask(operation, of: view.name, Order(method: method, path: root + path, body: body)) {
            case .accepted(let task?): try await end(of: task)
            case .accepted(nil): break
            case .refused(let problem): throw Trouble("\(operation.rawValue) of \(view.name) in \(view.place) was refused at the end: \(problem.detail)")
            case .unanswered: throw Trouble("\(operation.rawValue) of \(view.name) was not answered, and nobody killed the appliance")
            }
        }
        if view.drill != nil { return try await must(.clearDrill, "DELETE", "/drill") }
        switch view.state {
        case "Enable Replicating", "Initial Full Sync", "Replicating": try await must(.stop, "DELETE", "/replication")
        case "Failover In Progress":
            guard let point = await asks.points(view.name).last else { throw Trouble("\(view.name) has no recovery point in \(view.place)") }
            try await must(.changePoint, "POST", "/failover/recovery-point", ["recoveryPoint": .string(point.id), "bootCheck": "none", "network": "none"])
        case "Failed Over": try await must(.commit, "POST", "/failover/commit", ["confirm": .string(view.name)])
        default:
            for point in await asks.allPoints(view.name) where point.hold != nil {
                try await must(.release, "DELETE", "/recovery-points/\(point.id)/hold", ["confirm": .string(point.hold!)])
            }
            try await must(.unregister, "DELETE", "", ["deletePoints": true, "stopMachine": true])
        }
    }

    private func end(of task: TaskAnswer) async throws {
        try await until("task \(task.id), \(task.operation) of \(task.server ?? "?"), ends", seconds: 180) {
            let now: TaskAnswer = try await asks.get("/v1/tasks/\(task.id)")
            return now.status != "running"
        }
    }

    /// What the appliance has written down; the places that servers were in.
    func judge() async throws -> Set<Place> {
        let ledger = asks.ledger, sites = asks.sites
        let tasks = try await asks.tasks()
        let events: [EventAnswer] = try await asks.get("/v1/events?limit=1000")
        guard tasks.count < 1000, events.count < 1000 else { throw Trouble("\(tasks.count) tasks and \(events.count) events are more than one answer holds: ask for fewer operations") }
        await ledger.judge(tasks: tasks)
        let places = await ledger.judge(events: events, servers: sites.servers)
        let status: StatusAnswer = try await asks.get("/v1/status")
        if !status.servers.isEmpty || status.store.forkCount + status.store.markCount > 0 { await ledger.violate("left at the end: \(status.servers.map(\.name)), \(status.store.forkCount) forks, \(status.store.markCount) marks") }
        // A machine's process may need a moment to be gone after its end was waited for by somebody else; its files not.
        for machine in Machine.all(below: sites.runtime) where machine.isAlive { await ledger.violate("left at the end: machine \(machine.instance), pid \(machine.pid)") }
        for directory in [sites.runtime, sites.state + "/instances"] {
            let left = (try? FileManager.default.contentsOfDirectory(atPath: directory)) ?? []
            if !left.isEmpty { await ledger.violate("left at the end in \(directory): \(left)") }
        }
        try await judgeCopies(tasks)
        return places
    }

    /// What an export that succeeded has made is there, and nothing of others.
    private func judgeCopies(_ tasks: [TaskAnswer]) async throws {
        let directory = asks.sites.directory + "/copies"
        let made = Set(tasks.filter { $0.operation == Operation.copyPoint.rawValue && $0.status == "succeeded" }.compactMap { $0.result?.path })
        let there = Set(try FileManager.default.contentsOfDirectory(atPath: directory).map { "\(directory)/\($0)" })
        if made != there { await asks.ledger.violate("exports that succeeded: \(made.sorted()); files that are there: \(there.sorted())") }
        for path in made {
            let size = try? FileManager.default.attributesOfItem(atPath: path)[.size] as? Int
            if size != Sites.diskBytes { await asks.ledger.violate("\(path) has \(size ?? 0) bytes") }
        }
    }

    /// After the last, graceful end: whole, and empty.
    static func judgeStore(_ sites: Sites, _ ledger: Ledger) async throws {
        if let status = try await sites.endAppliance(SIGTERM), status != 0 { await ledger.violate("the appliance ended with status \(status) after SIGTERM") }
        let (check, inspect) = try await sites.storeReport()
        if check.status != 0 { await ledger.violate("store check ended with \(check.status): \(check.output.suffix(500))") }
        if inspect.output.contains("\"group\"") { await ledger.violate("the store has a group of a server that is gone: \(inspect.output.prefix(600))") }
    }
}

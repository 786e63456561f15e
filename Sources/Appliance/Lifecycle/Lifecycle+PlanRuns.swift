import Foundation
import GRDB
import Replica

/// Runs of recovery plans, as operators begin, continue, resume, stop and clear them.
///
/// A run and its steps are rows; its work is a task. Whatever is asked for is one transaction on these, and the work follows: `performPlan` looks at the rows and
/// does what they say next. So it goes on after a crash as it began.
extension Lifecycle {
    public func planPreview(_ name: String, _ request: RunPlan) async throws -> PlanPreview {
        let plan = try await catalogue.read { db in try db.plan(name) }
        let without = Set(request.without ?? [])
        let servers = Self.planServers(plan.groups)
        if let stranger = without.first(where: { left in !servers.contains { $0.server == left } }) {
            throw ApplianceError.invalid("server \(stranger) cannot be left out: it is not in the plan \(name)")
        }
        guard request.kind == .failover || request.graceful != true else { throw ApplianceError.invalid("a drill never touches the source: graceful is for a failover") }
        var words: [String] = [], obstacles: [String] = []
        for group in plan.groups {
            let taken = (group.servers ?? []).filter { !without.contains($0.server) }
            if !taken.isEmpty { words.append("group \(group.name): \(taken.map(\.server).joined(separator: ", ")) \(taken.count == 1 ? "is" : "are") started") }
            for server in taken {
                do { words += try await says(server, request).map { "\(server.server): \($0)" } } catch { obstacles.append("\(server.server): \(error)") }
            }
            if let seconds = group.waitSeconds { words.append("group \(group.name): the run waits \(Amount.seconds(seconds))") }
            for script in group.scripts ?? [] where script.only.map({ $0 == request.kind }) ?? true {
                words.append("group \(group.name): \(script.words) runs on the appliance's host, for at most \(Amount.seconds(script.limitSeconds ?? PlanScript.limitSecondsStandard))")
                if let refusal = HostScript.refusal(script.path) { obstacles.append("group \(group.name): \(refusal)") }
            }
            for manual in group.manualSteps ?? [] where manual.only.map({ $0 == request.kind }) ?? true {
                words.append("group \(group.name): the run waits until somebody has done: \(manual.text)")
            }
        }
        return PlanPreview(plan: name, kind: request.kind, words: words, obstacles: obstacles, needsConfirmation: request.kind == .failover)
    }

    /// What becomes of a server; throws when it cannot be started now.
    private func says(_ planned: PlanServer, _ request: RunPlan) async throws -> [String] {
        let found: ServerRecord
        do { found = try await server(planned.server) } catch {
            throw ApplianceError.refused("The server is not there any more: edit the plan (afterimage plan edit), or leave it out (--without \(planned.server)).")
        }
        var machine = planned.machine ?? StartMachine()
        machine.graceful = request.graceful
        _ = try await machineSettings(found, machine)
        if request.kind == .failover {
            if found.state == .failedOver || found.state == .failoverCommitted { return ["is failed over already, and stays as it is"] }
            return try await failoverPreview(found.name, machine).words
        }
        if case .refused(let why) = StateTable.verdict(found.lifecycle, .drill, hasRecoveryPoint: hasRecoveryPoint(found)) { throw ApplianceError.refused(why) }
        let point = try point(of: found, named: machine.recoveryPoint)
        return ["a drill's machine starts from recovery point \(point.id), beside replication"]
    }

    public func runPlan(_ name: String, _ request: RunPlan, who: String) async throws -> TaskRecord {
        let preview = try await planPreview(name, request)
        guard preview.obstacles.isEmpty else {
            throw ApplianceError.refused("The plan \(name) cannot be run as a \(request.kind.rawValue) now (--without NAME leaves a server out): \(preview.obstacles.joined(separator: " "))")
        }
        guard !preview.needsConfirmation || request.confirm == name else {
            throw ApplianceError.refused("Running the plan \(name) as a failover fences its servers' sources: confirm it by the plan's name (--yes \(name)).")
        }
        if try await plan(name).groups.contains(where: { ($0.servers ?? []).contains { !(request.without ?? []).contains($0.server) } }) { try await machines.checkQEMU() }
        let task = try await catalogue.write { db in
            let plan = try db.plan(name)
            if let last = try db.lastRun(of: name), last.status.isActive {
                throw ApplianceError.refused("A run of the plan \(name) goes on (afterimage plan show \(name)): wait for it, or stop it (afterimage plan stop \(name)).")
            }
            var run = PlanRunRecord(id: nil, plan: name, kind: request.kind, isGraceful: request.graceful == true, status: .running, who: who, started: Date())
            try run.insert(db)
            for step in PlanStepRecord.steps(of: plan.definition, run: run.id ?? 0, kind: request.kind, without: request.without ?? []) { try step.insert(db) }
            let left = (request.without ?? []).isEmpty ? "" : ", without \((request.without ?? []).joined(separator: ", "))"
            try db.event(who, "Run recovery plan", detail: "\(name), run \(run.id ?? 0) as \(run.isGraceful ? "graceful " : "")\(run.kind.rawValue)\(left)")
            return try Self.begin(&run, who: who, in: db)
        }
        await start(task)
        return task
    }

    /// Somebody has done the manual step that the run waits for.
    public func continuePlan(_ name: String, who: String) async throws -> PlanRunView {
        try await catalogue.write { db in
            _ = try db.plan(name)
            guard let run = try db.lastRun(of: name), run.status == .running, let id = run.id,
                var step = try db.planSteps(id).first(where: { $0.kind == .manual && $0.status == .running })
            else { throw ApplianceError.refused("No run of the plan \(name) waits for a manual step (afterimage plan show \(name)).") }
            step.status = .done
            step.since = Date()
            try step.update(db)
            if let task = try TaskRecord.fetchOne(db, key: run.task) { try TaskBoard.log(task, "\(step.title): done, says \(who)", in: db) }
            try db.event(who, "Continue recovery plan", detail: "\(name), run \(id): \(step.words)")
            return PlanRunView(run, try db.planSteps(id))
        }
    }

    public func resumePlan(_ name: String, _ request: ResumePlan, who: String) async throws -> TaskRecord {
        let task = try await catalogue.write { db in
            _ = try db.plan(name)
            guard var run = try db.lastRun(of: name), run.status == .failed || run.status == .stopped else {
                throw ApplianceError.refused("No run of the plan \(name) has failed or was stopped (afterimage plan show \(name)).")
            }
            var words: [String] = []
            for var step in try db.planSteps(run.id ?? 0) where !step.status.isOver && !step.status.isOpen {
                step.status = request.skip == true ? .skipped : .waiting
                step.since = Date()
                if request.skip != true { step.error = nil }
                try step.update(db)
                words.append("\(step.title) is \(request.skip == true ? "skipped" : "tried again")")
            }
            try db.event(who, "Resume recovery plan", detail: "\(name), run \(run.id ?? 0)" + (words.isEmpty ? "" : ": " + words.joined(separator: "; ")))
            return try Self.begin(&run, who: who, in: db)
        }
        await start(task)
        return task
    }

    /// Nothing more is begun. Drills and failovers that have begun go on: their machines are what the run was for.
    public func stopPlan(_ name: String, who: String) async throws -> PlanRunView {
        let (view, task) = try await catalogue.write { db in
            _ = try db.plan(name)
            guard var run = try db.lastRun(of: name), run.status == .running else { throw ApplianceError.refused("No run of the plan \(name) goes on (afterimage plan show \(name)).") }
            let task = try Self.stop(&run, status: .stopped, why: "stopped by \(who)", in: db)
            try db.event(who, "Stop recovery plan", detail: "\(name), run \(run.id ?? 0)")
            return (PlanRunView(run, try db.planSteps(run.id ?? 0)), task)
        }
        if let task { await tasks.cancel(task) }
        return view
    }

    /// All drills of a run are cleared; one that goes on is stopped.
    public func clearPlan(_ name: String, who: String) async throws -> TaskRecord {
        let (task, old) = try await catalogue.write { db in
            _ = try db.plan(name)
            guard var run = try db.lastRun(of: name) else { throw ApplianceError.refused("The plan \(name) was never run.") }
            guard run.kind == .drill else { throw ApplianceError.refused("The last run of the plan \(name) was a failover: that is committed, server by server, not cleared (afterimage failover commit).") }
            if run.status == .clearing, let running = try TaskRecord.fetchOne(db, key: run.task), running.status == .running { return (running, nil as TaskRecord?) }
            guard run.status != .cleared else { throw ApplianceError.refused("The last run of the plan \(name) is cleared already.") }
            let old = run.status == .running ? try Self.stop(&run, status: .stopped, why: "cleared by \(who)", in: db) : nil
            try db.event(who, "Clear recovery plan", detail: "\(name), run \(run.id ?? 0)")
            return (try Self.begin(&run, status: .clearing, who: who, in: db), old)
        }
        if let old { await tasks.cancel(old) }
        await start(task)
        return task
    }

    /// The run's next work is a new task.
    private static func begin(_ run: inout PlanRunRecord, status: PlanRunStatus = .running, who: String, in db: Database) throws -> TaskRecord {
        let task = try TaskBoard.plan(
            .recoveryPlan, server: nil, parameters: TaskParameters(planRun: run.id, clearsPlan: status == .clearing ? true : nil), who: who, in: db)
        try TaskBoard.log(task, "plan \(run.plan), run \(run.id ?? 0) as \(run.kind.rawValue)" + (status == .clearing ? ": its drills are cleared" : ""), in: db)
        run.status = status
        run.task = task.id
        run.ended = nil
        run.error = nil
        try run.update(db)
        return task
    }

    /// Its task, whose work is to be cancelled.
    private static func stop(_ run: inout PlanRunRecord, status: PlanRunStatus, why: String, in db: Database) throws -> TaskRecord? {
        for var step in try db.planSteps(run.id ?? 0) where step.kind == .script && step.status == .running {
            step.status = .failed
            step.since = Date()
            step.error = "killed: the run was \(why)"
            try step.update(db)
        }
        run.status = status
        run.ended = Date()
        run.error = why
        try run.update(db)
        guard let task = try TaskRecord.fetchOne(db, key: run.task) else { return nil }
        try TaskBoard.finish(task, error: "the run was \(why)", in: db)
        return task
    }
}

import Foundation
import GRDB

/// The work of a recovery plan's run.
///
/// A step's row says how far it is, and is written before its work starts; a server's step and the task that it starts are one transaction. After a crash of the
/// appliance a server's step waits for its task, which goes on by itself; a wait ends when it would have ended; a script that had begun is run again only if the
/// plan says that it may be, since nobody knows what it has done: else the run stops there and asks.
extension Lifecycle {
    private static let pollMilliseconds = 200

    func performPlan(_ task: TaskRecord) async throws -> TaskResult {
        guard let id = task.parameters.planRun else { throw ApplianceError.failed("task \(task.id ?? 0) names no run of a plan") }
        if task.parameters.clearsPlan == true { return try await performClearPlan(id, task: task) }
        try await noteInterrupted(id, task: task)
        while true {
            let (run, steps) = try await planRun(id, of: task)
            guard let next = steps.first(where: { !$0.status.isOver }) else { return try await endPlan(run, task: task, error: nil) }
            let stage = steps.filter { $0.stage == next.stage && !$0.status.isOver }
            await tasks.report(task, TaskProgress(step: "\(next.groupName): \(stage.map(\.words).joined(separator: ", "))"))
            await withTaskGroup { group in
                for step in stage where step.status.isOpen { group.addTask { await self.performStep(step, of: run, task: task) } }
            }
            try Task.checkCancellation()
            let open = try await planRun(id, of: task).steps.filter { $0.stage == next.stage && !$0.status.isOver }
            if !open.isEmpty {
                let why = open.map { "\($0.title) \($0.status == .interrupted ? "was interrupted" : "failed"): \(Self.firstLine($0.error ?? "its end could not be stored"))" }.joined(separator: "; ")
                return try await endPlan(run, task: task, error: "\(why). See to it, then afterimage plan resume \(run.plan) tries again, and with --skip goes on without.")
            }
        }
    }

    /// The rest (a console's last lines) is in the step and in its task.
    private static func firstLine(_ text: String) -> String {
        let line = text.split(whereSeparator: \.isNewline).first.map(String.init) ?? text
        return line.hasSuffix(".") ? String(line.dropLast()) : line
    }

    /// As long as it is this task's to work on.
    private func planRun(_ id: Int64, of task: TaskRecord) async throws -> (run: PlanRunRecord, steps: [PlanStepRecord]) {
        try await catalogue.read { db in (try Self.planRun(id, of: task, in: db), try db.planSteps(id)) }
    }

    private static func planRun(_ id: Int64, of task: TaskRecord, in db: Database) throws -> PlanRunRecord {
        guard let run = try PlanRunRecord.fetchOne(db, key: id), run.task == task.id, run.status.isActive else { throw PlanRunEnded() }
        return run
    }

    /// The run's end and its task's are one.
    private func endPlan(_ run: PlanRunRecord, task: TaskRecord, error: String?) async throws -> TaskResult {
        var result = TaskResult()
        result.message = error == nil ? "the plan \(run.plan) has run as a \(run.kind.rawValue)" : nil
        let stored = result
        try await catalogue.write { db in
            var run = try Self.planRun(run.id ?? 0, of: task, in: db)
            run.status = error == nil ? .succeeded : .failed
            run.ended = Date()
            run.error = error
            try run.update(db)
            try TaskBoard.finish(task, result: error == nil ? stored : nil, error: error, in: db)
            try db.event("appliance", error == nil ? "Recovery plan has run" : "Recovery plan failed", detail: "\(run.plan), run \(run.id ?? 0)" + (error.map { ": \($0)" } ?? ""))
        }
        return result
    }

    /// A script that was at work when the appliance ended.
    private func noteInterrupted(_ id: Int64, task: TaskRecord) async throws {
        for step in try await planRun(id, of: task).steps where step.kind == .script && step.status == .running {
            let isRepeatable = step.work.script?.isRepeatable == true
            try await note(step, of: task) {
                $0.status = isRepeatable ? .waiting : .interrupted
                $0.error = isRepeatable ? nil : "the appliance ended while it ran: what it has done is not known"
            }
        }
    }

    /// A step's next state, in one transaction with what `also` stores.
    @discardableResult
    private func note(_ step: PlanStepRecord, of task: TaskRecord, _ change: @escaping @Sendable (inout PlanStepRecord) -> Void) async throws -> PlanStepRecord {
        try await catalogue.write { db in try Self.note(step, of: task, in: db, change) }
    }

    @discardableResult
    private static func note(_ step: PlanStepRecord, of task: TaskRecord, in db: Database, _ change: (inout PlanStepRecord) -> Void) throws -> PlanStepRecord {
        _ = try planRun(step.run, of: task, in: db)
        guard var stored = try PlanStepRecord.fetchOne(db, key: ["run": step.run, "number": Int64(step.number)]) else { throw ApplianceError.failed("\(step.title) is gone") }
        let before = stored.status
        change(&stored)
        if stored.status != before { stored.since = Date() }
        try stored.update(db)
        if stored.status != before { try TaskBoard.log(task, "\(stored.title): \(stored.status.rawValue)" + (stored.error.map { ": \($0)" } ?? ""), in: db) }
        return stored
    }

    private func performStep(_ step: PlanStepRecord, of run: PlanRunRecord, task: TaskRecord) async {
        do {
            switch step.kind {
            case .server: try await performServer(step, of: run, task: task)
            case .wait: try await performWait(step, task: task)
            case .script: try await performScript(step, of: run, task: task)
            case .manual: return try await awaitManual(step, task: task)
            }
            try await note(step, of: task) { $0.status = .done }
        } catch {
            // Stopped, by an operator or with the appliance: its row says what is so.
            if Task.isCancelled || isStopping || error is PlanRunEnded { return }
            let why = "\(error)"
            do {
                try await note(step, of: task) {
                    $0.status = .failed
                    $0.error = why
                }
            } catch { logger.error("cannot store that a plan's step failed (\(why)): \(error)") }
        }
    }

    // MARK: servers

    private func performServer(_ step: PlanStepRecord, of run: PlanRunRecord, task: TaskRecord) async throws {
        guard let planned = step.work.server else { throw ApplianceError.failed("\(step.title) names no server") }
        var child = step.status == .running ? step.tasks.last : nil
        if child == nil {
            child = run.kind == .drill ? try await beginDrill(planned, step, run, task) : try await beginFailover(planned, step, run, task)
        }
        guard let child else { return }
        let ended = try await taskEnd(child)
        guard ended.status == .succeeded else { throw ApplianceError.failed("task \(child) (\(ended.operation.rawValue)): \(ended.error ?? "failed")") }
    }

    private func beginDrill(_ planned: PlanServer, _ step: PlanStepRecord, _ run: PlanRunRecord, _ task: TaskRecord) async throws -> Int64? {
        // What an attempt of before has left.
        if try await catalogue.read({ db in try db.drill(of: step) }) != nil {
            await tasks.log(task, "\(step.title): the drill of before is cleared")
            if let id = try await clearDrill(planned.server, who: Self.who(run)).id { _ = try await taskEnd(id) }
        }
        return try await startDrill(planned.server, planned.machine ?? StartMachine(), for: nil, who: Self.who(run), noting: started(step, task)).id
    }

    /// nil: the server is failed over already.
    private func beginFailover(_ planned: PlanServer, _ step: PlanStepRecord, _ run: PlanRunRecord, _ task: TaskRecord) async throws -> Int64? {
        let found = try await server(planned.server)
        let (machine, running) = try await catalogue.read { db in
            (try db.instances(of: found, kind: .failover).last, try db.runningTask(of: found, [.failover, .changeRecoveryPoint, .startMachine]))
        }
        if let running, let id = running.id {
            try await catalogue.write { db in try self.started(step, task)(running, db) }
            return id
        }
        if found.state == .failedOver || found.state == .failoverCommitted {
            guard machine?.step == .ready else {
                throw ApplianceError.failed("\(found.name) is failed over, but its machine does not run (afterimage failover start-machine \(found.name)).")
            }
            await tasks.log(task, "\(step.title): is failed over already")
            return nil
        }
        var request = planned.machine ?? StartMachine()
        request.graceful = run.isGraceful ? true : nil
        return try await startFailover(found.name, request, who: Self.who(run), noting: started(step, task)).id
    }

    /// Part of the transaction that accepts a server's operation.
    private nonisolated func started(_ step: PlanStepRecord, _ task: TaskRecord) -> TaskNote {
        { child, db in
            try Self.note(step, of: task, in: db) {
                $0.status = .running
                if let id = child.id { $0.tasks.append(id) }
            }
        }
    }

    private static func who(_ run: PlanRunRecord) -> String { "\(run.who), plan \(run.plan)" }

    private func taskEnd(_ id: Int64) async throws -> TaskRecord {
        while true {
            guard let task = try await catalogue.read({ db in try TaskRecord.fetchOne(db, key: id) }) else { throw ApplianceError.failed("task \(id) is gone") }
            if task.status != .running { return task }
            try await Task.sleep(for: .milliseconds(Self.pollMilliseconds))
        }
    }

    // MARK: waits, scripts, people

    private func performWait(_ step: PlanStepRecord, task: TaskRecord) async throws {
        let noted = try await note(step, of: task) {
            $0.status = .running
            $0.until = $0.until ?? Date() + Double($0.work.waitSeconds ?? 0)
        }
        let left = (noted.until ?? Date()).timeIntervalSinceNow
        if left > 0 { try await Task.sleep(for: .seconds(left)) }
    }

    private func performScript(_ step: PlanStepRecord, of run: PlanRunRecord, task: TaskRecord) async throws {
        guard let script = step.work.script else { throw ApplianceError.failed("\(step.title) names no script") }
        try await note(step, of: task) { $0.status = .running }
        let host = HostScript(
            path: script.path, arguments: script.arguments ?? [],
            environment: ["AFTERIMAGE_PLAN": run.plan, "AFTERIMAGE_PLAN_RUN": "\(run.id ?? 0)", "AFTERIMAGE_PLAN_KIND": run.kind.rawValue],
            limitSeconds: script.limitSeconds ?? PlanScript.limitSecondsStandard)
        try await host.run { [tasks] line in await tasks.log(task, "\(script.path): \(line)") }
    }

    /// Until `continuePlan` has changed its row.
    private func awaitManual(_ step: PlanStepRecord, task: TaskRecord) async throws {
        if step.status == .waiting { try await note(step, of: task) { $0.status = .running } }
        while true {
            let now = try await planRun(step.run, of: task).steps.first { $0.number == step.number }
            if now?.status != .running { return }
            try await Task.sleep(for: .milliseconds(Self.pollMilliseconds))
        }
    }

    // MARK: Clear

    private func performClearPlan(_ id: Int64, task: TaskRecord) async throws -> TaskResult {
        let (run, steps) = try await planRun(id, of: task)
        do {
            var clearing: [Int64] = []
            for step in steps where step.kind == .server {
                guard let server = step.work.server?.server, try await catalogue.read({ db in try db.drill(of: step) }) != nil else { continue }
                if let child = try await clearDrill(server, who: Self.who(run)).id { clearing.append(child) }
            }
            if !clearing.isEmpty { await tasks.log(task, "drills are cleared: task \(clearing.map(String.init).joined(separator: ", "))") }
            for child in clearing {
                let ended = try await taskEnd(child)
                guard ended.status == .succeeded else { throw ApplianceError.failed("the drill of \(ended.serverName ?? "?") is not cleared (task \(child)): \(ended.error ?? "failed")") }
            }
        } catch {
            if Task.isCancelled || isStopping { throw error }
            return try await endPlan(run, task: task, error: "\(error)")
        }
        var result = TaskResult()
        result.message = "the drills of the plan \(run.plan) are gone"
        let stored = result
        try await catalogue.write { db in
            var run = try Self.planRun(id, of: task, in: db)
            run.status = .cleared
            run.ended = Date()
            try run.update(db)
            try TaskBoard.finish(task, result: stored, in: db)
        }
        return result
    }
}

/// The run is no longer the task's to work on: it was stopped or cleared, and its task has ended with that.
struct PlanRunEnded: Error {}

import BlockTap
import Foundation
import GRDB
import Replica

/// Disaster Recovery Drill: a machine from a fork beside running replication, isolated, kept until it is cleared.
extension Lifecycle {
    public func startDrill(_ name: String, _ request: StartMachine, who: String) async throws -> TaskRecord {
        try await startDrill(name, request, for: nil, who: who)
    }

    /// `schedule`: the one that wants it; that it was started is stored with it. `note` is part of the transaction that accepts it, too.
    func startDrill(_ name: String, _ request: StartMachine, for schedule: DrillScheduleRecord?, who: String, noting note: TaskNote? = nil) async throws -> TaskRecord {
        guard request.graceful == nil else { throw ApplianceError.invalid("a drill never touches the source: graceful is for a failover") }
        let found = try await server(name)
        if case .refused(let why) = StateTable.verdict(found.lifecycle, .drill, hasRecoveryPoint: hasRecoveryPoint(found)) {
            throw ApplianceError.refused(why)
        }
        let point = try point(of: found, named: request.recoveryPoint)
        let machine = try await machineSettings(found, request, kind: .drill)
        try await checkHost(machine)
        let instance = InstanceRecord(
            id: Names.unique("drill"), server: found.id, kind: .drill, step: .planned, point: point.id,
            pointCutTimeNanoseconds: Int64(point.cutTimeNanoseconds), settings: machine, volumes: try volumeNames(found, point), accepted: Date())
        let task = try await catalogue.write { db in
            var record = try db.server(found.id)
            try db.apply(.drill, to: &record, who: who, hasRecoveryPoint: true, detail: "recovery point \(point.id)")
            try instance.insert(db)
            try schedule?.advance(in: db)
            let task = try TaskBoard.plan(
                .drill, server: record, parameters: TaskParameters(instance: instance.id, isScheduled: schedule == nil ? nil : true), who: who, in: db)
            try note?(task, db)
            return task
        }
        await start(task)
        return task
    }

    func performDrill(_ task: TaskRecord) async throws -> TaskResult {
        let instance = try await instance(task)
        do {
            let result = try await afterBoot(task, try await bringUp(instance, task: task, then: .drillReady))
            let console = machines.consoleTail(instance.id)
            try await catalogue.write { db in try Self.endDrill(task, instance, .passed, outcome: result, console: console, in: db) }
            return result
        } catch {
            // Cancelled by a clear or by the appliance's end: not this task's failure to tell.
            if !Task.isCancelled {
                let (why, console) = ("\(error)", machines.consoleTail(instance.id))
                await moved(.drillFailed, instance.server, reason: why)
                try await catalogue.write { db in try Self.endDrill(task, instance, .failed, error: why, console: console, in: db) }
            }
            throw error
        }
    }

    /// Clear Test Failover Environment. While it runs, asking again gives the same task. Gracefully: the machine's system is shut down first.
    public func clearDrill(_ name: String, _ request: ClearDrill = ClearDrill(), who: String) async throws -> TaskRecord {
        let found = try await server(name)
        let (task, drills) = try await catalogue.write { db -> (TaskRecord, [TaskRecord]?) in
            var record = try db.server(found.id)
            if let running = try db.runningTask(of: record, [.clearDrill]) { return (running, nil) }
            try db.apply(.clearDrill, to: &record, who: who, hasRecoveryPoint: true)
            let drills = try TaskBoard.running([.drill], of: record, in: db)
            for drill in drills {
                let instance = try drill.parameters.instance.flatMap { try InstanceRecord.fetchOne(db, key: $0) }
                try Self.endDrill(drill, instance, .cleared, error: "the drill was cleared by \(who)", in: db)
            }
            let parameters = TaskParameters(isGraceful: request.graceful == true ? true : nil)
            return (try TaskBoard.plan(.clearDrill, server: record, parameters: parameters, who: who, in: db), drills)
        }
        // Whoever asked first starts it, once the drill's own work is over: that would bring up again what is taken down.
        guard let drills else { return task }
        for drill in drills { await tasks.cancel(drill) }
        await start(task)
        return task
    }

    func performClearDrill(_ task: TaskRecord) async throws -> TaskResult {
        guard let id = task.server else { throw ApplianceError.failed("the task has no server") }
        let record = try await server(id)
        for instance in try await catalogue.read({ db in try db.instances(of: record, kind: .drill) }) {
            if task.parameters.isGraceful == true, instance.step != .removing {
                await machines.shutDown(instance, secondsMax: Self.shutDownSeconds) { [tasks] line in await tasks.log(task, line) }
                try Task.checkCancellation()
            }
            try await takeDown(instance, task: task)
        }
        await moved(.drillCleared, id)
        FaultPoint.stateMoved.reached(task.operation)
        var result = TaskResult()
        result.message = "the drill's machine, disks and network are gone"
        return result
    }

    // MARK: shared with failover

    /// Disks of a machine from this point. One that was added to the server later is not among them.
    func volumeNames(_ server: ServerRecord, _ point: RecoveryPoint) throws -> [String] {
        try store.volumes(of: point.id, in: server.group).map(\.name)
    }

    /// Disks of its server that a machine does not have, in words; nil: it has all.
    func lacking(_ instance: InstanceRecord) -> String? {
        let missing = (store.group(GroupID(instance.server))?.volumes ?? []).map(\.name).filter { !instance.volumes.contains($0) }
        return missing.isEmpty ? nil : "the machine has no disk \(missing.joined(separator: ", ")), which was added to the server after this recovery point"
    }

    /// Fork, disks, QEMU, boot check. Every step may be repeated; what is there already is taken over. `happening` moves the server's state together with the
    /// machine's.
    func bringUp(_ planned: InstanceRecord, task: TaskRecord, then happening: Trigger) async throws -> TaskResult {
        try await update(planned.id) { $0.step = .starting }
        let log: @Sendable (String) async -> Void = { [tasks] line in await tasks.log(task, line) }
        let instance = try await settleFirmware(planned, log: log)
        let seconds = String(format: "%.1f", max(0, Date().timeIntervalSince1970 - Double(instance.pointCutTimeNanoseconds) / 1e9))
        await log("recovery point \(instance.point?.rawValue ?? "?"), cut \(seconds) s ago")
        if let lacking = lacking(instance) { await log("WARNING: \(lacking)") }
        if let warning = instance.point.flatMap({ damageWarning($0, of: GroupID(instance.server)) }) { await log(warning) }
        try await turnToBoot(task)
        defer { leaveBoot() }
        await tasks.report(task, TaskProgress(step: "fork and disks"))
        let started = try await machines.attach(instance, mayStart: true, log: log)
        try await update(instance.id) {
            $0.pid = started.pid
            $0.accelerator = started.accelerator?.rawValue ?? $0.accelerator
        }
        await tasks.report(task, TaskProgress(step: "boot check"))
        FaultPoint.bootCheckBegun.reached(task.operation)
        let line: String?
        do { line = try await machines.bootCheck(instance, facts: await facts(instance)) } catch {
            if !Task.isCancelled {
                let why = "\(error)"
                await keepScreenshot(instance, task: task)
                try await update(instance.id) {
                    $0.step = .unproven
                    $0.reason = why
                }
            }
            throw error
        }
        let ready = Date()
        let rto = ready.timeIntervalSince(instance.accepted)
        let proven = line.flatMap { line in
            instance.point.map {
                ProvenRecovery(
                    kind: instance.kind, time: ready, recoveryPoint: $0, recoveryPointTime: Date(nanoseconds: UInt64(instance.pointCutTimeNanoseconds)),
                    rtoSeconds: rto, bootLine: line)
            }
        }
        // One transaction: nothing may fail once the machine is ready.
        let hydrates = settings.hydrates && happening == .failoverReady
        let hydration = try await catalogue.write { db -> TaskRecord? in
            if var stored = try InstanceRecord.fetchOne(db, key: instance.id) {
                stored.step = .ready
                stored.ready = ready
                stored.rtoMilliseconds = Int64(rto * 1000)
                stored.bootLine = line
                stored.reason = nil
                try stored.update(db)
            }
            guard var record = try ServerRecord.fetchOne(db, key: instance.server) else { return nil }
            if let proven {
                record.lastProven = proven
                try record.update(db)
            }
            try db.apply(happening, to: &record, who: "appliance", hasRecoveryPoint: true)
            return hydrates ? try Self.planHydration(of: instance, record, in: db) : nil
        }
        FaultPoint.readyStored.reached(task.operation)
        FaultPoint.stateMoved.reached(task.operation)
        if let hydration { await start(hydration) }
        // It may have ended before that was stored, when nobody would have been told.
        if !(await machines.isRunning(instance.id)) { await machineEnded(instance.id, await machines.lastWords(instance.id)) }
        await log(line.map { "boot check passed after \(String(format: "%.2f", rto)) s: \($0)" } ?? "the machine runs after \(String(format: "%.2f", rto)) s (no boot check was asked for)")
        await keepScreenshot(instance, task: task)
        var result = TaskResult()
        result.recoveryPoint = instance.point
        result.cutTimeNanoseconds = UInt64(instance.pointCutTimeNanoseconds)
        result.generation = instance.generation.map(UInt64.init)
        result.instance = instance.id
        result.rtoSeconds = rto
        result.bootLine = line
        result.accelerator = started.accelerator?.rawValue ?? instance.accelerator
        return result
    }

    /// So many machines boot at once; the others wait here, in the order of their coming.
    func turnToBoot(_ task: TaskRecord) async throws {
        if await machines.boots.isFull {
            await tasks.report(task, TaskProgress(step: "waiting for other machines to boot"))
            await tasks.log(task, "\(machines.boots.limit == 1 ? "one machine boots" : "\(machines.boots.limit) machines boot") at once: waiting for one of them")
        }
        try await machines.boots.enter()
    }
    func leaveBoot() { Task { [machines] in await machines.boots.leave() } }

    /// Applies a happening of the appliance's own.
    func moved(_ trigger: Trigger, _ server: String, reason: String? = nil) async {
        do {
            try await catalogue.write { db in
                guard var record = try ServerRecord.fetchOne(db, key: server) else { return }
                try db.apply(trigger, to: &record, who: "appliance", hasRecoveryPoint: true, reason: reason)
            }
        } catch {
            logger.error("cannot store that \(trigger.rawValue): \(error)", metadata: ["server": "\(server)"])
        }
    }
}

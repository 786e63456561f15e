import Foundation
import GRDB
import Replica

/// The work behind tasks, and how it goes on after a crash.
extension Lifecycle {
    /// Called once, before agents and operators are let in: re-adopts machines, serves exports again, goes on with unfinished tasks.
    public func resume() async throws {
        let (servers, instances, running, exported) = try await catalogue.read { db in
            (
                try ServerRecord.fetchAll(db), try InstanceRecord.fetchAll(db),
                try TaskRecord.filter(Column("status") == TaskStatus.running).order(Column("id")).fetchAll(db),
                try PointExportRecord.fetchAll(db)
            )
        }
        await machines.reportUnknown(known: Set(instances.map(\.id)))
        await machines.bridges.releaseUnknown(Set(instances.map(\.id)))
        // These happen beside their machine, which goes on; the other tasks bring theirs up, or down, themselves.
        let beside: Set<Trigger> = [.commitFailover, .startReverse, .hydrateMachine, .promoteMachine]
        let busy = Set(running.filter { !beside.contains($0.operation) }.flatMap { [$0.parameters.instance, $0.parameters.replaces] }.compactMap { $0 })
        for instance in instances where !busy.contains(instance.id) { await revive(instance) }
        for export in exported {
            guard let server = servers.first(where: { $0.id == export.server }) else { continue }
            do { _ = try await exports.begin(export, serverName: server.name) } catch {
                logger.error("cannot serve an exported recovery point again: \(error)", metadata: ["server": "\(server.name)"])
                if !store.recoveryPoints(server.group).contains(where: { $0.id == export.point }) { await forget(export) }
            }
        }
        // No agent is connected yet: what was followed is interrupted until its agent is back.
        for server in servers where server.state.phase == .forward {
            await happened(.linkLost, server.serverID, reason: "the appliance was restarted; waiting for the agent")
        }
        await forgetMounts()
        await removeUnfinishedCopies()
        await removeEmptyGroups(but: Set(servers.map(\.group)))
        await resumeReverse()
        for task in running {
            if task.operation != .startReplication { await tasks.log(task, "the appliance was restarted: going on") }
            await start(task)
        }
    }

    /// Its point was deleted in the moment in which the appliance was killed.
    private func forget(_ export: PointExportRecord) async {
        do {
            try await exports.end(export.id)
            try await catalogue.write { db in
                try PointExportRecord.deleteOne(db, key: export.id)
                try db.event("appliance", "End export", server: try ServerRecord.fetchOne(db, key: export.server), detail: "\(export.point): it is gone")
            }
        } catch { logger.error("cannot end the export of \(export.point): \(error)") }
    }

    /// Of servers that were unregistered in the moment in which their replication was started, and the appliance killed. One that holds anything stays: a
    /// catalogue may have been lost.
    private func removeEmptyGroups(but known: Set<GroupID>) async {
        for group in store.groups() where !known.contains(group.id) {
            guard group.recoveryPointCount == 0, group.layerCount == 0, !store.forks().contains(where: { $0.group == group.id }) else {
                logger.warning("the store has a group of no server in the catalogue, and keeps it", metadata: ["group": "\(group.id)"])
                continue
            }
            do { try await blocking { [store] in try store.deleteGroup(group.id) } } catch {
                logger.error("an empty group of no server cannot be removed: \(error)", metadata: ["group": "\(group.id)"])
            }
        }
    }

    /// Starts a task's work in the background.
    func start(_ task: TaskRecord) async {
        // Start Replication is the agent's work; its statuses end the task.
        if task.operation == .startReplication { return }
        FaultPoint.intentStored.reached(task.operation)
        await tasks.run(task) { await self.perform(task) }
    }

    private func perform(_ task: TaskRecord) async {
        do {
            // Ended before its work began: what ended it found no work to cancel.
            guard try await catalogue.read({ db in try TaskRecord.fetchOne(db, key: task.id)?.status }) == .running else { return }
            let result: TaskResult
            switch task.operation {
            case .drill: result = try await performDrill(task)
            case .clearDrill: result = try await performClearDrill(task)
            case .failover: result = try await performFailover(task)
            case .changeRecoveryPoint: result = try await performChangePoint(task)
            case .startMachine: result = try await performStartMachine(task)
            case .stopMachine: result = try await performStopMachine(task)
            case .commitFailover: result = try await performCommit(task)
            case .createRecoveryPoint: result = try await performCreatePoint(task)
            case .exportRecoveryPoint: result = try await performCopy(task)
            case .hydrateMachine: result = try await performHydration(task)
            case .promoteMachine: result = try await performPromotion(task)
            case .unregister: result = try await performUnregister(task)
            case .startReverse: result = try await performStartReverse(task)
            case .failback: result = try await performFailback(task)
            case .recoveryPlan: result = try await performPlan(task)
            default: throw ApplianceError.failed("task \(task.id ?? 0) has no work")
            }
            try await tasks.finish(task, result: result)
        } catch {
            // Stopped with the appliance: the intent stays and the next start goes on.
            if Task.isCancelled || isStopping || error is PlanRunEnded { return }
            await tasks.log(task, "failed: \(error)")
            do { try await tasks.finish(task, error: "\(error)") } catch {
                logger.error("cannot store that a task failed: \(error)", metadata: ["task": "\(task.id ?? 0)"])
            }
        }
    }

    /// Ends a task that an operator may take back: what it had half made is removed.
    public func cancelTask(_ id: Int64, who: String) async throws -> TaskRecord {
        let task = try await catalogue.write { db in
            guard let task = try TaskRecord.fetchOne(db, key: id) else { throw ApplianceError.notFound("There is no task \(id) (afterimage task list).") }
            guard task.status == .running else { throw ApplianceError.refused("Task \(id) has ended already.") }
            guard task.operation != .recoveryPlan else { throw ApplianceError.refused("The run of a recovery plan is ended by its name (afterimage plan stop).") }
            guard [.exportRecoveryPoint, .createRecoveryPoint, .hydrateMachine, .promoteMachine].contains(task.operation) else {
                throw ApplianceError.refused("\(task.operation.rawValue) is not ended by cancelling its task; the state of the server decides what can be done (afterimage server show \(task.serverName ?? "")).")
            }
            try TaskBoard.finish(task, error: "cancelled by \(who)", in: db)
            try db.event(who, "Cancel task", server: try task.server.flatMap { try ServerRecord.fetchOne(db, key: $0) }, detail: "\(task.operation.rawValue), task \(id)")
            return task
        }
        await tasks.cancel(task)
        return try await catalogue.read { db in try TaskRecord.fetchOne(db, key: id) ?? task }
    }

    /// A machine at rest after a restart of the appliance: adopt it; a failed-over one that is gone is started again, in its turn.
    func revive(_ instance: InstanceRecord) async {
        switch instance.step {
        case .ready, .unproven:
            do {
                let adopted = try await machines.attach(instance, mayStart: false, log: { [logger] line in logger.info("\(line)") })
                try await update(instance.id) { $0.pid = adopted.pid }
            } catch {
                await machineEnded(instance.id, "\(error)", isFoundGone: true)
            }
        case .planned, .starting, .stopped:
            break
        case .removing:
            do {
                // A roll-back that could not be ended before; its task has failed already.
                let last = try await catalogue.read { db in
                    try db.lastTask(of: instance.server, [.failover, .changeRecoveryPoint])
                }
                if instance.kind == .failover, let last, last.operation == .failover, last.parameters.instance == instance.id {
                    try await rollBack(instance, task: last, reason: last.error ?? "the failover failed")
                } else {
                    try await takeDown(instance, task: nil)
                }
            } catch {
                logger.error("cannot take down \(instance.id): \(error)")
            }
        }
    }

    func update(_ id: String, _ change: @escaping @Sendable (inout InstanceRecord) -> Void) async throws {
        try await catalogue.write { db in
            guard var instance = try InstanceRecord.fetchOne(db, key: id) else { return }
            change(&instance)
            try instance.update(db)
        }
    }

    func instance(_ task: TaskRecord) async throws -> InstanceRecord {
        guard let id = task.parameters.instance, let instance = try await catalogue.read({ db in try InstanceRecord.fetchOne(db, key: id) }) else {
            throw ApplianceError.failed("the machine of task \(task.id ?? 0) is gone")
        }
        return instance
    }

    /// Everything of an instance goes: QEMU, sockets, fork, files, record. May be repeated.
    func takeDown(_ instance: InstanceRecord, task: TaskRecord?) async throws {
        try await update(instance.id) { $0.step = .removing }
        FaultPoint.removalStored.reached(task?.operation)
        try await machines.takeDown(instance)
        try await catalogue.write { db in _ = try InstanceRecord.deleteOne(db, key: instance.id) }
        FaultPoint.recordRemoved.reached(task?.operation)
        if let task { await tasks.log(task, "machine \(instance.id) and its fork are gone") }
    }
}

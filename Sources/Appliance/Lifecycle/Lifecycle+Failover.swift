import BlockTap
import Foundation
import GRDB
import Replica

/// Failover, Change Recovery Point, Commit Failover.
///
/// Order of a failover: what can be refused is refused first (QEMU missing, no point) → generation raised (the fence; durable in the
/// store) → point chosen (so the newest point is the last that can ever be) → fork → machine → boot check. A failure before the
/// machine runs is rolled back: fork gone, Replication Interrupted, replication free to go on under the new generation. A machine
/// that runs but fails its check is kept for inspection; another point may be chosen.
extension Lifecycle {
    /// `note` is part of the transaction that accepts it.
    func startFailover(_ name: String, _ request: StartMachine, who: String, noting note: TaskNote? = nil) async throws -> TaskRecord {
        let accepted = Date()
        let found = try await server(name)
        if case .refused(let why) = StateTable.verdict(found.lifecycle, .failover, hasRecoveryPoint: hasRecoveryPoint(found)) {
            throw ApplianceError.refused(why)
        }
        try refuseMove(of: found, request)
        let isNamed = request.recoveryPoint.map { $0 != "latest" } ?? false
        let point = try point(of: found, named: request.recoveryPoint)
        let machine = try await machineSettings(found, request)
        try await checkHost(machine)
        try await machines.checkQEMU()
        let instance = InstanceRecord(
            id: Names.unique("failover"), server: found.id, kind: .failover, step: .planned, point: isNamed ? point.id : nil,
            pointCutTimeNanoseconds: Int64(point.cutTimeNanoseconds), settings: machine, volumes: try volumeNames(found, point), accepted: accepted)
        let task = try await catalogue.write { db in
            var record = try db.server(found.id)
            record.resumes = false
            try db.apply(
                .failover, to: &record, who: who, hasRecoveryPoint: true,
                detail: request.graceful == true ? "graceful" : "recovery point \(isNamed ? point.id.rawValue : "current point in time")")
            try TaskBoard.finishAll([.startReplication], of: record, error: "a failover was started by \(who)", in: db)
            try instance.insert(db)
            let task = try TaskBoard.plan(.failover, server: record, parameters: TaskParameters(instance: instance.id, isGraceful: request.graceful), who: who, in: db)
            try note?(task, db)
            return task
        }
        await start(task)
        return task
    }

    func performFailover(_ task: TaskRecord) async throws -> TaskResult {
        // What fails after the machine is ready rolls nothing back.
        try await afterBoot(task, try await failOver(task))
    }

    private func failOver(_ task: TaskRecord) async throws -> TaskResult {
        var instance = try await instance(task)
        do {
            guard instance.step != .removing else { throw ApplianceError.failed("the appliance ended while it was being rolled back") }
            instance = task.parameters.isGraceful == true ? try await fenceGracefully(instance, task: task) : try await fence(instance, task: task)
            return try await bringUp(instance, task: task, then: .failoverReady)
        } catch {
            if Task.isCancelled { throw error }
            // Ready before the appliance was killed, and now in use: not this task's to take down.
            guard try await server(instance.server).state == .failoverInProgress else { throw error }
            let stored = try await self.instance(task)
            if stored.step == .unproven {
                await noteFailoverTrouble(instance.server, "\(error)")
            } else {
                await tasks.log(task, "failed, and is rolled back: \(error)")
                do { try await rollBack(stored, task: task, reason: "the failover failed: \(error)") } catch let trouble {
                    await noteFailoverTrouble(instance.server, "the failover failed (\(error)), and could not be rolled back: \(trouble)")
                }
            }
            throw error
        }
    }

    /// Its machine goes. That it is gone, that replication may go on and that the task has failed is one transaction: a later failover must not meet an
    /// earlier one's end.
    func rollBack(_ instance: InstanceRecord, task: TaskRecord, reason: String) async throws {
        try await update(instance.id) { $0.step = .removing }
        FaultPoint.removalStored.reached(task.operation)
        try await machines.takeDown(instance)
        await tasks.log(task, "rolled back: replication may go on")
        try await catalogue.write { db in
            _ = try InstanceRecord.deleteOne(db, key: instance.id)
            if var record = try ServerRecord.fetchOne(db, key: instance.server) {
                try db.apply(.failoverFailed, to: &record, who: "appliance", hasRecoveryPoint: true, reason: reason)
            }
            try TaskBoard.finish(task, error: reason, in: db)
        }
        FaultPoint.stateMoved.reached(task.operation)
        await offerReplication(instance.server)
    }

    /// Raises the generation and settles the recovery point; both durable before anything is built on them.
    func fence(_ instance: InstanceRecord, task: TaskRecord) async throws -> InstanceRecord {
        var fenced = instance
        let group = GroupID(instance.server)
        if instance.generation == nil {
            let generation = try await blocking { [store] in try store.raiseGeneration(group) }
            fenced.generation = Int64(generation.rawValue)
            FaultPoint.fenced.reached(task.operation)
            await tasks.log(task, "\(generation): the source is fenced, replication is stopped")
        }
        if instance.point == nil {
            let record = try await server(instance.server)
            let newest = try point(of: record, named: nil)
            fenced.point = newest.id
            fenced.pointCutTimeNanoseconds = Int64(newest.cutTimeNanoseconds)
            fenced.volumes = try volumeNames(record, newest)
        }
        let settled = fenced
        try await update(instance.id) {
            $0.generation = settled.generation
            $0.point = settled.point
            $0.pointCutTimeNanoseconds = settled.pointCutTimeNanoseconds
            $0.volumes = settled.volumes
        }
        FaultPoint.generationStored.reached(task.operation)
        await tellOrder(ServerID(instance.server))
        return settled
    }

    /// After a failover that was rolled back: a source that still lives is followed again.
    private func offerReplication(_ server: String) async {
        do {
            let volumes = store.group(GroupID(server))?.volumes ?? []
            let record = try await catalogue.write { db in
                var record = try db.server(server)
                if record.state.phase == .forward { try Self.takeIn(&record, protected: volumes, in: db) }
                return record
            }
            if record.state.phase != .failover { await tellOrder(record.serverID) }
        } catch {
            logger.error("replication is not offered again: \(error)", metadata: ["server": "\(server)"])
        }
    }

    private func noteFailoverTrouble(_ server: String, _ why: String) async {
        do {
            try await catalogue.write { db in
                var record = try db.server(server)
                record.reason = why
                try record.update(db)
                try db.event("appliance", Trigger.failoverFailed.rawValue, server: record, before: record.lifecycle.text, after: record.lifecycle.text, detail: why)
            }
        } catch {
            logger.error("cannot store why a failover failed: \(error)", metadata: ["server": "\(server)"])
        }
    }

    /// Replaces the failed-over machine by one from another point. The old one and all it has written are deleted.
    public func changeRecoveryPoint(_ name: String, _ request: StartMachine, who: String) async throws -> TaskRecord {
        guard request.graceful == nil else { throw ApplianceError.invalid("graceful is for a failover, while the source is alive") }
        let accepted = Date()
        let found = try await server(name)
        if case .refused(let why) = StateTable.verdict(found.lifecycle, .changeRecoveryPoint, hasRecoveryPoint: true) {
            throw ApplianceError.refused(why)
        }
        guard let wanted = request.recoveryPoint, wanted != "latest" else {
            throw ApplianceError.invalid("name the recovery point (--point ID): the current point in time can be had only once (afterimage recovery-point list \(found.name))")
        }
        let point = try point(of: found, named: wanted)
        let old = try await catalogue.read { db in try db.instances(of: found, kind: .failover) }.last
        let machine = try await machineSettings(found, request, replaced: old)
        try await checkHost(machine, replaced: old)
        try await machines.checkQEMU()
        let generation = store.group(found.group)?.generation.rawValue
        let instance = InstanceRecord(
            id: Names.unique("failover"), server: found.id, kind: .failover, step: .planned, point: point.id,
            pointCutTimeNanoseconds: Int64(point.cutTimeNanoseconds), settings: machine, volumes: try volumeNames(found, point),
            generation: generation.map(Int64.init), accepted: accepted)
        let task = try await catalogue.write { db in
            var record = try db.server(found.id)
            if let running = try db.runningTask(of: record, [.failover, .changeRecoveryPoint, .startMachine, .stopMachine]) {
                throw ApplianceError.refused("Task \(running.id ?? 0) (\(running.operation.rawValue)) is at work on this server: wait for it (afterimage task show \(running.id ?? 0)).")
            }
            record.reason = nil
            try db.apply(.changeRecoveryPoint, to: &record, who: who, hasRecoveryPoint: true, detail: "recovery point \(point.id)")
            try instance.insert(db)
            return try TaskBoard.plan(
                .changeRecoveryPoint, server: record, parameters: TaskParameters(instance: instance.id, replaces: old?.id), who: who, in: db)
        }
        await start(task)
        return task
    }

    func performChangePoint(_ task: TaskRecord) async throws -> TaskResult {
        try await afterBoot(task, try await changePoint(task))
    }

    private func changePoint(_ task: TaskRecord) async throws -> TaskResult {
        let instance = try await instance(task)
        do {
            if let id = task.parameters.replaces, let old = try await catalogue.read({ db in try InstanceRecord.fetchOne(db, key: id) }) {
                try await takeDown(old, task: task)
            }
            return try await bringUp(instance, task: task, then: .failoverReady)
        } catch {
            if Task.isCancelled { throw error }
            guard try await server(instance.server).state == .failoverInProgress else { throw error }
            await noteFailoverTrouble(instance.server, "\(error)")
            if let stored = try? await self.instance(task), stored.step != .unproven { try await takeDown(stored, task: task) }
            throw error
        }
    }

    /// A failed-over machine that has stopped (it was shut down, or its QEMU died) is started again from its own disks.
    public func startMachine(_ name: String, who: String) async throws -> TaskRecord {
        let found = try await server(name)
        let task = try await catalogue.write { db in
            var record = try db.server(found.id)
            if let running = try db.runningTask(of: record, [.startMachine]) { return running }
            if let running = try db.runningTask(of: record, [.stopMachine]) {
                throw ApplianceError.refused("Task \(running.id ?? 0) stops this machine: wait for it (afterimage task show \(running.id ?? 0)).")
            }
            try db.apply(.startMachine, to: &record, who: who, hasRecoveryPoint: true)
            guard let machine = try db.instances(of: record, kind: .failover).last else {
                throw ApplianceError.refused("The failed-over machine of \(record.name) is gone: choose a point (afterimage failover change-recovery-point).")
            }
            return try TaskBoard.plan(.startMachine, server: record, parameters: TaskParameters(instance: machine.id), who: who, in: db)
        }
        await start(task)
        return task
    }

    func performStartMachine(_ task: TaskRecord) async throws -> TaskResult {
        let instance = try await instance(task)
        try await turnToBoot(task)
        defer { leaveBoot() }
        let started = try await machines.attach(instance, mayStart: true, log: { [tasks] line in await tasks.log(task, line) })
        try await update(instance.id) { $0.pid = started.pid }
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
        try await update(instance.id) {
            $0.step = .ready
            $0.reason = nil
        }
        if !(await machines.isRunning(instance.id)) { await machineEnded(instance.id, await machines.lastWords(instance.id)) }
        await keepScreenshot(instance, task: task)
        if let address = instance.settings.address { await give(address, to: instance, task: task) }
        var result = TaskResult()
        result.instance = instance.id
        result.recoveryPoint = instance.point
        result.bootLine = line
        result.message = "the machine runs, with all that it had written"
        return result
    }

    // MARK: Commit

    /// What a commit would keep and delete: to be said before.
    public func commitPreview(_ name: String) async throws -> CommitPreview {
        let found = try await server(name)
        if case .refused(let why) = StateTable.verdict(found.lifecycle, .commitFailover, hasRecoveryPoint: true) { throw ApplianceError.refused(why) }
        let machine = try await catalogue.read { db in try db.instances(of: found, kind: .failover).last }
        let points = store.recoveryPoints(found.group)
        let (kept, deleted) = (points.filter { $0.hold != nil }, points.filter { $0.hold == nil })
        var words = ["the machine stays on \(machine?.point.map { "recovery point \($0)" } ?? "its recovery point"), with all that it has written since, for good"]
        if let lacking = machine.flatMap({ lacking($0) }) { words.append(lacking) }
        words.append("its old source stays fenced")
        if !deleted.isEmpty {
            words.append("\(deleted.count) recovery points are deleted (\(deleted.first!.id) to \(deleted.last!.id)): hold those that are to stay (afterimage recovery-point hold \(found.name) POINT --name NAME)")
        }
        if !kept.isEmpty { words.append("held recovery points stay: " + kept.map { "\($0.id) (\($0.hold ?? ""))" }.joined(separator: ", ")) }
        return CommitPreview(
            server: found.name, recoveryPoint: machine?.point, instance: machine?.id, keptPoints: kept, deletedPointCount: deleted.count,
            deletedPointBytes: deleted.reduce(0) { $0 + $1.dataBytes }, needsConfirmation: !deleted.isEmpty, words: words)
    }

    /// Irrevocable: the machine's disks become the group's, and every recovery point goes that is not held.
    public func commitFailover(_ name: String, _ request: Confirmation, who: String) async throws -> TaskRecord {
        let preview = try await commitPreview(name)
        guard !preview.needsConfirmation || request.confirm == preview.server else {
            throw ApplianceError.refused("Commit Failover deletes \(preview.deletedPointCount) recovery points of \(preview.server) for good: confirm it by the server's name (--yes \(preview.server)).")
        }
        let found = try await server(name)
        for export in try await catalogue.read({ db in try PointExportRecord.filter(Column("server") == found.id).fetchAll(db) })
        where !preview.keptPoints.contains(where: { $0.id == export.point }) {
            throw ApplianceError.refused("Recovery point \(export.point) of \(found.name) would go, and is exported: end that first (afterimage recovery-point unexport \(found.name) --point \(export.point)).")
        }
        let task = try await catalogue.write { db in
            var record = try db.server(found.id)
            if let copying = try db.runningTask(of: record, [.exportRecoveryPoint]) {
                throw ApplianceError.refused("Task \(copying.id ?? 0) exports a recovery point: wait for it, or cancel it (afterimage task cancel \(copying.id ?? 0)).")
            }
            let machine = try db.instances(of: record, kind: .failover).last
            try db.apply(
                .commitFailover, to: &record, who: who, hasRecoveryPoint: true,
                detail: "\(machine?.point.map { "recovery point \($0); " } ?? "")\(preview.deletedPointCount) recovery points go, \(preview.keptPoints.count) held ones stay")
            return try TaskBoard.plan(.commitFailover, server: record, parameters: TaskParameters(instance: machine?.id), who: who, in: db)
        }
        await start(task)
        return task
    }

    /// May be repeated: a second commit of the same fork finds nothing left to delete.
    func performCommit(_ task: TaskRecord) async throws -> TaskResult {
        let machine = try await instance(task)
        let group = GroupID(machine.server)
        let before = store.recoveryPoints(group).count
        if let point = store.recoveryPoints(group).first(where: { $0.id == machine.point }) {
            try await update(machine.id) { $0.pointPosition = DurablePosition(instance: point.instance, epoch: point.epoch, kind: .exact) }
        }
        try await blocking { [store] in try store.commitFork(machine.forkID) }
        FaultPoint.forkCommitted.reached(task.operation)
        let points = store.recoveryPoints(group)
        if before > points.count {
            await tasks.log(task, "\(before - points.count) recovery points are gone, \(points.count) held ones stay; what nothing refers to any more is given back in the background")
        }
        let generation = store.group(group)?.generation
        try await update(machine.id) { $0.generation = generation.map { Int64($0.rawValue) } ?? $0.generation }
        FaultPoint.commitStored.reached(task.operation)
        // A source that connects again is told the newest.
        await tellOrder(ServerID(machine.server))
        var result = TaskResult()
        result.instance = machine.id
        result.recoveryPoint = machine.point
        result.generation = generation?.rawValue
        result.message = "committed: the machine stays on this recovery point; its old source stays fenced"
        return result
    }
}

import Foundation
import GRDB
import Replica

/// How a machine ends: by itself, or because somebody stops it.
extension Lifecycle {
    /// One that ends again and again is left, for somebody to look at.
    private static let restartsMax = 3
    private static let restartsWithinSeconds = 600.0
    /// Not one of those that are counted.
    private static let whoAtStart = "appliance, at its start"

    /// QEMU ended without being told to. With `restart`, that it is to be started again is in the same transaction; `isFoundGone` when the appliance starts: a
    /// failed-over machine is started then whatever was asked for, since its host may have ended, too.
    func machineEnded(_ id: String, _ why: String, isFoundGone: Bool = false) async {
        if isStopping { return }
        do {
            let restart = try await catalogue.write { db -> TaskRecord? in
                guard var instance = try InstanceRecord.fetchOne(db, key: id), instance.step == .ready || instance.step == .unproven else { return nil }
                let wasReady = instance.step == .ready
                instance.step = .stopped
                instance.reason = why
                instance.pid = nil
                guard var server = try ServerRecord.fetchOne(db, key: instance.server) else {
                    try instance.update(db)
                    return nil
                }
                var detail = "\(instance.kind.rawValue) machine \(id): \(why)"
                var task: TaskRecord?
                if wasReady, instance.settings.onEnd == .restart || (isFoundGone && instance.kind == .failover), case .permitted = StateTable.verdict(server.lifecycle, .startMachine, hasRecoveryPoint: true) {
                    let recent = try TaskRecord.filter(Column("server") == server.id).filter(Column("operation") == Trigger.startMachine)
                        .filter(Column("who") == "appliance").filter(Column("created") > Date(timeIntervalSinceNow: -Self.restartsWithinSeconds)).fetchCount(db)
                    if isFoundGone || recent < Self.restartsMax {
                        detail += "; it is started again"
                        try db.apply(.startMachine, to: &server, who: "appliance", hasRecoveryPoint: true, detail: why)
                        task = try TaskBoard.plan(.startMachine, server: server, parameters: TaskParameters(instance: id), who: isFoundGone ? Self.whoAtStart : "appliance", in: db)
                    } else {
                        instance.reason = "\(why); it was started again \(recent) times within \(Int(Self.restartsWithinSeconds / 60)) minutes, and is left now"
                        detail += "; it is left, after \(recent) starts"
                    }
                }
                try instance.update(db)
                try db.event("appliance", "Machine ended", server: server, detail: detail)
                return task
            }
            if let restart { await start(restart) }
        } catch {
            logger.error("cannot store that machine \(id) ended: \(error)")
        }
    }

    /// A failed-over machine is shut down, by its guest agent or its power button; its disks stay, and Start Machine goes on from them.
    public func stopMachine(_ name: String, who: String) async throws -> TaskRecord {
        let found = try await server(name)
        let task = try await catalogue.write { db in
            var record = try db.server(found.id)
            if let running = try db.runningTask(of: record, [.stopMachine]) { return running }
            if let running = try db.runningTask(of: record, [.startMachine]) {
                throw ApplianceError.refused("Task \(running.id ?? 0) starts this machine: wait for it (afterimage task show \(running.id ?? 0)).")
            }
            try db.apply(.stopMachine, to: &record, who: who, hasRecoveryPoint: true)
            guard let machine = try db.instances(of: record, kind: .failover).last, machine.step != .stopped else {
                throw ApplianceError.refused("The failed-over machine of \(record.name) does not run (afterimage failover start-machine \(record.name)).")
            }
            return try TaskBoard.plan(.stopMachine, server: record, parameters: TaskParameters(instance: machine.id), who: who, in: db)
        }
        await start(task)
        return task
    }

    func performStopMachine(_ task: TaskRecord) async throws -> TaskResult {
        let instance = try await instance(task)
        let log: @Sendable (String) async -> Void = { [tasks] line in await tasks.log(task, line) }
        // After a restart of the appliance the machine has to be found again first; one that has ended meanwhile is what was asked for.
        if (try? await machines.attach(instance, mayStart: false, log: log)) != nil {
            await tasks.report(task, TaskProgress(step: "shutting down"))
            await machines.shutDown(instance, secondsMax: Self.shutDownSeconds, log: log)
        }
        try Task.checkCancellation()
        try await update(instance.id) {
            $0.step = .stopped
            $0.reason = "stopped by \(task.who)"
            $0.pid = nil
        }
        var result = TaskResult()
        result.instance = instance.id
        result.message = "the machine is stopped; its disks stay as it left them"
        return result
    }
}

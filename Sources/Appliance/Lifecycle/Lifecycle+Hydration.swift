import Foundation
import GRDB
import Replica

/// Hydration: a machine's disks become independent of the recovery points that they share layers with, while it runs.
///
/// The wish is a task; the work is a unit of the store's upkeep (`ForkHydration`), paced with it. A start of the appliance asks the store again: a disk that
/// was done stays done. It needs nothing of the machine, so everything else that may be done with that goes on beside it; when the machine is taken
/// down its task ends with it.
extension Lifecycle {
    public func hydrateMachine(_ name: String, _ request: HydrateMachine, who: String) async throws -> TaskRecord {
        let found = try await server(name)
        let task = try await catalogue.write { db in
            var record = try db.server(found.id)
            let machines = try db.instances(of: record).filter { request.kind == nil || $0.kind == request.kind }
            guard let machine = machines.last(where: { $0.kind == .failover }) ?? machines.last else {
                throw ApplianceError.refused("There is no \(request.kind == .drill ? "drill's machine" : request.kind == .failover ? "failed-over machine" : "recovery machine") of \(record.name) to make independent (afterimage server show \(record.name)).")
            }
            guard [.ready, .unproven, .stopped].contains(machine.step) else {
                throw ApplianceError.refused("The machine \(machine.id) of \(record.name) is \(machine.step.rawValue): wait for its task (afterimage task list --server \(record.name)).")
            }
            if let running = try db.hydration(of: machine) { return running }
            try db.apply(.hydrateMachine, to: &record, who: who, hasRecoveryPoint: true, detail: "machine \(machine.id)")
            return try TaskBoard.plan(.hydrateMachine, server: record, parameters: TaskParameters(instance: machine.id), who: who, in: db)
        }
        await start(task)
        return task
    }

    /// Part of the transaction in which the machine of a failover becomes ready: the new state and the wish for its independence. Nil: it is wished already.
    static func planHydration(of instance: InstanceRecord, _ record: ServerRecord, in db: Database) throws -> TaskRecord? {
        if try db.hydration(of: instance) != nil { return nil }
        return try TaskBoard.plan(.hydrateMachine, server: record, parameters: TaskParameters(instance: instance.id), who: "appliance", in: db)
    }

    func performHydration(_ task: TaskRecord) async throws -> TaskResult {
        let instance = try await instance(task)
        let fork = instance.forkID
        let gone = ApplianceError.failed("the machine \(instance.id) was taken down meanwhile: nothing is left to make independent")
        do { try store.beginHydration(fork) } catch StoreError.unknownFork { throw gone }
        var told: String?
        while true {
            guard let now = store.hydration(fork) else { throw gone }
            if let failure = now.failure { throw ApplianceError.failed("\(failure)") }
            if now.isDone { break }
            if let delay = now.delay, told != "\(delay)" {
                told = "\(delay)"
                await tasks.log(task, "it is tried again: \(delay)")
            }
            await tasks.report(task, TaskProgress(step: now.totalBytes == 0 ? "waiting for upkeep" : "index", doneBytes: now.doneBytes, totalBytes: now.totalBytes))
            do { try await Task.sleep(for: .milliseconds(250)) } catch {
                store.endHydration(fork)
                throw error
            }
        }
        var result = TaskResult()
        result.instance = instance.id
        result.message = "the machine's disks need no recovery point any more: what the points alone show goes with them"
        return result
    }

    func hydrationView(_ instance: InstanceRecord) -> HydrationView? {
        guard instance.step != .planned else { return nil }
        let now = store.hydration(instance.forkID)
        guard let isIndependent = store.isIndependent(instance.forkID) else { return nil }
        let isAtWork = now.map { !$0.isDone && $0.failure == nil } ?? false
        return HydrationView(
            isIndependent: isIndependent, doneBytes: isAtWork ? now?.doneBytes : nil, totalBytes: isAtWork ? now?.totalBytes : nil,
            problem: (now?.failure ?? now?.delay).map { "\($0)" })
    }
}

extension Database {
    /// The task that makes this machine independent.
    func hydration(of machine: InstanceRecord) throws -> TaskRecord? {
        try TaskRecord.filter(Column("server") == machine.server && Column("status") == TaskStatus.running && Column("operation") == Trigger.hydrateMachine)
            .fetchAll(self).first { $0.parameters.instance == machine.id }
    }
}

import Foundation
import GRDB
import Replica

/// Promotion: a failed-over machine leaves the product. One of its disks becomes a plain file, or the content of a device, of the appliance's host.
///
/// The machine's disks are sealed, at one moment over all of them, and that moment is copied, read back and compared as an export of a recovery
/// point is (`Lifecycle+Copies`). Of a machine that runs on it is what a power cut then would have left. With `stop` the machine is shut down
/// when that is done, and what it has written meanwhile follows, so that the copy is all that it ever wrote and the machine stands still for
/// as long as that takes only (for qcow2, which somebody else writes, it is shut down first). What is copied stays as it was sealed, whatever is done with
/// the machine meanwhile. A task that was cut off seals and copies anew, unless its file was compared already and only lacked its name.
extension Lifecycle {
    public func promoteMachine(_ name: String, _ request: PromoteMachine, who: String) async throws -> TaskRecord {
        let found = try await server(name)
        let machine = try await catalogue.read { db in try db.instances(of: found, kind: .failover) }.last
        guard let machine, let point = machine.point else {
            throw ApplianceError.refused("There is no failed-over machine of \(found.name): promotion is for one (a recovery point is written out with afterimage recovery-point export).")
        }
        guard machine.step == .ready || machine.step == .stopped, let fork = store.forks().first(where: { $0.id == machine.forkID }) else {
            throw ApplianceError.refused("The machine \(machine.id) of \(found.name) is \(machine.step.rawValue): it is promoted once it has passed its boot check.")
        }
        var order = try await copyOrder(of: Self.volume(fork.volumes, of: found, named: request.copy.disk), point: point, request.copy)
        if request.stop == true {
            let seconds = request.stopSecondsMax ?? 60
            guard (0...3600).contains(seconds) else { throw ApplianceError.invalid("the time that a machine has to shut itself down is 0 to 3600 seconds, not \(seconds)") }
            order.stopSecondsMax = seconds
        }
        let settled = order
        let task = try await catalogue.write { db in
            var record = try db.server(found.id)
            try db.refuseWhileWritten(settled.path)
            try db.apply(
                .promoteMachine, to: &record, who: who, hasRecoveryPoint: true,
                detail: "machine \(machine.id), disk \(settled.disk), \(settled.format.rawValue) \(settled.path)\(settled.stopSecondsMax != nil ? "; the machine is shut down" : "")")
            return try TaskBoard.plan(.promoteMachine, server: record, parameters: TaskParameters(instance: machine.id, copy: settled), who: who, in: db)
        }
        await start(task)
        return task
    }

    func performPromotion(_ task: TaskRecord) async throws -> TaskResult {
        let machine = try await instance(task)
        guard let order = task.parameters.copy else { throw ApplianceError.failed("task \(task.id ?? 0) does not say what to promote") }
        await tasks.log(task, "disk \(order.disk) of machine \(machine.id) to \(order.path) on the appliance's host (\(Lifecycle.hostName))")
        var result = TaskResult()
        result.instance = machine.id
        result.recoveryPoint = machine.point
        result.path = order.path
        if let compared = order.comparedInode, try await finishNaming(order, compared) {
            result.writtenBytes = Lifecycle.allocatedBytes(order.path)
            result.message = "\(order.path) on the appliance's host holds disk \(order.disk); everything was read back and is equal"
            return result
        }
        try await forgetCompared(task)
        if order.format == .qcow2 { try await stop(machine, task, order) }
        var isStopped = try await instance(task).step == .stopped
        let disk = try await sealedDisk(machine, order)
        let cut = Date()
        if !isStopped, order.stopSecondsMax != nil {
            await tasks.log(task, "the machine runs while its disk is copied as it is now; then it is shut down, and the rest follows")
            result.writtenBytes = try await copy(task, order, disk) {
                try await self.stop(machine, task, order)
                return try await self.sealedDisk(machine, order)
            }
            isStopped = true
        } else {
            if !isStopped { await tasks.log(task, "the machine runs on: its disk is copied as it is now, as a power cut would leave it") }
            result.writtenBytes = try await copy(task, order, disk)
        }
        result.message = "\(order.path) on the appliance's host holds disk \(order.disk)"
            + (isStopped ? ", all that the machine wrote" : " as it was at \(APIJSON.text(cut)); the machine runs on, and what it writes since is not in it") + "; everything was read back and is equal"
        return result
    }

    private func sealedDisk(_ machine: InstanceRecord, _ order: PointCopyOrder) async throws -> VolumeReader {
        do { return try await blocking { [store] in try store.openSealed(machine.forkID)[order.volume] } } catch StoreError.unknownFork {
            throw ApplianceError.failed("the machine \(machine.id) was taken down meanwhile: nothing is left to promote")
        }
    }

    /// When that was asked for.
    private func stop(_ machine: InstanceRecord, _ task: TaskRecord, _ order: PointCopyOrder) async throws {
        guard let seconds = order.stopSecondsMax else { return }
        await tasks.report(task, TaskProgress(step: "shutting the machine down"))
        // After a restart it runs without anybody in charge of it, if it runs.
        do { _ = try await machines.attach(machine, mayStart: false, log: { _ in }) } catch { await tasks.log(task, "the machine has stopped already") }
        // Before it stops: that it ends is no surprise.
        try await update(machine.id) {
            $0.step = .stopped
            $0.reason = "it was shut down to be promoted"
            $0.pid = nil
        }
        if try await machines.stop(machine.id, asksSeconds: Double(seconds)) {
            await tasks.log(task, "the machine is stopped, with everything that it had written")
        } else {
            _ = try await machines.stop(machine.id, asksSeconds: nil)
            await tasks.log(task, "the machine did not shut itself down within \(seconds) s: its power was taken")
        }
    }

    /// True when the file that was compared before a kill has its name now.
    private func finishNaming(_ order: PointCopyOrder, _ compared: UInt64) async throws -> Bool {
        let partial = order.path + Lifecycle.partialSuffix
        if Lifecycle.inode(partial) == compared, Lifecycle.inode(order.path) == nil { try await blocking { try Lifecycle.publish(partial, as: order.path) } }
        guard Lifecycle.inode(order.path) == compared else { return false }
        unlink(partial)
        return true
    }
}

import Foundation
import GRDB
import Replica

/// Graceful failover, the planned move: the source's writes are held, a last recovery point is made of what is on its disks then, the source is fenced, and
/// says that it still holds. Only then a machine is started. So every write that was ever answered at the source is in the machine's disks.
///
/// Whatever happens on the way (the line fails, either side is killed) ends in a roll-back: the writes that wait at the source are done, and replication goes on.
extension Lifecycle {
    /// The source lets go by itself after this long without a word from here.
    static let holdSeconds = 30.0
    static let moveStepSeconds = 60.0
    static let answerSeconds = 20.0

    /// Why a graceful failover is not possible now.
    func refuseMove(of server: ServerRecord, _ request: StartMachine) throws(ApplianceError) {
        guard request.graceful == true else { return }
        guard request.recoveryPoint == nil || request.recoveryPoint == "latest" else {
            throw .invalid("a graceful failover makes a last recovery point of its own: no other can be named")
        }
        guard server.state == .replicating, agents[server.serverID]?.connected == true else {
            throw .refused(
                "A graceful failover needs \(server.name) to be Replicating, with its agent connected; it is \(server.state.rawValue)\(server.reason.map { ": \($0)" } ?? ""). Without --graceful the source may be dead.")
        }
        // (An older agent would say that it holds, and hold nothing.)
        if server.disks.contains(where: { $0.tap == AgentConfiguration.TapKind.live.rawValue }), agents[server.serverID]?.status?.canHold != true {
            throw .refused(
                "The agent of \(server.name) cannot hold its host's writes: it may not freeze file systems (--no-freeze), or is older than this appliance. Stop what writes to the disks, make a last point (afterimage recovery-point create \(server.name) --consistency filesystem --wait), shut the host down, then fail over without --graceful.")
        }
    }

    /// Makes the last recovery point, and fences.
    func fenceGracefully(_ instance: InstanceRecord, task: TaskRecord) async throws -> InstanceRecord {
        guard instance.step == .planned else { return instance }
        let server = ServerID(instance.server)
        var instance = instance
        let hold = task.parameters.hold ?? Names.unique("hold")
        if instance.generation == nil, instance.point == nil {
            // Its link has been refused since: no last point would come.
            guard task.parameters.hold == nil else { throw ApplianceError.failed("the appliance was restarted before the last recovery point was there") }
            try await catalogue.write { db in
                guard var task = try TaskRecord.fetchOne(db, key: task.id) else { return }
                task.parameters.hold = hold
                try task.update(db)
            }
            instance = try await repeating(hold, server) { try await self.lastPoint(instance, hold: hold, task: task) }
        }
        let fenced = try await fence(instance, task: task)
        // The hold of before, not interrupted since: one that has ended never begins again.
        _ = try await heldStatus(server, hold, "confirms that it is fenced, with its writes still held", within: Self.moveStepSeconds) { $0.isFinal }
        await tasks.log(task, "the source confirms: nothing was written since")
        return fenced
    }

    private func lastPoint(_ instance: InstanceRecord, hold: String, task: TaskRecord) async throws -> InstanceRecord {
        let server = ServerID(instance.server)
        await tasks.report(task, TaskProgress(step: "the source's last writes"))
        let record = try await self.server(instance.server)
        // A machine that runs at another appliance is shut down there.
        let isMachine = record.disks.contains { $0.tap == MachineReplication.tapName }
        if isMachine { await tasks.log(task, "the machine at the other appliance is asked to shut down") }
        // What its file systems have in memory is written first.
        let isFrozen = record.disks.contains { $0.tap == AgentConfiguration.TapKind.live.rawValue }
        let held = try await heldStatus(
            server, hold, isMachine ? "has shut down" : "holds its writes",
            within: Self.answerSeconds + (isMachine ? Self.shutDownSeconds : isFrozen ? Self.moveStepSeconds : 0)
        ) { $0.isQuiet }
        await tasks.log(task, isMachine ? "the machine there is stopped" : isFrozen ? "the source's file systems are frozen, and nothing writes past them" : "the source holds its writes")
        if let unheld = held.unheld {
            await tasks.log(task, "WARNING: \(unheld.joined(separator: ", ")) cannot be frozen: what is written there after the last recovery point stays there")
        }
        let point = try await laterPoint(server, hold: hold, within: isMachine ? Self.lastCutSeconds : Self.moveStepSeconds)
        await tasks.log(task, "recovery point \(point.id) has all that was ever written there")
        var settled = instance
        settled.point = point.id
        settled.pointCutTimeNanoseconds = Int64(point.cutTimeNanoseconds)
        settled.volumes = try volumeNames(record, point)
        let stored = settled
        try await catalogue.write { db in try stored.update(db) }
        return settled
    }

    /// Repeats the order to hold while `body` runs.
    private func repeating<T: Sendable>(_ hold: String, _ server: ServerID, _ body: () async throws -> T) async throws -> T {
        await tell(server, .holdWrites(HoldOrder(id: hold, seconds: Self.holdSeconds)))
        let repeater = Task { [weak self] in
            while (try? await Task.sleep(for: .seconds(Self.holdSeconds / 6))) != nil {
                await self?.tell(server, .holdWrites(HoldOrder(id: hold, seconds: Self.holdSeconds)))
            }
        }
        defer { repeater.cancel() }
        return try await body()
    }

    private func heldStatus(_ server: ServerID, _ hold: String, _ what: String, within seconds: Double, _ isEnough: (WriteHold) -> Bool) async throws -> WriteHold {
        let deadline = ContinuousClock.now + .seconds(seconds)
        var hasBegun = false
        while true {
            if let live = agents[server], live.connected, let status = live.status {
                if let held = status.hold, held.id == hold {
                    hasBegun = true
                    if isEnough(held) { return held }
                } else if hasBegun || status.endedHold == hold {
                    throw Self.letGo(status, hold)
                }
            }
            guard ContinuousClock.now < deadline else {
                throw ApplianceError.failed("it did not happen within \(Int(seconds)) s that the source \(what) (its agent is \(agents[server]?.connected == true ? "connected" : "not connected"))")
            }
            try await Task.sleep(for: .milliseconds(20))
        }
    }

    private static func letGo(_ status: AgentStatus, _ hold: String) -> ApplianceError {
        let reason = status.endedHold == hold ? status.endedHoldReason : nil
        return .failed("the source let go of its writes again\(reason.map { ": \($0)" } ?? "")")
    }

    /// One that was cut after this call: see `epochsUntilLater`.
    private func laterPoint(_ server: ServerID, hold: String, within seconds: Double) async throws -> RecoveryPoint {
        let group = GroupID(server.rawValue)
        var known = Set(store.recoveryPoints(group).map(\.id)), count = 0
        let deadline = ContinuousClock.now + .seconds(seconds)
        await tell(server, .cutNow(.crash))
        while true {
            for point in store.recoveryPoints(group) where known.insert(point.id).inserted {
                count += 1
                if count >= Self.epochsUntilLater { return point }
                await tell(server, .cutNow(.crash))
            }
            guard let live = agents[server], live.connected, let status = live.status else { throw ApplianceError.failed("the source's agent is not connected any more") }
            guard let held = status.hold, held.id == hold, !held.isFinal else { throw Self.letGo(status, hold) }
            guard ContinuousClock.now < deadline else { throw ApplianceError.failed("no last recovery point followed within \(Int(seconds)) s") }
            try await Task.sleep(for: .milliseconds(20))
        }
    }
}

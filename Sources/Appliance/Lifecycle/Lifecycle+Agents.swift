import BlockTap
import Foundation
import GRDB
import Replica

/// What agents tell, turned into the table's happenings.
extension Lifecycle: LinkServerDelegate {
    public func authorize(_ server: ServerID, certificateSerial: String) async -> Bool {
        let record = try? await catalogue.read { db in try ServerRecord.fetchOne(db, key: server.rawValue) }
        return record?.certificateSerial == certificateSerial
    }

    public func agentConnected(_ server: ServerID, _ hello: AgentHello) async -> [AgentCommand] {
        if let rescue = hello.rescue { return await rescueConnected(server, hello, rescue) }
        agents[server] = LiveAgent(status: agents[server]?.status, connected: true)
        do {
            let volumes = store.group(GroupID(server.rawValue))?.volumes ?? []
            let record = try await catalogue.write { db in
                var record = try db.server(server.rawValue)
                record.disks = hello.disks
                record.hostName = hello.hostName
                record.agentVersion = hello.agentVersion
                record.kernel = hello.kernel
                record.specification = hello.specification
                record.lastSeen = Date()
                try Self.takeIn(&record, protected: volumes, in: db)
                if [.failover, .reverse].contains(record.state.phase) || record.state == .failbackInProgress || record.state == .failedBack {
                    try db.event("agent of \(record.name)", "Source fenced", server: record, detail: "it came back while the server is in \(record.state.rawValue): nothing of it is taken")
                }
                return record
            }
            return try commands(for: record) + [await configurationCommand(for: record)].compactMap { $0 }
        } catch {
            logger.error("cannot take in the agent's hello: \(error)", metadata: ["server": "\(server)"])
            return []
        }
    }

    /// What an agent's disks mean for its server, part of the caller's transaction.
    static func takeIn(_ record: inout ServerRecord, protected volumes: [VolumeSpec], in db: Database) throws {
        let who = "agent of \(record.name)"
        if let unfit = unfitness(of: record.disks, for: volumes) {
            record.resumes = record.resumes || record.state.phase == .forward
            return try db.apply(.agentUnfit, to: &record, who: who, hasRecoveryPoint: true, reason: unfit)
        }
        let names = record.disks.map(\.name)
        // They begin with all that the store has; what was only announced before may be gone again.
        if let known = record.settings?.disks, known != names, record.state.phase == .setUp || record.state.phase == .forward {
            record.settings?.disks = names
            let what = names.starts(with: known) ? "Add disk" : "Change disks"
            try db.event(who, what, server: record, before: known.joined(separator: ", "), after: names.joined(separator: ", "))
            try record.update(db)
        }
        let resumes = record.resumes && record.settings?.automaticRestart == true && record.settings?.isPaused != true
        record.resumes = false
        try db.apply(.agentConnected, to: &record, who: who, hasRecoveryPoint: true)
        if resumes, record.state == .initialized {
            try db.apply(.startReplication, to: &record, who: who, hasRecoveryPoint: true, detail: "its disks are there again")
        }
    }

    /// Why the disks that the agent has now cannot carry on what is protected, or nil. Disks that come after the protected ones can: they are protected too.
    static func unfitness(of disks: [DiskReport], for volumes: [VolumeSpec]) -> String? {
        for volume in volumes {
            guard let disk = disks.first(where: { $0.name == volume.name }) else {
                return "disk \(volume.name) is protected, but the agent does not serve it now (afterimage agent run --disk \(volume.name)=PATH)"
            }
            if disk.geometry.sizeBytes < volume.geometry.sizeBytes {
                return "\(StoreError.shrunk(volume: volume.name, nowBytes: disk.geometry.sizeBytes, wasBytes: volume.geometry.sizeBytes))"
            }
        }
        let (known, names) = (volumes.map(\.name), disks.map(\.name))
        if !names.starts(with: known) {
            return "the agent serves the disks \(names.joined(separator: ", ")), protected are \(known.joined(separator: ", ")): name those first and in this order (afterimage agent run --disk …), new ones after them"
        }
        return nil
    }

    /// What an agent that has just connected is to do.
    func commands(for record: ServerRecord, restarts: Bool = false) throws -> [AgentCommand] {
        switch record.state {
        case .enableReplicating, .initialFullSync, .replicating:
            guard let settings = record.settings else { return [.stopReplication] }
            return [.startReplication(try order(record.id, settings))]
        case .replicationInterrupted:
            guard let settings = record.settings, settings.automaticRestart || restarts, settings.isPaused != true else { return [.stopReplication] }
            return [.startReplication(try order(record.id, settings))]
        case .failoverInProgress, .failedOver, .failoverCommitted, .reversedRegistering, .reversedInitialized, .reversedEnableReplicating, .reversedFullSync,
            .reversedReplicating, .failbackInProgress, .failedBack:
            guard let generation = store.group(record.group)?.generation else { return [.stopReplication] }
            return [.fenced(generation)]
        default:
            return [.stopReplication]
        }
    }

    public func agentDisconnected(_ server: ServerID) async {
        agents[server]?.connected = false
        if isStopping { return }
        if agents[server]?.rescueInstance != nil { return await rescueGone(server) }
        await happened(.linkLost, server, reason: "the agent is not connected")
    }

    public func agentStatus(_ server: ServerID, _ status: AgentStatus) async {
        var live = agents[server] ?? LiveAgent(connected: true)
        let before = live.status
        live.status = status
        live.connected = true
        live.fullSyncRate.note(status.fullSyncDoneBytes)
        agents[server] = live
        if live.rescueInstance != nil { return await rescueStatus(server, status) }
        await keepProofs(server, status.proofs)
        guard let record = try? await catalogue.read({ db in try ServerRecord.fetchOne(db, key: server.rawValue) }), record.state.phase == .forward,
            record.settings?.isPaused != true
        else { return }
        await noteDisks(record, status)

        switch status.phase {
        case .idle, .connecting:
            break
        case .fullSync, .resync:
            if record.state != .initialFullSync { await happened(.fullSyncStarted, server) }
            await reportFullSync(record, status, rate: live.fullSyncRate.bytesPerSecond)
        case .replicating where status.lastRecoveryPointNanoseconds > 0 && hasRecoveryPoint(record):
            if record.state != .replicating { await happened(.pointsFollow, server) }
            await endStartTask(record)
            await askForConsistentPoint(record)
        case .replicating:
            await reportFullSync(record, status, rate: live.fullSyncRate.bytesPerSecond)
        case .interrupted, .failed:
            if record.state != .replicationInterrupted || record.reason != status.reason {
                await happened(.linkLost, server, reason: status.reason)
                await tellStartTask(record, "interrupted: \(status.reason ?? "no reason given")")
            }
        case .fenced:
            // A failover that was rolled back left a newer generation: the agent needs an order under it.
            if before?.phase != .fenced { await tellOrder(server, restarts: true) }
        }
    }

    /// How its points were proven, kept for as long as they are.
    private func keepProofs(_ server: ServerID, _ proofs: [PointProof]) async {
        guard let live = agents[server], let newest = proofs.last else { return }
        let fresh = proofs.filter { $0.instance != live.provenInstance || $0.epoch > live.provenThrough }
        if fresh.isEmpty { return }
        agents[server]?.provenInstance = newest.instance
        agents[server]?.provenThrough = newest.epoch
        let points = newest.epoch.rawValue % 256 == 0 ? store.recoveryPoints(GroupID(server.rawValue)) : nil
        do {
            try await catalogue.write { db in
                for proof in fresh { try PointProofRecord(server: server.rawValue, proof).insert(db, onConflict: .ignore) }
                guard let points, let oldest = fresh.first?.epoch else { return }
                let there = Set(points.map { "\($0.instance) \($0.epoch.rawValue)" })
                for record in try PointProofRecord.filter(Column("server") == server.rawValue).fetchAll(db)
                where !there.contains("\(record.instance) \(record.epoch)") && (record.instance != newest.instance || record.epoch < Int64(oldest.rawValue)) {
                    try record.delete(db)
                }
            }
        } catch {
            logger.error("cannot keep how recovery points were proven: \(error)", metadata: ["server": "\(server)"])
        }
    }

    public func mayReplicate(_ server: ServerID, group: GroupID, generation: Generation) async -> Bool {
        guard group.rawValue == server.rawValue,
            let record = try? await catalogue.read({ db in try ServerRecord.fetchOne(db, key: server.rawValue) })
        else { return false }
        if record.state == .reversedEnableReplicating { return await mayKeepOriginal(server) }
        return record.state.phase == .forward && record.settings?.isPaused != true
    }

    /// Applies a happening; one that the state gives no meaning to changes nothing.
    func happened(_ trigger: Trigger, _ server: ServerID, reason: String? = nil) async {
        do {
            try await catalogue.write { db in
                guard var record = try ServerRecord.fetchOne(db, key: server.rawValue) else { return }
                // What an agent said before it was told to pause, or the table has moved on, says nothing of now.
                let isOfReplication = [.fullSyncStarted, .pointsFollow, .linkLost].contains(trigger)
                guard (record.state.phase == .forward && record.settings?.isPaused != true) || !isOfReplication else { return }
                try db.apply(trigger, to: &record, who: "agent of \(record.name)", hasRecoveryPoint: true, reason: reason)
            }
        } catch {
            logger.error("cannot store that \(trigger.rawValue): \(error)", metadata: ["server": "\(server)"])
        }
    }

    private func reportFullSync(_ record: ServerRecord, _ status: AgentStatus, rate: UInt64) async {
        guard let task = try? await catalogue.read({ db in try db.runningTask(of: record, [.startReplication]) }) else { return }
        await tasks.report(
            task,
            TaskProgress(
                step: ServerState.initialFullSync.rawValue, doneBytes: status.fullSyncDoneBytes, totalBytes: status.fullSyncTotalBytes,
                bytesPerSecond: rate, secondsLeft: Lifecycle.secondsLeft(status, rate: rate)))
    }

    /// Whoever waits for Start Replication reads why it takes so long.
    private func tellStartTask(_ record: ServerRecord, _ line: String) async {
        guard let task = try? await catalogue.read({ db in try db.runningTask(of: record, [.startReplication]) }) else { return }
        await tasks.log(task, line)
    }

    static func secondsLeft(_ status: AgentStatus, rate: UInt64) -> Double? {
        guard rate > 0, status.fullSyncTotalBytes >= status.fullSyncDoneBytes else { return nil }
        return Double(status.fullSyncTotalBytes - status.fullSyncDoneBytes) / Double(rate)
    }

    /// The first recovery point is there: what Start Replication was for.
    private func endStartTask(_ record: ServerRecord) async {
        do {
            guard let task = try await catalogue.read({ db in try db.runningTask(of: record, [.startReplication]) }),
                let point = newestPoint(record), point.receivedTimeNanoseconds >= UInt64(task.created.timeIntervalSince1970 * 1e9)
            else { return }
            var result = TaskResult()
            result.recoveryPoint = point.id
            result.cutTimeNanoseconds = point.cutTimeNanoseconds
            result.message = "recovery point \(point.id) is there; \(record.name) is protected"
            try await tasks.finish(task, result: result)
        } catch {
            logger.error("cannot end the task of Start Replication: \(error)", metadata: ["server": "\(record.name)"])
        }
    }
}

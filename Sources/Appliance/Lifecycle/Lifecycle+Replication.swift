import BlockTap
import Foundation
import GRDB
import Replica

extension Lifecycle {
    static let cpuLimit = 256
    static let memoryMiBRange = 16...(8 << 20)

    /// Start Replication: the task ends when the first new recovery point is there.
    public func startReplication(_ name: String, _ request: StartReplication, who: String) async throws -> TaskRecord {
        let found = try await server(name)
        let settings = try await withNetworks(found, request, try replicationSettings(found, request, try await pairType(of: found)))
        let policy = try PolicyText(request.policy ?? found.policy).description
        // The table first, so that a wrong state is not reported as a wrong disk.
        if case .refused(let why) = StateTable.verdict(found.lifecycle, .startReplication, hasRecoveryPoint: hasRecoveryPoint(found)) {
            throw ApplianceError.refused(why)
        }
        try checkStorageClass(settings.storageClass, of: found.name)
        let volumes = try settings.disks.map { disk in
            guard let report = found.disks.first(where: { $0.name == disk }) else {
                let known = found.disks.map(\.name).joined(separator: ", ")
                throw ApplianceError.invalid("server \(found.name) has no disk \(disk); its agent reports: \(known.isEmpty ? "none" : known)")
            }
            if let tap = request.tap, report.tap != tap {
                throw ApplianceError.invalid("disk \(disk) of \(found.name) is behind the \(report.tap) tap, not \(tap): run its agent with --tap \(tap)")
            }
            return VolumeSpec(name: disk, geometry: report.geometry)
        }
        let group = found.group
        do { try await blocking { [store] in try store.createGroup(group, volumes: volumes) } } catch let error as StoreError {
            throw ApplianceError.refused("\(error)")
        }
        let connected = agents[found.serverID]?.connected == true
        let task: TaskRecord
        do { task = try await planReplication(found, settings, policy, isConnected: connected, who: who) } catch {
            // Unregistered meanwhile: a group without a server would stay for good.
            if (try? await server(found.id)) == nil { try? await blocking { [store] in try store.deleteGroup(group) } }
            throw error
        }
        // Accepted: whatever happens to the server meanwhile, the answer is the task.
        if let record = try? await server(found.id) { giveRetention(record) }
        await tasks.log(task, "disks \(settings.disks.joined(separator: ", ")), an epoch every \(settings.epochMilliseconds) ms, Recovery Point Policy \(policy)")
        await tellOrder(found.serverID, restarts: true)
        return task
    }

    private func planReplication(_ found: ServerRecord, _ settings: ReplicationSettings, _ policy: String, isConnected connected: Bool, who: String) async throws -> TaskRecord {
        try await catalogue.write { db in
            var record = try db.server(found.id)
            record.settings = settings
            record.policy = policy
            record.resumes = false
            try db.apply(
                .startReplication, to: &record, who: who, hasRecoveryPoint: true,
                reason: connected ? nil : "waiting for the agent to connect", detail: "disks \(settings.disks.joined(separator: ", ")), Recovery Point Policy \(policy)")
            // Asked for again after an interruption: one task waits for the first point.
            try TaskBoard.finishAll([.startReplication], of: record, error: "replication was started again by \(who)", in: db)
            return try TaskBoard.plan(.startReplication, server: record, who: who, in: db)
        }
    }

    private func replicationSettings(_ server: ServerRecord, _ request: StartReplication, _ type: SitePairType) throws -> ReplicationSettings {
        let old = server.settings, reported = server.disks.map(\.name)
        let settings = ReplicationSettings(
            disks: request.disks ?? old.map { reported.starts(with: $0.disks) ? reported : $0.disks } ?? reported,
            epochMilliseconds: request.epochMilliseconds ?? old?.epochMilliseconds ?? 1000,
            throttleBytesPerSecond: request.throttleBytesPerSecond ?? old?.throttleBytesPerSecond ?? type.throttleBytesPerSecond,
            automaticRestart: request.automaticRestart ?? old?.automaticRestart ?? true,
            cpus: request.cpus ?? old?.cpus ?? server.specification?.cpus ?? 2,
            memoryMiB: request.memoryMiB ?? old?.memoryMiB ?? server.specification?.memoryMiB ?? 1024,
            consistentEverySeconds: request.consistentEverySeconds ?? old?.consistentEverySeconds, consistency: request.consistency ?? old?.consistency,
            throttleWindows: request.throttleWindows ?? old?.throttleWindows, compression: request.compression ?? old?.compression ?? type.compression,
            storageClass: request.storageClass ?? old?.storageClass, newDisks: request.newDisks ?? old?.newDisks, leftOutDisks: old?.leftOutDisks)
        guard !settings.disks.isEmpty, Set(settings.disks).count == settings.disks.count else {
            throw ApplianceError.invalid("name each disk to be followed once, and at least one")
        }
        guard reported.isEmpty || settings.disks == reported || !Set(settings.disks).isSubset(of: reported) else {
            throw ApplianceError.invalid(
                "all disks of an agent are followed together, in its order: \(reported.joined(separator: ", ")); run the agent without a disk that is not to be followed")
        }
        try Self.checkTransfer(settings)
        if let tap = request.tap, !["live", "nbd"].contains(tap) { throw ApplianceError.invalid("there is no tap \(tap): live or nbd") }
        if let every = settings.consistentEverySeconds, every != 0, !(10...31_536_000).contains(every) {
            throw ApplianceError.invalid("a file-system- or application-consistent recovery point can be had every 10 seconds to every year, not every \(every) s (0: none)")
        }
        try checkMachine(cpus: settings.cpus, memoryMiB: settings.memoryMiB)
        return settings
    }

    func checkMachine(cpus: Int, memoryMiB: Int) throws {
        guard (1...Self.cpuLimit).contains(cpus) else { throw ApplianceError.invalid("a machine has 1 to \(Self.cpuLimit) CPUs, not \(cpus)") }
        guard Self.memoryMiBRange.contains(memoryMiB) else {
            throw ApplianceError.invalid("a machine has \(Self.memoryMiBRange.lowerBound) to \(Self.memoryMiBRange.upperBound) MiB of memory, not \(memoryMiB)")
        }
    }

    /// The order that an agent gets, under the group's present generation.
    func order(_ server: String, _ settings: ReplicationSettings) throws -> ReplicationOrder {
        let group = GroupID(server)
        guard let info = store.group(group) else { throw ApplianceError.failed("the store has lost group \(group)") }
        return settings.order(group: group, generation: info.generation)
    }

    public func stopReplication(_ name: String, who: String) async throws -> TaskRecord {
        let found = try await server(name)
        let task = try await catalogue.write { db in
            var record = try db.server(found.id)
            record.resumes = false
            record.settings?.isPaused = nil
            try db.apply(.stopReplication, to: &record, who: who, hasRecoveryPoint: true)
            try TaskBoard.finishAll([.startReplication], of: record, error: "replication was stopped by \(who)", in: db)
            let task = try TaskBoard.plan(.stopReplication, server: record, who: who, in: db)
            var result = TaskResult()
            result.message = "replication is stopped; the recovery points stay"
            try TaskBoard.finish(task, result: result, in: db)
            return try TaskRecord.fetchOne(db, key: task.id) ?? task
        }
        await tellOrder(found.serverID)
        return task
    }

    /// Nothing more is sent until `resumeReplication`; the agent goes on marking what is written, and only that will have to be sent.
    public func pauseReplication(_ name: String, who: String) async throws -> ServerView {
        let found = try await server(name)
        try await catalogue.write { db in
            var record = try db.server(found.id)
            record.settings?.isPaused = true
            try db.apply(.pauseReplication, to: &record, who: who, hasRecoveryPoint: true, reason: "paused by \(who)")
            try TaskBoard.finishAll([.startReplication], of: record, error: "replication was paused by \(who)", in: db)
        }
        await tellOrder(found.serverID)
        return try await view(found.id)
    }

    public func resumeReplication(_ name: String, who: String) async throws -> TaskRecord {
        let found = try await server(name)
        guard found.settings?.isPaused == true, found.state == .replicationInterrupted else {
            throw ApplianceError.refused("Replication of \(found.name) is not paused; it is \(found.state.rawValue).")
        }
        return try await startReplication(name, StartReplication(), who: who)
    }

    /// Its agent looks at its disks anew and says what it has. What is followed goes on being followed.
    public func restartServer(_ name: String, who: String) async throws -> ServerView {
        let found = try await server(name)
        let connected = agents[found.serverID]?.connected == true
        try await catalogue.write { db in
            var record = try db.server(found.id)
            if case .refused(let why) = StateTable.verdict(record.lifecycle, .restartServer, hasRecoveryPoint: true) { throw ApplianceError.refused(why) }
            guard connected else {
                throw ApplianceError.refused("The agent of \(found.name) is not connected: start it on the server (afterimage agent run).")
            }
            try db.apply(.restartServer, to: &record, who: who, hasRecoveryPoint: true)
        }
        await tell(found.serverID, .restart)
        return try await view(found.id)
    }

    /// Oldest first. With a limit the newest so many; with `before`, those older than that point: pages backwards through them all.
    public func recoveryPoints(_ name: String, limit: Int? = nil, before: String? = nil) async throws -> [RecoveryPointView] {
        let found = try await server(name)
        var points = (found.settings == nil ? [] : store.recoveryPoints(found.group))[...]
        if let before {
            guard let cursor = points.firstIndex(where: { $0.id.rawValue == before }) else {
                throw ApplianceError.notFound("Server \(found.name) has no recovery point \(before) any more: begin again with the newest.")
            }
            points = points[..<cursor]
        }
        let (blocks, unopenable) = damage.damage(of: found.group)
        let page = limit.map { points.suffix($0) } ?? points
        let epochs = page.map { Int64($0.epoch.rawValue) }
        let proofs: [String: CutProof] = try await catalogue.read { db in
            guard let low = epochs.min(), let high = epochs.max() else { return [:] }
            let records = try PointProofRecord.filter(Column("server") == found.id && Column("epoch") >= low && Column("epoch") <= high).fetchAll(db)
            return Dictionary(uniqueKeysWithValues: records.map { ("\($0.instance) \($0.epoch)", $0.proof) })
        }
        return page.map {
            RecoveryPointView(
                point: $0, damagedBlockCount: blocks[$0.id], isUnreadable: unopenable.contains($0.id), proof: proofs["\($0.instance) \($0.epoch.rawValue)"])
        }
    }

    /// Serves a recovery point's disks read-only until unexported. Doing it twice gives the same sockets.
    public func export(_ name: String, point: String, who: String) async throws -> PointExport {
        let found = try await server(name)
        let chosen = try self.point(of: found, named: point)
        let record = try await catalogue.write { db in
            let record = try db.server(found.id)
            if let there = try PointExportRecord.filter(Column("server") == record.id && Column("point") == chosen.id.rawValue).fetchOne(db) {
                return there
            }
            try db.refuseWhileRemoved(record)
            let export = PointExportRecord(id: Names.unique("export"), server: record.id, point: chosen.id, created: Date())
            try export.insert(db)
            try db.event(who, "Export recovery point", server: record, detail: chosen.id.rawValue)
            return export
        }
        let view: PointExport
        do { view = try await exports.begin(record, serverName: found.name) } catch {
            try await catalogue.write { db in _ = try PointExportRecord.deleteOne(db, key: record.id) }
            throw error
        }
        guard try await catalogue.read({ db in try PointExportRecord.fetchOne(db, key: record.id) }) != nil else {
            try await exports.end(record.id)
            throw ApplianceError.refused("The export of recovery point \(chosen.id) was ended while it was being made.")
        }
        return view
    }

    public func unexport(_ name: String, point: String, who: String) async throws {
        let found = try await server(name)
        let record = try await catalogue.write { db in
            guard let record = try PointExportRecord.filter(Column("server") == found.id && Column("point") == point).fetchOne(db) else {
                throw ApplianceError.notFound("Recovery point \(point) of \(found.name) is not exported.")
            }
            try db.event(who, "Unexport recovery point", server: found, detail: point)
            return record
        }
        try await exports.end(record.id)
        try await catalogue.write { db in _ = try PointExportRecord.deleteOne(db, key: record.id) }
    }

    public func pointExports() async throws -> [PointExport] {
        let rows = try await catalogue.read { db in
            try PointExportRecord.fetchAll(db).map { ($0, try db.server($0.server).name) }
        }
        var views: [PointExport] = []
        for (record, name) in rows { views.append(await exports.view(record, serverName: name)) }
        return views
    }
}

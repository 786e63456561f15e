import Foundation
import GRDB
import Replica

extension Lifecycle {
    public func status() async throws -> StatusView {
        let servers = try await views()
        let pairs = try await sitePairs().count
        return StatusView(
            version: afterimageVersion, time: Date(), sitePairs: pairs, storeDirectory: settings.storeDirectory,
            protected: !servers.isEmpty && servers.allSatisfy { $0.state == .replicating && $0.lastRecoveryPoint != nil }, servers: servers,
            store: storeView(), alerts: await alerts().sorted { $0.severity > $1.severity })
    }

    public func views() async throws -> [ServerView] {
        let rows = try await catalogue.read { db in
            let machines = Dictionary(grouping: try InstanceRecord.order(Column("accepted")).fetchAll(db), by: \.server)
            return try ServerRecord.order(Column("name")).fetchAll(db).map { ($0, machines[$0.id] ?? []) }
        }
        var views: [ServerView] = []
        for (record, instances) in rows {
            var view = view(record, instances: instances)
            try await add(reverseView(record.id), to: &view)
            views.append(view)
        }
        return views
    }

    public func view(_ name: String) async throws -> ServerView {
        let (record, instances) = try await catalogue.read { db in
            let record = try db.server(name)
            return (record, try db.instances(of: record))
        }
        var view = view(record, instances: instances)
        try await add(reverseView(record.id), to: &view)
        return view
    }

    private func add(_ reverse: ReverseView?, to view: inout ServerView) {
        view.reverse = reverse
        if let next = reverse?.next(view.name, view.state, machine: view.instances.last { $0.kind == .failover }) { view.next = next }
    }

    private func view(_ record: ServerRecord, instances: [InstanceRecord]) -> ServerView {
        let live = agents[record.serverID]
        let group = store.group(record.group)
        let newest = newestPoint(record)
        let connected = live?.connected ?? false
        let followed = record.state.phase == .forward
        return ServerView(
            id: record.id, name: record.name, sitePair: record.sitePair, state: record.state, stateSince: record.stateSince, reason: record.reason,
            drill: record.drill, drillReason: record.drillReason, agentConnected: connected, hostName: record.hostName,
            agentVersion: record.agentVersion, lastSeen: connected ? Date() : record.lastSeen, disks: record.disks, newDisks: newDisks(of: record), specification: record.specification, settings: record.settings,
            agent: connected ? live?.status : nil, policy: record.policy, recoveryPointCount: group?.recoveryPointCount ?? 0,
            heldPointCount: group?.heldPointCount ?? 0, lastRecoveryPoint: newest?.id,
            lastRecoveryPointTime: newest.map { Date(nanoseconds: $0.cutTimeNanoseconds) },
            rpoSeconds: followed ? newest.map { max(0, Date().timeIntervalSince(Date(nanoseconds: $0.cutTimeNanoseconds))) } : nil,
            behindBytes: connected && followed ? live?.status.map { $0.source.behindBytes &+ $0.source.unsyncedBytes } : nil,
            secondsLeft: record.state == .initialFullSync ? live.flatMap { l in l.status.flatMap { Lifecycle.secondsLeft($0, rate: l.fullSyncRate.bytesPerSecond) } } : nil,
            storedBytes: group?.storedBytes, layerCount: group?.layerCount, generation: group?.generation.rawValue, instances: instances.map(view),
            alertSettings: record.alertSettings ?? .standard, lastProven: record.lastProven,
            next: record.next(agentConnected: connected, pointCount: group?.recoveryPointCount ?? 0, machine: instances.last { $0.kind == .failover }))
    }

    private func view(_ instance: InstanceRecord) -> InstanceView {
        InstanceView(
            id: instance.id, kind: instance.kind, step: instance.step, recoveryPoint: instance.point,
            recoveryPointTime: instance.point == nil ? nil : Date(nanoseconds: UInt64(instance.pointCutTimeNanoseconds)), machine: instance.settings,
            generation: instance.generation.map(UInt64.init), accelerator: instance.accelerator, pid: instance.pid, accepted: instance.accepted,
            ready: instance.ready, rtoSeconds: instance.rtoMilliseconds.map { Double($0) / 1000 }, bootLine: instance.bootLine,
            reason: instance.reason, consolePath: machines.consolePath(instance.id), nbdSocketPath: machines.nbdSocketPath(instance.id),
            qmpSocketPath: machines.qmpSocketPath(instance.id), vncSocketPath: machines.vncSocketPath(instance.id), agentSocketPath: machines.agentSocketPath(instance.id), hydration: hydrationView(instance))
    }

    public func taskViews(server: String?, limit: Int, before: Int64? = nil) async throws -> [TaskView] {
        let records = try await catalogue.read { db in
            var request = TaskRecord.order(Column("id").desc).limit(limit)
            if let server { request = request.filter(Column("serverName") == server) }
            if let before { request = request.filter(Column("id") < before) }
            return try request.fetchAll(db)
        }
        return await tasks.live(records).map { TaskView($0) }
    }

    public func taskView(_ id: Int64) async throws -> TaskView {
        let (record, log) = try await catalogue.read { db in
            guard let record = try TaskRecord.fetchOne(db, key: id) else { throw ApplianceError.notFound("There is no task \(id) (afterimage task list).") }
            return (record, try TaskLogRecord.filter(Column("task") == id).order(Column("id")).fetchAll(db))
        }
        var view = TaskView(await tasks.live(record), log: log)
        view.hasScreenshot = FileManager.default.fileExists(atPath: machines.screenshotPath(task: id))
        return view
    }

    public func events(server: String?, limit: Int, before: Int64? = nil) async throws -> [EventRecord] {
        try await catalogue.read { db in
            var request = EventRecord.order(Column("id").desc).limit(limit)
            if let server { request = request.filter(Column("server") == server) }
            if let before { request = request.filter(Column("id") < before) }
            return try request.fetchAll(db)
        }
    }
}

extension Date {
    /// From nanoseconds since 1970.
    init(nanoseconds: UInt64) { self.init(timeIntervalSince1970: Double(nanoseconds) / 1e9) }
}

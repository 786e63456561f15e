import Foundation
import GRDB

/// The questions the appliance asks of its catalogue, inside a transaction of the caller's.
extension Database {
    /// By name; ids are accepted too.
    func server(_ name: String) throws -> ServerRecord {
        if let record = try ServerRecord.filter(Column("name") == name || Column("id") == name).fetchOne(self) { return record }
        throw ApplianceError.notFound("There is no server \(name) (afterimage server list).")
    }

    func sitePair(_ name: String) throws -> SitePairRecord {
        if let record = try SitePairRecord.fetchOne(self, key: name) { return record }
        throw ApplianceError.notFound("There is no site pair \(name) (afterimage site-pair list).")
    }

    func instances(of server: ServerRecord, kind: InstanceKind? = nil) throws -> [InstanceRecord] {
        var request = InstanceRecord.filter(Column("server") == server.id)
        if let kind { request = request.filter(Column("kind") == kind) }
        return try request.order(Column("accepted")).fetchAll(self)
    }

    func runningTask(of server: ServerRecord, _ operations: [Trigger]) throws -> TaskRecord? {
        try TaskRecord.filter(Column("server") == server.id && Column("status") == TaskStatus.running && operations.contains(Column("operation")))
            .order(Column("id").desc).fetchOne(self)
    }

    func lastTask(of server: String, _ operations: [Trigger]) throws -> TaskRecord? {
        try TaskRecord.filter(Column("server") == server && operations.contains(Column("operation"))).order(Column("id").desc).fetchOne(self)
    }

    /// Nothing is begun with a server that is being removed.
    func refuseWhileRemoved(_ server: ServerRecord) throws {
        guard let task = try runningTask(of: server, [.unregister]) else { return }
        throw ApplianceError.refused("Server \(server.name) is being removed (afterimage task show \(task.id ?? 0)).")
    }

    func event(_ who: String, _ what: String, server: ServerRecord? = nil, before: String? = nil, after: String? = nil, detail: String? = nil) throws {
        try EventRecord(id: nil, time: Date(), who: who, what: what, server: server?.name, before: before, after: after, detail: detail).insert(self)
    }

    /// Applies a trigger to a server: the table decides, the new state and its event are stored together. Throws `refused` with the
    /// table's sentence. The caller's other fields of `server` are stored too.
    func apply(_ trigger: Trigger, to server: inout ServerRecord, who: String, hasRecoveryPoint: Bool, reason: String? = nil, detail: String? = nil) throws {
        if trigger.isOperation { try refuseWhileRemoved(server) }
        let before = server.lifecycle
        switch StateTable.verdict(before, trigger, hasRecoveryPoint: hasRecoveryPoint) {
        case .refused(let why):
            throw ApplianceError.refused(why)
        case .removed:
            return
        case .permitted(let next):
            server.lifecycle = next
            if before.main != next.main {
                server.stateSince = Date()
                server.reason = reason
            } else if reason != nil && !StateTable.drillTriggers.contains(trigger) {
                server.reason = reason
            }
            if before.drill != next.drill || (reason != nil && StateTable.drillTriggers.contains(trigger)) { server.drillReason = reason }
            try server.update(self)
            if trigger.isOperation || before != next {
                try event(who, trigger.rawValue, server: server, before: before.text, after: next.text, detail: detail ?? reason)
            }
        }
    }
}

extension LifecycleState {
    var text: String { drill.map { "\(main.rawValue) + \($0.rawValue)" } ?? main.rawValue }
}

import Foundation
import GRDB
import Replica

/// What an operation would stop, keep and delete: said before anybody agrees to it. A preview of what is not possible is refused as the operation would be.
extension Lifecycle {
    public func failoverPreview(_ name: String, _ request: StartMachine) async throws -> OperationPreview {
        let found = try await server(name)
        if case .refused(let why) = StateTable.verdict(found.lifecycle, .failover, hasRecoveryPoint: hasRecoveryPoint(found)) { throw ApplianceError.refused(why) }
        try refuseMove(of: found, request)
        let point = try point(of: found, named: request.recoveryPoint)
        let live = agents[found.serverID].flatMap { $0.connected ? $0.status : nil }
        var words = ["replication of \(found.name) stops, and its source is fenced: what it writes from then on never arrives here"]
        if request.graceful == true {
            if found.disks.contains(where: { $0.tap == AgentConfiguration.TapKind.live.rawValue }) {
                words.append("the file systems on the source's disks are frozen from the last recovery point on, and stay so: whatever writes to them waits, until the host is switched off")
            } else {
                words.append("writes to the source's disks wait from the last recovery point on, unanswered, until its agent is stopped")
            }
            words.append("the machine starts from that point: nothing that was ever answered is lost")
        } else {
            words.append("a source that still lives goes on without replication: shut it down, so that nobody works on both")
            words.append("the machine starts from recovery point \(point.id), cut \(ago(point)); what was written after that is not in it")
            if let behind = live.map({ $0.source.behindBytes &+ $0.source.unsyncedBytes }), behind > 0 {
                words.append("\(Amount.bytes(behind)) of the source have not arrived" + (found.state == .replicating ? ": a graceful failover (--graceful) would wait for them" : ""))
            }
        }
        words += try warnings(point, of: found)
        words.append("all \(store.recoveryPoints(found.group).count) recovery points stay, and another one can be chosen, until the failover is committed")
        if found.drill != nil { words.append("its drill goes on") }
        return OperationPreview(server: found.name, operation: .failover, recoveryPoint: point.id, deletedPointCount: 0, needsConfirmation: true, words: words)
    }

    public func changePreview(_ name: String, _ request: StartMachine) async throws -> OperationPreview {
        let found = try await server(name)
        if case .refused(let why) = StateTable.verdict(found.lifecycle, .changeRecoveryPoint, hasRecoveryPoint: true) { throw ApplianceError.refused(why) }
        guard let wanted = request.recoveryPoint, wanted != "latest" else { throw ApplianceError.invalid("name the recovery point") }
        let point = try point(of: found, named: wanted)
        let old = try await catalogue.read { db in try db.instances(of: found, kind: .failover) }.last
        var words: [String] = []
        if let old { words.append("the machine \(old.id) is stopped, and all that it has written is deleted" + (old.ready.map { " (it was ready at \(APIJSON.text($0)))" } ?? "")) }
        words.append("it starts again from recovery point \(point.id), cut \(ago(point))")
        words += try warnings(point, of: found)
        words.append("all \(store.recoveryPoints(found.group).count) recovery points stay")
        return OperationPreview(server: found.name, operation: .changeRecoveryPoint, recoveryPoint: point.id, deletedPointCount: 0, needsConfirmation: old != nil, words: words)
    }

    public func removalPreview(_ name: String) async throws -> OperationPreview {
        let found = try await server(name)
        let points = store.recoveryPoints(found.group)
        if case .refused(let why) = StateTable.verdict(found.lifecycle, .unregister, hasRecoveryPoint: !points.isEmpty) { throw ApplianceError.refused(why) }
        let (machines, exports, mounts) = try await catalogue.read { db in
            (
                try db.instances(of: found), try PointExportRecord.filter(Column("server") == found.id).fetchCount(db),
                try PointMountRecord.filter(Column("server") == found.id).fetchAll(db)
            )
        }
        let held = points.filter { $0.hold != nil }
        var words: [String] = []
        if let first = points.first, let last = points.last {
            words.append("its \(points.count) recovery points (\(first.id) to \(last.id)) are deleted for good (say so with --delete-points)")
        }
        if !held.isEmpty { words.append("\(held.count) of them are held: release these first (afterimage recovery-point release)") }
        for machine in machines { words.append("its machine \(machine.id) is stopped and deleted, with all that it has written (say so with --stop-machine)") }
        if exports > 0 { words.append("\(exports) exported recovery points end") }
        for mount in mounts { words.append("\(mount.directory) is unmounted") }
        words.append("its agent is not let in any more; its disks are not touched")
        words.append("its tasks and its lines of the audit log stay")
        return OperationPreview(
            server: found.name, operation: .unregister, deletedPointCount: points.count, needsConfirmation: !points.isEmpty || !machines.isEmpty, words: words)
    }

    private func ago(_ point: RecoveryPoint) -> String {
        let time = Date(nanoseconds: point.cutTimeNanoseconds)
        return "\(APIJSON.text(time)) (\(Amount.seconds(max(0, Int(Date().timeIntervalSince(time).rounded())))) ago)"
    }

    private func warnings(_ point: RecoveryPoint, of server: ServerRecord) throws -> [String] {
        var words: [String] = []
        let volumes = try volumeNames(server, point), missing = server.disks.map(\.name).filter { !volumes.contains($0) }
        if !missing.isEmpty { words.append("WARNING: this point does not have disk \(missing.joined(separator: ", ")), which was added after it") }
        if let damaged = damageWarning(point.id, of: server.group) { words.append(damaged) }
        return words
    }
}

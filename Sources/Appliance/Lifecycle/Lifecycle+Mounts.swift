import Foundation
import GRDB
import Replica

/// File-level restore: recovery points mounted on the appliance's host. A mount lives as long as the appliance that made it; the next
/// start undoes what a killed one has left, and says so.
extension Lifecycle {
    public func mountPoint(_ name: String, point: String, _ request: MountPoint, who: String) async throws -> PointMountView {
        let found = try await server(name)
        let chosen = try self.point(of: found, named: point)
        let volume = try volume(of: found, at: chosen.id, named: request.disk)
        let directory = request.directory
        guard directory.hasPrefix("/"), directory.count > 1, !directory.utf8.contains(0) else {
            throw ApplianceError.invalid("name the directory by its absolute path on the appliance's host, not \(directory)")
        }
        if let partition = request.partition, partition < 1 { throw ApplianceError.invalid("partitions are counted from 1, not \(partition)") }
        guard let entries = try? FileManager.default.contentsOfDirectory(atPath: directory) else {
            throw ApplianceError.refused("There is no directory \(directory) on the appliance's host: make it first.")
        }
        let resolved = URL(fileURLWithPath: directory).resolvingSymlinksInPath().path
        if let taken = try await catalogue.read({ db in try PointMountRecord.filter(Column("directory") == resolved).fetchOne(db) }) {
            throw ApplianceError.refused("Recovery point \(taken.point) is mounted on \(resolved) already.")
        }
        guard entries.isEmpty else { throw ApplianceError.refused("\(directory) is not empty: mount into an empty directory.") }
        try mounts.checkPrograms()
        let record = PointMountRecord(
            id: Names.unique("mount"), server: found.id, point: chosen.id, disk: volume.spec.name, partition: request.partition,
            directory: resolved, created: Date())
        try await catalogue.write { db in
            try db.refuseWhileRemoved(found)
            if try PointMountRecord.filter(Column("directory") == record.directory).fetchOne(db) != nil {
                throw ApplianceError.refused("A recovery point is mounted on \(record.directory) already.")
            }
            try record.insert(db)
            try db.event(who, "Mount recovery point", server: found, detail: "\(record.point), disk \(record.disk), on \(record.directory)")
        }
        do {
            let mounted = try await mounts.mount(record, volume: volume.index)
            var done = record
            done.fileSystem = mounted.fileSystem
            done.partition = mounted.partition
            done.warning = mounted.warning
            let stored = done
            try await catalogue.write { db in try stored.update(db) }
            return view(stored, found.name)
        } catch {
            try await catalogue.write { db in _ = try PointMountRecord.deleteOne(db, key: record.id) }
            throw error
        }
    }

    public func unmountPoint(_ id: String, who: String) async throws {
        guard let record = try await catalogue.read({ db in try PointMountRecord.fetchOne(db, key: id) }) else {
            throw ApplianceError.notFound("There is no mounted recovery point \(id) (afterimage recovery-point mounts).")
        }
        try await mounts.clear(record, isForced: false)
        try await drop(record, who: who, "Unmount recovery point", detail: "\(record.point), \(record.directory)")
    }

    public func pointMounts() async throws -> [PointMountView] {
        let rows = try await catalogue.read { db in
            try PointMountRecord.order(Column("created")).fetchAll(db).map { ($0, try db.server($0.server).name) }
        }
        return rows.map { view($0.0, $0.1) }
    }

    /// The appliance ends: so do its mounts.
    func endMounts() async {
        for record in await mountRecords() { await end(record, "the appliance ends") }
    }

    /// At the start: what is recorded was left by an appliance that was killed.
    func forgetMounts() async {
        for record in await mountRecords() { await end(record, "the appliance was restarted: mount it again") }
    }

    func endMounts(of server: String) async throws {
        for record in await mountRecords() where record.server == server { await end(record, "the server is unregistered") }
    }

    private func end(_ record: PointMountRecord, _ why: String) async {
        do {
            try await mounts.clear(record, isForced: true)
            try await drop(record, who: "appliance", "Unmount recovery point", detail: "\(record.point), \(record.directory): \(why)")
            logger.notice("the mounted recovery point \(record.point) is gone from \(record.directory): \(why)")
        } catch {
            logger.error("cannot undo a mounted recovery point: \(error)", metadata: ["directory": "\(record.directory)"])
        }
    }

    private func drop(_ record: PointMountRecord, who: String, _ what: String, detail: String) async throws {
        try await catalogue.write { db in
            try PointMountRecord.deleteOne(db, key: record.id)
            try db.event(who, what, server: try ServerRecord.fetchOne(db, key: record.server), detail: detail)
        }
    }

    private func mountRecords() async -> [PointMountRecord] {
        do { return try await catalogue.read { db in try PointMountRecord.fetchAll(db) } } catch {
            logger.error("cannot read which recovery points are mounted: \(error)")
            return []
        }
    }

    private func view(_ record: PointMountRecord, _ server: String) -> PointMountView {
        PointMountView(
            id: record.id, server: server, recoveryPoint: record.point, disk: record.disk, partition: record.partition, directory: record.directory,
            fileSystem: record.fileSystem, warning: record.warning, created: record.created)
    }
}

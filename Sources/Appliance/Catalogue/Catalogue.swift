import Foundation
import GRDB

/// The appliance's memory: sites, pairs, servers, instances, tasks, events. SQLite in WAL mode with synchronous FULL: what a
/// finished `write` has stored survives power loss.
public final class Catalogue: Sendable {
    let pool: DatabasePool

    /// Opens or creates the catalogue and brings it to this version's schema. Throws `ApplianceError.catalogue`.
    public init(path: String) throws {
        var configuration = Configuration()
        configuration.prepareDatabase { db in
            try db.execute(sql: "PRAGMA synchronous = FULL")
            try db.execute(sql: "PRAGMA foreign_keys = ON")
        }
        configuration.busyMode = .timeout(10)
        do {
            pool = try DatabasePool(path: path, configuration: configuration)
            let migrator = Catalogue.migrator
            let isNewer = try pool.read { db in try migrator.hasBeenSuperseded(db) }
            if isNewer {
                throw ApplianceError.catalogue("cannot open \(path): it was written by a newer version of Afterimage; start that version")
            }
            try migrator.migrate(pool)
        } catch let error as ApplianceError {
            throw error
        } catch {
            throw ApplianceError.catalogue("cannot open the catalogue \(path): \(error)")
        }
    }

    /// One transaction; when it throws, nothing has changed.
    public func write<T: Sendable>(_ body: @Sendable @escaping (Database) throws -> T) async throws -> T {
        try await pool.write(body)
    }

    public func read<T: Sendable>(_ body: @Sendable @escaping (Database) throws -> T) async throws -> T {
        try await pool.read(body)
    }

    public func close() throws { try pool.close() }
}

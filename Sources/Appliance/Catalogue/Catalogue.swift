import Foundation
import GRDB
import Glibc

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
            // Before anything is changed in it.
            let damage = try pool.read { db in try String.fetchAll(db, sql: "PRAGMA quick_check(3)") }
            guard damage == ["ok"] else { throw Self.damaged(path, damage.joined(separator: "; ")) }
            try migrator.migrate(pool)
        } catch let error as ApplianceError {
            throw error
        } catch let error as DatabaseError where error.resultCode == .SQLITE_CORRUPT || error.resultCode == .SQLITE_NOTADB {
            throw Self.damaged(path, error.message ?? "\(error)")
        } catch {
            throw ApplianceError.catalogue("cannot open the catalogue \(path): \(error)")
        }
    }

    private static func damaged(_ path: String, _ what: String) -> ApplianceError {
        .catalogue(
            "the catalogue \(path) is damaged (\(what)): move it, its -wal and its -shm file away, put a backup in its place (afterimage catalogue backup makes them) and start again; "
                + "recovery points are in the store, not in here")
    }

    /// Writes the catalogue, as it is at one moment, into a new file, while it is in use. Throws `ApplianceError` when that cannot be written or is there already; half a file
    /// is never left under its name.
    public func backUp(to path: String) async throws {
        guard path.hasPrefix("/"), !path.hasSuffix("/"), !path.utf8.contains(0) else {
            throw ApplianceError.invalid("name the file by its absolute path on the appliance's host, not \(path)")
        }
        let exists = ApplianceError.refused("There is a file \(path) already.")
        guard !FileManager.default.fileExists(atPath: path) else { throw exists }
        let partial = path + ".afterimage-partial", pool = pool
        do {
            try await blocking {
                // Its own, whatever lay there; nobody else can read it from its first moment.
                unlink(partial)
                let fd = open(partial, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0o600)
                guard fd >= 0 else { throw ApplianceError.refused("cannot write \(partial): \(String(cString: strerror(errno)))") }
                defer { Glibc.close(fd) }
                do {
                    let copy = try DatabaseQueue(path: partial)
                    try pool.backup(to: copy)
                    try copy.close()
                    guard fsync(fd) == 0 else { throw ApplianceError.failed("cannot write \(partial): \(String(cString: strerror(errno)))") }
                    // Not over a file that has appeared meanwhile.
                    guard link(partial, path) == 0 else { throw errno == EEXIST ? exists : ApplianceError.refused("cannot write \(path): \(String(cString: strerror(errno)))") }
                } catch {
                    unlink(partial)
                    throw error
                }
                unlink(partial)
                let directory = open(URL(fileURLWithPath: path).deletingLastPathComponent().path, O_RDONLY | O_DIRECTORY | O_CLOEXEC)
                if directory >= 0 {
                    fsync(directory)
                    Glibc.close(directory)
                }
            }
        } catch let error as ApplianceError {
            throw error
        } catch {
            throw ApplianceError.failed("cannot back up the catalogue to \(path): \(error)")
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

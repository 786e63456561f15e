import Foundation
import GRDB
import Replica

/// Disks that turn up on a protected host: told by an alert, and protected on request or by policy.
extension Lifecycle {
    /// nil: none.
    func newDisks(of server: ServerRecord) -> [HostDisk]? {
        guard server.state.phase == .forward, let known = server.settings?.leftOutDisks, let live = agents[server.serverID], live.connected else { return nil }
        let disks = (live.status?.hostDisks ?? []).filter { !known.contains($0.identity) }
        return disks.isEmpty ? nil : disks
    }

    /// What an agent says of its host's disks.
    func noteDisks(_ server: ServerRecord, _ status: AgentStatus) async {
        guard let disks = status.hostDisks, let settings = server.settings else { return }
        do {
            if settings.leftOutDisks == nil {
                // Whoever began its replication had these before him.
                return try await catalogue.write { db in
                    var record = try db.server(server.id)
                    guard record.settings?.leftOutDisks == nil else { return }
                    record.settings?.leftOutDisks = disks.map(\.identity)
                    try record.update(db)
                }
            }
            guard settings.newDisks == .add else { return }
            let added = agents[server.serverID]?.addedDisks ?? []
            let fresh = (newDisks(of: server) ?? []).filter { !added.contains($0.identity) }
            if !fresh.isEmpty { try await follow(fresh.map { ($0, nil) }, server, who: "policy") }
        } catch {
            logger.error("new disks cannot be taken in: \(error)", metadata: ["server": "\(server.name)"])
        }
    }

    public func addDisk(_ name: String, _ request: AddDisk, who: String) async throws -> ServerView {
        let found = try await server(name)
        try await follow([(try newDisk(request.path, of: found), request.name)], found, who: who)
        return try await view(found.id)
    }

    public func leaveOutDisk(_ name: String, _ request: LeaveOutDisk, who: String) async throws -> ServerView {
        let found = try await server(name)
        let disk = try newDisk(request.path, of: found)
        try await catalogue.write { db in
            var record = try db.server(found.id)
            record.settings?.leftOutDisks?.append(disk.identity)
            try record.update(db)
            try db.event(who, "Leave out disk", server: record, detail: "\(disk.path), \(Amount.bytes(disk.sizeBytes))")
        }
        return try await view(found.id)
    }

    private func newDisk(_ path: String, of server: ServerRecord) throws(ApplianceError) -> HostDisk {
        guard server.state.phase == .forward, server.settings?.isPaused != true else {
            throw .refused("Disks are added to a server that is protected, and not paused; \(server.name) is \(server.state.rawValue).")
        }
        guard agents[server.serverID]?.connected == true else { throw .refused("The agent of \(server.name) is not connected: start it on the server (afterimage agent run).") }
        let disks = newDisks(of: server) ?? []
        // One that was left out may be wanted later.
        let all = agents[server.serverID]?.status?.hostDisks ?? []
        guard let disk = all.first(where: { $0.path == path }) else {
            let words = (disks.isEmpty ? all : disks).map(\.path).joined(separator: ", ")
            throw .refused("The host of \(server.name) has no disk \(path) that could be protected and is not\(words.isEmpty ? "" : "; it has \(words)") (afterimage agent disks, there, says why a device cannot be followed).")
        }
        return disk
    }

    /// Its agent opens its disks anew, with these after the others; the rest is as with any disk that an agent newly has (`takeIn`).
    private func follow(_ disks: [(disk: HostDisk, name: String?)], _ server: ServerRecord, who: String) async throws {
        var taken = Set(server.disks.map(\.name)), added: [AddedDisk] = []
        for (disk, wanted) in disks {
            let name = wanted ?? Self.name(for: disk, taken)
            guard !name.isEmpty, name.allSatisfy({ $0.isASCII && ($0.isLetter || $0.isNumber || $0 == "-" || $0 == "_") }) else {
                throw ApplianceError.invalid("\"\(name)\" is no name for a disk: use letters, digits, - and _")
            }
            guard taken.insert(name).inserted else { throw ApplianceError.refused("\(server.name) has a disk \(name) already: give this one another name (--name).") }
            added.append(AddedDisk(name: name, path: disk.path, serial: disk.serial))
        }
        let all = added
        try await catalogue.write { db in
            var record = try db.server(server.id)
            // Not one that is left out any more, should it go and come back.
            record.settings?.leftOutDisks?.removeAll { identity in disks.contains { $0.disk.identity == identity } }
            try record.update(db)
            try db.event(who, "Protect disk", server: record, detail: all.map { "\($0.name): \($0.path)" }.joined(separator: ", "))
        }
        for disk in disks { agents[server.serverID]?.addedDisks.insert(disk.disk.identity) }
        await tell(server.serverID, .followDisks(all))
    }

    /// The device's, or one like it.
    private static func name(for disk: HostDisk, _ taken: Set<String>) -> String {
        let device = String(disk.path.split(separator: "/").last ?? "disk").map { $0.isASCII && ($0.isLetter || $0.isNumber || $0 == "-") ? $0 : "_" }
        let base = String(device)
        return taken.contains(base) ? (2...).lazy.map { "\(base)-\($0)" }.first { !taken.contains($0) } ?? base : base
    }
}

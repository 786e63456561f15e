import BlockTap
import Crypto
import Foundation
import GRDB
import Replica

/// Site pairs, servers, and how a server's agent gets in.
extension Lifecycle {
    public func createSitePair(_ request: CreateSitePair, who: String) async throws -> SitePairRecord {
        try Names.check(request.name, what: "site pair")
        try Names.check(request.primarySite, what: "site")
        try Names.check(request.secondarySite, what: "site")
        guard request.primarySite != request.secondarySite else {
            throw ApplianceError.invalid("a site pair needs two sites; both are called \(request.primarySite)")
        }
        guard request.recoveryNetwork == nil || request.recoveryNetworkName == nil else { throw ApplianceError.invalid("name a recovery network, or a kind of one, not both") }
        let asked = SitePairRecord(
            name: request.name, type: request.type, primarySite: request.primarySite, secondarySite: request.secondarySite,
            replicationNetwork: request.replicationNetwork ?? "default", recoveryNetwork: request.recoveryNetwork ?? .isolated, created: Date())
        return try await catalogue.write { db in
            var pair = asked
            let networks = try Self.checkNetworks(
                replication: request.replicationNetwork, recovery: request.recoveryNetworkName, primarySite: pair.primarySite, secondarySite: pair.secondarySite, in: db)
            if let recovery = networks.recovery {
                pair.recoveryNetworkName = recovery.name
                pair.recoveryNetwork = recovery.mode ?? .isolated
            }
            if let existing = try SitePairRecord.fetchOne(db, key: pair.name) {
                throw ApplianceError.refused("There is a site pair \(existing.name) already.")
            }
            for site in [pair.primarySite, pair.secondarySite] where try SiteRecord.fetchOne(db, key: site) == nil {
                try SiteRecord(name: site, zone: nil).insert(db)
            }
            try pair.insert(db)
            try db.event(who, "Create site pair", after: pair.name, detail: "\(pair.type.rawValue): \(pair.primarySite) to \(pair.secondarySite)")
            return pair
        }
    }

    public func sitePairs() async throws -> [SitePairRecord] {
        try await catalogue.read { db in try SitePairRecord.order(Column("name")).fetchAll(db) }
    }

    /// Adds 1 to 10 servers, all or none, each with its enrolment command.
    public func addServers(_ request: AddServers, who: String) async throws -> [Enrolment] {
        guard (1...10).contains(request.names.count) else {
            throw ApplianceError.invalid("1 to 10 servers are added at a time; these are \(request.names.count)")
        }
        guard Set(request.names).count == request.names.count else { throw ApplianceError.invalid("a server is named twice") }
        for name in request.names { try Names.check(name, what: "server") }
        var added: [Enrolment] = []
        var records: [ServerRecord] = []
        for name in request.names {
            var record = ServerRecord(
                id: Names.unique(name), name: name, sitePair: request.sitePair, state: .agentInstalling, stateSince: Date(), disks: [],
                created: Date())
            added.append(try issueToken(&record))
            records.append(record)
        }
        let toInsert = records
        try await catalogue.write { db in
            _ = try db.sitePair(request.sitePair)
            for record in toInsert {
                if try ServerRecord.filter(Column("name") == record.name).fetchOne(db) != nil {
                    throw ApplianceError.refused("There is a server \(record.name) already.")
                }
                try record.insert(db)
                try db.event(who, "Add server", server: record, after: record.state.rawValue)
            }
        }
        return added
    }

    /// A new token for a server whose old one has expired or was lost; the old one is worthless from then on.
    public func renewEnrolment(_ name: String, who: String) async throws -> Enrolment {
        let found = try await server(name)
        var withToken = found
        let enrolment = try issueToken(&withToken)
        let (hash, expires) = (withToken.enrolmentHash, withToken.enrolmentExpires)
        try await catalogue.write { db in
            var record = try db.server(found.id)
            record.enrolmentHash = hash
            record.enrolmentExpires = expires
            try db.apply(.renewEnrolment, to: &record, who: who, hasRecoveryPoint: true)
        }
        return enrolment
    }

    func issueToken(_ record: inout ServerRecord) throws -> Enrolment {
        let secret = Secrets.random()
        let expires = Date() + settings.enrolmentSeconds
        record.enrolmentHash = Secrets.hash(secret)
        record.enrolmentExpires = expires
        let token = try EnrolmentToken(url: settings.apiURL, caFingerprint: authority.fingerprint, secret: secret, serverName: record.name).text
        return Enrolment(server: record.name, token: token, command: "afterimage agent enroll --token \(token)", expires: expires)
    }

    /// Exchanges a one-time secret and a CSR for a certificate. The same sentence for every failure: a guesser learns nothing.
    public func enrol(_ request: EnrolRequest) async throws -> EnrolAnswer {
        let refusal = ApplianceError.unauthorized("The enrolment token is not valid: it was used, has expired, or was replaced (afterimage server token NAME makes a new one).")
        let hash = Secrets.hash(request.secret)
        guard let found = try await catalogue.read({ db in try ServerRecord.filter(Column("enrolmentHash") == hash).fetchOne(db) }),
            let expires = found.enrolmentExpires, expires > Date()
        else { throw refusal }
        let issued: IssuedCertificate
        do { issued = try authority.issueClient(csrPEM: request.csr, server: found.serverID) } catch {
            throw ApplianceError.invalid("\(error)")
        }
        try await catalogue.write { db in
            guard var record = try ServerRecord.filter(Column("enrolmentHash") == hash).fetchOne(db), record.id == found.id else { throw refusal }
            record.enrolmentHash = nil
            record.enrolmentExpires = nil
            record.certificateSerial = issued.serial
            try record.update(db)
            try db.event("agent of \(record.name)", "Enrol", server: record, detail: "certificate \(issued.serial)")
        }
        // A connection under an older certificate ends now.
        await link?.disconnect(found.serverID)
        let address = try await catalogue.read { db in try NetworkRecord.fetchOne(db, key: try db.sitePair(found.sitePair).replicationNetwork)?.address }
        return EnrolAnswer(
            server: found.serverID, serverName: found.name, certificate: issued.certificatePEM, ca: authority.certificatePEM,
            linkHost: address ?? settings.linkHost, linkPort: settings.linkPort)
    }

    /// Unregisters a server: certificate, exports, machine, recovery points; a task.
    public func removeServer(_ name: String, _ request: RemoveServer, ifMatch: Precondition = .none, who: String) async throws -> TaskRecord {
        let found = try await server(name)
        let pointCount = store.group(found.group)?.recoveryPointCount ?? 0
        let held = store.recoveryPoints(found.group).filter { $0.hold != nil }
        let (task, others) = try await catalogue.write { db -> (TaskRecord, [TaskRecord]?) in
            let record = try db.server(found.id)
            if let running = try db.runningTask(of: record, [.unregister]) { return (running, nil) }
            try ifMatch.check(try record.tag, "server \(record.name)")
            if case .refused(let why) = StateTable.verdict(record.lifecycle, .unregister, hasRecoveryPoint: pointCount > 0) {
                throw ApplianceError.refused(why)
            }
            if record.state == .failoverCommitted, request.stopMachine != true, try !db.instances(of: record).isEmpty {
                throw ApplianceError.refused("The recovery machine of \(record.name) runs from its replica and would be stopped and deleted: say so with --stop-machine.")
            }
            if !held.isEmpty {
                throw ApplianceError.refused("\(record.name) has held recovery points (\(held.map { "\($0.id): \($0.hold ?? "")" }.joined(separator: ", "))): release them first (afterimage recovery-point release).")
            }
            if pointCount > 0, request.deletePoints != true {
                throw ApplianceError.refused("\(record.name) has \(pointCount) recovery points, which would be deleted: say so with --delete-points.")
            }
            try db.event(who, Trigger.unregister.rawValue, server: record, before: record.lifecycle.text, detail: "deletes \(pointCount) recovery points")
            let others = try TaskBoard.finishAll(of: record, error: "the server was unregistered by \(who)", in: db)
            return (try TaskBoard.plan(.unregister, server: record, who: who, in: db), others)
        }
        // Whoever asked first starts it, once nobody works on the server any more.
        guard let others else { return task }
        for other in others { await tasks.cancel(other) }
        await start(task)
        return task
    }

    /// The work of Unregister; may be repeated.
    func performUnregister(_ task: TaskRecord) async throws -> TaskResult {
        var result = TaskResult()
        result.message = "removed"
        guard let id = task.server, let record = try? await server(id) else { return result }
        do { try await untilNothingIsHeld(record) } catch {
            // By one who was killed before.
            try await giveBackAccess(task)
            throw error
        }
        try await catalogue.write { db in
            var record = try db.server(id)
            if let serial = record.certificateSerial, var task = try TaskRecord.fetchOne(db, key: task.id) {
                task.parameters.revoked = serial
                try task.update(db)
            }
            record.certificateSerial = nil
            record.enrolmentHash = nil
            try record.update(db)
        }
        FaultPoint.accessRevoked.reached(task.operation)
        await tell(record.serverID, .stopReplication)
        await link?.disconnect(record.serverID)
        await leaveOther(id, forgets: true)
        let instances = try await catalogue.read { db in try db.instances(of: record) }
        for instance in instances { try await takeDown(instance, task: task) }
        for export in try await catalogue.read({ db in try PointExportRecord.filter(Column("server") == id).fetchAll(db) }) {
            try await exports.end(export.id)
        }
        try await endMounts(of: id)
        let group = record.group
        do {
            try await untilNothingIsHeld(record)
            if store.group(group) != nil { try await blocking { [store] in try store.deleteGroup(group) } }
        } catch {
            try await giveBackAccess(task)
            throw error
        }
        FaultPoint.groupDeleted.reached(task.operation)
        try await catalogue.write { db in
            try PointExportRecord.filter(Column("server") == id).deleteAll(db)
            try ServerRecord.deleteOne(db, key: id)
        }
        FaultPoint.serverRemoved.reached(task.operation)
        agents[record.serverID] = nil
        // Of a Start Replication that met the removal half-way.
        if store.group(group) != nil { try await blocking { [store] in try store.deleteGroup(group) } }
        return result
    }

    /// Whoever held a point in the moment in which the removal was asked for sees that, and releases it.
    private func untilNothingIsHeld(_ record: ServerRecord) async throws {
        let deadline = ContinuousClock.now + .seconds(Self.releaseSeconds)
        while let point = store.recoveryPoints(record.group).first(where: { $0.hold != nil }) {
            guard ContinuousClock.now < deadline else {
                throw ApplianceError.failed("recovery point \(point.id) of \(record.name) is held as \"\(point.hold ?? "")\": release it first (afterimage recovery-point release \(record.name) \(point.id))")
            }
            try await Task.sleep(for: .milliseconds(50))
        }
    }

    private static let releaseSeconds = 3.0

    /// The server stays, so its agent is let in again.
    private func giveBackAccess(_ task: TaskRecord) async throws {
        try await catalogue.write { db in
            guard let serial = try TaskRecord.fetchOne(db, key: task.id)?.parameters.revoked, var record = try task.server.flatMap({ try ServerRecord.fetchOne(db, key: $0) }),
                record.certificateSerial == nil
            else { return }
            record.certificateSerial = serial
            try record.update(db)
        }
    }
}

/// Names that people give: safe in paths, certificates and URLs.
enum Names {
    static func check(_ name: String, what: String) throws(ApplianceError) {
        let allowed = name.utf8.allSatisfy { (UInt8(ascii: "a")...UInt8(ascii: "z")).contains($0) || (UInt8(ascii: "0")...UInt8(ascii: "9")).contains($0) || $0 == UInt8(ascii: "-") }
        guard allowed, (1...40).contains(name.utf8.count), !name.hasPrefix("-") else {
            throw .invalid("\(name) cannot be the name of a \(what): use 1 to 40 of a-z, 0-9 and -, not beginning with -")
        }
    }

    /// The name with six random digits: a server added again under an old name is another server.
    static func unique(_ name: String) -> String {
        var generator = SystemRandomNumberGenerator()
        return "\(name)-" + String(UInt32.random(in: 0x100000...0xffffff, using: &generator), radix: 16)
    }
}

/// Secrets are 256 random bits; what is kept is their SHA-256.
enum Secrets {
    static func random() -> String {
        base64URL(SymmetricKey(size: .bits256).withUnsafeBytes { Data($0) })
    }

    static func hash(_ secret: String) -> String {
        SHA256.hash(data: Data(secret.utf8)).map { byte in
            let text = String(byte, radix: 16)
            return text.count == 1 ? "0" + text : text
        }.joined()
    }
}

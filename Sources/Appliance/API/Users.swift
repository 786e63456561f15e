import Crypto
import CryptoExtras
import Foundation
import GRDB
import Replica
import Synchronization

/// People, who come in with a name and a password and get a session for it. Programs have tokens (`AccessTokens`).
struct Users: Sendable {
    static let administrator = "administrator"
    static let sessionSeconds = 12 * 3600.0
    static let passwordLength = 12...200
    let catalogue: Catalogue
    /// Where the first administrator's password is until it is changed; nil: nowhere.
    var passwordPath: String?

    /// At the first start: a user `administrator` with a password that is in a file of the appliance's state. The file first: an appliance that is killed in between begins again.
    /// Whether there is something to be told.
    func begin() async throws -> Bool {
        let records = try await catalogue.read { db in try UserRecord.fetchAll(db) }
        guard records.isEmpty else {
            // Killed between the change of the password and the end of its file.
            if let first = records.first(where: { $0.name == Self.administrator }), first.changed == first.created { return FileManager.default.fileExists(atPath: passwordPath ?? "") }
            try forgetFirstPassword()
            return false
        }
        guard let passwordPath else { return false }
        let password = Secrets.random()
        try KeyFile.write(password + "\n", to: passwordPath, mode: 0o600)
        let record = UserRecord(name: Self.administrator, role: .administrator, password: try await Passwords.shared.hash(password), created: Date.now.toMilliseconds)
        try await catalogue.write { db in
            try record.insert(db)
            try db.event("appliance", "Create user", after: record.name, detail: record.role.rawValue)
        }
        return true
    }

    private func forgetFirstPassword() throws {
        guard let passwordPath, unlink(passwordPath) != 0, errno != ENOENT else { return }
        throw ApplianceError.failed("cannot remove \(passwordPath), which holds a password that is no longer good: \(String(cString: strerror(errno)))")
    }

    func list() async throws -> [UserView] {
        try await catalogue.read { db in try UserRecord.order(Column("name")).fetchAll(db).map { UserView($0) } }
    }

    func create(_ request: CreateUser, who: String) async throws -> UserView {
        try Names.check(request.name, what: "user")
        try Self.check(request.password)
        let record = UserRecord(name: request.name, role: request.role, password: try await Passwords.shared.hash(request.password), created: Date.now.toMilliseconds)
        try await catalogue.write { db in
            if try UserRecord.fetchOne(db, key: record.name) != nil {
                throw ApplianceError.refused("There is a user \(record.name) already: delete it first (afterimage user delete \(record.name)), or set its password (afterimage user set-password \(record.name)).")
            }
            try record.insert(db)
            try db.event(who, "Create user", after: record.name, detail: record.role.rawValue)
        }
        return UserView(record)
    }

    /// Ends the user's sessions, but for `kept`.
    func setPassword(_ name: String, _ password: String, kept: String? = nil, who: String) async throws {
        try Self.check(password)
        let hash = try await Passwords.shared.hash(password)
        try await catalogue.write { db in
            var record = try Self.user(name, db)
            record.password = hash
            record.changed = max(Date.now.toMilliseconds, record.created + 0.001)
            try record.update(db)
            try SessionRecord.filter(Column("user") == name && Column("hash") != (kept ?? "")).deleteAll(db)
            try db.event(who, "Set password", after: name)
        }
        if name == Self.administrator { try forgetFirstPassword() }
    }

    func delete(_ name: String, who: String) async throws {
        try await catalogue.write { db in
            let record = try Self.user(name, db)
            let isLast = try record.role == .administrator && UserRecord.filter(Column("role") == Role.administrator).fetchCount(db) == 1
            if isLast { throw ApplianceError.refused("\(name) is the only user that is an administrator: create another first (afterimage user create).") }
            try record.delete(db)
            try db.event(who, "Delete user", before: name, detail: record.role.rawValue)
        }
        if name == Self.administrator { try forgetFirstPassword() }
    }

    // MARK: sessions

    /// Throws `unauthorized` for a wrong name as for a wrong password, after the same time.
    func open(_ request: CreateSession) async throws -> CreatedSession {
        let record = try await catalogue.read { db in try UserRecord.fetchOne(db, key: request.user) }
        let isRight = try await Passwords.shared.matches(request.password, record?.password)
        guard let record, isRight else { throw ApplianceError.unauthorized("There is no such user, or it has another password.") }
        let secret = Secrets.random(), now = Date.now.toMilliseconds
        let session = SessionRecord(hash: Secrets.hash(secret), user: record.name, created: now, expires: (now + Self.sessionSeconds).toMilliseconds)
        let holder = try await catalogue.write { db in
            // The password may have been changed while it was compared.
            guard try UserRecord.fetchOne(db, key: record.name) == record else { throw ApplianceError.unauthorized("There is no such user, or it has another password.") }
            try SessionRecord.filter(Column("expires") <= now).deleteAll(db)
            try session.insert(db)
            try db.event(record.holderName, "Log in")
            return Holder(name: record.holderName, role: record.role, expires: session.expires, session: session)
        }
        return CreatedSession(session: HolderView(holder), secret: secret)
    }

    func isRight(_ name: String, _ password: String) async throws -> Bool {
        let record = try await catalogue.read { db in try UserRecord.fetchOne(db, key: name) }
        return try await Passwords.shared.matches(password, record?.password)
    }

    func holder(secret: String) async throws -> Holder? {
        let hash = Secrets.hash(secret)
        return try await catalogue.read { db in
            guard let session = try SessionRecord.fetchOne(db, key: hash), session.expires > Date(), let user = try UserRecord.fetchOne(db, key: session.user) else { return nil }
            return Holder(name: user.holderName, role: user.role, expires: session.expires, session: session)
        }
    }

    func close(_ session: SessionRecord, who: String) async throws {
        try await catalogue.write { db in
            guard try session.delete(db) else { return }
            try db.event(who, "Log out")
        }
    }

    private static func user(_ name: String, _ db: Database) throws -> UserRecord {
        if let record = try UserRecord.fetchOne(db, key: name) { return record }
        throw ApplianceError.notFound("There is no user \(name) (afterimage user list).")
    }

    /// Length is what counts (NIST SP 800-63B, 5.1.1).
    static func check(_ password: String) throws(ApplianceError) {
        guard passwordLength.contains(password.count) else {
            throw .invalid("a password has \(passwordLength.lowerBound) to \(passwordLength.upperBound) characters; this one has \(password.count)")
        }
        guard !password.unicodeScalars.contains(where: { $0.properties.generalCategory == .control }) else { throw .invalid("a password has no control characters") }
    }
}

/// Who asks, with what role: the holder of a token, or a user's session.
struct Holder: Sendable {
    /// As the audit log has it.
    var name: String
    var role: Role
    var expires: Date?
    /// nil: a token.
    var session: SessionRecord?
}

struct UserRecord: Codable, Sendable, Hashable, FetchableRecord, PersistableRecord {
    static let databaseTableName = "user"
    var name: String
    var role: Role
    /// As `Passwords` makes it.
    var password: String
    var created: Date
    /// When its password was set.
    var changed: Date

    init(name: String, role: Role, password: String, created: Date) {
        (self.name, self.role, self.password, self.created, changed) = (name, role, password, created, created)
    }

    /// A token may have the same name.
    var holderName: String { "\(name) (user)" }
}

struct SessionRecord: Codable, Sendable, Hashable, FetchableRecord, PersistableRecord {
    static let databaseTableName = "session"
    var hash: String
    var user: String
    var created: Date
    var expires: Date
}

extension Date {
    /// As the catalogue keeps it.
    fileprivate var toMilliseconds: Date { Date(timeIntervalSince1970: (timeIntervalSince1970 * 1000).rounded() / 1000) }
}

/// Passwords as they are kept: scrypt (RFC 7914) with a salt of their own, one at a time, since each takes 32 MiB and a tenth of a second.
final class Passwords: Sendable {
    static let shared = Passwords()
    private static let logRounds = 15
    private static let blockSize = 8
    private static let parallelism = 1
    private static let waitingMax = 20
    private let queue = DispatchQueue(label: "afterimage.passwords")
    private let waiting = Mutex(0)

    /// `scrypt$15$8$1$SALT$KEY`, base64.
    func hash(_ password: String) async throws -> String {
        let salt = SymmetricKey(size: .bits128).withUnsafeBytes { Data($0) }
        let key = try await derive(password, salt: salt, Self.logRounds, Self.blockSize, Self.parallelism)
        return "scrypt$\(Self.logRounds)$\(Self.blockSize)$\(Self.parallelism)$\(salt.base64EncodedString())$\(key.base64EncodedString())"
    }

    /// nil: nobody's; takes as long as somebody's.
    func matches(_ password: String, _ stored: String?) async throws -> Bool {
        let parts = (stored ?? "").split(separator: "$").map(String.init)
        guard parts.count == 6, parts[0] == "scrypt", let rounds = Int(parts[1]), let blockSize = Int(parts[2]), let parallelism = Int(parts[3]), let salt = Data(base64Encoded: parts[4]),
            let key = Data(base64Encoded: parts[5])
        else {
            _ = try await hash(password)
            return false
        }
        let own = try await derive(password, salt: salt, rounds, blockSize, parallelism)
        // As long whichever byte differs.
        return own.count == key.count && zip(own, key).reduce(0) { $0 | ($1.0 ^ $1.1) } == 0
    }

    private func derive(_ password: String, salt: Data, _ logRounds: Int, _ blockSize: Int, _ parallelism: Int) async throws -> Data {
        let isFree = waiting.withLock { waiting in
            guard waiting < Self.waitingMax else { return false }
            waiting += 1
            return true
        }
        guard isFree else { throw ApplianceError.tooMany("Too many people log in at once.", seconds: 5) }
        defer { waiting.withLock { $0 -= 1 } }
        return try await withCheckedThrowingContinuation { continuation in
            queue.async {
                continuation.resume(
                    with: Result {
                        try KDF.Scrypt.deriveKey(
                            from: Data(password.precomposedStringWithCompatibilityMapping.utf8), salt: salt, outputByteCount: 32, rounds: 1 << logRounds, blockSize: blockSize, parallelism: parallelism
                        ).withUnsafeBytes { Data($0) }
                    })
            }
        }
    }
}

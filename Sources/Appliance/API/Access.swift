import Foundation
import GRDB
import NIOCore
import Synchronization

/// What the holder of a token may do; each includes the ones before it.
public enum Role: String, Sendable, Codable, CaseIterable, Comparable {
    /// Sees everything, changes nothing.
    case viewer
    /// Protects, drills, fails over: the lifecycle of servers that are there.
    case `operator`
    /// Also decides which servers and sites there are, who may come in, and what is written on the appliance's host.
    case administrator

    private var rank: Int { Self.allCases.firstIndex(of: self)! }
    public static func < (a: Role, b: Role) -> Bool { a.rank < b.rank }
}

/// Access tokens of the API; the catalogue holds only their hashes.
struct AccessTokens: Sendable {
    static let administrator = "administrator"
    static let daysMax = 3650
    let catalogue: Catalogue

    /// The administrator's token: the one of the profile while that is there and valid, else a new one that replaces it.
    func administrator(profilePath: String) async throws -> String {
        if let profile = try? ClientProfile.load(path: profilePath) {
            let hash = Secrets.hash(profile.token)
            let isKnown = try await catalogue.read { db in
                try TokenRecord.filter(Column("hash") == hash && Column("name") == Self.administrator).fetchOne(db) != nil
            }
            if isKnown { return profile.token }
        }
        let token = Secrets.random()
        try await catalogue.write { db in
            try TokenRecord(name: Self.administrator, hash: Secrets.hash(token), role: .administrator, created: Date()).save(db)
            try db.event("appliance", "Create administrator token")
        }
        return token
    }

    /// Whose secret it is; nil: nobody's, or no longer. Hashes are compared, so the time that it takes says nothing about the secret.
    func holder(secret: String) async throws -> TokenRecord? {
        let hash = Secrets.hash(secret)
        let token = try await catalogue.read { db in try TokenRecord.filter(Column("hash") == hash).fetchOne(db) }
        return token.flatMap { $0.isExpired ? nil : $0 }
    }

    func list() async throws -> [TokenView] {
        try await catalogue.read { db in try TokenRecord.order(Column("name")).fetchAll(db).map { TokenView($0) } }
    }

    /// The secret is in the answer and nowhere else.
    func create(_ request: CreateToken, who: String) async throws -> CreatedToken {
        try Names.check(request.name, what: "token")
        let days = request.days ?? 90
        guard (0...Self.daysMax).contains(days) else { throw ApplianceError.invalid("days is 0 (no end) to \(Self.daysMax), not \(days)") }
        let secret = Secrets.random(), now = Date()
        let record = TokenRecord(
            name: request.name, hash: Secrets.hash(secret), role: request.role, created: now, expires: days == 0 ? nil : now + Double(days) * 86_400)
        try await catalogue.write { db in
            if let existing = try TokenRecord.fetchOne(db, key: record.name) {
                throw ApplianceError.refused("There is a token \(existing.name) already: revoke it first (afterimage token revoke \(existing.name)).")
            }
            try record.insert(db)
            try db.event(who, "Create token", after: record.name, detail: "\(record.role.rawValue), \(record.expires.map { "until " + APIJSON.text($0) } ?? "without end")")
        }
        return CreatedToken(token: TokenView(record), secret: secret)
    }

    func revoke(_ name: String, who: String) async throws {
        guard name != Self.administrator else {
            throw ApplianceError.refused(
                "The token administrator is the one of the appliance's own profile: to replace it, delete STATE/client.json and restart the appliance.")
        }
        try await catalogue.write { db in
            guard let record = try TokenRecord.fetchOne(db, key: name) else { throw ApplianceError.notFound("There is no token \(name) (afterimage token list).") }
            try record.delete(db)
            try db.event(who, "Revoke token", before: record.name, detail: record.role.rawValue)
        }
    }
}

/// How often an address is told that a token or enrolment secret is wrong: ten times at once, then once every six seconds. A right one is always let in, so
/// that nobody keeps others from the same address out, least of all in a disaster; secrets are 256 random bits.
final class AuthenticationLimiter: Sendable {
    private struct Account {
        var failures: Double
        var at: Double
    }

    static let failuresMax = 10.0
    static let secondsEach = 6.0
    private static let accountsMax = 4096
    private let accounts = Mutex<[String: Account]>([:])
    /// For people.
    private let what: String
    private let now: @Sendable () -> Double

    /// `now`: seconds of a clock that only goes forward.
    init(what: String = "tokens", now: @escaping @Sendable () -> Double = { Double(DispatchTime.now().uptimeNanoseconds) / 1e9 }) {
        self.what = what
        self.now = now
    }

    /// Whether there were too many already: for what can be guessed, and is then not looked at.
    func check(_ address: SocketAddress?) throws(ApplianceError) {
        guard let key = Self.key(address) else { return }
        let now = now(), failures = accounts.withLock { $0[key].map { Self.left($0, now) } ?? 0 }
        guard failures > Self.failuresMax - 1 else { return }
        throw tooMany(key, failures)
    }

    /// One more from there. Throws when there were too many.
    func failed(_ address: SocketAddress?) throws(ApplianceError) {
        guard let key = Self.key(address) else { return }
        let now = now()
        let failures = accounts.withLock { accounts in
            let failures = accounts[key].map { Self.left($0, now) } ?? 0
            accounts[key] = Account(failures: min(failures + 1, Self.failuresMax), at: now)
            if accounts.count > Self.accountsMax {
                accounts = accounts.filter { $0.key == key || Self.left($0.value, now) > 0 }
                // All of them at once: the ones that wait longest stay.
                if accounts.count > Self.accountsMax, let least = accounts.filter({ $0.key != key }).min(by: { Self.left($0.value, now) < Self.left($1.value, now) }) {
                    accounts.removeValue(forKey: least.key)
                }
            }
            return failures
        }
        guard failures + 1 > Self.failuresMax else { return }
        throw tooMany(key, failures)
    }

    private func tooMany(_ key: String, _ failures: Double) -> ApplianceError {
        .tooMany("Too many wrong \(what) came from \(key).", seconds: max(1, Int(((failures + 1 - Self.failuresMax) * Self.secondsEach).rounded(.up))))
    }

    private static func left(_ account: Account, _ now: Double) -> Double { max(0, account.failures - (now - account.at) / secondsEach) }

    /// An IPv6 host has a whole /64 to come from. Nil without a network.
    private static func key(_ address: SocketAddress?) -> String? {
        switch address {
        case .v4: address!.ipAddress
        case .v6(let v6):
            withUnsafeBytes(of: v6.address.sin6_addr) { bytes in
                // ::ffff:a.b.c.d is a.b.c.d.
                bytes[0..<10].allSatisfy { $0 == 0 } && bytes[10] == 0xFF && bytes[11] == 0xFF
                    ? bytes[12..<16].map { String($0) }.joined(separator: ".")
                    : stride(from: 0, to: 8, by: 2).map { String(Int(bytes[$0]) << 8 | Int(bytes[$0 + 1]), radix: 16) }.joined(separator: ":") + "::/64"
            }
        default: nil
        }
    }
}

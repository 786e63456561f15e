import Foundation
import GRDB
import HTTPTypes
import Hummingbird
import HummingbirdTesting
import NIOCore
import Synchronization
import Testing

@testable import Appliance

@Suite("Users and sessions")
struct UserTests {
    private static let password = "correct horse battery"

    private func ask(_ client: any TestClientProtocol, _ method: HTTPRequest.Method, _ path: String, _ body: (any Encodable)? = nil, as secret: String?) async throws -> TestResponse {
        var headers: HTTPFields = [:]
        if let secret { headers[.authorization] = "Bearer \(secret)" }
        return try await client.execute(uri: path, method: method, headers: headers, body: try body.map { ByteBuffer(data: try APIJSON.encoder().encode($0)) })
    }

    private func logIn(_ client: any TestClientProtocol, _ user: String, _ password: String) async throws -> CreatedSession {
        let response = try await ask(client, .post, "/v1/sessions", CreateSession(user: user, password: password), as: nil)
        #expect(response.status == .created, "\(String(buffer: response.body))")
        return try APIJSON.decoder().decode(CreatedSession.self, from: Data(buffer: response.body))
    }

    @Test("a session has its user's role, and ends with its time, a log-out, a new password, or its user")
    func sessions() async throws {
        try await withAPI { api, token, client in
            _ = try await api.users.create(.init(name: "ann", role: .operator, password: Self.password), who: "me")
            let first = try await logIn(client, "ann", Self.password), second = try await logIn(client, "ann", Self.password)
            #expect(first.session.role == .operator && first.session.isSession && first.secret != second.secret)
            #expect((11.9...12).contains(try #require(first.session.expires).timeIntervalSinceNow / 3600))
            func status(_ secret: String, _ path: String = "/v1/status") async throws -> Int { Int(try await ask(client, .get, path, as: secret).status.code) }
            #expect(try await status(first.secret) == 200)
            #expect(try await status(first.secret, "/v1/users") == 403)
            let own = try await ask(client, .get, "/v1/sessions/current", as: first.secret)
            let shown = try APIJSON.decoder().decode(HolderView.self, from: Data(buffer: own.body))
            #expect(shown.name == first.session.name && shown.role == first.session.role && shown.isSession)
            #expect(abs(try #require(shown.expires).timeIntervalSince(try #require(first.session.expires))) < 0.002)
            #expect(first.session.name == "ann (user)", "a token may have the same name")

            #expect(try await ask(client, .delete, "/v1/sessions/current", as: first.secret).status == .noContent)
            #expect(try await status(first.secret) == 401)
            #expect(try await status(second.secret) == 200)
            #expect(try await ask(client, .delete, "/v1/sessions/current", as: token).status == .conflict, "a token is none")

            // One's own password: this session stays, others end.
            let third = try await logIn(client, "ann", Self.password)
            let path = "/v1/sessions/current/password"
            #expect(try await ask(client, .put, path, ChangePassword(old: "wrong", password: "a new long password"), as: third.secret).status == .conflict)
            #expect(try await ask(client, .put, path, ChangePassword(old: Self.password, password: "short"), as: third.secret).status.code == 422)
            #expect(try await ask(client, .put, path, ChangePassword(old: Self.password, password: "a new long password"), as: third.secret).status == .noContent)
            #expect(try await status(third.secret) == 200)
            #expect(try await status(second.secret) == 401)
            #expect(try await ask(client, .post, "/v1/sessions", CreateSession(user: "ann", password: Self.password), as: nil).status == .unauthorized)

            // The time is moved, not waited for.
            try await api.tokens.catalogue.write { db in try db.execute(sql: "UPDATE session SET expires = ?", arguments: [Date() - 1]) }
            #expect(try await status(third.secret) == 401)
            let fourth = try await logIn(client, "ann", "a new long password")
            #expect(try await api.tokens.catalogue.read { db in try SessionRecord.fetchCount(db) } == 1, "those that are over are forgotten")
            #expect(try await ask(client, .put, "/v1/users/ann/password", SetPassword(password: Self.password), as: token).status == .noContent)
            #expect(try await status(fourth.secret) == 401)
            let fifth = try await logIn(client, "ann", Self.password)
            _ = try await api.users.create(.init(name: "boss", role: .administrator, password: Self.password), who: "me")
            #expect(try await ask(client, .delete, "/v1/users/ann", as: token).status == .noContent)
            #expect(try await status(fifth.secret) == 401)
            #expect(try await ask(client, .delete, "/v1/users/boss", as: token).status == .conflict, "the last administrator")

            let text = String(buffer: try await ask(client, .get, "/v1/events", as: token).body)
            for secret in [Self.password, "a new long password", first.secret, fifth.secret, "scrypt"] { #expect(!text.contains(secret)) }
            for what in ["Log in", "Log out", "Set password", "Create user", "Delete user"] { #expect(text.contains("\"\(what)\""), "\(what)") }
            let list = try await ask(client, .get, "/v1/users", as: token)
            #expect(try APIJSON.decoder().decode([UserView].self, from: Data(buffer: list.body)).map(\.name) == ["boss"] && !String(buffer: list.body).contains("scrypt"))
        }
    }

    @Test("a wrong name is answered as a wrong password is; after ten from one address not even a right one is looked at, until it has waited")
    func guesses() async throws {
        try await withAPI(.live) { api, _, client in
            _ = try await api.users.create(.init(name: "ann", role: .viewer, password: Self.password), who: "me")
            var answers: Set<String> = []
            for user in ["ann", "nobody"] {
                let response = try await ask(client, .post, "/v1/sessions", CreateSession(user: user, password: "a wrong password"), as: nil)
                #expect(response.status == .unauthorized)
                answers.insert(String(buffer: response.body))
            }
            #expect(answers.count == 1)
            var last = 0
            for _ in 0..<30 where last != 429 { last = Int(try await ask(client, .post, "/v1/sessions", CreateSession(user: "ann", password: "a wrong password"), as: nil).status.code) }
            #expect(last == 429)
        }
        let clock = Mutex(1000.0)
        let limiter = AuthenticationLimiter(what: "passwords") { clock.withLock { $0 } }
        let address = try SocketAddress(ipAddress: "192.0.2.1", port: 1)
        for _ in 0..<10 {
            try limiter.check(address)
            try limiter.failed(address)
        }
        #expect { try limiter.check(address) } throws: { "\($0)".contains("wrong passwords came from 192.0.2.1") }
        clock.withLock { $0 += 6.1 }
        try limiter.check(address)
    }

    @Test("passwords are kept as scrypt with a salt of their own; lengths and characters have rules")
    func passwords() async throws {
        let one = try await Passwords.shared.hash("pässword of some"), two = try await Passwords.shared.hash("pässword of some")
        #expect(one != two && one.hasPrefix("scrypt$15$8$1$"))
        #expect(try await Passwords.shared.matches("pässword of some", one))
        #expect(try await Passwords.shared.matches("pa\u{308}ssword of some", one), "however the keyboard writes it")
        for (password, stored) in [("pässword of som", one), ("", one), ("x", nil), ("x", ""), ("x", "scrypt$15$8$1$$"), ("x", "md5$1$1$1$YQ==$YQ==")] as [(String, String?)] {
            #expect(!(try await Passwords.shared.matches(password, stored)))
        }
        for wrong in ["", "eleven char", String(repeating: "x", count: 201), "with a \u{7} in it"] { #expect(throws: ApplianceError.self) { try Users.check(wrong) } }
        for right in ["twelve chars", String(repeating: "ä", count: 200)] { try Users.check(right) }
    }

    @Test("the first start makes an administrator with a password that only the appliance's state has; it is forgotten when it is changed, also over a kill in between")
    func first() async throws {
        try await withAPI { api, _, _ in
            let directory = try TemporaryDirectory()
            let path = directory.path + "/administrator-password"
            let users = Users(catalogue: api.tokens.catalogue, passwordPath: path)
            #expect(try await users.begin())
            let text = try String(contentsOfFile: path, encoding: .utf8)
            #expect((try FileManager.default.attributesOfItem(atPath: path)[.posixPermissions] as? Int) == 0o600)
            let session = try await users.open(.init(user: "administrator", password: text.trimmingCharacters(in: .whitespacesAndNewlines)))
            #expect(session.session.role == .administrator)
            #expect(try await users.begin(), "it is still to be changed")
            #expect(try String(contentsOfFile: path, encoding: .utf8) == text, "and stays what it is")
            try await users.setPassword("administrator", Self.password, who: "me")
            #expect(!FileManager.default.fileExists(atPath: path))
            // Killed after the change, before the file was removed.
            try text.write(toFile: path, atomically: true, encoding: .utf8)
            #expect(!(try await users.begin()))
            #expect(!FileManager.default.fileExists(atPath: path))
            _ = try await users.open(.init(user: "administrator", password: Self.password))
        }
    }
}

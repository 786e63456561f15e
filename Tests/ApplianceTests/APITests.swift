import Foundation
import HTTPTypes
import Hummingbird
import HummingbirdTesting
import Logging
import NIOCore
import Replica
import Synchronization
import Testing

@testable import Appliance

@Suite("API")
struct APITests {
    /// A route's path with something in place of its parameters, which is there nowhere.
    private func path(_ route: APIRoute) -> String {
        route.path.replacingOccurrences(of: #"\{\w+\}"#, with: "none", options: .regularExpression)
    }

    @Test("every route but the open ones refuses who has no token or a wrong one")
    func authentication() async throws {
        try await withAPI { api, _, client in
            var checked = 0
            var opened: Set<String> = []
            for route in api.routes {
                for header in [nil, "Bearer wrong", "Basic YTpi", "Bearer "] {
                    var headers = HTTPFields()
                    if let header { headers[.authorization] = header }
                    let response = try await client.execute(uri: path(route), method: route.method, headers: headers)
                    if route.access == .open {
                        #expect(["/v1/enrol", "/v1/sessions"].contains(route.path) || response.status == .ok, "\(route.path)")
                        opened.insert(route.path)
                    } else {
                        #expect(response.status == .unauthorized, "\(route.method) \(route.path) with \(header ?? "nothing")")
                        checked += 1
                    }
                }
            }
            #expect(opened == ["/v1/health", "/v1/openapi.json", "/v1/ca", "/v1/enrol", "/v1/sessions"] && checked == (api.routes.count - opened.count) * 4)
        }
    }

    @Test("every route refuses the roles below its own, and no other; only what shows things is for viewers")
    func roles() async throws {
        try await withAPI { api, _, client in
            for role in Role.allCases {
                let secret = try await api.tokens.create(.init(name: "a-\(role.rawValue)", role: role), who: "me").secret
                for route in api.routes {
                    // A stream would go on.
                    let headers: HTTPFields = [.authorization: "Bearer \(secret)", HTTPField.Name("Last-Event-ID")!: "none"]
                    let response = try await client.execute(uri: path(route), method: route.method, headers: headers)
                    guard case .role(let needed) = route.access else { continue }
                    #expect(needed > .viewer || route.method == .get || route.path.hasPrefix("/v1/sessions/"), "\(route.method) \(route.path)")
                    #expect(response.status != .unauthorized)
                    #expect((response.status == .forbidden) == (role < needed), "\(route.method) \(route.path) by a \(role.rawValue): \(response.status)")
                    if role < needed {
                        let problem = try JSONDecoder().decode(Problem.self, from: Data(buffer: response.body))
                        #expect(problem.type == "problem:forbidden" && problem.detail.contains("a-\(role.rawValue)") && problem.detail.contains(needed.rawValue))
                    }
                }
            }
        }
    }

    @Test("a token is good until it is revoked or its time is over; nobody but its holder has its secret")
    func tokens() async throws {
        try await withAPI { api, token, client in
            func ask(_ method: HTTPRequest.Method, _ path: String, _ body: String? = nil, as secret: String) async throws -> TestResponse {
                try await client.execute(uri: path, method: method, headers: [.authorization: "Bearer \(secret)"], body: body.map { .init(string: $0) })
            }
            let response = try await ask(.post, "/v1/tokens", #"{"name":"ops","role":"operator"}"#, as: token)
            #expect(response.status == .created)
            let created = try APIJSON.decoder().decode(CreatedToken.self, from: Data(buffer: response.body))
            let left = try #require(created.token.expires).timeIntervalSinceNow
            #expect((89.9...90).contains(left / 86_400))
            #expect(try await ask(.get, "/v1/status", as: created.secret).status == .ok)
            #expect(try await ask(.post, "/v1/tokens", #"{"name":"ops","role":"viewer"}"#, as: token).status == .conflict)
            for body in [#"{"name":"Ops","role":"viewer"}"#, #"{"name":"x","role":"king"}"#, #"{"name":"x"}"#, #"{"name":"x","role":"viewer","days":-1}"#, #"{"name":"x","role":"viewer","days":3651}"#] {
                #expect(try await ask(.post, "/v1/tokens", body, as: token).status.code == 422, "\(body)")
            }
            let endless = try await api.tokens.create(.init(name: "endless", role: .viewer, days: 0), who: "me")
            #expect(endless.token.expires == nil)
            let list = try await ask(.get, "/v1/tokens", as: token)
            #expect(try APIJSON.decoder().decode([TokenView].self, from: Data(buffer: list.body)).map(\.name) == ["administrator", "endless", "ops"])
            let events = try await ask(.get, "/v1/events", as: token)
            for text in [list, events].map({ String(buffer: $0.body) }) {
                #expect(!text.contains(created.secret) && !text.contains(Secrets.hash(created.secret)) && !text.contains(endless.secret))
            }
            #expect(String(buffer: events.body).contains("Create token"))

            // The time is moved, not waited for.
            try await api.tokens.catalogue.write { db in
                var record = try #require(try TokenRecord.fetchOne(db, key: "ops"))
                record.expires = Date() - 1
                try record.update(db)
            }
            #expect(try await ask(.get, "/v1/status", as: created.secret).status == .unauthorized)
            #expect(try await ask(.delete, "/v1/tokens/endless", as: token).status == .noContent)
            #expect(try await ask(.get, "/v1/status", as: endless.secret).status == .unauthorized)
            #expect(try await ask(.delete, "/v1/tokens/endless", as: token).status == .notFound)
            #expect(try await ask(.delete, "/v1/tokens/administrator", as: token).status == .conflict)
            #expect(try await ask(.get, "/v1/status", as: token).status == .ok)
        }
    }

    @Test("an address that shows too many wrong tokens is told so, and keeps nobody out who has a right one")
    func limit() async throws {
        try await withAPI(.live) { api, token, client in
            let wrong: HTTPFields = [.authorization: "Bearer wrong"]
            var statuses: [Int] = []
            for _ in 0..<60 {
                let response = try await client.execute(uri: "/v1/status", method: .get, headers: wrong)
                statuses.append(Int(response.status.code))
                if response.status == .tooManyRequests { #expect(Int(response.headers[.retryAfter] ?? "") ?? 0 > 0) }
            }
            #expect(statuses.prefix(10).allSatisfy { $0 == 401 } && Set(statuses).isSubset(of: [401, 429]))
            let enrol = try await client.execute(uri: "/v1/enrol", method: .post, headers: [:], body: .init(string: #"{"secret":"guess","csr":"none"}"#))
            #expect([401, 429].contains(Int(enrol.status.code)))
            #expect(try await client.execute(uri: "/v1/status", method: .get, headers: [.authorization: "Bearer \(token)"]).status == .ok)
        }
    }

    @Test("failures are forgotten one every six seconds; addresses do not wait for each other, nor do they fill the memory")
    func limiter() throws {
        let clock = Mutex(1000.0)
        let limiter = AuthenticationLimiter { clock.withLock { $0 } }
        func isTooMany(_ address: SocketAddress?) -> Bool { (try? limiter.failed(address)) == nil }
        let a = try SocketAddress(ipAddress: "192.0.2.1", port: 1), mapped = try SocketAddress(ipAddress: "::ffff:192.0.2.1", port: 2)
        let six = try SocketAddress(ipAddress: "2001:db8::1", port: 1), neighbour = try SocketAddress(ipAddress: "2001:db8::ffff:2", port: 1)
        let far = try SocketAddress(ipAddress: "2001:db8:0:1::1", port: 1)
        for address in [a, six] { for _ in 0..<10 { #expect(!isTooMany(address)) } }
        #expect(isTooMany(a) && isTooMany(mapped) && isTooMany(six) && isTooMany(neighbour) && !isTooMany(far) && !isTooMany(nil))
        #expect { try limiter.failed(a) } throws: { "\($0)".contains("192.0.2.1") && "\($0)".contains("6 s") }
        // However many there were.
        for _ in 0..<1000 { _ = isTooMany(a) }
        clock.withLock { $0 += 6.1 }
        #expect(!isTooMany(a) && isTooMany(a))
        clock.withLock { $0 += 3600 }
        for _ in 0..<10 { #expect(!isTooMany(a)) }
        for i in 0..<4200 { #expect(!isTooMany(try SocketAddress(ipAddress: "10.\(i >> 8).\(i & 255).1", port: 1))) }
        #expect(isTooMany(a), "an address was forgotten for others that have less to wait for")
    }

    @Test("errors are problem+json with a sentence")
    func problems() async throws {
        try await withAPI { api, token, client in
            _ = try await api.lifecycle.createSitePair(.init(name: "pair", type: .zoneToZone, primarySite: "a", secondarySite: "b"), who: "me")
            _ = try await api.lifecycle.addServers(.init(sitePair: "pair", names: ["web"]), who: "me")
            let points = "/v1/servers/web/recovery-points"
            let cases: [(HTTPRequest.Method, String, String?, Int, String)] = [
                (.put, "/v1/servers/web/policy", "{}", 422, "policy is missing"),
                (.put, "/v1/servers/web/policy", #"{"policy":"2h:1h"}"#, 422, "keeps nothing"),
                (.put, "/v1/servers/none/policy", #"{"policy":"standard"}"#, 404, "There is no server none"),
                (.get, points + "?limit=1001", nil, 422, "1 to 1000"),
                (.get, points + "?before=rp-1", nil, 404, "no recovery point rp-1 any more"),
                (.post, points, #"{"note":""}"#, 422, "a note has 1 to 200"),
                (.post, points, #"{"note":5}"#, 422, "note: "),
                (.post, points, nil, 409, "only in Replicating"),
                (.delete, points + "/rp-1", nil, 409, "There is no recovery point yet"),
                (.post, points + "/rp-1/hold", "{}", 422, "name is missing"),
                (.post, points + "/rp-1/hold", #"{"name":"a\u0007b"}"#, 422, "no control characters"),
                (.post, points + "/rp-1/hold", #"{"name":"gold"}"#, 409, "There is no recovery point yet"),
                (.delete, points + "/rp-1/hold", #"{"confirm":1}"#, 422, "confirm: "),
                (.post, points + "/rp-1/copy", #"{"format":"tape","path":"/x"}"#, 422, "format: "),
                (.post, points + "/rp-1/copy", #"{"format":"raw"}"#, 422, "path is missing"),
                (.post, "/v1/servers/web/machine/copy", "{}", 422, "copy is missing"),
                (.post, "/v1/servers/web/machine/copy", #"{"copy":{"format":"raw","path":"/x"}}"#, 409, "There is no failed-over machine of web"),
                (.post, "/v1/servers/web/machine/hydration", #"{"kind":"tape"}"#, 422, "kind: "),
                (.post, "/v1/servers/web/machine/hydration", "{}", 409, "There is no recovery machine of web"),
                (.post, points + "/rp-1/mount", "{}", 422, "directory is missing"),
                (.post, points + "/rp-1/mount", #"{"directory":"/mnt","partition":"two"}"#, 422, "partition: "),
                (.delete, "/v1/mounts/mount-1", nil, 404, "no mounted recovery point mount-1"),
                (.delete, "/v1/tasks/77", nil, 404, "There is no task 77"),
                (.delete, "/v1/tasks/seven", nil, 404, "There is no task seven"),
                (.post, "/v1/servers/web/failover/commit", "[]", 422, "cannot understand"),
                (.get, "/v1/servers/none/failover/commit", nil, 404, "There is no server none"),
                (.post, "/v1/store", nil, 405, "/v1/store takes GET, HEAD"),
                (.patch, "/v1/servers/web", nil, 405, "takes DELETE, GET, HEAD, not PATCH"),
                (.put, "/v1/servers/web/policy", #"{"policy":"standard","polcy":"x"}"#, 422, "no field polcy"),
                (.post, "/v1/servers/web/drill", #"{"forwards":[{"hostPort":1,"guestPort":2,"port":3}]}"#, 422, "no field forwards.port"),
                (.get, "/v1/tasks?limt=5", nil, 422, "no parameter limt here; there are server, before, limit"),
                (.get, "/v1/status?x=1", nil, 422, "no parameter x here"),
                (.get, "/v1/alerts?all=maybe", nil, 422, "all is true or false, not maybe"),
                (.post, "/v1/site-pairs", String(repeating: " ", count: 1 << 20) + "{}", 413, "larger than 1.0 MiB"),
                (.get, "/v1/servers/none", nil, 404, "There is no server none"),
                (.get, "/v1/tasks/77", nil, 404, "There is no task 77"),
                (.get, "/v1/nothing", nil, 404, "/v1/nothing"),
                (.post, "/v1/site-pairs", "{", 422, "cannot understand"),
                (.post, "/v1/site-pairs", "{}", 422, "name is missing"),
                (.post, "/v1/site-pairs", #"{"name":"p","type":"moon","primarySite":"a","secondarySite":"b"}"#, 422, "type"),
                (.post, "/v1/site-pairs", #"{"name":"p","type":"zone-to-zone","primarySite":"a","secondarySite":"a"}"#, 422, "two sites"),
                (.post, "/v1/servers", #"{"sitePair":"none","names":["web"]}"#, 404, "There is no site pair none"),
                (.get, "/v1/events?limit=0", nil, 422, "limit"),
            ]
            for (method, path, body, status, words) in cases {
                let response = try await client.execute(uri: path, method: method, headers: [.authorization: "Bearer \(token)"], body: body.map { .init(string: $0) })
                #expect(response.status.code == status, "\(method) \(path)")
                #expect(response.headers[.contentType] == "application/problem+json")
                let problem = try JSONDecoder().decode(Problem.self, from: Data(buffer: response.body))
                #expect(problem.status == status && problem.detail.contains(words), "\(problem.detail)")
            }
        }
    }

    @Test("the store says its room, its layers and its scrubbing, in status and by itself")
    func store() async throws {
        try await withAPI { _, token, client in
            let headers: HTTPFields = [.authorization: "Bearer \(token)"]
            let report = try APIJSON.decoder().decode(StoreReport.self, from: Data(buffer: try await client.execute(uri: "/v1/store", method: .get, headers: headers).body))
            let status = try APIJSON.decoder().decode(StatusView.self, from: Data(buffer: try await client.execute(uri: "/v1/status", method: .get, headers: headers).body))
            for view in [report.store, status.store] {
                #expect(view.capacityBytes > 0 && view.freeBytes <= view.capacityBytes && view.layerCount == 0 && view.scrub.badBlockCount == 0 && !view.scrub.isOn)
            }
            #expect(report.badExtents.isEmpty)
        }
    }

    @Test("site pair, servers and their limits")
    func servers() async throws {
        try await withAPI { api, _, _ in
            _ = try await api.lifecycle.createSitePair(.init(name: "pair", type: .zoneToZone, primarySite: "a", secondarySite: "b"), who: "me")
            await refused("There is a site pair") { _ = try await api.lifecycle.createSitePair(.init(name: "pair", type: .zoneToZone, primarySite: "a", secondarySite: "b"), who: "me") }
            let added = try await api.lifecycle.addServers(.init(sitePair: "pair", names: ["web", "db"]), who: "me")
            #expect(added.map(\.server) == ["web", "db"] && added[0].command.hasPrefix("afterimage agent enroll --token "))
            for names in [[], (0...10).map { "s\($0)" }, ["x", "x"], ["Web"], ["../x"], [""]] {
                await #expect(throws: ApplianceError.self) { _ = try await api.lifecycle.addServers(.init(sitePair: "pair", names: names), who: "me") }
            }
            // All or none.
            await refused("There is a server web") { _ = try await api.lifecycle.addServers(.init(sitePair: "pair", names: ["new", "web"]), who: "me") }
            let views = try await api.lifecycle.views()
            #expect(views.map(\.name) == ["db", "web"] && views[0].state == .agentInstalling)
            await refused("not connected yet") { _ = try await api.lifecycle.startReplication("web", .init(disks: ["vda"]), who: "me") }
            await #expect(throws: ApplianceError.self) { _ = try await api.lifecycle.startDrill("web", StartMachine(), who: "me") }
            await #expect(throws: ApplianceError.self) { _ = try await api.lifecycle.startFailover("web", StartMachine(), who: "me") }
            await #expect(throws: ApplianceError.self) { _ = try await api.lifecycle.changeRecoveryPoint("web", StartMachine(), who: "me") }
            _ = try await api.lifecycle.removeServer("db", .init(), who: "me")
        }
    }

    @Test("an enrolment token works once, for fifteen minutes, and a renewed one replaces it")
    func enrolment() async throws {
        try await withAPI { api, _, _ in
            let lifecycle = api.lifecycle
            _ = try await lifecycle.createSitePair(.init(name: "pair", type: .zoneToZone, primarySite: "a", secondarySite: "b"), who: "me")
            let first = try EnrolmentToken(text: try await lifecycle.addServers(.init(sitePair: "pair", names: ["web"]), who: "me")[0].token)
            #expect(first.caFingerprint == lifecycle.authority.fingerprint && first.serverName == "web")
            let csr = try AgentIdentity.makeKeyAndCSR(name: "web").csrPEM
            await unauthorized { _ = try await lifecycle.enrol(.init(secret: "guess", csr: csr)) }
            await #expect(throws: ApplianceError.self) { _ = try await lifecycle.enrol(.init(secret: first.secret, csr: "no csr")) }

            let renewed = try EnrolmentToken(text: try await lifecycle.renewEnrolment("web", who: "me").token)
            await unauthorized { _ = try await lifecycle.enrol(.init(secret: first.secret, csr: csr)) }
            let answer = try await lifecycle.enrol(.init(secret: renewed.secret, csr: csr))
            #expect(try certificateFingerprint(pem: answer.ca) == renewed.caFingerprint)
            await unauthorized { _ = try await lifecycle.enrol(.init(secret: renewed.secret, csr: csr)) }
            let record = try await lifecycle.server("web")
            #expect(await lifecycle.authorize(answer.server, certificateSerial: record.certificateSerial ?? ""))
            #expect(!(await lifecycle.authorize(answer.server, certificateSerial: "00")))

            // The time is moved, not waited for.
            let late = try EnrolmentToken(text: try await lifecycle.renewEnrolment("web", who: "me").token)
            let stored = try await lifecycle.server("web")
            let left = try #require(stored.enrolmentExpires).timeIntervalSinceNow
            #expect((890...900).contains(left))
            try await api.tokens.catalogue.write { db in
                var record = try db.server("web")
                record.enrolmentExpires = Date() - 1
                try record.update(db)
            }
            await unauthorized { _ = try await lifecycle.enrol(.init(secret: late.secret, csr: csr)) }
            let text = String(decoding: try JSONEncoder().encode(stored), as: UTF8.self)
            #expect(!text.contains(late.secret), "the secret itself is kept")
        }
    }

    @Test("docs/lifecycle.md holds the routes")
    func document() async throws {
        try await withAPI { api, _, _ in
            try Documentation.expect(APIDocument.render(api.routes), between: APIDocument.beginMarker, and: APIDocument.endMarker)
        }
    }

    private func unauthorized(_ body: () async throws -> Void) async {
        await #expect { try await body() } throws: { error in
            if case ApplianceError.unauthorized = error { true } else { false }
        }
    }

    private func refused(_ words: String, _ body: () async throws -> Void) async {
        await #expect { try await body() } throws: { error in
            if case ApplianceError.refused(let why) = error { why.contains(words) } else { false }
        }
    }
}

extension StartReplication {
    init(disks: [String]) {
        self.init()
        self.disks = disks
    }
}

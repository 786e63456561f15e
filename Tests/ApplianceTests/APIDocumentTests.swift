import BlockTap
import Foundation
import GRDB
import HTTPTypes
import Hummingbird
import HummingbirdTesting
import NIOCore
import Replica
import Testing

@testable import Appliance

@Suite("API document")
struct APIDocumentTests {
    @Test("the document has every route, no other, and each says its shape")
    func routes() async throws {
        try await withAPI { api, _, client in
            for route in api.routes { #expect(route.shape != nil, "\(route.method) \(route.path) does not say its shape") }
            let response = try await client.execute(uri: "/v1/openapi.json", method: .get)
            #expect(response.status == .ok && response.headers[.contentType] == "application/json")
            let document = try JSONDecoder().decode(JSONValue.self, from: Data(buffer: response.body))
            guard case .object(let paths) = document["paths"] else { Issue.record("no paths"); return }
            let documented = paths.flatMap { path, item -> [String] in if case .object(let methods) = item { methods.keys.map { "\($0.uppercased()) \(path)" } } else { [] } }
            #expect(Set(documented) == Set(api.routes.map { "\($0.method.rawValue) \($0.path)" }) && documented.count == api.routes.count)
            #expect(document["openapi"] == "3.1.0" && document["info"]?["version"]?.string == afterimageVersion)
            var identifiers: Set<String> = []
            for route in api.routes {
                let operation = try #require(paths[route.path]?[route.method.rawValue.lowercased()])
                #expect(identifiers.insert(try #require(operation["operationId"]?.string)).inserted, "two routes have the same operationId")
                #expect((operation["security"] == nil) == (route.access == .open))
                for status in ["401", "403"] { #expect(operation["responses"]?[status] != nil || route.access == .open) }
            }
        }
    }

    enum Colour: String, Codable, CaseIterable { case red, green }
    struct Inner: Codable { var date: Date; var colour: Colour? }
    struct Outer: Codable {
        var list: [Inner]
        var names: [String: Int]
        var id: RecoveryPointID
        var port: UInt16
        var check: BootCheck
        var inner: Inner?
    }
    enum Unlisted: String, Codable { case one }
    struct Bad: Codable { var unlisted: Unlisted }

    @Test("a type's schema has its fields, what may be missing, and what is in them")
    func schemas() throws {
        let book = SchemaBook()
        let reference = try book.schema(of: Outer.self)
        func component(_ reference: JSONValue) -> JSONValue? { reference["$ref"]?.string?.split(separator: "/").last.flatMap { book.components[String($0)] } }
        let outer = try #require(component(reference))
        let inner = try #require(outer["properties"]?["list"]?["items"])
        #expect(outer["required"] == ["check", "id", "list", "names", "port"])
        #expect(outer["properties"]?["names"] == ["type": "object", "additionalProperties": ["type": "integer"]])
        #expect(outer["properties"]?["id"] == ["type": "string"])
        #expect(outer["properties"]?["port"] == ["type": "integer", "minimum": 0, "maximum": 65535])
        #expect(outer["properties"]?["inner"] == ["anyOf": [inner, ["type": "null"]]])
        let fields = try #require(component(inner))
        #expect(fields["properties"]?["date"] == ["type": "string", "format": "date-time"])
        #expect(fields["properties"]?["colour"] == ["type": ["string", "null"], "enum": ["red", "green", .null]])
        #expect(fields["required"] == ["date"])
        guard let choices = outer["properties"]?["check"], case .array(let cases) = choices["oneOf"] else { Issue.record("no cases"); return }
        let check = SchemaCheck(["components": ["schemas": .object(book.components)]])
        #expect(cases.count == 6)
        for value in [BootCheck.running, .serial("x"), .agent, .tcp(22), .script("/x"), .all([.agent, .tcp(22)])] { #expect(try check.mismatch(json(value), choices) == nil) }
        #expect(throws: (any Error).self) { try SchemaBook().schema(of: Bad.self) }
    }

    @Test("what the appliance answers is what the document says, for values with everything in them and without")
    func answers() async throws {
        try await withAPI { api, token, client in
            let document = try OpenAPIDocument.make(api.routes)
            let check = SchemaCheck(document)
            var seen: Set<String> = []
            /// Asks, and holds the answer against the document.
            func ask(_ method: HTTPRequest.Method, _ path: String, _ body: String? = nil, _ expected: Int?) async throws {
                let response = try await client.execute(
                    uri: path, method: method, headers: [.authorization: "Bearer \(token)", .contentType: "application/json"], body: body.map { .init(string: $0) })
                #expect(expected == nil || Int(response.status.code) == expected, "\(method) \(path): \(String(buffer: response.body))")
                let parts = path.prefix { $0 != "?" }.split(separator: "/")
                let route = try #require(api.routes.first { route in
                    let own = route.path.split(separator: "/")
                    return route.method == method && own.count == parts.count && zip(own, parts).allSatisfy { $0.hasPrefix("{") || $0 == $1 }
                })
                let operation = try #require(document["paths"]?[route.path]?[method.rawValue.lowercased()])
                var answer = try #require(operation["responses"]?["\(response.status.code)"], "\(method) \(path): \(response.status) is not in the document")
                if answer["$ref"] != nil { answer = try #require(document["components"]?["responses"]?["Problem"]) }
                guard let content = answer["content"]?[response.headers[.contentType] ?? ""] else {
                    #expect(response.body.readableBytes == 0 && answer["content"] == nil, "\(method) \(path): another type of content")
                    return
                }
                // An archive, a picture.
                guard let schema = content["schema"] else { return }
                let value = try JSONDecoder().decode(JSONValue.self, from: Data(buffer: response.body))
                let wrong = check.mismatch(value, schema)
                #expect(wrong == nil, "\(method) \(path): \(wrong ?? "")")
                seen.insert("\(method.rawValue) \(route.path)")
            }
            try await ask(.post, "/v1/site-pairs", #"{"name":"pair","type":"zone-to-zone","primarySite":"a","secondarySite":"b"}"#, 201)
            try await ask(.post, "/v1/servers", #"{"sitePair":"pair","names":["web","db"]}"#, 201)
            for status in [200, 200] { try await ask(.put, "/v1/servers/web/alerts", #"{"rpoTargetSeconds":60}"#, status) }
            try await ask(.put, "/v1/servers/web/policy", #"{"policy":"all:1h"}"#, 200)
            try await ask(.put, "/v1/servers/web/policy", #"{"policy":5}"#, 422)
            try await ask(.put, "/v1/servers/none/policy", #"{"policy":"all:1h"}"#, 404)
            try await ask(.post, "/v1/servers/web/enrolment", nil, 201)
            try await ask(.post, "/v1/servers/web/drill", "{}", 409)
            try await ask(.post, "/v1/tokens", #"{"name":"t","role":"viewer"}"#, 201)
            try await ask(.post, "/v1/alert-channels", #"{"name":"c","webhook":{"url":"http://127.0.0.1:1/"}}"#, 201)
            try await ask(.post, "/v1/alert-channels/c/test", nil, 200)
            try await fill(api)
            for path in [
                "/v1/health", "/v1/ca", "/v1/status", "/v1/store", "/v1/site-pairs", "/v1/servers", "/v1/servers/web", "/v1/servers/web/policy", "/v1/servers/web/alerts", "/v1/users", "/v1/sessions/current", "/v1/servers/web/recovery-points",
                "/v1/mounts", "/v1/exports", "/v1/tasks?server=web&limit=5", "/v1/tasks/1", "/v1/events", "/v1/alerts?all=true", "/v1/alert-channels", "/v1/tokens", "/v1/openapi.json",
            ] { try await ask(.get, path, nil, 200) }
            try await ask(.delete, "/v1/tokens/t", nil, 204)
            try await ask(.delete, "/v1/alert-channels/c", nil, 204)
            try await ask(.delete, "/v1/servers/db", nil, 202)
            // What the state does not permit, says so in the same shape.
            for route in api.routes where route.method == .get && route.path != "/v1/stream" && !seen.contains("GET \(route.path)") {
                try await ask(.get, route.path.replacing("{server}", with: "web"), nil, nil)
            }
        }
    }

    /// Rows with everything in them.
    private func fill(_ api: API) async throws {
        try await api.tokens.catalogue.write { db in
            var server = try db.server("web")
            server.state = .abnormal
            (server.reason, server.drill, server.drillReason, server.hostName, server.agentVersion, server.kernel) = ("why", .testFailoverInProgress, "no", "h", "1", "6.1")
            server.disks = [DiskReport(name: "vda", devicePath: "/dev/vda", geometry: BlockGeometry(sizeBytes: 1 << 30, logicalBlockBytes: 512), tap: "nbd", socketPath: "/s")]
            server.specification = HostSpecification(cpus: 1, memoryMiB: 2, firmware: .uefi, kernel: "6.1", networkCards: [.init(name: "e", mac: "m", addresses: ["10.0.0.1/8"])], warnings: ["w"])
            server.settings = ReplicationSettings(
                disks: ["vda"], epochMilliseconds: 500, throttleBytesPerSecond: 0, automaticRestart: true, cpus: 1, memoryMiB: 2, consistentEverySeconds: 60, consistency: .filesystem, isPaused: true)
            server.lastProven = ProvenRecovery(kind: .drill, time: Date(), recoveryPoint: RecoveryPointID("rp-1"), recoveryPointTime: Date(), rtoSeconds: 1.5, bootLine: "up")
            server.lastSeen = Date()
            try server.update(db)
            for (id, check) in [("i-1", BootCheck.running), ("i-2", .serial("x"))] {
                try InstanceRecord(
                    id: id, server: server.id, kind: .drill, step: .unproven, point: RecoveryPointID("rp-1"), pointCutTimeNanoseconds: 1_700_000_000_000_000_000,
                    settings: MachineSettings(cpus: 1, memoryMiB: 2, network: .user, forwards: [PortForward(hostPort: 1, guestPort: 2)], bootCheck: check, bootSecondsMax: 3),
                    volumes: ["vda"], generation: 2, pid: 1, accelerator: "tcg", accepted: Date(), ready: Date(), rtoMilliseconds: 1, bootLine: "up", reason: "r").insert(db)
            }
            var task = try TaskBoard.plan(.drill, server: server, who: "me", in: db)
            try TaskBoard.log(task, "a line", in: db)
            task.progress = TaskProgress(step: "s", doneBytes: 1, totalBytes: 2, bytesPerSecond: 3, secondsLeft: 0.5)
            try task.update(db)
            var result = TaskResult()
            (result.recoveryPoint, result.cutTimeNanoseconds, result.generation, result.instance) = (RecoveryPointID("rp-1"), 1_700_000_000_000_000_000, 2, "i-1")
            (result.rtoSeconds, result.bootLine, result.accelerator, result.message, result.path, result.writtenBytes) = (1.5, "up", "tcg", "m", "/p", 5)
            try TaskBoard.finish(task, result: result, in: db)
            var alert = AlertRecord(Alert(kind: .abnormal, subject: "web", text: "t"), raised: Date())
            alert.cleared = Date()
            try alert.insert(db)
        }
    }

    @Test("recovery points, agents' reports and what is damaged are as the document says")
    func values() throws {
        let book = SchemaBook()
        func expect<T: Codable>(_ value: T) throws {
            let schema = try book.schema(of: T.self)
            let wrong = SchemaCheck(["components": ["schemas": .object(book.components)]]).mismatch(try json(value), schema)
            #expect(wrong == nil, "\(T.self): \(wrong ?? "")")
        }
        var point = RecoveryPoint(
            id: RecoveryPointID("rp-1"), group: GroupID("g"), epoch: EpochNumber(1), instance: "i", cutTimeNanoseconds: 5, consistency: .crash, receivedTimeNanoseconds: 6, dataBytes: 7)
        try expect(RecoveryPointView(point: point))
        (point.note, point.hold, point.isOnDemand) = ("n", "h", true)
        try expect([RecoveryPointView(point: point, damagedBlockCount: 3, isUnreadable: true, proof: CutProof(method: .freeze, consistency: .fileSystem))])
        var status = AgentStatus()
        try expect(status)
        (status.phase, status.reason, status.hold, status.live) = (.resync, "r", WriteHold(id: "h"), LiveTapStatistics())
        status.proofs = [PointProof(epoch: EpochNumber(1), instance: "i", proof: CutProof(method: .rounds))]
        try expect(status)
        try expect([BadExtent(group: GroupID("g"), volume: 0, disk: "vda", block: 1, count: 2, layers: [3], recoveryPoints: [RecoveryPointID("rp-1")], forks: [ForkID("f")])])
    }

    private func json(_ value: some Encodable) throws -> JSONValue { try JSONDecoder().decode(JSONValue.self, from: try APIJSON.encoder().encode(value)) }
}

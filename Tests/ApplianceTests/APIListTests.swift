import Foundation
import GRDB
import HTTPTypes
import Hummingbird
import HummingbirdTesting
import NIOCore
import Testing

@testable import Appliance

@Suite("API lists and changes")
struct APIListTests {
    private struct Asked: Sendable {
        var client: any TestClientProtocol
        var token: String

        func callAsFunction(_ method: HTTPRequest.Method, _ path: String, _ body: String? = nil, ifMatch: String? = nil) async throws -> TestResponse {
            var headers: HTTPFields = [.authorization: "Bearer \(token)"]
            if let ifMatch { headers[.ifMatch] = ifMatch }
            return try await client.execute(uri: path, method: method, headers: headers, body: body.map { .init(string: $0) })
        }

        /// Follows the links from `path` on.
        func pages<Item: Decodable>(_ path: String, _ type: Item.Type) async throws -> [[Item]] {
            var pages: [[Item]] = [], next: String? = path
            while let path = next, pages.count < 100 {
                let response = try await self(.get, path)
                #expect(response.status == .ok)
                pages.append(try APIJSON.decoder().decode([Item].self, from: Data(buffer: response.body)))
                next = response.headers[HTTPField.Name("Link")!].flatMap { $0.wholeMatch(of: /<(.*)>; rel="next"/).map { String($0.1) } }
            }
            return pages
        }
    }

    @Test("every list that grows is had whole, page by page, each thing once, also when there comes more meanwhile")
    func pages() async throws {
        try await withAPI { api, token, client in
            let ask = Asked(client: client, token: token)
            _ = try await api.lifecycle.createSitePair(.init(name: "pair", type: .zoneToZone, primarySite: "a", secondarySite: "b"), who: "me")
            _ = try await api.lifecycle.addServers(.init(sitePair: "pair", names: ["a", "b", "c", "d", "e"]), who: "me")
            try await api.tokens.catalogue.write { db in
                let server = try db.server("a")
                for i in 1...7 {
                    _ = try TaskBoard.plan(.drill, server: i.isMultiple(of: 2) ? server : db.server("b"), who: "me", in: db)
                    var alert = AlertRecord(Alert(kind: .abnormal, subject: "\(i)", text: "t"), raised: Date())
                    try alert.insert(db)
                }
            }
            #expect(try await ask.pages("/v1/tasks?limit=3", TaskView.self).map { $0.map(\.id) } == [[7, 6, 5], [4, 3, 2], [1]])
            #expect(try await ask.pages("/v1/tasks?limit=7", TaskView.self).map(\.count) == [7])
            #expect(try await ask.pages("/v1/tasks?server=a&limit=2", TaskView.self).map { $0.map(\.id) } == [[6, 4], [2]])
            #expect(try await ask.pages("/v1/alerts?limit=4&all=true", AlertRecord.self).map { $0.compactMap(\.id) } == [[7, 6, 5, 4], [3, 2, 1]])
            #expect(try await ask.pages("/v1/servers?limit=2", ServerView.self).map { $0.map(\.name) } == [["a", "b"], ["c", "d"], ["e"]])
            #expect(try await ask.pages("/v1/servers", ServerView.self).map(\.count) == [5])
            let events = try await ask.pages("/v1/events?limit=1", EventRecord.self).flatMap { $0 }.compactMap(\.id)
            #expect(events == events.sorted(by: >) && Set(events).count == events.count && events.last == 1)

            // What is new is before the first page, and moves nothing.
            let first = try await ask(.get, "/v1/tasks?limit=3")
            try await api.tokens.catalogue.write { db in _ = try TaskBoard.plan(.drill, server: try db.server("a"), who: "me", in: db) }
            let link = try #require(first.headers[HTTPField.Name("Link")!]?.wholeMatch(of: /<(.*)>; rel="next"/)).1
            #expect(try await ask.pages(String(link), TaskView.self).first?.map(\.id) == [4, 3, 2])
        }
    }

    @Test("of two writers that saw the same, the second is told so, and nothing of the first is lost")
    func writers() async throws {
        try await withAPI { api, token, client in
            let ask = Asked(client: client, token: token)
            _ = try await api.lifecycle.createSitePair(.init(name: "pair", type: .zoneToZone, primarySite: "a", secondarySite: "b"), who: "me")
            _ = try await api.lifecycle.addServers(.init(sitePair: "pair", names: ["web"]), who: "me")
            for (path, first, second) in [
                ("/v1/servers/web/policy", #"{"policy":"all:1h"}"#, #"{"policy":"all:2h"}"#), ("/v1/servers/web/alerts", #"{"rpoTargetSeconds":60}"#, #"{"rpoTargetSeconds":90}"#),
            ] {
                let seen = try #require(try await ask(.get, path).headers[.eTag])
                let server = try #require(try await ask(.get, "/v1/servers/web").headers[.eTag])
                #expect(seen.hasPrefix("\"") && seen.hasSuffix("\"") && seen != server)
                #expect(try await ask(.get, path).headers[.eTag] == seen, "nothing has changed")
                #expect(try await ask(.put, path, first, ifMatch: seen).status == .ok)
                let now = try #require(try await ask(.get, path).headers[.eTag])
                #expect(now != seen)
                let late = try await ask(.put, path, second, ifMatch: seen)
                #expect(late.status == .preconditionFailed)
                let problem = try JSONDecoder().decode(Problem.self, from: Data(buffer: late.body))
                #expect(problem.type == "problem:changed" && problem.detail.contains("Somebody has changed") && problem.detail.contains("web"))
                #expect(try await ask(.get, path).headers[.eTag] == now)
                // A server's ETag is of all of it.
                #expect(try await ask(.delete, "/v1/servers/web", nil, ifMatch: server).status == .preconditionFailed)
                for match in ["\(seen), \(now)", "*", now] { #expect(try await ask(.put, path, first, ifMatch: match).status == .ok, "\(match)") }
                #expect(try await ask(.put, path, first, ifMatch: "W/\(now)").status == .preconditionFailed, "a weak one never matches")
                for match in ["nonsense", "\"open", ""] { #expect(try await ask(.put, path, first, ifMatch: match).status.code == 422, "\(match)") }
                #expect(try await ask(.put, path, second).status == .ok, "without If-Match the last one wins")
            }
            #expect(try await api.lifecycle.view("web").alertSettings.rpoTargetSeconds == 90)

            // At the same moment, one of many gets through.
            let seen = try #require(try await ask(.get, "/v1/servers/web/policy").headers[.eTag])
            let statuses: [Int] = try await withThrowingTaskGroup(of: Int.self) { group in
                for hours in 3...10 { group.addTask { Int(try await ask(.put, "/v1/servers/web/policy", "{\"policy\":\"all:\(hours)h\"}", ifMatch: seen).status.code) } }
                return try await group.reduce(into: []) { $0.append($1) }
            }
            #expect(statuses.filter { $0 == 200 }.count == 1 && statuses.filter { $0 == 412 }.count == 7)
            let last = try #require(try await ask(.get, "/v1/servers/web").headers[.eTag])
            #expect(try await ask(.delete, "/v1/servers/web", nil, ifMatch: last).status == .accepted)
        }
    }
}

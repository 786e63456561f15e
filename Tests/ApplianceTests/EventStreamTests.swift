import AsyncHTTPClient
import Foundation
import GRDB
import HTTPTypes
import Hummingbird
import HummingbirdTesting
import NIOCore
import NIOEmbedded
import Testing

@testable import Appliance

@Suite("Event stream")
struct EventStreamTests {
    private func stream(_ api: API) async -> EventStream { EventStream(catalogue: api.tokens.catalogue, tasks: await api.lifecycle.tasks) }

    @Test("events, lines of logs, tasks and alerts are told once each, with a place to go on from")
    func news() async throws {
        try await withAPI { api, _, _ in
            let stream = await stream(api), catalogue = api.tokens.catalogue
            _ = try await api.lifecycle.createSitePair(.init(name: "pair", type: .zoneToZone, primarySite: "a", secondarySite: "b"), who: "me")
            _ = try await api.lifecycle.addServers(.init(sitePair: "pair", names: ["web"]), who: "me")
            let start = try await stream.now()
            var position = start, known: [Int64: String] = [:]
            #expect(try await stream.news(after: &position, known: &known).messages.isEmpty && position == start)

            let task = try await catalogue.write { db in
                let server = try db.server("web")
                try db.event("me", "Something", server: server, before: "a", after: "b")
                let task = try TaskBoard.plan(.drill, server: server, who: "me", in: db)
                try TaskBoard.log(task, "a line", in: db)
                var alert = AlertRecord(Alert(kind: .abnormal, subject: "web", text: "t"), raised: Date())
                try alert.insert(db)
                return task
            }
            let first = try await stream.news(after: &position, known: &known).messages
            #expect(first.map(\.kind) == ["audit", "task-log", "task", "alert"] && !first.contains { $0.data.contains("\n") })
            #expect(first[0].data.contains(#""what":"Something""#) && first[1].data.contains("a line"))
            #expect(try await stream.news(after: &position, known: &known).messages.isEmpty, "nothing twice")

            await api.lifecycle.tasks.report(task, TaskProgress(step: "half"))
            let progress = try await stream.news(after: &position, known: &known).messages
            #expect(progress.map(\.kind) == ["task"] && progress[0].data.contains("half") && progress[0].position == nil)
            try await api.lifecycle.tasks.finish(task, error: "no")
            try await catalogue.write { db in try db.execute(sql: "UPDATE alert SET cleared = ?", arguments: [Date()]) }
            let end = try await stream.news(after: &position, known: &known).messages
            #expect(end.map(\.kind) == ["task-log", "task", "alert"] && end[1].data.contains("failed") && end[2].data.contains("cleared"))
            #expect(known.isEmpty)
            #expect(try await stream.news(after: &position, known: &known).messages.isEmpty)

            // From any place on, all that is kept comes again, in the same order.
            for (index, message) in first.enumerated() {
                guard var place = message.position else { continue }
                #expect(try EventStream.Position(text: place.text) == place)
                var fresh: [Int64: String] = [:]
                let again = try await stream.news(after: &place, known: &fresh).messages.filter { $0.position != nil }.map(\.data)
                let kept = (first[(index + 1)...].filter { $0.kind == "audit" || $0.kind == "task-log" } + end.filter { $0.kind == "task-log" }).map(\.data)
                #expect(again.filter { !$0.contains("subject") } == kept)
                #expect(place == position)
            }
            for text in ["", "1", "1-2-3-4", "1-2-3-4-x", "1-2-3-4--5", "1-2-3-4-5-6"] { #expect(throws: ApplianceError.self) { try EventStream.Position(text: text) } }
        }
    }

    @Test("a stream goes on until its token is revoked, takes up after what was told last, and its place is free again")
    func live() async throws {
        try await withAPI(.live) { api, token, client in
            let secret = try await api.tokens.create(.init(name: "watcher", role: .viewer), who: "me").secret
            let port = try #require(client.port)
            let http = HTTPClient(eventLoopGroupProvider: .singleton)
            func open(_ last: String? = nil) async throws -> HTTPClientResponse {
                var request = HTTPClientRequest(url: "http://127.0.0.1:\(port)/v1/stream")
                request.headers.add(name: "Authorization", value: "Bearer \(secret)")
                if let last { request.headers.add(name: "Last-Event-ID", value: last) }
                return try await http.execute(request, timeout: .minutes(5))
            }
            do {
                let response = try await open()
                #expect(response.status == .ok && response.headers.first(name: "Content-Type") == "text/event-stream")
                var text = "", isTold = false
                for try await piece in response.body {
                    text += String(buffer: piece)
                    if text.contains("retry: "), !isTold {
                        isTold = true
                        _ = try await api.lifecycle.createSitePair(.init(name: "pair", type: .zoneToZone, primarySite: "a", secondarySite: "b"), who: "me")
                    }
                    // Ends the body, and the test's waiting.
                    if text.contains("Create site pair") { try? await api.tokens.revoke("watcher", who: "me") }
                }
                #expect(text.hasPrefix("retry: 2000\nid: ") && text.contains("event: audit\ndata: "))
                let refused = try await open()
                #expect(refused.status == .unauthorized)
                _ = try await refused.body.collect(upTo: 1 << 20)
            } catch {
                try await http.shutdown()
                throw error
            }
            try await http.shutdown()
            let bad = try await client.execute(
                uri: "/v1/stream", method: .get, headers: [.authorization: "Bearer \(token)", HTTPField.Name("Last-Event-ID")!: "yesterday"])
            #expect(bad.status.code == 422)
        }
    }

    @Test("who does not take a piece in time is disconnected; who does may take long for all of them")
    func slow() async throws {
        let seat = try StreamSeats().take(), channel = NIOAsyncTestingChannel(), loop = channel.testingEventLoop
        try await channel.connect(to: SocketAddress(ipAddress: "127.0.0.1", port: 1)).get()
        for _ in 0..<5 {
            seat.given(on: channel)
            await loop.advanceTime(by: .seconds(EventStream.takeSeconds - 1))
            seat.taken()
        }
        await loop.advanceTime(by: .seconds(10 * EventStream.takeSeconds))
        #expect(channel.isActive)
        seat.given(on: channel)
        await loop.advanceTime(by: .seconds(EventStream.takeSeconds + 1))
        #expect(!channel.isActive)
    }

    @Test("no more streams than there are seats; one that ends gives its own back")
    func seats() throws {
        let seats = StreamSeats()
        var taken: [StreamSeat] = []
        for _ in 0..<StreamSeats.countMax { taken.append(try seats.take()) }
        #expect { try seats.take() } throws: { "\($0)".contains("100 streams") }
        taken.removeLast()
        taken.append(try seats.take())
        taken = []
        #expect(seats.taken == 0)
    }
}

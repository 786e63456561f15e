import Foundation
import GRDB
import Hummingbird
import Logging
import Replica
import Synchronization
import Testing

@testable import Appliance

@Suite("Alerts")
struct AlertTests {
    @Test("what is wrong with a server is said in the state where it is wrong, and in no other")
    func rules() async throws {
        let now = Date(), day = 86_400.0
        func alerts(_ state: ServerState, pointAge: Double? = 1, since: Double = 1000, reason: String? = nil, _ change: (inout ServerRecord) -> Void = { _ in }, machine: InstanceStep? = nil) -> [Alert.Kind] {
            var server = ServerRecord(id: "web-1", name: "web", sitePair: "p", state: state, stateSince: now - since, reason: reason, disks: [], created: now - 10 * day)
            change(&server)
            let machines = machine.map { step in
                [InstanceRecord(
                    id: "m", server: "web-1", kind: .failover, step: step, pointCutTimeNanoseconds: 0,
                    settings: .init(cpus: 1, memoryMiB: 1, network: .none, forwards: [], bootCheck: .running, bootSecondsMax: 1), volumes: [], accepted: now)]
            }
            let found = AlertRules.alerts(of: server, newest: pointAge.map { now - $0 }, instances: machines ?? [], now: now)
            #expect(found.allSatisfy { $0.text.hasPrefix("web: ") && $0.subject == "web" && (reason == nil || $0.kind == .recoveryPointAge || $0.text.contains(reason!)) })
            return found.map(\.kind)
        }
        #expect(alerts(.replicating) == [])
        #expect(alerts(.replicating, pointAge: 301) == [.recoveryPointAge])
        #expect(alerts(.initialFullSync, pointAge: nil) == [], "nothing to be late with yet")
        #expect(alerts(.initialFullSync, pointAge: 301) == [.recoveryPointAge], "a full sync again, while there are points")
        #expect(alerts(.replicating, pointAge: 301, { $0.alertSettings = .init(rpoTargetSeconds: 0, drillEverySeconds: 0) }) == [])
        #expect(alerts(.replicating, pointAge: 61, { $0.alertSettings = .init(rpoTargetSeconds: 60, drillEverySeconds: 0) }) == [.recoveryPointAge])
        #expect(alerts(.replicationInterrupted, pointAge: 1000, since: 59, reason: "gone") == [])
        #expect(alerts(.replicationInterrupted, pointAge: 1000, since: 61, reason: "gone") == [.interrupted], "one cause, one alert")
        let paused = ReplicationSettings(disks: [], epochMilliseconds: 1, throttleBytesPerSecond: 0, automaticRestart: true, cpus: 1, memoryMiB: 1, isPaused: true)
        #expect(alerts(.replicationInterrupted, pointAge: 100, reason: "paused by me", { $0.settings = paused }) == [], "somebody wants it so")
        #expect(alerts(.replicationInterrupted, pointAge: 301, reason: "paused by me", { $0.settings = paused }) == [.recoveryPointAge], "but not for ever")
        #expect(alerts(.abnormal, reason: "a disk is missing") == [.abnormal])
        #expect(alerts(.initialized, pointAge: 1e6) == [], "nobody wants it followed")
        #expect(alerts(.failedOver, pointAge: 1e6, machine: .ready) == [])
        #expect(alerts(.failedOver, pointAge: 1e6, machine: .stopped) == [.machineStopped])
        #expect(alerts(.replicating, { $0.drill = .testFailoverInProgress }) == [])
        #expect(alerts(.replicating, { ($0.drill, $0.drillReason) = (.testFailoverInProgress, "no boot") }) == [.drillFailed])
        #expect(alerts(.replicating, { $0.created = now - 91 * day }) == [.drillOverdue])
        let proven = ProvenRecovery(kind: .drill, time: now - day, recoveryPoint: .init("p"), recoveryPointTime: now, rtoSeconds: 1, bootLine: "")
        #expect(alerts(.replicating, { ($0.created, $0.lastProven) = (now - 91 * day, proven) }) == [])
        #expect(alerts(.initialized, { $0.created = now - 91 * day }) == [])
    }

    @Test("an alert is raised once and over once, and told in that order, whatever fails on the way")
    func deliveries() async throws {
        try await withDesk { desk, receiver in
            try await desk.create(.init(name: "hook", webhook: .init(url: receiver.url, secret: "s3cret")), who: "me")
            var absences = AlertDesk.Absences()
            let alert = Alert(kind: .abnormal, subject: "web", text: "web: it is Abnormal — né"), start = Date()
            for seconds in [0.0, 5, 10] { try await desk.reconcile([alert, alert], absences: &absences, now: start + seconds) }
            #expect(try await desk.list(all: false, limit: 9).count == 1)

            receiver.answers([500, 302])
            var now = start
            for _ in 0..<3 {
                let at = now
                try await desk.deliver { at }
                now += 30
            }
            // Not seen for a moment is not over.
            try await desk.reconcile([], absences: &absences, now: start + 20)
            try await desk.reconcile([alert], absences: &absences, now: start + 40)
            try await desk.reconcile([], absences: &absences, now: start + 60)
            #expect(try await desk.list(all: false, limit: 9).count == 1)
            try await desk.reconcile([], absences: &absences, now: start + 91)
            #expect(try await desk.list(all: false, limit: 9).isEmpty)
            #expect(try await desk.list(all: true, limit: 9).first?.cleared != nil)
            let end = start + 200
            try await desk.deliver { end }

            let got = receiver.got
            #expect(got.map(\.message.news) == [.raised, .raised, .raised, .cleared])
            #expect(Set(got.prefix(3).map(\.message.delivery)).count == 1 && got[0].delivery == "\(got[0].message.delivery ?? 0)")
            #expect(got[0].message.alert.text == alert.text && got[0].message.text.hasPrefix("critical: "))
            for one in got { #expect(one.signature == "sha256=" + AlertTransport.signature(one.body, "s3cret")) }
            let channel = try #require(try await desk.channels().first)
            #expect(channel.waitingCount == 0 && channel.error == nil && channel.lastDelivered != nil)
            #expect(channel.target == "http://127.0.0.1:\(receiver.port)/…", "its path may be a secret")
        }
    }

    @Test("a target that does not answer is an alert after a while, is given up after a day, and its channel holds up no other")
    func failing() async throws {
        try await withDesk { desk, receiver in
            // Nobody listens there.
            try await desk.create(.init(name: "dead", webhook: .init(url: "http://127.0.0.1:1/x")), who: "me")
            try await desk.create(.init(name: "hook", webhook: .init(url: receiver.url), severity: .critical), who: "me")
            var absences = AlertDesk.Absences()
            let start = Date()
            try await desk.reconcile([Alert(kind: .storeFull, text: "full"), Alert(kind: .storeLow, text: "low")], absences: &absences, now: start)
            try await desk.deliver { start }
            #expect(receiver.got.map(\.message.alert.kind) == [.storeFull], "warnings are not for it")
            #expect(try await desk.failing(now: start + 60).isEmpty)
            let failing = try await desk.failing(now: start + 301)
            #expect(failing.map(\.kind) == [.channelFailing] && failing[0].subject == "dead" && failing[0].text.contains("afterimage alert-channel test dead"))
            #expect(try await desk.channels().first { $0.name == "dead" }?.waitingCount == 2)
            // Not at each look, but more and more seldom.
            for seconds in stride(from: 0.0, to: 1200, by: 5) {
                try await desk.deliver { start + seconds }
            }
            let attempts = try await desk.catalogue.read { db in try AlertDeliveryRecord.filter(Column("channel") == "dead").order(Column("id")).fetchAll(db).map(\.attempts) }
            #expect(attempts.count == 2 && (7...8).contains(attempts[0]) && attempts[1] == 0, "\(attempts)")
            for hours in [25.0, 26] { try await desk.deliver { start + hours * 3600 } }
            let (left, events) = try await desk.catalogue.read { db in
                (try AlertDeliveryRecord.filter(Column("ended") == nil).fetchCount(db), try EventRecord.filter(Column("what") == "Alert not delivered").fetchCount(db))
            }
            #expect(left == 0 && events == 2)
            try await desk.delete("dead", who: "me")
            let kept = try await desk.catalogue.read { db in try AlertDeliveryRecord.filter(Column("channel") == "dead").fetchCount(db) }
            #expect(kept == 0)
        }
    }

    @Test("a test message says what became of it, and waits for nobody")
    func tests() async throws {
        try await withDesk { desk, receiver in
            try await desk.create(.init(name: "hook", webhook: .init(url: receiver.url)), who: "me")
            #expect(try await desk.test("hook", who: "me").delivered)
            receiver.answers([404])
            let result = try await desk.test("hook", who: "me")
            #expect(!result.delivered && result.detail.contains("404"))
            #expect(receiver.got.map(\.message.news) == [.test, .test] && receiver.got.allSatisfy { $0.message.delivery == nil })
            await #expect(throws: ApplianceError.self) { try await desk.test("none", who: "me") }
        }
    }

    @Test("a channel that makes no sense is refused")
    func nonsense() async throws {
        try await withDesk { desk, _ in
            let mail = AlertTarget.Mail(server: "smtp://mail.example.org", from: "a@example.org", to: ["b@example.org"])
            func with(_ change: (inout AlertTarget.Mail) -> Void) -> CreateAlertChannel {
                var m = mail
                change(&m)
                return .init(name: "x", mail: m)
            }
            let wrong: [CreateAlertChannel] = [
                .init(name: "X!", webhook: .init(url: "http://a/")), .init(name: "x"), .init(name: "x", webhook: .init(url: "http://a/"), mail: mail),
                .init(name: "x", webhook: .init(url: "ftp://a/")), .init(name: "x", webhook: .init(url: "http:///x")), .init(name: "x", webhook: .init(url: "nonsense")),
                .init(name: "x", webhook: .init(url: "http://a/", secret: "")), .init(name: "x", webhook: .init(url: "https://a/", caCertificate: "no")),
                with { $0.server = "mail.example.org" }, with { $0.server = "smtp://a/path" }, with { $0.to = [] }, with { $0.to = ["b@example.org\r\nBcc: c@example.org"] },
                with { $0.from = "nobody" }, with { $0.user = "u" }, with { ($0.user, $0.password) = ("u", "p\nq") },
            ]
            for request in wrong { await #expect(throws: ApplianceError.self, "\(request)") { try await desk.create(request, who: "me") } }
            let channels = try await desk.channels()
            #expect(channels.isEmpty)
        }
    }

    @Test("a mail is one that mail programs can read")
    func mail() throws {
        let mail = AlertTarget.Mail(server: "smtp://h", from: "a@example.org", to: ["b@example.org", "c@example.org"])
        let plain = AlertMessage(.raised, delivery: 7, alert: AlertRecord(Alert(kind: .storeLow, text: "two\nlines"), raised: Date()))
        #expect(MailText.subject(plain) == "[Afterimage] warning: two lines")
        let text = MailText.text(plain, mail)
        let parts = text.split(separator: "\r\n\r\n", maxSplits: 1)
        #expect(parts[0].contains("\r\nTo: b@example.org,\r\n c@example.org\r\n") && parts[0].contains(" +0000\r\n"))
        #expect(text.replacingOccurrences(of: "\r\n", with: "").allSatisfy { !$0.isNewline })
        let body = try #require(Data(base64Encoded: String(parts[1]), options: .ignoreUnknownCharacters))
        #expect(String(decoding: body, as: UTF8.self).hasPrefix("warning: two\nlines\n"))
        let other = MailText.subject(AlertMessage(.cleared, delivery: 7, alert: AlertRecord(Alert(kind: .storeLow, text: String(repeating: "ünï ", count: 40)), raised: Date())))
        for line in other.split(separator: "\r\n ") { #expect(line.hasPrefix("=?utf-8?B?") && line.hasSuffix("?=") && line.count <= 75, "\(line)") }
    }

    private func withDesk(_ body: (AlertDesk, Receiver) async throws -> Void) async throws {
        let directory = try TemporaryDirectory()
        let catalogue = try Catalogue(path: directory.path + "/c.sqlite")
        let receiver = try await Receiver.start()
        do {
            try await body(AlertDesk(catalogue: catalogue, logger: Logger(label: "test") { _ in SwiftLogNoOpLogHandler() }), receiver)
        } catch {
            await receiver.stop()
            throw error
        }
        await receiver.stop()
        try catalogue.close()
    }
}

/// A web server that alerts are sent to.
private final class Receiver: Sendable {
    struct Got: Sendable {
        var message: AlertMessage
        var body: Data
        var signature: String?
        var delivery: String?
    }

    private struct State {
        var got: [Got] = []
        var answers: [Int] = []
    }

    private let state = Mutex(State())
    private let task = Mutex<Task<Void, any Error>?>(nil)
    private let listening = Mutex(0)
    var port: Int { listening.withLock { $0 } }
    var url: String { "http://127.0.0.1:\(port)/hook" }
    var got: [Got] { state.withLock { $0.got } }
    /// The next ones; then 200.
    func answers(_ statuses: [Int]) { state.withLock { $0.answers = statuses } }

    static func start() async throws -> Receiver {
        let receiver = Receiver()
        let router = Router()
        router.post("/hook") { request, _ in
            let body = Data(buffer: try await request.body.collect(upTo: 1 << 20))
            let message = try APIJSON.decoder().decode(AlertMessage.self, from: body)
            let status = receiver.state.withLock { state in
                state.got.append(Got(message: message, body: body, signature: request.headers[.init("X-Afterimage-Signature")!], delivery: request.headers[.init("X-Afterimage-Delivery")!]))
                return state.answers.isEmpty ? 200 : state.answers.removeFirst()
            }
            return Response(status: .init(code: status), headers: status == 302 ? [.location: "/hook"] : [:])
        }
        let (ports, continuation) = AsyncStream.makeStream(of: Int.self)
        let application = Application(
            router: router, configuration: .init(address: .hostname("127.0.0.1", port: 0)), onServerRunning: { continuation.yield($0.localAddress?.port ?? 0) },
            logger: Logger(label: "test") { _ in SwiftLogNoOpLogHandler() })
        let task = Task { try await application.run() }
        receiver.task.withLock { $0 = task }
        for await port in ports {
            receiver.listening.withLock { $0 = port }
            break
        }
        return receiver
    }

    func stop() async {
        let task = task.withLock { $0 }
        task?.cancel()
        _ = await task?.result
    }
}

import Foundation
import GRDB
import Logging

/// Keeps what is raised, and has every channel told: at least once, in order, again and again until it arrives or a day has gone.
struct AlertDesk: Sendable {
    let catalogue: Catalogue
    let logger: Logger
    var timing = Timing()

    struct Timing: Sendable {
        /// An alert is over when nothing has been seen of it for so long.
        var clearSeconds = 30.0
        /// After the first failure; doubled each time.
        var retrySeconds = 10.0
        var retrySecondsMax = 600.0
        var giveUpSeconds = 86_400.0
        /// Then its failing is an alert itself.
        var failingSeconds = 300.0
        /// What is over is forgotten, and what was delivered.
        var keepSeconds = 400 * 86_400.0
    }

    /// When alerts that are raised were no longer seen for the first time. In memory: after a restart they have that long again.
    typealias Absences = [Alert.Key: Date]

    // MARK: what is raised

    /// Stores what has come and what is over, with what the channels are to be told of it.
    func reconcile(_ alerts: [Alert], absences: inout Absences, now: Date = Date()) async throws {
        let open = try await catalogue.read { db in try AlertRecord.filter(Column("cleared") == nil).fetchAll(db) }
        let (current, known) = (Set(alerts.map(\.key)), Set(open.map(\.key)))
        absences = absences.filter { known.contains($0.key) && !current.contains($0.key) }
        for key in known.subtracting(current) where absences[key] == nil { absences[key] = now }
        let timing = timing
        let over = open.filter { record in absences[record.key].map { now.timeIntervalSince($0) >= timing.clearSeconds } ?? false }
        var seen = known
        let fresh = alerts.filter { seen.insert($0.key).inserted }
        if over.isEmpty && fresh.isEmpty { return }
        try await catalogue.write { db in
            let channels = try AlertChannelRecord.fetchAll(db)
            func tell(_ news: AlertMessage.News, _ alert: AlertRecord) throws {
                for channel in channels where channel.severity <= alert.severity {
                    var delivery = AlertDeliveryRecord(id: nil, channel: channel.name, alert: alert.id!, news: news, created: now, next: now)
                    try delivery.insert(db)
                }
            }
            for var record in over {
                record.cleared = now
                try record.update(db)
                try tell(.cleared, record)
            }
            for alert in fresh {
                var record = AlertRecord(alert, raised: now)
                try record.insert(db)
                try tell(.raised, record)
            }
            try AlertRecord.filter(Column("cleared") < now - timing.keepSeconds).deleteAll(db)
        }
        for alert in fresh { logger.warning("alert: \(alert.text)") }
    }

    func list(all: Bool, limit: Int, before: Int64? = nil) async throws -> [AlertRecord] {
        try await catalogue.read { db in
            var request = AlertRecord.order(Column("id").desc).limit(limit)
            if let before { request = request.filter(Column("id") < before) }
            return try (all ? request : request.filter(Column("cleared") == nil)).fetchAll(db)
        }
    }

    // MARK: channels

    func channels() async throws -> [AlertChannelView] {
        try await catalogue.read { db in try AlertChannelRecord.order(Column("name")).fetchAll(db).map { try view($0, db) } }
    }

    private func view(_ channel: AlertChannelRecord, _ db: Database) throws -> AlertChannelView {
        let own = AlertDeliveryRecord.filter(Column("channel") == channel.name)
        let waiting = own.filter(Column("ended") == nil)
        let last = try own.filter(Column("ended") != nil && Column("error") == nil).order(Column("ended").desc).fetchOne(db)
        let kind = if case .webhook = channel.target { "webhook" } else { "mail" }
        return AlertChannelView(
            name: channel.name, kind: kind, target: channel.target.summary, severity: channel.severity, created: channel.created,
            waitingCount: try waiting.fetchCount(db), error: try waiting.order(Column("id")).fetchOne(db)?.error, lastDelivered: last?.ended)
    }

    @discardableResult
    func create(_ request: CreateAlertChannel, who: String) async throws -> AlertChannelView {
        try Names.check(request.name, what: "channel")
        let target = try request.target()
        try target.check()
        if case .mail = target {
            do { _ = try AlertTransport.curl() } catch { throw ApplianceError.refused("\(error)") }
        }
        let record = AlertChannelRecord(name: request.name, target: target, severity: request.severity ?? .warning, created: Date())
        return try await catalogue.write { db in
            if try AlertChannelRecord.fetchOne(db, key: record.name) != nil {
                throw ApplianceError.refused("There is a channel \(record.name) already: delete it first (afterimage alert-channel delete \(record.name)).")
            }
            try record.insert(db)
            try db.event(who, "Create alert channel", after: record.name, detail: "\(target.summary), \(record.severity.rawValue) and above")
            return try view(record, db)
        }
    }

    func delete(_ name: String, who: String) async throws {
        try await catalogue.write { db in
            let record = try Self.channel(name, db)
            try record.delete(db)
            try db.event(who, "Delete alert channel", before: name, detail: record.target.summary)
        }
    }

    /// Sends a message now, past those that wait.
    func test(_ name: String, who: String) async throws -> AlertTestResult {
        let channel = try await catalogue.read { db in try Self.channel(name, db) }
        let alert = Alert(kind: .channelFailing, subject: name, text: "This is a test of the alert channel \(name), asked for by \(who). Nothing is wrong.")
        var result = AlertTestResult(delivered: true, detail: "delivered to \(channel.target.summary)")
        do { try await AlertTransport.send(AlertMessage(.test, delivery: nil, alert: AlertRecord(alert, raised: Date())), to: channel.target) } catch {
            result = AlertTestResult(delivered: false, detail: "cannot deliver to \(channel.target.summary): \(error)")
        }
        let detail = result.detail
        try await catalogue.write { db in try db.event(who, "Test alert channel", detail: "\(name): \(detail)") }
        return result
    }

    private static func channel(_ name: String, _ db: Database) throws -> AlertChannelRecord {
        if let record = try AlertChannelRecord.fetchOne(db, key: name) { return record }
        throw ApplianceError.notFound("There is no alert channel \(name) (afterimage alert-channel list).")
    }

    // MARK: deliveries

    /// Delivers what is due; the channels do not wait for each other.
    func deliver(now: @escaping @Sendable () -> Date = { Date() }) async throws {
        let due = try await catalogue.read { db in
            try String.fetchAll(db, sql: "SELECT DISTINCT channel FROM alertDelivery WHERE ended IS NULL AND next <= ?", arguments: [now()])
        }
        try await withThrowingTaskGroup(of: Void.self) { group in
            for channel in due { group.addTask { while try await deliverOldest(channel, now) {} } }
            try await group.waitForAll()
        }
    }

    /// The channel's oldest message, so that nobody reads that something is over before that it began. Whether there may be more.
    private func deliverOldest(_ name: String, _ now: @Sendable () -> Date) async throws -> Bool {
        // The catalogue keeps times to the millisecond, rounded.
        let began = now() + 0.001
        let found = try await catalogue.read { db -> (AlertChannelRecord, AlertDeliveryRecord, AlertRecord)? in
            guard let delivery = try AlertDeliveryRecord.filter(Column("channel") == name && Column("ended") == nil).order(Column("id")).fetchOne(db), delivery.next <= began,
                let channel = try AlertChannelRecord.fetchOne(db, key: name), let alert = try AlertRecord.fetchOne(db, key: delivery.alert)
            else { return nil }
            return (channel, delivery, alert)
        }
        guard let (channel, delivery, alert) = found else { return false }
        var failure: String?
        do { try await AlertTransport.send(AlertMessage(delivery.news, delivery: delivery.id, alert: alert), to: channel.target) } catch {
            if Task.isCancelled { throw CancellationError() }
            failure = "\(error)"
        }
        let (error, timing, ended) = (failure, timing, now())
        return try await catalogue.write { db in
            // The channel may be gone meanwhile, and its deliveries with it.
            guard var record = try AlertDeliveryRecord.fetchOne(db, key: delivery.id), record.ended == nil else { return false }
            record.attempts += 1
            record.error = error
            guard error != nil else {
                record.ended = ended
                try record.update(db)
                return true
            }
            record.next = ended + min(timing.retrySeconds * pow(2, Double(min(record.attempts - 1, 20))), timing.retrySecondsMax)
            guard ended.timeIntervalSince(record.created) > timing.giveUpSeconds else {
                try record.update(db)
                return false
            }
            record.ended = ended
            try record.update(db)
            try db.event("appliance", "Alert not delivered", detail: "\(name), given up after \(record.attempts) attempts: \(error ?? ""): \(alert.text)")
            return true
        }
    }

    /// Channels whose messages do not arrive.
    func failing(now: Date = Date()) async throws -> [Alert] {
        let timing = timing
        let failing = try await catalogue.read { db in
            try AlertDeliveryRecord.filter(Column("ended") == nil && Column("attempts") > 0 && Column("created") < now - timing.failingSeconds).order(Column("id")).fetchAll(db)
        }
        var seen: Set<String> = []
        return failing.filter { seen.insert($0.channel).inserted }.map {
            Alert(kind: .channelFailing, subject: $0.channel, text: "alerts do not arrive by channel \($0.channel): \($0.error ?? "") (afterimage alert-channel test \($0.channel))")
        }
    }
}

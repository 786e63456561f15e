import Foundation
import GRDB
import Replica

/// How servers send: epoch length, throttle and its windows, compression, and over which network.
extension Lifecycle {
    private static let windowCountMax = 50

    func pairType(of server: ServerRecord) async throws -> SitePairType {
        try await catalogue.read { db in try db.sitePair(server.sitePair).type }
    }

    static func checkTransfer(_ settings: ReplicationSettings) throws(ApplianceError) {
        guard (20...3_600_000).contains(settings.epochMilliseconds) else {
            throw .invalid("an epoch lasts 20 to 3600000 milliseconds, not \(settings.epochMilliseconds)")
        }
        let windows = settings.throttleWindows ?? []
        guard windows.count <= Self.windowCountMax else { throw .invalid("a server has at most \(Self.windowCountMax) throttle windows, not \(windows.count)") }
        for window in windows where !window.isValid {
            throw .invalid("a throttle window begins at minute 0 to 1439 of the day, ends at another one up to 1440, on days 1 (Monday) to 7: not \(window.startMinute) to \(window.endMinute)\(window.days.map { ", days \($0)" } ?? "")")
        }
    }

    /// Of Start Replication: both networks are there, at the pair's sites, in one zone.
    func withNetworks(_ server: ServerRecord, _ request: StartReplication, _ settings: ReplicationSettings) async throws -> ReplicationSettings {
        let old = server.settings
        let plain = settings
        return try await catalogue.read { db in
            let pair = try db.sitePair(server.sitePair)
            var settings = plain
            // The pair's is a name for people when no network is called so.
            let pairs = try NetworkRecord.fetchOne(db, key: pair.replicationNetwork)?.name
            let networks = try Self.checkNetworks(
                replication: request.replicationNetwork ?? old?.replicationNetwork ?? pairs, recovery: request.recoveryNetwork ?? old?.recoveryNetwork ?? pair.recoveryNetworkName,
                primarySite: pair.primarySite, secondarySite: pair.secondarySite, in: db)
            settings.replicationNetwork = networks.replication?.name
            settings.recoveryNetwork = networks.recovery?.name
            settings.linkHost = networks.replication?.address
            return settings
        }
    }

    /// What is on its way goes on; the agent sends the rest as it is told now.
    public func setReplication(_ name: String, _ request: SetReplication, ifMatch: Precondition = .none, who: String) async throws -> ServerView {
        let found = try await server(name)
        let record = try await catalogue.write { db in
            var record = try db.server(found.id)
            try db.refuseWhileRemoved(record)
            try ifMatch.check(try record.tag, "the settings of \(record.name)")
            guard var settings = record.settings else { throw ApplianceError.refused("Replication of \(record.name) was never started (afterimage replication start \(record.name)).") }
            let before = settings.transferText
            settings.epochMilliseconds = request.epochMilliseconds ?? settings.epochMilliseconds
            settings.throttleBytesPerSecond = request.throttleBytesPerSecond ?? settings.throttleBytesPerSecond
            settings.throttleWindows = request.throttleWindows ?? settings.throttleWindows
            settings.compression = request.compression ?? settings.compression
            settings.newDisks = request.newDisks ?? settings.newDisks
            try Self.checkTransfer(settings)
            record.settings = settings
            try record.update(db)
            try db.event(who, "Set replication", server: record, before: before, after: settings.transferText)
            return record
        }
        if record.state.phase == .forward, record.settings?.isPaused != true { await tellOrder(record.serverID) }
        return try await view(record.id)
    }
}

extension ReplicationSettings {
    /// In words: `an epoch every 1000 ms, at most 20.0 MiB/s (5.0 MiB/s Mon-Fri 08:00-18:00), compression auto`.
    public var transferText: String {
        func rate(_ bytes: UInt64) -> String { bytes == 0 ? "no throttle" : "at most \(Amount.bytes(bytes))/s" }
        let windows = (throttleWindows ?? []).map { "\($0.text): \(rate($0.bytesPerSecond))" }
        return "an epoch every \(epochMilliseconds) ms, \(rate(throttleBytesPerSecond))" + (windows.isEmpty ? "" : " (\(windows.joined(separator: "; ")))") + ", compression \((compression ?? .auto).rawValue)"
            + (newDisks == .add ? ", new disks of its host are protected, too" : "")
    }
}

extension ThrottleWindow {
    static let dayNames = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"]

    /// `[DAYS@]HH:MM-HH:MM=RATE`, with days as mon-fri or mon,wed; nil: it is none. `bytes` reads the rate.
    public init?(text: String, bytes: (String) -> UInt64?) {
        guard let match = text.wholeMatch(of: /(?:([a-z,-]+)@)?([0-9]{2}):([0-9]{2})-([0-9]{2}):([0-9]{2})=(.+)/), let rate = bytes(String(match.6)) else { return nil }
        func minute(_ hours: Substring, _ minutes: Substring) -> Int? {
            guard let hours = Int(hours), let minutes = Int(minutes), minutes < 60 else { return nil }
            return hours * 60 + minutes
        }
        guard let start = minute(match.2, match.3), let end = minute(match.4, match.5) else { return nil }
        var days: [Int]?
        if let words = match.1 {
            guard let read = Self.days(words) else { return nil }
            days = read
        }
        self.init(startMinute: start, endMinute: end, days: days, bytesPerSecond: rate)
        guard isValid else { return nil }
    }

    private static func days(_ words: Substring) -> [Int]? {
        var days: [Int] = []
        for word in words.split(separator: ",", omittingEmptySubsequences: false) {
            let ends = word.split(separator: "-", omittingEmptySubsequences: false).map { dayNames.firstIndex(of: String($0)) }
            guard (1...2).contains(ends.count), let first = ends[0], let last = ends[ends.count - 1] else { return nil }
            // sat-mon goes over Sunday.
            for day in first...(last < first ? last + 7 : last) where !days.contains(day % 7 + 1) { days.append(day % 7 + 1) }
        }
        return days
    }

    /// As it is written, without the rate.
    var text: String {
        func time(_ minute: Int) -> String { String(format: "%02d:%02d", minute / 60, minute % 60) }
        return (days.map { $0.filter((1...7).contains).map { Self.dayNames[$0 - 1] }.joined(separator: ",") + "@" } ?? "") + "\(time(startMinute))-\(time(endMinute))"
    }
}

import Foundation
import GRDB

/// What is wrong now, and who hears of it.
extension Lifecycle {
    /// Once, after `resume`: raises alerts and delivers them.
    func startAlerts(_ desk: AlertDesk, everySeconds: Double) {
        alertDesk = desk
        alertTasks = [
            Task { [weak self] in
                var absences = AlertDesk.Absences()
                while !Task.isCancelled {
                    guard let self else { return }
                    do { try await desk.reconcile(try await self.conditions(), absences: &absences) } catch {
                        if !Task.isCancelled { self.logger.error("cannot keep alerts: \(error)") }
                    }
                    try? await Task.sleep(for: .seconds(everySeconds))
                }
            },
            // Apart from the first, which nobody's slow server may hold up.
            Task { [weak self] in
                while !Task.isCancelled {
                    guard let self else { return }
                    do { try await desk.deliver() } catch {
                        if !Task.isCancelled { self.logger.error("cannot deliver alerts: \(error)") }
                    }
                    try? await Task.sleep(for: .seconds(everySeconds))
                }
            },
        ]
    }

    func stopAlerts() async {
        for task in alertTasks { task.cancel() }
        for task in alertTasks { await task.value }
        alertTasks = []
    }

    public func setAlerts(_ name: String, _ request: SetAlerts, ifMatch: Precondition = .none, who: String) async throws -> ServerView {
        for seconds in [request.rpoTargetSeconds, request.drillEverySeconds].compactMap({ $0 }) where !(0...AlertSettings.secondsMax).contains(seconds) {
            throw ApplianceError.invalid("the time is 0 (never) to \(AlertSettings.secondsMax) seconds, not \(seconds)")
        }
        let record = try await catalogue.write { db in
            var record = try db.server(name)
            try ifMatch.check(try record.alertsTag, "from when on alerts of \(record.name) are raised")
            let before = record.alertsInForce
            var after = before
            if let seconds = request.rpoTargetSeconds { after.rpoTargetSeconds = seconds }
            if let seconds = request.drillEverySeconds { after.drillEverySeconds = seconds }
            record.alertSettings = after
            try record.update(db)
            if before != after { try db.event(who, "Set alerts", server: record, before: before.text, after: after.text) }
            return record
        }
        return try await view(record.id)
    }

    /// For `status`. What cannot be looked at is in the log.
    func alerts() async -> [Alert] {
        do { return try await conditions() } catch {
            logger.error("cannot look for what is wrong: \(error)")
            return await storeAlerts()
        }
    }

    private func conditions() async throws -> [Alert] {
        let rows = try await catalogue.read { db in
            let machines = Dictionary(grouping: try InstanceRecord.fetchAll(db), by: \.server)
            return try ServerRecord.order(Column("name")).fetchAll(db).map { ($0, machines[$0.id] ?? []) }
        }
        let ofServers = rows.flatMap { server, machines in
            AlertRules.alerts(of: server, newest: newestPoint(server).map { Date(nanoseconds: $0.cutTimeNanoseconds) }, instances: machines, newDisks: newDisks(of: server) ?? [])
        }
        return await storeAlerts() + ofServers + (try await drillScheduleAlerts()) + (try await alertDesk?.failing() ?? [])
    }

    private func storeAlerts() async -> [Alert] {
        var alerts: [Alert] = []
        let store = storeView()
        let room = "\(Amount.bytes(store.freeBytes)) of \(Amount.bytes(store.capacityBytes)) are free in \(store.directory)"
        let tightening = tightensWhenLow ? "; meanwhile recovery points go before their time, the oldest first" : ""
        switch store.space {
        case .ok: break
        case .low:
            alerts.append(Alert(kind: .storeLow, text: "the store is nearly full (\(room)): give it more room, keep fewer recovery points (afterimage server set-policy), or release held ones\(tightening)"))
        case .full:
            alerts.append(Alert(kind: .storeFull, text: "the store is FULL (\(room)): nothing is taken in and no recovery points are made; the sources keep what they have not sent\(tightening)"))
        }
        return alerts + (await damageAlerts())
    }
}

import Foundation
import GRDB

/// Scheduled drills. One that is due is started as any drill is: the table decides, and a refusal is said, and tried again. That it was started, when the next is due,
/// and its task are one transaction, so none is lost and none made twice, whenever the appliance is killed. One whose check has passed is cleared again.
extension Lifecycle {
    static let scheduler = "drill schedule"

    func startDrillSchedules(everySeconds: Double) {
        drillScheduleTask = Task { [weak self] in
            while !Task.isCancelled {
                guard let self else { return }
                do { try await self.attendDrillSchedules() } catch {
                    if !Task.isCancelled { self.logger.error("cannot attend to the drill schedules: \(error)") }
                }
                try? await Task.sleep(for: .seconds(everySeconds))
            }
        }
    }

    func stopDrillSchedules() async {
        drillScheduleTask?.cancel()
        await drillScheduleTask?.value
    }

    func attendDrillSchedules(now: Date = Date()) async throws {
        let (due, passed) = try await catalogue.read { db in
            let ready = try ServerRecord.filter(Column("drill") == ServerState.testFailoverReady).fetchAll(db)
            return (
                try DrillScheduleRecord.filter(Column("next") <= now).order(Column("next")).fetchAll(db),
                try ready.filter { server in
                    let last = try db.lastTask(of: server.id, [.drill])
                    return last?.parameters.isScheduled == true && last?.status == .succeeded
                }.map(\.name)
            )
        }
        for name in passed where !isStopping { _ = try? await clearDrill(name, who: Self.scheduler) }
        for schedule in due where !isStopping {
            do { _ = try await startDrill(schedule.server, schedule.machine, for: schedule, who: Self.scheduler) } catch where !isStopping { try await putOff(schedule, "\(error)") }
        }
    }

    /// In the audit log once for each reason.
    private func putOff(_ schedule: DrillScheduleRecord, _ why: String) async throws {
        guard schedule.waitsFor != why else { return }
        try await catalogue.write { db in
            guard var stored = try DrillScheduleRecord.fetchOne(db, key: schedule.server), stored.next == schedule.next else { return }
            stored.waitsFor = why
            try stored.update(db)
            try db.event(Self.scheduler, "Scheduled drill put off", server: try ServerRecord.fetchOne(db, key: schedule.server), detail: why)
        }
    }

    /// One that is due for longer than a day.
    func drillScheduleAlerts(now: Date = Date()) async throws -> [Alert] {
        try await drillSchedules().filter { now.timeIntervalSince($0.next) > 86_400 }.map {
            Alert(
                kind: .drillOverdue, subject: $0.server,
                text: "\($0.server): its scheduled drill of \(APIJSON.text($0.next)) could not be started until now\($0.waitsFor.map { ": \($0)" } ?? "")")
        }
    }

    // MARK: Setting them up

    public func setDrillSchedule(_ name: String, _ request: SetDrillSchedule, ifMatch: Precondition = .none, who: String) async throws -> DrillScheduleView {
        let found = try await server(name)
        guard DrillCalendar.everyDaysRange.contains(request.everyDays) else {
            throw ApplianceError.invalid("a drill is scheduled every \(DrillCalendar.everyDaysRange.lowerBound) to \(DrillCalendar.everyDaysRange.upperBound) days, not every \(request.everyDays)")
        }
        let minute = try DrillCalendar.minute(request.at)
        var machine = request.machine ?? StartMachine()
        guard machine.recoveryPoint == nil || machine.recoveryPoint == "latest" else {
            throw ApplianceError.invalid("a scheduled drill is of the newest recovery point: no other can be named")
        }
        guard machine.graceful == nil else { throw ApplianceError.invalid("a drill never touches the source: graceful is for a failover") }
        machine.recoveryPoint = nil
        // What would be refused in the night is refused now.
        _ = try await machineSettings(found, machine)
        let (asked, now) = (machine, Date())
        let schedule = try await catalogue.write { db in
            let record = try db.server(found.id)
            try db.refuseWhileRemoved(record)
            if let before = try DrillScheduleRecord.fetchOne(db, key: record.id) { try ifMatch.check(try before.tag, "when drills of \(record.name) are started") }
            let schedule = DrillScheduleRecord(
                server: record.id, everyDays: request.everyDays, minuteOfDay: minute, machine: asked,
                next: DrillCalendar(everyDays: request.everyDays, minuteOfDay: minute).first(after: now), created: now, who: who)
            try schedule.save(db)
            try db.event(who, "Schedule drills", server: record, after: schedule.text, detail: "the first at \(APIJSON.text(schedule.next))")
            return schedule
        }
        return DrillScheduleView(schedule, server: found.name, last: try await drillReports(server: found.name, limit: 1).first)
    }

    public func deleteDrillSchedule(_ name: String, who: String) async throws {
        try await catalogue.write { db in
            let record = try db.server(name)
            guard let schedule = try DrillScheduleRecord.fetchOne(db, key: record.id) else { throw Self.noSchedule(record.name) }
            try schedule.delete(db)
            try db.event(who, "End scheduled drills", server: record, before: schedule.text)
        }
    }

    func drillScheduleTag(_ name: String) async throws -> EntityTag {
        try await catalogue.read { db in
            let record = try db.server(name)
            guard let schedule = try DrillScheduleRecord.fetchOne(db, key: record.id) else { throw Self.noSchedule(record.name) }
            return try schedule.tag
        }
    }

    public func drillSchedules() async throws -> [DrillScheduleView] {
        try await catalogue.read { db in
            let names = Dictionary(uniqueKeysWithValues: try ServerRecord.fetchAll(db).map { ($0.id, $0.name) })
            return try DrillScheduleRecord.order(Column("next")).fetchAll(db).map { schedule in
                let name = names[schedule.server] ?? schedule.server
                return DrillScheduleView(schedule, server: name, last: try DrillReportRecord.filter(Column("serverName") == name).order(Column("id").desc).fetchOne(db))
            }
        }
    }

    public func drillSchedule(_ name: String) async throws -> DrillScheduleView {
        let found = try await server(name)
        guard let schedule = try await drillSchedules().first(where: { $0.server == found.name }) else { throw Self.noSchedule(found.name) }
        return schedule
    }

    private static func noSchedule(_ name: String) -> ApplianceError {
        .notFound("No drills of \(name) are scheduled (afterimage drill schedule set \(name) --every 7d --at 03:00).")
    }

    // MARK: Reports

    /// Newest first.
    public func drillReports(server: String?, limit: Int, before: Int64? = nil) async throws -> [DrillReportRecord] {
        try await catalogue.read { db in
            var request = DrillReportRecord.order(Column("id").desc).limit(limit)
            if let server { request = request.filter(Column("serverName") == server) }
            if let before { request = request.filter(Column("id") < before) }
            return try request.fetchAll(db)
        }
    }

    public func drillReport(_ id: Int64) async throws -> DrillReportRecord {
        guard let report = try await catalogue.read({ db in try DrillReportRecord.fetchOne(db, key: id) }) else {
            throw ApplianceError.notFound("There is no report of a drill \(id) (afterimage drill report list).")
        }
        return report
    }

    /// Ends a drill's task together with its report: part of one transaction, so that a drill whose task has ended has one.
    static func endDrill(_ task: TaskRecord, _ instance: InstanceRecord?, _ result: DrillResult, outcome: TaskResult? = nil, error: String? = nil, console: String? = nil, in db: Database) throws {
        guard let id = task.id, let server = task.server, try TaskRecord.fetchOne(db, key: id)?.status == .running else { return }
        if let instance {
            let cut = instance.point == nil ? nil : Date(nanoseconds: UInt64(instance.pointCutTimeNanoseconds))
            try DrillReportRecord(
                id: id, server: server, serverName: task.serverName ?? server, isScheduled: task.parameters.isScheduled == true, who: task.who, recoveryPoint: instance.point,
                recoveryPointTime: cut, recoveryPointAgeSeconds: cut.map { max(0, instance.accepted.timeIntervalSince($0)) }, machine: instance.settings, started: instance.accepted, ended: Date(),
                result: result, readySeconds: outcome?.rtoSeconds, bootLine: outcome?.bootLine, accelerator: outcome?.accelerator, error: error, console: console
            ).insert(db, onConflict: .ignore)
        }
        try TaskBoard.finish(task, result: outcome, error: error, in: db)
    }
}

extension DrillScheduleRecord {
    /// It is being started: the next is due later. Part of the transaction that starts it; throws when the schedule is another by now.
    func advance(in db: Database) throws {
        guard var stored = try DrillScheduleRecord.fetchOne(db, key: server), stored.next == next else {
            throw ApplianceError.refused("The schedule of these drills has just been changed.")
        }
        stored.next = DrillCalendar(everyDays: everyDays, minuteOfDay: minuteOfDay).next(after: next, now: Date())
        stored.waitsFor = nil
        try stored.update(db)
    }

    /// For people.
    var text: String { "every \(everyDays == 1 ? "day" : "\(everyDays) days") at \(DrillCalendar.text(minuteOfDay)), boot check \(machine.bootCheck ?? "none")" }
}

/// `every` days at `HH:MM` of the appliance's local time.
public struct SetDrillSchedule: Sendable, Codable {
    public var everyDays: Int
    public var at: String
    /// As a drill is asked for; nil: all as recorded at Start Replication.
    public var machine: StartMachine?
    public init(everyDays: Int, at: String, machine: StartMachine? = nil) {
        self.everyDays = everyDays
        self.at = at
        self.machine = machine
    }
}

public struct DrillScheduleView: Sendable, Codable {
    public var server: String
    public var everyDays: Int
    public var at: String
    public var machine: StartMachine
    public var next: Date
    /// Why one that is due has not been started yet.
    public var waitsFor: String?
    public var who: String
    /// Of its newest drill, scheduled or not.
    public var lastReport: DrillReportRecord?

    init(_ schedule: DrillScheduleRecord, server: String, last: DrillReportRecord?) {
        self.server = server
        everyDays = schedule.everyDays
        at = DrillCalendar.text(schedule.minuteOfDay)
        machine = schedule.machine
        next = schedule.next
        waitsFor = schedule.waitsFor
        who = schedule.who
        lastReport = last
    }
}

import Foundation
import GRDB
import Testing

@testable import Appliance

@Suite("Scheduled drills")
struct DrillScheduleTests {
    private func berlin(_ everyDays: Int, _ at: String) throws -> DrillCalendar {
        var calendar = Calendar(identifier: .gregorian)
        calendar.timeZone = try #require(TimeZone(identifier: "Europe/Berlin"))
        return DrillCalendar(everyDays: everyDays, minuteOfDay: try DrillCalendar.minute(at), calendar: calendar)
    }

    private func time(_ text: String) throws -> Date { try Date(text, strategy: .iso8601) }

    @Test("the first is today or tomorrow, the next so many days later, at the same time of the day in summer and winter")
    func calendar() throws {
        let weekly = try berlin(7, "03:30")
        #expect(weekly.first(after: try time("2026-10-20T00:00:00Z")) == (try time("2026-10-20T01:30:00Z")))
        #expect(weekly.first(after: try time("2026-10-20T01:30:00Z")) == (try time("2026-10-21T01:30:00Z")))
        // The clocks go back on the 25th.
        #expect(weekly.next(after: try time("2026-10-20T01:30:00Z"), now: try time("2026-10-20T02:00:00Z")) == (try time("2026-10-27T02:30:00Z")))
        // There is no 02:30 on the day that they go forward: right after it.
        let nightly = try berlin(1, "02:30")
        #expect(nightly.next(after: try time("2026-03-28T01:30:00Z"), now: try time("2026-03-28T02:00:00Z")) == (try time("2026-03-29T01:00:00Z")))
        #expect(nightly.next(after: try time("2026-03-29T01:00:00Z"), now: try time("2026-03-29T02:00:00Z")) == (try time("2026-03-30T00:30:00Z")))
    }

    @Test("however many were missed, the next one is in the future, on a day of the schedule")
    func missed() throws {
        let weekly = try berlin(7, "03:30")
        #expect(weekly.next(after: try time("2026-06-01T01:30:00Z"), now: try time("2026-07-14T12:00:00Z")) == (try time("2026-07-20T01:30:00Z")))
    }

    @Test("a time of the day is HH:MM", arguments: ["24:00", "3:30", "03:60", "0330", "", "03:30:00", "aa:bb", "+1:00"])
    func times(text: String) throws {
        #expect(throws: ApplianceError.self) { _ = try DrillCalendar.minute(text) }
        #expect(try DrillCalendar.minute("23:59") == 1439 && DrillCalendar.text(65) == "01:05")
    }
}

@Suite("Scheduled drills of a server", .serialized, .enabled(if: Program.canBoot, Program.missing))
struct ScheduledDrillProcessTests {
    private func reports(_ sites: TwoSites) async throws -> [DrillReportRecord] { try await sites.json([DrillReportRecord].self, "drill report list --server shop") }

    /// The appliance is killed, and finds that a drill is due since long ago.
    private func makeDue(_ sites: TwoSites) async throws {
        sites.endAppliance(SIGKILL)
        let catalogue = try DatabaseQueue(path: sites.state + "/catalogue.sqlite")
        try await catalogue.write { db in try db.execute(sql: "UPDATE drillSchedule SET next = '2026-01-01 03:00:00.000'") }
        try catalogue.close()
        try await sites.startAppliance()
    }

    @Test("one that is due is made up once, reported, and cleared when it has passed; one that fails stays, and puts off the next, which says so")
    func schedule() async throws {
        let sites = try TwoSites()
        try await sites.protect()
        #expect(try await sites.cli("drill schedule set shop --every 36h --at 03:00").code == 64)
        #expect(try await sites.cli("drill schedule set shop --every 1d --at 25:00").code == 64)
        #expect(try await sites.cli("drill schedule set shop --every 1d --at 03:00 --cpus 0").code == 64)
        #expect(try await sites.cli("drill schedule delete shop").code == 4)
        #expect(try await sites.cli("drill schedule set shop --every 7d --at 03:00 --boot-check serial:RUNS").code == 0)
        #expect(try await reports(sites).isEmpty)

        try await makeDue(sites)
        try await until("the report") { try await reports(sites).count == 1 }
        let report = try #require(try await reports(sites).first)
        #expect(report.result == .passed && report.isScheduled && report.bootLine == "VERSION 1 RUNS" && report.console?.contains("VERSION 1 RUNS") == true)
        #expect(report.recoveryPoint != nil && (report.recoveryPointAgeSeconds ?? -1) >= 0 && (report.readySeconds ?? 0) > 0)
        try await until("the drill to be cleared by itself") { try await sites.view().drill == nil }
        try sites.expectNoMachines()
        let next = try #require(try await sites.json([DrillScheduleView].self, "drill schedule list").first)
        #expect(next.next > Date() && next.waitsFor == nil && next.lastReport?.id == report.id)
        #expect(try await sites.cli("drill report show \(report.id)").output.contains("VERSION 1 RUNS"))

        #expect(try await sites.cli("drill schedule set shop --every 1d --at 03:00 --boot-check serial:NEVER --boot-timeout 1").code == 0)
        try await makeDue(sites)
        try await until("the second report") { try await reports(sites).count == 2 }
        #expect(try await reports(sites).first?.result == .failed)
        #expect(try await reports(sites).first?.error?.contains("NEVER") == true)
        #expect(try await sites.view().drill == .testFailoverInProgress, "kept to be looked at")

        try await makeDue(sites)
        try await until("the next to be put off") { try await sites.json([DrillScheduleView].self, "drill schedule list").first?.waitsFor != nil }
        #expect(try await sites.cli("drill schedule list").output.contains("put off: "))
        #expect(try await sites.json([Event].self, "event list --server shop").contains { $0.what == "Scheduled drill put off" })
        #expect(try await sites.cli("drill clear shop --wait").code == 0)
        try await until("the one that was put off") { try await reports(sites).count == 3 }

        #expect(try await sites.cli("drill schedule delete shop").code == 0)
        #expect(try await sites.cli("drill clear shop --wait").code == 0)
        try sites.expectNoMachines()
    }
    private struct Event: Decodable { var what: String }

    @Test("a drill that is cleared before it is known whether it works is reported as that; one by hand is not cleared by itself")
    func byHand() async throws {
        let sites = try TwoSites()
        try await sites.protect()
        #expect(try await sites.cli("drill start shop --boot-check serial:NEVER --boot-timeout 600").code == 0)
        try await until("the machine to run") { try await sites.view().instances.first?.pid != nil }
        #expect(try await sites.cli("drill clear shop --wait").code == 0)
        let report = try #require(try await reports(sites).first)
        #expect(report.result == .cleared && !report.isScheduled && report.error?.contains("cleared by administrator") == true)
        #expect(try await sites.cli("drill start shop --boot-check serial:RUNS --wait").code == 0)
        #expect(try await reports(sites).map(\.result) == [.passed, .cleared])
        #expect(try await sites.view().drill == .testFailoverReady)
    }
}

import Appliance
import ArgumentParser
import Foundation

extension DrillCommand {
    struct Schedule: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            commandName: "schedule", abstract: "Drills that the appliance starts by itself.", subcommands: [Set.self, List.self, Delete.self])

        struct Set: ClientCommand {
            static let configuration = CommandConfiguration(
                abstract: "Have a drill of the newest recovery point started every so many days.",
                discussion: """
                    It is cleared again once its boot check has passed, so give one: without, a machine that merely runs has passed. One that fails is kept to be \
                    looked at (afterimage drill clear), and an alert says so. What was missed, since the appliance was down or the server could not be \
                    drilled, is made up once, as soon as it can be.
                    """)
            @OptionGroup var global: GlobalOptions
            @OptionGroup var machine: MachineOptions
            @Argument(help: "The server's name.") var name: String
            @Option(help: "Whole days: 1d, 7d, 2w.") var every: TimeSpan
            @Option(help: "Time of the day, HH:MM, the appliance's local time.") var at: String

            func validate() throws {
                guard every.seconds >= 86_400, every.seconds % 86_400 == 0 else { throw ValidationError("--every is in whole days: 1d, 7d, 2w") }
            }

            func request() throws -> SetDrillSchedule { SetDrillSchedule(everyDays: every.seconds / 86_400, at: at, machine: try machine.request(point: nil)) }

            func run(_ client: APIClient) async throws {
                let schedule: DrillScheduleView = try await client.put("/v1/servers/\(APIClient.segment(name))/drill-schedule", try request())
                try show(schedule) { ["drills of \(name) are started every \(Words.count(schedule.everyDays, "day")) at \(schedule.at), the next \(Words.timeToSecond(schedule.next))"] }
            }
        }

        struct List: ClientCommand {
            static let configuration = CommandConfiguration(abstract: "List schedules, the next first.")
            @OptionGroup var global: GlobalOptions

            func run(_ client: APIClient) async throws {
                let schedules: [DrillScheduleView] = try await client.get("/v1/drill-schedules")
                try show(schedules) {
                    Terminal.table(
                        ["SERVER", "EVERY", "AT", "NEXT", "LAST", "NOTE"],
                        schedules.map { schedule in
                            let last = schedule.lastReport.map { "\(Words.timeToSecond($0.started)) \($0.result.rawValue)" } ?? "-"
                            let note = schedule.waitsFor.map { "put off: \($0)" } ?? "boot check \(schedule.machine.bootCheck ?? "none")"
                            return [schedule.server, "\(schedule.everyDays)d", schedule.at, Words.timeToSecond(schedule.next), last, note]
                        })
                }
            }
        }

        struct Delete: ClientCommand {
            static let configuration = CommandConfiguration(abstract: "Start no more drills of a server by the clock.")
            @OptionGroup var global: GlobalOptions
            @Argument(help: "The server's name.") var name: String

            func run(_ client: APIClient) async throws {
                try await client.deleteNoContent("/v1/servers/\(APIClient.segment(name))/drill-schedule")
                say("no drills of \(name) are started by the clock any more")
            }
        }
    }

    struct Report: AsyncParsableCommand {
        static let configuration = CommandConfiguration(commandName: "report", abstract: "What came of drills.", subcommands: [List.self, Show.self])

        struct List: ClientCommand {
            static let configuration = CommandConfiguration(abstract: "List reports of drills, newest first.")
            @OptionGroup var global: GlobalOptions
            @Option(help: "Only this server's.") var server: String?
            @Option(help: "At most so many.") var limit: Int = 50

            func run(_ client: APIClient) async throws {
                let reports: [DrillReportRecord] = try await client.get("/v1/drill-reports?limit=\(limit)" + (server.map { "&server=\(APIClient.segment($0))" } ?? ""))
                try show(reports) {
                    Terminal.table(
                        ["ID", "STARTED", "SERVER", "POINT", "RESULT", "READY", "NOTE"],
                        reports.map { report in
                            let note = report.error?.split(separator: "\n").first.map(String.init) ?? report.bootLine ?? ""
                            return [
                                "\(report.id)", Words.timeToSecond(report.started), report.serverName, report.recoveryPoint?.rawValue ?? "-", report.result.rawValue,
                                report.readySeconds.map { Words.seconds($0) } ?? "-", note,
                            ]
                        })
                }
            }
        }

        struct Show: ClientCommand {
            static let configuration = CommandConfiguration(abstract: "Show the report of a drill.")
            @OptionGroup var global: GlobalOptions
            @Argument(help: "The report's number: that of the drill's task.") var id: Int64

            func run(_ client: APIClient) async throws {
                let report: DrillReportRecord = try await client.get("/v1/drill-reports/\(id)")
                let task: TaskView? = try? await client.get("/v1/tasks/\(id)")
                try show(report) { Self.words(report, hasScreenshot: task?.hasScreenshot == true) }
            }

            static func words(_ report: DrillReportRecord, hasScreenshot: Bool) -> [String] {
                var lines = ["drill \(report.id) of \(report.serverName): \(report.result.rawValue)"]
                lines += Terminal.field("asked for by", "\(report.who), \(Words.timeToSecond(report.started))")
                if let point = report.recoveryPoint, let time = report.recoveryPointTime, let age = report.recoveryPointAgeSeconds {
                    lines += Terminal.field("recovery point", "\(point), cut \(Words.timeToSecond(time)), \(Words.seconds(age)) before the drill")
                }
                lines += Terminal.field("machine", "\(Words.count(report.machine.cpus, "CPU")), \(report.machine.memoryMiB) MiB, network \(report.machine.network.rawValue)" + (report.accelerator.map { ", \($0)" } ?? ""))
                if let seconds = report.readySeconds { lines += Terminal.field("ready after", Words.seconds(seconds)) }
                lines += Terminal.field("boot check", report.machine.bootCheck.text + (report.bootLine.map { ": \($0)" } ?? ""))
                lines += Terminal.field("ended", Words.timeToSecond(report.ended))
                if let error = report.error { lines += Terminal.field("error", error) }
                if hasScreenshot { lines += Terminal.field("screenshot", "afterimage task screenshot \(report.id) FILE.png") }
                if let console = report.console, !console.isEmpty { lines += ["  console"] + console.split(separator: "\n", omittingEmptySubsequences: false).map { "    \($0)" } }
                return lines
            }
        }
    }
}

import Hummingbird

extension API {
    /// Schedules of drills, and what came of drills.
    var drills: [APIRoute] {
        [
            APIRoute(method: .get, path: "/v1/drill-schedules", access: .role(.viewer), summary: "list the servers whose drills are scheduled, the next first", shape: .gives([DrillScheduleView].self)) { _, _ in
                try APIResponse.json(try await lifecycle.drillSchedules())
            },
            APIRoute(method: .get, path: "/v1/servers/{server}/drill-schedule", access: .role(.viewer), summary: "when a server's drills are started", shape: .gives(DrillScheduleView.self).tagged) { _, context in
                let schedule = try await lifecycle.drillSchedule(try context.parameters.require("server"))
                return try APIResponse.json(schedule).tagged(try await lifecycle.drillScheduleTag(try context.parameters.require("server")))
            },
            APIRoute(method: .put, path: "/v1/servers/{server}/drill-schedule", access: .role(.operator), summary: "have drills started every so many days", shape: .gives(DrillScheduleView.self).takes(SetDrillSchedule.self).matches) { request, context in
                let wanted = try await request.decoded(SetDrillSchedule.self)
                try checkPrograms(of: wanted.machine, context)
                return try APIResponse.json(try await lifecycle.setDrillSchedule(try context.parameters.require("server"), wanted, ifMatch: try request.precondition, who: context.who))
            },
            APIRoute(method: .delete, path: "/v1/servers/{server}/drill-schedule", access: .role(.operator), summary: "start no more drills by the clock", shape: .nothing) { _, context in
                try await lifecycle.deleteDrillSchedule(try context.parameters.require("server"), who: context.who)
                return Response(status: .noContent)
            },
            APIRoute(method: .get, path: "/v1/drill-reports", access: .role(.viewer), summary: "list what came of drills, newest first (?server=NAME)", shape: .gives([DrillReportRecord].self).asks(.server, .beforeNumber).pages) { request, _ in
                let page = try await Page<DrillReportRecord>(in: request, before: { $0.id }) { try await lifecycle.drillReports(server: request.text("server"), limit: $0, before: $1) }
                return try APIResponse.json(page, for: request)
            },
            APIRoute(method: .get, path: "/v1/drill-reports/{task}", access: .role(.viewer), summary: "what came of the drill of a task", shape: .gives(DrillReportRecord.self)) { _, context in
                try APIResponse.json(try await lifecycle.drillReport(try taskID(context)))
            },
        ]
    }
}

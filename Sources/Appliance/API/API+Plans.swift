import Foundation
import Hummingbird

/// Recovery plans. Who writes them decides what runs on the appliance's host.
extension API {
    var plans: [APIRoute] {
        [
            APIRoute(method: .get, path: "/v1/plans", access: .role(.viewer), summary: "list recovery plans, each with its last run") { _, _ in
                try APIResponse.json(try await lifecycle.plans())
            },
            APIRoute(method: .post, path: "/v1/plans", access: .role(.administrator), summary: "create a recovery plan") { request, context in
                try APIResponse.json(try await lifecycle.createPlan(try await definition(request), who: context.who), status: .created)
            },
            APIRoute(method: .get, path: "/v1/plans/{plan}", access: .role(.viewer), summary: "show a recovery plan with its last run, step by step") { _, context in
                try APIResponse.json(try await lifecycle.plan(try plan(context)))
            },
            APIRoute(method: .put, path: "/v1/plans/{plan}", access: .role(.administrator), summary: "edit a recovery plan; a run that goes on keeps its steps") { request, context in
                try APIResponse.json(try await lifecycle.editPlan(try plan(context), try await definition(request), who: context.who))
            },
            APIRoute(method: .delete, path: "/v1/plans/{plan}", access: .role(.administrator), summary: "delete a recovery plan and the record of its runs; confirmed by its name") { request, context in
                try await lifecycle.deletePlan(try plan(context), try await request.decoded(Confirmation.self), who: context.who)
                return Response(status: .noContent)
            },
            APIRoute(method: .get, path: "/v1/plans/{plan}/runs", access: .role(.viewer), summary: "list the runs of a recovery plan, newest first (?limit=N)") { request, context in
                try APIResponse.json(try await lifecycle.planRuns(try plan(context), limit: try limit(request)))
            },
            APIRoute(method: .get, path: "/v1/plans/{plan}/run", access: .role(.viewer), summary: "what a run of a recovery plan would do (?kind=drill or failover; &graceful=true; &without=SERVER,SERVER)") { request, context in
                try APIResponse.json(try await lifecycle.planPreview(try plan(context), try askedRun(request)))
            },
            APIRoute(method: .post, path: "/v1/plans/{plan}/run", access: .role(.operator), summary: "run a recovery plan as drill or failover; a failover is confirmed by the plan's name") { request, context in
                try accepted(try await lifecycle.runPlan(try plan(context), try await request.decoded(RunPlan.self), who: context.who))
            },
            APIRoute(method: .post, path: "/v1/plans/{plan}/run/continue", access: .role(.operator), summary: "the manual step that a run waits for is done") { _, context in
                try APIResponse.json(try await lifecycle.continuePlan(try plan(context), who: context.who))
            },
            APIRoute(method: .post, path: "/v1/plans/{plan}/run/resume", access: .role(.operator), summary: "go on with a run that has failed or was stopped, at the failed step or without it") { request, context in
                try accepted(try await lifecycle.resumePlan(try plan(context), try await request.decoded(ResumePlan.self), who: context.who))
            },
            APIRoute(method: .post, path: "/v1/plans/{plan}/run/stop", access: .role(.operator), summary: "stop a run: nothing more is begun") { _, context in
                try APIResponse.json(try await lifecycle.stopPlan(try plan(context), who: context.who))
            },
            APIRoute(method: .delete, path: "/v1/plans/{plan}/run", access: .role(.operator), summary: "clear all drills of a recovery plan's last run") { _, context in
                try accepted(try await lifecycle.clearPlan(try plan(context), who: context.who))
            },
        ]
    }

    private func plan(_ context: APIContext) throws -> String { try context.parameters.require("plan") }

    private func definition(_ request: Request) async throws -> PlanDefinition {
        var request = request
        return try PlanText.definition(Data(buffer: try await request.collectBody(upTo: 1 << 20)))
    }

    private func askedRun(_ request: Request) throws -> RunPlan {
        let query = request.uri.queryParameters
        guard let kind = InstanceKind(rawValue: query["kind"].map(String.init) ?? "drill") else { throw ApplianceError.invalid("kind is drill or failover, not \(query["kind"] ?? "")") }
        var run = RunPlan(kind: kind)
        if let graceful = query["graceful"] {
            guard let isGraceful = Bool(String(graceful)) else { throw ApplianceError.invalid("graceful is true or false, not \(graceful)") }
            run.graceful = isGraceful ? true : nil
        }
        run.without = query["without"].map { $0.split(separator: ",").map(String.init) }
        return run
    }
}

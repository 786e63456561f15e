import Foundation
import Hummingbird

/// Recovery plans. Who writes them decides what runs on the appliance's host.
extension API {
    var plans: [APIRoute] {
        [
            APIRoute(method: .get, path: "/v1/plans", access: .role(.viewer), summary: "list recovery plans, each with its last run", shape: .gives([PlanView].self)) { _, _ in
                try APIResponse.json(try await lifecycle.plans())
            },
            APIRoute(method: .post, path: "/v1/plans", access: .role(.administrator), summary: "create a recovery plan", shape: .gives(PlanView.self, .created).takes(PlanDefinition.self)) { request, context in
                try APIResponse.json(try await lifecycle.createPlan(try await definition(request), who: context.who), status: .created)
            },
            APIRoute(method: .get, path: "/v1/plans/{plan}", access: .role(.viewer), summary: "show a recovery plan with its last run, step by step", shape: .gives(PlanView.self).tagged) { _, context in
                let found = try await lifecycle.plan(try plan(context))
                return try APIResponse.json(found).tagged(try found.tag)
            },
            APIRoute(method: .put, path: "/v1/plans/{plan}", access: .role(.administrator), summary: "edit a recovery plan; a run that goes on keeps its steps", shape: .gives(PlanView.self).takes(PlanDefinition.self).matches) { request, context in
                try APIResponse.json(try await lifecycle.editPlan(try plan(context), try await definition(request), ifMatch: try request.precondition, who: context.who))
            },
            APIRoute(method: .delete, path: "/v1/plans/{plan}", access: .role(.administrator), summary: "delete a recovery plan and the record of its runs; confirmed by its name", shape: .nothing.takes(Confirmation.self)) { request, context in
                try await lifecycle.deletePlan(try plan(context), try await request.decoded(Confirmation.self), who: context.who)
                return Response(status: .noContent)
            },
            APIRoute(method: .get, path: "/v1/plans/{plan}/runs", access: .role(.viewer), summary: "list the runs of a recovery plan, newest first", shape: .gives([PlanRunView].self).asks(.beforeNumber).pages) { request, context in
                let name = try plan(context)
                let page = try await Page<PlanRunView>(in: request, before: { $0.id }) { try await lifecycle.planRuns(name, limit: $0, before: $1) }
                return try APIResponse.json(page, for: request)
            },
            APIRoute(method: .get, path: "/v1/plans/{plan}/run", access: .role(.viewer), summary: "what a run of a recovery plan would do (?kind=drill or failover; &graceful=true; &without=SERVER,SERVER)", shape: .gives(PlanPreview.self).asks(.kind, .graceful, .without)) { request, context in
                try APIResponse.json(try await lifecycle.planPreview(try plan(context), try askedRun(request)))
            },
            APIRoute(method: .post, path: "/v1/plans/{plan}/run", access: .role(.operator), summary: "run a recovery plan as drill or failover; a failover is confirmed by the plan's name", shape: .starts.takes(RunPlan.self)) { request, context in
                try accepted(try await lifecycle.runPlan(try plan(context), try await request.decoded(RunPlan.self), who: context.who))
            },
            APIRoute(method: .post, path: "/v1/plans/{plan}/run/continue", access: .role(.operator), summary: "the manual step that a run waits for is done", shape: .gives(PlanRunView.self)) { _, context in
                try APIResponse.json(try await lifecycle.continuePlan(try plan(context), who: context.who))
            },
            APIRoute(method: .post, path: "/v1/plans/{plan}/run/resume", access: .role(.operator), summary: "go on with a run that has failed or was stopped, at the failed step or without it", shape: .starts.takes(ResumePlan.self)) { request, context in
                try accepted(try await lifecycle.resumePlan(try plan(context), try await request.decoded(ResumePlan.self), who: context.who))
            },
            APIRoute(method: .post, path: "/v1/plans/{plan}/run/stop", access: .role(.operator), summary: "stop a run: nothing more is begun", shape: .gives(PlanRunView.self)) { _, context in
                try APIResponse.json(try await lifecycle.stopPlan(try plan(context), who: context.who))
            },
            APIRoute(method: .delete, path: "/v1/plans/{plan}/run", access: .role(.operator), summary: "clear all drills of a recovery plan's last run", shape: .starts) { _, context in
                try accepted(try await lifecycle.clearPlan(try plan(context), who: context.who))
            },
        ]
    }

    private func plan(_ context: APIContext) throws -> String { try context.parameters.require("plan") }

    private func definition(_ request: Request) async throws -> PlanDefinition {
        var request = request
        return try PlanText.definition(Data(buffer: try await request.collectBody(upTo: 1 << 20)))
    }

    /// What the query may be has been checked.
    private func askedRun(_ request: Request) throws -> RunPlan {
        guard let kind = InstanceKind(rawValue: request.text("kind") ?? "drill") else { throw ApplianceError.invalid("kind is drill or failover, not \(request.text("kind") ?? "")") }
        var run = RunPlan(kind: kind)
        run.graceful = request.text("graceful") == "true" ? true : nil
        run.without = request.text("without").map { $0.split(separator: ",").map(String.init) }
        return run
    }
}

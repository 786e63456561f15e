import Foundation
import GRDB
import HTTPTypes
import Hummingbird
import Logging

/// The REST API: the routes, and the router made from them.
struct API: Sendable {
    let lifecycle: Lifecycle
    let catalogue: Catalogue
    let tokens: AccessTokens
    let logger: Logger
    let users: Users
    private let limiter = AuthenticationLimiter()
    let passwordLimiter = AuthenticationLimiter(what: "passwords")
    private let desk: AlertDesk
    private let document = OnceMade<JSONValue>()
    private let seats = StreamSeats()

    /// `administratorPasswordPath`: see `Users`.
    init(lifecycle: Lifecycle, catalogue: Catalogue, administratorPasswordPath: String? = nil, logger: Logger) {
        self.lifecycle = lifecycle
        self.catalogue = catalogue
        tokens = AccessTokens(catalogue: catalogue)
        users = Users(catalogue: catalogue, passwordPath: administratorPasswordPath)
        desk = AlertDesk(catalogue: catalogue, logger: logger)
        self.logger = logger
    }

    func router() -> Router<APIContext> {
        let router = Router(context: APIContext.self, options: .autoGenerateHeadEndpoints)
        let routes = routes
        router.add(middleware: ProblemMiddleware(paths: APIPaths(routes), logger: logger))
        for route in routes {
            let check = route.shape.map { APIShapeCheck($0, isOpen: route.access == .open) }
            router.on(RouterPath(route.path), method: route.method) { request, context in
                var known = context
                if case .role(let role) = route.access {
                    let holder = try await holder(request, context, atLeast: role, at: route)
                    (known.who, known.role) = (holder.name, holder.role)
                }
                return try await route.handler(try await check?.check(request) ?? request, known)
            }
        }
        return router
    }

    /// Whose token or session the request carries, if that is enough.
    private func holder(_ request: Request, _ context: APIContext, atLeast role: Role, at route: APIRoute) async throws -> Holder {
        let refusal = ApplianceError.unauthorized("This needs an access token: Authorization: Bearer TOKEN (the CLI takes it from its profile, see afterimage --help).")
        guard request.headers[.authorization] != nil else { throw refusal }
        guard let holder = try await holder(request) else {
            try limiter.failed(context.remoteAddress)
            throw ApplianceError.unauthorized("This access token is not known here, was revoked, or its time is over (afterimage token list shows those that are good; afterimage login begins a new session).")
        }
        guard holder.role >= role else {
            throw ApplianceError.forbidden("\(holder.session == nil ? "The token " : "")\(holder.name) has the role \(holder.role.rawValue); \(route.method.rawValue) \(route.path) needs the role \(role.rawValue).")
        }
        return holder
    }

    /// Whose token or session the request carries; nil: nobody's, or no longer.
    func holder(_ request: Request) async throws -> Holder? {
        guard let header = request.headers[.authorization], header.hasPrefix("Bearer ") else { return nil }
        let secret = String(header.dropFirst("Bearer ".count))
        if let token = try await tokens.holder(secret: secret) { return Holder(name: token.name, role: token.role, expires: token.expires) }
        return try await users.holder(secret: secret)
    }

    func name(_ context: APIContext) throws -> String { try context.parameters.require("server") }

    func accepted(_ task: TaskRecord) throws -> Response {
        try APIResponse.json(TaskView(task), status: task.status == .running ? .accepted : .ok)
    }

    var routes: [APIRoute] {
        open + sites + networks + servers + replication + recovery + machineControl + drills + plans + reverse + machines + records + alerts + access + people + support
    }

    private var open: [APIRoute] {
        [
            APIRoute(method: .get, path: "/v1/health", access: .open, summary: "whether the appliance is up", shape: .gives(Health.self)) { _, _ in
                try APIResponse.json(Health(status: "ok", version: afterimageVersion))
            },
            APIRoute(method: .get, path: "/v1/openapi.json", access: .open, summary: "this API as OpenAPI 3.1 describes it", shape: .gives(JSONValue.self)) { _, _ in
                try APIResponse.json(try document.value { try OpenAPIDocument.make(routes) })
            },
            APIRoute(method: .get, path: "/v1/ca", access: .open, summary: "the appliance's CA certificate, to be compared with a fingerprint", shape: .gives(CACertificate.self)) { _, _ in
                try APIResponse.json(CACertificate(certificate: lifecycle.authority.certificatePEM))
            },
            APIRoute(method: .post, path: "/v1/enrol", access: .open, summary: "exchange an enrolment token's secret and a CSR for a certificate", shape: .gives(EnrolAnswer.self).takes(EnrolRequest.self, open: true)) { request, context in
                do { return try APIResponse.json(try await lifecycle.enrol(try await request.decoded(EnrolRequest.self))) } catch let error as ApplianceError {
                    if case .unauthorized = error { try limiter.failed(context.remoteAddress) }
                    throw error
                }
            },
        ]
    }

    private var sites: [APIRoute] {
        [
            APIRoute(method: .get, path: "/v1/status", access: .role(.viewer), summary: "am I protected?", shape: .gives(StatusView.self)) { _, _ in
                try APIResponse.json(try await lifecycle.status())
            },
            APIRoute(method: .get, path: "/v1/store", access: .role(.viewer), summary: "the store: space, layers, what upkeep and scrubbing did, what is damaged", shape: .gives(StoreReport.self)) { _, _ in
                try APIResponse.json(await lifecycle.storeReport())
            },
            APIRoute(method: .get, path: "/v1/site-pairs", access: .role(.viewer), summary: "list site pairs", shape: .gives([SitePairRecord].self)) { _, _ in
                try APIResponse.json(try await lifecycle.sitePairs())
            },
            APIRoute(method: .post, path: "/v1/site-pairs", access: .role(.administrator), summary: "create a site pair", shape: .gives(SitePairRecord.self, .created).takes(CreateSitePair.self)) { request, context in
                let pair = try await lifecycle.createSitePair(try await request.decoded(CreateSitePair.self), who: context.who)
                return try APIResponse.json(pair, status: .created)
            },
        ]
    }

    private var servers: [APIRoute] {
        [
            APIRoute(method: .get, path: "/v1/servers", access: .role(.viewer), summary: "list servers, by name", shape: .gives([ServerView].self).asks(.after).pages) { request, _ in
                let page = try await Page<ServerView>(lifecycle.views(), in: request, after: { $0.name })
                return try APIResponse.json(page, for: request)
            },
            APIRoute(method: .post, path: "/v1/servers", access: .role(.administrator), summary: "add 1 to 10 servers", shape: .gives([Enrolment].self, .created).takes(AddServers.self)) { request, context in
                let added = try await lifecycle.addServers(try await request.decoded(AddServers.self), who: context.who)
                return try APIResponse.json(added, status: .created)
            },
            APIRoute(method: .get, path: "/v1/servers/{server}", access: .role(.viewer), summary: "show a server; its ETag is of what requests change of it", shape: .gives(ServerView.self).tagged) { _, context in
                // Never newer than what is shown: a change in between refuses the next one, and no more.
                let tag = try await lifecycle.server(try name(context)).tag
                return try APIResponse.json(try await lifecycle.view(try name(context))).tagged(tag)
            },
            APIRoute(method: .delete, path: "/v1/servers/{server}", access: .role(.administrator), summary: "unregister a server", shape: .starts.takes(RemoveServer.self).matches) { request, context in
                try accepted(
                    try await lifecycle.removeServer(try name(context), try await request.decoded(RemoveServer.self), ifMatch: try request.precondition, who: context.who))
            },
            APIRoute(method: .get, path: "/v1/servers/{server}/removal", access: .role(.viewer), summary: "what unregistering a server would delete", shape: .gives(OperationPreview.self)) { _, context in
                try APIResponse.json(try await lifecycle.removalPreview(try name(context)))
            },
            APIRoute(method: .get, path: "/v1/servers/{server}/policy", access: .role(.viewer), summary: "show the Recovery Point Policy", shape: .gives(SetPolicy.self).tagged) { _, context in
                let record = try await lifecycle.server(try name(context))
                return try APIResponse.json(SetPolicy(policy: record.policy)).tagged(try record.policyTag)
            },
            APIRoute(method: .put, path: "/v1/servers/{server}/policy", access: .role(.operator), summary: "set the Recovery Point Policy", shape: .gives(ServerView.self).takes(SetPolicy.self).matches) { request, context in
                try APIResponse.json(
                    try await lifecycle.setPolicy(try name(context), try await request.decoded(SetPolicy.self), ifMatch: try request.precondition, who: context.who))
            },
            APIRoute(method: .get, path: "/v1/servers/{server}/alerts", access: .role(.viewer), summary: "show from when on alerts are raised", shape: .gives(AlertSettings.self).tagged) { _, context in
                let record = try await lifecycle.server(try name(context))
                return try APIResponse.json(record.alertsInForce).tagged(try record.alertsTag)
            },
            APIRoute(method: .put, path: "/v1/servers/{server}/alerts", access: .role(.operator), summary: "set from when on alerts are raised", shape: .gives(ServerView.self).takes(SetAlerts.self).matches) { request, context in
                try APIResponse.json(
                    try await lifecycle.setAlerts(try name(context), try await request.decoded(SetAlerts.self), ifMatch: try request.precondition, who: context.who))
            },
            APIRoute(method: .post, path: "/v1/servers/{server}/disks", access: .role(.operator), summary: "protect a disk that has turned up on the server's host", shape: .gives(ServerView.self).takes(AddDisk.self)) { request, context in
                try APIResponse.json(try await lifecycle.addDisk(try name(context), try await request.decoded(AddDisk.self), who: context.who))
            },
            APIRoute(method: .post, path: "/v1/servers/{server}/disks/left-out", access: .role(.operator), summary: "leave out a disk that has turned up on the server's host: no alert any more", shape: .gives(ServerView.self).takes(LeaveOutDisk.self)) { request, context in
                try APIResponse.json(try await lifecycle.leaveOutDisk(try name(context), try await request.decoded(LeaveOutDisk.self), who: context.who))
            },
            APIRoute(method: .post, path: "/v1/servers/{server}/enrolment", access: .role(.administrator), summary: "a new enrolment token", shape: .gives(Enrolment.self, .created)) { _, context in
                try APIResponse.json(try await lifecycle.renewEnrolment(try name(context), who: context.who), status: .created)
            },
        ]
    }

    private var replication: [APIRoute] {
        [
            APIRoute(method: .post, path: "/v1/servers/{server}/replication", access: .role(.operator), summary: "Start Replication", shape: .starts.takes(StartReplication.self)) { request, context in
                try accepted(try await lifecycle.startReplication(try name(context), try await request.decoded(StartReplication.self), who: context.who))
            },
            APIRoute(method: .put, path: "/v1/servers/{server}/replication", access: .role(.operator), summary: "set throttle, compression and epoch length of a protected server, while it replicates", shape: .gives(ServerView.self).takes(SetReplication.self).matches) { request, context in
                try APIResponse.json(
                    try await lifecycle.setReplication(try name(context), try await request.decoded(SetReplication.self), ifMatch: try request.precondition, who: context.who))
            },
            APIRoute(method: .delete, path: "/v1/servers/{server}/replication", access: .role(.operator), summary: "Stop Replication", shape: .starts) { _, context in
                try accepted(try await lifecycle.stopReplication(try name(context), who: context.who))
            },
            APIRoute(method: .post, path: "/v1/servers/{server}/replication/pause", access: .role(.operator), summary: "Pause Replication: nothing more is sent until it is resumed", shape: .gives(ServerView.self)) { _, context in
                try APIResponse.json(try await lifecycle.pauseReplication(try name(context), who: context.who))
            },
            APIRoute(method: .post, path: "/v1/servers/{server}/replication/resume", access: .role(.operator), summary: "resume replication that is paused", shape: .starts) { _, context in
                try accepted(try await lifecycle.resumeReplication(try name(context), who: context.who))
            },
            APIRoute(method: .post, path: "/v1/servers/{server}/restart", access: .role(.operator), summary: "Restart Server: its agent looks at its disks anew", shape: .gives(ServerView.self)) { _, context in
                try APIResponse.json(try await lifecycle.restartServer(try name(context), who: context.who))
            },
            APIRoute(method: .get, path: "/v1/servers/{server}/recovery-points", access: .role(.viewer), summary: "list recovery points, oldest first", shape: .gives([RecoveryPointView].self).asks(.before).pages) { request, context in
                let (limit, before) = (request.limit, request.text("before"))
                let points = try await lifecycle.recoveryPoints(try name(context), limit: limit.map { $0 + 1 }, before: before)
                guard let limit, points.count > limit else { return try APIResponse.json(points) }
                let page = points.suffix(limit)
                return try APIResponse.json(Page(items: Array(page), next: ("before", page.first?.point.id.rawValue ?? "")), for: request)
            },
            APIRoute(method: .post, path: "/v1/servers/{server}/recovery-points", access: .role(.operator), summary: "Create Recovery Point: one that is cut after the request", shape: .starts.takes(CreatePoint.self)) { request, context in
                try accepted(try await lifecycle.createPoint(try name(context), try await request.decoded(CreatePoint.self), who: context.who))
            },
            APIRoute(method: .delete, path: "/v1/servers/{server}/recovery-points/{point}", access: .role(.operator), summary: "delete a recovery point; confirmed by its ID", shape: .nothing.takes(Confirmation.self)) { request, context in
                let point = try context.parameters.require("point")
                try await lifecycle.deletePoint(try name(context), point: point, try await request.decoded(Confirmation.self), who: context.who)
                return Response(status: .noContent)
            },
            APIRoute(method: .post, path: "/v1/servers/{server}/recovery-points/{point}/hold", access: .role(.operator), summary: "hold a recovery point under a name: it does not expire", shape: .gives(RecoveryPointView.self).takes(HoldPoint.self)) { request, context in
                let point = try context.parameters.require("point")
                return try APIResponse.json(try await lifecycle.holdPoint(try name(context), point: point, try await request.decoded(HoldPoint.self), who: context.who))
            },
            APIRoute(method: .delete, path: "/v1/servers/{server}/recovery-points/{point}/hold", access: .role(.operator), summary: "release a held recovery point; confirmed by its name", shape: .gives(RecoveryPointView.self).takes(Confirmation.self)) { request, context in
                let point = try context.parameters.require("point")
                return try APIResponse.json(try await lifecycle.releasePoint(try name(context), point: point, try await request.decoded(Confirmation.self), who: context.who))
            },
            APIRoute(method: .post, path: "/v1/servers/{server}/recovery-points/{point}/export", access: .role(.operator), summary: "serve a recovery point read-only over NBD", shape: .gives(PointExport.self, .created)) { _, context in
                let point = try context.parameters.require("point")
                return try APIResponse.json(try await lifecycle.export(try name(context), point: point, who: context.who), status: .created)
            },
            APIRoute(method: .delete, path: "/v1/servers/{server}/recovery-points/{point}/export", access: .role(.operator), summary: "end an export", shape: .nothing) { _, context in
                try await lifecycle.unexport(try name(context), point: try context.parameters.require("point"), who: context.who)
                return Response(status: .noContent)
            },
            APIRoute(method: .post, path: "/v1/servers/{server}/recovery-points/{point}/copy", access: .role(.administrator), summary: "Export Recovery Point: a disk of it into a file or onto a device of the appliance's host", shape: .starts.takes(CopyPoint.self)) { request, context in
                let point = try context.parameters.require("point")
                return try accepted(try await lifecycle.copyPoint(try name(context), point: point, try await request.decoded(CopyPoint.self), who: context.who))
            },
            APIRoute(method: .post, path: "/v1/servers/{server}/recovery-points/{point}/mount", access: .role(.administrator), summary: "mount a file system of a recovery point read-only on the appliance's host", shape: .gives(PointMountView.self, .created).takes(MountPoint.self)) { request, context in
                let point = try context.parameters.require("point")
                let mounted = try await lifecycle.mountPoint(try name(context), point: point, try await request.decoded(MountPoint.self), who: context.who)
                return try APIResponse.json(mounted, status: .created)
            },
            APIRoute(method: .get, path: "/v1/mounts", access: .role(.viewer), summary: "list mounted recovery points", shape: .gives([PointMountView].self)) { _, _ in
                try APIResponse.json(try await lifecycle.pointMounts())
            },
            APIRoute(method: .delete, path: "/v1/mounts/{mount}", access: .role(.administrator), summary: "unmount a recovery point", shape: .nothing) { _, context in
                try await lifecycle.unmountPoint(try context.parameters.require("mount"), who: context.who)
                return Response(status: .noContent)
            },
            APIRoute(method: .get, path: "/v1/exports", access: .role(.viewer), summary: "list exported recovery points", shape: .gives([PointExport].self)) { _, _ in
                try APIResponse.json(try await lifecycle.pointExports())
            },
        ]
    }

    private var recovery: [APIRoute] {
        [
            APIRoute(method: .post, path: "/v1/servers/{server}/drill", access: .role(.operator), summary: "Disaster Recovery Drill", shape: .starts.takes(StartMachine.self)) { request, context in
                try accepted(try await lifecycle.startDrill(try name(context), try await machine(request, context), who: context.who))
            },
            APIRoute(method: .delete, path: "/v1/servers/{server}/drill", access: .role(.operator), summary: "Clear Test Failover Environment", shape: .starts.takes(ClearDrill.self)) { request, context in
                try accepted(try await lifecycle.clearDrill(try name(context), try await request.decoded(ClearDrill.self), who: context.who))
            },
            APIRoute(method: .post, path: "/v1/servers/{server}/failover", access: .role(.operator), summary: "Failover", shape: .starts.takes(StartMachine.self)) { request, context in
                try accepted(try await lifecycle.startFailover(try name(context), try await machine(request, context), who: context.who))
            },
            APIRoute(method: .get, path: "/v1/servers/{server}/failover", access: .role(.viewer), summary: "what a Failover would stop, keep and delete (?point=ID&graceful=true)", shape: .gives(OperationPreview.self).asks(.point, .graceful)) { request, context in
                try APIResponse.json(try await lifecycle.failoverPreview(try name(context), asked(request)))
            },
            APIRoute(method: .get, path: "/v1/servers/{server}/failover/recovery-point", access: .role(.viewer), summary: "what Change Recovery Point would keep and delete (?point=ID)", shape: .gives(OperationPreview.self).asks(.point)) { request, context in
                try APIResponse.json(try await lifecycle.changePreview(try name(context), asked(request)))
            },
            APIRoute(method: .post, path: "/v1/servers/{server}/failover/recovery-point", access: .role(.operator), summary: "Change Recovery Point", shape: .starts.takes(StartMachine.self)) { request, context in
                try accepted(try await lifecycle.changeRecoveryPoint(try name(context), try await machine(request, context), who: context.who))
            },
            APIRoute(method: .post, path: "/v1/servers/{server}/failover/machine", access: .role(.operator), summary: "start a failed-over machine that has stopped", shape: .starts) { _, context in
                try accepted(try await lifecycle.startMachine(try name(context), who: context.who))
            },
            APIRoute(method: .post, path: "/v1/servers/{server}/failover/commit", access: .role(.operator), summary: "Commit Failover; confirmed by the server's name when recovery points go", shape: .starts.takes(Confirmation.self)) { request, context in
                try accepted(try await lifecycle.commitFailover(try name(context), try await request.decoded(Confirmation.self), who: context.who))
            },
            APIRoute(method: .get, path: "/v1/servers/{server}/failover/commit", access: .role(.viewer), summary: "what Commit Failover would keep and delete", shape: .gives(CommitPreview.self)) { _, context in
                try APIResponse.json(try await lifecycle.commitPreview(try name(context)))
            },
        ]
    }

    private var records: [APIRoute] {
        [
            APIRoute(method: .get, path: "/v1/tasks", access: .role(.viewer), summary: "list tasks, newest first (?server=NAME)", shape: .gives([TaskView].self).asks(.server, .beforeNumber).pages) { request, _ in
                let page = try await Page<TaskView>(in: request, before: { $0.id }) { try await lifecycle.taskViews(server: request.text("server"), limit: $0, before: $1) }
                return try APIResponse.json(page, for: request)
            },
            APIRoute(method: .get, path: "/v1/tasks/{task}", access: .role(.viewer), summary: "show a task with its log", shape: .gives(TaskView.self)) { _, context in
                try APIResponse.json(try await lifecycle.taskView(try taskID(context)))
            },
            APIRoute(method: .delete, path: "/v1/tasks/{task}", access: .role(.operator), summary: "cancel an export, a promotion, a hydration, or the making of a recovery point", shape: .gives(TaskView.self)) { _, context in
                try APIResponse.json(TaskView(try await lifecycle.cancelTask(try taskID(context), who: context.who)))
            },
            APIRoute(method: .get, path: "/v1/events", access: .role(.viewer), summary: "list events, newest first (?server=NAME)", shape: .gives([EventRecord].self).asks(.server, .beforeNumber).pages) { request, _ in
                let page = try await Page<EventRecord>(in: request, before: { $0.id }) { try await lifecycle.events(server: request.text("server"), limit: $0, before: $1) }
                return try APIResponse.json(page, for: request)
            },
        ]
    }

    private var alerts: [APIRoute] {
        [
            APIRoute(method: .get, path: "/v1/stream", access: .role(.viewer), summary: "what happens, while it does: server-sent events, resumed with Last-Event-ID", shape: .streams) { request, context in
                let seat = try seats.take(), stream = EventStream(catalogue: catalogue, tasks: lifecycle.tasks)
                let last = request.headers[HTTPField.Name("Last-Event-ID")!].flatMap { $0.isEmpty ? nil : $0 }
                let start = if let last { try EventStream.Position(text: last) } else { try await stream.now() }
                let body = EventStreamBody(stream: stream, start: start, seat: seat, channel: context.channel) { try await holder(request) != nil }
                return Response(status: .ok, headers: [.contentType: "text/event-stream", .cacheControl: "no-store"], body: .init(asyncSequence: body))
            },
            APIRoute(method: .get, path: "/v1/alerts", access: .role(.viewer), summary: "list alerts that are raised, newest first (?all=true: also those that are over)", shape: .gives([AlertRecord].self).asks(.all, .beforeNumber).pages) { request, _ in
                let page = try await Page<AlertRecord>(in: request, before: { $0.id }) { try await desk.list(all: request.text("all") == "true", limit: $0, before: $1) }
                return try APIResponse.json(page, for: request)
            },
            APIRoute(method: .get, path: "/v1/alert-channels", access: .role(.viewer), summary: "list where alerts are delivered", shape: .gives([AlertChannelView].self)) { _, _ in
                try APIResponse.json(try await desk.channels())
            },
            APIRoute(method: .post, path: "/v1/alert-channels", access: .role(.administrator), summary: "deliver alerts to a webhook or by mail", shape: .gives(AlertChannelView.self, .created).takes(CreateAlertChannel.self)) { request, context in
                try APIResponse.json(try await desk.create(try await request.decoded(CreateAlertChannel.self), who: context.who), status: .created)
            },
            APIRoute(method: .post, path: "/v1/alert-channels/{channel}/test", access: .role(.operator), summary: "send a test message now", shape: .gives(AlertTestResult.self)) { _, context in
                try APIResponse.json(try await desk.test(try context.parameters.require("channel"), who: context.who))
            },
            APIRoute(method: .delete, path: "/v1/alert-channels/{channel}", access: .role(.administrator), summary: "delete a channel, and what it has not delivered yet", shape: .nothing) { _, context in
                try await desk.delete(try context.parameters.require("channel"), who: context.who)
                return Response(status: .noContent)
            },
        ]
    }

    private var access: [APIRoute] {
        [
            APIRoute(method: .post, path: "/v1/catalogue/backup", access: .role(.administrator), summary: "back up the catalogue into a new file on the appliance's host", shape: .nothing.takes(BackUpCatalogue.self)) { request, context in
                let path = try await request.decoded(BackUpCatalogue.self).path
                try await catalogue.backUp(to: path)
                try await catalogue.write { db in try db.event(context.who, "Back up catalogue", detail: path) }
                return Response(status: .noContent)
            },
            APIRoute(method: .post, path: "/v1/catalogue/import", access: .role(.administrator), summary: "take a pair and its servers from the copy that an agent keeps (afterimage agent configuration)", shape: .gives([String].self, .created).takes(ConfigurationCopy.self, open: true)) { request, context in
                let names = try await lifecycle.importConfiguration(try await request.decoded(ConfigurationCopy.self), who: context.who)
                return try APIResponse.json(names, status: .created)
            },
            APIRoute(method: .get, path: "/v1/tokens", access: .role(.administrator), summary: "list access tokens", shape: .gives([TokenView].self)) { _, _ in
                try APIResponse.json(try await tokens.list())
            },
            APIRoute(method: .post, path: "/v1/tokens", access: .role(.administrator), summary: "create an access token; its secret is in the answer, and nowhere else", shape: .gives(CreatedToken.self, .created).takes(CreateToken.self)) { request, context in
                try APIResponse.json(try await tokens.create(try await request.decoded(CreateToken.self), who: context.who), status: .created)
            },
            APIRoute(method: .delete, path: "/v1/tokens/{token}", access: .role(.administrator), summary: "revoke an access token", shape: .nothing) { _, context in
                try await tokens.revoke(try context.parameters.require("token"), who: context.who)
                return Response(status: .noContent)
            },
        ]
    }

    func taskID(_ context: APIContext) throws -> Int64 {
        let text = try context.parameters.require("task")
        guard let id = Int64(text) else { throw ApplianceError.notFound("There is no task \(text) (afterimage task list).") }
        return id
    }

    /// Of a preview.
    private func asked(_ request: Request) -> StartMachine {
        var wanted = StartMachine()
        wanted.recoveryPoint = request.text("point")
        wanted.graceful = request.text("graceful") == "true" ? true : nil
        return wanted
    }
}

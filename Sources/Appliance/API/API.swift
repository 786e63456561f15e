import Foundation
import GRDB
import HTTPTypes
import Hummingbird
import Logging

/// The REST API: the routes, and the router made from them.
struct API: Sendable {
    let lifecycle: Lifecycle
    private let catalogue: Catalogue
    let tokens: AccessTokens
    let logger: Logger
    private let limiter = AuthenticationLimiter()
    private let desk: AlertDesk

    init(lifecycle: Lifecycle, catalogue: Catalogue, logger: Logger) {
        self.lifecycle = lifecycle
        self.catalogue = catalogue
        tokens = AccessTokens(catalogue: catalogue)
        desk = AlertDesk(catalogue: catalogue, logger: logger)
        self.logger = logger
    }

    func router() -> Router<APIContext> {
        let router = Router(context: APIContext.self)
        router.add(middleware: ProblemMiddleware(logger: logger))
        for route in routes {
            let path = RouterPath(route.path)
            router.on(path, method: route.method) { request, context in
                switch route.access {
                case .open:
                    return try await route.handler(request, context)
                case .role(let role):
                    var known = context
                    known.who = try await who(request, context, atLeast: role, at: route)
                    return try await route.handler(request, known)
                }
            }
        }
        return router
    }

    /// The name of the token that the request carries, if that is enough.
    private func who(_ request: Request, _ context: APIContext, atLeast role: Role, at route: APIRoute) async throws -> String {
        let refusal = ApplianceError.unauthorized("This needs an access token: Authorization: Bearer TOKEN (the CLI takes it from its profile, see afterimage --help).")
        guard let header = request.headers[.authorization] else { throw refusal }
        guard header.hasPrefix("Bearer "), let token = try await tokens.holder(secret: String(header.dropFirst("Bearer ".count))) else {
            try limiter.failed(context.remoteAddress)
            throw ApplianceError.unauthorized("This access token is not known here, was revoked, or its time is over (afterimage token list shows those that are good).")
        }
        guard token.role >= role else {
            throw ApplianceError.forbidden("The token \(token.name) has the role \(token.role.rawValue); \(route.method.rawValue) \(route.path) needs the role \(role.rawValue).")
        }
        return token.name
    }

    func name(_ context: APIContext) throws -> String { try context.parameters.require("server") }

    func accepted(_ task: TaskRecord) throws -> Response {
        try APIResponse.json(TaskView(task), status: task.status == .running ? .accepted : .ok)
    }

    var routes: [APIRoute] { open + sites + servers + replication + recovery + reverse + machines + records + alerts + access }

    private var open: [APIRoute] {
        [
            APIRoute(method: .get, path: "/v1/health", access: .open, summary: "whether the appliance is up") { _, _ in
                try APIResponse.json(Health(status: "ok", version: afterimageVersion))
            },
            APIRoute(method: .get, path: "/v1/ca", access: .open, summary: "the appliance's CA certificate, to be compared with a fingerprint") { _, _ in
                try APIResponse.json(CACertificate(certificate: lifecycle.authority.certificatePEM))
            },
            APIRoute(method: .post, path: "/v1/enrol", access: .open, summary: "exchange an enrolment token's secret and a CSR for a certificate") { request, context in
                do { return try APIResponse.json(try await lifecycle.enrol(try await request.decoded(EnrolRequest.self))) } catch let error as ApplianceError {
                    if case .unauthorized = error { try limiter.failed(context.remoteAddress) }
                    throw error
                }
            },
        ]
    }

    private var sites: [APIRoute] {
        [
            APIRoute(method: .get, path: "/v1/status", access: .role(.viewer), summary: "am I protected?") { _, _ in
                try APIResponse.json(try await lifecycle.status())
            },
            APIRoute(method: .get, path: "/v1/store", access: .role(.viewer), summary: "the store: space, layers, what upkeep and scrubbing did, what is damaged") { _, _ in
                try APIResponse.json(await lifecycle.storeReport())
            },
            APIRoute(method: .get, path: "/v1/site-pairs", access: .role(.viewer), summary: "list site pairs") { _, _ in
                try APIResponse.json(try await lifecycle.sitePairs())
            },
            APIRoute(method: .post, path: "/v1/site-pairs", access: .role(.administrator), summary: "create a site pair") { request, context in
                let pair = try await lifecycle.createSitePair(try await request.decoded(CreateSitePair.self), who: context.who)
                return try APIResponse.json(pair, status: .created)
            },
        ]
    }

    private var servers: [APIRoute] {
        [
            APIRoute(method: .get, path: "/v1/servers", access: .role(.viewer), summary: "list servers") { _, _ in
                try APIResponse.json(try await lifecycle.views())
            },
            APIRoute(method: .post, path: "/v1/servers", access: .role(.administrator), summary: "add 1 to 10 servers") { request, context in
                let added = try await lifecycle.addServers(try await request.decoded(AddServers.self), who: context.who)
                return try APIResponse.json(added, status: .created)
            },
            APIRoute(method: .get, path: "/v1/servers/{server}", access: .role(.viewer), summary: "show a server") { _, context in
                try APIResponse.json(try await lifecycle.view(try name(context)))
            },
            APIRoute(method: .delete, path: "/v1/servers/{server}", access: .role(.administrator), summary: "unregister a server") { request, context in
                try accepted(try await lifecycle.removeServer(try name(context), try await request.decoded(RemoveServer.self), who: context.who))
            },
            APIRoute(method: .get, path: "/v1/servers/{server}/removal", access: .role(.viewer), summary: "what unregistering a server would delete") { _, context in
                try APIResponse.json(try await lifecycle.removalPreview(try name(context)))
            },
            APIRoute(method: .put, path: "/v1/servers/{server}/policy", access: .role(.operator), summary: "set the Recovery Point Policy") { request, context in
                try APIResponse.json(try await lifecycle.setPolicy(try name(context), try await request.decoded(SetPolicy.self), who: context.who))
            },
            APIRoute(method: .put, path: "/v1/servers/{server}/alerts", access: .role(.operator), summary: "set from when on alerts are raised") { request, context in
                try APIResponse.json(try await lifecycle.setAlerts(try name(context), try await request.decoded(SetAlerts.self), who: context.who))
            },
            APIRoute(method: .post, path: "/v1/servers/{server}/enrolment", access: .role(.administrator), summary: "a new enrolment token") { _, context in
                try APIResponse.json(try await lifecycle.renewEnrolment(try name(context), who: context.who), status: .created)
            },
        ]
    }

    private var replication: [APIRoute] {
        [
            APIRoute(method: .post, path: "/v1/servers/{server}/replication", access: .role(.operator), summary: "Start Replication") { request, context in
                try accepted(try await lifecycle.startReplication(try name(context), try await request.decoded(StartReplication.self), who: context.who))
            },
            APIRoute(method: .delete, path: "/v1/servers/{server}/replication", access: .role(.operator), summary: "Stop Replication") { _, context in
                try accepted(try await lifecycle.stopReplication(try name(context), who: context.who))
            },
            APIRoute(method: .post, path: "/v1/servers/{server}/replication/pause", access: .role(.operator), summary: "Pause Replication: nothing more is sent until it is resumed") { _, context in
                try APIResponse.json(try await lifecycle.pauseReplication(try name(context), who: context.who))
            },
            APIRoute(method: .post, path: "/v1/servers/{server}/replication/resume", access: .role(.operator), summary: "resume replication that is paused") { _, context in
                try accepted(try await lifecycle.resumeReplication(try name(context), who: context.who))
            },
            APIRoute(method: .post, path: "/v1/servers/{server}/restart", access: .role(.operator), summary: "Restart Server: its agent looks at its disks anew") { _, context in
                try APIResponse.json(try await lifecycle.restartServer(try name(context), who: context.who))
            },
            APIRoute(method: .get, path: "/v1/servers/{server}/recovery-points", access: .role(.viewer), summary: "list recovery points, oldest first (?limit=N: the newest N; &before=POINT: those before it)") { request, context in
                let query = request.uri.queryParameters
                let limit = query["limit"] == nil ? nil : try limit(request)
                return try APIResponse.json(try await lifecycle.recoveryPoints(try name(context), limit: limit, before: query["before"].map(String.init)))
            },
            APIRoute(method: .post, path: "/v1/servers/{server}/recovery-points", access: .role(.operator), summary: "Create Recovery Point: one that is cut after the request") { request, context in
                try accepted(try await lifecycle.createPoint(try name(context), try await request.decoded(CreatePoint.self), who: context.who))
            },
            APIRoute(method: .delete, path: "/v1/servers/{server}/recovery-points/{point}", access: .role(.operator), summary: "delete a recovery point; confirmed by its ID") { request, context in
                let point = try context.parameters.require("point")
                try await lifecycle.deletePoint(try name(context), point: point, try await request.decoded(Confirmation.self), who: context.who)
                return Response(status: .noContent)
            },
            APIRoute(method: .post, path: "/v1/servers/{server}/recovery-points/{point}/hold", access: .role(.operator), summary: "hold a recovery point under a name: it does not expire") { request, context in
                let point = try context.parameters.require("point")
                return try APIResponse.json(try await lifecycle.holdPoint(try name(context), point: point, try await request.decoded(HoldPoint.self), who: context.who))
            },
            APIRoute(method: .delete, path: "/v1/servers/{server}/recovery-points/{point}/hold", access: .role(.operator), summary: "release a held recovery point; confirmed by its name") { request, context in
                let point = try context.parameters.require("point")
                return try APIResponse.json(try await lifecycle.releasePoint(try name(context), point: point, try await request.decoded(Confirmation.self), who: context.who))
            },
            APIRoute(method: .post, path: "/v1/servers/{server}/recovery-points/{point}/export", access: .role(.operator), summary: "serve a recovery point read-only over NBD") { _, context in
                let point = try context.parameters.require("point")
                return try APIResponse.json(try await lifecycle.export(try name(context), point: point, who: context.who), status: .created)
            },
            APIRoute(method: .delete, path: "/v1/servers/{server}/recovery-points/{point}/export", access: .role(.operator), summary: "end an export") { _, context in
                try await lifecycle.unexport(try name(context), point: try context.parameters.require("point"), who: context.who)
                return Response(status: .noContent)
            },
            APIRoute(method: .post, path: "/v1/servers/{server}/recovery-points/{point}/copy", access: .role(.administrator), summary: "Export Recovery Point: a disk of it into a file or onto a device of the appliance's host") { request, context in
                let point = try context.parameters.require("point")
                return try accepted(try await lifecycle.copyPoint(try name(context), point: point, try await request.decoded(CopyPoint.self), who: context.who))
            },
            APIRoute(method: .post, path: "/v1/servers/{server}/recovery-points/{point}/mount", access: .role(.administrator), summary: "mount a file system of a recovery point read-only on the appliance's host") { request, context in
                let point = try context.parameters.require("point")
                let mounted = try await lifecycle.mountPoint(try name(context), point: point, try await request.decoded(MountPoint.self), who: context.who)
                return try APIResponse.json(mounted, status: .created)
            },
            APIRoute(method: .get, path: "/v1/mounts", access: .role(.viewer), summary: "list mounted recovery points") { _, _ in
                try APIResponse.json(try await lifecycle.pointMounts())
            },
            APIRoute(method: .delete, path: "/v1/mounts/{mount}", access: .role(.administrator), summary: "unmount a recovery point") { _, context in
                try await lifecycle.unmountPoint(try context.parameters.require("mount"), who: context.who)
                return Response(status: .noContent)
            },
            APIRoute(method: .get, path: "/v1/exports", access: .role(.viewer), summary: "list exported recovery points") { _, _ in
                try APIResponse.json(try await lifecycle.pointExports())
            },
        ]
    }

    private var recovery: [APIRoute] {
        [
            APIRoute(method: .post, path: "/v1/servers/{server}/drill", access: .role(.operator), summary: "Disaster Recovery Drill") { request, context in
                try accepted(try await lifecycle.startDrill(try name(context), try await request.decoded(StartMachine.self), who: context.who))
            },
            APIRoute(method: .delete, path: "/v1/servers/{server}/drill", access: .role(.operator), summary: "Clear Test Failover Environment") { _, context in
                try accepted(try await lifecycle.clearDrill(try name(context), who: context.who))
            },
            APIRoute(method: .post, path: "/v1/servers/{server}/failover", access: .role(.operator), summary: "Failover") { request, context in
                try accepted(try await lifecycle.startFailover(try name(context), try await request.decoded(StartMachine.self), who: context.who))
            },
            APIRoute(method: .get, path: "/v1/servers/{server}/failover", access: .role(.viewer), summary: "what a Failover would stop, keep and delete (?point=ID&graceful=true)") { request, context in
                try APIResponse.json(try await lifecycle.failoverPreview(try name(context), try asked(request)))
            },
            APIRoute(method: .get, path: "/v1/servers/{server}/failover/recovery-point", access: .role(.viewer), summary: "what Change Recovery Point would keep and delete (?point=ID)") { request, context in
                try APIResponse.json(try await lifecycle.changePreview(try name(context), try asked(request)))
            },
            APIRoute(method: .post, path: "/v1/servers/{server}/failover/recovery-point", access: .role(.operator), summary: "Change Recovery Point") { request, context in
                try accepted(try await lifecycle.changeRecoveryPoint(try name(context), try await request.decoded(StartMachine.self), who: context.who))
            },
            APIRoute(method: .post, path: "/v1/servers/{server}/failover/machine", access: .role(.operator), summary: "start a failed-over machine that has stopped") { _, context in
                try accepted(try await lifecycle.startMachine(try name(context), who: context.who))
            },
            APIRoute(method: .post, path: "/v1/servers/{server}/failover/commit", access: .role(.operator), summary: "Commit Failover; confirmed by the server's name when recovery points go") { request, context in
                try accepted(try await lifecycle.commitFailover(try name(context), try await request.decoded(Confirmation.self), who: context.who))
            },
            APIRoute(method: .get, path: "/v1/servers/{server}/failover/commit", access: .role(.viewer), summary: "what Commit Failover would keep and delete") { _, context in
                try APIResponse.json(try await lifecycle.commitPreview(try name(context)))
            },
        ]
    }

    private var records: [APIRoute] {
        [
            APIRoute(method: .get, path: "/v1/tasks", access: .role(.viewer), summary: "list tasks, newest first (?server=NAME&limit=N)") { request, _ in
                let server = request.uri.queryParameters["server"].map(String.init)
                return try APIResponse.json(try await lifecycle.taskViews(server: server, limit: try limit(request)))
            },
            APIRoute(method: .get, path: "/v1/tasks/{task}", access: .role(.viewer), summary: "show a task with its log") { _, context in
                try APIResponse.json(try await lifecycle.taskView(try taskID(context)))
            },
            APIRoute(method: .delete, path: "/v1/tasks/{task}", access: .role(.operator), summary: "cancel an export, a promotion, a hydration, or the making of a recovery point") { _, context in
                try APIResponse.json(TaskView(try await lifecycle.cancelTask(try taskID(context), who: context.who)))
            },
            APIRoute(method: .get, path: "/v1/events", access: .role(.viewer), summary: "list events, newest first (?server=NAME&limit=N)") { request, _ in
                let server = request.uri.queryParameters["server"].map(String.init)
                return try APIResponse.json(try await lifecycle.events(server: server, limit: try limit(request)))
            },
        ]
    }

    private var alerts: [APIRoute] {
        [
            APIRoute(method: .get, path: "/v1/alerts", access: .role(.viewer), summary: "list alerts that are raised, newest first (?all=true: also those that are over; &limit=N)") { request, _ in
                let all = request.uri.queryParameters["all"]
                guard all == nil || all == "true" || all == "false" else { throw ApplianceError.invalid("all is true or false, not \(all ?? "")") }
                return try APIResponse.json(try await desk.list(all: all == "true", limit: try limit(request)))
            },
            APIRoute(method: .get, path: "/v1/alert-channels", access: .role(.viewer), summary: "list where alerts are delivered") { _, _ in
                try APIResponse.json(try await desk.channels())
            },
            APIRoute(method: .post, path: "/v1/alert-channels", access: .role(.administrator), summary: "deliver alerts to a webhook or by mail") { request, context in
                try APIResponse.json(try await desk.create(try await request.decoded(CreateAlertChannel.self), who: context.who), status: .created)
            },
            APIRoute(method: .post, path: "/v1/alert-channels/{channel}/test", access: .role(.operator), summary: "send a test message now") { _, context in
                try APIResponse.json(try await desk.test(try context.parameters.require("channel"), who: context.who))
            },
            APIRoute(method: .delete, path: "/v1/alert-channels/{channel}", access: .role(.administrator), summary: "delete a channel, and what it has not delivered yet") { _, context in
                try await desk.delete(try context.parameters.require("channel"), who: context.who)
                return Response(status: .noContent)
            },
        ]
    }

    private var access: [APIRoute] {
        [
            APIRoute(method: .post, path: "/v1/catalogue/backup", access: .role(.administrator), summary: "back up the catalogue into a new file on the appliance's host") { request, context in
                let path = try await request.decoded(BackUpCatalogue.self).path
                try await catalogue.backUp(to: path)
                try await catalogue.write { db in try db.event(context.who, "Back up catalogue", detail: path) }
                return Response(status: .noContent)
            },
            APIRoute(method: .post, path: "/v1/catalogue/import", access: .role(.administrator), summary: "take a pair and its servers from the copy that an agent keeps (afterimage agent configuration)") { request, context in
                let names = try await lifecycle.importConfiguration(try await request.decoded(ConfigurationCopy.self), who: context.who)
                return try APIResponse.json(names, status: .created)
            },
            APIRoute(method: .get, path: "/v1/tokens", access: .role(.administrator), summary: "list access tokens") { _, _ in
                try APIResponse.json(try await tokens.list())
            },
            APIRoute(method: .post, path: "/v1/tokens", access: .role(.administrator), summary: "create an access token; its secret is in the answer, and nowhere else") { request, context in
                try APIResponse.json(try await tokens.create(try await request.decoded(CreateToken.self), who: context.who), status: .created)
            },
            APIRoute(method: .delete, path: "/v1/tokens/{token}", access: .role(.administrator), summary: "revoke an access token") { _, context in
                try await tokens.revoke(try context.parameters.require("token"), who: context.who)
                return Response(status: .noContent)
            },
        ]
    }

    private func taskID(_ context: APIContext) throws -> Int64 {
        let text = try context.parameters.require("task")
        guard let id = Int64(text) else { throw ApplianceError.notFound("There is no task \(text) (afterimage task list).") }
        return id
    }

    /// Of a preview.
    private func asked(_ request: Request) throws -> StartMachine {
        var wanted = StartMachine()
        wanted.recoveryPoint = request.uri.queryParameters["point"].map(String.init)
        guard let graceful = request.uri.queryParameters["graceful"] else { return wanted }
        guard let isGraceful = Bool(String(graceful)) else { throw ApplianceError.invalid("graceful is true or false, not \(graceful)") }
        wanted.graceful = isGraceful ? true : nil
        return wanted
    }

    private func limit(_ request: Request) throws -> Int {
        guard let text = request.uri.queryParameters["limit"] else { return 50 }
        guard let limit = Int(text), (1...1000).contains(limit) else { throw ApplianceError.invalid("limit is 1 to 1000, not \(text)") }
        return limit
    }
}

import Appliance
import Foundation

/// Asks the appliance, and notes what it owes.
struct Operator: Sendable {
    let client: APIClient
    let ledger: Ledger
    let sites: Sites

    enum Answer: Sendable {
        case accepted(TaskAnswer?)
        case refused(Problem)
        /// The appliance went away.
        case unanswered
    }

    /// An operation, noted in the ledger.
    func ask(_ operation: Operation, of server: String, _ order: Order) async -> Answer {
        let answer = await send(order, wantsTask: operation.makesTask)
        switch answer {
        // A cancelled task's server is not known here.
        case .accepted(let task) where operation != .cancel: await ledger.accept(server, operation.rawValue, task: task)
        case .unanswered where operation != .cancel: await ledger.lose(server, operation.rawValue)
        case .refused: await ledger.count("refused")
        default: break
        }
        return answer
    }

    func send(_ order: Order, wantsTask: Bool) async -> Answer {
        do {
            switch order.method {
            case "GET": let _: Ignored = try await client.get(order.path)
            case "POST":
                if wantsTask { return .accepted(try await client.post(order.path, order.body)) }
                try await client.postNoContent(order.path, order.body)
            case "DELETE":
                if wantsTask { return .accepted(try await client.delete(order.path, order.body)) }
                try await client.deleteNoContent(order.path, order.body)
            default: preconditionFailure("no request is made with \(order.method)")
            }
            return .accepted(nil)
        } catch APIClient.Failure.problem(let problem) {
            if problem.status >= 500 { await ledger.violate("\(order.method) \(order.path) was answered \(problem.status): \(problem.detail)") }
            if problem.detail.isEmpty { await ledger.violate("\(order.method) \(order.path) was refused without a sentence") }
            return .refused(problem)
        } catch {
            let text = "\(error)"
            if text.contains("cannot understand") { await ledger.violate("\(order.method) \(order.path): \(text)") }
            return .unanswered
        }
    }

    /// Nobody kills the appliance any more, but a connection may be of one that was killed.
    func get<Answer: Decodable & Sendable>(_ path: String, _ type: Answer.Type = Answer.self) async throws -> Answer {
        for _ in 0..<20 {
            do { return try await client.get(path) } catch APIClient.Failure.unreachable { try await Task.sleep(for: .milliseconds(50)) }
        }
        return try await client.get(path)
    }

    /// nil: there is none, or nobody answers.
    func server(_ name: String) async -> ServerAnswer? { try? await client.get("/v1/servers/\(name)") }

    /// As `server`, once the appliance is there again.
    func serverWhenUp(_ name: String) async throws -> ServerAnswer? {
        for _ in 0..<2400 {
            do { return try await client.get("/v1/servers/\(name)") } catch APIClient.Failure.problem { return nil } catch { try await Task.sleep(for: .milliseconds(50)) }
        }
        throw Trouble("the appliance does not answer any more")
    }
    func points(_ server: String) async -> [PointAnswer] { (try? await client.get("/v1/servers/\(server)/recovery-points?limit=40")) ?? [] }
    /// One that is held may be older than the newest forty.
    func allPoints(_ server: String) async -> [PointAnswer] { (try? await client.get("/v1/servers/\(server)/recovery-points")) ?? [] }
    func tasks(_ server: String? = nil) async throws -> [TaskAnswer] { try await get("/v1/tasks?limit=1000" + (server.map { "&server=\($0)" } ?? "")) }
    func newestEvent(_ server: String) async -> Int64? {
        let events: [EventAnswer]? = try? await client.get("/v1/events?limit=1&server=\(server)")
        return events?.first?.id
    }
}

/// One of several operators who do not know of each other.
struct RandomOperator: Sendable {
    let asks: Operator
    var random: SplitMix

    mutating func work(_ operationCount: Int) async throws {
        for _ in 0..<operationCount {
            if random.chance(75) { try await Task.sleep(for: .milliseconds(random.below(120))) }
            let server = random.pick(asks.sites.servers)
            if random.chance(8) {
                await askNonsense(server)
            } else {
                try await askSomething(server)
            }
        }
    }

    private mutating func askNonsense(_ server: String) async {
        let (order, statuses) = Order.nonsense(server, &random)
        await asks.ledger.count("nonsense")
        switch await asks.send(order, wantsTask: false) {
        case .refused(let problem) where !statuses.contains(problem.status):
            await asks.ledger.violate("\(order.method) \(order.path) was answered \(problem.status): \(problem.detail)")
        case .accepted where !statuses.contains(201): await asks.ledger.violate("\(order.method) \(order.path) makes no sense and was accepted")
        default: break
        }
    }

    private mutating func askSomething(_ server: String) async throws {
        let event = await asks.newestEvent(server), life = await asks.sites.life
        guard let view = try await asks.serverWhenUp(server) else { return }
        let operation = Operation.pick(in: view.place, &random)
        let points = [.drill, .failover, .changePoint, .copyPoint, .hold, .release, .delete, .export, .unexport].contains(operation) ? await asks.points(server) : []
        let running = operation == .cancel ? ((try? await asks.tasks(server)) ?? []).filter { $0.status == "running" } : []
        let order = Order.make(operation, server, points: points, tasks: running, copies: asks.sites.directory + "/copies", &random)
        guard case .refused(let problem) = await asks.ask(operation, of: server, order) else { return }
        let isKnown = Operation.otherReasons.contains { problem.detail.range(of: $0, options: .regularExpression) != nil }
        guard problem.status == 409, !isKnown, LegalMoves.isMove(operation.rawValue), LegalMoves.permits(operation.rawValue, in: view.place) else { return }
        // Only when nothing has happened to the server meanwhile, and nobody was killed, it is known what the state was.
        guard await asks.newestEvent(server) == event, event != nil, await asks.sites.life == life else { return }
        await asks.ledger.violate("\(operation.rawValue) of \(server) in \(view.place) was refused, and the model permits it: \(problem.detail)")
    }
}

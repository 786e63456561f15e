import Foundation
import GRDB
import Logging

/// What else is stored with a new task.
typealias TaskNote = @Sendable (TaskRecord, Database) throws -> Void

/// The tasks: their intent, log and result are in the catalogue; a bar's progress is only in memory while they run.
actor TaskBoard {
    private let catalogue: Catalogue
    private let logger: Logger
    private var progress: [Int64: TaskProgress] = [:]
    private var work: [Int64: Task<Void, Never>] = [:]

    init(catalogue: Catalogue, logger: Logger) {
        self.catalogue = catalogue
        self.logger = logger
    }

    /// Stores a task's intent; part of the transaction that moves the state.
    static func plan(_ operation: Trigger, server: ServerRecord?, parameters: TaskParameters = TaskParameters(), who: String, in db: Database) throws -> TaskRecord {
        var task = TaskRecord(
            id: nil, server: server?.id, serverName: server?.name, operation: operation, parameters: parameters, status: .running,
            progress: nil, result: nil, error: nil, who: who, created: Date(), finished: nil)
        try task.insert(db)
        return task
    }

    static func log(_ task: TaskRecord, _ line: String, in db: Database) throws {
        guard let id = task.id else { return }
        try TaskLogRecord(id: nil, task: id, time: Date(), line: line).insert(db)
    }

    /// Ends a task, part of the caller's transaction. A task that has ended stays as it ended.
    static func finish(_ task: TaskRecord, result: TaskResult? = nil, error: String? = nil, in db: Database) throws {
        guard let id = task.id, var stored = try TaskRecord.fetchOne(db, key: id), stored.status == .running else { return }
        stored.status = error == nil ? .succeeded : .failed
        stored.result = result
        stored.error = error
        stored.finished = Date()
        try stored.update(db)
        try log(stored, error ?? result?.message ?? "done", in: db)
    }

    static func running(_ operations: [Trigger], of server: ServerRecord, in db: Database) throws -> [TaskRecord] {
        try TaskRecord.filter(Column("server") == server.id && Column("status") == TaskStatus.running && operations.contains(Column("operation"))).fetchAll(db)
    }

    /// Ends all tasks of a server that run; part of the caller's transaction. Their work is to be cancelled after it.
    @discardableResult
    static func finishAll(_ operations: [Trigger] = Trigger.operations, of server: ServerRecord, error: String, in db: Database) throws -> [TaskRecord] {
        let running = try running(operations, of: server, in: db)
        for task in running { try finish(task, error: error, in: db) }
        return running
    }

    func log(_ task: TaskRecord, _ line: String) async {
        logger.info("\(line)", metadata: ["task": "\(task.id ?? 0)", "server": "\(task.serverName ?? "")"])
        do { try await catalogue.write { db in try TaskBoard.log(task, line, in: db) } } catch {
            logger.error("cannot keep a line of a task's log: \(error)")
        }
    }

    func finish(_ task: TaskRecord, result: TaskResult? = nil, error: String? = nil) async throws {
        try await catalogue.write { db in try TaskBoard.finish(task, result: result, error: error, in: db) }
        if let id = task.id { progress[id] = nil }
    }

    func report(_ task: TaskRecord, _ progress: TaskProgress) {
        if let id = task.id { self.progress[id] = progress }
    }

    /// Adds the live progress to a task that runs.
    func live(_ task: TaskRecord) -> TaskRecord {
        var task = task
        if task.status == .running, let id = task.id, let p = progress[id] { task.progress = p }
        return task
    }

    func live(_ tasks: [TaskRecord]) -> [TaskRecord] { tasks.map { live($0) } }

    /// Runs a task's work, at most once at a time.
    func run(_ task: TaskRecord, _ body: @escaping @Sendable () async -> Void) {
        guard let id = task.id, work[id] == nil else { return }
        work[id] = Task {
            await body()
            self.ended(id)
        }
    }

    private func ended(_ id: Int64) {
        work[id] = nil
        progress[id] = nil
    }

    /// Cancels a task's work and waits until it has stopped.
    func cancel(_ task: TaskRecord) async {
        guard let id = task.id, let running = work[id] else { return }
        running.cancel()
        await running.value
    }

    /// Cancels all work and waits; the intents stay, so that the next start goes on.
    func stop() async {
        let all = Array(work.values)
        for task in all { task.cancel() }
        for task in all { await task.value }
    }
}

import Foundation
import GRDB
import Hummingbird
import NIOCore
import ServiceLifecycle
import Synchronization

/// What happens, told while it does: server-sent events (WHATWG HTML, 9.2) of the audit log, of tasks and their logs, and of alerts.
///
/// Nothing is kept for a client: the catalogue is the log, and a client's place in it is the `id:` of what it was told last. So a client that comes back with
/// `Last-Event-ID` misses nothing, whatever happened meanwhile, also to the appliance; and one that reads slowly costs no memory but the one piece that is on its way.
struct EventStream: Sendable {
    /// How often the catalogue is looked at.
    static let lookMilliseconds = 250
    /// A comment when there was nothing to tell for so long.
    static let heartbeatSeconds = 15.0
    /// Who does not take a piece within this time is let go.
    static let takeSeconds: Int64 = 30
    private static let pieceMax = 500

    let catalogue: Catalogue
    let tasks: TaskBoard

    /// The last of each that a client knows.
    struct Position: Sendable, Equatable {
        var event: Int64 = 0
        var line: Int64 = 0
        var alert: Int64 = 0
        /// Milliseconds since 1970, and which of those that cleared then.
        var cleared: Int64 = 0
        var clearedAlert: Int64 = 0

        var text: String { [event, line, alert, cleared, clearedAlert].map { String($0) }.joined(separator: "-") }

        init() {}
        init(text: String) throws(ApplianceError) {
            let numbers = text.split(separator: "-", omittingEmptySubsequences: false).map { Int64($0) }
            guard numbers.count == 5, numbers.allSatisfy({ $0 != nil && $0! >= 0 }) else { throw .invalid("Last-Event-ID is an id as the stream gave it, not \(text)") }
            (event, line, alert, cleared, clearedAlert) = (numbers[0]!, numbers[1]!, numbers[2]!, numbers[3]!, numbers[4]!)
        }
    }

    /// Kinds of messages, and what their data is.
    enum Kind: String {
        /// `EventRecord`: operations, changes of states, who came in.
        case audit
        /// `TaskView`: its status or progress is another.
        case task
        /// `TaskLine`
        case taskLog = "task-log"
        /// `AlertRecord`: raised, or over.
        case alert
    }

    struct Message: Sendable {
        var kind: String
        var data: String
        /// nil: of what is not kept, like progress.
        var position: Position?

        init(_ kind: Kind, _ value: some Encodable, _ position: Position?) throws {
            self.kind = kind.rawValue
            data = String(decoding: try APIJSON.encoder().encode(value), as: UTF8.self)
            self.position = position
        }

        /// JSON has no line breaks of its own.
        var text: String { (position.map { "id: \($0.text)\n" } ?? "") + "event: \(kind)\ndata: \(data)\n\n" }
    }

    /// Where those begin who have no place yet.
    func now() async throws -> Position {
        try await catalogue.read { db in
            var position = Position()
            position.event = try Int64.fetchOne(db, sql: "SELECT MAX(id) FROM event") ?? 0
            position.line = try Int64.fetchOne(db, sql: "SELECT MAX(id) FROM taskLog") ?? 0
            position.alert = try Int64.fetchOne(db, sql: "SELECT MAX(id) FROM alert") ?? 0
            if let last = try AlertRecord.filter(Column("cleared") != nil).order(Column("cleared").desc, Column("id").desc).fetchOne(db) {
                (position.cleared, position.clearedAlert) = (last.cleared!.milliseconds, last.id!)
            }
            return position
        }
    }

    /// What has come since, in the order of its kinds; moves `position`. `known` is what was last told of running tasks. Whether there may be more at once.
    func news(after position: inout Position, known: inout [Int64: String]) async throws -> (messages: [Message], hasMore: Bool) {
        let at = position
        let found = try await catalogue.read { db in
            let lines = try TaskLogRecord.filter(Column("id") > at.line).order(Column("id")).limit(Self.pieceMax).fetchAll(db)
            let (since, told) = (Date(milliseconds: at.cleared), Set(lines.map(\.task)))
            return (
                events: try EventRecord.filter(Column("id") > at.event).order(Column("id")).limit(Self.pieceMax).fetchAll(db),
                lines: lines,
                tasks: try TaskRecord.filter(Column("status") == TaskStatus.running || told.contains(Column("id"))).order(Column("id")).fetchAll(db),
                raised: try AlertRecord.filter(Column("id") > at.alert).order(Column("id")).limit(Self.pieceMax).fetchAll(db),
                cleared: try AlertRecord.filter(Column("cleared") > since || (Column("cleared") == since && Column("id") > at.clearedAlert))
                    .order(Column("cleared"), Column("id")).limit(Self.pieceMax).fetchAll(db)
            )
        }
        var messages: [Message] = []
        for event in found.events {
            position.event = event.id ?? position.event
            messages.append(try Message(.audit, event, position))
        }
        for line in found.lines {
            position.line = line.id ?? position.line
            messages.append(try Message(.taskLog, TaskLine(task: line.task, time: line.time, line: line.line), position))
        }
        var running: [Int64: String] = [:]
        for record in found.tasks {
            let live = await tasks.live(record)
            let message = try Message(.task, TaskView(live), nil)
            if live.status == .running { running[live.id ?? 0] = message.data }
            if known[live.id ?? 0] != message.data { messages.append(message) }
        }
        known = running
        for alert in found.raised {
            position.alert = alert.id ?? position.alert
            messages.append(try Message(.alert, alert, position))
        }
        for alert in found.cleared {
            (position.cleared, position.clearedAlert) = (alert.cleared?.milliseconds ?? position.cleared, alert.id ?? 0)
            messages.append(try Message(.alert, alert, position))
        }
        return (messages, [found.events.count, found.lines.count, found.raised.count, found.cleared.count].contains(Self.pieceMax))
    }
}

/// A line of a task's log.
public struct TaskLine: Sendable, Codable {
    public var task: Int64
    public var time: Date
    public var line: String
}

extension Date {
    /// As the catalogue keeps them.
    fileprivate var milliseconds: Int64 { Int64((timeIntervalSince1970 * 1000).rounded()) }
    fileprivate init(milliseconds: Int64) { self.init(timeIntervalSince1970: Double(milliseconds) / 1000) }
}

/// How many streams there may be.
final class StreamSeats: Sendable {
    static let countMax = 100
    private let count = Mutex(0)

    /// Taken until it is forgotten.
    func take() throws(ApplianceError) -> StreamSeat {
        let isFree = count.withLock { count in
            guard count < Self.countMax else { return false }
            count += 1
            return true
        }
        guard isFree else { throw .tooMany("\(Self.countMax) streams of events are open already.", seconds: 10) }
        return StreamSeat { [self] in count.withLock { $0 -= 1 } }
    }

    var taken: Int { count.withLock { $0 } }
}

final class StreamSeat: Sendable {
    private let leave: @Sendable () -> Void
    private let timer = Mutex<Scheduled<Void>?>(nil)

    init(leave: @escaping @Sendable () -> Void) { self.leave = leave }
    deinit {
        timer.withLock { $0 }?.cancel()
        leave()
    }

    /// The connection ends unless `taken` is called in time.
    func given(on channel: any Channel) {
        let scheduled = channel.eventLoop.scheduleTask(in: .seconds(EventStream.takeSeconds)) { channel.close(promise: nil) }
        timer.withLock { $0 = scheduled }
    }

    func taken() { timer.withLock { $0.take() }?.cancel() }
}

/// The body of an answer that goes on: asked for the next piece when the one before has been taken.
struct EventStreamBody: AsyncSequence, Sendable {
    typealias Element = ByteBuffer
    let stream: EventStream
    let start: EventStream.Position
    let seat: StreamSeat
    let channel: any Channel
    /// Whether who asked may still.
    let isWelcome: @Sendable () async throws -> Bool

    func makeAsyncIterator() -> Iterator { Iterator(body: self, position: start) }

    struct Iterator: AsyncIteratorProtocol {
        let body: EventStreamBody
        var position: EventStream.Position
        var known: [Int64: String] = [:]
        var hasBegun = false
        var hasMore = false

        mutating func next() async throws -> ByteBuffer? {
            body.seat.taken()
            guard let piece = try await piece() else { return nil }
            body.seat.given(on: body.channel)
            return ByteBuffer(string: piece)
        }

        private mutating func piece() async throws -> String? {
            guard hasBegun else {
                hasBegun = true
                // Where to go on, even if nothing is ever told.
                return "retry: 2000\nid: \(position.text)\n\n"
            }
            let quiet = ContinuousClock.now
            while !Task.isShuttingDownGracefully, !Task.isCancelled {
                if !hasMore { try? await Task.sleep(for: .milliseconds(EventStream.lookMilliseconds)) }
                guard try await body.isWelcome() else { return nil }
                let news = try await body.stream.news(after: &position, known: &known)
                hasMore = news.hasMore
                if !news.messages.isEmpty { return news.messages.map(\.text).joined() }
                if ContinuousClock.now - quiet > .seconds(EventStream.heartbeatSeconds) { return ": nothing new\n\n" }
            }
            return nil
        }
    }
}

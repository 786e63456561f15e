import Foundation

/// What was asked for and what came of it: the appliance owes it, whatever happens to it meanwhile.
actor Ledger {
    struct Key: Hashable {
        var server: String
        /// As the audit log calls it.
        var what: String
    }

    /// Accepted, with the number of its task if it has one.
    private var accepted: [Key: Int] = [:]
    private var tasks: [Int64: Key] = [:]
    /// Requests that were on their way when the appliance was killed: they may have been accepted or not.
    private var unanswered: [Key: Int] = [:]
    private(set) var violations: [String] = []
    private(set) var counts: [String: Int] = [:]
    /// Sentences of tasks that failed, with numbers left out.
    private(set) var failures: [String: Int] = [:]

    func accept(_ server: String, _ what: String, task: TaskAnswer?) {
        count("accepted")
        let key = Key(server: server, what: what)
        if let task {
            // Asked for again while it is being done, it is the same task.
            guard tasks.updateValue(key, forKey: task.id) == nil else { return }
            if task.operation != what { violate("\(what) of \(server) gave a task of \(task.operation)") }
        }
        accepted[key, default: 0] += 1
    }

    func lose(_ server: String, _ what: String) {
        count("unanswered")
        unanswered[Key(server: server, what: what), default: 0] += 1
    }

    func violate(_ what: String) { if !violations.contains(what) { violations.append(what) } }
    func count(_ what: String) { counts[what, default: 0] += 1 }

    // MARK: at the end

    /// Every accepted task is there and has ended; nobody else's are.
    func judge(tasks all: [TaskAnswer]) {
        let byID = Dictionary(uniqueKeysWithValues: all.map { ($0.id, $0) })
        for (id, key) in tasks {
            guard let task = byID[id] else {
                violate("task \(id), \(key.what) of \(key.server), was accepted and is gone")
                continue
            }
            if task.operation != key.what || task.server != key.server { violate("task \(id) was \(key.what) of \(key.server) and is \(task.operation) of \(task.server ?? "nobody")") }
        }
        var strangers: [Key: Int] = [:]
        for task in all {
            if task.status == "running" { violate("task \(task.id), \(task.operation) of \(task.server ?? "?"), never ends") }
            if task.status == "failed" {
                let why = task.error ?? ""
                if why.isEmpty || Self.isNoSentence(why) { violate("task \(task.id), \(task.operation), failed without a sentence for people: \(why)") }
                failures["\(task.operation): \(Self.shape(why))", default: 0] += 1
            }
            // The appliance itself makes a failed-over machine independent of its recovery points, and starts one again that it finds gone.
            if tasks[task.id] == nil, task.operation != "Hydrate Machine", !(task.operation == "Start Machine" && task.who.hasPrefix("appliance")) { strangers[Key(server: task.server ?? "", what: task.operation), default: 0] += 1 }
        }
        for (key, count) in strangers where count > unanswered[key, default: 0] {
            violate("\(count) tasks \(key.what) of \(key.server) that nobody asked for (\(unanswered[key, default: 0]) requests were not answered)")
        }
    }

    /// The audit log is a walk through the model, and has every accepted operation as often as it was accepted.
    func judge(events: [EventAnswer], servers: [String]) -> Set<Place> {
        var places: [String: Place] = [:]
        var seen: Set<Place> = []
        var logged: [Key: Int] = [:]
        for event in events.sorted(by: { $0.id < $1.id }) {
            guard let server = event.server else { continue }
            // An agent that is back may go on by itself.
            if !event.who.hasPrefix("agent of ") { logged[Key(server: server, what: event.what), default: 0] += 1 }
            if event.what == "Add server" {
                places[server] = event.after.map { Place($0) }
                if event.after != "Agent Installing" { violate("\(server) began as \(event.after ?? "nothing")") }
            }
            if let place = places[server] { seen.insert(place) }
            guard LegalMoves.isMove(event.what), let before = event.before.map({ Place($0) }) else { continue }
            let words = "event \(event.id): \(event.what) of \(server), \(before) to \(event.after ?? "removed") (\(event.detail ?? ""))"
            if let known = places[server], known != before { violate("\(words); but it was \(known)") }
            guard event.what != "Unregister" else {
                if !LegalMoves.permits(event.what, in: before) { violate("\(words): not in the model") }
                continue
            }
            guard let after = event.after.map({ Place($0) }) else {
                violate("\(words): leads nowhere")
                continue
            }
            if !LegalMoves.next(before, event.what).contains(after) { violate("\(words): not in the model") }
            if !after.isReachable { violate("\(words): a state outside of the model") }
            places[server] = after
            seen.insert(after)
        }
        for (key, count) in accepted {
            let found = logged[key, default: 0], most = count + unanswered[key, default: 0]
            // Served again on the same socket, it is no news.
            let least = key.what == "Export recovery point" ? min(count, 1) : count
            // The appliance starts a machine again that it finds gone, and gives that task to whoever asks for it.
            if found < least || (found > most && key.what != Operation.startMachine.rawValue) { violate("\(key.what) of \(key.server): accepted \(count) times, \(most - count) times not answered, \(found) times in the audit log") }
        }
        return seen
    }

    private static func isNoSentence(_ text: String) -> Bool {
        ["SQLite", "constraint", "Optional(", "Error Domain", "CancellationError", "nil", "fatal"].contains { text.contains($0) }
    }

    /// Without numbers and identifiers.
    private static func shape(_ text: String) -> String {
        String(text.prefix(160)).replacingOccurrences(of: #"(-[0-9a-f]{6}\b|[0-9]+)"#, with: "…", options: .regularExpression).replacingOccurrences(of: "\n", with: " ")
    }
}

/// The one table that says what may be done to a protected server, in which state, and what comes of it.
///
/// A server has a main state and, while a drill exists, a drill state beside it. A trigger is looked up in both rows: it is
/// permitted when neither refuses, and each row moves its own state. `StateTableText` holds the rows; docs/lifecycle.md shows them
/// (a test keeps the two equal).
public enum StateOutcome: Sendable, Hashable {
    /// Permitted; the state becomes this one.
    case to(ServerState)
    /// Permitted; this state stays as it is.
    case stays
    /// As `to`, once the server has at least one recovery point.
    case toWithPoint(ServerState)
    /// Permitted; the drill's place becomes empty.
    case endsDrill
    /// Permitted; the server is no longer protected.
    case removes
    /// Not permitted, and why: a sentence for the operator.
    case refused(String)
}

public struct LifecycleState: Sendable, Codable, Hashable {
    public var main: ServerState
    /// One of the drill phase's states; nil when there is no drill.
    public var drill: ServerState?
    public init(main: ServerState, drill: ServerState? = nil) {
        self.main = main
        self.drill = drill
    }
}

public enum Verdict: Sendable, Hashable {
    case permitted(LifecycleState)
    case removed
    case refused(String)
}

public enum StateTable {
    /// What the row of `state` says to `trigger`. Every pair has an answer.
    public static func outcome(_ state: ServerState, _ trigger: Trigger) -> StateOutcome {
        guard let outcome = rows[state]?[trigger] else {
            preconditionFailure("the state table has no answer for \(trigger.rawValue) in \(state.rawValue)")
        }
        return outcome
    }

    /// Looks the trigger up in the main and the drill row.
    public static func verdict(_ state: LifecycleState, _ trigger: Trigger, hasRecoveryPoint: Bool) -> Verdict {
        precondition(state.main.phase != .drill && (state.drill.map { $0.phase == .drill } ?? true))
        var next = state
        let main = outcome(state.main, trigger)
        if let drill = state.drill {
            switch outcome(drill, trigger) {
            case .refused(let why): return .refused(why)
            case .to(let s), .toWithPoint(let s): next.drill = s
            case .endsDrill: next.drill = nil
            case .stays, .removes: break
            }
            // Clearing and ending a drill concern the drill's row only.
            if StateTable.drillTriggers.contains(trigger) { return .permitted(next) }
        }
        switch main {
        case .refused(let why): return .refused(why)
        case .removes: return .removed
        case .stays: return .permitted(next)
        case .toWithPoint(_) where !hasRecoveryPoint: return .refused(StateTable.noRecoveryPoint)
        case .to(let s), .toWithPoint(let s):
            if s.phase == .drill { next.drill = s } else { next.main = s }
            return .permitted(next)
        case .endsDrill:
            next.drill = nil
            return .permitted(next)
        }
    }

    static let noRecoveryPoint = "There is no recovery point yet: wait for the Initial Full Sync to end (afterimage status shows it)."
    /// Triggers that the drill's row alone decides, once there is a drill.
    static let drillTriggers: Set<Trigger> = [.clearDrill, .drillReady, .drillFailed, .drillCleared]

    static let rows: [ServerState: [Trigger: StateOutcome]] = {
        var table: [ServerState: [Trigger: StateOutcome]] = [:]
        for state in ServerState.allCases {
            var row: [Trigger: StateOutcome] = [:]
            for trigger in Trigger.allCases { row[trigger] = StateTable.cell(state, trigger) }
            table[state] = row
        }
        return table
    }()
}

import Foundation

/// The state table of docs/lifecycle.md once more, written down by hand from what is promised and not from the product's table, so that a wrong cell of
/// that is seen here.
enum LegalMoves {
    static let reachableStates: Set<String> = [
        "Agent Installing", "Initialized", "Abnormal", "Enable Replicating", "Initial Full Sync", "Replicating", "Replication Interrupted",
        "Failover In Progress", "Failed Over", "Failover Committed",
    ]
    static let drillStates: Set<String> = ["Test Failover In Progress", "Test Failover Ready", "Clear Test Failover Environment"]

    private static let following: Set<String> = ["Enable Replicating", "Initial Full Sync", "Replicating"]
    private static let forward = following.union(["Replication Interrupted"])
    private static let anywhere = reachableStates

    private struct Move {
        var from: Set<String>
        /// nil: the state stays.
        var to: String?
    }

    /// What moves the main state; an operation is permitted in the states that it is named with, and in no other.
    private static let mainMoves: [String: [Move]] = [
        "Renew Enrolment": [Move(from: ["Agent Installing", "Initialized", "Abnormal", "Replication Interrupted"])],
        "Start Replication": [Move(from: ["Initialized", "Abnormal", "Replication Interrupted"], to: "Enable Replicating")],
        "Stop Replication": [Move(from: forward, to: "Initialized"), Move(from: ["Abnormal"])],
        "Pause Replication": [Move(from: forward, to: "Replication Interrupted")],
        "Restart Server": [Move(from: forward.union(["Initialized", "Abnormal"]))],
        "Disaster Recovery Drill": [Move(from: ["Replicating"])],
        "Clear Test Failover Environment": [Move(from: anywhere)],
        "Failover": [Move(from: forward.union(["Initialized", "Abnormal"]), to: "Failover In Progress")],
        "Change Recovery Point": [Move(from: ["Failover In Progress", "Failed Over"], to: "Failover In Progress")],
        "Commit Failover": [Move(from: ["Failed Over"], to: "Failover Committed")],
        "Start Machine": [Move(from: ["Failed Over", "Failover Committed"])],
        "Create Recovery Point": [Move(from: ["Replicating"])],
        "Export Recovery Point": [Move(from: anywhere)],
        "Unregister": [Move(from: ["Agent Installing", "Initialized", "Abnormal", "Replication Interrupted", "Failover Committed"])],
        "agent connected": [Move(from: ["Agent Installing", "Abnormal"], to: "Initialized")],
        "agent unfit": [Move(from: forward.union(["Agent Installing", "Initialized"]), to: "Abnormal")],
        "full sync started": [Move(from: ["Enable Replicating", "Replicating", "Replication Interrupted"], to: "Initial Full Sync")],
        "recovery points follow": [Move(from: ["Enable Replicating", "Initial Full Sync", "Replication Interrupted"], to: "Replicating")],
        "link lost": [Move(from: following, to: "Replication Interrupted")],
        "drill ready": [Move(from: anywhere)], "drill failed": [Move(from: anywhere)], "drill cleared": [Move(from: anywhere)],
        "failover ready": [Move(from: ["Failover In Progress"], to: "Failed Over")],
        // Rolled back; or its machine is kept for inspection, or could not be had, and another point may be chosen.
        "failover failed": [Move(from: ["Failover In Progress"], to: "Replication Interrupted"), Move(from: ["Failover In Progress"])],
    ]

    /// What moves the drill, which goes on beside the main state.
    private static func drillMove(_ drill: String?, _ what: String) -> (isPermitted: Bool, to: String?) {
        switch (what, drill) {
        case ("Disaster Recovery Drill", nil): (true, "Test Failover In Progress")
        case ("Disaster Recovery Drill", _), ("Clear Test Failover Environment", nil): (false, nil)
        case ("Clear Test Failover Environment", _): (true, "Clear Test Failover Environment")
        case ("Unregister", .some): (false, nil)
        case ("drill ready", "Test Failover In Progress"): (true, "Test Failover Ready")
        case ("drill failed", "Test Failover In Progress"): (true, drill)
        case ("drill cleared", "Clear Test Failover Environment"): (true, nil)
        case ("drill ready", _), ("drill failed", _), ("drill cleared", _): (false, nil)
        default: (true, drill)
        }
    }

    /// Whether the audit log's line `what` is about a move at all.
    static func isMove(_ what: String) -> Bool { mainMoves[what] != nil }

    static func permits(_ what: String, in place: Place) -> Bool {
        drillMove(place.drill, what).isPermitted && (mainMoves[what]?.contains { $0.from.contains(place.main) } ?? false)
    }

    /// Where `what` may lead from `place`; empty: it must not happen there.
    static func next(_ place: Place, _ what: String) -> Set<Place> {
        let drill = drillMove(place.drill, what)
        guard drill.isPermitted, let moves = mainMoves[what] else { return [] }
        return Set(moves.filter { $0.from.contains(place.main) }.map { Place(main: $0.to ?? place.main, drill: drill.to) })
    }
}

/// Where a server is: its main state, and its drill's while there is one.
struct Place: Hashable, CustomStringConvertible {
    var main: String
    var drill: String?

    init(main: String, drill: String?) {
        self.main = main
        self.drill = drill
    }

    /// As the audit log writes it.
    init(_ text: String) {
        let parts = text.components(separatedBy: " + ")
        main = parts[0]
        drill = parts.count > 1 ? parts[1] : nil
    }

    var description: String { drill.map { "\(main) + \($0)" } ?? main }
    var isReachable: Bool { LegalMoves.reachableStates.contains(main) && drill.map { LegalMoves.drillStates.contains($0) } ?? true }
}

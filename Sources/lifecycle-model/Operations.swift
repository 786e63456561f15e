import Foundation

/// What an operator may ask for.
enum Operation: String, CaseIterable, Sendable {
    case renewEnrolment = "Renew Enrolment"
    case start = "Start Replication"
    case stop = "Stop Replication"
    case pause = "Pause Replication"
    case restart = "Restart Server"
    case drill = "Disaster Recovery Drill"
    case clearDrill = "Clear Test Failover Environment"
    case failover = "Failover"
    case changePoint = "Change Recovery Point"
    case commit = "Commit Failover"
    case startMachine = "Start Machine"
    case createPoint = "Create Recovery Point"
    case copyPoint = "Export Recovery Point"
    case unregister = "Unregister"
    case hold = "Hold recovery point"
    case release = "Release recovery point"
    case delete = "Delete recovery point"
    case export = "Export recovery point"
    case unexport = "Unexport recovery point"
    case cancel = "Cancel task"

    /// Whether its answer is a task.
    var makesTask: Bool {
        switch self {
        case .start, .stop, .drill, .clearDrill, .failover, .changePoint, .commit, .startMachine, .createPoint, .copyPoint, .unregister: true
        case .renewEnrolment, .pause, .restart, .hold, .release, .delete, .export, .unexport, .cancel: false
        }
    }

    /// How often it is chosen among those that are possible. Unregistering ends a server's part in the sequence.
    var weight: Int {
        switch self {
        case .drill, .failover: 8
        case .clearDrill, .changePoint: 6
        case .start, .commit, .startMachine: 5
        case .stop, .pause, .createPoint, .copyPoint: 3
        case .renewEnrolment, .restart, .hold, .release, .delete, .export, .unexport, .cancel: 2
        case .unregister: 1
        }
    }

    static func pick(in place: Place, _ random: inout SplitMix) -> Operation {
        // One of three is any, so mostly not possible there.
        let all = random.chance(33) ? allCases : allCases.filter { !LegalMoves.isMove($0.rawValue) || LegalMoves.permits($0.rawValue, in: place) }
        var left = random.below(all.reduce(0) { $0 + $1.weight })
        for operation in all {
            left -= operation.weight
            if left < 0 { return operation }
        }
        return .start
    }

    /// A refusal with one of these has another reason than the state: a resource is missing or in use, or a confirmation.
    static let otherReasons = [
        "There is no recovery point yet", "is being removed", "is not connected", "A graceful failover needs", #"Task \d+ "#, #"^Task \d+ has ended"#, "is not ended by cancelling",
        "has held recovery points", #"has \d+ recovery points, which would be deleted"#, "is exported", "would be gone for good", "is held as", "is not held", "would be stopped and deleted",
        #"deletes \d+ recovery points"#, "is used by task", "The failed-over machine of", "is mounted", "is the newest", "in use", "is being",
    ]
}

/// A request as it goes to the API.
struct Order: Sendable {
    var method: String
    var path: String
    var body: JSON?

    /// A machine that starts in no time. Now and then one whose boot check does not pass.
    private static func machine(_ random: inout SplitMix, point: String?) -> [String: JSON] {
        var body: [String: JSON] = ["network": "none", "cpus": 1, "memoryMiB": 16, "bootCheck": "none"]
        if random.chance(12) {
            body["bootCheck"] = "serial:NEVER"
            body["bootSecondsMax"] = 1
        }
        if let point { body["recoveryPoint"] = .string(point) }
        return body
    }

    /// `points`: of the server, oldest first; `tasks`: that run.
    static func make(_ operation: Operation, _ server: String, points: [PointAnswer], tasks: [TaskAnswer], copies: String, _ random: inout SplitMix) -> Order {
        let root = "/v1/servers/\(server)"
        let point = points.isEmpty ? "rp-0" : random.pick(points).id
        switch operation {
        case .renewEnrolment: return Order(method: "POST", path: root + "/enrolment")
        case .start: return Order(method: "POST", path: root + "/replication", body: ["epochMilliseconds": 100, "cpus": 1, "memoryMiB": 16, "policy": "all:10s,5s:1m"])
        case .stop: return Order(method: "DELETE", path: root + "/replication")
        case .pause: return Order(method: "POST", path: root + "/replication/pause")
        case .restart: return Order(method: "POST", path: root + "/restart")
        case .drill: return Order(method: "POST", path: root + "/drill", body: .object(machine(&random, point: random.chance(50) ? point : nil)))
        case .clearDrill: return Order(method: "DELETE", path: root + "/drill")
        case .failover:
            if random.chance(15) {
                var body = machine(&random, point: nil)
                body["graceful"] = true
                return Order(method: "POST", path: root + "/failover", body: .object(body))
            }
            return Order(method: "POST", path: root + "/failover", body: .object(machine(&random, point: random.chance(50) ? point : nil)))
        case .changePoint: return Order(method: "POST", path: root + "/failover/recovery-point", body: .object(machine(&random, point: point)))
        case .commit: return Order(method: "POST", path: root + "/failover/commit", body: ["confirm": .string(random.chance(90) ? server : "nobody")])
        case .startMachine: return Order(method: "POST", path: root + "/failover/machine")
        case .createPoint: return Order(method: "POST", path: root + "/recovery-points", body: ["note": "of the model"])
        case .copyPoint:
            return Order(method: "POST", path: root + "/recovery-points/\(point)/copy", body: ["format": "raw", "path": .string("\(copies)/\(server)-\(random.next() % 1_000_000).raw")])
        case .unregister: return Order(method: "DELETE", path: root, body: ["deletePoints": .bool(random.chance(90)), "stopMachine": .bool(random.chance(90))])
        case .hold: return Order(method: "POST", path: root + "/recovery-points/\(point)/hold", body: ["name": .string("hold \(random.next() % 1_000_000)")])
        case .release:
            let held = points.filter { $0.hold != nil }
            let chosen = held.isEmpty ? nil : random.pick(held)
            return Order(method: "DELETE", path: root + "/recovery-points/\(chosen?.id ?? point)/hold", body: ["confirm": .string(chosen?.hold ?? "nothing")])
        case .delete: return Order(method: "DELETE", path: root + "/recovery-points/\(point)", body: ["confirm": .string(point)])
        case .export: return Order(method: "POST", path: root + "/recovery-points/\(point)/export")
        case .unexport: return Order(method: "DELETE", path: root + "/recovery-points/\(point)/export")
        case .cancel: return Order(method: "DELETE", path: "/v1/tasks/\(tasks.isEmpty ? 1 : random.pick(tasks).id)")
        }
    }

    /// Requests without sense, and what must be answered.
    static func nonsense(_ server: String, _ random: inout SplitMix) -> (Order, statuses: Set<Int>) {
        let root = "/v1/servers/\(server)"
        let all: [(Order, Set<Int>)] = [
            (Order(method: "POST", path: root + "/replication", body: ["epochMilliseconds": 1]), [404, 422]),
            (Order(method: "POST", path: root + "/drill", body: ["network": "moon"]), [404, 422]),
            (Order(method: "POST", path: root + "/failover", body: ["cpus": "many"]), [404, 422]),
            (Order(method: "POST", path: root + "/failover/commit", body: ["confirm": ["a", "b"]]), [404, 422]),
            (Order(method: "POST", path: "/v1/servers/nobody/failover", body: [:]), [404]),
            (Order(method: "DELETE", path: "/v1/servers/nobody"), [404]),
            (Order(method: "GET", path: "/v1/servers/nobody/failover/commit"), [404]),
            (Order(method: "GET", path: root + "/recovery-points?limit=0"), [404, 422]),
            (Order(method: "POST", path: "/v1/servers", body: ["sitePair": "pair", "names": []]), [422]),
            (Order(method: "POST", path: "/v1/servers", body: ["sitePair": "pair", "names": [.string(server)]]), [201, 409]),
            (Order(method: "DELETE", path: "/v1/tasks/999999"), [404]),
        ]
        let (order, statuses) = random.pick(all)
        return (order, statuses)
    }
}

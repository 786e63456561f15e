import Foundation

/// Bodies of the API's requests and answers about recovery plans.

public struct RunPlan: Sendable, Codable {
    public var kind: InstanceKind
    /// Of a failover: each source's writes are held for a last recovery point.
    public var graceful: Bool?
    /// Servers of the plan that are left out.
    public var without: [String]?
    /// The plan's name, when it is run as a failover.
    public var confirm: String?
    public init(kind: InstanceKind, graceful: Bool? = nil, without: [String]? = nil, confirm: String? = nil) {
        self.kind = kind
        self.graceful = graceful
        self.without = without
        self.confirm = confirm
    }
}

public struct ResumePlan: Sendable, Codable {
    /// Go on without the steps that failed or were interrupted.
    public var skip: Bool?
    public init(skip: Bool? = nil) { self.skip = skip }
}

/// What a run would do.
public struct PlanPreview: Sendable, Codable {
    public var plan: String
    public var kind: InstanceKind
    /// What will happen, in words.
    public var words: [String]
    /// Why it cannot be run now; empty: it can.
    public var obstacles: [String]
    /// Whether `RunPlan.confirm` must be the plan's name.
    public var needsConfirmation: Bool
}

public struct PlanView: Sendable, Codable {
    public var name: String
    public var groups: [PlanGroup]
    public var created: Date
    public var changed: Date
    /// Servers of the plan that this appliance does not have (any more).
    public var missingServers: [String]
    public var lastRun: PlanRunView?

    public var definition: PlanDefinition { PlanDefinition(name: name, groups: groups) }
}

public struct PlanRunView: Sendable, Codable {
    public var id: Int64
    public var plan: String
    public var kind: InstanceKind
    public var isGraceful: Bool
    public var status: PlanRunStatus
    public var who: String
    public var started: Date
    public var ended: Date?
    /// Its work, with the output of its scripts in the log.
    public var task: Int64?
    public var error: String?
    /// The manual step that it waits for.
    public var waitsFor: String?
    public var steps: [PlanStepView]

    init(_ record: PlanRunRecord, _ steps: [PlanStepRecord]) {
        id = record.id ?? 0
        plan = record.plan
        kind = record.kind
        isGraceful = record.isGraceful
        status = record.status
        who = record.who
        started = record.started
        ended = record.ended
        task = record.task
        error = record.error
        waitsFor = record.status == .running ? steps.first { $0.kind == .manual && $0.status == .running }?.words : nil
        self.steps = steps.map { PlanStepView($0) }
    }
}

public struct PlanStepView: Sendable, Codable {
    public var number: Int
    /// Steps of one stage go on together.
    public var stage: Int
    public var group: String
    public var kind: PlanStepKind
    /// The server, the wait, the script with its arguments, or what a person is to do.
    public var what: String
    public var status: PlanStepStatus
    public var since: Date?
    /// When a wait ends.
    public var until: Date?
    /// Those of its server, oldest first.
    public var tasks: [Int64]
    public var error: String?

    init(_ record: PlanStepRecord) {
        number = record.number
        stage = record.stage
        group = record.groupName
        kind = record.kind
        what = record.words
        status = record.status
        since = record.since
        until = record.until
        tasks = record.tasks
        error = record.error
    }
}

/// A plan as people write it.
public enum PlanText {
    /// A field that no plan has is refused: a wait with a slip of the pen would otherwise be no wait.
    public static func definition(_ data: Data) throws -> PlanDefinition {
        let definition: PlanDefinition
        do { definition = try APIJSON.decoder().decode(PlanDefinition.self, from: data) } catch let error as DecodingError {
            throw ApplianceError.invalid("cannot understand the plan: \(error.words)")
        }
        let known = try JSONSerialization.jsonObject(with: try APIJSON.encoder().encode(definition)), given = try JSONSerialization.jsonObject(with: data)
        if let unknown = firstUnknown(given, known, "") { throw ApplianceError.invalid("cannot understand the plan: there is no field \(unknown) (afterimage plan create --help shows those that there are)") }
        return definition
    }

    private static func firstUnknown(_ given: Any, _ known: Any, _ path: String) -> String? {
        if let given = given as? [String: Any] {
            let known = known as? [String: Any] ?? [:]
            for (key, value) in given.sorted(by: { $0.key < $1.key }) where !(value is NSNull) {
                let inner = path.isEmpty ? key : "\(path).\(key)"
                guard let match = known[key] else { return inner }
                if let unknown = firstUnknown(value, match, inner) { return unknown }
            }
        } else if let given = given as? [Any], let known = known as? [Any], given.count == known.count {
            for (place, pair) in zip(given, known).enumerated() {
                if let unknown = firstUnknown(pair.0, pair.1, "\(path)[\(place)]") { return unknown }
            }
        }
        return nil
    }
}

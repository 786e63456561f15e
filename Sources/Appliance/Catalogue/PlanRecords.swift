import Foundation
import GRDB

/// A recovery plan: what is to happen, in which order, when several servers are drilled or failed over together. Groups follow one another; a group starts its
/// servers together, and when all their machines are ready it waits, runs its scripts, and asks for its manual steps.
public struct PlanDefinition: Sendable, Codable {
    public var name: String
    public var groups: [PlanGroup]
    public init(name: String, groups: [PlanGroup]) {
        self.name = name
        self.groups = groups
    }
}

public struct PlanGroup: Sendable, Codable {
    public var name: String
    /// Started together.
    public var servers: [PlanServer]?
    /// After the machines have passed their boot checks.
    public var waitSeconds: Int?
    /// One after the other.
    public var scripts: [PlanScript]?
    /// One after the other, after the scripts.
    public var manualSteps: [PlanManualStep]?
    public init(name: String, servers: [PlanServer]? = nil, waitSeconds: Int? = nil, scripts: [PlanScript]? = nil, manualSteps: [PlanManualStep]? = nil) {
        self.name = name
        self.servers = servers
        self.waitSeconds = waitSeconds
        self.scripts = scripts
        self.manualSteps = manualSteps
    }
}

public struct PlanServer: Sendable, Codable {
    public var server: String
    /// As of a drill or a failover by itself.
    public var machine: StartMachine?
    public init(server: String, machine: StartMachine? = nil) {
        self.server = server
        self.machine = machine
    }
}

/// A program on the appliance's host.
public struct PlanScript: Sendable, Codable {
    /// Absolute.
    public var path: String
    public var arguments: [String]?
    /// After so long it is killed, and has failed; 60 when not said.
    public var limitSeconds: Int?
    /// It may be run again when the appliance ended while it ran; else somebody is asked.
    public var isRepeatable: Bool?
    /// nil: in drills and in failovers.
    public var only: InstanceKind?
    public init(path: String, arguments: [String]? = nil, limitSeconds: Int? = nil, isRepeatable: Bool? = nil, only: InstanceKind? = nil) {
        self.path = path
        self.arguments = arguments
        self.limitSeconds = limitSeconds
        self.isRepeatable = isRepeatable
        self.only = only
    }

    static let limitSecondsStandard = 60
    var words: String { ([path] + (arguments ?? [])).joined(separator: " ") }
}

/// What a person does: the run waits until it is told that it is done.
public struct PlanManualStep: Sendable, Codable {
    public var text: String
    /// nil: in drills and in failovers.
    public var only: InstanceKind?
    public init(text: String, only: InstanceKind? = nil) {
        self.text = text
        self.only = only
    }
}

public struct PlanRecord: Codable, Sendable, FetchableRecord, PersistableRecord {
    public static let databaseTableName = "plan"
    public var name: String
    public var groups: [PlanGroup]
    public var created: Date
    public var changed: Date

    var definition: PlanDefinition { PlanDefinition(name: name, groups: groups) }
}

public enum PlanRunStatus: String, Sendable, Codable, CaseIterable {
    case running, succeeded
    /// At a step, which says why; can be resumed.
    case failed
    /// By an operator; can be resumed.
    case stopped
    /// Its drills are being cleared.
    case clearing
    case cleared

    var isActive: Bool { self == .running || self == .clearing }
}

/// One run of a plan, with the steps as the plan had them when it began.
public struct PlanRunRecord: Codable, Sendable, FetchableRecord, MutablePersistableRecord {
    public static let databaseTableName = "planRun"
    public var id: Int64?
    public var plan: String
    public var kind: InstanceKind
    public var isGraceful: Bool
    public var status: PlanRunStatus
    public var who: String
    public var started: Date
    public var ended: Date?
    /// Its work now; each resuming has a task of its own.
    public var task: Int64?
    public var error: String?

    public mutating func didInsert(_ inserted: InsertionSuccess) { id = inserted.rowID }
}

public enum PlanStepStatus: String, Sendable, Codable, CaseIterable {
    case waiting, running, done, failed, skipped
    /// The appliance ended while a script ran: what it has done is not known.
    case interrupted

    /// Nothing of it is left to do.
    var isOver: Bool { self == .done || self == .skipped }
    var isOpen: Bool { self == .waiting || self == .running }
}

public enum PlanStepKind: String, Sendable, Codable, CaseIterable { case server, wait, script, manual }

/// Steps of one stage go on together, the next stage when all of them are over.
public struct PlanStepRecord: Codable, Sendable, FetchableRecord, PersistableRecord {
    public static let databaseTableName = "planStep"
    public var run: Int64
    /// From 1 on.
    public var number: Int
    public var stage: Int
    public var groupName: String
    public var kind: PlanStepKind
    public var work: Work
    public var status: PlanStepStatus
    public var since: Date?
    /// Of a wait.
    public var until: Date?
    /// Those of its server, oldest first.
    public var tasks: [Int64]
    public var error: String?

    /// What its kind needs.
    public struct Work: Codable, Sendable {
        public var server: PlanServer?
        public var waitSeconds: Int?
        public var script: PlanScript?
        public var manual: PlanManualStep?
    }

    var words: String {
        switch kind {
        case .server: work.server?.server ?? "?"
        case .wait: "wait \(Amount.seconds(work.waitSeconds ?? 0))"
        case .script: work.script?.words ?? "?"
        case .manual: work.manual?.text ?? "?"
        }
    }
    /// For logs: a script's arguments are not repeated there.
    var title: String { "step \(number) (\(groupName): \(work.script?.path ?? words))" }

    /// A group's steps in their order: its servers together, then one after the other.
    static func steps(of definition: PlanDefinition, run: Int64, kind: InstanceKind, without: [String]) -> [PlanStepRecord] {
        var steps: [PlanStepRecord] = [], stage = 0
        func add(_ group: PlanGroup, _ kind: PlanStepKind, _ work: Work, isSkipped: Bool = false) {
            steps.append(PlanStepRecord(
                run: run, number: steps.count + 1, stage: stage, groupName: group.name, kind: kind, work: work, status: isSkipped ? .skipped : .waiting,
                since: isSkipped ? Date() : nil, tasks: []))
        }
        for group in definition.groups {
            stage += 1
            for server in group.servers ?? [] { add(group, .server, Work(server: server), isSkipped: without.contains(server.server)) }
            if let seconds = group.waitSeconds {
                stage += 1
                add(group, .wait, Work(waitSeconds: seconds))
            }
            for script in group.scripts ?? [] {
                stage += 1
                add(group, .script, Work(script: script), isSkipped: script.only.map { $0 != kind } ?? false)
            }
            for manual in group.manualSteps ?? [] {
                stage += 1
                add(group, .manual, Work(manual: manual), isSkipped: manual.only.map { $0 != kind } ?? false)
            }
        }
        return steps
    }
}

extension PlanRunStatus: DatabaseValueConvertible {}
extension PlanStepStatus: DatabaseValueConvertible {}

extension Database {
    func plan(_ name: String) throws -> PlanRecord {
        if let record = try PlanRecord.fetchOne(self, key: name) { return record }
        throw ApplianceError.notFound("There is no recovery plan \(name) (afterimage plan list).")
    }

    func lastRun(of plan: String) throws -> PlanRunRecord? {
        try PlanRunRecord.filter(Column("plan") == plan).order(Column("id").desc).fetchOne(self)
    }

    func planSteps(_ run: Int64) throws -> [PlanStepRecord] {
        try PlanStepRecord.filter(Column("run") == run).order(Column("number")).fetchAll(self)
    }

    /// The drill that this step has started, while it is there.
    func drill(of step: PlanStepRecord) throws -> InstanceRecord? {
        for id in step.tasks.reversed() {
            guard let machine = try TaskRecord.fetchOne(self, key: id)?.parameters.instance else { continue }
            if let instance = try InstanceRecord.fetchOne(self, key: machine), instance.kind == .drill { return instance }
        }
        return nil
    }
}

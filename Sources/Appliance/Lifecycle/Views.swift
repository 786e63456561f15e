import BlockTap
import Foundation
import Replica

/// A server as the API shows it: the catalogue's record, what its agent last said, and the answer to "am I protected?".
public struct ServerView: Sendable, Codable {
    public var id: String
    public var name: String
    public var sitePair: String
    public var state: ServerState
    public var stateSince: Date
    public var reason: String?
    public var drill: ServerState?
    public var drillReason: String?
    public var agentConnected: Bool
    public var hostName: String?
    public var agentVersion: String?
    public var lastSeen: Date?
    public var disks: [DiskReport]
    /// That have turned up on its host since its replication began, and are not protected.
    public var newDisks: [HostDisk]?
    /// Of a protected host.
    public var specification: HostSpecification?
    public var settings: ReplicationSettings?
    public var agent: AgentStatus?
    /// Recovery Point Policy, as `PolicyText` has it.
    public var policy: String
    public var recoveryPointCount: Int
    public var heldPointCount: Int
    public var lastRecoveryPoint: RecoveryPointID?
    /// Cut time of the newest recovery point.
    public var lastRecoveryPointTime: Date?
    /// Its age now; nil when there is none.
    public var rpoSeconds: Double?
    /// Bytes that differ from the replica's last acknowledged state.
    public var behindBytes: UInt64?
    /// The initial full sync's rest, seconds.
    public var secondsLeft: Double?
    public var storedBytes: UInt64?
    /// Of all its disks together.
    public var layerCount: Int?
    public var generation: UInt64?
    public var instances: [InstanceView]
    public var alertSettings: AlertSettings
    /// The last of its machines that passed a boot check.
    public var lastProven: ProvenRecovery?
    /// Of a server that goes back, or has gone.
    public var reverse: ReverseView?
    /// What to do next, in words.
    public var next: String
}

public struct InstanceView: Sendable, Codable {
    public var id: String
    public var kind: InstanceKind
    public var step: InstanceStep
    public var recoveryPoint: RecoveryPointID?
    public var recoveryPointTime: Date?
    public var machine: MachineSettings
    public var generation: UInt64?
    public var accelerator: String?
    public var pid: Int32?
    public var accepted: Date
    public var ready: Date?
    public var rtoSeconds: Double?
    public var bootLine: String?
    public var reason: String?
    public var consolePath: String
    /// For `qemu-img` and friends while the machine is stopped.
    public var nbdSocketPath: String
    public var qmpSocketPath: String
    /// The machine's screen, keyboard and mouse.
    public var vncSocketPath: String
    /// Of its guest agent.
    public var agentSocketPath: String
    /// nil: its disks do not exist yet.
    public var hydration: HydrationView?
}

/// Whether a machine's disks need recovery points, and how far it is with changing that.
public struct HydrationView: Sendable, Codable {
    /// No recovery point shares a layer with them.
    public var isIndependent: Bool
    /// Bytes of index, while it is at work.
    public var doneBytes: UInt64?
    public var totalBytes: UInt64?
    /// Why it does not go on, or cannot.
    public var problem: String?
}

public struct StatusView: Sendable, Codable {
    public var version: String
    public var time: Date
    public var sitePairs: Int
    public var storeDirectory: String
    /// Every server has a recovery point and follows its disks.
    public var protected: Bool
    public var servers: [ServerView]
    public var store: StoreView
    /// Worst first.
    public var alerts: [Alert]
}

/// The store as a whole.
public struct StoreView: Sendable, Codable {
    public var directory: String
    /// Of the disks below it; nil: the kernel does not say.
    public var storageClass: StorageClass?
    public var space: SpaceState
    /// Recovery points go before their time when space is low and nothing else helps.
    public var tightensWhenLow: Bool
    /// Of the file system that holds it.
    public var freeBytes: UInt64
    public var capacityBytes: UInt64
    /// Data in live layers, overwritten data included.
    public var storedBytes: UInt64
    public var layerCount: Int
    public var segmentCount: Int
    public var forkCount: Int
    /// Of forks: what they were when they were made, and at cuts that are sent back.
    public var markCount: Int
    /// Reads that met damage since the appliance was started.
    public var badReadCount: UInt64
    public var upkeep: UpkeepView
    public var scrub: ScrubView
}

/// The store with all that is known to be damaged.
public struct StoreReport: Sendable, Codable {
    public var store: StoreView
    public var badExtents: [BadExtent]
}

/// What the store did for itself since the appliance was started.
public struct UpkeepView: Sendable, Codable {
    public var expiredPointCount: UInt64
    /// Layers that became part of others.
    public var mergedLayerCount: UInt64
    public var rewrittenIndexBytes: UInt64
    public var movedDataBytes: UInt64
    public var reclaimedBytes: UInt64

    init(_ figures: UpkeepStatistics) {
        expiredPointCount = figures.pointsExpired
        mergedLayerCount = figures.layersMerged
        rewrittenIndexBytes = figures.indexBytesRewritten
        movedDataBytes = figures.dataBytesMoved
        reclaimedBytes = figures.bytesReclaimed
    }
}

/// Since the appliance was started, but for `lastPassEnd`.
public struct ScrubView: Sendable, Codable {
    /// Times that everything was read.
    public var passCount: UInt64
    public var lastPassEnd: Date?
    public var readBytes: UInt64
    /// Known now and not repaired.
    public var badBlockCount: UInt64
    /// Layer files that are damaged, known now.
    public var badFileCount: Int
    public var repairedBlockCount: UInt64
    public var isOn: Bool
}

/// A recovery point as the API shows it: the store's record, and what is known against it.
public struct RecoveryPointView: Sendable, Codable {
    public var point: RecoveryPoint
    /// Blocks that cannot be read; nil when none are known.
    public var damagedBlockCount: UInt64?
    /// A layer of it cannot be read at all.
    public var isUnreadable: Bool
    /// How it is known that it is the disks at one instant, if its agent said.
    public var proof: CutProof?

    public init(point: RecoveryPoint, damagedBlockCount: UInt64? = nil, isUnreadable: Bool = false, proof: CutProof? = nil) {
        self.point = point
        self.damagedBlockCount = damagedBlockCount
        self.isUnreadable = isUnreadable
        self.proof = proof
    }

    private enum CodingKeys: String, CodingKey { case damagedBlockCount, isUnreadable, proof }

    public init(from decoder: any Decoder) throws {
        let container = try decoder.container(keyedBy: CodingKeys.self)
        point = try RecoveryPoint(from: decoder)
        damagedBlockCount = try container.decodeIfPresent(UInt64.self, forKey: .damagedBlockCount)
        isUnreadable = try container.decodeIfPresent(Bool.self, forKey: .isUnreadable) ?? false
        proof = try container.decodeIfPresent(CutProof.self, forKey: .proof)
    }

    public func encode(to encoder: any Encoder) throws {
        try point.encode(to: encoder)
        var container = encoder.container(keyedBy: CodingKeys.self)
        try container.encodeIfPresent(damagedBlockCount, forKey: .damagedBlockCount)
        if isUnreadable { try container.encode(true, forKey: .isUnreadable) }
        try container.encodeIfPresent(proof, forKey: .proof)
    }
}

public struct TaskView: Sendable, Codable {
    public struct Line: Sendable, Codable {
        public var time: Date
        public var line: String
    }
    public var id: Int64
    public var server: String?
    public var operation: Trigger
    public var status: TaskStatus
    public var progress: TaskProgress?
    public var result: TaskResult?
    public var error: String?
    public var who: String
    public var created: Date
    public var finished: Date?
    /// Only when one task is asked for.
    public var log: [Line]?
    /// Also only then: what its machine showed when the boot check ended (afterimage task screenshot).
    public var hasScreenshot: Bool?

    init(_ record: TaskRecord, log: [TaskLogRecord]? = nil) {
        id = record.id ?? 0
        server = record.serverName
        operation = record.operation
        status = record.status
        progress = record.progress
        result = record.result
        error = record.error
        who = record.who
        created = record.created
        finished = record.finished
        self.log = log?.map { Line(time: $0.time, line: $0.line) }
    }
}

public struct Health: Sendable, Codable {
    public var status: String
    public var version: String
}

extension ServerRecord {
    /// What an operator would do next.
    func next(agentConnected: Bool, pointCount: Int, machine: InstanceRecord?) -> String {
        let drillWords: String? =
            switch self.drill {
            case .testFailoverReady: "; the drill is ready: look at it, then afterimage drill clear \(name)"
            case .testFailoverInProgress where drillReason != nil: "; the drill failed: afterimage drill clear \(name)"
            default: nil
            }
        return mainNext(agentConnected: agentConnected, pointCount: pointCount, machine: machine) + (drillWords ?? "")
    }

    private func mainNext(agentConnected: Bool, pointCount: Int, machine: InstanceRecord?) -> String {
        switch state {
        case .agentInstalling:
            if let expires = enrolmentExpires, expires > Date() { return "run the enrolment command on the server" }
            return certificateSerial == nil
                ? "its token has expired: afterimage server token \(name)" : "start the agent on the server (afterimage agent run)"
        case .initialized:
            return pointCount > 0 ? "not followed now: afterimage replication start \(name)" : "afterimage replication start \(name)"
        case .abnormal where resumes && settings?.automaticRestart == true: return "see why; goes on by itself once that is mended"
        case .abnormal: return "look at the reason, then afterimage replication start \(name)"
        case .enableReplicating, .initialFullSync: return "wait for the first recovery point"
        case .replicating: return "nothing; try a drill now and then: afterimage drill start \(name)"
        case .replicationInterrupted where settings?.isPaused == true: return "afterimage replication resume \(name)"
        case .replicationInterrupted:
            let restart = settings?.automaticRestart == true 
                ? (agentConnected ? "see why; goes on by itself once that is mended" : "goes on by itself when the agent is back") : "afterimage replication start \(name)"
            return pointCount > 0 ? "\(restart); if the server is lost: afterimage failover start \(name)" : restart
        case .failoverInProgress:
            return reason == nil ? "wait for the machine to boot" : "choose another point: afterimage failover change-recovery-point \(name) --point ID"
        case .failedOver where machine?.step == .stopped, .failoverCommitted where machine?.step == .stopped:
            return "its machine has stopped: afterimage failover start-machine \(name)"
        case .failedOver: return "check the machine, then afterimage failover commit \(name) (or change-recovery-point)"
        case .failoverCommitted: return "nothing: the machine runs here now; back to where it was: afterimage reverse register \(name) (--appliance TOKEN: to another appliance)"
        case .reversedRegistering: return "enrol an agent with the original disks and start it in rescue mode: afterimage agent rescue --disk NAME=DEVICE"
        case .reversedInitialized: return "afterimage reverse start \(name) --original-machine"
        case .reversedEnableReplicating, .reversedFullSync: return "wait: the original disks are brought up to what runs here"
        case .reversedReplicating where machine?.step == .stopped: return "its machine has stopped: afterimage failover start-machine \(name), or afterimage failback start \(name) --forced"
        case .reversedReplicating: return "afterimage failback start \(name), when it is time to go back"
        case .failbackInProgress: return "wait"
        case .failedBack: return "end the rescue agent, start the machine from its own disks, then afterimage registration \(name)"
        case .registration: return "enrol the agent on the server anew and start it (afterimage agent run)"
        default: return "wait"
        }
    }
}

import BlockTap
import Foundation
import GRDB
import Replica

/// Rows of the catalogue. Properties are columns; nested values are JSON text.

public struct SiteRecord: Codable, Sendable, Hashable, FetchableRecord, PersistableRecord {
    public static let databaseTableName = "site"
    public var name: String
    /// Availability zone or region, for people.
    public var zone: String?
}

public struct SitePairRecord: Codable, Sendable, Hashable, FetchableRecord, PersistableRecord {
    public static let databaseTableName = "sitePair"
    public var name: String
    public var type: SitePairType
    public var primarySite: String
    public var secondarySite: String
    public var replicationNetwork: String
    public var recoveryNetwork: RecoveryNetwork
    public var created: Date
    /// nil: `recoveryNetwork` is one of the kinds that need no name.
    public var recoveryNetworkName: String?
}

public struct ServerRecord: Codable, Sendable, Hashable, FetchableRecord, PersistableRecord {
    public static let databaseTableName = "server"
    /// Also the consistency group's name in the store and the identity in the agent's certificate.
    public var id: String
    public var name: String
    public var sitePair: String
    public var state: ServerState
    public var stateSince: Date
    public var reason: String?
    public var drill: ServerState?
    public var drillReason: String?
    /// nil until Start Replication.
    public var settings: ReplicationSettings?
    /// As the agent last reported them.
    public var disks: [DiskReport]
    public var hostName: String?
    public var agentVersion: String?
    public var kernel: String?
    public var specification: HostSpecification?
    /// The only certificate that is let in; hexadecimal.
    public var certificateSerial: String?
    /// SHA-256 of the one-time secret, hexadecimal; nil when used.
    public var enrolmentHash: String?
    public var enrolmentExpires: Date?
    public var created: Date
    public var lastSeen: Date?
    /// Recovery Point Policy, as people write it.
    public var policy = "standard"
    /// It was replicating when its agent's disks turned out unfit: it goes on by itself when they are there again.
    public var resumes = false
    /// nil: no machine from its recovery points has passed a boot check yet.
    public var lastProven: ProvenRecovery?
    /// nil: `AlertSettings.standard`.
    public var alertSettings: AlertSettings?

    public var serverID: ServerID { ServerID(id) }
    public var group: GroupID { GroupID(id) }
    var lifecycle: LifecycleState {
        get { LifecycleState(main: state, drill: drill) }
        set {
            state = newValue.main
            drill = newValue.drill
        }
    }
}

/// That a machine from a recovery point of a server passed its boot check. Kept when the machine is gone.
public struct ProvenRecovery: Codable, Sendable, Hashable {
    public var kind: InstanceKind
    public var time: Date
    public var recoveryPoint: RecoveryPointID
    public var recoveryPointTime: Date
    /// From the command to the passed check.
    public var rtoSeconds: Double
    /// What the check found.
    public var bootLine: String
}

public enum InstanceKind: String, Sendable, Codable, CaseIterable { case drill, failover }

/// How far a recovery instance has come. Written before the step's work starts.
public enum InstanceStep: String, Sendable, Codable, CaseIterable {
    /// Intent only.
    case planned
    /// Fork, disks, QEMU, boot check; in this order, each harmless when repeated.
    case starting
    /// The boot check passed.
    case ready
    /// QEMU runs, the boot check did not pass: kept for inspection.
    case unproven
    /// The machine ended by itself, or could not be kept.
    case stopped
    /// To be taken down: QEMU, sockets, fork, files.
    case removing
}

public struct InstanceRecord: Codable, Sendable, Hashable, FetchableRecord, PersistableRecord {
    public static let databaseTableName = "instance"
    /// Also the fork's name.
    public var id: String
    public var server: String
    public var kind: InstanceKind
    public var step: InstanceStep
    /// nil for "current point in time" until the source is fenced.
    public var point: RecoveryPointID?
    /// Cut time of `point`, nanoseconds since 1970.
    public var pointCutTimeNanoseconds: Int64
    /// Where the source was at `point`: known from Commit Failover on, which the point itself does not outlive.
    public var pointPosition: DurablePosition?
    public var settings: MachineSettings
    /// Names of the group's volumes, in order; also the NBD export names.
    public var volumes: [String]
    /// The fence that this failover raised.
    public var generation: Int64?
    /// QEMU's process; meaningful together with its identity in /proc.
    public var pid: Int32?
    /// "kvm" or "tcg".
    public var accelerator: String?
    /// When the command was accepted; the RTO counts from here.
    public var accepted: Date
    public var ready: Date?
    /// From `accepted` to the boot check passed.
    public var rtoMilliseconds: Int64?
    /// The console line that passed the boot check.
    public var bootLine: String?
    public var reason: String?

    public var forkID: ForkID { ForkID(id) }
}

public enum TaskStatus: String, Sendable, Codable, CaseIterable { case running, succeeded, failed }

/// Bytes for a bar, or just words.
public struct TaskProgress: Sendable, Codable, Hashable {
    public var step: String
    public var doneBytes: UInt64?
    public var totalBytes: UInt64?
    public var bytesPerSecond: UInt64?
    public var secondsLeft: Double?
    public init(step: String, doneBytes: UInt64? = nil, totalBytes: UInt64? = nil, bytesPerSecond: UInt64? = nil, secondsLeft: Double? = nil) {
        self.step = step
        self.doneBytes = doneBytes
        self.totalBytes = totalBytes
        self.bytesPerSecond = bytesPerSecond
        self.secondsLeft = secondsLeft
    }
}

/// What a task came to; the fields that its operation has.
public struct TaskResult: Sendable, Codable, Hashable {
    public var recoveryPoint: RecoveryPointID?
    /// Nanoseconds since 1970.
    public var cutTimeNanoseconds: UInt64?
    public var generation: UInt64?
    public var instance: String?
    public var rtoSeconds: Double?
    public var bootLine: String?
    public var accelerator: String?
    public var message: String?
    /// What an export made, on the appliance's host.
    public var path: String?
    public var writtenBytes: UInt64?
    public init() {}
}

public struct TaskRecord: Codable, Sendable, Hashable, FetchableRecord, MutablePersistableRecord {
    public static let databaseTableName = "task"
    public var id: Int64?
    public var server: String?
    public var serverName: String?
    public var operation: Trigger
    public var parameters: TaskParameters
    public var status: TaskStatus
    public var progress: TaskProgress?
    public var result: TaskResult?
    public var error: String?
    public var who: String
    public var created: Date
    public var finished: Date?

    public mutating func didInsert(_ inserted: InsertionSuccess) { id = inserted.rowID }
}

/// The intent of a task: all that is needed to go on with it after a crash.
public struct TaskParameters: Sendable, Codable, Hashable {
    /// The recovery instance that this task brings up or takes down.
    public var instance: String?
    /// The instance that a changed recovery point replaces.
    public var replaces: String?
    /// What an export is to make.
    public var copy: PointCopyOrder?
    /// Of the recovery point that is to be made.
    public var note: String?
    public var consistency: Consistency?
    /// A failover that loses nothing.
    public var isGraceful: Bool?
    /// Of the source's writes, while the last recovery point is made.
    public var hold: String?
    /// A failback whose machine is stopped without being asked to shut down.
    public var isForced: Bool?
    /// A drill that the clock asked for: it is cleared once it has passed.
    public var isScheduled: Bool?
    /// The run of a recovery plan, and whether it is to be cleared.
    public var planRun: Int64?
    public var clearsPlan: Bool?
    /// The certificate that a removal has revoked: one that cannot go on gives it back.
    public var revoked: String?
    public init(
        instance: String? = nil, replaces: String? = nil, copy: PointCopyOrder? = nil, note: String? = nil, consistency: Consistency? = nil, isGraceful: Bool? = nil,
        isScheduled: Bool? = nil, planRun: Int64? = nil, clearsPlan: Bool? = nil
    ) {
        self.isScheduled = isScheduled
        self.planRun = planRun
        self.clearsPlan = clearsPlan
        self.isGraceful = isGraceful
        self.instance = instance
        self.replaces = replaces
        self.copy = copy
        self.note = note
        self.consistency = consistency
    }
}

/// One disk of a recovery point, or of a machine, to be copied out of the store.
public struct PointCopyOrder: Sendable, Codable, Hashable {
    /// Of a machine the one that it was started from.
    public var point: RecoveryPointID
    public var disk: String
    /// The disk's place in the group.
    public var volume: Int
    public var format: PointCopyFormat
    /// Absolute, on the appliance's host.
    public var path: String
    /// Of a machine: it is shut down before its disk is copied, and has so long to do it itself.
    public var stopSecondsMax: Int?
    /// The file that was read back and only lacks its name: a machine's disk is another by the next start.
    public var comparedInode: UInt64?
}

public enum PointCopyFormat: String, Sendable, Codable, CaseIterable {
    /// A sparse file.
    case raw
    /// A file, made by qemu-img.
    case qcow2
    /// A block device, all of which is overwritten.
    case device
}

public struct TaskLogRecord: Codable, Sendable, Hashable, FetchableRecord, PersistableRecord {
    public static let databaseTableName = "taskLog"
    public var id: Int64?
    public var task: Int64
    public var time: Date
    public var line: String
}

/// One line of the audit log.
public struct EventRecord: Codable, Sendable, Hashable, FetchableRecord, PersistableRecord {
    public static let databaseTableName = "event"
    public var id: Int64?
    public var time: Date
    public var who: String
    public var what: String
    public var server: String?
    public var before: String?
    public var after: String?
    public var detail: String?
}

public struct PointExportRecord: Codable, Sendable, Hashable, FetchableRecord, PersistableRecord {
    public static let databaseTableName = "pointExport"
    public var id: String
    public var server: String
    public var point: RecoveryPointID
    public var created: Date
}

/// A file system of a recovery point, mounted on the appliance's host. Written before the work starts, gone after everything is undone.
public struct PointMountRecord: Codable, Sendable, Hashable, FetchableRecord, PersistableRecord {
    public static let databaseTableName = "pointMount"
    public var id: String
    public var server: String
    public var point: RecoveryPointID
    public var disk: String
    /// 1 = the first; nil: the whole disk holds the file system.
    public var partition: Int?
    /// Absolute, on the appliance's host.
    public var directory: String
    public var fileSystem: String?
    /// What is to be known of the content, for people; nil when its file system was clean.
    public var warning: String?
    public var created: Date
}

public struct TokenRecord: Codable, Sendable, Hashable, FetchableRecord, PersistableRecord {
    public static let databaseTableName = "token"
    public var name: String
    public var hash: String
    public var role: Role
    public var created: Date
    /// Nil: it has no end.
    public var expires: Date?

    var isExpired: Bool { expires.map { $0 <= Date() } ?? false }
}

extension InstanceKind: DatabaseValueConvertible {}
extension TaskStatus: DatabaseValueConvertible {}
extension Trigger: DatabaseValueConvertible {}
extension ServerState: DatabaseValueConvertible {}
extension Role: DatabaseValueConvertible {}

/// How a recovery point was proven, as its agent said.
struct PointProofRecord: Codable, FetchableRecord, PersistableRecord, Sendable {
    static let databaseTableName = "pointProof"
    var server: String
    var instance: String
    var epoch: Int64
    var proof: CutProof

    init(server: String, _ proof: PointProof) {
        self.server = server
        instance = proof.instance
        epoch = Int64(proof.epoch.rawValue)
        self.proof = proof.proof
    }
}

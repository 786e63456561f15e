import BlockTap
import Foundation
import Replica

/// Bodies of the API's requests and answers; the CLI uses the same types.

public struct CreateSitePair: Sendable, Codable {
    public var name: String
    public var type: SitePairType
    public var primarySite: String
    public var secondarySite: String
    /// A network's name.
    public var replicationNetwork: String?
    /// What drills use unless told otherwise: a kind of network, or the name of one.
    public var recoveryNetwork: RecoveryNetwork?
    public var recoveryNetworkName: String?
    public init(name: String, type: SitePairType, primarySite: String, secondarySite: String, replicationNetwork: String? = nil, recoveryNetwork: RecoveryNetwork? = nil, recoveryNetworkName: String? = nil) {
        self.recoveryNetworkName = recoveryNetworkName
        self.name = name
        self.type = type
        self.primarySite = primarySite
        self.secondarySite = secondarySite
        self.replicationNetwork = replicationNetwork
        self.recoveryNetwork = recoveryNetwork
    }
}

public struct AddServers: Sendable, Codable {
    public var sitePair: String
    /// 1 to 10.
    public var names: [String]
    public init(sitePair: String, names: [String]) {
        self.sitePair = sitePair
        self.names = names
    }
}

public struct BackUpCatalogue: Sendable, Codable {
    /// On the appliance's host, absolute; must not be there.
    public var path: String
    public init(path: String) { self.path = path }
}

public struct CreateToken: Sendable, Codable {
    public var name: String
    public var role: Role
    /// 90 if not said; 0: without end.
    public var days: Int?
    public init(name: String, role: Role, days: Int? = nil) {
        self.name = name
        self.role = role
        self.days = days
    }
}

public struct TokenView: Sendable, Codable, Hashable {
    public var name: String
    public var role: Role
    public var created: Date
    public var expires: Date?
    public var isExpired: Bool

    init(_ record: TokenRecord) {
        name = record.name
        role = record.role
        created = record.created
        expires = record.expires
        isExpired = record.isExpired
    }
}

public struct CreatedToken: Sendable, Codable {
    public var token: TokenView
    /// What the holder shows. It cannot be had again.
    public var secret: String
}

/// One server's way in.
public struct Enrolment: Sendable, Codable {
    public var server: String
    /// One-time; see `EnrolmentToken`.
    public var token: String
    /// To be run on the server.
    public var command: String
    public var expires: Date
}

/// What an enrolment token holds, as base64url of JSON.
public struct EnrolmentToken: Sendable, Codable, Hashable {
    /// The appliance's API, for example https://10.0.0.2:8443.
    public var url: String
    /// SHA-256 of the DER of the CA's certificate, hexadecimal.
    public var caFingerprint: String
    public var secret: String
    public var serverName: String
    public init(url: String, caFingerprint: String, secret: String, serverName: String) {
        self.url = url
        self.caFingerprint = caFingerprint
        self.secret = secret
        self.serverName = serverName
    }

    public var text: String {
        get throws { base64URL(try JSONEncoder().encode(self)) }
    }

    public init(text: String) throws(ApplianceError) {
        guard let data = Data(base64URL: text), let token = try? JSONDecoder().decode(EnrolmentToken.self, from: data) else {
            throw .invalid("this is not an enrolment token: copy the whole word that afterimage server add printed")
        }
        self = token
    }
}

public struct EnrolRequest: Sendable, Codable {
    public var secret: String
    /// PEM.
    public var csr: String
    public init(secret: String, csr: String) {
        self.secret = secret
        self.csr = csr
    }
}

public struct EnrolAnswer: Sendable, Codable {
    public var server: ServerID
    public var serverName: String
    /// PEM.
    public var certificate: String
    /// PEM.
    public var ca: String
    public var linkHost: String
    public var linkPort: Int
}

public struct CACertificate: Sendable, Codable {
    /// PEM.
    public var certificate: String
}

public struct StartReplication: Sendable, Codable {
    /// nil: all disks that the agent reports.
    public var disks: [String]?
    public var epochMilliseconds: UInt32?
    public var throttleBytesPerSecond: UInt64?
    public var automaticRestart: Bool?
    public var cpus: Int?
    public var memoryMiB: Int?
    /// Recovery Point Policy, as `PolicyText` has it.
    public var policy: String?
    /// The tap that its agent must have: live or nbd; nil: whichever it has.
    public var tap: String?
    /// A point that is more than crash-consistent every so many seconds; 0: none.
    public var consistentEverySeconds: Int?
    public var consistency: Consistency?
    /// Instead of `throttleBytesPerSecond`, at their times; empty: none.
    public var throttleWindows: [ThrottleWindow]?
    public var compression: CompressionChoice?
    /// *Use SSD*: refused when the store is on something else.
    public var storageClass: StorageClass?
    /// Names of networks; both in one zone.
    public var replicationNetwork: String?
    public var recoveryNetwork: String?
    /// Disks that turn up on its host later; nil: as before, at first ask.
    public var newDisks: NewDisks?
    public init() {}
}

/// How a server that is protected sends from now on; what is not given stays as it is.
public struct SetReplication: Sendable, Codable {
    public var epochMilliseconds: UInt32?
    /// 0: no limit.
    public var throttleBytesPerSecond: UInt64?
    /// Instead of it, at their times; empty: none.
    public var throttleWindows: [ThrottleWindow]?
    public var compression: CompressionChoice?
    public var newDisks: NewDisks?
    public init() {}
}

/// A disk that has turned up on a protected host is protected, too.
public struct AddDisk: Sendable, Codable {
    /// As `ServerView.newDisks` has it.
    public var path: String
    /// Its name in recovery; nil: the device's.
    public var name: String?
    public init(path: String, name: String? = nil) {
        self.path = path
        self.name = name
    }
}

/// It is knowingly not protected.
public struct LeaveOutDisk: Sendable, Codable {
    public var path: String
    public init(path: String) { self.path = path }
}

/// Recovery Point Policy, as `PolicyText` has it.
public struct SetPolicy: Sendable, Codable {
    public var policy: String
    public init(policy: String) { self.policy = policy }
}

/// What is not given stays as it is.
public struct SetAlerts: Sendable, Codable {
    /// 0 = never.
    public var rpoTargetSeconds: Int?
    public var drillEverySeconds: Int?
    public init(rpoTargetSeconds: Int? = nil, drillEverySeconds: Int? = nil) {
        self.rpoTargetSeconds = rpoTargetSeconds
        self.drillEverySeconds = drillEverySeconds
    }
}

public struct CreatePoint: Sendable, Codable {
    public var note: String?
    /// At least; crash when not said.
    public var consistency: Consistency?
    public init(note: String? = nil, consistency: Consistency? = nil) {
        self.note = note
        self.consistency = consistency
    }
}

public struct HoldPoint: Sendable, Codable {
    public var name: String
    public init(name: String) { self.name = name }
}

/// The second step of what cannot be taken back: the thing's name again.
public struct Confirmation: Sendable, Codable {
    public var confirm: String?
    public init(confirm: String? = nil) { self.confirm = confirm }
}

/// What a commit of a failover would keep and delete.
public struct CommitPreview: Sendable, Codable {
    public var server: String
    public var recoveryPoint: RecoveryPointID?
    public var instance: String?
    /// Held ones.
    public var keptPoints: [RecoveryPoint]
    public var deletedPointCount: Int
    /// Of their epochs' data; what the machine's disks do not share comes back.
    public var deletedPointBytes: UInt64
    /// Whether `Confirmation.confirm` must be the server's name.
    public var needsConfirmation: Bool
    /// What will happen, in words.
    public var words: [String]
}

/// What Failover, Change Recovery Point or Unregister would do.
public struct OperationPreview: Sendable, Codable {
    public var server: String
    public var operation: Trigger
    /// That a machine would start from; of a graceful failover the newest now, though a later one is made.
    public var recoveryPoint: RecoveryPointID?
    public var deletedPointCount: Int
    /// Something ends or goes: the CLI asks for the server's name.
    public var needsConfirmation: Bool
    /// What will happen, in words.
    public var words: [String]
}

/// Drill, failover, and change of the recovery point.
public struct StartMachine: Sendable, Codable {
    /// A recovery point's id; nil or "latest": the newest ("current point in time").
    public var recoveryPoint: String?
    public var cpus: Int?
    public var memoryMiB: Int?
    public var network: RecoveryNetwork?
    public var forwards: [PortForward]?
    /// Of the network `bridge`.
    public var bridge: BridgeSettings?
    /// A network's name, instead of `network`.
    public var networkName: String?
    public var firmware: FirmwareChoice?
    public var diskBus: DiskBus?
    public var diskCache: DiskCache?
    public var networkModel: NetworkModel?
    /// *IP Address*: `keep`, `dhcp`, or an address with its prefix length.
    public var address: String?
    /// Of an address that is set, or kept.
    public var gateway: String?
    /// *Execute script after failover*: the text of a shell script, for the machine's guest agent to run …
    public var guestScript: String?
    /// … or a program of the appliance's host, by its absolute path. Administrators only.
    public var hostScript: String?
    public var scriptSecondsMax: Int?
    /// Of a failover's machine that ends by itself.
    public var onEnd: MachineEnd?
    /// Start even if the host has not the memory.
    public var allowOvercommit: Bool?
    /// What makes it ready: none, serial:REGEX, agent, tcp:PORT or script:/PATH.
    public var bootCheck: String?
    /// More of them: all must pass.
    public var bootChecks: [String]?
    public var bootSecondsMax: Int?
    /// Of a failover: hold the source's writes, make a last recovery point, then fence: nothing is lost. Needs the source alive.
    public var graceful: Bool?
    public init() {}
}

public struct ClearDrill: Sendable, Codable {
    /// The machine's system is shut down first.
    public var graceful: Bool?
    public init(graceful: Bool? = nil) { self.graceful = graceful }
}

extension StartMachine {
    /// Programs of the appliance's host that it names.
    var namesHostPrograms: Bool {
        hostScript != nil || ((bootCheck.map { [$0] } ?? []) + (bootChecks ?? [])).contains { $0.hasPrefix("script:") }
    }
}

/// Export of a recovery point's disk into a file or onto a device of the appliance's host.
public struct CopyPoint: Sendable, Codable {
    public var format: PointCopyFormat
    /// Absolute.
    public var path: String
    /// nil: the server's only disk.
    public var disk: String?
    /// The device's path again: what is on it is overwritten. Needed when it does not look empty.
    public var confirm: String?
    public init(format: PointCopyFormat, path: String, disk: String? = nil, confirm: String? = nil) {
        self.format = format
        self.path = path
        self.disk = disk
        self.confirm = confirm
    }
}

/// A failed-over machine's disk, to be copied out of the store.
public struct PromoteMachine: Sendable, Codable {
    public var copy: CopyPoint
    /// Shut it down first; else the copy is of one moment of a machine that runs on.
    public var stop: Bool?
    /// With `stop`: its power is taken when it has not shut itself down by then; 60 by default.
    public var stopSecondsMax: Int?
    public init(copy: CopyPoint, stop: Bool? = nil, stopSecondsMax: Int? = nil) {
        self.copy = copy
        self.stop = stop
        self.stopSecondsMax = stopSecondsMax
    }
}

/// Which machine is to become independent of recovery points.
public struct HydrateMachine: Sendable, Codable {
    /// nil: the failed-over one, or the drill's when there is no other.
    public var kind: InstanceKind?
    public init(kind: InstanceKind? = nil) { self.kind = kind }
}

public struct MountPoint: Sendable, Codable {
    /// Absolute, on the appliance's host; an empty directory.
    public var directory: String
    /// nil: the server's only disk.
    public var disk: String?
    /// nil: the disk's only file system.
    public var partition: Int?
    public init(directory: String, disk: String? = nil, partition: Int? = nil) {
        self.directory = directory
        self.disk = disk
        self.partition = partition
    }
}

/// A mounted recovery point.
public struct PointMountView: Sendable, Codable {
    public var id: String
    public var server: String
    public var recoveryPoint: RecoveryPointID
    public var disk: String
    public var partition: Int?
    public var directory: String
    public var fileSystem: String?
    /// What is to be known of the content: that its file system was in use, for instance.
    public var warning: String?
    public var created: Date
}

public struct RemoveServer: Sendable, Codable {
    /// Its recovery points go with it: must be said when there are any.
    public var deletePoints: Bool?
    /// Its recovery machine goes with it: must be said when one is committed.
    public var stopMachine: Bool?
    public init(deletePoints: Bool = false, stopMachine: Bool = false) {
        self.deletePoints = deletePoints
        self.stopMachine = stopMachine
    }
}

public struct PointExport: Sendable, Codable {
    public var server: String
    public var recoveryPoint: RecoveryPointID
    /// Read-only NBD.
    public var socketPath: String
    /// One export per disk: nbd+unix:///DISK?socket=PATH.
    public var uris: [String]
    public var created: Date
}

func base64URL(_ data: Data) -> String {
    data.base64EncodedString().replacingOccurrences(of: "+", with: "-").replacingOccurrences(of: "/", with: "_")
        .replacingOccurrences(of: "=", with: "")
}

extension Data {
    init?(base64URL text: String) {
        let plain = text.replacingOccurrences(of: "-", with: "+").replacingOccurrences(of: "_", with: "/")
        self.init(base64Encoded: plain + String(repeating: "=", count: (4 - plain.count % 4) % 4))
    }
}

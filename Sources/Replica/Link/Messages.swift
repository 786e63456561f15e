import BlockTap

/// What travels on an agent's control stream, as JSON inside CONTROL frames. Unknown fields are ignored by both ends.

/// One disk as the agent serves it.
public struct DiskReport: Sendable, Codable, Hashable {
    public var name: String
    /// Path of the device at the primary site, for people.
    public var devicePath: String
    public var geometry: BlockGeometry
    /// "nbd", later "ublk" and "live".
    public var tap: String
    /// The NBD tap's unix socket.
    public var socketPath: String?
    public init(name: String, devicePath: String, geometry: BlockGeometry, tap: String, socketPath: String? = nil) {
        self.name = name
        self.devicePath = devicePath
        self.geometry = geometry
        self.tap = tap
        self.socketPath = socketPath
    }
}

/// First message of an agent on its control stream.
public struct AgentHello: Sendable, Codable, Hashable {
    public var agentVersion: String
    public var hostName: String
    public var kernel: String
    /// `EpochSource.instance` of the agent's tap group.
    public var instance: String
    public var disks: [DiskReport]
    public init(agentVersion: String, hostName: String, kernel: String, instance: String, disks: [DiskReport]) {
        self.agentVersion = agentVersion
        self.hostName = hostName
        self.kernel = kernel
        self.instance = instance
        self.disks = disks
    }
}

/// What the appliance wants of an agent. Repeated after every reconnect; carrying out one twice is harmless.
public enum AgentCommand: Sendable, Codable, Hashable {
    case startReplication(ReplicationOrder)
    case stopReplication
    /// Replication of this group ended under a newer generation: stop, do not come back without an operator.
    case fenced(Generation)
    /// Close the running epoch now instead of at its time.
    case cutNow
}

public struct ReplicationOrder: Sendable, Codable, Hashable {
    public var group: GroupID
    public var generation: Generation
    /// Names of the agent's disks, in the order of the group's volumes.
    public var disks: [String]
    public var epochMilliseconds: UInt32
    /// 0 = no limit.
    public var throttleBytesPerSecond: UInt64
    /// Reconnect and go on by itself after an interruption.
    public var automaticRestart: Bool
    public init(group: GroupID, generation: Generation, disks: [String], epochMilliseconds: UInt32 = 1000, throttleBytesPerSecond: UInt64 = 0, automaticRestart: Bool = true) {
        self.group = group
        self.generation = generation
        self.disks = disks
        self.epochMilliseconds = epochMilliseconds
        self.throttleBytesPerSecond = throttleBytesPerSecond
        self.automaticRestart = automaticRestart
    }
}

public enum ReplicationPhase: String, Sendable, Codable {
    case idle, connecting, fullSync, replicating, interrupted, fenced, failed
}

/// Sent every half second while connected.
public struct AgentStatus: Sendable, Codable, Hashable {
    public var phase: ReplicationPhase = .idle
    /// Why the phase is `interrupted`, `fenced` or `failed`, in words; nil otherwise.
    public var reason: String?
    public var fullSyncTotalBytes: UInt64 = 0
    public var fullSyncDoneBytes: UInt64 = 0
    /// Payload bytes per second over the last seconds, after compression.
    public var sentBytesPerSecond: UInt64 = 0
    /// Since the agent started: payload bytes that entered the TLS stream.
    public var sentBytes: UInt64 = 0
    public var source: SourceStatistics = SourceStatistics()
    /// Of a live tap.
    public var live: LiveTapStatistics?
    public var lastAcknowledgedEpoch: EpochNumber = .none
    /// Cut time of the last acknowledged exact epoch, nanoseconds since 1970; 0 = none yet.
    public var lastRecoveryPointNanoseconds: UInt64 = 0
    public init() {}
}

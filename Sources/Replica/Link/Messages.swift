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
    /// Of a host that is itself protected (live tap).
    public var specification: HostSpecification?
    /// Only of an agent in rescue mode: what its disks are to be confirmed by, in the order of `disks`.
    public var rescue: [RescueDisk]?
    /// Only of an agent in rescue mode: its disks have been followed since this epoch of `instance` was acknowledged.
    public var followedSince: EpochNumber?
    public init(agentVersion: String, hostName: String, kernel: String, instance: String, disks: [DiskReport], specification: HostSpecification? = nil) {
        self.agentVersion = agentVersion
        self.hostName = hostName
        self.kernel = kernel
        self.instance = instance
        self.disks = disks
        self.specification = specification
    }
}

/// A disk that an agent in rescue mode holds: nobody else uses it, and it may be overwritten.
public struct RescueDisk: Sendable, Codable, Hashable {
    public var name: String
    /// Serial number or world-wide name.
    public var serial: String?
    public init(name: String, serial: String?) {
        self.name = name
        self.serial = serial
    }
}

/// What is sent back onto an agent's disks.
public struct ReverseOrder: Sendable, Codable, Hashable {
    public var group: GroupID
    public var generation: Generation
    public var disks: [VolumeSpec]
    /// What an operator has confirmed, in the same order: a serial, or the device's path where there is none.
    public var confirmed: [String]
    public init(group: GroupID, generation: Generation, disks: [VolumeSpec], confirmed: [String]) {
        self.group = group
        self.generation = generation
        self.disks = disks
        self.confirmed = confirmed
    }
}

/// What the appliance wants of an agent. Repeated after every reconnect; carrying out one twice is harmless.
public enum AgentCommand: Sendable, Codable, Hashable {
    case startReplication(ReplicationOrder)
    case stopReplication
    /// Replication of this group ended under a newer generation: stop, do not come back without an operator.
    case fenced(Generation)
    /// Close the running epoch now instead of at its time, with this consistency if that can be had.
    case cutNow(CutConsistency)
    /// Let no write reach the disks for a while: for a last recovery point that has all that was ever answered. A later fence makes it final, another order
    /// ends it.
    case holdWrites(HoldOrder)
    /// Look at the disks anew, and say hello.
    case restart
    /// JSON of what the appliance would need if it lost its catalogue.
    case keepConfiguration(String)
    /// To an agent in rescue mode only: send what the disks hold, before anything is overwritten.
    case keepOriginal(ReplicationOrder)
    /// To an agent in rescue mode only: fetch what is sent back, and write it onto the disks.
    case startReverse(ReverseOrder)
    /// To an agent in rescue mode only: the disks hold everything, and nothing more will be written.
    case disksReady
    /// Follow these disks, too, from now on.
    case followDisks([AddedDisk])

    private enum Keys: String, CodingKey {
        case startReplication, stopReplication, fenced, cutNow, holdWrites, restart, keepConfiguration, keepOriginal, startReverse, disksReady, followDisks
    }
    private enum ValueKeys: String, CodingKey { case value = "_0" }

    public init(from decoder: any Decoder) throws {
        let container = try decoder.container(keyedBy: Keys.self)
        guard let key = container.allKeys.first, container.allKeys.count == 1 else {
            throw DecodingError.dataCorrupted(.init(codingPath: container.codingPath, debugDescription: "it is no command, or more than one"))
        }
        let values = try container.nestedContainer(keyedBy: ValueKeys.self, forKey: key)
        switch key {
        case .startReplication: self = .startReplication(try values.decode(ReplicationOrder.self, forKey: .value))
        case .stopReplication: self = .stopReplication
        case .restart: self = .restart
        case .disksReady: self = .disksReady
        case .followDisks: self = .followDisks(try values.decode([AddedDisk].self, forKey: .value))
        case .keepOriginal: self = .keepOriginal(try values.decode(ReplicationOrder.self, forKey: .value))
        case .startReverse: self = .startReverse(try values.decode(ReverseOrder.self, forKey: .value))
        case .keepConfiguration: self = .keepConfiguration(try values.decode(String.self, forKey: .value))
        case .fenced: self = .fenced(try values.decode(Generation.self, forKey: .value))
        // An older appliance says nothing, and means a point such as there were then.
        case .holdWrites: self = .holdWrites(try values.decode(HoldOrder.self, forKey: .value))
        case .cutNow: self = .cutNow(try values.decodeIfPresent(CutConsistency.self, forKey: .value) ?? .crash)
        }
    }

    public func encode(to encoder: any Encoder) throws {
        var container = encoder.container(keyedBy: Keys.self)
        switch self {
        case .startReplication(let order):
            var values = container.nestedContainer(keyedBy: ValueKeys.self, forKey: .startReplication)
            try values.encode(order, forKey: .value)
        case .keepConfiguration(let text):
            var values = container.nestedContainer(keyedBy: ValueKeys.self, forKey: .keepConfiguration)
            try values.encode(text, forKey: .value)
        case .restart: _ = container.nestedContainer(keyedBy: ValueKeys.self, forKey: .restart)
        case .followDisks(let disks):
            var values = container.nestedContainer(keyedBy: ValueKeys.self, forKey: .followDisks)
            try values.encode(disks, forKey: .value)
        case .disksReady: _ = container.nestedContainer(keyedBy: ValueKeys.self, forKey: .disksReady)
        case .keepOriginal(let order):
            var values = container.nestedContainer(keyedBy: ValueKeys.self, forKey: .keepOriginal)
            try values.encode(order, forKey: .value)
        case .startReverse(let order):
            var values = container.nestedContainer(keyedBy: ValueKeys.self, forKey: .startReverse)
            try values.encode(order, forKey: .value)
        case .stopReplication: _ = container.nestedContainer(keyedBy: ValueKeys.self, forKey: .stopReplication)
        case .fenced(let generation):
            var values = container.nestedContainer(keyedBy: ValueKeys.self, forKey: .fenced)
            try values.encode(generation, forKey: .value)
        case .holdWrites(let order):
            var values = container.nestedContainer(keyedBy: ValueKeys.self, forKey: .holdWrites)
            try values.encode(order, forKey: .value)
        case .cutNow(let consistency):
            var values = container.nestedContainer(keyedBy: ValueKeys.self, forKey: .cutNow)
            try values.encode(consistency, forKey: .value)
        }
    }
}

/// A whole disk of a protected host.
public struct HostDisk: Sendable, Codable, Hashable {
    public var path: String
    /// As `DiskSerial` has it.
    public var serial: String?
    public var sizeBytes: UInt64
    public init(path: String, serial: String?, sizeBytes: UInt64) {
        self.path = path
        self.serial = serial
        self.sizeBytes = sizeBytes
    }
    /// What it is known by: its serial, or its path where it has none.
    public var identity: String { serial ?? path }
}

/// A disk that an agent follows because it was told to.
public struct AddedDisk: Sendable, Codable, Hashable {
    public var name: String
    public var path: String
    public var serial: String?
    public init(name: String, path: String, serial: String?) {
        self.name = name
        self.path = path
        self.serial = serial
    }
}

/// A hold of a source's writes. It ends by itself after `seconds`, unless the same order comes again before that; an ended one never begins again.
public struct HoldOrder: Sendable, Codable, Hashable {
    public var id: String
    public var seconds: Double
    public init(id: String, seconds: Double) {
        self.id = id
        self.seconds = seconds
    }
}

public struct WriteHold: Sendable, Codable, Hashable {
    public var id: String
    /// Every write that was answered is on the disks, and none is being done.
    public var isQuiet: Bool
    /// Fenced meanwhile: it does not end by itself any more.
    public var isFinal: Bool
    /// Mount points at the source that cannot be held: only written out.
    public var unheld: [String]?
    public init(id: String, isQuiet: Bool = false, isFinal: Bool = false) {
        self.id = id
        self.isQuiet = isQuiet
        self.isFinal = isFinal
    }
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
    /// Instead of `throttleBytesPerSecond`, at their times. An agent that is older than this, or is told nothing, knows none.
    public var throttleWindows: [ThrottleWindow]?
    /// nil: auto.
    public var compression: CompressionChoice?
    /// Where the data goes, if not where the agent was enrolled.
    public var linkHost: String?
    public init(
        group: GroupID, generation: Generation, disks: [String], epochMilliseconds: UInt32 = 1000, throttleBytesPerSecond: UInt64 = 0, automaticRestart: Bool = true,
        throttleWindows: [ThrottleWindow]? = nil, compression: CompressionChoice? = nil, linkHost: String? = nil
    ) {
        self.throttleWindows = throttleWindows
        self.compression = compression
        self.linkHost = linkHost
        self.group = group
        self.generation = generation
        self.disks = disks
        self.epochMilliseconds = epochMilliseconds
        self.throttleBytesPerSecond = throttleBytesPerSecond
        self.automaticRestart = automaticRestart
    }
}

public enum ReplicationPhase: String, Sendable, Codable, CaseIterable {
    case idle, connecting, fullSync
    /// A full sync of a replica that has something already: compared by checksum, only what differs is sent. An agent says so only to an
    /// appliance that answers RESYNC.
    case resync
    case replicating, interrupted, fenced, failed
}

/// How it is known that the recovery point of an epoch is the disks at one instant.
public struct PointProof: Sendable, Codable, Hashable {
    public var epoch: EpochNumber
    public var instance: String
    public var proof: CutProof
    public init(epoch: EpochNumber, instance: String, proof: CutProof) {
        self.epoch = epoch
        self.instance = instance
        self.proof = proof
    }
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
    /// Of the full sync that runs, or of the last one: what was compared with the replica, and what of it did not have to be sent. What was
    /// compared twice, after an epoch was given up, counts twice. 0 when everything is copied.
    public var resyncComparedBytes: UInt64 = 0
    public var resyncEqualBytes: UInt64 = 0
    /// Epochs outside of a full sync that the tap could not prove: sent, but no recovery points. Since the agent started.
    public var unprovenEpochs: UInt64 = 0
    /// Of the last 64 acknowledged exact epochs, oldest first.
    public var proofs: [PointProof] = []
    /// Since it began, no write has reached the disks.
    public var hold: WriteHold?
    /// The last hold that has ended, which never begins again; it may have begun and ended between two of these.
    public var endedHold: String?
    public var endedHoldReason: String?
    /// Whether it can hold writes, of whatever tap; nil: it is too old to say.
    public var canHold: Bool?
    /// In force now; 0 = none.
    public var throttleBytesPerSecond: UInt64?
    /// Disks of the host that could be followed and are not; nil: nobody has looked.
    public var hostDisks: [HostDisk]?
    public init() {}

    /// Agents may be older than the appliance: what they do not say is as in `init()`.
    public init(from decoder: any Decoder) throws {
        let container = try decoder.container(keyedBy: CodingKeys.self)
        phase = try container.decode(ReplicationPhase.self, forKey: .phase)
        reason = try container.decodeIfPresent(String.self, forKey: .reason)
        fullSyncTotalBytes = try container.decode(UInt64.self, forKey: .fullSyncTotalBytes)
        fullSyncDoneBytes = try container.decode(UInt64.self, forKey: .fullSyncDoneBytes)
        sentBytesPerSecond = try container.decode(UInt64.self, forKey: .sentBytesPerSecond)
        sentBytes = try container.decode(UInt64.self, forKey: .sentBytes)
        source = try container.decode(SourceStatistics.self, forKey: .source)
        lastAcknowledgedEpoch = try container.decode(EpochNumber.self, forKey: .lastAcknowledgedEpoch)
        lastRecoveryPointNanoseconds = try container.decode(UInt64.self, forKey: .lastRecoveryPointNanoseconds)
        resyncComparedBytes = try container.decodeIfPresent(UInt64.self, forKey: .resyncComparedBytes) ?? 0
        resyncEqualBytes = try container.decodeIfPresent(UInt64.self, forKey: .resyncEqualBytes) ?? 0
        unprovenEpochs = try container.decodeIfPresent(UInt64.self, forKey: .unprovenEpochs) ?? 0
        proofs = try container.decodeIfPresent([PointProof].self, forKey: .proofs) ?? []
        hold = try container.decodeIfPresent(WriteHold.self, forKey: .hold)
        endedHold = try container.decodeIfPresent(String.self, forKey: .endedHold)
        canHold = try container.decodeIfPresent(Bool.self, forKey: .canHold)
        endedHoldReason = try container.decodeIfPresent(String.self, forKey: .endedHoldReason)
        throttleBytesPerSecond = try container.decodeIfPresent(UInt64.self, forKey: .throttleBytesPerSecond)
        hostDisks = try container.decodeIfPresent([HostDisk].self, forKey: .hostDisks)
        // Figures for people: those of another version are no reason to take nothing.
        live = try? container.decodeIfPresent(LiveTapStatistics.self, forKey: .live)
    }
}

import BlockTap

/// One disk of a group, as the group was created with.
public struct VolumeSpec: Sendable, Codable, Hashable {
    public var name: String
    public var geometry: BlockGeometry
    public init(name: String, geometry: BlockGeometry) {
        self.name = name
        self.geometry = geometry
    }
}

/// The last sealed epoch of a group: what HELLO answers.
public struct DurablePosition: Sendable, Codable, Hashable {
    public var instance: String
    public var epoch: EpochNumber
    public var kind: EpochKind
    public init(instance: String, epoch: EpochNumber, kind: EpochKind) {
        self.instance = instance
        self.epoch = epoch
        self.kind = kind
    }
}

/// A moment at which all volumes of a group equal the disks at one cut. Times are nanoseconds since 1970.
public struct RecoveryPoint: Sendable, Codable, Hashable {
    public var id: RecoveryPointID
    public var group: GroupID
    public var epoch: EpochNumber
    public var instance: String
    public var cutTimeNanoseconds: UInt64
    public var consistency: Consistency
    /// When it became durable here.
    public var receivedTimeNanoseconds: UInt64
    /// Bytes of data that its epoch brought.
    public var dataBytes: UInt64
    public var note: String?
    /// Name under which it is held: never expired, not dropped before it is released.
    public var hold: String?
    /// Asked for by a person, not by the clock.
    public var isOnDemand = false
    public init(id: RecoveryPointID, group: GroupID, epoch: EpochNumber, instance: String, cutTimeNanoseconds: UInt64, consistency: Consistency, receivedTimeNanoseconds: UInt64, dataBytes: UInt64, note: String? = nil) {
        self.id = id
        self.group = group
        self.epoch = epoch
        self.instance = instance
        self.cutTimeNanoseconds = cutTimeNanoseconds
        self.consistency = consistency
        self.receivedTimeNanoseconds = receivedTimeNanoseconds
        self.dataBytes = dataBytes
        self.note = note
    }
}

public struct GroupInfo: Sendable, Hashable {
    public var id: GroupID
    public var volumes: [VolumeSpec]
    public var generation: Generation
    public var lastDurable: DurablePosition?
    /// Data bytes in the layers of the group's volumes and recovery points, overwritten ones included.
    public var storedBytes: UInt64
    /// Layers of all volumes together.
    public var layerCount: Int
    public var recoveryPointCount: Int
    public var heldPointCount: Int
}

public struct ForkInfo: Sendable, Hashable {
    public var id: ForkID
    public var group: GroupID
    public var recoveryPoint: RecoveryPointID
    public var purpose: String
    public var createdTimeNanoseconds: UInt64
    public var volumes: [VolumeSpec]
    /// Its own data and journals, in bytes: files of its open layers, and the data of layers that no group needs.
    public var ownBytes: UInt64
    /// The fork that it was made of; nil = of the recovery point.
    public var parentFork: ForkID?
}

public struct StoreStatistics: Sendable, Hashable {
    public var groupCount = 0
    /// Those that are somebody's disks, and those that only mark what another was at one moment.
    public var forkCount = 0
    public var markCount = 0
    public var layerCount = 0
    public var segmentCount = 0
    /// Data bytes in live layers, overwritten ones included.
    public var storedBytes: UInt64 = 0
    /// Of the file system that holds the store.
    public var freeBytes: UInt64 = 0
    public var capacityBytes: UInt64 = 0
    /// Since the store was opened.
    public var sealedEpochCount: UInt64 = 0
    public var sealedForkCount: UInt64 = 0
    public var abandonedEpochCount: UInt64 = 0
    public var appendedBytes: UInt64 = 0
    public var badBlockCount: UInt64 = 0
    public var upkeep = UpkeepStatistics()
    public var scrub = ScrubStatistics()
}

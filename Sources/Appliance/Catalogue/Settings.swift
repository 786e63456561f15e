import Replica

/// The documented service's three types of site pair.
public enum SitePairType: String, Sendable, Codable, CaseIterable {
    case zoneToZone = "zone-to-zone"
    case regionToRegion = "region-to-region"
    case datacenterToZone = "datacenter-to-zone"

    /// What its servers send with unless told otherwise. Zones of a region have lines that are fast and cost nothing: compression only where it makes the stream
    /// faster. Between regions every byte is paid for. A data centre's line is shared with everybody in it: a quarter of 1 Gbit/s.
    public var compression: CompressionChoice { self == .zoneToZone ? .auto : .always }
    public var throttleBytesPerSecond: UInt64 { self == .datacenterToZone ? 32 << 20 : 0 }
}

/// What Start Replication was asked for. Kept while the server is protected, so that an agent that comes back goes on.
public struct ReplicationSettings: Sendable, Codable, Hashable {
    /// The agent's disks, in the order of the group's volumes; the first is the boot disk.
    public var disks: [String]
    public var epochMilliseconds: UInt32
    /// 0 = no limit.
    public var throttleBytesPerSecond: UInt64
    /// Automatic restart after replication interruption.
    public var automaticRestart: Bool
    /// The machine that drills and failovers start unless told otherwise.
    public var cpus: Int
    public var memoryMiB: Int
    /// Recovery points that are more than crash-consistent: how often, and what.
    public var consistentEverySeconds: Int?
    public var consistency: Consistency?
    /// Until Start Replication, or its resuming.
    public var isPaused: Bool?
    /// Instead of `throttleBytesPerSecond`, at their times.
    public var throttleWindows: [ThrottleWindow]?
    /// nil: auto.
    public var compression: CompressionChoice?
    /// Names of networks; nil: the pair's.
    public var replicationNetwork: String?
    public var recoveryNetwork: String?
    /// The appliance's address in the replication network.
    public var linkHost: String?
    /// *Use SSD*: what was asked for, and was so.
    public var storageClass: StorageClass?
    /// nil: ask.
    public var newDisks: NewDisks?
    /// Disks of the host that are knowingly not protected, by `HostDisk.identity`: those that were there when its replication began, and those that somebody has
    /// left out since. nil: the host has not been looked at yet.
    public var leftOutDisks: [String]?

    func order(group: GroupID, generation: Generation) -> ReplicationOrder {
        ReplicationOrder(
            group: group, generation: generation, disks: disks, epochMilliseconds: epochMilliseconds,
            throttleBytesPerSecond: throttleBytesPerSecond, automaticRestart: automaticRestart, throttleWindows: throttleWindows, compression: compression, linkHost: linkHost)
    }
}

/// What becomes of a disk that turns up on a protected host.
public enum NewDisks: String, Sendable, Codable, CaseIterable {
    /// An alert, until somebody adds it or leaves it out.
    case ask
    /// It is protected, too.
    case add
}

public enum RecoveryNetwork: String, Sendable, Codable, CaseIterable {
    /// No network card.
    case none
    /// A card on a network of its own: nothing leaves it, nothing enters.
    case isolated
    /// Out through the host (user mode), in through the forwarded ports.
    case user
    /// A card on a bridge of the host: see `BridgeSettings`.
    case bridge
}

/// A port of the appliance's host that leads to a port of the machine.
public struct PortForward: Sendable, Codable, Hashable {
    /// One of the host's own IPv4 addresses: the *elastic public IP*; nil: 127.0.0.1.
    public var address: String?
    public var hostPort: UInt16
    public var guestPort: UInt16
    public init(address: String? = nil, hostPort: UInt16, guestPort: UInt16) {
        self.address = address
        self.hostPort = hostPort
        self.guestPort = guestPort
    }
    var hostAddress: String { address ?? "127.0.0.1" }
    /// As people write it.
    var text: String { (address.map { "\($0):" } ?? "") + "\(hostPort):\(guestPort)" }
}

/// The machine that a drill or a failover starts.
public struct MachineSettings: Sendable, Codable, Hashable {
    public var cpus: Int
    public var memoryMiB: Int
    public var network: RecoveryNetwork
    public var forwards: [PortForward]
    public var bootCheck: BootCheck
    /// Time limit of the boot check, from the start of QEMU.
    public var bootSecondsMax: Int
    /// Of the network `bridge`.
    public var bridge: BridgeSettings?
    /// Of a network that has one.
    public var networkName: String?
    /// nil: bios.
    public var firmware: FirmwareChoice?
    /// nil: virtio.
    public var diskBus: DiskBus?
    /// nil: writeback.
    public var diskCache: DiskCache?
    /// nil: virtio.
    public var networkModel: NetworkModel?
    /// MAC addresses of its network cards; nil: one card, with QEMU's.
    public var cards: [String]?
    /// nil: by DHCP.
    public var address: MachineAddress?
    public var script: MachineScript?
    /// nil: report.
    public var onEnd: MachineEnd?
    /// Start even if this host has not the memory.
    public var allowsOvercommit: Bool?
}

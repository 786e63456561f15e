/// What a recovery machine is made of, as it is asked for. `auto` becomes what it means before the machine first starts.

public enum FirmwareChoice: String, Sendable, Codable, CaseIterable {
    /// As the source's; where that is not known, or its disk has no boot code for a BIOS, as the recovery point's partition table says.
    case auto
    case bios, uefi
}

public enum DiskBus: String, Sendable, Codable, CaseIterable {
    /// virtio, unless the source's initramfs is known to lack its drivers.
    case auto
    case virtio
    /// An AHCI controller, which every system of these days can start from.
    case sata
}

public enum DiskCache: String, Sendable, Codable, CaseIterable {
    /// The disk says that it has a write cache, and the machine's flushes are obeyed.
    case writeback
    /// The disk says that it has none: every write is durable when it is answered.
    case writethrough
    /// Flushes are ignored: faster, and lost when this host loses power.
    case unsafe
}

public enum NetworkModel: String, Sendable, Codable, CaseIterable {
    /// virtio, unless the source's kernel is known to lack its driver.
    case auto
    case virtio, e1000e
}

/// What happens when a failed-over machine ends by itself.
public enum MachineEnd: String, Sendable, Codable, CaseIterable { case report, restart }

/// The address that a machine is to have; where it has one by DHCP there is none of these.
public struct MachineAddress: Sendable, Codable, Hashable {
    public var interface: IPv4Interface
    public var gateway: UInt32?
    /// The source's own: its machine need not be told.
    public var isKept: Bool
    /// Its network card, in the order of `MachineSettings.cards`.
    public var card: Int
}

/// Execute script after failover.
public struct MachineScript: Sendable, Codable, Hashable {
    public enum Place: Sendable, Codable, Hashable {
        /// Text of a shell script, run in the machine by its guest agent.
        case guest(String)
        /// An absolute path on the appliance's host.
        case host(String)
    }
    public var place: Place
    public var secondsMax: Int
}

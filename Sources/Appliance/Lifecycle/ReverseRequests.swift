import Foundation
import Replica

/// Reversed Register, of another appliance.
public struct RegisterReverse: Sendable, Codable {
    /// As the other appliance printed it, for the agent of its server.
    public var token: String
    public init(token: String) { self.token = token }
}

/// Initiate Reverse Replication.
public struct StartReverse: Sendable, Codable {
    /// Back onto the original disks, which are overwritten; this or `toAppliance` must be said.
    public var originalMachine: Bool?
    /// Into the store of the appliance that was registered.
    public var toAppliance: Bool?
    /// Of each disk its serial, or its path where it has none: what it is overwritten by. To an appliance: the server's name.
    public var confirm: [String]?
    /// Nothing is kept of what the disks hold.
    public var discardsOriginal: Bool?
    /// 0 = no limit.
    public var throttleBytesPerSecond: UInt64?
    public init(originalMachine: Bool? = nil, toAppliance: Bool? = nil, confirm: [String]? = nil, discardsOriginal: Bool? = nil, throttleBytesPerSecond: UInt64? = nil) {
        self.originalMachine = originalMachine
        self.toAppliance = toAppliance
        self.confirm = confirm
        self.discardsOriginal = discardsOriginal
        self.throttleBytesPerSecond = throttleBytesPerSecond
    }
}

public struct StartFailback: Sendable, Codable {
    /// The machine is stopped without being asked to shut down.
    public var forced: Bool?
    /// The server's name.
    public var confirm: String?
    public init(forced: Bool? = nil, confirm: String? = nil) {
        self.forced = forced
        self.confirm = confirm
    }
}

/// Reverse replication, as it goes.
public struct ReverseView: Sendable, Codable {
    public var step: ReverseStep
    public var disks: [ReverseDisk]
    /// The API of the appliance that it goes to, and what the server is called there; nil: to its original disks.
    public var applianceURL: String?
    public var applianceServer: String?
    /// The agent with the disks, or the other appliance, is connected.
    public var isConnected: Bool
    public var phase: ReplicationPhase
    public var reason: String?
    /// Payload bytes that were sent back since the appliance started.
    public var sentBytes: UInt64
    /// Compared, and found alike there.
    public var comparedBytes: UInt64
    public var equalBytes: UInt64
    public var behindBytes: UInt64
    /// Cut time of what the disks, or the other appliance, hold completely; nil: nothing yet.
    public var lastCutTime: Date?
    public var originalPoint: RecoveryPointID?
}

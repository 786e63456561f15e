import Foundation
import GRDB
import Replica

/// How far reverse replication of a server has come. Written before the step's work starts.
public enum ReverseStep: String, Sendable, Codable, CaseIterable {
    /// The disks that it goes back to are awaited, or there.
    case registered
    /// What the disks hold is taken into a recovery point, before anything of it is overwritten.
    case keeping
    /// The machine's fork is sent, cut by cut.
    case sending
    /// A failback has begun: the machine here is stopped, the last cut is on its way.
    case stopping
    /// The disks hold the last cut, and the machine never starts here again.
    case handedOver
    /// A failback is taken back: the machine starts again here.
    case cancelling
    /// The other appliance failed the server over without this machine's last writes: it is stopped, and starts again only if that is rolled back.
    case fenced
}

/// Reverse replication of one server; gone when its source is registered again.
public struct ReverseRecord: Codable, Sendable, Hashable, FetchableRecord, PersistableRecord {
    public static let databaseTableName = "reverse"
    public var server: String
    /// The failed-over machine; its fork is what is sent.
    public var instance: String
    /// `ForkSource.instance`.
    public var source: String
    public var step: ReverseStep
    public var keepsOriginal: Bool
    /// As the agent in rescue mode last reported them.
    public var disks: [ReverseDisk]
    /// What the operator confirmed, in the order of the group's volumes.
    public var confirmed: [String]
    /// What the disks held before they were overwritten, held.
    public var originalPoint: RecoveryPointID?
    public var throttleBytesPerSecond: UInt64
    public var created: Date
    /// nil: it goes back to its original disks.
    public var appliance: ReverseAppliance?
    /// The last hold that the other appliance ordered; one that has ended never begins again.
    public var hold: String?
    /// The newest generation there under which the machine was to be followed: only a newer one fences it.
    public var generation: Int64?
}

/// Another appliance, for which this one is a server's agent.
public struct ReverseAppliance: Codable, Sendable, Hashable {
    public var url: String
    /// What the server is called there.
    public var serverName: String
    /// What its group is called there.
    public var group: String
    /// Key, certificate and the rest, below STATE/reverse.
    public var directory: String
}

/// A disk that a server can go back to.
public struct ReverseDisk: Codable, Sendable, Hashable {
    public var name: String
    public var devicePath: String
    public var sizeBytes: UInt64
    /// Serial number, or the path where there is none: what its overwriting is confirmed by.
    public var confirmation: String
}

extension ReverseStep: DatabaseValueConvertible {}

extension Database {
    func reverse(of server: String) throws -> ReverseRecord {
        guard let record = try ReverseRecord.fetchOne(self, key: server) else { throw ApplianceError.failed("the catalogue has lost what was begun to bring server \(server) back") }
        return record
    }

    func updateReverse(of server: String, _ change: (inout ReverseRecord) -> Void) throws {
        var record = try reverse(of: server)
        change(&record)
        try record.update(self)
    }
}

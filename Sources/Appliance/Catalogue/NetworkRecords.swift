import Foundation
import GRDB

public enum NetworkPurpose: String, Sendable, Codable, CaseIterable {
    /// What agents send over.
    case replication
    /// What recovery machines are connected to.
    case recovery
}

/// A network of a site, by the name that site pairs, servers and drills call it.
public struct NetworkRecord: Codable, Sendable, Hashable, FetchableRecord, PersistableRecord {
    public static let databaseTableName = "network"
    public var name: String
    public var site: String
    /// Both networks of a pair are in one.
    public var zone: String
    public var purpose: NetworkPurpose
    /// Of a recovery network.
    public var mode: RecoveryNetwork?
    /// Of the mode `bridge`.
    public var bridge: BridgeSettings?
    /// Of a replication network: the appliance's in it, to which agents connect. nil: the one that the appliance advertises.
    public var address: String?
    public var created: Date
}

extension Database {
    func network(_ name: String) throws -> NetworkRecord {
        if let record = try NetworkRecord.fetchOne(self, key: name) { return record }
        throw ApplianceError.notFound("There is no network \(name) (afterimage network list).")
    }

    func network(_ name: String, for purpose: NetworkPurpose) throws -> NetworkRecord {
        let record = try network(name)
        guard record.purpose == purpose else { throw ApplianceError.invalid("\(name) is a \(record.purpose.rawValue) network, not a \(purpose.rawValue) network") }
        return record
    }
}

import Foundation
import GRDB

public struct CreateNetwork: Sendable, Codable {
    public var name: String
    public var site: String
    public var zone: String
    public var purpose: NetworkPurpose
    /// Of a recovery network.
    public var mode: RecoveryNetwork?
    /// Of the mode `bridge`.
    public var bridge: BridgeSettings?
    /// Of a replication network: the appliance's address in it.
    public var address: String?
    public init(name: String, site: String, zone: String, purpose: NetworkPurpose, mode: RecoveryNetwork? = nil, bridge: BridgeSettings? = nil, address: String? = nil) {
        self.name = name
        self.site = site
        self.zone = zone
        self.purpose = purpose
        self.mode = mode
        self.bridge = bridge
        self.address = address
    }
}

/// Networks, and the rule that both of a pair are in one zone.
extension Lifecycle {
    /// Words that `--network` has already.
    private static let takenNames = Set(RecoveryNetwork.allCases.map(\.rawValue) + ["default"])

    public func createNetwork(_ request: CreateNetwork, who: String) async throws -> NetworkRecord {
        try Names.check(request.name, what: "network")
        try Names.check(request.site, what: "site")
        try Names.check(request.zone, what: "zone")
        guard !Self.takenNames.contains(request.name) else { throw ApplianceError.invalid("\(request.name) cannot be the name of a network: the word has a meaning of its own") }
        switch request.purpose {
        case .replication:
            guard request.mode == nil, request.bridge == nil else { throw ApplianceError.invalid("mode and bridge are of recovery networks; \(request.name) is to be a replication network") }
            if let address = request.address, address.wholeMatch(of: /[A-Za-z0-9.:-]{1,253}/) == nil { throw ApplianceError.invalid("\(address) is neither a host's name nor an IP address") }
        case .recovery:
            guard request.address == nil else { throw ApplianceError.invalid("an address is what agents connect to in a replication network; \(request.name) is to be a recovery network") }
            guard let mode = request.mode else { throw ApplianceError.invalid("say what the recovery network \(request.name) is: none, isolated, user or bridge") }
            guard (mode == .bridge) == (request.bridge != nil) else { throw ApplianceError.invalid(mode == .bridge ? "say which bridge \(request.name) is" : "a bridge is for the mode bridge, not \(mode.rawValue)") }
            try request.bridge?.check()
        }
        let record = NetworkRecord(
            name: request.name, site: request.site, zone: request.zone, purpose: request.purpose, mode: request.mode, bridge: request.bridge, address: request.address, created: Date())
        try await catalogue.write { db in
            guard try NetworkRecord.fetchOne(db, key: record.name) == nil else { throw ApplianceError.refused("There is a network \(record.name) already.") }
            if try SiteRecord.fetchOne(db, key: record.site) == nil { try SiteRecord(name: record.site, zone: nil).insert(db) }
            try record.insert(db)
            try db.event(who, "Create network", after: record.name, detail: "\(record.purpose.rawValue), site \(record.site), zone \(record.zone)" + (record.address.map { ", \($0)" } ?? ""))
        }
        try await renewIdentity()
        return record
    }

    public func networks() async throws -> [NetworkRecord] {
        try await catalogue.read { db in try NetworkRecord.order(Column("name")).fetchAll(db) }
    }

    public func deleteNetwork(_ name: String, who: String) async throws {
        try await catalogue.write { db in
            let record = try db.network(name)
            if let pair = try SitePairRecord.filter(Column("replicationNetwork") == name || Column("recoveryNetworkName") == name).fetchOne(db) {
                throw ApplianceError.refused("The site pair \(pair.name) uses the network \(name).")
            }
            if let server = try ServerRecord.fetchAll(db).first(where: { $0.settings?.replicationNetwork == name || $0.settings?.recoveryNetwork == name }) {
                throw ApplianceError.refused("Server \(server.name) uses the network \(name): name another one first (afterimage replication start \(server.name)).")
            }
            try NetworkRecord.deleteOne(db, key: name)
            try db.event(who, "Delete network", before: name, detail: "\(record.purpose.rawValue), site \(record.site), zone \(record.zone)")
        }
    }

    /// The networks that a pair, or a server of it, is to have: those that are there, each for its purpose and at its site, and both in one zone.
    static func checkNetworks(replication: String?, recovery: String?, primarySite: String, secondarySite: String, in db: Database) throws -> (replication: NetworkRecord?, recovery: NetworkRecord?) {
        let first = try replication.map { try db.network($0, for: .replication) }, second = try recovery.map { try db.network($0, for: .recovery) }
        if let first, ![primarySite, secondarySite].contains(first.site) {
            throw ApplianceError.invalid("the replication network \(first.name) is at site \(first.site), which is none of the pair's (\(primarySite), \(secondarySite))")
        }
        if let second, second.site != secondarySite {
            throw ApplianceError.invalid("the recovery network \(second.name) is at site \(second.site); recovery machines run at \(secondarySite)")
        }
        if let first, let second, first.zone != second.zone {
            throw ApplianceError.invalid("the replication network \(first.name) is in zone \(first.zone), the recovery network \(second.name) in zone \(second.zone): both networks must be in the same zone")
        }
        return (first, second)
    }

    /// What a machine is connected to, and by which name: what was asked for, else what its server has, else what the pair has.
    func recoveryNetwork(of server: ServerRecord, _ request: StartMachine) async throws -> (mode: RecoveryNetwork, bridge: BridgeSettings?, name: String?) {
        guard request.network == nil || request.networkName == nil else { throw ApplianceError.invalid("name a network, or a kind of network, not both") }
        if let mode = request.network { return (mode, request.bridge, nil) }
        return try await catalogue.read { db in
            let pair = try db.sitePair(server.sitePair)
            guard let name = request.networkName ?? server.settings?.recoveryNetwork ?? pair.recoveryNetworkName else { return (pair.recoveryNetwork, request.bridge, nil) }
            let network = try db.network(name, for: .recovery)
            guard network.site == pair.secondarySite else { throw ApplianceError.invalid("the network \(name) is at site \(network.site); recovery machines run at \(pair.secondarySite)") }
            return (network.mode ?? .isolated, network.bridge ?? request.bridge, name)
        }
    }

    /// The link's certificate names every address that agents connect to.
    func renewIdentity() async throws {
        let addresses = try await catalogue.read { db in try NetworkRecord.filter(Column("purpose") == NetworkPurpose.replication.rawValue).fetchAll(db).compactMap(\.address) }
        guard !addresses.isEmpty, let link else { return }
        let known = settings.certificateHosts
        try link.use(identity: try authority.issueServer(hosts: known + addresses.filter { !known.contains($0) }))
    }
}

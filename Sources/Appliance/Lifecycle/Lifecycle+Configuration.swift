import BlockTap
import Foundation
import GRDB
import Replica

/// What of a site pair must be known to go on with its replicas when the appliance's catalogue is lost: kept by every agent of the pair, at the other site.
/// No secrets.
public struct ConfigurationCopy: Sendable, Codable, Hashable {
    public struct Server: Sendable, Codable, Hashable {
        /// Also the name of its group in the store.
        public var id: String
        public var name: String
        public var settings: ReplicationSettings?
        public var policy: String
        public var alertSettings: AlertSettings?
        public var disks: [DiskReport]
        public var hostName: String?
        public var specification: HostSpecification?
        public var created: Date
    }

    /// The appliance's host.
    public var appliance: String
    public var storeDirectory: String
    public var pair: SitePairRecord
    public var sites: [SiteRecord]
    public var servers: [Server]
    /// An older appliance's copy has none.
    public var networks: [NetworkRecord]?
}

extension Lifecycle {
    static let configurationSeconds = 60.0
    /// Of what a control frame takes. A pair of very many servers is kept in part: each agent has at least its own.
    private static let configurationBytesMax = 900 << 10

    /// Once, after `resume`: what has changed is sent to the agents that are connected. Others get it when they connect.
    func startConfigurationCopies() {
        configurationTask = Task { [weak self] in
            while (try? await Task.sleep(for: .seconds(Self.configurationSeconds))) != nil {
                guard let self else { return }
                await self.copyConfiguration()
            }
        }
    }

    private func copyConfiguration() async {
        guard let records = try? await catalogue.read({ db in try ServerRecord.fetchAll(db) }) else { return }
        for record in records where agents[record.serverID]?.connected == true {
            if let command = await configurationCommand(for: record) { await tell(record.serverID, command) }
        }
    }

    /// nil when its agent has it already.
    func configurationCommand(for record: ServerRecord) async -> AgentCommand? {
        do {
            let text = try await configurationText(for: record)
            guard agents[record.serverID]?.configuration != text.hashValue else { return nil }
            agents[record.serverID]?.configuration = text.hashValue
            return .keepConfiguration(text)
        } catch {
            logger.error("the configuration is not copied to its agent: \(error)", metadata: ["server": "\(record.name)"])
            return nil
        }
    }

    private func configurationText(for record: ServerRecord) async throws -> String {
        let storeDirectory = settings.storeDirectory
        var copy = try await catalogue.read { db in
            let pair = try db.sitePair(record.sitePair)
            return ConfigurationCopy(
                appliance: ProcessInfo.processInfo.hostName, storeDirectory: storeDirectory, pair: pair,
                sites: try SiteRecord.filter([pair.primarySite, pair.secondarySite].contains(Column("name"))).order(Column("name")).fetchAll(db),
                servers: try ServerRecord.filter(Column("sitePair") == pair.name).order(Column("name")).fetchAll(db).map { server in
                    ConfigurationCopy.Server(
                        id: server.id, name: server.name, settings: server.settings, policy: server.policy, alertSettings: server.alertSettings, disks: server.disks,
                        hostName: server.hostName, specification: server.specification, created: server.created)
                },
                networks: try NetworkRecord.filter([pair.primarySite, pair.secondarySite].contains(Column("site"))).order(Column("name")).fetchAll(db))
        }
        func text() throws -> String { String(decoding: try APIJSON.encoder(pretty: true).encode(copy), as: UTF8.self) }
        if case let all = try text(), all.utf8.count <= Self.configurationBytesMax { return all }
        copy.servers.removeAll { $0.id != record.id }
        return try text()
    }

    /// Takes a pair and its servers from a copy, all or none. What the store has of them can be recovered from at once; their agents have to be enrolled again.
    public func importConfiguration(_ copy: ConfigurationCopy, who: String) async throws -> [String] {
        try Names.check(copy.pair.name, what: "site pair")
        for site in copy.sites { try Names.check(site.name, what: "site") }
        for network in copy.networks ?? [] {
            try Names.check(network.name, what: "network")
            guard copy.sites.contains(where: { $0.name == network.site }) else { throw ApplianceError.invalid("the copy's network \(network.name) is at none of its sites") }
        }
        guard Set(copy.sites.map(\.name)) == [copy.pair.primarySite, copy.pair.secondarySite] else { throw ApplianceError.invalid("the copy's sites are not those of its pair") }
        guard !copy.servers.isEmpty else { throw ApplianceError.invalid("the copy has no servers") }
        for server in copy.servers {
            try Names.check(server.name, what: "server")
            guard server.id.wholeMatch(of: /[a-z0-9][a-z0-9-]{0,59}/) != nil else { throw ApplianceError.invalid("\(server.id) cannot be the id of a server") }
            _ = try PolicyText(server.policy)
            if let settings = server.settings { try checkMachine(cpus: settings.cpus, memoryMiB: settings.memoryMiB) }
        }
        let records = try await catalogue.write { db in
            for site in copy.sites where try SiteRecord.fetchOne(db, key: site.name) == nil { try site.insert(db) }
            for network in copy.networks ?? [] where try NetworkRecord.fetchOne(db, key: network.name) == nil { try network.insert(db) }
            if let there = try SitePairRecord.fetchOne(db, key: copy.pair.name) {
                guard there.primarySite == copy.pair.primarySite, there.secondarySite == copy.pair.secondarySite else {
                    throw ApplianceError.refused("There is a site pair \(there.name) of other sites already: \(there.primarySite) to \(there.secondarySite).")
                }
            } else {
                try copy.pair.insert(db)
            }
            return try copy.servers.map { server in
                if try ServerRecord.filter(Column("name") == server.name || Column("id") == server.id).fetchOne(db) != nil {
                    throw ApplianceError.refused("There is a server \(server.name) already; nothing was imported.")
                }
                var record = ServerRecord(
                    id: server.id, name: server.name, sitePair: copy.pair.name, state: .initialized, stateSince: Date(),
                    reason: "imported; its agent is let in when it is enrolled again (afterimage server token \(server.name))", disks: server.disks, created: server.created)
                (record.settings, record.policy, record.alertSettings) = (server.settings, server.policy, server.alertSettings)
                (record.hostName, record.specification) = (server.hostName, server.specification)
                record.settings?.isPaused = nil
                try record.insert(db)
                try db.event(who, "Import server", server: record, after: record.state.rawValue, detail: "from the copy of \(copy.appliance)")
                return record
            }
        }
        for record in records { giveRetention(record) }
        return records.map(\.name)
    }
}

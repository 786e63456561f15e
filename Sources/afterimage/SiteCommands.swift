import Appliance
import ArgumentParser

struct SitePairCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "site-pair", abstract: "Pairs of a primary and a secondary site.", subcommands: [Create.self, List.self])

    struct Create: ClientCommand {
        static let configuration = CommandConfiguration(abstract: "Create a disaster recovery site pair.")
        @OptionGroup var global: GlobalOptions
        @Argument(help: "Name of the pair.") var name: String
        @Option(help: "zone-to-zone, region-to-region or datacenter-to-zone.") var type: SitePairType = .zoneToZone
        @Option(help: "Name of the primary site.") var primary: String = "primary"
        @Option(help: "Name of the secondary site, where this appliance is.") var secondary: String = "secondary"
        @Option(help: ArgumentHelp("The network that its agents send over (afterimage network list); default: wherever they were enrolled.", valueName: "network")) var replicationNetwork: String?
        @Option(help: ArgumentHelp("What its machines are connected to unless told otherwise: isolated, user, none, or a network's name. Both networks must be in the same zone.", valueName: "network"))
        var recoveryNetwork: NetworkChoice?

        func run(_ client: APIClient) async throws {
            let pair: SitePairRecord = try await client.post(
                "/v1/site-pairs",
                CreateSitePair(
                    name: name, type: type, primarySite: primary, secondarySite: secondary, replicationNetwork: replicationNetwork,
                    recoveryNetwork: recoveryNetwork?.mode, recoveryNetworkName: recoveryNetwork?.name))
            try show(pair) { ["site pair \(pair.name): \(pair.primarySite) → \(pair.secondarySite) (\(pair.type.rawValue))"] }
        }
    }

    struct List: ClientCommand {
        static let configuration = CommandConfiguration(abstract: "List the site pairs.")
        @OptionGroup var global: GlobalOptions

        func run(_ client: APIClient) async throws {
            let pairs: [SitePairRecord] = try await client.get("/v1/site-pairs")
            try show(pairs) {
                pairs.isEmpty
                    ? ["no site pairs yet: afterimage site-pair create NAME"]
                    : Terminal.table(
                        ["NAME", "TYPE", "PRIMARY", "SECONDARY", "NETWORKS"],
                        pairs.map { [$0.name, $0.type.rawValue, $0.primarySite, $0.secondarySite, "\($0.replicationNetwork), \($0.recoveryNetworkName ?? $0.recoveryNetwork.rawValue)"] })
            }
        }
    }
}

import Appliance
import ArgumentParser

struct NetworkCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "network", abstract: "Networks of the sites: what agents send over, and what recovery machines are connected to.", subcommands: [Create.self, List.self, Delete.self])

    struct Create: ClientCommand {
        static let configuration = CommandConfiguration(
            abstract: "Create a network.",
            discussion: """
                A replication network may have an address: the appliance's in it. Agents of pairs and servers that use the network connect there (the appliance must listen \
                there: --link). A recovery network has a mode, as --network of a drill has it. Both networks of a site pair, and of a server, must be in the same zone.
                """)
        @OptionGroup var global: GlobalOptions
        @Argument(help: "Name of the network.") var name: String
        @Option(help: "The site that it is at.") var site: String
        @Option(help: "The zone that it is in.") var zone: String
        @Option(help: "replication or recovery.") var purpose: NetworkPurpose
        @Option(help: "Of a recovery network: isolated, user, bridge or none.") var mode: RecoveryNetwork?
        @Option(help: ArgumentHelp("With mode bridge: a bridge of the appliance's host that is there already.", valueName: "name")) var bridge: String?
        @Option(help: ArgumentHelp("With mode bridge: an own one with this network; the address is the host's in it.", valueName: "10.80.0.1/24")) var bridgeSubnet: IPv4Interface?
        @Flag(inversion: .prefixedNo, help: "Give out addresses of --bridge-subnet.") var dhcp = true
        @Option(help: ArgumentHelp("Of a replication network: the appliance's address in it.", valueName: "host")) var address: String?

        func validate() throws {
            guard bridge == nil || bridgeSubnet == nil else { throw ValidationError("--bridge is one that is there already, --bridge-subnet makes one: give one of them") }
        }

        func run(_ client: APIClient) async throws {
            let request = CreateNetwork(
                name: name, site: site, zone: zone, purpose: purpose, mode: mode,
                bridge: bridge.map { BridgeSettings(name: $0) } ?? bridgeSubnet.map { BridgeSettings(subnet: $0, dhcp: dhcp) }, address: address)
            let network: NetworkRecord = try await client.post("/v1/networks", request)
            try show(network) { ["\(network.purpose.rawValue) network \(network.name): site \(network.site), zone \(network.zone)"] }
        }
    }

    struct List: ClientCommand {
        static let configuration = CommandConfiguration(abstract: "List the networks.")
        @OptionGroup var global: GlobalOptions

        func run(_ client: APIClient) async throws {
            let networks: [NetworkRecord] = try await client.get("/v1/networks")
            try show(networks) {
                networks.isEmpty
                    ? ["no network has a name: site pairs use the built-in ones (afterimage network create)"]
                    : Terminal.table(
                        ["NAME", "SITE", "ZONE", "PURPOSE", "IS"],
                        networks.map { [$0.name, $0.site, $0.zone, $0.purpose.rawValue, NetworkCommand.words($0)] })
            }
        }
    }

    struct Delete: ClientCommand {
        static let configuration = CommandConfiguration(abstract: "Delete a network that nothing uses.")
        @OptionGroup var global: GlobalOptions
        @Argument(help: "Name of the network.") var name: String

        func run(_ client: APIClient) async throws {
            try await client.deleteNoContent("/v1/networks/\(APIClient.segment(name))")
            say("the network \(name) is deleted")
        }
    }

    static func words(_ network: NetworkRecord) -> String {
        switch network.purpose {
        case .replication: network.address.map { "agents connect to \($0)" } ?? "agents connect where they were enrolled"
        case .recovery:
            (network.mode?.rawValue ?? "-")
                + (network.bridge.map { $0.name.map { " \($0)" } ?? $0.subnet.map { " of its own, \($0)" } ?? "" } ?? "")
        }
    }
}

/// A kind of recovery network, or the name of one.
enum NetworkChoice: ExpressibleByArgument, Hashable {
    case mode(RecoveryNetwork)
    case named(String)

    init?(argument: String) {
        if let mode = RecoveryNetwork(rawValue: argument) { self = .mode(mode) } else if argument.wholeMatch(of: /[a-z0-9][a-z0-9-]{0,39}/) != nil { self = .named(argument) } else { return nil }
    }

    var mode: RecoveryNetwork? { if case .mode(let mode) = self { mode } else { nil } }
    var name: String? { if case .named(let name) = self { name } else { nil } }
}

extension NetworkPurpose: ExpressibleByArgument {}

import Foundation
import GRDB
import Replica
import Testing

@testable import Appliance
@testable import afterimage

@Suite("Networks")
struct NetworkTests {
    private func refused(_ words: String, _ body: () async throws -> Void) async {
        await #expect("\(words)") { try await body() } throws: { "\($0)".contains(words) }
    }

    @Test("a network has a site, a zone and a purpose; one that makes no sense, or is used, is refused")
    func networks() async throws {
        let bed = try LifecycleBed()
        let lifecycle = bed.lifecycle
        let line = try await lifecycle.createNetwork(.init(name: "line", site: "b", zone: "z1", purpose: .replication, address: "192.0.2.7"), who: "me")
        #expect(line.address == "192.0.2.7")
        let lab = try await lifecycle.createNetwork(.init(name: "lab", site: "b", zone: "z1", purpose: .recovery, mode: .user), who: "me")
        _ = try await lifecycle.createNetwork(.init(name: "far", site: "b", zone: "z2", purpose: .recovery, mode: .isolated), who: "me")
        _ = try await lifecycle.createNetwork(.init(name: "other", site: "c", zone: "z1", purpose: .recovery, mode: .isolated), who: "me")
        for (request, words) in [
            (CreateNetwork(name: "line", site: "b", zone: "z1", purpose: .replication), "There is a network line already"), (.init(name: "user", site: "b", zone: "z", purpose: .recovery, mode: .user), "meaning of its own"),
            (.init(name: "n", site: "b", zone: "z", purpose: .recovery), "say what the recovery network n is"), (.init(name: "n", site: "b", zone: "z", purpose: .replication, mode: .user), "are of recovery networks"),
            (.init(name: "n", site: "b", zone: "z", purpose: .recovery, mode: .bridge), "which bridge"), (.init(name: "n", site: "b", zone: "z", purpose: .recovery, mode: .user, address: "h"), "agents connect"),
            (.init(name: "n", site: "b", zone: "Zone 1", purpose: .recovery, mode: .user), "cannot be the name of a zone"), (.init(name: "n", site: "b", zone: "z", purpose: .replication, address: "a b"), "neither a host's name"),
        ] {
            await refused(words) { _ = try await lifecycle.createNetwork(request, who: "me") }
        }
        // A pair's networks are in one zone, and at its sites.
        func pair(_ replication: String?, _ recovery: String?) -> CreateSitePair {
            CreateSitePair(name: "pair", type: .datacenterToZone, primarySite: "a", secondarySite: "b", replicationNetwork: replication, recoveryNetworkName: recovery)
        }
        await refused("both networks must be in the same zone") { _ = try await lifecycle.createSitePair(pair("line", "far"), who: "me") }
        await refused("recovery machines run at b") { _ = try await lifecycle.createSitePair(pair("line", "other"), who: "me") }
        await refused("not a replication network") { _ = try await lifecycle.createSitePair(pair("lab", "lab"), who: "me") }
        await refused("There is no network none-such") { _ = try await lifecycle.createSitePair(pair("none-such", nil), who: "me") }
        let made = try await lifecycle.createSitePair(pair("line", "lab"), who: "me")
        #expect(made.recoveryNetworkName == "lab" && made.recoveryNetwork == .user)
        await refused("site pair pair uses the network lab") { try await lifecycle.deleteNetwork(lab.name, who: "me") }
        try await lifecycle.deleteNetwork("far", who: "me")
        #expect(try await lifecycle.networks().map(\.name) == ["lab", "line", "other"])
        try await bed.end()
    }

    @Test("a machine gets the network that was asked for, else its server's, else the pair's")
    func machines() async throws {
        let bed = try LifecycleBed()
        let lifecycle = bed.lifecycle
        for (name, mode) in [("pairs", RecoveryNetwork.user), ("servers", .none), ("asked", .isolated)] {
            _ = try await lifecycle.createNetwork(.init(name: name, site: "b", zone: "z1", purpose: .recovery, mode: mode), who: "me")
        }
        _ = try await lifecycle.createNetwork(.init(name: "line", site: "a", zone: "z1", purpose: .replication), who: "me")
        _ = try await lifecycle.createSitePair(.init(name: "pair", type: .zoneToZone, primarySite: "a", secondarySite: "b", recoveryNetworkName: "pairs"), who: "me")
        _ = try await lifecycle.addServers(.init(sitePair: "pair", names: ["web"]), who: "me")
        func machine(_ request: StartMachine = StartMachine()) async throws -> MachineSettings { try await lifecycle.machineSettings(try await lifecycle.server("web"), request) }
        var now = try await machine()
        #expect(now.network == .user && now.networkName == "pairs")
        try await bed.catalogue.write { db in
            var record = try db.server("web")
            record.settings = ReplicationSettings(
                disks: ["vda"], epochMilliseconds: 500, throttleBytesPerSecond: 7, automaticRestart: false, cpus: 3, memoryMiB: 300, recoveryNetwork: "servers")
            try record.update(db)
        }
        now = try await machine()
        #expect(now.network == .none && now.networkName == "servers")
        var request = StartMachine()
        request.networkName = "asked"
        now = try await machine(request)
        #expect(now.network == .isolated && now.networkName == "asked")
        request.networkName = "line"
        await refused("line is a replication network") { _ = try await machine(request) }
        request.networkName = "asked"
        request.network = .user
        await refused("not both") { _ = try await machine(request) }
        request.networkName = nil
        now = try await machine(request)
        #expect(now.network == .user && now.networkName == nil)
        await refused("uses the network servers") { try await lifecycle.deleteNetwork("servers", who: "me") }
        try await bed.end()
    }

    @Test("how a server sends is set while it replicates, is checked, and is in the audit log; a pair's type has defaults")
    func transfer() async throws {
        #expect(SitePairType.zoneToZone.compression == .auto && SitePairType.regionToRegion.compression == .always && SitePairType.datacenterToZone.throttleBytesPerSecond == 32 << 20)
        let bed = try LifecycleBed()
        let lifecycle = bed.lifecycle
        let settings = ReplicationSettings(disks: ["vda"], epochMilliseconds: 500, throttleBytesPerSecond: 7, automaticRestart: false, cpus: 3, memoryMiB: 300)
        try await bed.catalogue.write { db in
            try Fixture.server(db, "web", state: .replicating, settings: settings)
            try Fixture.server(db, "new", state: .initialized)
        }
        var request = SetReplication()
        request.compression = .always
        request.throttleWindows = [ThrottleWindow(startMinute: 480, endMinute: 1080, days: [1, 2], bytesPerSecond: 5 << 20)]
        await refused("was never started") { _ = try await lifecycle.setReplication("new", request, who: "me") }
        let view = try await lifecycle.setReplication("web", request, who: "me")
        #expect(view.settings?.transferText == "an epoch every 500 ms, at most 7 B/s (mon,tue@08:00-18:00: at most 5.0 MiB/s), compression always")
        let event = try #require(try await lifecycle.events(server: "web", limit: 1).first)
        #expect(event.what == "Set replication" && event.before?.hasSuffix("compression auto") == true && event.after == view.settings?.transferText)
        request.throttleWindows = [ThrottleWindow(startMinute: 5, endMinute: 5, bytesPerSecond: 0)]
        await refused("a throttle window begins") { _ = try await lifecycle.setReplication("web", request, who: "me") }
        request.throttleWindows = []
        request.epochMilliseconds = 1
        await refused("20 to 3600000") { _ = try await lifecycle.setReplication("web", request, who: "me") }
        request.epochMilliseconds = nil
        #expect(try await lifecycle.setReplication("web", request, who: "me").settings?.throttleWindows == [])
        try await bed.end()
    }

    @Test("a window is read as it is written", arguments: [
        ("08:00-18:00=5MiB", 480, 1080, nil, 5 << 20), ("mon-fri@22:00-06:00=0", 1320, 360, [1, 2, 3, 4, 5], 0), ("sat-mon,wed@00:00-24:00=1KiB", 0, 1440, [6, 7, 1, 3], 1024),
    ] as [(String, Int, Int, [Int]?, UInt64)])
    func windows(text: String, start: Int, end: Int, days: [Int]?, rate: UInt64) throws {
        #expect(WindowArgument(argument: text)?.window == ThrottleWindow(startMinute: start, endMinute: end, days: days, bytesPerSecond: rate))
    }

    @Test("what is no window is refused", arguments: ["", "8:00-18:00=5MiB", "08:00-18:00", "08:60-18:00=1", "25:00-18:00=1", "08:00-08:00=1", "day@08:00-18:00=1", "mon-tue-wed@08:00-18:00=1", "@08:00-18:00=1", "08:00-18:00=fast"])
    func noWindows(text: String) { #expect(WindowArgument(argument: text) == nil) }

    @Test("every command of networks and settings parses", arguments: [
        "network create n --site a --zone z --purpose replication --address 192.0.2.1", "network create n --site a --zone z --purpose recovery --mode bridge --bridge-subnet 10.80.0.1/24 --no-dhcp", "network list --json",
        "network delete n", "site-pair create p --replication-network r --recovery-network lab", "drill start a --network lab", "replication set a --throttle 20MiB --throttle-window mon-fri@08:00-18:00=5MiB --compression auto",
        "replication set a --no-throttle-windows", "replication start a --replication-network r --recovery-network lab --throttle-window 08:00-18:00=5MiB --compression off",
    ])
    func parses(words: String) throws { _ = try Afterimage.parseAsRoot(words.split(separator: " ").map(String.init)) }

    @Test("wrong usage is exit code 64", arguments: [
        "replication set a", "replication set a --throttle-window now", "replication start a --throttle-window 08:00-18:00=1 --no-throttle-windows", "network create n --site a --zone z", "network create n --zone z --purpose recovery",
        "replication start a --compression some",
    ])
    func refuses(words: String) throws {
        let error = #expect(throws: (any Error).self) { _ = try Afterimage.parseAsRoot(words.split(separator: " ").map(String.init)) }
        #expect(Afterimage.exitCode(for: try #require(error)).rawValue == 64)
    }
}

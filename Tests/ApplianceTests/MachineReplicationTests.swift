import BlockTap
import Foundation
import Logging
import Replica
import Synchronization
import Testing

@testable import Appliance

/// A machine as another appliance's source: what its orders mean here, with the appliance played.
@Suite struct MachineReplicationTests {
    private final class Keeper: MachineKeeper {
        struct State {
            var said: [String] = []
            var stops = true
            var isFollowed = true
            var generation: UInt64 = 0
        }
        let state = Mutex(State())
        var said: [String] { state.withLock { $0.said } }
        private func say(_ line: String) { state.withLock { $0.said.append(line) } }

        func otherAsks(_ server: String, _ status: AgentStatus) async {}
        func holdMachine(_ server: String, _ hold: String) async -> String? {
            say("hold \(hold)")
            return state.withLock { $0.stops } ? nil : "it does not shut down"
        }
        func releaseMachine(_ server: String, _ hold: String, why: String) async { say("release \(hold)") }
        func machineFenced(_ server: String, _ generation: Generation, hold: String?) async -> MachineFence {
            if generation.rawValue <= state.withLock({ $0.generation }) { return .notYet }
            say("fenced \(generation.rawValue) \(hold ?? "-")")
            return hold == nil ? .stopped : .handedOver
        }
        func machineIsFollowed(_ server: String, _ generation: Generation) async -> Bool {
            state.withLock {
                $0.generation = generation.rawValue
                return $0.isFollowed
            }
        }
        func otherWantsAnew(_ server: String) async { say("anew") }
    }

    private let keeper = Keeper()

    private func replication(isPermitted: Bool = true, endedHold: String? = nil) -> MachineReplication {
        MachineReplication(
            server: "web-1", source: nil, endpoint: LinkEndpoint(host: "127.0.0.1", port: 1, identity: TLSIdentity(certificatePEM: "", keyPEM: ""), caCertificatePEM: ""),
            base: ReplicationBase(), isPermitted: isPermitted, hold: nil, endedHold: endedHold, fence: nil, configurationFile: "/nowhere/configuration.json", keeper: keeper,
            logger: Logger(label: "test") { _ in SwiftLogNoOpLogHandler() })
    }

    private func until(_ body: () async -> Bool) async throws {
        for _ in 0..<5000 where !(await body()) { try await Task.sleep(for: .milliseconds(2)) }
        #expect(await body())
    }

    @Test("a fence while the machine is held hands it over, and is confirmed from then on")
    func handedOver() async throws {
        let replication = replication()
        await replication.carryOut(.holdWrites(HoldOrder(id: "h1", seconds: 3600)))
        try await until { await replication.snapshot().hold?.isQuiet == true }
        await replication.carryOut(.fenced(Generation(7)))
        #expect(await replication.status().hold == WriteHold(id: "h1", isQuiet: true, isFinal: true))
        keeper.state.withLock { $0.isFollowed = false }
        await replication.carryOut(.startReplication(ReplicationOrder(group: GroupID("m-1"), generation: Generation(8), disks: ["vda"])))
        #expect(await replication.status().hold?.isFinal == true, "it never goes back")
        #expect(keeper.said == ["hold h1", "fenced 7 h1"])
        await replication.end()
    }

    @Test("a failover over there that has fenced nothing yet ends no hold, and hands nothing over")
    func notYet() async throws {
        let replication = replication()
        await replication.carryOut(.startReplication(ReplicationOrder(group: GroupID("m-1"), generation: Generation(7), disks: ["vda"])))
        await replication.carryOut(.holdWrites(HoldOrder(id: "h1", seconds: 3600)))
        try await until { await replication.snapshot().hold?.isQuiet == true }
        await replication.carryOut(.fenced(Generation(7)))
        #expect(await replication.status().hold == WriteHold(id: "h1", isQuiet: true))
        await replication.carryOut(.fenced(Generation(8)))
        #expect(await replication.status().hold?.isFinal == true)
        #expect(keeper.said == ["hold h1", "fenced 8 h1"])
        await replication.end()
    }

    @Test("a hold that is not repeated ends, and never begins again")
    func runsOut() async throws {
        let replication = replication(endedHold: "h0")
        await replication.carryOut(.holdWrites(HoldOrder(id: "h0", seconds: 3600)))
        await replication.carryOut(.holdWrites(HoldOrder(id: "h1", seconds: 0.2)))
        try await until { keeper.said.contains("release h1") }
        #expect(await replication.status().hold == nil)
        // Whoever asked may not have seen that it began.
        #expect(await replication.status().endedHold == "h1")
        await replication.carryOut(.holdWrites(HoldOrder(id: "h1", seconds: 3600)))
        await replication.carryOut(.fenced(Generation(7)))
        #expect(await replication.status().hold == nil, "nothing is confirmed")
        #expect(keeper.said == ["hold h1", "release h1", "fenced 7 -"])
        await replication.end()
    }

    @Test("a guest that does not shut down is not held")
    func goesOn() async throws {
        keeper.state.withLock { $0.stops = false }
        let replication = replication()
        await replication.carryOut(.holdWrites(HoldOrder(id: "h1", seconds: 3600)))
        try await until { await replication.snapshot().hold == nil }
        #expect(keeper.said == ["hold h1"])
        await replication.end()
    }

    @Test("an order to replicate, or to stop it, ends a hold", arguments: [true, false])
    func replicationGoesOn(isStart: Bool) async throws {
        let replication = replication()
        await replication.carryOut(.holdWrites(HoldOrder(id: "h1", seconds: 3600)))
        try await until { await replication.snapshot().hold?.isQuiet == true }
        await replication.carryOut(isStart ? .startReplication(ReplicationOrder(group: GroupID("m-1"), generation: Generation(8), disks: ["vda"])) : .stopReplication)
        #expect(await replication.status().hold == nil)
        #expect(keeper.said == ["hold h1", "release h1"])
        await replication.end()
    }

    @Test("nothing is sent or held before it is permitted, and the other appliance reads why")
    func notPermitted() async throws {
        let replication = replication(isPermitted: false)
        await replication.carryOut(.startReplication(ReplicationOrder(group: GroupID("m-1"), generation: Generation(8), disks: ["vda"])))
        await replication.carryOut(.holdWrites(HoldOrder(id: "h1", seconds: 3600)))
        let status = await replication.status()
        #expect(status.phase == .interrupted && status.reason?.contains("not initiated") == true && status.hold == nil)
        #expect(keeper.said.isEmpty)
        await replication.end()
    }

    @Test("the machine is the specification of its machine over there")
    func specification() throws {
        var settings = MachineSettings(cpus: 3, memoryMiB: 96, network: .isolated, forwards: [], bootCheck: .running, bootSecondsMax: 1)
        settings.firmware = .uefi
        settings.cards = ["02:00:00:00:00:01", "02:00:00:00:00:02"]
        settings.address = MachineAddress(interface: try #require(IPv4Interface("10.80.0.20/24")), gateway: IPv4Interface.address("10.80.0.1"), isKept: false, card: 1)
        let source = HostSpecification(
            cpus: 8, memoryMiB: 4096, firmware: .bios, kernel: "6.1", networkCards: [.init(name: "eth0", mac: "02:00:00:00:00:01", addresses: ["192.0.2.1/24"])], warnings: ["w"],
            missingDrivers: ["virtio_blk"])
        let made = Lifecycle.specification(of: settings, source: source)
        #expect(made.cpus == 3 && made.memoryMiB == 96 && made.firmware == .uefi && made.kernel == "6.1" && made.missingDrivers == ["virtio_blk"] && made.warnings.isEmpty)
        #expect(made.networkCards.map(\.addresses) == [["192.0.2.1/24"], ["10.80.0.20/24"]] && made.networkCards[1].gateway == "10.80.0.1")
        settings.network = .none
        #expect(Lifecycle.specification(of: settings, source: source).networkCards.isEmpty)
    }
}

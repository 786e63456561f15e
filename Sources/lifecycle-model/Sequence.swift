import Appliance
import Foundation
import Glibc

/// One seed: servers are protected, several operators ask for anything at once, processes are killed at random; then everything is healed and must come to
/// an end, and what the appliance has written down is judged.
struct RandomSequence: Sendable {
    var seed: UInt64
    var program: String
    var qemu: String
    var directory: String
    var operationCount: Int

    struct Outcome: Sendable {
        var violations: [String]
        var counts: [String: Int]
        var failures: [String: Int]
        var places: Set<Place>
    }

    func run() async throws -> Outcome {
        var random = SplitMix(seed: seed)
        let ledger = Ledger()
        let sites = try Sites(directory: directory, program: program, qemu: qemu, serverCount: 2 + random.below(2), random: &random)
        var places: Set<Place> = []
        do { places = try await play(sites, ledger, &random) } catch { await ledger.violate("\(error)") }
        await sites.end()
        return Outcome(violations: await ledger.violations, counts: await ledger.counts, failures: await ledger.failures, places: places)
    }

    private func play(_ sites: Sites, _ ledger: Ledger, _ random: inout SplitMix) async throws -> Set<Place> {
        try await sites.startAppliance()
        let profile = try ClientProfile.load(path: sites.profilePath)
        let drawn = random
        let (seen, advanced) = try await APIClient.with(profile) { client in
            var random = drawn
            let asks = Operator(client: client, ledger: ledger, sites: sites)
            try await protect(asks)
            let watch = Watch(asks)
            let watching = Task { try await watch.run() }
            defer { watching.cancel() }
            try await disturb(asks, &random)
            let ending = Ending(asks: asks)
            try await ending.heal()
            try await ending.clear()
            await watch.end()
            var seen = try await ending.judge()
            let shown = await watch.places
            for place in shown.subtracting(seen) { await ledger.violate("a server was shown in \(place), of which the audit log has nothing") }
            seen.formUnion(shown)
            return (seen, random)
        }
        random = advanced
        try await Ending.judgeStore(sites, ledger)
        return seen
    }

    private func protect(_ asks: Operator) async throws {
        let sites = asks.sites
        for server in sites.servers { try await sites.startAgent(server) }
        try await asks.client.postNoContent("/v1/site-pairs", JSON.object(["name": "pair", "type": "zone-to-zone", "primarySite": "a", "secondarySite": "b", "recoveryNetwork": "none"]))
        let tokens: [EnrolmentAnswer] = try await asks.client.post("/v1/servers", JSON.object(["sitePair": "pair", "names": .array(sites.servers.map { .string($0) })]))
        try await withThrowingTaskGroup(of: Void.self) { group in
            for token in tokens {
                group.addTask {
                    try await sites.enrol(token.server, token: token.token)
                    try await until("\(token.server) is Initialized") { await asks.server(token.server)?.state == "Initialized" }
                    var random = SplitMix(seed: 0)
                    let order = Order.make(.start, token.server, points: [], tasks: [], copies: "", &random)
                    guard case .accepted = await asks.ask(.start, of: token.server, order) else { throw Trouble("replication of \(token.server) is not started") }
                    try await until("\(token.server) is Replicating") { await asks.server(token.server)?.state == "Replicating" }
                }
            }
            try await group.waitForAll()
        }
    }

    /// Several operators at once, and somebody who kills.
    private func disturb(_ asks: Operator, _ random: inout SplitMix) async throws {
        let operatorCount = 2 + random.below(3), each = operationCount / operatorCount
        let seeds = (0...operatorCount).map { _ in random.next() }
        let killing = Task { try await kill(asks, seed: seeds[operatorCount]) }
        var trouble: (any Error)?
        do {
            try await withThrowingTaskGroup(of: Void.self) { group in
                for index in 0..<operatorCount {
                    group.addTask {
                        var person = RandomOperator(asks: asks, random: SplitMix(seed: seeds[index]))
                        try await person.work(each)
                    }
                }
                try await group.waitForAll()
            }
        } catch { trouble = error }
        killing.cancel()
        do { try await killing.value } catch is CancellationError {}
        if let trouble { throw trouble }
    }

    private func kill(_ asks: Operator, seed: UInt64) async throws {
        var random = SplitMix(seed: seed)
        let sites = asks.sites
        while true {
            try await Task.sleep(for: .milliseconds(150 + random.below(1200)))
            let server = random.pick(sites.servers)
            await asks.ledger.count("kills")
            switch random.below(10) {
            case 0..<5: try await Self.reliably { try await sites.endAppliance(SIGKILL); try await sites.startAppliance() }
            case 5:
                try await Self.reliably {
                    let status = try await sites.endAppliance(SIGTERM)
                    if let status, status != 0 { throw Trouble("the appliance ended with status \(status) after SIGTERM") }
                    try await sites.startAppliance()
                }
            case 6, 7: try await Self.reliably { try await sites.endAgent(server, SIGKILL); try await sites.startAgent(server) }
            case 8:
                try await Self.reliably {
                    try await sites.endAgent(server, SIGKILL)
                    try await sites.endAppliance(SIGKILL)
                    try await sites.startAppliance()
                    try await sites.startAgent(server)
                }
            default:
                let machines = Machine.all(below: sites.runtime)
                if !machines.isEmpty { Glibc.kill(random.pick(machines).pid, SIGKILL) }
            }
        }
    }

    /// To its end, also when the killing is over meanwhile: nobody may stay dead.
    private static func reliably(_ body: @escaping @Sendable () async throws -> Void) async throws { try await Task.detached { try await body() }.value }
}

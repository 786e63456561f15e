import Foundation

/// Looks at the servers and at the machines' processes all the time.
actor Watch {
    private let asks: Operator
    /// Of each machine that was ever shown: whose it is, and what it is for.
    private var owners: [String: String] = [:]
    private(set) var places: Set<Place> = []
    private var isOver = false

    init(_ asks: Operator) { self.asks = asks }

    func run() async throws {
        while !isOver {
            if let servers: [ServerAnswer] = try? await asks.client.get("/v1/servers") { await look(at: servers) }
            await lookAtMachines()
            try await Task.sleep(for: .milliseconds(250))
        }
    }

    func end() { isOver = true }

    private func look(at servers: [ServerAnswer]) async {
        for server in servers {
            places.insert(server.place)
            if !server.place.isReachable { await asks.ledger.violate("\(server.name) is in \(server.place), which is outside of the model") }
            for instance in server.instances { owners[instance.id] = "\(server.id), \(instance.kind)" }
            if Set(server.instances.map(\.id)).count < server.instances.count { await asks.ledger.violate("\(server.name) has one machine twice") }
            if server.instances.filter({ $0.kind == "drill" && $0.step != "removing" }).count > 1 { await asks.ledger.violate("\(server.name) has several drills") }
            if server.instances.filter({ $0.kind == "failover" && ["starting", "ready", "unproven", "stopped"].contains($0.step) }).count > 1 {
                // The one that is replaced stays until it is taken down, and is then removing; the new one is planned until then.
                await asks.ledger.violate("\(server.name) has several failed-over machines: \(server.instances.map { "\($0.id) \($0.step)" })")
            }
        }
    }

    /// Never two machines on one fork; never two of one server that are to be the same machine.
    private func lookAtMachines() async {
        let machines = Machine.all(below: asks.sites.runtime)
        for (what, group) in [("fork", Dictionary(grouping: machines, by: \.instance)), ("server", Dictionary(grouping: machines.filter { owners[$0.instance] != nil }, by: { owners[$0.instance]! }))] {
            for (name, several) in group where several.count > 1 {
                // /proc is not read at one instant: one may have ended before the other began.
                let alive = several.filter(\.isAlive)
                if alive.count > 1 { await asks.ledger.violate("two machines run on one \(what), \(name): \(alive.map { "\($0.instance) pid \($0.pid)" })") }
            }
        }
    }
}

import BlockTap
import Synchronization
import Testing

@testable import Replica

@Suite(.timeLimit(.minutes(10))) struct LinkControlTests {
    private func client(
        _ appliance: TestAppliance, commands: @escaping @Sendable (AgentCommand) async -> Void = { _ in }
    ) throws -> AgentControlClient {
        AgentControlClient(
            endpoint: try appliance.endpoint(),
            hello: { AgentHello(agentVersion: "1.0", hostName: "web", kernel: "6.1", instance: "i", disks: []) },
            status: {
                var status = AgentStatus()
                status.phase = .replicating
                status.sentBytes = 42
                return status
            },
            onCommand: commands, logger: appliance.log.logger, timing: appliance.timing)
    }

    @Test func commandsArriveInOrderAndStatusesAreReported() async throws {
        let appliance = try TestAppliance()
        let order = ReplicationOrder(group: TestAppliance.group, generation: Generation(1), disks: ["vda"])
        appliance.policy.withLock { $0.commands = [.startReplication(order), .cutNow(.fileSystem)] }
        try await appliance.start()
        let received = Mutex<[AgentCommand]>([])
        let client = try client(appliance) { command in received.withLock { $0.append(command) } }
        client.start()
        try await eventually("two commands") { received.withLock { $0.count } == 2 }
        try await appliance.server.send(.fenced(Generation(2)), to: ServerID("web-1"))
        try await appliance.server.send(.stopReplication, to: ServerID("web-1"))
        try await eventually("four commands") { received.withLock { $0.count } == 4 }
        #expect(received.withLock { $0 } == [.startReplication(order), .cutNow(.fileSystem), .fenced(Generation(2)), .stopReplication])
        try await eventually("a status") { appliance.policy.withLock { $0.statuses.first?.sentBytes } == 42 }
        #expect(appliance.policy.withLock { $0.hellos.first?.hostName } == "web")
        await client.stop()
        try await eventually("the delegate hears of the end") { appliance.policy.withLock { $0.disconnects } == 1 }
        await #expect(throws: LinkError.notConnected(ServerID("web-1"))) {
            try await appliance.server.send(.cutNow(.crash), to: ServerID("web-1"))
        }
        await appliance.stop()
    }

    /// What the answer to a hello says may be older than what is sent while it is made: an order that came first and was taken back by it would be lost.
    @Test func whatIsSentWhileAHelloIsAnsweredComesAfterTheAnswer() async throws {
        let appliance = try TestAppliance()
        let order = ReplicationOrder(group: TestAppliance.group, generation: Generation(1), disks: ["vda"])
        appliance.policy.withLock {
            $0.commands = [.stopReplication]
            $0.beforeAnswer = { try? await appliance.server.send(.startReplication(order), to: ServerID("web-1")) }
        }
        try await appliance.start()
        let received = Mutex<[AgentCommand]>([])
        let client = try client(appliance) { command in received.withLock { $0.append(command) } }
        client.start()
        try await eventually("two commands") { received.withLock { $0.count } == 2 }
        #expect(received.withLock { $0 } == [.stopReplication, .startReplication(order)])
        try await appliance.server.send(.cutNow(.crash), to: ServerID("web-1"))
        try await eventually("three commands") { received.withLock { $0.last } == .cutNow(.crash) }
        // It holds the appliance, which holds it.
        appliance.policy.withLock { $0.beforeAnswer = nil }
        await client.stop()
        await appliance.stop()
    }

    @Test func controlStreamComesBackAfterARestartOfTheAppliance() async throws {
        let appliance = try TestAppliance()
        try await appliance.start()
        let client = try client(appliance)
        client.start()
        for round in 1...3 {
            try await eventually("hello \(round)") { appliance.policy.withLock { $0.hellos.count } == round }
            await appliance.server.stop()
            try await eventually("end \(round)") { appliance.policy.withLock { $0.disconnects } == round }
            try await appliance.start()
        }
        await client.stop()
        await appliance.stop()
    }

    @Test func newerControlStreamTakesOverWithoutADisconnect() async throws {
        let appliance = try TestAppliance()
        try await appliance.start()
        let first = try client(appliance)
        first.start()
        try await eventually("first") { appliance.policy.withLock { $0.hellos.count } == 1 }
        let second = try client(appliance)
        second.start()
        try await eventually("second") { appliance.policy.withLock { $0.hellos.count } >= 2 }
        await first.stop()
        await second.stop()
        try await eventually("end") { appliance.policy.withLock { $0.disconnects } >= 1 }
        await appliance.stop()
    }
}

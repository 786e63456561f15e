import BlockTap
import NIOCore
import Testing

@testable import Replica

@Suite struct LinkReplicationTests {
    @Test func fullSyncAndEpochsMakeExactRecoveryPoints() async throws {
        let appliance = try TestAppliance()
        try await appliance.start()
        // The second disk ends in the middle of a block.
        let source = ModelSource(sizes: [4 << 20, (2 << 20) + 1536], seed: 1)
        source.writeRandomly(count: 400)
        let sender = try appliance.sender(source)
        sender.start()
        for round in 1...10 {
            await source.untilAcknowledged(exact: round * 3)
            source.writeRandomly(count: 50)
        }
        try await eventually("phase replicating") { sender.status.phase == .replicating }
        await sender.stop()
        #expect(sender.status.phase == .idle)
        #expect(try appliance.checkRecoveryPoints(source) >= 30)
        #expect(source.fullSyncCount == 1)
        #expect(source.heldBuffersMax <= 1)
        await appliance.stop()
    }
}

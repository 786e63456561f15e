import BlockTap
import Testing

@testable import Replica

/// What a source hears when a fork takes the place of its group.
@Suite(.timeLimit(.minutes(5))) struct ForkLinkTests {
    @Test func theOldSourceIsFencedAndTheNewOneBeginsWithAFullSyncOverTheForksData() async throws {
        let appliance = try TestAppliance()
        try await appliance.start()
        let old = ModelSource(sizes: [1 << 20, 512 << 10], seed: 3)
        old.writeRandomly(count: 100)
        let first = try appliance.sender(old)
        first.start()
        await old.untilAcknowledged(exact: 3)
        let id = ForkID("failover")
        try appliance.store.fork(id, of: TestAppliance.group, at: appliance.store.recoveryPoints(TestAppliance.group).last!.id, purpose: "failover")
        let volume = try appliance.store.openFork(id, volume: 0)
        try [UInt8](repeating: 9, count: 256 << 10).withUnsafeBytes { try volume.write(offsetBytes: 128 << 10, $0) }
        try appliance.store.commitFork(id)
        try await eventually("phase fenced") { first.status.phase == .fenced }
        await first.stop()
        #expect(appliance.store.recoveryPoints(TestAppliance.group).isEmpty)

        // Zero where the fork is not: every block of the full sync counts, the zero ones too.
        let new = ModelSource(sizes: [1 << 20, 512 << 10], seed: 4)
        new.writeRandomly(count: 20)
        let second = try appliance.sender(new, generation: Generation(2))
        second.start()
        await new.untilAcknowledged(exact: 3)
        await second.stop()
        #expect(new.fullSyncCount == 1)
        #expect(try appliance.checkRecoveryPoints(new) >= 3)
        #expect(try volume.image()[(128 << 10)] == 9)
        try volume.close()
        await appliance.stop()
    }
}

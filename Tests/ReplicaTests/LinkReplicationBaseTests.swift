import BlockTap
import Testing

@testable import Replica

/// Whether a replica can be brought up to date from the bitmaps: a wrong yes would be a wrong recovery point.
@Suite struct LinkReplicationBaseTests {
    private let group = GroupID("web-1")
    private let base = ReplicationBase()

    private func cut(_ epoch: UInt64, _ kind: EpochKind = .exact) -> Cut {
        Cut(epoch: EpochNumber(epoch), kind: kind, timeNanoseconds: epoch, blockCount: 0)
    }

    private func canContinue(_ epoch: UInt64, instance: String = "a", at: String = "a", group: GroupID? = nil) -> Bool {
        base.canContinue(
            group: group ?? self.group, instance: instance,
            position: Welcome.Position(instance: at, epoch: EpochNumber(epoch), kind: .exact))
    }

    @Test func nothingIsKnownAtFirst() {
        #expect(!canContinue(1))
        #expect(!base.canContinue(group: group, instance: "a", position: nil))
    }

    @Test func onlyWhatTheBitmapsAreRelativeTo() {
        base.beginFullSync(group: group, instance: "a")
        for epoch in 1...3 { base.wasCut(cut(UInt64(epoch), .fuzzy)) }
        // An acknowledgement may have been lost: what was cut after the full sync began may be durable.
        #expect(canContinue(1))
        base.wasAcknowledged(cut(2, .fuzzy))
        #expect(!canContinue(1), "the replica lost an epoch that was acknowledged")
        #expect(canContinue(2))
        #expect(canContinue(3))
        #expect(!canContinue(4), "an epoch that was never cut here")
        #expect(!canContinue(2, group: GroupID("other")))
        #expect(!canContinue(2, at: "b"))
        #expect(!canContinue(2, instance: "b", at: "b"), "the bitmaps began anew")
        #expect(!base.canContinue(group: group, instance: "a", position: nil), "the replica is gone")
    }

    @Test func aNewFullSyncForgetsWhatWasBefore() {
        base.beginFullSync(group: group, instance: "a")
        base.wasCut(cut(1))
        base.wasAcknowledged(cut(1))
        base.beginFullSync(group: GroupID("other"), instance: "a")
        base.wasCut(cut(2, .fuzzy))
        #expect(!canContinue(1))
        #expect(!canContinue(1, group: GroupID("other")))
        #expect(canContinue(2, group: GroupID("other")))
        #expect(base.read { $0.lastRecoveryPointNanoseconds } == 0)
    }
}

import BlockTap
import Synchronization

/// What the bitmaps of one source are relative to: which group's replica, and from which epoch on.
///
/// A source's bitmaps say what changed since the last *acknowledged* epoch, of whatever group that was. So a replica may go on
/// with them only if it is that group's, was made under the same instance, and holds at least that epoch; anything
/// else starts with a full sync. Keep one per source for as long as the source lives and give it to every `Sender` on it.
public final class ReplicationBase: Sendable {
    struct Known {
        var group: GroupID
        var instance: String
        /// The replica must hold this epoch or a later one.
        var floor: EpochNumber
        /// Until the first exact epoch after it is acknowledged.
        var isFullSyncing: Bool
    }

    struct State {
        var known: Known?
        /// The newest cut of this source.
        var lastCut: EpochNumber = .none
        var sentBytes: UInt64 = 0
        var lastAcknowledged: EpochNumber = .none
        var lastRecoveryPointNanoseconds: UInt64 = 0
        /// Of the full sync that runs, or of the last one.
        var resyncComparedBytes: UInt64 = 0
        var resyncEqualBytes: UInt64 = 0
        var unprovenEpochs: UInt64 = 0
        /// Oldest first.
        var proofs: [PointProof] = []
    }

    static let proofsMax = 64

    private let state = Mutex(State())

    public init() {}

    /// Of a source that outlived the process which had it before. `group`: whose replica that process's epochs went to, written down before
    /// the first of them could be acknowledged.
    public init(resuming group: GroupID, instance: String, from resumption: SourceResumption) {
        state.withLock { state in
            state.known = Known(group: group, instance: instance, floor: resumption.acknowledged, isFullSyncing: false)
            state.lastCut = resumption.lastCut
            state.lastAcknowledged = resumption.acknowledged
        }
    }

    func read<T>(_ body: (inout State) -> T) -> T where T: Sendable {
        state.withLock { body(&$0) }
    }

    /// Whether the replica that answered HELLO with `position` can be brought up to date from the bitmaps.
    func canContinue(group: GroupID, instance: String, position: Welcome.Position?) -> Bool {
        state.withLock { state in
            guard let known = state.known, let position else { return false }
            return known.group == group && known.instance == instance && position.instance == instance
                && position.epoch >= known.floor && position.epoch <= state.lastCut
        }
    }

    /// A full sync begins: from now on only epochs cut after this moment count.
    func beginFullSync(group: GroupID, instance: String) {
        state.withLock { state in
            if state.known?.group != group {
                state.lastAcknowledged = .none
                state.lastRecoveryPointNanoseconds = 0
                state.proofs = []
            }
            state.resyncComparedBytes = 0
            state.resyncEqualBytes = 0
            state.known = Known(group: group, instance: instance, floor: state.lastCut.next, isFullSyncing: true)
        }
    }

    /// A part of a full sync was cut, or is about to be. The first one of a full sync that the source began by itself tells of it.
    func fullSyncGoesOn() {
        state.withLock { state in
            guard state.known?.isFullSyncing == false else { return }
            state.known?.isFullSyncing = true
            state.resyncComparedBytes = 0
            state.resyncEqualBytes = 0
        }
    }

    func compared(_ byteCount: UInt64, equalBytes: UInt64) {
        state.withLock { state in
            state.resyncComparedBytes &+= byteCount
            state.resyncEqualBytes &+= equalBytes
        }
    }

    /// The epoch that the replica of `group` holds whole, and that the bitmaps are relative to; nil while that is not so.
    public func acknowledged(of group: GroupID) -> EpochNumber? {
        state.withLock { state in
            guard let known = state.known, known.group == group, !known.isFullSyncing, known.floor == state.lastAcknowledged else { return nil }
            return known.floor
        }
    }

    /// Somebody has written to the disks past their source: what its bitmaps say is not all. The next replication compares everything.
    public func forget() { state.withLock { $0.known = nil } }

    func wasCut(_ cut: Cut) { state.withLock { $0.lastCut = max($0.lastCut, cut.epoch) } }

    func wasAcknowledged(_ cut: Cut) {
        state.withLock { state in
            state.known?.floor = cut.epoch
            state.lastAcknowledged = cut.epoch
            if cut.kind == .exact {
                state.known?.isFullSyncing = false
                state.lastRecoveryPointNanoseconds = cut.timeNanoseconds
                if let proof = cut.proof, let instance = state.known?.instance {
                    state.proofs.append(PointProof(epoch: cut.epoch, instance: instance, proof: proof))
                    if state.proofs.count > Self.proofsMax { state.proofs.removeFirst() }
                }
            }
        }
    }
}

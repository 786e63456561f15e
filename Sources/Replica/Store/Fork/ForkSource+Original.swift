import BlockTap
import Logging
import Synchronization

/// In what the other side's disks can differ, where that is known.
extension ForkSource {
    /// What the other side's disks held before anything was sent: what the fork's group holds since `kept`, where it was `committed` from this fork before. In
    /// what was written to the group between those, and in what the fork has written since it was made, the disks may differ from the fork, in nothing else.
    public struct Original: Sendable {
        public var committed: RecoveryPointID
        public var kept: RecoveryPoint
        public init(committed: RecoveryPointID, kept: RecoveryPoint) {
            self.committed = committed
            self.kept = kept
        }
    }

    /// The blocks, per disk, in which the other side may differ from `mark`; nil when that is not known.
    func differing(_ mark: ForkID) throws(StoreError) -> [[Range<UInt64>]]? {
        guard let (original, group) = trusted(queue.withLock { $0.peerWas }) else { return nil }
        var all: [[Range<UInt64>]] = []
        do throws(StoreError) {
            for (disk, source) in disks.enumerated() {
                guard let written = try store.written(to: fork, upTo: mark, volume: disk),
                    let before = try store.written(to: group, since: original.committed, volume: disk)
                else { return nil }
                all.append(Self.union(written, before, blockCount: source.geometry.blockCount))
            }
        } catch {
            if case .closed = error { throw error }
            // The machine does not need these layers: everything is sent, then.
            logger.warning("fork \(fork): what the disks can differ in cannot be read: \(error)")
            return nil
        }
        return all
    }

    static func union(_ a: [Range<UInt64>], _ b: [Range<UInt64>], blockCount: UInt64) -> [Range<UInt64>] {
        var merged: [Range<UInt64>] = []
        for run in (a + b).sorted(by: { $0.lowerBound < $1.lowerBound }) where run.lowerBound < blockCount {
            let run = run.clamped(to: 0..<blockCount)
            if let last = merged.last, run.lowerBound <= last.upperBound {
                merged[merged.count - 1] = last.lowerBound..<max(last.upperBound, run.upperBound)
            } else {
                merged.append(run)
            }
        }
        return merged
    }

    private func trusted(_ position: DurablePosition?) -> (original: Original, group: GroupID)? {
        guard let original, let position, let group = store.read({ $0.forks[fork]?.group }),
            // Epochs with nothing in them may have followed, and be acknowledged or not.
            let now = store.group(group)?.lastDurable, now.instance == original.kept.instance, position.instance == now.instance,
            original.kept.epoch <= position.epoch, position.epoch <= now.epoch
        else { return nil }
        return (original, group)
    }

    /// Of whoever has the disks now: what they were, if nobody but this source has changed them since. Returns whether a full sync is of what can differ only.
    func peerWas(_ position: DurablePosition?) -> Bool {
        queue.withLock { $0.peerWas = position }
        guard let (original, group) = trusted(position) else { return false }
        return disks.indices.allSatisfy { store.isKnown(writtenTo: fork, volume: $0) && store.isKnown(writtenTo: group, since: original.committed, volume: $0) }
    }
}

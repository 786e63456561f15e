import Synchronization

/// What a store does for itself: recovery points expire, layers are merged, space that nothing names is given back, the MANIFEST is kept
/// short. In units, one after the other, of which each may be killed at any moment: what it had not published is garbage
/// at the next start, or is done again.
///
/// The order of a round matters: what expires lets layers be merged, merges leave blocks that nothing names, and only those are
/// given back, since only a record that is durable takes names away.
public enum UpkeepAction: Sendable, Hashable {
    case expired(GroupID, Int)
    case merged(layers: Int, extents: Int)
    case reclaimed(bytes: UInt64)
    case evacuated(bytes: UInt64)
    case removed(files: Int)
    case rewroteManifest
    case wroteIndex
    case hydrated(ForkID, volume: Int)
}

/// Since the store was opened.
public struct UpkeepStatistics: Sendable, Hashable {
    /// Layers that became part of others.
    public var layersMerged: UInt64 = 0
    /// Bytes of layer files written by merges.
    public var indexBytesRewritten: UInt64 = 0
    /// Bytes of data copied from sparse segments to new ones.
    public var dataBytesMoved: UInt64 = 0
    /// Disk space given back inside of segments that remain.
    public var bytesReclaimed: UInt64 = 0
    public var pointsExpired: UInt64 = 0
    /// Disks of forks that were made independent of recovery points.
    public var forkDisksHydrated: UInt64 = 0
    public init() {}
}

/// What upkeep knows beside the store's state. All of it may be forgotten at any time.
final class Upkeep: @unchecked Sendable {
    struct Settings {
        var policies: [GroupID: RecoveryPointPolicy] = [:]
        /// Forks that are to become independent, and how far they are.
        var hydrations: [ForkID: ForkHydration] = [:]
        var isTightening = false
        var space = SpaceState.ok
        /// The last attempt to take something in was refused for lack of space.
        var wasRefused = false
        var onSpaceChange: (@Sendable (SpaceState) -> Void)?
        var statistics = UpkeepStatistics()
        var thread: UpkeepThread?
    }

    /// Used by whoever carries out a step, one at a time.
    struct Work {
        /// Damaged: neither merged nor is anything given back of segments that they use.
        var unreadableLayers: Set<UInt64> = []
        /// There was no space for a merge.
        var isFrugal = false
        var canPunch = true
        /// The unit to begin with.
        var next = 0
        var segments: [UInt32: SegmentLook] = [:]
        /// Their data could not be read.
        var unmovableSegments: Set<UInt32> = []
    }

    let settings = Mutex(Settings())
    /// One step at a time.
    let turn = Semaphore(count: 1)
    var work = Work()
    /// Records took names away since files were looked through.
    let hasUnnamedFiles = Atomic<Bool>(false)

    func count(_ body: (inout UpkeepStatistics) -> Void) { settings.withLock { body(&$0.statistics) } }

    func wake() { settings.withLock { $0.thread }?.wake() }
}

/// In the order of a round, after points have expired. The next step begins with the unit after the one that did something, so that what always
/// finds something to do does not keep the others from theirs.
private enum Unit: CaseIterable {
    case hydrate, merge, remove, reclaim, evacuate, rewriteManifest
}

extension ReplicaStore {
    /// Does one unit of upkeep and says what it was; nil when there is nothing to do. Any thread; one at a time.
    func upkeepStep() throws(StoreError) -> UpkeepAction? { try upkeepStep(storage) }

    /// With files opened through `disk`, which may slow down or break off.
    func upkeepStep(_ disk: any Storage) throws(StoreError) -> UpkeepAction? {
        upkeep.turn.wait()
        defer { upkeep.turn.signal() }
        // Nobody knows what the disk says: nothing is given back on the word of the memory.
        if let failure = try thread.perform({ self.manifest.failure }) { throw failure }
        lookAtSpace()
        // What one unit cannot do must not keep the others from making space.
        var failure: StoreError?
        upkeep.work.isFrugal = false
        func attempt(_ body: () throws(StoreError) -> UpkeepAction?) throws(StoreError) -> UpkeepAction? {
            do throws(StoreError) { return try body() } catch {
                if case .closed = error { throw error }
                if failure == nil { failure = error }
                return nil
            }
        }
        if let action = try attempt({ () throws(StoreError) in try expirePoints() }) { return action }
        let units = Unit.allCases
        let first = upkeep.work.next
        for place in (first..<first + units.count).map({ $0 % units.count }) {
            guard let action = try attempt({ () throws(StoreError) in try carryOut(units[place], disk) }) else { continue }
            upkeep.work.next = (place + 1) % units.count
            return action
        }
        upkeep.work.next = 0
        // Only when nothing else can be given back.
        if let action = try attempt({ () throws(StoreError) in try tighten() }) { return action }
        if case .full = failure {
            // The smallest merge, into the space that was kept for such a moment.
            upkeep.work.isFrugal = true
            if try thread.perform({ self.releaseReserve() }), let action = try mergeLayers(disk) { return action }
        }
        if let failure { throw failure }
        return nil
    }

    private func carryOut(_ unit: Unit, _ disk: any Storage) throws(StoreError) -> UpkeepAction? {
        switch unit {
        case .hydrate: try hydrateForks(disk)
        case .merge: try mergeLayers(disk)
        case .remove: try removeUnnamedFiles()
        case .reclaim: try reclaimSegments(disk)
        case .evacuate: try evacuateSegments(disk)
        case .rewriteManifest: try rewriteManifest()
        }
    }

    private func expirePoints() throws(StoreError) -> UpkeepAction? {
        let policies = upkeep.settings.withLock { $0.policies }
        let now = options.now()
        for (id, policy) in policies.sorted(by: { $0.key.rawValue < $1.key.rawValue }) {
            let gone = policy.expired(recoveryPoints(id), nowNanoseconds: now, ignoresHolds: options.deliberateFault == .holdsIgnored)
            if gone.isEmpty { continue }
            do throws(StoreError) { try dropRecoveryPoints(id, gone) } catch {
                // Somebody held one of them, or dropped it, in between: the next look is the right one.
                switch error {
                case .invalid, .unknownRecoveryPoint, .unknownGroup: continue
                default: throw error
                }
            }
            upkeep.count { $0.pointsExpired += UInt64(gone.count) }
            return .expired(id, gone.count)
        }
        return nil
    }

    private func removeUnnamedFiles() throws(StoreError) -> UpkeepAction? {
        let removed = try thread.perform { () throws(StoreError) -> Int in
            self.upkeep.hasUnnamedFiles.exchange(false, ordering: .relaxed) ? self.collectGarbage() : 0
        }
        return removed > 0 ? .removed(files: removed) : nil
    }
}

extension ReplicaStore {
    /// The state is written out here, on the caller's thread, while records go on; only the last step is the store's thread's.
    private func rewriteManifest() throws(StoreError) -> UpkeepAction? {
        let begun = try thread.perform { () throws(StoreError) -> StoreState? in
            guard self.manifest.isLong(self.options.manifestRewriteBytes) else { return nil }
            self.manifest.beginRewrite()
            return self.read { $0 }
        }
        guard let state = begun else { return nil }
        do throws(StoreError) {
            nonisolated(unsafe) let rewritten = try Manifest.prepareRewrite(storage, state: state)
            try thread.perform { () throws(StoreError) in try self.manifest.finishRewrite(rewritten) }
        } catch {
            try thread.perform { self.manifest.giveUpRewrite() }
            throw error
        }
        return .rewroteManifest
    }
}

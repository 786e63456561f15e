import BlockTap
import Foundation
import Synchronization

/// What scrubbing has done since the store was opened.
public struct ScrubStatistics: Sendable, Hashable {
    /// Times that everything was read.
    public var passCount: UInt64 = 0
    public var lastPassEndNanoseconds: UInt64 = 0
    public var readBytes: UInt64 = 0
    /// Known now and not repaired.
    public var badBlockCount: UInt64 = 0
    /// Layer files that are damaged, known now.
    public var badFileCount = 0
    public var repairedBlockCount: UInt64 = 0
}

/// What scrubbing and repair have to tell.
public enum ScrubFinding: Sendable {
    case bad(BadExtent)
    /// A layer's own file: nothing that goes through it can be opened.
    case badFile(path: String, what: String, group: GroupID, recoveryPoints: [RecoveryPointID], forks: [ForkID])
    case repaired(GroupID, disk: String, block: UInt64, count: UInt64)
    /// The source has something else there by now.
    case notRepaired(GroupID, disk: String, block: UInt64, count: UInt64, why: String)
    case passEnded(ScrubStatistics)
}

/// What the store knows of its own bad blocks, and how far the walk over all layers has come. Thread-safe.
///
/// A pass reads the layers that were live when it began, oldest first, then those that came while it ran (merges put new ones in the
/// place of old ones that it had not come to yet). A layer is pinned while it is read: nothing of it is given back meanwhile. What is known is by
/// layer, and what reading a layer anew finds takes the place of what was known of it.
final class Scrubber: Sendable {
    /// Known bad blocks of one layer, run by run.
    struct Known {
        var sizeBytes: UInt64
        var runs: [BadRun]
        /// Blocks that the source was asked for and does not have any more; asked again after the next pass.
        var lost: Set<UInt64> = []
        /// Of the layer's file itself.
        var damage: String?
    }

    struct State {
        /// Layers still to be read in this pass, the next one last.
        var queue: [UInt64] = []
        /// The first file number that did not exist when the pass began.
        var newSince: UInt64 = 0
        var isSecondRound = false
        var isRunning = false
        var known: [UInt64: Known] = [:]
        var statistics = ScrubStatistics()
        var onFinding: (@Sendable (ScrubFinding) -> Void)?
    }

    let state = Mutex(State())
    /// One repair at a time.
    let repairing = Mutex(())
    private let condition = NSCondition()
    nonisolated(unsafe) private var isStopping = false
    nonisolated(unsafe) private var isThreadRunning = false
    nonisolated(unsafe) private var thread = pthread_t()

    var statistics: ScrubStatistics {
        state.withLock { state in
            var figures = state.statistics
            figures.badBlockCount = state.known.values.reduce(0) { $0 + $1.runs.reduce(0) { $0 + $1.blockCount } }
            figures.badFileCount = state.known.values.count { $0.damage != nil }
            return figures
        }
    }

    var hasBadBlocks: Bool { state.withLock { $0.known.values.contains { !$0.runs.isEmpty } } }

    func tell(_ finding: ScrubFinding) { state.withLock { $0.onFinding }?(finding) }

    // MARK: The thread

    /// False when it runs already.
    func start(_ body: @escaping @Sendable () -> Void) -> Bool {
        condition.lock()
        defer { condition.unlock() }
        guard !isThreadRunning, !isStopping else { return false }
        isThreadRunning = true
        Thread.detachNewThread { [self] in
            condition.lock()
            thread = pthread_self()
            condition.unlock()
            body()
            condition.lock()
            isThreadRunning = false
            condition.broadcast()
            condition.unlock()
        }
        return true
    }

    /// Returns when nothing is being read any more. Not to be started again.
    func stop() {
        condition.lock()
        isStopping = true
        condition.broadcast()
        // The thread itself may be the last to let the store go.
        while isThreadRunning, pthread_equal(thread, pthread_self()) == 0 { condition.wait() }
        condition.unlock()
    }

    /// False when it was woken to stop.
    func wait(until date: Date) -> Bool {
        condition.lock()
        defer { condition.unlock() }
        while !isStopping, condition.wait(until: date) {}
        return !isStopping
    }
}

extension ReplicaStore {
    /// Where a step of scrubbing ended.
    enum ScrubStep: Equatable {
        case read(layer: UInt64)
        case passEnded
        /// `pace` said so; the layer is read again from its beginning.
        case stopped
    }

    /// Reads all data of all layers again and again at this rate, on a thread of its own that ends with `close`, with a pause between
    /// passes. `onFinding` is called on that thread, or on one that repairs; it must not block.
    public func startScrub(bytesPerSecond: UInt64, pauseSeconds: Double = 3600, onFinding: @escaping @Sendable (ScrubFinding) -> Void = { _ in }) {
        precondition(bytesPerSecond > 0)
        scrubber.state.withLock { $0.onFinding = onFinding }
        let scrubber = scrubber
        _ = scrubber.start { [weak self] in
            // When the bytes read so far may have been read.
            var due = Date()
            func pace(_ count: Int) -> Bool {
                let now = Date()
                if due < now { due = now }
                due += Double(count) / Double(bytesPerSecond)
                return scrubber.wait(until: due)
            }
            while true {
                // Not held while waiting for the next pass: the store may be let go.
                guard let step = self?.scrubStep(pace: pace) else { return }
                switch step {
                case .read: if !scrubber.wait(until: Date()) { return }
                case .passEnded: if !scrubber.wait(until: Date() + pauseSeconds) { return }
                case .stopped: return
                }
            }
        }
    }

    /// Reads the next layer. One caller at a time. Nil when the store is closed.
    func scrubStep(pace: @escaping (Int) -> Bool = { _ in true }) -> ScrubStep? {
        guard let next = nextToScrub() else { return nil }
        guard let (record, pin) = next else {
            let figures = scrubber.state.withLock { state -> ScrubStatistics in
                state.statistics.passCount += 1
                state.statistics.lastPassEndNanoseconds = options.now()
                return state.statistics
            }
            scrubber.tell(.passEnded(figures))
            return .passEnded
        }
        defer { unpin(pin) }
        var runs: [BadRun] = []
        var damage: String?
        var sizeBytes = record.sizeBytes
        var goesOn = true
        do throws(StoreError) {
            let layer = try LayerReader(storage, store: uuid, record: record)
            sizeBytes = layer.header.sizeBytes
            let data = LayerDataReader { [segments] id throws(StoreError) in
                guard let file = try segments.open([id]).file(id) else { throw .io(errno: ENOENT, what: "segment \(id)") }
                return file.file
            } pace: { [scrubber] count in
                scrubber.state.withLock { $0.statistics.readBytes += UInt64(count) }
                return pace(count)
            }
            goesOn = try data.read(layer) { if runs.count < StoreCheck.badRunsMax { runs.append($0) } }
        } catch {
            damage = "\(error)"
        }
        guard goesOn else {
            scrubber.state.withLock { $0.queue.append(record.id) }
            return .stopped
        }
        scrubber.state.withLock { $0.statistics.readBytes += record.fileBytes }
        note(record, sizeBytes: sizeBytes, runs: runs.sorted { $0.startBlock < $1.startBlock }, damage: damage)
        return .read(layer: record.id)
    }

    /// The next layer, pinned; `.some(nil)` at the end of a pass, nil when the store is closed.
    private func nextToScrub() -> (LayerRecord, UInt64)?? {
        while true {
            // Layers and pins under one lock: whoever gives space back sees the pin or the layer is gone.
            let (live, newest, isClosed) = shared.withLock { (Set($0.state.layers.keys), $0.state.nextFile, $0.isClosed) }
            if isClosed { return nil }
            let id = scrubber.state.withLock { state -> UInt64? in
                state.known = state.known.filter { live.contains($0.key) }
                if !state.isRunning {
                    state.isRunning = true
                    state.isSecondRound = false
                    state.newSince = newest
                    state.queue = live.sorted(by: >)
                }
                if state.queue.isEmpty, !state.isSecondRound {
                    state.isSecondRound = true
                    state.queue = live.filter { $0 >= state.newSince }.sorted(by: >)
                }
                if state.queue.isEmpty { state.isRunning = false }
                return state.queue.popLast()
            }
            guard let id else { return .some(nil) }
            let pinned = shared.withLock { shared -> (LayerRecord, UInt64)? in
                guard let record = shared.state.layers[id] else { return nil }
                let number = shared.add(Pin([record]))
                return (record, number)
            }
            if let pinned { return pinned }
        }
    }

    private func note(_ record: LayerRecord, sizeBytes: UInt64, runs: [BadRun], damage: String?) {
        let old = scrubber.state.withLock { state -> Scrubber.Known? in
            let old = state.known[record.id]
            state.known[record.id] = runs.isEmpty && damage == nil ? nil : Scrubber.Known(sizeBytes: sizeBytes, runs: runs, damage: damage)
            return old
        }
        let isNew = runs.contains { run in !(old?.runs.contains { $0.startBlock == run.startBlock && $0.blockCount == run.blockCount } ?? false) }
        if isNew {
            for extent in badExtents(of: [record.id]) {
                logger.error("scrub: blocks are damaged", metadata: ["group": "\(extent.group)", "disk": "\(extent.disk)", "block": "\(extent.block)", "count": "\(extent.count)", "points": "\(extent.recoveryPoints.map(\.rawValue))"])
                scrubber.tell(.bad(extent))
            }
        }
        if let damage, old?.damage == nil {
            let state = read { $0 }
            var points: [RecoveryPointID] = [], forks: [ForkID] = []
            var group = GroupID("")
            for view in state.views where state.chain(view.top).contains(where: { $0.id == record.id }) {
                group = view.group
                switch view.kind {
                case .point(let id): if !points.contains(id) { points.append(id) }
                case .fork(let id): if !forks.contains(id) { forks.append(id) }
                case .newest: break
                }
            }
            logger.error("scrub: a layer is damaged", metadata: ["error": "\(damage)", "group": "\(group)", "points": "\(points.map(\.rawValue))"])
            scrubber.tell(.badFile(path: LayerFile.path(record.id), what: damage, group: group, recoveryPoints: points, forks: forks))
        }
    }

    /// Bad blocks that scrubbing found and nobody has repaired, with what shows them. (A fork that is open may have written over some.)
    public func badExtents() -> [BadExtent] { badExtents(of: nil) }

    private func badExtents(of layers: Set<UInt64>?) -> [BadExtent] {
        let known = scrubber.state.withLock { $0.known }
        var bad: [UInt64: BlockRuns] = [:]
        for (layer, entry) in known where layers?.contains(layer) ?? true {
            for run in entry.runs { bad[layer, default: BlockRuns()].add(run.startBlock, run.startBlock + run.blockCount, layer: layer) }
        }
        if bad.isEmpty { return [] }
        let (state, number) = shared.withLock { shared -> (StoreState, UInt64) in
            let number = shared.add(Pin(Array(shared.state.layers.values)))
            return (shared.state, number)
        }
        defer { unpin(number) }
        bad = bad.filter { state.layers[$0.key] != nil }
        let views = state.views
        let tops = Set(views.map(\.top))
        var reached: [UInt64: BlockRuns] = [:]
        state.reach(bad: bad, broken: [], extents: { [storage, uuid] record, body throws(StoreError) in
            try LayerReader(storage, store: uuid, record: record).forEachExtents { for extent in $0 { body(extent) } }
        }, visit: { layer, runs, _ in
            if tops.contains(layer) { reached[layer] = runs }
        })
        return state.badExtents(bad, views: views, seen: views.map { reached[$0.top] ?? BlockRuns() })
    }
}

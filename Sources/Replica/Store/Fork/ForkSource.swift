import BlockTap
import Glibc
import Logging
import Synchronization

/// A fork as the source of replication: what the machine that runs on it writes, carried to whoever has its disks elsewhere.
///
/// A cut seals the fork over all its disks and leaves a mark (`ForkMarks.swift`); an epoch is what the layers between two marks say. So nothing is
/// tracked beside the store, and an epoch that was cut stays as it is for as long as it takes to send it: every epoch outside of a full sync is exact.
///
/// Marks of fork F, all in the MANIFEST:
/// - `F-base-N`: what a full sync copies; there until its last part is acknowledged. A start that finds one begins the full sync anew.
/// - `F-sent-N`: epoch N. The oldest one is acknowledged; those after it are on their way. A start goes on from the oldest, under numbers far
///   above all that can have been cut before.
///
/// A full sync hands out the whole disk, to be compared, or, where it is known block by block in what the other side may differ, only that (`Original`), which
/// is sent without a question: reading and hashing it over there would cost more than it saves.
///
/// Cuts, marks and reads are made on a thread of its own, one after the other; items wait in a queue that is as long as there are buffers.
public final class ForkSource: EpochSource, @unchecked Sendable {
    public static let drainBufferBytes = 1 << 20
    static let bufferCount = 8
    private static let waitingMax = 4096
    public static let purpose = "reverse"
    /// More than the epochs of one process.
    private static let restartDistance: UInt64 = 1 << 32

    private struct Piece {
        var disk: Int
        var blocks: Range<UInt64>
        var bytes: UInt64 { UInt64(blocks.count) * UInt64(blockBytes) }
    }

    private struct Epoch {
        var cut: Cut
        /// Of a part of a full sync: goes back when it is abandoned.
        var pieces: [Piece] = []
        /// What the fork was at the cut; of an exact one.
        var mark: ForkID?
        /// The mark was made for it: it goes when it is abandoned.
        var isOwnMark = false
        var bytes: UInt64 { cut.blockCount * UInt64(blockBytes) }
    }

    private struct Drain {
        var epoch: Epoch
        /// What is left of the first one begins at `next`. There may be millions: none is moved, and none copied.
        var left: ArraySlice<Piece>
        var next: UInt64?
        var readers: [VolumeReader]
        var isFullSync: Bool
    }

    struct Queue {
        /// Those before `taken` have gone.
        var items: [DrainItem] = []
        var taken = 0
        /// As many wait as may: items of zeroes need no buffer.
        var isFull = false
        var free: [Int]
        var wakeup: (@Sendable () -> Void)?
        var isFillQueued = false
        var statistics = SourceStatistics()
        var wantsFullSync = false
        var needsFuzzyCut = false
        /// What the other side's disks were, if nobody but this source has changed them since.
        var peerWas: DurablePosition?
    }

    public let instance: String
    public let disks: [SourceDisk]
    /// Where an earlier process of this appliance was; nil: a full sync has to come first.
    public let resumption: SourceResumption?
    let store: ReplicaStore
    let fork: ForkID
    let original: Original?
    let logger: Logger
    private let thread = StoreThread()
    let queue: Mutex<Queue>
    private let memory: UnsafeMutableRawPointer

    // On the thread.
    private var lastEpoch: UInt64
    /// What the other side holds; nil until a full sync has ended.
    private var held: ForkID?
    private var base: ForkID?
    private var baseReaders: [VolumeReader] = []
    /// Of the full sync, not cut yet.
    private var unsynced: ArraySlice<Piece> = []
    /// The full sync is of what may differ only.
    private var isDifferenceKnown = false
    private var draining: Drain?
    private var unacknowledged: [Epoch] = []

    /// `instance`: the same for all processes that send this fork to the same disks. Throws `.unknownFork`.
    public init(store: ReplicaStore, fork: ForkID, instance: String, original: Original? = nil, logger: Logger) throws(StoreError) {
        guard let record = store.read({ $0.forks[fork] }) else { throw .unknownFork(fork) }
        self.store = store
        self.fork = fork
        self.original = original
        self.instance = instance
        self.logger = logger
        disks = record.volumes.map { SourceDisk(name: $0.spec.name, geometry: $0.spec.geometry) }
        memory = .allocate(byteCount: Self.bufferCount * Self.drainBufferBytes, alignment: pageBytes)
        queue = Mutex(Queue(free: Array(0..<Self.bufferCount)))
        let sent = Self.numbers(store, "\(fork)-sent-")
        if Self.numbers(store, "\(fork)-base-").isEmpty, let first = sent.first, let last = sent.last {
            held = Self.sentMark(fork, first)
            lastEpoch = last + Self.restartDistance
            resumption = SourceResumption(acknowledged: EpochNumber(first), lastCut: EpochNumber(lastEpoch))
        } else {
            lastEpoch = sent.last.map { $0 + Self.restartDistance } ?? 0
            resumption = nil
        }
        let held = held
        do throws(StoreError) { for mark in Self.marks(of: fork, in: store) where mark != held { try store.dropFork(mark) } } catch {
            thread.stop()
            throw error
        }
    }

    deinit { memory.deallocate() }

    /// Ends its thread; the marks stay for the next one. Nobody may use it any more.
    public func close() {
        try? thread.perform { self.baseReaders = []; self.draining = nil }
        thread.stop()
    }

    private static func sentMark(_ fork: ForkID, _ number: UInt64) -> ForkID { ForkID("\(fork)-sent-\(number)") }

    private static func numbers(_ store: ReplicaStore, _ prefix: String) -> [UInt64] {
        store.read { $0.forks.keys.compactMap { $0.rawValue.hasPrefix(prefix) ? UInt64($0.rawValue.dropFirst(prefix.count)) : nil } }.sorted()
    }

    /// What sources of this fork have left in the store.
    public static func marks(of fork: ForkID, in store: ReplicaStore) -> [ForkID] {
        store.read { state in state.forks.values.filter { $0.purpose == purpose && $0.parentFork == fork }.map(\.id) }
    }

    /// Nothing will be sent of this fork any more, or from the beginning.
    public static func forget(_ fork: ForkID, in store: ReplicaStore) throws(StoreError) {
        for mark in marks(of: fork, in: store) { try store.dropFork(mark) }
    }

    // MARK: Cuts

    public func beginFullSync() {
        queue.withLock {
            $0.wantsFullSync = true
            $0.needsFuzzyCut = true
        }
    }

    public var needsFuzzyCut: Bool { queue.withLock { $0.needsFuzzyCut } }

    public func cut(fuzzyBytesMax: UInt64, consistency: CutConsistency) async throws -> Cut {
        try await withCheckedThrowingContinuation { (continuation: CheckedContinuation<Cut, any Error>) in
            let accepted = thread.enqueue { [self] in
                do { continuation.resume(returning: try cutNow(fuzzyBytesMax)) } catch { continuation.resume(throwing: error) }
            }
            if !accepted { continuation.resume(throwing: EpochError.closed) }
        }
    }

    private func cutNow(_ fuzzyBytesMax: UInt64) throws -> Cut {
        if let draining { throw EpochError.draining(draining.epoch.cut.epoch) }
        if queue.withLock({ $0.wantsFullSync }) { try startFullSync() }
        let number = lastEpoch + 1
        // Before it is made: whoever waits for a cut that came after something must not be told of one that began before it.
        let now = store.options.now()
        func cut(_ kind: EpochKind, _ pieces: [Piece]) -> Cut {
            Cut(
                epoch: EpochNumber(number), kind: kind, timeNanoseconds: now, blockCount: pieces.reduce(0) { $0 + UInt64($1.blocks.count) },
                proof: kind == .exact ? CutProof(method: .copyBeforeWrite) : nil)
        }
        if !unsynced.isEmpty {
            let pieces = takeUnsynced(fuzzyBytesMax)
            let epoch = Epoch(cut: cut(.fuzzy, pieces), pieces: pieces)
            drain(Drain(epoch: epoch, left: pieces[...], readers: baseReaders, isFullSync: true))
            return epoch.cut
        }
        guard let previous = unacknowledged.last(where: { $0.mark != nil })?.mark ?? base ?? held else {
            throw StoreError.invalid("fork \(fork) is nowhere else yet: a full sync comes first")
        }
        let mark = Self.sentMark(fork, number)
        lastEpoch = number
        let isChanged = try store.mark(mark, of: fork, purpose: Self.purpose, unlessEqual: previous)
        var pieces: [Piece] = []
        var readers: [VolumeReader] = []
        if isChanged {
            do throws(StoreError) {
                for disk in disks.indices {
                    let (reader, changed) = try store.openMark(mark, volume: disk, above: previous)
                    readers.append(reader)
                    pieces += changed.map { Piece(disk: disk, blocks: $0) }
                }
            } catch {
                drop([mark])
                throw error
            }
        }
        let epoch = Epoch(cut: cut(.exact, pieces), mark: isChanged ? mark : previous, isOwnMark: isChanged)
        drain(Drain(epoch: epoch, left: pieces[...], readers: readers, isFullSync: false))
        return epoch.cut
    }

    private func drain(_ drain: Drain) {
        lastEpoch = drain.epoch.cut.epoch.rawValue
        draining = drain
        count()
        queueFill()
    }

    private func startFullSync() throws {
        draining = nil
        unacknowledged = []
        baseReaders = []
        unsynced = []
        (held, base) = (nil, nil)
        try Self.forget(fork, in: store)
        lastEpoch += 1
        let mark = ForkID("\(fork)-base-\(lastEpoch)")
        _ = try store.mark(mark, of: fork, purpose: Self.purpose, unlessEqual: nil)
        base = mark
        let known = try differing(mark)
        isDifferenceKnown = known != nil
        if let known {
            let blocks = known.reduce(0) { $0 + $1.reduce(0) { $0 + UInt64($1.count) } }
            logger.info("fork \(fork): the disks can differ in \(blocks) blocks only: those are sent")
        }
        for disk in disks.indices {
            let (reader, whole) = try store.openMark(mark, volume: disk, above: nil)
            baseReaders.append(reader)
            unsynced += (known?[disk] ?? whole).map { Piece(disk: disk, blocks: $0) }
        }
        queue.withLock { $0.wantsFullSync = false }
        count()
    }

    private func takeUnsynced(_ bytesMax: UInt64) -> [Piece] {
        var left = max(1, bytesMax / UInt64(blockBytes))
        var taken: [Piece] = []
        while left > 0, !unsynced.isEmpty {
            let blocks = unsynced.first!.blocks
            let end = min(blocks.upperBound, blocks.lowerBound + left)
            taken.append(Piece(disk: unsynced.first!.disk, blocks: blocks.lowerBound..<end))
            left -= end - blocks.lowerBound
            if end == blocks.upperBound { unsynced.removeFirst() } else { unsynced[unsynced.startIndex].blocks = end..<blocks.upperBound }
        }
        return taken
    }

    // MARK: Draining

    public func nextItem() -> DrainItem? {
        let (item, isRoomAgain) = queue.withLock { queue -> (DrainItem?, Bool) in
            guard queue.taken < queue.items.count else { return (nil, false) }
            let item = queue.items[queue.taken]
            queue.taken += 1
            if queue.taken >= 1024, queue.taken * 2 >= queue.items.count {
                queue.items.removeFirst(queue.taken)
                queue.taken = 0
            }
            guard queue.isFull, queue.items.count - queue.taken <= Self.waitingMax / 2 else { return (item, false) }
            queue.isFull = false
            return (item, true)
        }
        if isRoomAgain { queueFill() }
        return item
    }

    public func setWakeup(_ wakeup: (@Sendable () -> Void)?) { queue.withLock { $0.wakeup = wakeup } }

    public func release(_ buffer: DrainBuffer) {
        queue.withLock { $0.free.append(buffer.slot) }
        queueFill()
    }

    private func queueFill() {
        let isNew = queue.withLock { queue in
            defer { queue.isFillQueued = true }
            return !queue.isFillQueued
        }
        if isNew { thread.enqueue { [weak self] in self?.fill() } }
    }

    private func push(_ item: DrainItem) {
        let wakeup = queue.withLock { queue in
            queue.items.append(item)
            return queue.wakeup
        }
        wakeup?()
    }

    /// Reads until all buffers are on their way.
    private func fill() {
        queue.withLock { $0.isFillQueued = false }
        while var drain = draining {
            let epoch = drain.epoch.cut.epoch
            let isFull = queue.withLock { queue in
                queue.isFull = queue.items.count - queue.taken >= Self.waitingMax
                return queue.isFull
            }
            if isFull { return }
            guard let first = drain.left.first else {
                draining = nil
                unacknowledged.append(drain.epoch)
                return push(.end(epoch))
            }
            let piece = Piece(disk: first.disk, blocks: (drain.next ?? first.blocks.lowerBound)..<first.blocks.upperBound)
            let reader = drain.readers[piece.disk]
            let size = reader.geometry.sizeBytes
            let (extent, pieceEnd) = reader.map.index.piece(at: piece.blocks.lowerBound, end: piece.blocks.upperBound)
            let offset = piece.blocks.lowerBound * UInt64(blockBytes)
            var end = pieceEnd
            let comparesZeroes = drain.isFullSync && !isDifferenceKnown
            if extent == nil, !comparesZeroes {
                push(.zero(epoch, disk: piece.disk, offsetBytes: offset, lengthBytes: min(end * UInt64(blockBytes), size) - offset))
            } else {
                // Of what is compared zeroes are data, too.
                guard let slot = queue.withLock({ $0.free.popLast() }) else { return }
                let limit = min(piece.blocks.upperBound, piece.blocks.lowerBound + UInt64(Self.drainBufferBytes / blockBytes))
                end = min(end, limit)
                while end < limit {
                    let (next, nextEnd) = reader.map.index.piece(at: end, end: limit)
                    guard comparesZeroes || next != nil else { break }
                    end = nextEnd
                }
                let buffer = memory + slot * Self.drainBufferBytes
                let length = Int(min(end * UInt64(blockBytes), size) - offset)
                do throws(StoreError) { try reader.read(offsetBytes: offset, into: UnsafeMutableRawBufferPointer(start: buffer, count: length)) } catch {
                    logger.error("fork \(fork) cannot be sent: \(error)")
                    queue.withLock { $0.free.append(slot) }
                    draining = nil
                    giveBack([drain.epoch])
                    return push(.abandoned(epoch, .readError))
                }
                push(.data(epoch, DrainBuffer(disk: piece.disk, offsetBytes: offset, lengthBytes: length, memory: buffer, slot: slot)))
            }
            drain.next = end
            if end == piece.blocks.upperBound {
                drain.left.removeFirst()
                drain.next = nil
            }
            draining = drain
        }
    }

    // MARK: Answers

    public func acknowledge(_ epoch: EpochNumber) {
        thread.enqueue { [self] in
            guard let place = unacknowledged.lastIndex(where: { $0.cut.epoch <= epoch }) else { return }
            let newest = unacknowledged[...place].last { $0.mark != nil }?.mark
            unacknowledged.removeFirst(place + 1)
            if let newest, newest != held, newest != base {
                held = newest
                finishFullSync(nil)
            } else if base != nil, unsynced.isEmpty, draining?.isFullSync != true, !unacknowledged.contains(where: { !$0.pieces.isEmpty }) {
                // What the full sync copied is there whole: the first epoch that counts.
                finishFullSync(epoch)
            }
            if let held { drop(Self.marks(of: fork, in: store).filter { mark in mark != held && mark != base && !isUnderway(mark) }) }
            count()
        }
    }

    /// `epoch`: the last part of it, which takes the place of the base. A later mark was acknowledged when there is none.
    private func finishFullSync(_ epoch: EpochNumber?) {
        guard let old = base else { return }
        do throws(StoreError) {
            if let epoch {
                let mark = Self.sentMark(fork, epoch.rawValue)
                _ = try store.mark(mark, of: old, purpose: Self.purpose, unlessEqual: nil)
                for index in unacknowledged.indices where unacknowledged[index].mark == old { unacknowledged[index].mark = mark }
                if draining?.epoch.mark == old { draining?.epoch.mark = mark }
                held = mark
            }
            try store.dropFork(old)
        } catch {
            // The base stays what is held, and a restart begins the full sync anew.
            logger.warning("what is acknowledged of fork \(fork) cannot be marked: \(error)")
            return
        }
        base = nil
        baseReaders = []
    }

    private func isUnderway(_ mark: ForkID) -> Bool {
        draining?.epoch.mark == mark || unacknowledged.contains { $0.mark == mark }
    }

    public func abandonAll() async {
        await withCheckedContinuation { (continuation: CheckedContinuation<Void, Never>) in
            let accepted = thread.enqueue { [self] in
                var given = unacknowledged
                if let draining { given.append(draining.epoch) }
                draining = nil
                unacknowledged = []
                queue.withLock { queue in
                    for case .data(_, let buffer) in queue.items[queue.taken...] { queue.free.append(buffer.slot) }
                    queue.items = []
                    (queue.taken, queue.isFull) = (0, false)
                }
                giveBack(given)
                continuation.resume()
            }
            if !accepted { continuation.resume() }
        }
    }

    private func giveBack(_ epochs: [Epoch]) {
        unsynced = (epochs.flatMap(\.pieces) + unsynced)[...]
        drop(epochs.filter(\.isOwnMark).compactMap(\.mark))
        queue.withLock { $0.statistics.abandonedCount += UInt64(epochs.count) }
        count()
    }

    private func drop(_ marks: [ForkID]) {
        for mark in marks {
            do throws(StoreError) { try store.dropFork(mark) } catch {
                if case .unknownFork = error { continue }
                logger.warning("cannot drop mark \(mark): \(error)")
            }
        }
    }

    // MARK: Figures

    public var statistics: SourceStatistics { queue.withLock { $0.statistics } }

    private func count() {
        let underway = unacknowledged + (draining.map { [$0.epoch] } ?? [])
        let behind = underway.reduce(0) { $0 + ($1.pieces.isEmpty ? $1.bytes : 0) }
        let fuzzy = underway.reduce(0) { $0 + ($1.pieces.isEmpty ? 0 : $1.bytes) } + unsynced.reduce(0) { $0 + $1.bytes }
        let needsMore = !unsynced.isEmpty
        queue.withLock {
            $0.statistics.behindBytes = behind
            $0.statistics.unsyncedBytes = fuzzy
            $0.statistics.cutCount = lastEpoch
            $0.needsFuzzyCut = $0.wantsFullSync || needsMore
        }
    }
}

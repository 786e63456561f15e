import Glibc

/// Deliberate faults, for the tests that prove that the tests would notice.
package struct TapFaults: OptionSet, Sendable {
    package let rawValue: UInt8
    package init(rawValue: UInt8) { self.rawValue = rawValue }
    /// Overwrite pending blocks without saving them.
    package static let skipCopyBeforeWrite = TapFaults(rawValue: 1)
    /// Do not mark writes in flight at the cut in the new epoch.
    package static let forgetInFlightAtCut = TapFaults(rawValue: 2)
    /// Set the dirty bit when the write has ended instead of before it is issued.
    package static let markAfterWrite = TapFaults(rawValue: 4)
}

public struct TapConfiguration: Sendable {
    /// Memory for old content of blocks overwritten before they were drained, for the whole group.
    public var preservedBytesMax: Int
    /// Reads of closed epochs in flight at most, for the whole group.
    public var drainDepth: Int
    /// Buffers of `DrainQueue.bufferBytes` between the tap and the link.
    public var drainBufferCount: Int
    /// Requests of the protected machine in flight per disk; more wait.
    public var requestsMax: Int

    public init(preservedBytesMax: Int = 64 << 20, drainDepth: Int = 16, drainBufferCount: Int = 64, requestsMax: Int = 2048) {
        self.preservedBytesMax = preservedBytesMax
        self.drainDepth = drainDepth
        self.drainBufferCount = drainBufferCount
        self.requestsMax = requestsMax
    }
}

/// The epochs of one consistency group, on one thread: because every request of every disk of the group is admitted on that
/// thread, a cut between two events is a cut across all disks.
///
/// States: running; at most one epoch drains; drained epochs wait for their acknowledgement. A block written since the last
/// acknowledged epoch is in `active`, in the draining epoch or in an unacknowledged one; giving up an epoch OR-s its blocks back
/// (into `unsynced` when it was fuzzy), so that a later epoch carries them.
package final class EpochEngine {
    package private(set) var disks: [TappedDisk] = []
    let configuration: TapConfiguration
    package let queue: DrainQueue
    let preservedArena: SlotArena
    package var faults: TapFaults = []

    struct ClosedEpoch {
        var number: EpochNumber
        var kind: EpochKind
        /// Per disk, all blocks of the epoch.
        var blocks: [BlockBitmap]
    }

    private var lastEpoch = EpochNumber.none
    private(set) var draining: ClosedEpoch?
    private(set) var unacknowledged: [ClosedEpoch] = []
    private var isPumping = false
    /// Who holds the writes; nil: they go through.
    private var holder: String?
    /// Held writes are answered with this error.
    private(set) var refusal: Int32?
    package var holdsWrites: Bool { holder != nil }
    private var spareBitmaps: [[BlockBitmap]] = []

    private(set) var abandonedCount: UInt64 = 0
    private var preservedPeak = 0

    var drainingEpoch: EpochNumber? { draining?.number }
    @inline(__always) var isDrainingExact: Bool { draining?.kind == .exact }

    package init(configuration: TapConfiguration) {
        self.configuration = configuration
        queue = DrainQueue(bufferCount: configuration.drainBufferCount)
        preservedArena = SlotArena(slotCount: max(1, configuration.preservedBytesMax / blockBytes))
    }

    package func addDisk(name: String, geometry: BlockGeometry, io: DiskIO) -> TappedDisk {
        let disk = TappedDisk(name: name, geometry: geometry, io: io, engine: self, index: disks.count, requestsMax: configuration.requestsMax)
        disks.append(disk)
        spareBitmaps.append([])
        return disk
    }

    // MARK: held writes

    /// Of another holder before: the hold is not interrupted.
    package func holdWrites(_ id: String) { holder = id }

    /// What is on the disks now stays as it is while writes are held, and every write that was answered is in it.
    package var isQuiet: Bool { holdsWrites && disks.allSatisfy(\.isQuiet) }

    package func releaseWrites(_ id: String) {
        guard holder == id, refusal == nil else { return }
        holder = nil
        for disk in disks { disk.releaseHeld() }
    }

    /// For good.
    package func refuseHeldWrites(_ id: String, error: Int32) {
        guard holder == id else { return }
        refusal = error
        for disk in disks { disk.refuseHeld(error: error) }
    }

    // MARK: cut

    package func beginFullSync() {
        for disk in disks { disk.unsynced.setAll() }
    }

    package var needsFuzzyCut: Bool { disks.contains { !$0.unsynced.isEmpty } }

    package func cut(fuzzyBytesMax: UInt64) throws(EpochError) -> Cut {
        if let draining { throw .draining(draining.number) }
        lastEpoch = lastEpoch.next
        let kind: EpochKind = needsFuzzyCut ? .fuzzy : .exact
        var blocks: [BlockBitmap] = []
        var blockCount: UInt64 = 0
        var budget = max(1, fuzzyBytesMax / UInt64(blockBytes))
        for disk in disks {
            let fresh = spareBitmaps[disk.index].popLast() ?? BlockBitmap(blockCount: disk.blockCount)
            let closed: BlockBitmap
            if kind == .exact {
                closed = disk.swapActive(with: fresh)
            } else {
                closed = fresh
                takeUnsynced(of: disk, into: closed, budget: &budget)
            }
            blockCount += closed.count
            blocks.append(closed)
        }
        var now = timespec()
        clock_gettime(CLOCK_REALTIME, &now)
        draining = ClosedEpoch(number: lastEpoch, kind: kind, blocks: blocks)
        pump()
        return Cut(
            epoch: lastEpoch, kind: kind, timeNanoseconds: UInt64(now.tv_sec) * 1_000_000_000 + UInt64(now.tv_nsec), blockCount: blockCount,
            proof: kind == .exact ? CutProof(method: .copyBeforeWrite) : nil)
    }

    private func takeUnsynced(of disk: TappedDisk, into closed: BlockBitmap, budget: inout UInt64) {
        var position: UInt64 = 0
        while budget > 0, let block = disk.unsynced.nextSet(from: position) {
            let run = disk.unsynced.runLength(first: block, limit: budget)
            disk.unsynced.clear(first: block, length: run)
            closed.set(first: block, length: run)
            budget -= run
            position = block + run
            if position >= disk.blockCount { break }
        }
        disk.pending.formUnion(closed)
        disk.zeroAtCut.clearAll()
        disk.drainCursor = 0
    }

    // MARK: drain

    /// Hands out what can be handed out and keeps the drain's reads going. Called whenever something changed.
    package func pump() {
        guard !isPumping, draining != nil else { return }
        isPumping = true
        defer { isPumping = false }
        for disk in disks {
            while draining != nil, pumpOne(disk) {}
        }
        if draining != nil, disks.allSatisfy({ $0.pending.isEmpty && $0.preserved.isEmpty && $0.readsInFlight == 0 }) {
            let epoch = draining!
            draining = nil
            unacknowledged.append(epoch)
            queue.push(.end(epoch.number))
        }
    }

    /// One step of one disk's drain; false when it can go no further now.
    private func pumpOne(_ disk: TappedDisk) -> Bool {
        preservedPeak = max(preservedPeak, preservedArena.usedCount)
        if let run = disk.preserved.last {
            guard let slot = queue.takeBuffer() else { return false }
            handOutPreserved(disk, run, slot: slot)
            return true
        }
        guard let block = disk.pending.nextSet(from: disk.drainCursor) else { return false }
        disk.drainCursor = block
        if disk.zeroAtCut.contains(block) {
            guard queue.hasRoom() else { return false }
            let run = disk.pending.runLength(first: block, limit: disk.zeroAtCut.runLength(first: block, limit: .max >> 1))
            disk.pending.clear(first: block, length: run)
            handOutZero(disk: disk, firstBlock: block, blockCount: run)
            return true
        }
        guard readsInFlight < configuration.drainDepth else { return false }
        guard let slot = queue.takeBuffer() else { return false }
        guard let index = disk.operations.take(.drainRead) else {
            queue.freeBuffer(slot: slot)
            return false
        }
        var run = disk.pending.runLength(first: block, limit: UInt64(DrainQueue.bufferBytes / blockBytes))
        if !disk.zeroAtCut.isEmpty { run = disk.zeroAtCut.runLength(first: block, limit: run) }
        disk.startRead(index, firstBlock: block, blockCount: run, slot: slot, into: queue.memory(slot: slot))
        return true
    }

    private var readsInFlight: Int { disks.reduce(0) { $0 + $1.readsInFlight } }

    private func handOutPreserved(_ disk: TappedDisk, _ run: TappedDisk.PreservedRun, slot: Int) {
        let count = min(run.blockCount, DrainQueue.bufferBytes / blockBytes)
        let length = Int(min(UInt64(count * blockBytes), disk.geometry.sizeBytes - run.firstBlock * UInt64(blockBytes)))
        queue.memory(slot: slot).copyMemory(from: preservedArena.memory(run.slot), byteCount: length)
        preservedArena.release(slot: run.slot, count: count)
        if count == run.blockCount {
            disk.preserved.removeLast()
        } else {
            disk.preserved[disk.preserved.count - 1] = .init(firstBlock: run.firstBlock + UInt64(count), blockCount: run.blockCount - count, slot: run.slot + count)
        }
        handOut(disk: disk, firstBlock: run.firstBlock, lengthBytes: length, slot: slot)
    }

    func handOut(disk: TappedDisk, firstBlock: UInt64, lengthBytes: Int, slot: Int) {
        queue.push(
            .data(
                draining!.number,
                DrainBuffer(
                    disk: disk.index, offsetBytes: firstBlock * UInt64(blockBytes), lengthBytes: lengthBytes,
                    memory: queue.memory(slot: slot), slot: slot)))
    }

    func handOutZero(disk: TappedDisk, firstBlock: UInt64, blockCount: UInt64) {
        let offset = firstBlock * UInt64(blockBytes)
        let length = min(blockCount * UInt64(blockBytes), disk.geometry.sizeBytes - offset)
        queue.push(.zero(draining!.number, disk: disk.index, offsetBytes: offset, lengthBytes: length))
    }

    // MARK: end of an epoch

    package func acknowledge(_ epoch: EpochNumber) {
        while let first = unacknowledged.first, first.number <= epoch {
            unacknowledged.removeFirst()
            recycle(first)
        }
    }

    /// The draining epoch cannot be completed; the consumer is told in the order of the queue.
    func abandonDraining(_ reason: AbandonReason) {
        guard let epoch = draining else { return }
        draining = nil
        abandonedCount += 1
        giveBack(epoch)
        queue.push(.abandoned(epoch.number, reason))
        for disk in disks { disk.forgetDraining() }
    }

    /// The replica will get nothing of what is unacknowledged: everything goes back, queued items are dropped.
    package func abandonAll() {
        let drainingEpoch = draining
        draining = nil
        if let drainingEpoch { giveBack(drainingEpoch) }
        for epoch in unacknowledged { giveBack(epoch) }
        unacknowledged.removeAll()
        queue.clear()
        for disk in disks { disk.forgetDraining() }
    }

    private func giveBack(_ epoch: ClosedEpoch) {
        for (disk, blocks) in zip(disks, epoch.blocks) {
            (epoch.kind == .exact ? disk.active : disk.unsynced).formUnion(blocks)
        }
        recycle(epoch)
    }

    private func recycle(_ epoch: ClosedEpoch) {
        for (disk, blocks) in zip(disks, epoch.blocks) where spareBitmaps[disk.index].count < 3 {
            blocks.clearAll()
            spareBitmaps[disk.index].append(blocks)
        }
    }

    // MARK: figures

    package var statistics: SourceStatistics {
        var s = SourceStatistics()
        let unit = UInt64(blockBytes)
        for disk in disks {
            s.writtenBytes += disk.writtenBytes
            s.flushCount += disk.flushCount
            s.behindBytes += disk.active.count * unit
            s.unsyncedBytes += disk.unsynced.count * unit
        }
        for epoch in unacknowledged + (draining.map { [$0] } ?? []) {
            let bytes = epoch.blocks.reduce(0) { $0 + $1.count } * unit
            if epoch.kind == .exact { s.behindBytes += bytes } else { s.unsyncedBytes += bytes }
        }
        s.preservedPeakBytes = UInt64(preservedPeak) * unit
        s.abandonedCount = abandonedCount
        s.cutCount = lastEpoch.rawValue
        return s
    }
}

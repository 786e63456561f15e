import CLiveTap
import Glibc

/// The epochs of a consistency group that the live tap follows. Confined to one thread, which it blocks while it reads.
///
/// A *cut* flips the index that all disks share, then takes what is marked in the old buffer: every write acknowledged before the flip is
/// in there (it was marked before it was issued), and every write that depends on one of those that are not was issued after it. A write whose
/// mark comes late to the old buffer was not yet issued to the device at the flip; it is taken at the next cut.
///
/// A *round* reads D, the blocks so taken. A block is valid if its bit in the current buffer is clear right after its read: what was read is
/// the block at the cut, or has in it a write that was in flight then, which may be in or out. In flight: everything in a slot after
/// the old buffer was taken. Those blocks may land after they were read, so they belong to the next D as well (`carried`).
///
/// All valid, and the kernel's account agrees that no issue was missed: the image is *proven* to be the disks at that cut. Otherwise the next round
/// cuts again; what was read validly and is not in the new D stays valid.
///
/// While rounds run nothing is handed out: the epoch's kind must be known when it begins. What is too large for that, or does
/// not converge, is handed out as a fuzzy epoch; the replica stays close, and the next D is smaller.
///
/// Rounds and freezes: `LiveEpochEngine+Rounds.swift`. What a full sync leaves out: `LiveFreeSpace.swift`.
package final class LiveEpochEngine {
    package final class Disk {
        let disk: LiveDisk
        let index: Int
        /// Written since the blocks' last epoch, in none that is open.
        var dirty: BlockBitmap
        /// In flight at the last cut.
        let carried: BlockBitmap
        let unsynced: BlockBitmap
        /// Of the draining epoch, not handed out.
        let pending: BlockBitmap

        init(_ disk: LiveDisk, index: Int) {
            self.disk = disk
            self.index = index
            dirty = BlockBitmap(blockCount: disk.blockCount)
            carried = BlockBitmap(blockCount: disk.blockCount)
            unsynced = BlockBitmap(blockCount: disk.blockCount)
            pending = BlockBitmap(blockCount: disk.blockCount)
        }
    }

    struct ClosedEpoch {
        var number: EpochNumber
        /// Part of a full sync: given back, its blocks are unsynced again; else dirty.
        var isFullSync: Bool
        var isExact = false
        var blocks: [BlockBitmap]
    }

    package let disks: [Disk]
    let maps: LiveTapMaps
    package let queue: DrainQueue
    package var faults: LiveTapFaults = [] {
        didSet { reconciliation.faults = faults }
    }
    /// For tests: done before the file systems are thawed.
    package var whileFrozen: (() -> Void)?
    /// Words for the log.
    package var onEvent: ((String) -> Void)?
    let configuration: LiveTapConfiguration
    private let attachment: LiveTapAttachment
    let reader: LiveReader
    let reconciliation: LiveReconciliation
    let stage: LiveStage
    var draining: ClosedEpoch?
    private var isDrainingStaged = false
    private var unacknowledged: [ClosedEpoch] = []
    var figures = LiveTapStatistics()
    private var abandonedCount: UInt64 = 0
    /// Cuts that pass before file systems are frozen again only because rounds do not converge; doubles each time that does not help.
    var freezePause = (left: 0, next: 1)
    /// Reads in flight: more while the disks are written faster than they are read.
    var depth: Int
    var urgency: LiveUrgency
    /// While somebody holds the disks still, epochs freeze nothing: they would thaw what is held.
    let freezePauses = LiveFreezePauses()
    var mayFreeze: Bool { configuration.freezes && !freezePauses.isAny }
    /// Points up to this epoch are not what somebody waits for.
    var hurriedAfter: UInt64 = 0
    /// When the first round of the last epoch to be proven was, and sectors that had been written by then.
    var lastFirstRound: (nanoseconds: UInt64, issuedSectors: UInt64) = (0, 0)
    /// Of what has been said more than once in a row.
    var saidLast: [String: String] = [:]

    /// `isFresh`: whether what an earlier process knew is lost, or was never there.
    package private(set) var isFresh: Bool

    /// What the replica must hold, and how far numbers went, when another process's knowledge was taken over.
    var resumption: SourceResumption? {
        isFresh ? nil : SourceResumption(acknowledged: EpochNumber(maps.state.pointee.last_acknowledged), lastCut: EpochNumber(maps.state.pointee.last_epoch))
    }

    init(attachment: LiveTapAttachment, disks: [LiveDisk], configuration: LiveTapConfiguration) throws(SystemError) {
        self.attachment = attachment
        self.configuration = configuration
        depth = configuration.readDepth
        maps = attachment.maps
        self.disks = disks.enumerated().map { Disk($0.element, index: $0.offset) }
        queue = DrainQueue(bufferCount: configuration.drainBufferCount)
        urgency = LiveUrgency(patienceSeconds: configuration.patienceSeconds)
        reader = try LiveReader(
            bytesPerSecondMax: configuration.readBytesPerSecondMax, share: configuration.readShare, accounts: disks.map(\.statistics))
        reconciliation = LiveReconciliation(maps: maps, disks: disks, reader: reader)
        stage = try LiveStage(blockCount: configuration.stagingBytesMax / blockBytes)
        isFresh = !attachment.wasAdopted || maps.state.pointee.is_synced == 0
        // Also when an earlier process has left a fault behind.
        drop(configuration.drops)
        if attachment.wasAdopted {
            for disk in self.disks { maps.collectOutstanding(disk: disk.index, into: disk.dirty) }
        } else {
            reconciliation.settle()
        }
    }

    // MARK: Full sync

    package func beginFullSync() {
        maps.state.pointee.is_synced = 0
        urgency.hasNone()
        reader.share.startOver()
        for disk in disks { disk.unsynced.setAll() }
        figures.skippedFreeBytes = configuration.skipsFreeSpace ? leaveOutFreeSpace() : 0
    }

    package var needsFuzzyCut: Bool { disks.contains { !$0.unsynced.isEmpty } }

    /// Nothing is lost that a full sync does not bring back.
    func resync(_ reason: String) {
        // First: who takes over from a process that is killed in the next lines does not know what was missed.
        maps.state.pointee.is_synced = 0
        figures.resyncCount += 1
        figures.resyncReason = reason
        onEvent?("writes were missed, the disks are compared with the replica, or copied again: \(reason)")
        reconciliation.forgive()
        beginFullSync()
    }

    // MARK: Cut

    package func cut(fuzzyBytesMax: UInt64, consistency: CutConsistency = .crash) throws -> Cut {
        if let draining { throw EpochError.draining(draining.number) }
        let number = EpochNumber(maps.state.pointee.last_epoch + 1)
        // Before anything can be sent under this number.
        maps.state.pointee.last_epoch = number.rawValue
        isDrainingStaged = false
        lookForResizes()
        if needsFuzzyCut, reconciliation.lacksBaseline {
            reconciliation.forgive()
            // Now it is known from when on nothing is missed: what was compared before must be again.
            if !reconciliation.lacksBaseline { beginFullSync() }
        }
        let isFullSync = needsFuzzyCut
        var blocks: [BlockBitmap]
        var time = Self.wallClock()
        var proof: CutProof?
        if isFullSync {
            reader.share.startOver()
            blocks = disks.map { BlockBitmap(blockCount: $0.disk.blockCount) }
            takeUnsynced(into: blocks, budget: max(1, fuzzyBytesMax / UInt64(blockBytes)))
        } else {
            let attempt = try converge(consistency)
            blocks = attempt.blocks
            time = attempt.timeNanoseconds
            isDrainingStaged = attempt.isStaged
            proof = attempt.proof
        }
        for (disk, blocks) in zip(disks, blocks) { disk.pending.formUnion(blocks) }
        draining = ClosedEpoch(number: number, isFullSync: isFullSync, isExact: proof != nil, blocks: blocks)
        let count = blocks.reduce(0) { $0 + $1.count }
        return Cut(epoch: number, kind: proof == nil ? .fuzzy : .exact, timeNanoseconds: time, blockCount: count, proof: proof)
    }

    private func takeUnsynced(into blocks: [BlockBitmap], budget: UInt64) {
        var budget = budget
        for disk in disks {
            var position: UInt64 = 0
            while budget > 0, position < disk.disk.blockCount, let block = disk.unsynced.nextSet(from: position) {
                let run = disk.unsynced.runLength(first: block, limit: budget)
                disk.unsynced.clear(first: block, length: run)
                blocks[disk.index].set(first: block, length: run)
                budget -= run
                position = block + run
            }
        }
    }

    /// The cut. Afterwards `dirty` holds every block written before it since it was last read, and `carried` those that may still land.
    func flip() throws(SystemError) -> UInt64 {
        let old = maps.index
        if faults.contains(.singleBuffer) {
            let time = Self.wallClock()
            for disk in disks {
                try maps.harvest(old, disk: disk.index, blockCount: disk.disk.blockCount, into: disk.dirty)
                usleep(500)                                        // as if the disk were large
            }
            takeCarried()
            return time
        }
        for disk in disks { try maps.harvest(1 - old, disk: disk.index, blockCount: disk.disk.blockCount, into: disk.dirty) }
        // Before the cut, so that whatever was acknowledged by this time is in it.
        let time = Self.wallClock()
        maps.flip()
        for disk in disks {
            try maps.harvest(old, disk: disk.index, blockCount: disk.disk.blockCount, into: disk.dirty)
            if faults.contains(.unsharedCut), disk.index > 0 {
                usleep(500)
                try maps.harvest(1 - old, disk: disk.index, blockCount: disk.disk.blockCount, into: disk.dirty)
            }
        }
        takeCarried()
        return time
    }

    /// `dirty` has by now what was taken and what was carried so far: each write in flight is marked there, or in a buffer that the next cut takes.
    private func takeCarried() {
        for disk in disks {
            disk.dirty.formUnion(disk.carried)
            disk.carried.clearAll()
            if !faults.contains(.forgetInFlightAtCut) { maps.collectInFlight(disk: disk.index, blockCount: disk.disk.blockCount, marked: disk.dirty, into: disk.carried) }
        }
    }

    // MARK: Drain

    /// Hands out what there is room for. Returns whether there may be more at once; otherwise the queue says when.
    package func pump() -> Bool {
        guard let epoch = draining else { return false }
        let isFree = isDrainingStaged || isUrgent()
        if !isFree, disks.contains(where: { $0.pending.nextSet(from: 0) != nil }),
            case let wait = reader.share.wait(now: LiveReconciliation.now(), keeping: epoch.isFullSync ? 0 : LiveReadShare.reserve), wait > 0
        {
            // Others want to be answered by this thread meanwhile.
            usleep(UInt32(min(max(wait / 1000, 1000), 20_000)))
            return true
        }
        var runs: [(disk: Disk, first: UInt64, count: UInt64, slot: Int)] = []
        var isStarved = false
        // Many short ones or a few long ones; under a budget not more than a tenth of a second's: this blocks the thread.
        let rate = isDrainingStaged ? 0 : configuration.readBytesPerSecondMax
        let bytesMax = rate == 0 ? 8 * DrainQueue.bufferBytes : Int(min(max(rate / 10, UInt64(blockBytes)), UInt64(8 * DrainQueue.bufferBytes)))
        let runsMax = isDrainingStaged ? 8 : depth
        var bytes = 0
        fill: for disk in disks {
            while let block = disk.pending.nextSet(from: 0) {
                guard runs.count < runsMax, bytes < bytesMax else { break fill }
                guard let slot = queue.takeBuffer() else {
                    isStarved = true
                    break fill
                }
                let count: UInt64 = disk.pending.runLength(first: block, limit: UInt64(DrainQueue.bufferBytes / blockBytes))
                disk.pending.clear(first: block, length: count)
                runs.append((disk, block, count, slot))
                bytes += Int(count) * blockBytes
            }
        }
        if runs.isEmpty {
            if isStarved { return false }
            draining = nil
            if isDrainingStaged { stage.clear() }
            unacknowledged.append(epoch)
            queue.push(.end(epoch.number))
            return false
        }
        func length(_ run: (disk: Disk, first: UInt64, count: UInt64, slot: Int)) -> Int {
            let offset = run.first * UInt64(blockBytes)
            return Int(min(run.count * UInt64(blockBytes), run.disk.disk.geometry.sizeBytes - offset))
        }
        var failed: [Bool] = Array(repeating: false, count: runs.count)
        if isDrainingStaged {
            for run in runs {
                let memory = queue.memory(slot: run.slot)
                for i in 0..<Int(run.count) {
                    let block = stage.memory(stage.slot(disk: run.disk.index, block: run.first + UInt64(i)))
                    (memory + i * blockBytes).copyMemory(from: block, byteCount: min(blockBytes, length(run) - i * blockBytes))
                }
            }
        } else {
            let ranges = runs.map {
                LiveReader.Range(
                    fd: $0.disk.disk.device.fd, offsetBytes: $0.first * UInt64(blockBytes), lengthBytes: length($0), memory: queue.memory(slot: $0.slot))
            }
            let considering = LiveReader.Consideration(priority: configuration.readPriority, isFree: isFree)
            reader.read(ranges, depth: depth, considering: considering) { index, succeeded in
                if !succeeded { failed[index] = true }
            }
        }
        if let first = failed.firstIndex(of: true) {
            let run = runs[first]
            say("read error", "\(run.disk.disk.device.path) cannot be read at byte \(run.first * UInt64(blockBytes)), or in the \(length(run)) bytes from there: \(epoch.number) is abandoned")
            for run in runs { queue.freeBuffer(slot: run.slot) }
            abandonDraining(.readError)
            return false
        }
        for run in runs {
            let bytes = length(run), memory = queue.memory(slot: run.slot), offset = run.first * UInt64(blockBytes)
            if LiveStage.isZero(memory, bytes) {
                queue.freeBuffer(slot: run.slot)
                queue.push(.zero(epoch.number, disk: run.disk.index, offsetBytes: offset, lengthBytes: UInt64(bytes)))
            } else {
                queue.push(.data(epoch.number, DrainBuffer(disk: run.disk.index, offsetBytes: offset, lengthBytes: bytes, memory: memory, slot: run.slot)))
            }
        }
        return true
    }

    private func abandonDraining(_ reason: AbandonReason) {
        guard let epoch = draining else { return }
        draining = nil
        abandonedCount += 1
        giveBack(epoch)
        for disk in disks { disk.pending.clearAll() }
        queue.push(.abandoned(epoch.number, reason))
    }

    package func abandonAll() {
        urgency.startOver()
        if let draining { giveBack(draining) }
        draining = nil
        for epoch in unacknowledged { giveBack(epoch) }
        unacknowledged.removeAll()
        queue.clear()
        for disk in disks { disk.pending.clearAll() }
    }

    private func giveBack(_ epoch: ClosedEpoch) {
        for (disk, blocks) in zip(disks, epoch.blocks) { (epoch.isFullSync ? disk.unsynced : disk.dirty).formUnion(blocks) }
    }

    package func acknowledge(_ number: EpochNumber) {
        while let epoch = unacknowledged.first, epoch.number <= number {
            unacknowledged.removeFirst()
            if epoch.isExact, epoch.number.rawValue > hurriedAfter { urgency.hasPoint(now: LiveReconciliation.now()) }
            // First: a process that is killed after the next line has bits too many, never too few.
            maps.state.pointee.last_acknowledged = epoch.number.rawValue
            let later = unacknowledged + (draining.map { [$0] } ?? [])
            for disk in disks where !epoch.isFullSync {
                maps.acknowledge(disk: disk.index, epoch.blocks[disk.index], keep: [disk.dirty, disk.carried] + later.map { $0.blocks[disk.index] })
            }
            if epoch.isFullSync, !needsFuzzyCut, !later.contains(where: \.isFullSync) { maps.state.pointee.is_synced = 1 }
        }
    }

    // MARK: Figures

    package var statistics: SourceStatistics {
        var s = SourceStatistics()
        let unit = UInt64(blockBytes)
        for disk in disks {
            s.writtenBytes += maps.disks[disk.index].issued_sectors * 512
            s.behindBytes += disk.dirty.count * unit
            s.unsyncedBytes += disk.unsynced.count * unit
        }
        for epoch in unacknowledged + (draining.map { [$0] } ?? []) {
            let bytes = epoch.blocks.reduce(0) { $0 + $1.count } * unit
            if epoch.isFullSync { s.unsyncedBytes += bytes } else { s.behindBytes += bytes }
        }
        s.abandonedCount = abandonedCount
        s.cutCount = maps.state.pointee.last_epoch
        return s
    }

    package var liveStatistics: LiveTapStatistics {
        var s = figures
        s.openReconciliationCount = reconciliation.openCount
        s.readBytes = reader.readBytes
        s.readWaitMilliseconds = reader.waitNanoseconds / 1_000_000
        s.resizes = resizes
        for disk in disks {
            let counters = maps.disks[disk.index]
            s.issuedCount += counters.issued
            s.completedCount += counters.completed
            s.unseenCompletionCount += counters.overwritten + counters.overtaken
            s.unmatchedCount += counters.unmatched
            s.undescribedCount += counters.undescribed
            s.droppedIssueCount += counters.dropped_issues
            s.droppedCompletionCount += counters.dropped_completions
        }
        s.skippedProgramCount = recursionMisses.values.reduce(0, +)
        s.bitmapBytes = UInt64(maps.bitmapBytes)
        return s
    }

    var recursionMisses: [String: UInt64] { attachment.recursionMisses }

    /// Disks whose size is another than when the tap was attached.
    package var resizes: [LiveTapResize] {
        disks.compactMap { disk in
            let size = disk.disk.sizeBytesNow, beyond = maps.disks[disk.index].beyond
            guard size != disk.disk.geometry.sizeBytes || beyond > 0 else { return nil }
            return LiveTapResize(disk: disk.disk.name, fromBytes: disk.disk.geometry.sizeBytes, toBytes: size, writesBeyondCount: beyond)
        }
    }

    /// Words when what is attached is no longer what the disks are, but for their sizes.
    package var changedQueues: String? { disks.lazy.compactMap { self.reconciliation.changedQueues($0.index) }.first }

    private func lookForResizes() {
        for resize in resizes where resize.fromBytes != resize.toBytes {
            say(
                "size of \(resize.disk)",
                "\(resize.disk) has \(resize.toBytes) bytes now, \(resize.fromBytes) when the tap was attached: only these are followed until it is attached again")
        }
    }

    /// Tells it, unless that is what was last told of this subject.
    func say(_ subject: String, _ words: String) {
        if saidLast[subject] == words { return }
        saidLast[subject] = words
        onEvent?(words)
    }

    private static func wallClock() -> UInt64 {
        var now = timespec()
        clock_gettime(CLOCK_REALTIME, &now)
        return UInt64(now.tv_sec) * 1_000_000_000 + UInt64(now.tv_nsec)
    }
}

extension LiveEpochEngine {
    /// The identity of what is tracked: kept with it, new when it starts afresh.
    func instance() -> String {
        let bytes = UnsafeMutableRawPointer(maps.state).advanced(by: MemoryLayout<clivetap_state>.offset(of: \.instance)!)
        if isFresh {
            var generator = SystemRandomNumberGenerator()
            for i in 0..<2 { bytes.storeBytes(of: generator.next(), toByteOffset: i * 8, as: UInt64.self) }
        }
        let hex = (0..<16).map { i in
            let byte = bytes.load(fromByteOffset: i, as: UInt8.self)
            return String(byte >> 4, radix: 16) + String(byte & 15, radix: 16)
        }
        return [hex[0..<4], hex[4..<6], hex[6..<8], hex[8..<10], hex[10..<16]].map { $0.joined() }.joined(separator: "-")
    }

    func drop(_ drops: LiveTapDrops) {
        maps.state.pointee.drop_issue_burst = drops.issues.burst
        maps.state.pointee.drop_issue_period = drops.issues.period
        maps.state.pointee.drop_complete_burst = drops.completions.burst
        maps.state.pointee.drop_complete_period = drops.completions.period
    }
}

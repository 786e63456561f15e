import CLiveTap
import Glibc

/// Deliberate faults, for the tests that prove that the tests would notice.
package struct LiveTapFaults: OptionSet, Sendable {
    package let rawValue: UInt8
    package init(rawValue: UInt8) { self.rawValue = rawValue }
    /// Marking at issue alone: forget what is in flight at the cut.
    package static let forgetInFlightAtCut = LiveTapFaults(rawValue: 1)
    /// Take what was read for what was there at the cut, whatever has been written since.
    package static let skipCollisionCheck = LiveTapFaults(rawValue: 2)
    /// Clear and read the buffer that is being written.
    package static let singleBuffer = LiveTapFaults(rawValue: 4)
    /// Cut the disks of a group one after the other.
    package static let unsharedCut = LiveTapFaults(rawValue: 8)
    /// Believe the program without asking the kernel.
    package static let skipReconciliation = LiveTapFaults(rawValue: 16)
}

public struct LiveTapConfiguration: Sendable {
    /// Memory for one epoch's blocks while its rounds run; an epoch that is larger is sent without a proof, and the next one is smaller.
    public var stagingBytesMax = 64 << 20
    /// Reads in flight.
    public var readDepth = 32
    public var roundsMax = 64
    public var roundsMilliseconds = 2000
    public var reconcileMilliseconds = 50
    public var drainBufferCount = 64
    /// Mount points of the group's file systems, to be frozen when rounds do not converge; none: never.
    public var freezable: [String] = []
    public var freezeMilliseconds = 500
    public init() {}
}

/// Figures of the live tap since this process has it.
public struct LiveTapStatistics: Sendable, Codable, Hashable {
    /// Epochs proven to be crash-consistent, and exact epochs tried that were not.
    public var provenCount: UInt64 = 0
    public var unprovenCount: UInt64 = 0
    public var roundCount: UInt64 = 0
    public var roundsMax: UInt64 = 0
    /// Blocks that were written again before they had been read.
    public var collisionCount: UInt64 = 0
    /// Epochs for which the file systems were frozen, how long at most, and how often that was longer than the limit.
    public var freezeCount: UInt64 = 0
    public var freezeMillisecondsMax: Double = 0
    public var freezeFailedCount: UInt64 = 0
    /// Looks at the kernel's account that decided nothing.
    public var openReconciliationCount: UInt64 = 0
    /// Times that writes were missed and everything had to be compared or copied again; and why, the last time.
    public var resyncCount: UInt64 = 0
    public var resyncReason: String?
    /// Since the tap was attached, all disks.
    public var issuedCount: UInt64 = 0
    public var completedCount: UInt64 = 0
    /// Completions that the kernel did not show to the program (their tags were used again, or their writes' slots are still in use).
    public var unseenCompletionCount: UInt64 = 0
    public var droppedIssueCount: UInt64 = 0
    public var droppedCompletionCount: UInt64 = 0
    public var unmatchedCount: UInt64 = 0
    public var undescribedCount: UInt64 = 0
    public var bitmapBytes: UInt64 = 0
    public init() {}
}

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
        var blocks: [BlockBitmap]
    }

    package let disks: [Disk]
    let maps: LiveTapMaps
    package let queue: DrainQueue
    package var faults: LiveTapFaults = []
    /// Words for the log.
    package var onEvent: ((String) -> Void)?
    private let configuration: LiveTapConfiguration
    private let attachment: LiveTapAttachment
    private let reader: LiveReader
    private let reconciliation: LiveReconciliation
    private let stage: LiveStage
    private var draining: ClosedEpoch?
    private var isDrainingStaged = false
    private var unacknowledged: [ClosedEpoch] = []
    private var figures = LiveTapStatistics()
    private var abandonedCount: UInt64 = 0
    private var writtenBase: UInt64 = 0

    /// `isFresh`: whether what an earlier process knew is lost, or was never there.
    package private(set) var isFresh: Bool

    /// What the replica must hold, and how far numbers went, when another process's knowledge was taken over.
    var resumption: SourceResumption? {
        isFresh ? nil : SourceResumption(acknowledged: EpochNumber(maps.state.pointee.last_acknowledged), lastCut: EpochNumber(maps.state.pointee.last_epoch))
    }

    init(attachment: LiveTapAttachment, disks: [LiveDisk], configuration: LiveTapConfiguration) throws(SystemError) {
        self.attachment = attachment
        self.configuration = configuration
        maps = attachment.maps
        self.disks = disks.enumerated().map { Disk($0.element, index: $0.offset) }
        queue = DrainQueue(bufferCount: configuration.drainBufferCount)
        reader = try LiveReader()
        reconciliation = LiveReconciliation(maps: maps, disks: disks, reader: reader)
        stage = LiveStage(blockCount: configuration.stagingBytesMax / blockBytes)
        isFresh = !attachment.wasAdopted || maps.state.pointee.is_synced == 0
        if attachment.wasAdopted {
            for disk in self.disks { maps.collectOutstanding(disk: disk.index, into: disk.dirty) }
        } else {
            reconciliation.settle()
        }
    }

    // MARK: Full sync

    package func beginFullSync() {
        maps.state.pointee.is_synced = 0
        for disk in disks { disk.unsynced.setAll() }
    }

    package var needsFuzzyCut: Bool { disks.contains { !$0.unsynced.isEmpty } }

    /// Nothing is lost that a full sync does not bring back.
    private func resync(_ reason: String) {
        figures.resyncCount += 1
        figures.resyncReason = reason
        onEvent?("writes were missed, the disks are copied again: \(reason)")
        reconciliation.calibrate()
        beginFullSync()
    }

    // MARK: Cut

    package func cut(fuzzyBytesMax: UInt64, consistency: CutConsistency = .crash) throws -> Cut {
        if let draining { throw EpochError.draining(draining.number) }
        let number = EpochNumber(maps.state.pointee.last_epoch + 1)
        // Before anything can be sent under this number.
        maps.state.pointee.last_epoch = number.rawValue
        var blocks = disks.map { BlockBitmap(blockCount: $0.disk.blockCount) }
        var kind = EpochKind.fuzzy
        var isFullSync = false
        var time = Self.wallClock()
        isDrainingStaged = false
        if needsFuzzyCut {
            isFullSync = true
            takeUnsynced(into: blocks, budget: max(1, fuzzyBytesMax / UInt64(blockBytes)))
        } else {
            let outcome = try converge(&blocks)
            time = outcome.timeNanoseconds
            isDrainingStaged = outcome.isStaged
            if outcome.isProven { kind = .exact }
        }
        for (disk, blocks) in zip(disks, blocks) { disk.pending.formUnion(blocks) }
        draining = ClosedEpoch(number: number, isFullSync: isFullSync, blocks: blocks)
        let count = blocks.reduce(0) { $0 + $1.count }
        return Cut(epoch: number, kind: kind, timeNanoseconds: time, blockCount: count)
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

    private struct Outcome {
        var isProven = false
        var isStaged = true
        var timeNanoseconds: UInt64 = 0
    }

    /// Rounds until the image is proven, or the budget is used up. `blocks` becomes all that was taken.
    private func converge(_ blocks: inout [BlockBitmap]) throws(SystemError) -> Outcome {
        var outcome = Outcome()
        let deadline = LiveReconciliation.now() + UInt64(configuration.roundsMilliseconds) * 1_000_000
        var collided: [LiveStage.Place] = []
        var rounds: UInt64 = 0
        stage.clear()
        var step = Step.goOn
        repeat {
            step = try round(&blocks, &collided, &outcome)
            rounds += 1
        } while step == .goOn && rounds < UInt64(configuration.roundsMax) && LiveReconciliation.now() < deadline
        if step == .goOn, !configuration.freezable.isEmpty {
            try frozenRound(&blocks, &collided, &outcome)
            rounds += 1
        }
        figures.roundCount += rounds
        figures.roundsMax = max(figures.roundsMax, rounds)
        if outcome.isProven { figures.provenCount += 1 } else { figures.unprovenCount += 1 }
        return outcome
    }

    private enum Step { case goOn, ended }

    private func round(_ blocks: inout [BlockBitmap], _ collided: inout [LiveStage.Place], _ outcome: inout Outcome) throws(SystemError) -> Step {
        outcome.timeNanoseconds = try flip()
        var round: [BlockBitmap] = []
        for disk in disks {
            round.append(disk.dirty)
            blocks[disk.index].formUnion(disk.dirty)
            disk.dirty = BlockBitmap(blockCount: disk.disk.blockCount)
        }
        // What is too large for the stage, or cannot be read, is not handed out as if it had been read.
        guard blocks.reduce(0, { $0 + $1.count }) <= UInt64(stage.blockCount), let collisions = readRound(round, first: collided) else {
            outcome.isStaged = false
            return .ended
        }
        collided = collisions
        figures.collisionCount += UInt64(collisions.count)
        if !collisions.isEmpty { return .goOn }
        if faults.contains(.skipReconciliation) {
            outcome.isProven = true
            return .ended
        }
        switch reconciliation.verdict(withinMilliseconds: configuration.reconcileMilliseconds) {
        case .exact: outcome.isProven = true
        case .open: return .goOn
        case .missed(let reason): resync(reason)
        }
        return .ended
    }

    /// The last resort: one round while the file systems are held still. Its proof is the same: that nothing collided. (Whoever writes to the
    /// disk past the file systems is not held.)
    private func frozenRound(_ blocks: inout [BlockBitmap], _ collided: inout [LiveStage.Place], _ outcome: inout Outcome) throws(SystemError) {
        let freeze: FileSystemFreeze
        do throws(SystemError) {
            freeze = try FileSystemFreeze.hold(mountPoints: configuration.freezable, limitMilliseconds: configuration.freezeMilliseconds)
        } catch {
            figures.freezeFailedCount += 1
            onEvent?("\(error)")
            return
        }
        figures.freezeCount += 1
        // The log may lie on what is frozen.
        let log = onEvent
        var lines: [String] = []
        onEvent = { lines.append($0) }
        let result = Result { () throws(SystemError) in try round(&blocks, &collided, &outcome) }
        let (wasHeld, milliseconds) = freeze.thaw()
        onEvent = log
        for line in lines { log?(line) }
        figures.freezeMillisecondsMax = max(figures.freezeMillisecondsMax, milliseconds)
        if !wasHeld { figures.freezeFailedCount += 1 }
        _ = try result.get()
    }

    /// The cut. Afterwards `dirty` holds every block written before it since it was last read, and `carried` those that may still land.
    private func flip() throws(SystemError) -> UInt64 {
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

    private func takeCarried() {
        for disk in disks {
            disk.dirty.formUnion(disk.carried)
            disk.carried.clearAll()
            if !faults.contains(.forgetInFlightAtCut) { maps.collectInFlight(disk: disk.index, blockCount: disk.disk.blockCount, into: disk.carried) }
        }
    }

    /// Reads a round's blocks to the stage. Returns those that were written meanwhile, or nil when something could not be read.
    private func readRound(_ round: [BlockBitmap], first: [LiveStage.Place]) -> [LiveStage.Place]? {
        var ranges: [LiveReader.Range] = []
        var places: [(disk: Int, block: UInt64, count: Int)] = []
        func add(_ disk: Int, _ block: UInt64) {
            let slot = stage.slot(disk: disk, block: block)
            let memory = stage.memory(slot)
            let size = disks[disk].disk.geometry.sizeBytes
            let length = Int(min(UInt64(blockBytes), size - block * UInt64(blockBytes)))
            if let last = places.last, last.disk == disk, last.block + UInt64(last.count) == block, last.count < 32,
                ranges[ranges.count - 1].memory + ranges[ranges.count - 1].lengthBytes == memory
            {
                places[places.count - 1].count += 1
                ranges[ranges.count - 1].lengthBytes += length
            } else {
                places.append((disk, block, 1))
                ranges.append(.init(fd: disks[disk].disk.device.fd, offsetBytes: block * UInt64(blockBytes), lengthBytes: length, memory: memory))
            }
        }
        for place in first where round[place.disk].contains(place.block) {
            round[place.disk].clear(first: place.block, length: 1)
            add(place.disk, place.block)
        }
        for (disk, blocks) in round.enumerated() {
            blocks.forEachSetWord { word, bits in
                var rest = bits
                while rest != 0 {
                    add(disk, UInt64(word * 64 + rest.trailingZeroBitCount))
                    rest &= rest &- 1
                }
            }
        }
        var collisions: [LiveStage.Place] = []
        var hasFailed = false
        reader.read(ranges, depth: configuration.readDepth) { index, succeeded in
            if !succeeded { hasFailed = true }
            let place = places[index]
            for block in place.block..<place.block + UInt64(place.count) where maps.isIssued(disk: place.disk, block: block) {
                collisions.append(.init(disk: place.disk, block: block))
            }
        }
        if hasFailed { return nil }
        return faults.contains(.skipCollisionCheck) ? [] : collisions
    }

    // MARK: Drain

    /// Hands out what there is room for. Returns whether there may be more at once; otherwise the queue says when.
    package func pump() -> Bool {
        guard let epoch = draining else { return false }
        var runs: [(disk: Disk, first: UInt64, count: UInt64, slot: Int)] = []
        var isStarved = false
        fill: for disk in disks {
            while let block = disk.pending.nextSet(from: 0) {
                guard runs.count < 8 else { break fill }
                guard let slot = queue.takeBuffer() else {
                    isStarved = true
                    break fill
                }
                let count: UInt64 = disk.pending.runLength(first: block, limit: UInt64(DrainQueue.bufferBytes / blockBytes))
                disk.pending.clear(first: block, length: count)
                runs.append((disk, block, count, slot))
            }
        }
        if runs.isEmpty {
            if isStarved { return false }
            draining = nil
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
            reader.read(ranges, depth: configuration.readDepth) { index, succeeded in if !succeeded { failed[index] = true } }
        }
        if failed.contains(true) {
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
        s.bitmapBytes = UInt64(maps.bitmapBytes)
        return s
    }

    var recursionMisses: [String: UInt64] { attachment.recursionMisses }

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

    func drop(issues: (period: UInt64, burst: UInt64), completions: (period: UInt64, burst: UInt64)) {
        maps.state.pointee.drop_issue_burst = issues.burst
        maps.state.pointee.drop_issue_period = issues.period
        maps.state.pointee.drop_complete_burst = completions.burst
        maps.state.pointee.drop_complete_period = completions.period
    }
}

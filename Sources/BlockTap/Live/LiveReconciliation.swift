import CLiveTap
import Glibc

/// Whether the kernel's half has seen every write, told by the kernel's own account of the disk.
///
/// In sectors, from the moment of attachment: issued (seen by the program) + missed = completed (the kernel's account) + really in flight.
/// The slots hold what is in flight or ended unseen, never less than what is in flight. So
///
///     excess = completed − issued + slots = missed + ended unseen        ≥ 0
///     floor  = completed − issued         = missed − really in flight
///
/// excess = 0 proves that nothing was missed of what has ended. floor > 0 proves that something was. In between, the next look decides: a tag
/// that is used again frees its slot, and a few reads use all of them.
final class LiveReconciliation {
    enum Verdict: Equatable {
        case exact
        /// Not known this time: completions that were not seen, or no quiet moment to look.
        case open
        case missed(String)
        /// A disk was written where it had nothing when it was attached.
        case outgrown(String)
    }

    private let maps: LiveTapMaps
    private let disks: [LiveDisk]
    private let reader: LiveReader
    private let probeMemory: UnsafeMutableRawPointer
    private(set) var openCount: UInt64 = 0
    private(set) var flushCount: UInt64 = 0

    /// Verdicts in a row that stayed open although there were sharp looks.
    private var openStreak = 0
    private static let openStreakMax = 100

    private static let probeBytes = blockBytes
    private static let settleNanoseconds: UInt64 = 5_000_000_000

    init(maps: LiveTapMaps, disks: [LiveDisk], reader: LiveReader) {
        self.maps = maps
        self.disks = disks
        self.reader = reader
        probeMemory = .allocate(byteCount: Self.probeBytes * LiveReader.depthMax, alignment: blockBytes)
    }

    deinit { probeMemory.deallocate() }

    struct Sample {
        /// No event between the first and the last look.
        var isSharp: Bool
        var excess: Int64
        var floor: Int64
    }

    func sample(_ index: Int) -> Sample {
        let before = events(index)
        let slots = maps.sectorsInFlight(disk: index)
        let issued = issuedSectors(index)
        let completed = disks[index].statistics.completedSectors() - maps.disks[index].baseline_sectors
        let issuedAfter = issuedSectors(index)
        return Sample(isSharp: before == events(index), excess: completed - issued + slots, floor: completed - issuedAfter)
    }

    private func issuedSectors(_ index: Int) -> Int64 {
        let disk = maps.disks + index
        // Requeued first: what is requeued between the two looks must not seem to be missing.
        let requeued = Int64(bitPattern: load(disk, \.requeued_sectors))
        return Int64(bitPattern: load(disk, \.issued_sectors)) - requeued
    }

    private func events(_ index: Int) -> UInt64 {
        let disk = maps.disks + index
        return load(disk, \.issued) &+ load(disk, \.completed) &+ load(disk, \.overtaken) &+ load(disk, \.overwritten)
            &+ load(disk, \.unmatched) &+ load(disk, \.requeued)
    }

    private func load(_ disk: UnsafeMutablePointer<clivetap_disk>, _ field: KeyPath<clivetap_disk, UInt64>) -> UInt64 {
        clivetap_load_word(UnsafeRawPointer(disk).advanced(by: MemoryLayout<clivetap_disk>.offset(of: field)!).assumingMemoryBound(to: UInt64.self))
    }

    /// One disk's looks of one verdict.
    private struct Looks {
        /// When it was first seen to agree, in a row.
        var agreedSince: UInt64?
        /// … because the driver had no write, and these were the events so far.
        var quietEvents: UInt64?
        /// A sharp look had something in slots that nothing explains.
        var hasLeftOver = false
        /// Of the last sharp look, and if that is too low: since when it has been just that, and how often.
        var negative: (excess: Int64, since: UInt64, count: Int) = (0, 0, 0)
    }

    /// Looks until every disk was seen to agree, for at most `milliseconds`: twice, a millisecond apart. (Between the program and the kernel's account a
    /// completion is in neither, for nanoseconds, and could make up for a write that was missed.)
    func verdict(withinMilliseconds milliseconds: Int) -> Verdict {
        let deadline = Self.now() + UInt64(milliseconds) * 1_000_000
        var open = Array(disks.indices)
        var looks = Array(repeating: Looks(), count: disks.count)
        var turn = 0
        var wasSharp = false
        while true {
            for index in open {
                if let words = outgrown(index) { return .outgrown(words) }
                if let words = missing(index) { return .missed(words) }
                let sample = sample(index)
                if sample.floor > 0 { return .missed("\(disks[index].name): \(sample.floor) sectors were written and not seen to be issued") }
                guard sample.isSharp else { continue }
                wasSharp = true
                if agrees(index, sample, &looks[index]) { open.removeAll { $0 == index } }
            }
            if open.isEmpty {
                openStreak = 0
                return .exact
            }
            turn += 1
            let now = Self.now()
            if now > deadline {
                openCount += 1
                if wasSharp { openStreak += 1 }
                guard openStreak > Self.openStreakMax else { return .open }
                openStreak = 0
                let names = open.map { disks[$0].name + (disks[$0].statistics.isKept ? "" : " (its I/O statistics are off)") }
                return .missed("\(names.joined(separator: ", ")): what was seen and the kernel's account have not agreed for long")
            }
            if open.allSatisfy({ looks[$0].agreedSince.map { now - $0 < Self.apartNanoseconds } ?? false }) {
                usleep(UInt32(Self.apartNanoseconds / 1000 / 4))
            } else if turn % 16 == 8 {
                for index in open where looks[index].hasLeftOver { useTags(index, of: maps.queuesInFlight(disk: index), until: deadline) }
            }
        }
    }

    private static let apartNanoseconds: UInt64 = 1_000_000

    /// Of a sharp look: whether it is one of two that agree.
    private func agrees(_ index: Int, _ sample: Sample, _ looks: inout Looks) -> Bool {
        let now = Self.now()
        if sample.excess != looks.negative.excess { looks.negative = (sample.excess, now, 0) }
        var quiet: UInt64?
        if sample.excess > 0, sample.floor == 0 {
            // What is in slots has ended unseen if the driver has no write, and goes on having none.
            let events = events(index)
            if disks[index].statistics.writesInFlight() == 0, events == self.events(index) { quiet = events }
        }
        if sample.excess == 0 || quiet != nil {
            if looks.agreedSince == nil || quiet != looks.quietEvents { (looks.agreedSince, looks.quietEvents) = (now, quiet) }
            return now - looks.agreedSince! >= Self.apartNanoseconds
        }
        looks.agreedSince = nil
        if sample.excess > 0 { looks.hasLeftOver = true }
        if sample.excess < 0, UInt64(-sample.excess) <= maps.disks[index].baseline_slack {
            // A baseline taken while completions were unseen is too high. (A completion on its way from the program to the kernel's account looks the
            // same, but does not last.)
            looks.negative.count += 1
            if looks.negative.count >= 4, now - looks.negative.since >= 5 * Self.apartNanoseconds, disks[index].statistics.isKept {
                maps.disks[index].baseline_sectors += sample.excess
                maps.disks[index].baseline_slack -= UInt64(-sample.excess)
                looks.negative = (0, 0, 0)
            }
        }
        return false
    }

    private func missing(_ index: Int) -> String? {
        let disk = maps.disks[index], name = disks[index].name
        let unmatched = disk.unmatched - disk.baseline_unmatched
        if unmatched > 0 { return "\(name): \(unmatched) writes ended that were not seen to be issued" }
        // Nobody knows which blocks, and the kernel's account leaves such commands out.
        let undescribed = disk.undescribed - disk.baseline_undescribed
        if undescribed > 0 { return "\(name): it was sent a command past the block layer (SG_IO, NVMe pass-through), and what that wrote is not known" }
        return nil
    }

    /// Nothing was missed of what is followed, but that is not the whole disk any more. (The last block may have been a part of one.)
    private func outgrown(_ index: Int) -> String? {
        if let words = changedQueues(index) { return "\(words): no point is proven until the tap is attached again" }
        let disk = disks[index], beyond = maps.disks[index].beyond, size = disk.sizeBytesNow
        let hasNewPart = size > disk.geometry.sizeBytes && disk.geometry.sizeBytes % UInt64(blockBytes) != 0
        guard beyond > 0 || hasNewPart else { return nil }
        return "\(disk.name): \(beyond) writes past its end as it was when the tap was attached (\(disk.geometry.sizeBytes) bytes, now \(size)): no point is proven until the tap is attached again"
    }

    /// Words when a disk has more hardware queues, or tags, than when the tap was attached: what is in flight there is not known.
    func changedQueues(_ index: Int) -> String? {
        let disk = maps.disks[index]
        guard disk.unslotted > 0 else { return nil }
        return "\(disks[index].name): \(disk.unslotted) writes went by queues or tags that it did not have when the tap was attached (\(disk.queue_count) queues of \(disk.tag_count))"
    }

    /// As many small reads at once as the disk has tags: a tag that a read has got is not a write's any more, and its slot is freed. Once per hardware queue, on a
    /// processor that uses it.
    private func useTags(_ index: Int, of queues: [Int], until deadline: UInt64) {
        flushCount += 1
        let disk = disks[index]
        let count = min(disk.tagCount, LiveReader.depthMax)
        // Far apart, so that the kernel does not make one request of two.
        let stride = max(UInt64(Self.probeBytes) * 2, disk.geometry.sizeBytes / UInt64(count) / UInt64(blockBytes) * UInt64(blockBytes))
        let length = Self.probeBytes
        let ranges = (0..<count).map { i in
            LiveReader.Range(
                fd: disk.device.fd, offsetBytes: UInt64(i) * stride % max(UInt64(length), disk.geometry.sizeBytes / UInt64(length) * UInt64(length)) / UInt64(length) * UInt64(length),
                lengthBytes: length, memory: probeMemory + i * length)
        }
        defer { _ = clivetap_run_on(-1) }
        for queue in queues {
            // Not every one of them may be ours to use, or be there now.
            if disk.queueCount > 1, !(disk.processors[queue] ?? []).contains(where: { clivetap_run_on(Int32($0)) == 0 }) { continue }
            reader.read(ranges, depth: count) { _, _ in }
            if Self.now() > deadline { return }
        }
    }

    /// After attaching: waits until every write that was in flight before is known to have ended (all tags seen, or nothing in flight),
    /// five seconds at most, then takes the baseline.
    func settle() {
        let deadline = Self.now() + Self.settleNanoseconds
        for index in disks.indices {
            while !maps.isEveryTagSeen(disk: index), disks[index].statistics.writesInFlight() != 0, Self.now() < deadline {
                useTags(index, of: Array(0..<disks[index].queueCount), until: deadline)
                usleep(1000)
            }
        }
        calibrate()
    }

    /// Takes as missed nothing so far. Two looks a while apart must agree: what is on its way from the program's account to the kernel's is
    /// not there any more at the second one.
    func calibrate() {
        for index in disks.indices {
            let deadline = Self.now() + Self.settleNanoseconds
            var last: Int64?
            var look = 0
            repeat {
                if look % 64 == 0, maps.sectorsInFlight(disk: index) > 0 { useTags(index, of: maps.queuesInFlight(disk: index), until: deadline) }
                look += 1
                let sample = sample(index)
                guard sample.isSharp else { continue }
                let baseline = maps.disks[index].baseline_sectors + sample.excess
                if baseline == last { break }
                last = baseline
                usleep(1000)
            } while look < 200 || last == nil && Self.now() < deadline
            // Without any: after attaching the next verdict is that something was missed, and it is tried again; else the baseline of before stays.
            if let last { maps.disks[index].baseline_sectors = last }
            maps.disks[index].baseline_slack = UInt64(max(0, maps.sectorsInFlight(disk: index)))
            maps.disks[index].baseline_unmatched = maps.disks[index].unmatched
            maps.disks[index].baseline_undescribed = maps.disks[index].undescribed
        }
    }

    static func now() -> UInt64 {
        var time = timespec()
        clock_gettime(CLOCK_MONOTONIC, &time)
        return UInt64(time.tv_sec) * 1_000_000_000 + UInt64(time.tv_nsec)
    }
}

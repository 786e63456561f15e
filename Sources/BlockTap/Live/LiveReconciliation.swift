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
/// excess = 0 proves that nothing was missed so far. floor > 0 proves that something was. In between, the next look decides: a tag
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

    /// Looks until every disk was seen to agree, for at most `milliseconds`.
    func verdict(withinMilliseconds milliseconds: Int) -> Verdict {
        let deadline = Self.now() + UInt64(milliseconds) * 1_000_000
        var open = Array(disks.indices)
        var negative = Array(repeating: (excess: Int64(0), count: 0), count: disks.count)
        var looks = 0
        var wasSharp = false
        while true {
            for index in open {
                if let words = missing(index) { return .missed(words) }
                if let words = outgrown(index) { return .outgrown(words) }
                let sample = sample(index)
                if sample.floor > 0 { return .missed("\(disks[index].name): \(sample.floor) sectors were written and not seen to be issued") }
                guard sample.isSharp else { continue }
                wasSharp = true
                if sample.excess == 0 {
                    open.removeAll { $0 == index }
                } else if sample.excess < 0, UInt64(-sample.excess) <= maps.disks[index].baseline_slack {
                    // A baseline taken while completions were unseen is too high. (A completion on its way from the program to the
                    // kernel's account looks the same, but lasts nanoseconds, not several looks.)
                    negative[index] = sample.excess == negative[index].excess ? (sample.excess, negative[index].count + 1) : (sample.excess, 1)
                    if negative[index].count == 4, disks[index].statistics.isKept {
                        maps.disks[index].baseline_sectors += sample.excess
                        maps.disks[index].baseline_slack -= UInt64(-sample.excess)
                        negative[index] = (0, 0)
                    }
                }
            }
            if open.isEmpty {
                openStreak = 0
                return .exact
            }
            looks += 1
            if Self.now() > deadline {
                openCount += 1
                if wasSharp { openStreak += 1 }
                guard openStreak > Self.openStreakMax else { return .open }
                openStreak = 0
                let names = open.map { disks[$0].name + (disks[$0].statistics.isKept ? "" : " (its I/O statistics are off)") }
                return .missed("\(names.joined(separator: ", ")): what was seen and the kernel's account have not agreed for long")
            }
            if looks % 16 == 8 { for index in open { useAllTags(index) } }
        }
    }

    private func missing(_ index: Int) -> String? {
        let disk = maps.disks[index], name = disks[index].name
        let unmatched = disk.unmatched - disk.baseline_unmatched
        if unmatched > 0 { return "\(name): \(unmatched) writes ended that were not seen to be issued" }
        if disk.unslotted > 0 { return "\(name): \(disk.unslotted) writes had a tag past \(disk.queue_count) queues of \(disk.tag_count) (were its queues changed?)" }
        return nil
    }

    /// Nothing was missed of what is followed, but that is not the whole disk any more. (The last block may have been a part of one.)
    private func outgrown(_ index: Int) -> String? {
        let disk = disks[index], beyond = maps.disks[index].beyond, size = disk.sizeBytesNow
        let hasNewPart = size > disk.geometry.sizeBytes && disk.geometry.sizeBytes % UInt64(blockBytes) != 0
        guard beyond > 0 || hasNewPart else { return nil }
        return "\(disk.name): \(beyond) writes past its end as it was when the tap was attached (\(disk.geometry.sizeBytes) bytes, now \(size)): no point is proven until the tap is attached again"
    }

    /// As many small reads at once as the disk has tags: a tag that a read has got is not a write's any more, and its slot is freed. Once per hardware queue, on a
    /// processor that uses it.
    func useAllTags(_ index: Int) {
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
        for processor in disk.processors {
            if disk.processors.count > 1, clivetap_run_on(Int32(processor)) < 0 { continue }
            reader.read(ranges, depth: count) { _, _ in }
        }
    }

    /// After attaching: waits until every write that was in flight before is known to have ended (all tags seen, or nothing in flight),
    /// five seconds at most, then takes the baseline.
    func settle() {
        let deadline = Self.now() + Self.settleNanoseconds
        for index in disks.indices {
            while !maps.isEveryTagSeen(disk: index), disks[index].statistics.writesInFlight() != 0, Self.now() < deadline {
                useAllTags(index)
                usleep(1000)
            }
        }
        calibrate()
    }

    /// Takes as missed nothing so far. Two looks a while apart must agree: what is on its way from the program's account to the kernel's is
    /// not there any more at the second one.
    func calibrate() {
        for index in disks.indices {
            var last: Int64?
            for look in 0..<200 {
                if look % 16 == 0 { useAllTags(index) }
                let sample = sample(index)
                guard sample.isSharp else { continue }
                let baseline = maps.disks[index].baseline_sectors + sample.excess
                if baseline == last { break }
                last = baseline
                usleep(1000)
            }
            if let last { maps.disks[index].baseline_sectors = last }
            maps.disks[index].baseline_slack = UInt64(maps.sectorsInFlight(disk: index))
            maps.disks[index].baseline_unmatched = maps.disks[index].unmatched
            maps.disks[index].unslotted = 0
        }
    }

    static func now() -> UInt64 {
        var time = timespec()
        clock_gettime(CLOCK_MONOTONIC, &time)
        return UInt64(time.tv_sec) * 1_000_000_000 + UInt64(time.tv_nsec)
    }
}

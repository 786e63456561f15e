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
        /// Looking more often does not help.
        case unknown(String)
        case missed(String)
        /// A disk was written where it had nothing when it was attached.
        case outgrown(String)
    }

    let maps: LiveTapMaps
    let disks: [LiveDisk]
    private let reader: LiveReader
    private let probeMemory: UnsafeMutableRawPointer
    private(set) var openCount: UInt64 = 0

    /// Verdicts in a row that stayed open although there were sharp looks.
    private var openStreak = 0
    private static let openStreakMax = 100

    /// Of each disk, at the last verdict that was exact: requests sent back so far.
    private var requeuedAtAgreement: [UInt64]
    var faults: LiveTapFaults = []

    private static let probeBytes = blockBytes

    init(maps: LiveTapMaps, disks: [LiveDisk], reader: LiveReader) {
        self.maps = maps
        self.disks = disks
        self.reader = reader
        requeuedAtAgreement = disks.indices.map { maps.disks[$0].requeued }
        probeMemory = .allocate(byteCount: Self.probeBytes * LiveReader.depthMax, alignment: blockBytes)
    }

    deinit { probeMemory.deallocate() }

    /// One disk's accounts at one moment, in sectors from its baseline on.
    struct Look {
        /// No event between the first and the last of the numbers.
        var isSharp: Bool
        /// So far.
        var events: UInt64
        var requeued: UInt64
        /// Events that may have freed the slot of a write that had ended unseen.
        var freed: UInt64
        /// In slots.
        var slots: Int64
        var excess: Int64
        var floor: Int64
        /// Completed by the kernel's account and not seen to be: only grows, but for what is on its way from the program to that account.
        var unseen: Int64
    }

    func look(_ index: Int) -> Look {
        let disk = maps.disks + index
        let before = events(index), requeued = load(disk, \.requeued)
        let freed = load(disk, \.overtaken) &+ load(disk, \.overwritten) &+ load(disk, \.unmatched) &+ requeued
        let slots = maps.sectorsInFlight(disk: index)
        let issued = issuedSectors(index)
        let seen = Int64(bitPattern: load(disk, \.completed_sectors) &+ load(disk, \.unmatched_sectors))
        let completed = disks[index].statistics.completedSectors() - disk.pointee.baseline_sectors
        let floor = completed - issuedSectors(index)
        return Look(
            isSharp: before == events(index), events: before, requeued: requeued, freed: freed, slots: slots, excess: completed - issued + slots, floor: floor, unseen: completed - seen)
    }

    /// What was seen to be issued, and of what was not, what was seen to end: of that no account is needed.
    private func issuedSectors(_ index: Int) -> Int64 {
        let disk = maps.disks + index
        // Requeued first: what is requeued between the two looks must not seem to be missing.
        let requeued = Int64(bitPattern: load(disk, \.requeued_sectors))
        return Int64(bitPattern: load(disk, \.issued_sectors) &+ load(disk, \.unmatched_sectors)) - requeued
    }

    func events(_ index: Int) -> UInt64 {
        let disk = maps.disks + index
        return load(disk, \.issued) &+ load(disk, \.completed) &+ load(disk, \.overtaken) &+ load(disk, \.overwritten)
            &+ load(disk, \.unmatched) &+ load(disk, \.requeued)
    }

    private func load(_ disk: UnsafeMutablePointer<clivetap_disk>, _ field: KeyPath<clivetap_disk, UInt64>) -> UInt64 {
        clivetap_load_word(UnsafeRawPointer(disk).advanced(by: MemoryLayout<clivetap_disk>.offset(of: field)!).assumingMemoryBound(to: UInt64.self))
    }

    /// Whether the driver has no write, at a moment with so many events.
    func isQuiet(_ index: Int, events: UInt64) -> Bool { disks[index].statistics.writesInFlight() == 0 && events == self.events(index) }

    // MARK: Verdict

    private enum Finding: Equatable {
        case agrees
        /// … because the driver has no write, with so many events so far: what is in slots has ended.
        case agreesQuietly(events: UInt64)
        /// The accounts differ in what cannot be, by so much.
        case below(Int64)
    }

    /// One disk's findings of one verdict.
    private struct Findings {
        /// Of the pass before, or of this one; and passes in a row with that.
        var last: Finding?
        var passCount = 0
        /// In this pass, sharp looks in a row with this excess, and the events at the first of them.
        var run: (excess: Int64, count: Int, events: UInt64) = (0, 0, 0)
        /// What freed slots by the last sharp look that had something in slots which nothing explains.
        var leftOverAt: UInt64?
        /// Events when reads had used the tags.
        var usedTagsAt: UInt64?
        /// Nothing was missing at some look, or another completion was on its way.
        var hasSeenNone = false
    }

    private static let runMin = 8
    private static let passesMin = 2
    /// … where what was left over at one look was not at the next, though nothing has freed a slot.
    private static let passesMinUnexplained = 4
    private static let passesMax = 10

    /// Looks until every disk was found to agree in two passes, between which every processor has left what it was in: a processor that stands still between the program and
    /// the kernel's account (its host may let it stand for long) has a completion in neither, which could make up for a write that was missed. For at most
    /// `milliseconds`, not counting what is between the passes.
    func verdict(withinMilliseconds milliseconds: Int) -> Verdict {
        if let verdict = unaccounted() ?? retakeBaselines() { return verdict }
        var deadline = Self.now() + UInt64(milliseconds) * 1_000_000
        var findings = Array(repeating: Findings(), count: disks.count)
        var open = Array(disks.indices)
        var wasSharp = false
        for _ in 0..<Self.passesMax {
            var pass = open
            for index in pass { findings[index].run.count = 0 }
            var turn = 0
            while true {
                for index in pass {
                    let look = look(index)
                    if let verdict = missing(index, look) { return verdict }
                    guard look.isSharp else { continue }
                    wasSharp = true
                    if find(index, look, &findings[index]) { pass.removeAll { $0 == index } }
                }
                if pass.isEmpty { break }
                if Self.now() > deadline { return undecided(open, findings, wasSharp: wasSharp) }
                turn += 1
                for index in pass where findings[index].leftOverAt != nil {
                    let events = events(index)
                    guard turn % 16 == 8 || findings[index].usedTagsAt != events && isQuiet(index, events: events) else { continue }
                    findings[index].usedTagsAt = useTags(index, of: maps.queuesInFlight(disk: index), until: deadline) ? self.events(index) : nil
                }
            }
            open.removeAll { hasAgreed(findings[$0]) }
            if open.isEmpty { return agreed() }
            if let index = open.first(where: { if case .below = findings[$0].last { findings[$0].passCount >= Self.passesMinUnexplained } else { false } }) {
                return missedUnknown([index], "\(disks[index].name): more writes were seen than the kernel's account has")
            }
            let began = Self.now()
            Self.letProcessorsPass()
            deadline += Self.now() - began
        }
        return undecided(open, findings, wasSharp: wasSharp)
    }

    /// Of a sharp look: whether it is what this pass was for.
    private func find(_ index: Int, _ look: Look, _ findings: inout Findings) -> Bool {
        if look.excess != findings.run.excess || findings.run.count == 0 { findings.run = (look.excess, 0, look.events) }
        findings.run.count += 1
        if look.excess == 0 { findings.hasSeenNone = true }
        let finding: Finding
        if look.excess > 0 {
            findings.leftOverAt = look.freed
            // Whoever agreed before must do so again from the start: among enough looks there is one at which another completion is in neither account.
            if case .agrees = findings.last { (findings.last, findings.passCount) = (nil, 0) }
            guard look.floor == 0, findings.usedTagsAt == look.events, isQuiet(index, events: look.events) else { return false }
            finding = .agreesQuietly(events: look.events)
        } else {
            guard findings.run.count >= Self.runMin else { return false }
            // On a busy disk not all of them while one processor stood still.
            if look.excess == 0, look.events == findings.run.events, !isQuiet(index, events: look.events) { return false }
            finding = look.excess == 0 ? .agrees : .below(look.excess)
            // What was left over has been freed.
            if let freed = findings.leftOverAt, freed != look.freed { findings.leftOverAt = nil }
        }
        findings.passCount = finding == findings.last ? findings.passCount + 1 : 1
        findings.last = finding
        return true
    }

    private func hasAgreed(_ findings: Findings) -> Bool {
        switch findings.last {
        case .agrees: findings.passCount >= (findings.leftOverAt == nil ? Self.passesMin : Self.passesMinUnexplained)
        case .agreesQuietly: findings.passCount >= Self.passesMin
        case .below, nil: false
        }
    }

    /// Each has, but not at the same time.
    private func agreed() -> Verdict {
        for index in disks.indices {
            let look = look(index)
            if let verdict = missing(index, look) { return verdict }
        }
        if let verdict = unaccounted() { return verdict }
        openStreak = 0
        for index in disks.indices { requeuedAtAgreement[index] = maps.disks[index].requeued }
        return .exact
    }

    /// After the look: what has ended by then must not be taken for seen by it.
    private func missing(_ index: Int, _ look: Look) -> Verdict? {
        if let words = outgrown(index) { return .outgrown(words) }
        if let words = missedForSure(index) { return .missed(words) }
        guard look.floor > 0, isNothingSentBack(index, look) else { return nil }
        return missedUnknown([index], "\(disks[index].name): \(look.floor) sectors were written and not seen to be issued")
    }

    /// Also when a disk is gone.
    private func unaccounted() -> Verdict? {
        guard let disk = disks.first(where: { !$0.statistics.isKept }) else { return nil }
        openCount += 1
        return .unknown("\(disk.name): its I/O statistics are off (queue/iostats)")
    }

    /// What was sent back and is not issued again is in slots, and not in `issued`.
    private func isNothingSentBack(_ index: Int, _ look: Look) -> Bool { look.floor > look.slots || maps.disks[index].requeued == requeuedAtAgreement[index] }

    private func undecided(_ open: [Int], _ findings: [Findings], wasSharp: Bool) -> Verdict {
        openCount += 1
        // What is missing is missing at every look. Completions that are not shown, one after the other, are not that.
        let without = open.filter { !findings[$0].hasSeenNone }
        if wasSharp, !without.isEmpty { openStreak += 1 }
        guard openStreak > Self.openStreakMax, !without.isEmpty else { return .open }
        openStreak = 0
        return missedUnknown(without, "\(names(without)): what was seen and the kernel's account have not agreed for long")
    }

    private func names(_ indices: [Int]) -> String { indices.map { disks[$0].name }.joined(separator: ", ") }

    /// How much was missed is not known: their baselines must be taken anew.
    private func missedUnknown(_ indices: [Int], _ words: String) -> Verdict {
        for index in indices { maps.disks[index].is_calibrated = 0 }
        return .missed(words)
    }

    var lacksBaseline: Bool { disks.indices.contains { maps.disks[$0].is_calibrated == 0 } }

    /// Nil when there is a baseline for every disk. Otherwise nothing is known of what was written since the last one.
    private func retakeBaselines() -> Verdict? {
        guard lacksBaseline else { return nil }
        // Also by whoever takes over from a process that is killed as soon as there is one.
        maps.state.pointee.is_synced = 0
        let without = disks.indices.filter { maps.disks[$0].is_calibrated == 0 }
        let limit = Self.now() + Self.baselineNanoseconds
        guard without.allSatisfy({ takeBaseline($0, until: limit) }) else {
            openCount += 1
            return .unknown("\(names(without)): it is not known what is in flight; when it is, everything is compared with the replica, or copied again")
        }
        return .missed("\(names(without)): it was not known what was in flight")
    }

    /// Every processor leaves the interrupt, or the program of ours, that it was in.
    static func letProcessorsPass() {
        // With one processor the kernel has nothing to wait for; but work that an interrupt has left to a thread.
        if sysconf(Int32(_SC_NPROCESSORS_ONLN)) <= 1 { usleep(visitMicroseconds) } else if clivetap_let_processors_pass() != 0 { visitProcessors() }
    }

    /// The same where the kernel does not offer it (nohz_full): a thread runs on a processor only after that. Those that are not ours to use are left out.
    static func visitProcessors() {
        for processor in 0..<max(1, sysconf(Int32(_SC_NPROCESSORS_CONF))) { _ = clivetap_run_on(Int32(processor)) }
        _ = clivetap_run_on(-1)
        usleep(visitMicroseconds)
    }

    private static let visitMicroseconds: UInt32 = 5000

    private func missedForSure(_ index: Int) -> String? {
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
    /// processor that uses it. Whether there was time for all of them.
    @discardableResult
    func useTags(_ index: Int, of queues: [Int], until deadline: UInt64) -> Bool {
        if faults.contains(.leaveTags) { return true }
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
        for (number, queue) in queues.enumerated() {
            // Not every one of them may be ours to use, or be there now.
            if disk.queueCount > 1, !(disk.processors[queue] ?? []).contains(where: { clivetap_run_on(Int32($0)) == 0 }) { continue }
            reader.read(ranges, depth: count) { _, _ in }
            if Self.now() > deadline { return number == queues.count - 1 }
        }
        return true
    }

    static func now() -> UInt64 {
        var time = timespec()
        clock_gettime(CLOCK_MONOTONIC, &time)
        return UInt64(time.tv_sec) * 1_000_000_000 + UInt64(time.tv_nsec)
    }
}

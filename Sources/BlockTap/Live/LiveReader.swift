import CIoUring
import CLiveTap
import Glibc

/// Reads of many ranges, many at once, waiting for all of them: the live tap's thread has nothing else to do meanwhile. Confined to one thread.
final class LiveReader {
    private var ring: Ring
    static let depthMax = 1024

    struct Range {
        var fd: Int32
        var offsetBytes: UInt64
        var lengthBytes: Int
        var memory: UnsafeMutableRawPointer
    }

    /// What others on these disks are spared; nil: nothing.
    struct Consideration {
        var priority: LiveReadPriority
        /// Whether the limit in bytes per second holds.
        var isBudgeted = true
        /// Reads give way to others until then (monotonic clock); 0: they do not.
        var givesWayUntil: UInt64 = 0
    }

    private var budget: LiveReadBudget
    private(set) var pace = LiveReadPace()
    private var priority = LiveReadPriority.normal
    private(set) var readBytes: UInt64 = 0
    private(set) var waitNanoseconds: UInt64 = 0

    init(bytesPerSecondMax: UInt64 = 0) throws(SystemError) {
        ring = try Ring(entries: UInt32(Self.depthMax))
        budget = LiveReadBudget(bytesPerSecond: bytesPerSecondMax)
    }

    /// `ended(index, succeeded)` is called right after that range has been read, before the next one is looked at.
    func read(_ ranges: [Range], depth: Int, considering: Consideration? = nil, _ ended: (Int, Bool) -> Void) {
        let depthMax = min(max(1, depth), Self.depthMax)
        setPriority(considering?.priority ?? .normal)
        let givesWayUntil = considering?.givesWayUntil ?? 0
        var submittedAt: [UInt64] = givesWayUntil > 0 ? Array(repeating: 0, count: ranges.count) : []
        withUnsafeTemporaryAllocation(of: ciouring_completion.self, capacity: Ring.reapMax) { completions in
            var next = 0
            var inFlight = 0
            while next < ranges.count || inFlight > 0 {
                let givesWay = givesWayUntil > 0 && LiveReconciliation.now() < givesWayUntil
                let depth = givesWay ? min(depthMax, pace.depth) : depthMax
                if givesWay, inFlight == 0, pace.pauseNanoseconds > 0 { usleep(UInt32(min(pace.pauseNanoseconds / 1000, 20_000))) }
                while next < ranges.count, inFlight < depth {
                    if considering?.isBudgeted == true {
                        if case let wait = budget.wait(now: LiveReconciliation.now()), wait > 0 {
                            // What has been read is looked at first: a check that comes late finds collisions that were none.
                            if inFlight > 0 { break }
                            usleep(UInt32(min(wait / 1000 + 1, 100_000)))
                            waitNanoseconds += min(wait, 100_000_000)
                            continue
                        }
                        budget.take(bytes: ranges[next].lengthBytes, now: LiveReconciliation.now())
                    }
                    readBytes += UInt64(ranges[next].lengthBytes)
                    if givesWayUntil > 0 { submittedAt[next] = LiveReconciliation.now() }
                    submit(ranges[next], token: UInt64(next))
                    next += 1
                    inFlight += 1
                }
                ring.submitAndWait()
                let count = ring.reap(into: completions.baseAddress!)
                let now = givesWayUntil > 0 ? LiveReconciliation.now() : 0
                for i in 0..<count {
                    let index = Int(completions[i].user_data)
                    let result = completions[i].res
                    if result == -EINTR || result == -EAGAIN {
                        submit(ranges[index], token: UInt64(index))
                        continue
                    }
                    inFlight -= 1
                    if givesWayUntil > 0 { pace.ended(bytes: ranges[index].lengthBytes, afterNanoseconds: now - submittedAt[index], now: now, depthMax: depthMax) }
                    ended(index, Int(result) == ranges[index].lengthBytes)
                }
            }
        }
    }

    private func submit(_ range: Range, token: UInt64) {
        while !ciouring_prep_read(ring.raw, range.fd, range.memory, UInt32(range.lengthBytes), range.offsetBytes, token) { ring.makeRoom() }
    }

    /// The thread's, which its requests inherit. Only a hint: where it is refused, nothing changes.
    private func setPriority(_ wanted: LiveReadPriority) {
        if priority == wanted { return }
        priority = wanted
        switch wanted {                                            // linux/ioprio.h
        case .normal: _ = clivetap_set_io_priority(0, 0)
        case .low: _ = clivetap_set_io_priority(2, 7)
        case .idle: _ = clivetap_set_io_priority(3, 7)
        }
    }
}

/// So many bytes per second, in bursts of a twentieth of a second.
struct LiveReadBudget {
    /// 0: no limit.
    let bytesPerSecond: UInt64
    /// When all that was taken is paid for (monotonic clock).
    private var paidAt: UInt64 = 0
    private static let burstNanoseconds: UInt64 = 50_000_000

    init(bytesPerSecond: UInt64) { self.bytesPerSecond = bytesPerSecond }

    /// Nanoseconds until something may be taken.
    func wait(now: UInt64) -> UInt64 { bytesPerSecond == 0 || paidAt <= now ? 0 : paidAt - now }

    /// As much as is wanted at once: a large piece is paid for afterwards.
    mutating func take(bytes: Int, now: UInt64) {
        guard bytesPerSecond > 0 else { return }
        let cost = UInt64(Double(bytes) * 1e9 / Double(bytesPerSecond))
        paidAt = max(paidAt, now - min(now, Self.burstNanoseconds)) + cost
    }
}

/// How many reads are in flight at once where others come first: as many as the disks take without answering later. A disk that nobody
/// else uses answers in its own time; one that is kept busy answers later, and then one read at a time goes on, with pauses. (As a network's
/// sender that goes by delay does, TCP Vegas for one.)
struct LiveReadPace {
    private(set) var depth = 4
    /// Between reads, as a multiple of what one takes. Only at a depth of 1.
    private var pauseFactor = 0
    private static let pauseFactorMax = 4
    /// Times that the depth was lowered.
    private(set) var loweredCount: UInt64 = 0
    /// What a read takes at best, on average over a window. Forgotten slowly: by an eighth each minute.
    private(set) var bestNanoseconds: UInt64?
    private var lastNanoseconds: UInt64 = 0
    private var agedAt: UInt64 = 0
    private var window = (count: 0, nanoseconds: UInt64(0))
    private static let windowCountMin = 16
    private static let ageNanoseconds: UInt64 = 60_000_000_000

    /// As if a long read were several of this length.
    private static let unitBytes = 32 << 10

    mutating func ended(bytes: Int, afterNanoseconds nanoseconds: UInt64, now: UInt64, depthMax: Int) {
        window.count += 1
        window.nanoseconds += nanoseconds / UInt64(1 + bytes / Self.unitBytes)
        guard window.count >= max(Self.windowCountMin, depth) else { return }
        let mean = window.nanoseconds / UInt64(window.count)
        window = (0, 0)
        lastNanoseconds = mean
        while now > agedAt + Self.ageNanoseconds, let best = bestNanoseconds, agedAt > 0, best < 1 << 40 {
            bestNanoseconds = best + best / 8
            agedAt += Self.ageNanoseconds
        }
        if agedAt == 0 || bestNanoseconds == nil { agedAt = now }
        let best = min(bestNanoseconds ?? mean, mean)
        bestNanoseconds = best
        if mean > best + best / 4 + Self.toleranceNanoseconds {
            if depth > 1 { loweredCount += 1 } else { pauseFactor = min(max(1, pauseFactor * 2), Self.pauseFactorMax) }
            depth = max(1, depth * 2 / 3)
        } else if pauseFactor > 0 {
            pauseFactor /= 2
        } else {
            depth = min(max(1, depthMax), depth + 1)
        }
    }

    /// To be waited before the next read.
    var pauseNanoseconds: UInt64 { lastNanoseconds * UInt64(pauseFactor) }

    /// About how long so many short reads take, as it goes now.
    func nanoseconds(readCount: UInt64) -> UInt64 {
        (readCount / UInt64(depth)).multipliedReportingOverflow(by: lastNanoseconds * UInt64(1 + pauseFactor)).partialValue
    }

    /// Noise of the machine.
    private static let toleranceNanoseconds: UInt64 = 20_000
}

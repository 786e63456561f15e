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
        /// Whether the time that it takes is not counted (`LiveReadShare`).
        var isFree = false
    }

    private var budget: LiveReadBudget
    var share: LiveReadShare
    private(set) var pace = LiveReadPace()
    private let accounts: [SysfsStatistics]
    private var priority = LiveReadPriority.normal
    private(set) var readBytes: UInt64 = 0
    private(set) var waitNanoseconds: UInt64 = 0

    /// `share`: of the time, while others use the disks, whose accounts these are.
    init(bytesPerSecondMax: UInt64 = 0, share: Double = 1, accounts: [SysfsStatistics] = []) throws(SystemError) {
        ring = try Ring(entries: UInt32(Self.depthMax))
        budget = LiveReadBudget(bytesPerSecond: bytesPerSecondMax)
        self.share = LiveReadShare(share: share)
        self.accounts = accounts
    }

    /// `ended(index, succeeded)` is called right after that range has been read, before the next one is looked at.
    func read(_ ranges: [Range], depth: Int, considering: Consideration? = nil, _ ended: (Int, Bool) -> Void) {
        let depth = min(max(1, depth), Self.depthMax)
        setPriority(considering?.priority ?? .normal)
        let began = LiveReconciliation.now(), waitedBefore = waitNanoseconds
        share.begin(now: began) { accounts.map { $0.spentMilliseconds() } }
        defer {
            let now = LiveReconciliation.now(), took = now - began, waited = min(took, waitNanoseconds - waitedBefore)
            pace.note(blockCount: ranges.reduce(0) { $0 + UInt64(($1.lengthBytes + blockBytes - 1) / blockBytes) }, nanoseconds: took - waited)
            share.end(began: began + waited, now: now, isFree: considering?.isFree ?? true) { accounts.map { $0.spentMilliseconds() } }
        }
        withUnsafeTemporaryAllocation(of: ciouring_completion.self, capacity: Ring.reapMax) { completions in
            var next = 0
            var inFlight = 0
            while next < ranges.count || inFlight > 0 {
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
                    submit(ranges[next], token: UInt64(next))
                    next += 1
                    inFlight += 1
                }
                ring.submitAndWait()
                let count = ring.reap(into: completions.baseAddress!)
                for i in 0..<count {
                    let index = Int(completions[i].user_data)
                    let result = completions[i].res
                    if result == -EINTR || result == -EAGAIN {
                        submit(ranges[index], token: UInt64(index))
                        continue
                    }
                    inFlight -= 1
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

/// How long a block takes to read, many at a time, of the last seconds of reading.
struct LiveReadPace {
    private var blockCount = 0.0
    private var nanoseconds = 0.0
    /// 0: not known yet.
    var nanosecondsPerBlock: Double { blockCount > 0 ? nanoseconds / blockCount : 0 }

    /// A few blocks that come at once say nothing about many.
    mutating func note(blockCount: UInt64, nanoseconds: UInt64) {
        guard blockCount >= 32 || (blockCount > 0 && nanoseconds >= 20_000_000) else { return }
        let part = exp2(-Double(nanoseconds) / 1e9)
        self.blockCount = self.blockCount * part + Double(blockCount)
        self.nanoseconds = self.nanoseconds * part + Double(nanoseconds)
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

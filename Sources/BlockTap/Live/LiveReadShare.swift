import Glibc

/// How much of the time the disks are read beside others who use them: what those leave, and at least a share of it all, where that is enough for epochs
/// of a second to be proven. Where writers are so fast that it is not, it would be taken for nothing, and it is a tenth of that.
///
/// Time that passes earns credit, reading spends it. How busy others keep the disks is seen while nothing of ours is read: what the requests that
/// ended took together, by the time that has passed, is how many were under way at once on average (Little's law); from 1 on there is no time
/// that they leave. What is not known yet counts as busy. All times are nanoseconds of the monotonic clock.
struct LiveReadShare {
    /// 0...1; 1: no limit.
    let share: Double
    /// What may be saved up, or owed: a second's reading, or as long as the last epoch was.
    private(set) var creditMax = 1e9
    /// What is kept for the rounds of the next epoch.
    static let reserve = 0.3e9
    /// Others are looked at for so long at a time, and at least so often.
    static let lookNanoseconds: UInt64 = 20_000_000
    private static let lookEvery: UInt64 = 500_000_000

    /// Whether the share is enough, as far as is known.
    private(set) var isEnough = true
    private(set) var credit = 0.0
    /// How much of the time others use: 0...1.
    private(set) var busy = 1.0
    private var earnedAt: UInt64 = 0
    private var lookedAt: UInt64 = 0
    /// Since when nothing is read, and what the kernel's account of each disk was then.
    private var quiet: (since: UInt64, spent: [Int64])?

    init(share: Double) { self.share = share }

    /// An epoch begins that is to be proven. `blockCount`: that it has; `writtenCount`: blocks written since the one before, each time counted;
    /// `nanosecondsEach`: that one takes to read.
    mutating func expect(blockCount: UInt64, writtenCount: UInt64, since: UInt64, now: UInt64, nanosecondsEach: Double) {
        let seconds = Double(now - min(now, since)) / 1e9
        // Of one that took longer, it is not known how much of it one second has: at most so much.
        let perSecond = seconds < 1 ? Double(blockCount) / max(seconds, 0.01) : min(Double(blockCount), Double(writtenCount) / seconds)
        let firstRound = perSecond * nanosecondsEach / 1e9
        // The second round is what was written during the first one, and so on.
        isEnough = firstRound < 1 && firstRound / (1 - firstRound) <= max(share, 1 - busy)
        // Of longer epochs more is read at once.
        creditMax = 1e9 * min(max(1, seconds), 30)
        credit = min(creditMax, max(-creditMax, credit))
    }

    /// Nothing is known any more, or nothing is to be proven.
    mutating func startOver() { isEnough = true }

    /// How long the disks are not to be read, at least, by whoever leaves `keeping` for others.
    mutating func wait(now: UInt64, keeping: Double = 0) -> UInt64 {
        if share >= 1 { return 0 }
        earn(now: now)
        if let quiet, now > lookedAt + Self.lookEvery, now < quiet.since + Self.lookNanoseconds { return quiet.since + Self.lookNanoseconds - now }
        return credit > keeping ? 0 : UInt64(1 + (keeping - credit) / rate)
    }

    /// Of the time that passes, what may be read.
    private var rate: Double { max(0.001, isEnough ? share : share / 10, 1 - busy) }

    private mutating func earn(now: UInt64) {
        if earnedAt > 0, now > earnedAt { credit = min(creditMax, credit + Double(now - earnedAt) * rate) }
        earnedAt = now
    }

    /// Reading begins. `spent`: of each disk, milliseconds that all its requests took since it is there.
    mutating func begin(now: UInt64, spent: () -> [Int64]) {
        if let quiet, now >= quiet.since + Self.lookNanoseconds {
            let milliseconds = Double(now - quiet.since) / 1e6
            let others = zip(spent(), quiet.spent).map { Double($0 - $1) / milliseconds }.max() ?? 0
            let seen = min(1, max(0, others))
            // That they have begun is believed at once, that they have ended after a second's looks.
            let weight = lookedAt == 0 ? 1 : max(seen > busy ? 0.7 : 0.1, 1 - exp2(-milliseconds / 1000))
            busy += (seen - busy) * weight
            lookedAt = now
        }
        quiet = nil
        earn(now: now)
    }

    /// Reading has ended. `isFree`: it is not to be paid for.
    mutating func end(began: UInt64, now: UInt64, isFree: Bool, spent: () -> [Int64]) {
        if !isFree { credit = max(-creditMax, credit - Double(now - began)) }
        quiet = (now, spent())
    }
}

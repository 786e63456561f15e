/// When a recovery point is worth more than what others do with the disks: when one was asked for, and when the newest is older than the patience. Then for
/// an *effort* of some seconds, and some more as long as more was read in them than written. If the writers gained, they are left alone for as long as the
/// patience, then twice as long, and so on: disks that are written faster than they can be read are not read at their owner's expense for ever. Times are
/// of the monotonic clock, in nanoseconds.
struct LiveUrgency {
    private let patience: UInt64
    private static let effort: UInt64 = 10_000_000_000
    private static let restMax: UInt64 = 20
    /// When this process's newest point became durable; 0: it has none. How old the newest is then, it does not know, and it may be the tenth
    /// process in a row that is killed: there is no patience.
    private var pointAt: UInt64 = 0
    private var effortBegan: UInt64 = 0
    private var progressThen = (readBytes: UInt64(0), writtenBytes: UInt64(0))
    private var restsUntil: UInt64 = 0
    /// Of the next rest, in patiences.
    private var rest: UInt64 = 1

    /// 0: it is always urgent.
    init(patienceSeconds: Int) { patience = UInt64(min(max(0, patienceSeconds), 86_400)) * 1_000_000_000 }

    /// `progress`: bytes read and written, since whenever.
    mutating func isUrgent(now: UInt64, progress: () -> (readBytes: UInt64, writtenBytes: UInt64)) -> Bool {
        if patience == 0 { return true }
        if now < restsUntil || (pointAt > 0 && now < pointAt + patience) { return false }
        if effortBegan == 0 {
            effortBegan = now
            progressThen = progress()
        }
        if now < effortBegan + Self.effort { return true }
        let before = progressThen
        progressThen = progress()
        let read = progressThen.readBytes &- before.readBytes
        // Nothing was read: something else than the disk is in the way, and nobody pays.
        if read == 0 || read > progressThen.writtenBytes &- before.writtenBytes {
            effortBegan = now
            return true
        }
        effortBegan = 0
        restsUntil = now + patience * rest
        rest = min(rest * 2, Self.restMax)
        return false
    }

    /// One more is durable.
    mutating func hasPoint(now: UInt64) {
        pointAt = now
        startOver()
    }

    /// What the replica has is no point to go back to, or it has nothing: the next one is the first.
    mutating func hasNone() {
        pointAt = 0
        startOver()
    }

    /// Earlier efforts say nothing any more: nothing could be sent.
    mutating func startOver() {
        effortBegan = 0
        restsUntil = 0
        rest = 1
    }

    /// Somebody asks for a point, and waits.
    mutating func hurry() { hasNone() }
}

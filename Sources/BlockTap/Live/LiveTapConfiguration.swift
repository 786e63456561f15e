/// How the tap's reads stand beside everybody else's, where the disk's scheduler knows priorities (bfq, mq-deadline). Rounds that prove a
/// point are short and always `normal`.
public enum LiveReadPriority: String, Sendable, Codable {
    case normal
    /// Best effort, the lowest of it.
    case low
    /// Only what nobody else wants: on a disk that is never idle a full sync may not end.
    case idle
}

public struct LiveTapConfiguration: Sendable {
    /// Memory for one epoch's blocks while its rounds run, taken as it is needed; an epoch that is larger is sent without a proof, and the next
    /// one is smaller.
    public var stagingBytesMax = 256 << 20
    /// Reads in flight; and at most, while rounds do not shrink.
    public var readDepth = 32
    public var readDepthMax = 128
    /// Of full sync, of epochs without a proof and of an epoch's first round, all disks together; 0: as fast as the disks are. Not of the later
    /// rounds: what they cost is decided by who writes meanwhile.
    public var readBytesPerSecondMax: UInt64 = 0
    public var readPriority = LiveReadPriority.low
    /// Reads of many blocks give way to others who use the disks: they take what time those leave, and at least this share of it all (0...1; 1: they do not
    /// give way), or a tenth of it where even all of it would not be enough (`LiveReadShare`). An epoch that would take more is handed out without a proof.
    public var readShare = 0.5
    /// Once the newest recovery point is older, reads take what they need, for as long as it helps (`LiveUrgency`). 0: always.
    public var patienceSeconds = 60
    public var roundsMax = 64
    /// Not counting an epoch's first round, which takes what it takes.
    public var roundsMilliseconds = 2000
    public var reconcileMilliseconds = 50
    public var drainBufferCount = 64
    /// Whether the mounted file systems of the group's disks may be frozen: when a point is to be file-system-consistent, and for a moment when rounds
    /// do not converge.
    public var freezes = true
    public var freezeMilliseconds = 500
    /// Whether a full sync leaves out what mounted file systems (ext4, XFS) have free. The replica then differs from the disk there.
    public var skipsFreeSpace = true
    /// For tests: what the program in the kernel is not to see.
    package var drops = LiveTapDrops()
    public init() {}
}

/// A deliberate fault: events are dropped while clock % period < burst; nanoseconds, 0: none.
package struct LiveTapDrops: Sendable {
    package var issues: (period: UInt64, burst: UInt64) = (0, 0)
    package var completions: (period: UInt64, burst: UInt64) = (0, 0)
    package init() {}
}

/// A disk whose size is not what it was when the tap was attached.
public struct LiveTapResize: Sendable, Codable, Hashable {
    public var disk: String
    public var fromBytes: UInt64
    public var toBytes: UInt64
    /// Writes past its end as it was. If there are any, nothing is proven until the tap has been attached again.
    public var writesBeyondCount: UInt64
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
    /// Epochs that were larger than the stage.
    public var unstagedCount: UInt64 = 0
    /// Epochs for which the file systems were frozen, how long at most, and how often that failed or was longer than the limit.
    public var freezeCount: UInt64 = 0
    public var freezeMillisecondsMax: Double = 0
    public var freezeFailedCount: UInt64 = 0
    /// Proven epochs for which the file systems were frozen at the cut.
    public var fileSystemConsistentCount: UInt64 = 0
    /// Of the last full sync: what it left out because file systems have it free.
    public var skippedFreeBytes: UInt64 = 0
    /// Read from the disks, and waited because of the budget for that.
    public var readBytes: UInt64 = 0
    public var readWaitMilliseconds: UInt64 = 0
    /// Epochs handed out without a proof, because that would have taken more of the disks' time than its share.
    public var gaveWayCount: UInt64 = 0
    /// Looks at the kernel's account that decided nothing.
    public var openReconciliationCount: UInt64 = 0
    /// Times that writes were missed and everything had to be compared or copied again; and why, the last time.
    public var resyncCount: UInt64 = 0
    public var resyncReason: String?
    public var resizes: [LiveTapResize] = []
    /// Since the tap was attached, all disks.
    public var issuedCount: UInt64 = 0
    public var completedCount: UInt64 = 0
    /// Completions that the kernel did not show to the program (their tags were used again, or their writes' slots are still in use).
    public var unseenCompletionCount: UInt64 = 0
    /// Programs that the kernel skipped because they would have interrupted themselves; what one copy of the issue program misses, the others see.
    public var skippedProgramCount: UInt64?
    /// By deliberate fault.
    public var droppedIssueCount: UInt64 = 0
    public var droppedCompletionCount: UInt64 = 0
    /// Writes that ended without their issue having been seen.
    public var unmatchedCount: UInt64 = 0
    /// Pass-through commands that may have written, seen at their issue and at their end. After each the disks are compared.
    public var undescribedCount: UInt64 = 0
    public var bitmapBytes: UInt64 = 0
    public init() {}
}

/// Deliberate faults, for the tests that prove that the tests would notice.
package struct LiveTapFaults: OptionSet, Sendable {
    package let rawValue: UInt16
    package init(rawValue: UInt16) { self.rawValue = rawValue }
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
    /// Believe that what is free in memory is free on disk.
    package static let skipFreeSpaceSync = LiveTapFaults(rawValue: 32)
    /// Not wrong, but a failure to be survived: no memory in an epoch's second round.
    package static let failInRound = LiveTapFaults(rawValue: 64)
    /// Then forget what the first round took.
    package static let forgetWhatWasTaken = LiveTapFaults(rawValue: 128)
    /// Not wrong: free no tag by reading, so that what has ended unseen stays in its slot.
    package static let leaveTags = LiveTapFaults(rawValue: 256)
    /// Take all that is in slots for writes in flight when a baseline is taken.
    package static let trustSlots = LiveTapFaults(rawValue: 512)
}

import CLiveTap
import Glibc
import Synchronization

/// The disks of a group, held still for as long as somebody asks: the file systems that are mounted from them stay frozen, so that whoever writes to those waits, and
/// the kernel's own account of the disks says whether anybody wrote past them (swap, a database on a raw device), whom nothing can hold.
///
/// What cannot be frozen (vfat: an EFI system partition) is written out, and `unheld`: the account covers it, until the check `forGood`.
///
/// File systems thaw when nobody has asked for `limitMilliseconds`, and at once when this process is killed; but not any more after `check(forGood: true)`.
/// All calls may block.
public final class LiveHold: @unchecked Sendable {
    public static let limitMilliseconds = 20_000
    private static let quietNanoseconds: UInt64 = 5_000_000_000

    private let disks: [LiveDisk]
    private let freeze: Mutex<FileSystemFreeze?>
    /// Of each disk, when it was quiet.
    private let completedSectors: [Int64]
    private let pause: LiveFreezePause
    /// Mount points of what cannot be frozen.
    public let unheld: [String]

    /// Returns when all earlier writes are done; what file systems had in memory is among those. Throws in words, with nothing held.
    init(disks: [LiveDisk], limitMilliseconds: Int, pause: LiveFreezePause) throws(SystemError) {
        self.pause = pause
        if let disk = disks.first(where: { !$0.statistics.isKept }) { throw Self.unaccounted(disk) }
        let freeze = try FileSystemFreeze.hold(try FileSystemFreeze.opened(on: LiveDisk.devices(of: disks)), limitMilliseconds: limitMilliseconds, syncsMax: 5)
        do throws(SystemError) {
            completedSectors = try Self.quiet(disks)
            // Otherwise whoever wrote may have done so to the file systems.
            if !freeze.keep(forever: false) { throw Self.thawed }
        } catch {
            let isHeld = freeze.keep(forever: false)
            _ = freeze.thaw()
            throw isHeld ? error : Self.thawed
        }
        self.disks = disks
        unheld = freeze.unfreezable
        self.freeze = Mutex(freeze)
    }

    private static var thawed: SystemError { SystemError(errno: ETIMEDOUT, what: "the file systems were thawed") }

    private static func unaccounted(_ disk: LiveDisk) -> SystemError {
        SystemError(errno: ENODATA, what: "\(disk.name): nobody can say whether it is written to, its I/O statistics are off (queue/iostats)")
    }

    /// What each had written in a moment in which its driver had no write, and none that was still to be accounted for. Throws in words, with the names of those that
    /// were written to until the end.
    private static func quiet(_ disks: [LiveDisk]) throws(SystemError) -> [Int64] {
        let deadline = LiveReconciliation.now() + quietNanoseconds
        // When half of the time was over: what was on its way before is no sign of others.
        var middle: [Int64]?
        var completed: [Int64] = []
        repeat {
            completed = disks.map { $0.statistics.completedSectors() }
            if middle == nil, LiveReconciliation.now() > deadline - quietNanoseconds / 2 { middle = completed }
            if disks.allSatisfy({ $0.statistics.writesInFlight() == 0 }) {
                LiveReconciliation.letProcessorsPass()
                if disks.allSatisfy({ $0.statistics.writesInFlight() == 0 }), completed == disks.map({ $0.statistics.completedSectors() }) { return completed }
            }
            usleep(1000)
        } while LiveReconciliation.now() < deadline
        if let middle, completed != middle { throw writtenPast(disks, middle, completed) }
        let busy = disks.filter { $0.statistics.writesInFlight() != 0 }.map(\.name)
        throw SystemError(errno: EBUSY, what: "\((busy.isEmpty ? disks.map(\.name) : busy).joined(separator: ", ")): a write does not end")
    }

    /// Asks for more time, or `forGood`: then they stay as they are until `end`, whatever becomes of this process. Throws in words when it has ended, or somebody has
    /// written to the disks in spite of it.
    public func check(forGood: Bool = false) throws(SystemError) {
        try keep(forever: false)
        if let disk = disks.first(where: { !$0.statistics.isKept }) { throw Self.unaccounted(disk) }
        guard forGood else { return try compare(disks.map { $0.statistics.completedSectors() }) }
        try compare(Self.quiet(disks))
        try keep(forever: true)
        if let place = FileSystemFreeze.unfrozen(try FileSystemFreeze.opened(on: LiveDisk.devices(of: disks))) {
            throw SystemError(errno: ETIMEDOUT, what: "the file system on \(place) is not frozen: somebody else has thawed it")
        }
        // Last: what was written until the moment in which all of them were seen to be frozen for good.
        try compare(Self.quiet(disks))
    }

    private func keep(forever: Bool) throws(SystemError) {
        guard freeze.withLock({ $0?.keep(forever: forever) ?? false }) else { throw Self.thawed }
    }

    private func compare(_ now: [Int64]) throws(SystemError) {
        if now != completedSectors { throw Self.writtenPast(disks, completedSectors, now) }
    }

    private static func writtenPast(_ disks: [LiveDisk], _ before: [Int64], _ now: [Int64]) -> SystemError {
        let written = zip(disks, zip(before, now)).filter { $1.0 != $1.1 }.map(\.0.name)
        return SystemError(
            errno: EBUSY,
            what: "\(written.joined(separator: ", ")) \(written.count == 1 ? "was" : "were") written to past the file systems that are held (by swap, a program that has the device itself, or a RAID or a cache that is stacked on it): stop that first")
    }

    /// Thaws what a process has held for good that is not there any more. Throws in words when it was not possible for all.
    static func endLeftOver(disks: [LiveDisk]) throws(SystemError) {
        var hidden: [String] = []
        // In the other order: to thaw one on a loop device is a write to the one that has its file.
        for fileSystem in MountedFileSystem.on(LiveDisk.devices(of: disks)).reversed() where !fileSystem.isReadOnly {
            guard let fd = fileSystem.opened() else {
                hidden.append(fileSystem.mountPoint)
                continue
            }
            clivetap_thaw_one(fd)
            close(fd)
        }
        if !hidden.isEmpty { throw SystemError(errno: ENOENT, what: "cannot thaw the file system on \(hidden.joined(separator: ", ")): something else is mounted over it") }
    }

    /// They thaw, and whoever waited goes on. Once more is harmless.
    public func end() { freeze.withLock { _ = $0.take()?.thaw() } }
}

/// How many want no epoch to freeze anything.
final class LiveFreezePauses: Sendable {
    fileprivate let count = Atomic<Int>(0)
    var isAny: Bool { count.load(ordering: .acquiring) > 0 }
}

/// One of them, for as long as it is there.
public final class LiveFreezePause: Sendable {
    private let pauses: LiveFreezePauses

    init(_ pauses: LiveFreezePauses) {
        self.pauses = pauses
        pauses.count.add(1, ordering: .acquiringAndReleasing)
    }

    deinit { pauses.count.subtract(1, ordering: .acquiringAndReleasing) }
}

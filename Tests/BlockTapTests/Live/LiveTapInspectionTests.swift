import Foundation
import Testing

@testable import BlockTap

/// What the tap finds out by itself: devices, whether this kernel can be trusted, resized disks, how hard it may read.
@Suite(
    .serialized,
    .enabled(if: LiveTapBed.isAvailable, "needs root, loop devices, a kernel with BTF, and the live tap's program (tools/test compiles it)"))
struct LiveTapInspectionTests {
    @Test("Every block device is listed, with its mounts, and with words if it cannot be followed")
    func devices() throws {
        let loop = try LoopDevice(bytes: 64 << 20, options: ["--partscan"])
        let disk = try PartitionedDisk(loop.path, ["size=32M", "size=16M"])
        try Program.run(["mkfs.ext4", "-q", disk.partition(1)])
        try Program.run(["mkswap", "-q", disk.partition(2)])
        let mount = try MountPoint()
        try Program.run(["mount", disk.partition(1), mount.path])
        let devices = LiveTapInspection.devices()
        let whole = try #require(devices.first { $0.path == loop.path })
        #expect(whole.isFollowable && whole.kind == .loop && whole.follow == [loop.path] && whole.sizeBytes == 64 << 20)
        #expect(whole.mountPoints == [mount.path] && !whole.isSwap)
        let part = try #require(devices.first { $0.path == disk.partition(1) })
        #expect(part.kind == .partition && part.partitionOf == loop.path && part.follow == [loop.path] && part.mountPoints == [mount.path])
        #expect(part.refusal?.contains("follow the whole disk") == true)
        #expect(devices.first { $0.path == disk.partition(2) }?.mountPoints == [])
        #expect(try LiveTapInspection.device(path: loop.path) == whole)
        #expect { try LiveTapInspection.device(path: "/dev/null") } throws: { "\($0)".contains("not a block device") }
        for device in devices { print("\(device.path): \(device.kind), \(device.refusal ?? "can be followed"), \(device.mountPoints)") }
        try mount.unmount()
    }

    @Test("The self-test passes on this kernel and leaves nothing behind")
    func selfTest() async throws {
        let bpffs = try BPFFileSystem()
        let figures = try await LiveTapGroup.selfTest(bpffs: bpffs.path)
        #expect(figures.provenCount > 0 && figures.writeCount == 6000 && figures.discardCount > 0)
        #expect(figures.issuedCount >= figures.writeCount)
        #expect(bpffs.selfTests == [])
        // Its loop device ends with whoever has it open last; that may be somebody who looks at all devices.
        var left: [String] = []
        for _ in 0..<100 {
            left = directoryEntries("/sys/block").filter { fileText("/sys/block/\($0)/loop/backing_file")?.contains("\(LiveSelfTest.prefix)\(getpid())") == true }
            if left.isEmpty { break }
            try await Task.sleep(for: .milliseconds(100))
        }
        #expect(left == [])
        print(figures)
    }

    @Test("A self-test that was killed is tidied up by the next one")
    func selfTestAfterKill() async throws {
        let bpffs = try BPFFileSystem()
        mkdir(bpffs.path + "/afterimage-self-test-999999999-1", 0o700)
        mkdir(bpffs.path + "/afterimage-self-test-\(getpid())-77", 0o700)
        _ = try await LiveTapGroup.selfTest(bpffs: bpffs.path)
        #expect(bpffs.selfTests == ["afterimage-self-test-\(getpid())-77"])
    }

    @Test("A kernel that hides issues does not pass the self-test; nor one that hides all of a write, even if nobody asked the kernel's account", arguments: [
        LiveTapFaults([]), .skipReconciliation,
    ])
    func selfTestNotices(fault: LiveTapFaults) async throws {
        let bpffs = try BPFFileSystem()
        await #expect {
            try await LiveTapGroup.selfTest(
                bpffs: bpffs.path, faults: fault, issues: (period: 10_000_000, burst: 1_000_000),
                completions: fault.isEmpty ? (0, 0) : (period: 10_000_000, burst: 3_000_000))
        } throws: {
            print($0)
            return "\($0)".contains("cannot be trusted")
        }
        #expect(bpffs.selfTests == [])
    }

    @Test("A disk that grows is noticed; what is written past its old end is never passed over, and attaching again copies it all")
    func growing() async throws {
        let bed = try LiveTapBed(disks: 1, bytes: 32 << 20)
        try await bed.start()
        try await bed.fullSync()
        try await bed.carryUntilProven()
        let loop = bed.loops[0]
        #expect(await bed.group.resizes == [])
        try #require(ftruncate(loop.file.fd, 48 << 20) == 0)
        try Program.run(["losetup", "--set-capacity", loop.path])
        try Program.run(["dd", "if=/dev/urandom", "of=\(loop.path)", "bs=4k", "seek=100", "count=50", "oflag=direct", "conv=notrunc", "status=none"])
        // Still a point of what is followed.
        try await bed.carryUntilProven(attempts: 5)
        #expect(try bed.imagesEqualDisks())
        #expect(await bed.group.resizes == [LiveTapResize(disk: "d0", fromBytes: 32 << 20, toBytes: 48 << 20, writesBeyondCount: 0)])
        #expect(bed.events.withLock { $0.filter { $0.contains("attached again") }.count } == 1)

        try Program.run(["dd", "if=/dev/urandom", "of=\(loop.path)", "bs=4k", "seek=9000", "count=50", "oflag=direct", "conv=notrunc", "status=none"])
        for _ in 0..<3 { #expect(try await bed.carry().kind == .fuzzy) }
        let figures = await bed.group.liveStatistics
        #expect(figures.resyncCount == 0)
        #expect(figures.resizes.first.map { $0.writesBeyondCount > 0 } == true)
        #expect(bed.events.withLock { $0.contains { $0.contains("writes past its end") } })

        let instance = bed.group.instance
        bed.kill()
        try await bed.start()
        #expect(!bed.group.wasAdopted && bed.group.instance != instance)
        #expect(bed.group.disks[0].geometry.sizeBytes == 48 << 20)
        #expect(await bed.group.resizes == [])
    }

    @Test("A budget for reads: so many bytes per second after a burst, and nothing without one")
    func budget() {
        var budget = LiveReadBudget(bytesPerSecond: 1_000_000)
        var now: UInt64 = 5_000_000_000
        let start = now
        for _ in 0..<1000 {
            now += budget.wait(now: now)
            budget.take(bytes: 10_000, now: now)
        }
        // 10 MB, less a twentieth of a second.
        #expect(now - start > 9_900_000_000 && now - start <= 10_000_000_000)
        #expect(budget.wait(now: now + 60_000_000_000) == 0)
        var none = LiveReadBudget(bytesPerSecond: 0)
        none.take(bytes: .max, now: now)
        #expect(none.wait(now: now) == 0)
    }

    @Test("Reads take the time that others leave, and their share of it all")
    func share() {
        var share = LiveReadShare(share: 0.1)
        var now: UInt64 = 1_000_000_000_000
        var spent = 0.0                                            // milliseconds of all requests
        // So many milliseconds, in which others have `others` requests under way all the time, and ours are read whenever they may be.
        func read(milliseconds: UInt64, others: Double) -> Double {
            let end = now + milliseconds * 1_000_000
            var read: UInt64 = 0
            while now < end {
                let wait = min(share.wait(now: now), 20_000_000)
                now += wait
                spent += Double(wait) / 1e6 * others
                if wait > 0 { continue }
                share.begin(now: now) { [Int64(spent)] }
                let began = now
                now += 10_000_000
                read += 10_000_000
                spent += 10 * (others + 32)
                share.end(began: began, now: now, isFree: false) { [Int64(spent)] }
            }
            return Double(read) / Double(milliseconds * 1_000_000)
        }
        _ = read(milliseconds: 10_000, others: 0)
        #expect((0.9...1).contains(read(milliseconds: 10_000, others: 0)))
        _ = read(milliseconds: 10_000, others: 32)
        #expect((0.08...0.12).contains(read(milliseconds: 10_000, others: 32)))
        _ = read(milliseconds: 10_000, others: 0.5)
        #expect((0.4...0.6).contains(read(milliseconds: 10_000, others: 0.5)))
        share.expect(blockCount: 20_000, writtenCount: 20_000, since: now - 1_000_000_000, now: now, nanosecondsEach: 10_000)
        #expect(share.isEnough, "half of the time is free")
        _ = read(milliseconds: 10_000, others: 32)
        // 20,000 blocks a second, each 10 us: a fifth of the time, and some for later rounds. A tenth of it is not enough, and taken for nothing.
        share.expect(blockCount: 20_000, writtenCount: 20_000, since: now - 1_000_000_000, now: now, nanosecondsEach: 10_000)
        _ = read(milliseconds: 10_000, others: 32)
        #expect((0.008...0.013).contains(read(milliseconds: 10_000, others: 32)))
        share.expect(blockCount: 5000, writtenCount: 1_000_000, since: now - 100_000_000_000, now: now, nanosecondsEach: 10_000)
        #expect(share.isEnough, "the same blocks again and again")
        share.expect(blockCount: 250_000, writtenCount: 10_000_000, since: now - 100_000_000_000, now: now, nanosecondsEach: 10_000)
        #expect(!share.isEnough, "a small disk that is written all over")
        share.expect(blockCount: 250_000, writtenCount: 500_000, since: now - 100_000_000_000, now: now, nanosecondsEach: 10_000)
        #expect(share.isEnough)
        share.expect(blockCount: 5000, writtenCount: 5000, since: now - 100_000_000, now: now, nanosecondsEach: 10_000)
        #expect(!share.isEnough)
        share.startOver()
        _ = read(milliseconds: 10_000, others: 32)
        #expect((0.08...0.12).contains(read(milliseconds: 10_000, others: 32)))
        // What was not used is saved for a second's reading, not more.
        now += 3_600_000_000_000
        let waits = share.wait(now: now)
        #expect(waits == 0 && share.credit == share.creditMax)
        var all = LiveReadShare(share: 1)
        let never = all.wait(now: 5)
        #expect(never == 0)
    }

    @Test("A point is urgent when it was asked for, and when there is none that is young, but not for ever")
    func urgency() {
        let second: UInt64 = 1_000_000_000
        var urgency = LiveUrgency(patienceSeconds: 30), now = 1000 * second
        var progress: () -> (readBytes: UInt64, writtenBytes: UInt64) = { (now / 1000, now) }
        func urgentSeconds(of seconds: Int) -> Int {
            (0..<seconds).reduce(0) { count, _ in
                now += second
                return count + (urgency.isUrgent(now: now) { progress() } ? 1 : 0)
            }
        }
        #expect(urgentSeconds(of: 1) == 1)
        urgency.hasPoint(now: now)
        #expect(urgentSeconds(of: 29) == 0)
        #expect((9...10).contains(urgentSeconds(of: 12)))
        // It did not help: 30 s, 60, 120, … 600 of rest between.
        #expect(urgentSeconds(of: 26) == 0)
        #expect((9...11).contains(urgentSeconds(of: 30)))
        let hours = urgentSeconds(of: 36_000)
        #expect((550...700).contains(hours), "\(hours)")
        urgency.hurry()
        #expect((9...11).contains(urgentSeconds(of: 12)))
        // As long as it helps, it goes on.
        urgency.startOver()
        progress = { (now, now / 2) }
        #expect(urgentSeconds(of: 500) == 500)
        let then = now
        progress = { (then + (now - then) / 2, then / 2 + (now - then)) }
        #expect((0...21).contains(urgentSeconds(of: 25)))
        // Nothing can be read: the link is slow. It costs nobody anything.
        urgency.hurry()
        progress = { (0, now) }
        #expect(urgentSeconds(of: 500) == 500)
        progress = { (now / 2, now) }
        urgency.hasPoint(now: now)
        #expect(urgentSeconds(of: 28) == 0)
        #expect((9...10).contains(urgentSeconds(of: 13)))
        var hasty = LiveUrgency(patienceSeconds: 0)
        hasty.hasPoint(now: now)
        let isHasty = hasty.isUrgent(now: now + 1) { (1, 1) }
        var patient = LiveUrgency(patienceSeconds: .max)
        patient.hasPoint(now: now)
        let isPatient = !patient.isUrgent(now: now + 1) { (1, 1) }
        #expect(isHasty && isPatient)
    }

    @Test("How long a block takes: of the last seconds of reading, and not of single blocks")
    func pace() {
        var pace = LiveReadPace()
        #expect(pace.nanosecondsPerBlock == 0)
        for _ in 0..<100 { pace.note(blockCount: 1, nanoseconds: 200_000) }
        #expect(pace.nanosecondsPerBlock == 0)
        // A slow disk shows with few blocks.
        for _ in 0..<20 { pace.note(blockCount: 10, nanoseconds: 50_000_000) }
        #expect((4.9e6...5.1e6).contains(pace.nanosecondsPerBlock))
        // Fast reads are believed after seconds of them.
        for _ in 0..<1000 { pace.note(blockCount: 100, nanoseconds: 2_000_000) }
        #expect((19_000...50_000).contains(pace.nanosecondsPerBlock))
        for _ in 0..<10_000 { pace.note(blockCount: 100, nanoseconds: 2_000_000) }
        #expect((19_900...20_100).contains(pace.nanosecondsPerBlock))
    }

    @Test("Reads give way on a disk that is never idle; a point that somebody waits for is proven all the same")
    func givesWay() async throws {
        let bed = try LiveTapBed(disks: 1, bytes: 96 << 20)
        bed.configuration.readShare = 0.4
        bed.configuration.patienceSeconds = 86_400
        try await bed.start()
        // Enough of them for rounds of many blocks.
        let writers = DependentWriters(bed, .init(chains: 32, pauseMicroseconds: 50, hotPercent: 0))
        try writers.start()
        defer { writers.stop() }
        try await bed.fullSync()
        func prove() async throws {
            for _ in 0..<2000 {
                bed.group.hurry()
                if try await bed.carry().kind == .exact { return }
            }
            Issue.record("no proven epoch")
        }
        try await prove()
        for _ in 0..<2 {
            let before = await bed.group.liveStatistics
            for _ in 0..<2000 where await bed.group.liveStatistics.gaveWayCount == before.gaveWayCount {
                try await writers.progress(by: 10_000)
                try await bed.carry()
            }
            let after = await bed.group.liveStatistics
            #expect(after.gaveWayCount > before.gaveWayCount && after.unprovenCount > before.unprovenCount)
            try await prove()
            let violations = writers.violations(in: bed.images)
            try #require(violations.isEmpty, "\(violations.prefix(3))")
        }
        writers.stop()
        #expect(try await bed.quietImagesEqualDisks())
    }

    @Test("A full sync keeps to its budget and its priority")
    func consideration() async throws {
        let bed = try LiveTapBed(disks: 1, bytes: 16 << 20)
        bed.configuration.readBytesPerSecondMax = 32 << 20
        try await bed.start()
        try await bed.fullSync()
        let figures = await bed.group.liveStatistics
        #expect(figures.readBytes >= 16 << 20)
        #expect(figures.readWaitMilliseconds > 0)
        #expect(await bed.group.ioPriority == 2 << 13 | 7)
        try await bed.carryUntilProven()
        #expect(try bed.imagesEqualDisks())
    }
}

/// A bpffs of one's own.
final class BPFFileSystem {
    private let directory: TemporaryDirectory
    var path: String { directory.path }
    var selfTests: [String] { directoryEntries(path).filter { $0.hasPrefix(LiveSelfTest.prefix) } }
    init() throws {
        directory = try TemporaryDirectory()
        try LiveTapGroup.bpffs(at: directory.path)
    }
    deinit { umount2(directory.path, Int32(MNT_DETACH)) }
}

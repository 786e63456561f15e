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
        #expect(!directoryEntries("/sys/block").contains { fileText("/sys/block/\($0)/loop/backing_file")?.contains("afterimage-self-test") == true })
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

    @Test("Reads give way: a disk that others keep busy gets one at a time, an idle one as many as it takes")
    func pace() {
        // Eight requests at once are answered in 100 µs, more in proportion.
        var pace = LiveReadPace()
        var now: UInt64 = 1
        func settle(others: Int, reads: Int = 20_000) {
            for _ in 0..<reads {
                let nanoseconds = UInt64(100_000 * max(8, others + pace.depth) / 8)
                now += nanoseconds / UInt64(pace.depth)
                pace.ended(bytes: 4096, afterNanoseconds: nanoseconds, now: now, depthMax: 32)
            }
        }
        settle(others: 0)
        #expect((8...12).contains(pace.depth) && pace.pauseNanoseconds == 0)
        settle(others: 64)
        #expect(pace.depth == 1 && pace.loweredCount > 0 && pace.pauseNanoseconds > 0)
        settle(others: 4)
        #expect((3...8).contains(pace.depth) && pace.pauseNanoseconds == 0)
        settle(others: 0)
        #expect((8...12).contains(pace.depth))
        // A disk that has become slower for good is as fast as it can be, in the end.
        for _ in 0..<40 {
            now += 60_000_000_000
            settle(others: 64, reads: 1000)
        }
        #expect(pace.depth > 4)
    }

    @Test("A disk that is never idle has proven points all the same: patience ends")
    func patience() async throws {
        let bed = try LiveTapBed(disks: 1, bytes: 96 << 20)
        bed.configuration.patienceSeconds = 1
        try await bed.start()
        // Enough of them for rounds of many blocks.
        let writers = DependentWriters(bed, .init(chains: 32, hotPercent: 0))
        try writers.start()
        defer { writers.stop() }
        try await bed.fullSync()
        for _ in 0..<3 {
            try await writers.progress(by: 20_000)
            try await bed.carryUntilProven(attempts: 2000)
            let violations = writers.violations(in: bed.images)
            try #require(violations.isEmpty, "\(violations.prefix(3))")
        }
        writers.stop()
        #expect(try await bed.quietImagesEqualDisks())
    }

    @Test("An agent that is killed again and again, before its patience ends, has proven points all the same")
    func patienceOfTheKilled() async throws {
        let bed = try LiveTapBed(disks: 1, bytes: 96 << 20)
        bed.configuration.patienceSeconds = 3600
        try await bed.start()
        let writers = DependentWriters(bed, .init(chains: 32, hotPercent: 0))
        try writers.start()
        defer { writers.stop() }
        try await bed.fullSync()
        for _ in 0..<3 {
            bed.kill()
            try await bed.start()
            #expect(await bed.group.hasPatience == false)
            try await writers.progress(by: 20_000)
            try await bed.carryUntilProven(attempts: 200)
            #expect(await bed.group.hasPatience)
            let violations = writers.violations(in: bed.images)
            try #require(violations.isEmpty, "\(violations.prefix(3))")
        }
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

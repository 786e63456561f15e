import Foundation
import Testing

@testable import BlockTap

/// Points whose file systems are frozen at the cut, found by the tap itself.
@Suite(
    .serialized,
    .enabled(if: LiveTapBed.isAvailable, "needs root, loop devices, a kernel with BTF, and the live tap's program (tools/test compiles it)"))
struct LiveTapFreezeTests {
    @Test("A file-system-consistent point has what was written and never synced, without a journal to replay")
    func fileSystemConsistent() async throws {
        guard Program.exists("mkfs.xfs") else { return print("skipped: mkfs.xfs is not installed") }
        let bed = try LiveTapBed(disks: 1, bytes: 448 << 20, loopOptions: ["--partscan"])
        let disk = try PartitionedDisk(bed.loops[0].path, ["size=96M", "size=336M"])
        try Program.run(["mkfs.ext4", "-q", disk.partition(1)])
        try Program.run(["mkfs.xfs", "-q", disk.partition(2)])
        let ext4 = try MountPoint(), xfs = try MountPoint()
        try Program.run(["mount", disk.partition(1), ext4.path])
        try Program.run(["mount", disk.partition(2), xfs.path])
        bed.configuration.freezeMilliseconds = 20_000
        try await bed.start()
        try await bed.fullSync()
        for round in 1...3 {
            // Written to memory, and left there.
            let words = Data((0..<300_000).map { UInt8(truncatingIfNeeded: $0 &* round) })
            for mount in [ext4, xfs] {
                try #require(FileManager.default.createFile(atPath: mount.path + "/file\(round)", contents: words))
            }
            let cut = try await bed.carry(consistency: .fileSystem)
            let proof = try #require(cut.proof)
            #expect(proof.method == .freeze && proof.consistency == .fileSystem && proof.freezeMilliseconds > 0)
            let copy = try bed.copyOfImage(options: ["--partscan"])
            let partitions = try PartitionedDisk(scanning: copy.path)
            for (number, options) in [(1, "ro,noload"), (2, "ro,norecovery,nouuid")] {
                let there = try MountPoint()
                try Program.run(["mount", "-o", options, partitions.partition(number), there.path])
                #expect(FileManager.default.contents(atPath: there.path + "/file\(round)") == words, "partition \(number), round \(round)")
                try there.unmount()
            }
            try Program.run(["e2fsck", "-fn", partitions.partition(1)])
            // A frozen XFS has a record in its log on purpose (for files that are open and have no name any more).
            let there = try MountPoint()
            try Program.run(["mount", "-o", "nouuid", partitions.partition(2), there.path])
            try there.unmount()
            try Program.run(["xfs_repair", "-n", partitions.partition(2)])
        }
        let figures = await bed.group.liveStatistics
        #expect(figures.fileSystemConsistentCount == 3 && figures.freezeFailedCount == 0)
        print("\(figures.freezeCount) freezes of two file systems, \(figures.freezeMillisecondsMax) ms at most")
        try ext4.unmount()
        try xfs.unmount()
        #expect(try await bed.quietImagesEqualDisks())
    }

    @Test("A freeze that fails, or outlasts its limit, leaves a crash-consistent point that says so", arguments: ["frozen by somebody else", "too long", "nothing mounted", "read-only"])
    func fallsBack(why: String) async throws {
        let bed = try LiveTapBed(disks: 1, bytes: 32 << 20)
        let mount = try MountPoint()
        try Program.run(["mkfs.ext4", "-q", bed.loops[0].path])
        if why != "nothing mounted" { try Program.run(["mount", "-o", why == "read-only" ? "ro" : "rw", bed.loops[0].path, mount.path]) }
        bed.configuration.freezeMilliseconds = why == "too long" ? 1000 : 20_000
        try await bed.start()
        try await bed.fullSync()
        let path = mount.path + "/b"
        // A write that waits for the guard.
        if why == "too long" { await bed.group.inject([], whileFrozen: { _ = FileManager.default.createFile(atPath: path, contents: nil) }) }
        if why == "too long" || why == "frozen by somebody else" {
            try Program.run(["dd", "if=/dev/urandom", "of=\(mount.path)/a", "bs=1M", "count=8", "status=none"])
        }
        if why == "frozen by somebody else" { try Program.run(["fsfreeze", "-f", mount.path]) }
        let cut = try await bed.carry(consistency: .fileSystem)
        let proof = try #require(cut.proof)
        #expect(proof.consistency == .crash)
        let words = why == "frozen by somebody else" ? "somebody else has frozen it" : why == "too long" ? "at the limit" : "no file system"
        #expect(bed.events.withLock { $0.contains { $0.contains(words) && $0.contains("crash-consistent") } }, "\(bed.events.withLock { $0 })")
        if why == "frozen by somebody else" {
            #expect(try Program.run(["fsfreeze", "-u", mount.path]) == "", "not thawed by us")
        }
        if why != "nothing mounted" { try mount.unmount() }
        #expect(try await bed.quietImagesEqualDisks())
    }

    @Test("Rounds that do not converge end in a short freeze, and its point is exact")
    func freezesWhenRoundsDoNotConverge() async throws {
        let bed = try LiveTapBed(disks: 1, bytes: 64 << 20)
        let mount = try MountPoint()
        try Program.run(["mkfs.ext4", "-q", bed.loops[0].path])
        try Program.run(["mount", bed.loops[0].path, mount.path])
        bed.configuration.freezeMilliseconds = 10_000
        bed.configuration.roundsMax = 1
        try await bed.start()
        try await bed.fullSync()
        let log = try SyncedLog(directory: mount.path)
        log.start()
        defer { log.stop() }
        for _ in 0..<200 {
            try await log.progress(by: 2)
            let synced = log.synced
            guard try await bed.carry().kind == .exact, await bed.group.liveStatistics.freezeCount > 1 else { continue }
            let copy = try bed.copyOfImage()
            let there = try MountPoint()
            try Program.run(["mount", "-o", "ro", copy.path, there.path])
            #expect(try SyncedLog.records(directory: there.path) >= synced)
            try there.unmount()
            break
        }
        let figures = await bed.group.liveStatistics
        #expect(figures.freezeCount > 0)
        #expect(figures.freezeFailedCount == 0)
        print("\(figures.freezeCount) freezes, \(figures.freezeMillisecondsMax) ms at most, \(figures.provenCount) proven, \(figures.unprovenCount) not")
        log.stop()
        try mount.unmount()
    }

    @Test("Mounts are found by the file system, not by their lines")
    func mountLines() {
        let text = """
            21 1 8:2 / / rw,relatime shared:1 - ext4 /dev/sda2 rw,discard
            22 21 8:1 / /boot/efi rw - vfat /dev/sda1 rw
            23 21 8:2 /etc/hosts /var/lib/box/hosts ro shared:2 master:1 - ext4 /dev/sda2 rw
            24 21 8:16 / /backup\\040disk rw - ext4 /dev/sdb ro,norecovery
            25 21 0:50 /@ /data rw - btrfs /dev/sdc rw
            26 21 0:60 / /proc rw - proc proc rw
            """
        let mounts = MountedFileSystem.parse(text) { $0 == "/dev/sdc" ? DeviceNumber(major: 8, minor: 32) : nil }
        #expect(mounts.map(\.mountPoint) == ["/", "/boot/efi", "/var/lib/box/hosts", "/backup disk", "/data"])
        #expect(mounts.map(\.isReadOnly) == [false, false, false, true, false])
        #expect(mounts.map(\.isWhole) == [true, true, false, true, false])
        #expect(mounts[4].device == DeviceNumber(major: 8, minor: 32) && mounts[4].fileNumber == DeviceNumber(major: 0, minor: 50))
    }
}

/// Partitions of a loop device, gone with this object.
final class PartitionedDisk {
    let path: String

    init(_ path: String, _ lines: [String], label: String = "gpt") throws {
        self.path = path
        try Program.run(["sh", "-ec", "printf 'label: \(label)\\n\(lines.joined(separator: "\\n"))\\n' | sfdisk -q --no-reread \(path); partx -u \(path) || true"])
    }

    init(scanning path: String) throws {
        self.path = path
        try Program.run(["sh", "-c", "partx -u \(path) || true"])
    }

    func partition(_ number: Int) -> String { "\(path)p\(number)" }

    deinit { _ = try? Program.run(["partx", "-d", path]) }
}

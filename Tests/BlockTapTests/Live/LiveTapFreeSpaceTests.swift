import Foundation
import Testing

@testable import BlockTap

/// A full sync that leaves out what file systems have free.
@Suite(
    .serialized,
    .enabled(if: LiveTapBed.isAvailable, "needs root, loop devices, a kernel with BTF, and the live tap's program (tools/test compiles it)"))
struct LiveTapFreeSpaceTests {
    @Test("Free space is not copied, and the replica's file systems are whole: files deleted and written before, during and after the sync", arguments: ["ext4", "xfs"])
    func freeSpace(type: String) async throws {
        guard Program.exists("mkfs.\(type)") else { return print("skipped: mkfs.\(type) is not installed") }
        // It does not begin at a whole block of the disk.
        let bed = try LiveTapBed(disks: 1, bytes: 640 << 20, loopOptions: ["--partscan"])
        let disk = try PartitionedDisk(bed.loops[0].path, ["start=2049,size=1228800"])
        try Program.run(["mkfs.\(type)", "-q", disk.partition(1)])
        let mount = try MountPoint()
        try Program.run(["mount", disk.partition(1), mount.path])
        for number in 0..<12 { try Self.write(4, to: mount.path + "/before\(number)") }
        try Program.run(["sync", "-f", mount.path])
        bed.configuration.skipsFreeSpace = true
        try await bed.start()
        // In memory only, when the sync begins.
        for number in 0..<4 { unlink(mount.path + "/before\(number)") }
        try Self.write(3, to: mount.path + "/between")
        let free = Self.freeBytes(mount.path)
        bed.group.beginFullSync()
        var epoch = 0
        while await bed.group.needsFuzzyCut {
            try await bed.carry(fuzzyBytesMax: 8 << 20)
            epoch += 1
            unlink(mount.path + "/before\(3 + epoch)")
            unlink(mount.path + "/during\(epoch - 2)")
            try Self.write(1 + epoch % 4, to: mount.path + "/during\(epoch)")
            if epoch % 3 == 0 { try Program.run(["sync", "-f", mount.path]) }
        }
        let skipped = await bed.group.liveStatistics.skippedFreeBytes
        let carried = bed.carriedBytes
        #expect(carried == UInt64(bed.bytes) - skipped)
        #expect(Double(skipped) > Double(free) * 0.9, "\(skipped >> 20) MiB left out, \(free >> 20) MiB free")
        for number in 0..<3 { try Self.write(5, to: mount.path + "/after\(number)") }
        try Program.run(["sync", "-f", mount.path])
        try await bed.carryUntilProven()
        try check(bed, type, equals: mount.path)
        // And a point of a moment at which nobody has synced anything.
        for number in 0..<3 { unlink(mount.path + "/after\(number)") }
        try Self.write(6, to: mount.path + "/later")
        try await bed.carryUntilProven()
        try check(bed, type, equals: nil)
        print("\(type): \(bed.bytes >> 20) MiB, \(skipped >> 20) MiB of \(free >> 20) MiB free left out, \(carried >> 20) MiB copied in \(epoch) epochs")
        try mount.unmount()
    }

    @Test("Believing what is free in memory without a sync is caught: a point before the journal is written has the old file", arguments: [true, false])
    func syncIsNeeded(isMutant: Bool) async throws {
        guard Program.exists("mkfs.xfs") else { return print("skipped: mkfs.xfs is not installed") }
        let bed = try LiveTapBed(disks: 1, bytes: 340 << 20, loopOptions: ["--partscan"])
        let disk = try PartitionedDisk(bed.loops[0].path, ["size=330M"])
        try Program.run(["mkfs.xfs", "-q", disk.partition(1)])
        let mount = try MountPoint()
        try Program.run(["mount", disk.partition(1), mount.path])
        try Self.write(24, to: mount.path + "/old")
        try Program.run(["sync", "-f", mount.path])
        let words = FileManager.default.contents(atPath: mount.path + "/old")
        bed.configuration.skipsFreeSpace = true
        try await bed.start()
        await bed.group.inject(isMutant ? .skipFreeSpaceSync : [])
        let before = Self.freeBytes(mount.path)
        unlink(mount.path + "/old")
        while Self.freeBytes(mount.path) < before + 20 << 20 { try await Task.sleep(for: .milliseconds(1)) }
        try await bed.fullSync()
        try await bed.carryUntilProven()
        let copy = try bed.copyOfImage(options: ["--partscan"])
        let partitions = try PartitionedDisk(scanning: copy.path)
        let there = try MountPoint()
        try Program.run(["mount", "-o", "nouuid", partitions.partition(1), there.path])
        let found = FileManager.default.contents(atPath: there.path + "/old")
        let isWrong = found != nil && found != words
        #expect(isWrong == isMutant, "the file is \(found == nil ? "gone" : found == words ? "whole" : "torn")")
        try there.unmount()
        try mount.unmount()
    }

    @Test("Only whole blocks of the disk count")
    func wholeBlocks() {
        #expect(LiveFreeSpace.wholeBlocks(from: 4096, lengthBytes: 8192) == 1..<3)
        #expect(LiveFreeSpace.wholeBlocks(from: 4097, lengthBytes: 8192) == 2..<3)
        #expect(LiveFreeSpace.wholeBlocks(from: 4608, lengthBytes: 4096).isEmpty)
        #expect(LiveFreeSpace.wholeBlocks(from: 512, lengthBytes: 1024).isEmpty)
        #expect(LiveFreeSpace.wholeBlocks(from: 0, lengthBytes: 4095).isEmpty)
    }

    // MARK: -

    private static func write(_ mebibytes: Int, to path: String) throws {
        try Program.run(["dd", "if=/dev/urandom", "of=\(path)", "bs=1M", "count=\(mebibytes)", "status=none"])
    }

    private static func freeBytes(_ path: String) -> UInt64 {
        var facts = statvfs()
        return statvfs(path, &facts) == 0 ? UInt64(facts.f_bfree) * UInt64(facts.f_frsize) : 0
    }

    /// The image mounts, has these files, and its file system finds nothing wrong.
    private func check(_ bed: LiveTapBed, _ type: String, equals directory: String?) throws {
        let copy = try bed.copyOfImage(options: ["--partscan"])
        let partitions = try PartitionedDisk(scanning: copy.path)
        let there = try MountPoint()
        try Program.run(["mount"] + (type == "xfs" ? ["-o", "nouuid"] : []) + [partitions.partition(1), there.path])
        if let directory { try Program.run(["diff", "-r", directory, there.path]) }
        try there.unmount()
        try Program.run(type == "xfs" ? ["xfs_repair", "-n", partitions.partition(1)] : ["e2fsck", "-fn", partitions.partition(1)])
    }
}

import CIoUring
import Foundation
import Synchronization
import Testing

@testable import BlockTap

/// The ways in which a disk comes to be written, and the file systems on it.
@Suite(
    .serialized,
    .enabled(if: LiveTapBed.isAvailable, "needs root, loop devices, a kernel with BTF, and the live tap's program (tools/test compiles it)"))
struct LiveTapUseTests {
    /// What is run, and what it needs that may not be installed.
    static let uses: [(what: String, needs: String, commands: [String])] = [
        ("dd over the whole disk, buffered", "dd", ["dd if=/dev/urandom of=$DISK bs=1M count=$MIB conv=fsync status=none"]),
        ("dd over the whole disk, direct", "dd", ["dd if=/dev/urandom of=$DISK bs=1M count=$MIB oflag=direct status=none"]),
        ("sectors smaller than a block", "dd", ["dd if=/dev/urandom of=$DISK bs=512 count=3 seek=77 oflag=direct status=none"]),
        ("the last sector", "dd", ["dd if=/dev/urandom of=$DISK bs=512 count=1 seek=$((MIB * 2048 + 2)) oflag=direct status=none"]),
        ("discard of a part, then of the whole disk", "blkdiscard", ["blkdiscard -o 1M -l 5M $DISK", "blkdiscard $DISK"]),
        ("zeroing", "blkdiscard", ["blkdiscard -z -o 2M -l 3M $DISK"]),
        ("libaio, direct, random sizes", "fio", [fio("--ioengine=libaio --direct=1 --rw=randwrite --bsrange=512-64k --bs_unaligned=0 --iodepth=16")]),
        ("io_uring, direct, with discards", "fio", [fio("--ioengine=io_uring --direct=1 --rw=randwrite --bs=4k --iodepth=32"), fio("--ioengine=io_uring --direct=1 --rw=randtrim --bs=64k --size=4M")]),
        ("io_uring, buffered", "fio", [fio("--ioengine=io_uring --direct=0 --rw=randwrite --bs=3k --iodepth=8 --end_fsync=1")]),
        ("mapped memory over the disk", "fio", [fio("--ioengine=mmap --rw=randwrite --bs=4k --end_fsync=1")]),
        ("several writers, O_SYNC and O_DSYNC", "fio", [fio("--ioengine=psync --sync=dsync --rw=randwrite --bs=8k --numjobs=4 --size=2M --group_reporting")]),
        ("partition table and mkfs on a partition", "sfdisk", [
            "printf 'label: gpt\\n,16M\\n,\\n' | sfdisk -q --no-reread $DISK", "partx -u $DISK || true", "mkfs.ext4 -q -F ${DISK}p1",
        ]),
        ("another partition table", "sfdisk", [
            "sfdisk -q --no-reread --delete $DISK 2; partx -u $DISK || true", "printf ',8M\\n,\\n' | sfdisk -q --no-reread --append $DISK; partx -u $DISK || true",
            "mkfs.ext4 -q -F ${DISK}p3", "partx -d $DISK || true", "printf 'label: dos\\n,20M\\n' | sfdisk -q --no-reread --wipe always $DISK",
        ]),
        ("swap that is used", "mkswap", [
            "wipefs -aq $DISK", "mkswap -q $DISK",
            "trap 'swapoff $DISK' EXIT\nswapon $DISK\npython3 -c 'import mmap,os\nm=mmap.mmap(-1,24<<20,flags=mmap.MAP_PRIVATE|mmap.MAP_ANONYMOUS)\nm.write(os.urandom(24<<20))\nm.madvise(21)\nf=[l for l in open(\"/proc/self/status\") if l.startswith(\"VmSwap\")]\nassert int(f[0].split()[1])>0,f\nassert sum(m[::4096])>0'",
        ]),
        ("ext4: files, buffered and mapped, fstrim", "fstrim", [
            "mkfs.ext4 -q -F $DISK", "mount $DISK $MOUNT", "cp -a /etc/services $MOUNT/a",
            "dd if=/dev/urandom of=$MOUNT/b bs=64k count=40 status=none", "rm $MOUNT/a", "fstrim $MOUNT",
            "python3 -c 'import mmap,os\nf=open(os.environ[\"MOUNT\"]+\"/b\",\"r+b\")\nm=mmap.mmap(f.fileno(),0)\nm[100000:100400]=b\"x\"*400\nm.flush()'",
            "umount $MOUNT",
        ]),
        ("ext4 with discard: files come and go, and fio on them", "fio", [
            "mount -o discard $DISK $MOUNT", fio("--ioengine=libaio --direct=1 --rw=randwrite --bs=4k --iodepth=8", on: "$MOUNT/fio"),
            fio("--ioengine=mmap --rw=randwrite --bs=4k", on: "$MOUNT/mapped"), "rm $MOUNT/fio", "sync -f $MOUNT", "fallocate -l 6M $MOUNT/c",
            fio("--ioengine=io_uring --direct=0 --rw=randwrite --bs=1k --iodepth=4", on: "$MOUNT/c"), "fallocate -p -o 1M -l 2M $MOUNT/c", "umount $MOUNT",
        ]),
    ]

    private static func fio(_ options: String, on file: String = "$DISK") -> String {
        "fio --name=use --filename=\(file) --size=8M --allow_file_create=1 --output=/dev/null \(options)"
    }

    @Test("However a disk is written, while epochs are carried, the replica is the disk afterwards")
    func everyUse() async throws {
        // Its last block is not a whole one.
        let bed = try LiveTapBed(disks: 1, bytes: (48 << 20) + 1536, loopOptions: ["--partscan"])
        let mount = try MountPoint()
        try await bed.start()
        try await bed.fullSync()
        try await bed.carryUntilProven()
        for (what, needs, commands) in Self.uses {
            guard Program.exists(needs) else {
                print("skipped: \(what): \(needs) is not installed")
                continue
            }
            let isDone = Atomic<Bool>(false)
            let environment = ["env", "DISK=\(bed.loops[0].path)", "MIB=48", "MOUNT=\(mount.path)", "sh", "-ec"]
            let disk = bed.loops[0].path
            async let finished: Void = withCheckedThrowingContinuation { continuation in
                Thread {
                    let result = Result {
                        for command in commands {
                            do { try Program.run(environment + [command]) } catch { throw Program.Failure(description: "\(what) on \(disk): \(error)") }
                        }
                    }
                    isDone.store(true, ordering: .releasing)
                    continuation.resume(with: result)
                }.start()
            }
            while !isDone.load(ordering: .acquiring) {
                try await bed.carry()
                try await Task.sleep(for: .milliseconds(1))
            }
            try await finished
            #expect(try await bed.quietImagesEqualDisks(), "\(what)")
        }
        let figures = await bed.group.liveStatistics
        #expect(figures.resyncCount == 0, "\(figures.resyncReason ?? "")")
        print("\(Self.uses.count) uses: \(figures.issuedCount) writes, \(figures.provenCount) points proven, \(figures.unprovenCount) not, \(figures.unseenCompletionCount) unseen completions, \(figures.freezeCount) freezes")
        withExtendedLifetime(mount) {}
    }

    @Test("A mounted file system's points mount, and hold everything that was synced before the cut", arguments: ["ext4", "xfs"])
    func mountedFileSystem(type: String) async throws {
        guard Program.exists("mkfs.\(type)") else { return print("skipped: mkfs.\(type) is not installed") }
        let bed = try LiveTapBed(disks: 1, bytes: 320 << 20)
        let mount = try MountPoint()
        try Program.run(["mkfs.\(type)", "-q", bed.loops[0].path])
        try Program.run(["mount", bed.loops[0].path, mount.path])
        try await bed.start()
        try await bed.fullSync()
        let log = try SyncedLog(directory: mount.path)
        log.start()
        defer { log.stop() }
        var proven = 0
        for _ in 0..<12 {
            try await log.progress(by: 3)
            let synced = log.synced
            guard try await bed.carry().kind == .exact else { continue }
            proven += 1
            if proven % 4 != 1 { continue }
            let copy = try LoopDevice(bytes: bed.bytes)
            var offset = 0
            while offset < bed.bytes {
                let count = pwrite(copy.file.fd, bed.images[0] + offset, min(4 << 20, bed.bytes - offset), off_t(offset))
                try #require(count > 0)
                offset += count
            }
            try Program.run(["blockdev", "--flushbufs", copy.path])
            let there = try MountPoint()
            try Program.run(["mount"] + (type == "xfs" ? ["-o", "nouuid"] : []) + [copy.path, there.path])
            let found = try SyncedLog.records(directory: there.path)
            #expect(found >= synced, "\(synced) records were synced before the cut, the point has \(found)")
            try there.unmount()
            try Program.run(type == "xfs" ? ["xfs_repair", "-n", copy.path] : ["e2fsck", "-fn", copy.path])
        }
        #expect(proven > 0)
        log.stop()
        try mount.unmount()
        #expect(try await bed.quietImagesEqualDisks())
        let figures = await bed.group.liveStatistics
        #expect(figures.resyncCount == 0, "\(figures.resyncReason ?? "")")
        print("\(type): \(log.synced) records, \(figures.provenCount) points proven, \(figures.unprovenCount) not, \(figures.roundCount) rounds, \(figures.collisionCount) collisions, \(figures.unseenCompletionCount) unseen completions of \(figures.issuedCount)")
    }

    @Test("A sparse disk of 100 TiB is followed without its bitmaps' 9 GiB: those of a region are made when it is first written")
    func hugeDisk() async throws {
        guard Program.exists("mkfs.xfs") else { return print("skipped: mkfs.xfs is not installed") }
        let base = try LoopDevice(bytes: 512 << 20)
        let mount = try MountPoint()
        try Program.run(["mkfs.xfs", "-q", base.path])
        try Program.run(["mount", base.path, mount.path])
        try Program.run(["truncate", "-s", "100T", mount.path + "/disk"])
        let path = try Program.run(["losetup", "--find", "--show", "--direct-io=on", mount.path + "/disk"]).trimmingCharacters(in: .whitespacesAndNewlines)
        defer { _ = try? Program.run(["losetup", "-d", path]) }
        let bpf = try MountPoint()
        try Program.run(["mount", "-t", "bpf", "none", bpf.path])
        let pins = bpf.path + "/group"
        let group = try await LiveTapGroup(disks: [(name: "d0", path: path)], pinDirectory: pins)
        defer {
            group.close()
            LiveTapGroup.detach(pinDirectory: pins)
        }
        #expect(await group.liveStatistics.bitmapBytes == 0)

        let offsets: [Int] = [0, 50 << 40, (100 << 40) - blockBytes]
        let fd = open(path, O_WRONLY | O_CLOEXEC | ciouring_o_direct)
        defer { close(fd) }
        let block = UnsafeMutableRawPointer.allocate(byteCount: blockBytes, alignment: blockBytes)
        defer { block.deallocate() }
        for pass in 1...2 {
            memset(block, Int32(pass), blockBytes)
            for offset in offsets { try #require(pwrite(fd, block, blockBytes, off_t(offset)) == blockBytes) }
            let cut = try await group.cut(fuzzyBytesMax: 0)
            #expect(cut.kind == .exact)
            // At first the region is all that is known, then the block.
            #expect(cut.blockCount == (pass == 1 ? 3 * 4096 : 3))
            var seen: Set<Int> = []
            drain: while true {
                guard let item = group.nextItem() else {
                    try await Task.sleep(for: .milliseconds(1))
                    continue
                }
                switch item {
                case .data(_, let buffer):
                    for offset in offsets where offset >= Int(buffer.offsetBytes) && offset < Int(buffer.offsetBytes) + buffer.lengthBytes {
                        #expect((buffer.memory + offset - Int(buffer.offsetBytes)).load(as: UInt8.self) == UInt8(pass))
                        seen.insert(offset)
                    }
                    group.release(buffer)
                case .zero: break
                case .end(let epoch):
                    group.acknowledge(epoch)
                    break drain
                case .abandoned(_, let reason):
                    Issue.record("\(reason)")
                    break drain
                }
            }
            #expect(seen.count == 3)
        }
        let figures = await group.liveStatistics
        #expect(figures.bitmapBytes == 3 * 3 << 20)
        #expect(figures.resyncCount == 0)
    }

    @Test("What the live tap cannot follow is refused in words")
    func refusals() throws {
        let file = try TemporaryFile(bytes: 1 << 20)
        #expect { try LiveDisk(name: "a", path: file.path) } throws: { "\($0)".contains("not a block device") }
        if FileManager.default.fileExists(atPath: "/dev/zram0") {
            #expect { try LiveDisk(name: "a", path: "/dev/zram0") } throws: { "\($0)".contains("not request-based") }
        }
        let loop = try LoopDevice(bytes: 16 << 20, options: ["--partscan"])
        try Program.run(["sh", "-ec", "printf 'label: gpt\\n,\\n' | sfdisk -q --no-reread \(loop.path); partx -u \(loop.path) || true"])
        defer { _ = try? Program.run(["partx", "-d", loop.path]) }
        #expect { try LiveDisk(name: "a", path: loop.path + "p1") } throws: { "\($0)".contains("follow the whole disk") }
    }
}

/// A directory to mount on; unmounted with this object.
final class MountPoint: @unchecked Sendable {
    private let directory: TemporaryDirectory
    var path: String { directory.path }
    init() throws { directory = try TemporaryDirectory() }
    func unmount() throws { try Program.run(["umount", path]) }
    deinit { umount2(path, Int32(MNT_DETACH)) }
}

/// A file to which numbered records are appended, each synced before the next.
final class SyncedLog: @unchecked Sendable {
    private let fd: Int32
    private let syncedCount = Atomic<Int>(0)
    private let isStopping = Atomic<Bool>(false)
    private let done = DispatchSemaphore(value: 0)
    private var isStopped = false
    private static let recordBytes = 1000

    init(directory: String) throws {
        fd = open(directory + "/log", O_RDWR | O_CREAT | O_CLOEXEC, 0o600)
        guard fd >= 0 else { throw SystemError(errno: errno, doing: "make a log in \(directory)") }
    }

    var synced: Int { syncedCount.load(ordering: .acquiring) }

    func progress(by count: Int) async throws {
        let goal = synced + count
        while synced < goal { try await Task.sleep(for: .microseconds(500)) }
    }

    func start() {
        Thread { [self] in
            var number = 0
            while !isStopping.load(ordering: .relaxed) {
                let record = [UInt8](repeating: UInt8(number % 251 + 1), count: Self.recordBytes)
                guard pwrite(fd, record, record.count, off_t(number * Self.recordBytes)) == record.count, fdatasync(fd) == 0 else { break }
                number += 1
                syncedCount.store(number, ordering: .releasing)
            }
            done.signal()
        }.start()
    }

    func stop() {
        if isStopped { return }
        isStopped = true
        isStopping.store(true, ordering: .relaxed)
        done.wait()
        close(fd)
    }

    /// How many whole records there are, in order.
    static func records(directory: String) throws -> Int {
        let data = [UInt8](try Data(contentsOf: URL(fileURLWithPath: directory + "/log")))
        var count = 0
        while (count + 1) * recordBytes <= data.count,
            data[count * recordBytes..<(count + 1) * recordBytes].allSatisfy({ $0 == UInt8(count % 251 + 1) })
        { count += 1 }
        return count
    }
}

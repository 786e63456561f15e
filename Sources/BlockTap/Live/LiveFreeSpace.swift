import CLiveTap
import Glibc

/// What a full sync need not copy: blocks that a mounted ext4 or XFS has free (FS_IOC_GETFSMAP).
///
/// **Why the replica may lack them.** The tap is attached before anything here is asked, so every write from then on is dirty by itself. A block that the
/// file system calls free at some moment after that holds nothing that the file system will ever read before it writes it: if it is allocated
/// later, the data, or the journal's copy of it, is written later, is dirty, and comes with a later epoch. (What is allocated without being written
/// reads as zeroes, because the file system knows so, whatever the block holds.)
///
/// One thing is missing: the file system says what it has in memory. It may have freed the block in a transaction that is not on disk, and a
/// point taken before that has the old file, with a block that was never copied. So after the question the file system is synced; every recovery
/// point is later than its full sync, so each has the freeing on disk or in its journal. If the sync fails, or the file system is read-only by
/// then (its journal may have been aborted), nothing of it is left out; likewise for a read-only one, whose journal may not have been replayed.
///
/// Only blocks of 4 KiB that are free as a whole count, and only inside free extents: what no mounted file system speaks of is copied. File systems
/// are looked for on the disks and their partitions; those on device-mapper or md are copied whole.
extension LiveEpochEngine {
    /// Takes free blocks out of `unsynced`: returns how many bytes.
    func leaveOutFreeSpace() -> UInt64 {
        var total: UInt64 = 0
        for disk in disks {
            for part in [Sysfs(disk.disk.number)] + Sysfs(disk.disk.number).partitions {
                let isWhole = part.number == disk.disk.number
                guard let start = isWhole ? 0 : part.attribute("start").flatMap({ UInt64($0) }) else { continue }
                for fileSystem in MountedFileSystem.on([part.number]) where ["ext4", "xfs"].contains(fileSystem.type) && !fileSystem.isReadOnly {
                    guard let fd = fileSystem.opened() else { continue }
                    defer { close(fd) }
                    let free = LiveFreeSpace.blocks(of: fd, device: part.number, startBytes: start * 512)
                    guard !free.isEmpty, faults.contains(.skipFreeSpaceSync) || clivetap_sync(fd) == 0, LiveFreeSpace.isWritable(fd) else { continue }
                    var skipped: UInt64 = 0
                    for run in free where run.lowerBound < disk.disk.blockCount {
                        let run = run.clamped(to: 0..<disk.disk.blockCount)
                        disk.unsynced.clear(first: run.lowerBound, length: UInt64(run.count))
                        skipped += UInt64(run.count) * UInt64(blockBytes)
                    }
                    onEvent?("\(disk.disk.name): \(skipped >> 20) MiB that the \(fileSystem.type) on \(fileSystem.mountPoint) has free are not copied")
                    total += skipped
                }
            }
        }
        return total
    }
}

enum LiveFreeSpace {
    /// Blocks of the whole disk that the file system of `fd`, at `startBytes` of the disk, has free.
    static func blocks(of fd: Int32, device: DeviceNumber, startBytes: UInt64) -> [Range<UInt64>] {
        guard let map = clivetap_fsmap_open(fd) else { return [] }
        defer { clivetap_fsmap_close(map) }
        var extents = Array(repeating: clivetap_extent(), count: 1024)
        var free: [Range<UInt64>] = []
        while true {
            let count = clivetap_fsmap_next(map, &extents, UInt32(extents.count))
            guard count >= 0 else { return [] }                    // not offered, or it failed half-way
            if count == 0 { return free }
            for extent in extents[..<Int(count)] where extent.is_free && extent.has_device {
                guard DeviceNumber(major: extent.major, minor: extent.minor) == device else { continue }
                let run = wholeBlocks(from: startBytes + extent.start_bytes, lengthBytes: extent.length_bytes)
                if !run.isEmpty { free.append(run) }
            }
        }
    }

    /// The blocks that lie in it as a whole.
    static func wholeBlocks(from start: UInt64, lengthBytes: UInt64) -> Range<UInt64> {
        let unit = UInt64(blockBytes)
        let first = (start + unit - 1) / unit, end = (start + lengthBytes) / unit
        return first < end ? first..<end : 0..<0
    }

    static func isWritable(_ fd: Int32) -> Bool {
        var facts = statvfs()
        return fstatvfs(fd, &facts) == 0 && facts.f_flag & UInt(ST_RDONLY) == 0
    }
}

import Foundation
import Testing

@testable import BlockTap

private func refusal(of path: String, access: BlockDevice.Access = .readWrite, exclusive: Bool = true) -> SystemError? {
    do throws(SystemError) {
        _ = try BlockDevice.open(path: path, access: access, exclusive: exclusive)
        return nil
    } catch {
        return error
    }
}

@Suite struct BlockDeviceTests {
    @Test func opensARegularFileWithItsGeometry() throws {
        let file = try TemporaryFile(bytes: 3 << 20)
        let device = try BlockDevice.open(path: file.path, access: .readWrite, exclusive: true)
        #expect(device.geometry.sizeBytes == 3 << 20)
        #expect(device.geometry.logicalBlockBytes >= 512)
        #expect(!device.isBlockDevice)
    }

    @Test func aLockWaitsForAHolderThatIsAboutToBeGone() throws {
        let file = try TemporaryFile(bytes: 4096)
        let first = open(file.path, O_RDWR | O_CLOEXEC), second = open(file.path, O_RDWR | O_CLOEXEC)
        defer { close(second) }
        #expect(lockFile(first) == 0)
        #expect(lockFile(second, patienceMilliseconds: 100) == EWOULDBLOCK)
        Thread.detachNewThread {
            usleep(200_000)
            close(first)
        }
        #expect(lockFile(second, patienceMilliseconds: 60_000) == 0)
        #expect(lockFile(-1) == EBADF)
    }

    @Test func refusesWhatIsNotADisk() throws {
        #expect(refusal(of: "/nonexistent/disk")?.errno == ENOENT)
        #expect(refusal(of: "/nonexistent/disk")?.what == "cannot open /nonexistent/disk: there is no such device or file")
        #expect(refusal(of: "/dev/null")?.what == "cannot open /dev/null: it is not a block device or regular file")
        #expect(refusal(of: "/tmp")?.errno == EISDIR)
        let empty = try TemporaryFile(bytes: 0)
        #expect(refusal(of: empty.path)?.what.contains("its size is zero") == true)
        let odd = try TemporaryFile(bytes: 1000)
        #expect(refusal(of: odd.path)?.what.contains("not a multiple of its") == true)
    }

    @Test func aSecondOpenerOfAFileIsToldSo() throws {
        let file = try TemporaryFile(bytes: 1 << 20)
        let link = file.path + ".link"
        symlink(file.path, link)
        defer { unlink(link) }
        var first: BlockDevice? = try BlockDevice.open(path: file.path, access: .readWrite, exclusive: true)
        #expect(refusal(of: link)?.errno == EAGAIN)
        #expect(refusal(of: file.path)?.what.contains("another program has locked it") == true)
        #expect(refusal(of: file.path, access: .readOnly, exclusive: false) == nil)
        _ = first
        first = nil
        #expect(refusal(of: file.path) == nil)
    }

    @Test func findsMountsInMountinfo() {
        let text = """
            22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
            90 22 0:45 / /data\\040two rw - btrfs /dev/vdb rw,space_cache
            91 22 0:46 / /proc rw - proc proc rw
            """
        let mounts = Mount.parse(text) { $0 == "/dev/vdb" ? DeviceNumber(major: 254, minor: 16) : nil }
        #expect(mounts.contains(Mount(number: DeviceNumber(major: 254, minor: 0), mountPoint: "/")))
        #expect(mounts.contains(Mount(number: DeviceNumber(major: 254, minor: 16), mountPoint: "/data two")))
    }
}

@Suite(.serialized, .enabled(if: LoopDevice.isAvailable, "needs root and losetup"))
struct LoopDeviceTests {
    @Test func opensALoopDeviceThroughALink() throws {
        let loop = try LoopDevice(bytes: 8 << 20)
        let link = loop.file.path + ".link"
        symlink(loop.path, link)
        defer { unlink(link) }
        let device = try BlockDevice.open(path: link, access: .readWrite, exclusive: true)
        #expect(device.isBlockDevice)
        #expect(device.geometry.sizeBytes == 8 << 20)
        #expect(device.geometry.logicalBlockBytes == 512)
        #expect(device.canPunchHoles)
    }

    @Test func reportsLargerLogicalBlocks() throws {
        let loop = try LoopDevice(bytes: 8 << 20, options: ["--sector-size", "4096"])
        let device = try BlockDevice.open(path: loop.path, access: .readOnly, exclusive: true)
        #expect(device.geometry.logicalBlockBytes == 4096)
        #expect(!device.canPunchHoles)
    }

    @Test func aSecondOpenerOfADeviceIsToldSo() throws {
        let loop = try LoopDevice(bytes: 8 << 20)
        var first: BlockDevice? = try BlockDevice.open(path: loop.path, access: .readWrite, exclusive: true)
        let error = refusal(of: loop.path)
        #expect(error?.errno == EAGAIN)
        #expect(error?.what.contains("another program holds it open exclusively") == true)
        _ = first
        first = nil
        #expect(refusal(of: loop.path) == nil)
    }

    @Test func refusesTheFileBehindALoopDevice() throws {
        let loop = try LoopDevice(bytes: 8 << 20)
        #expect(refusal(of: loop.file.path)?.what.contains("attached to the loop device \(loop.path)") == true)
    }

    @Test func refusesADeviceWithoutABackingFile() throws {
        var path = ""
        do {
            let loop = try LoopDevice(bytes: 8 << 20)
            path = loop.path
        }
        // Only looked at, neither claimed nor written: the number may be somebody else's disk by now.
        let error = refusal(of: path, access: .readOnly, exclusive: false)
        if !FileManager.default.fileExists(atPath: "/sys/block/\(path.dropFirst("/dev/".count))/loop/backing_file") {
            #expect(error?.what.contains("cannot use \(path): its size is zero") == true)
        }
    }

    @Test(.enabled(if: Program.exists("mkfs.ext4"), "needs mkfs.ext4"))
    func refusesAMountedDeviceAndNamesTheMountPoint() throws {
        let loop = try LoopDevice(bytes: 16 << 20)
        let directory = try TemporaryDirectory()
        try Program.run(["mkfs.ext4", "-q", loop.path])
        try Program.run(["mount", loop.path, directory.path])
        defer { _ = try? Program.run(["umount", directory.path]) }
        let error = refusal(of: loop.path)
        #expect(error?.errno == EBUSY)
        #expect(error?.what == "cannot open \(loop.path): it is mounted on \(directory.path) (unmount it first)")
        #expect(refusal(of: loop.path, access: .readOnly, exclusive: false) == nil)
    }

    @Test(.enabled(if: Program.exists("mkfs.ext4") && Program.exists("sfdisk"), "needs mkfs.ext4 and sfdisk"))
    func refusesADiskWithAMountedPartitionAndThePartitionOfATakenDisk() throws {
        let loop = try LoopDevice(bytes: 32 << 20, options: ["--partscan"])
        try Program.run(["sh", "-c", "printf ',\\n' | sfdisk --quiet \(loop.path) && (partx -a \(loop.path) 2>/dev/null; true)"])
        let partition = loop.path + "p1"
        let directory = try TemporaryDirectory()
        try Program.run(["mkfs.ext4", "-q", partition])
        do {
            try Program.run(["mount", partition, directory.path])
            defer { _ = try? Program.run(["umount", directory.path]) }
            #expect(refusal(of: loop.path)?.what
                == "cannot open \(loop.path): its partition \(partition) is mounted on \(directory.path) (unmount it first)")
            #expect(refusal(of: partition)?.what.contains("mounted on \(directory.path)") == true)
        }
        let disk = try BlockDevice.open(path: loop.path, access: .readWrite, exclusive: true)
        #expect(refusal(of: partition)?.errno == EAGAIN)
        _ = disk
    }

    @Test(.enabled(if: Program.exists("mkswap") && Program.exists("swapon"), "needs mkswap and swapon"))
    func refusesSwapSpace() throws {
        let loop = try LoopDevice(bytes: 16 << 20)
        try Program.run(["mkswap", loop.path])
        try Program.run(["swapon", loop.path])
        defer { _ = try? Program.run(["swapoff", loop.path]) }
        #expect(refusal(of: loop.path)?.what.contains("in use as swap space") == true)
    }
}

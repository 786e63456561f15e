import CIoUring
import Glibc

/// An open block device, or a regular file used as one, with its geometry. I/O bypasses the page cache.
public final class BlockDevice: @unchecked Sendable {
    public enum Access: Sendable { case readOnly, readWrite }

    /// As given to `open`.
    public let path: String
    /// Closed when this object goes.
    public let fd: Int32
    public let access: Access
    public let geometry: BlockGeometry
    public let isBlockDevice: Bool
    /// Whether ranges can be given back (FALLOC_FL_PUNCH_HOLE); they then read as zero.
    public let canPunchHoles: Bool

    private init(
        path: String, fd: Int32, access: Access, geometry: BlockGeometry, isBlockDevice: Bool, canPunchHoles: Bool
    ) {
        self.path = path
        self.fd = fd
        self.access = access
        self.geometry = geometry
        self.isBlockDevice = isBlockDevice
        self.canPunchHoles = canPunchHoles
    }

    deinit { close(fd) }

    /// Opens `path`, following symbolic links.
    ///
    /// - `exclusive`: nobody else may use the disk meanwhile (O_EXCL on a block device, which also keeps it from being mounted;
    ///   a lock on a regular file).
    ///
    /// Throws when it is missing, neither a block device nor a regular file, empty, or when its size is not a multiple of its
    /// block; and, unless it is only read and shared, when it is mounted (it or a partition of it), swapped on, or
    /// held by another device or program.
    ///
    /// - `patienceMilliseconds`: how long to wait for another program to let go. A killed one still holds its disks until the
    ///   kernel has taken its io_uring apart, some time after it is gone from the process table. Blocks the thread.
    public static func open(
        path: String, access: Access, exclusive: Bool, patienceMilliseconds: Int = 0
    ) throws(SystemError) -> BlockDevice {
        var patience = patienceMilliseconds
        while true {
            do throws(SystemError) {
                return try openOnce(path: path, access: access, exclusive: exclusive)
            } catch {
                guard error.isHeldByProgram, patience > 0 else { throw error }
            }
            usleep(50_000)
            patience -= 50
        }
    }

    private static func openOnce(path: String, access: Access, exclusive: Bool) throws(SystemError) -> BlockDevice {
        func refuse(_ error: Int32, _ reason: String) -> SystemError {
            SystemError(errno: error, what: "cannot open \(path): \(reason)")
        }
        var facts = stat()
        guard stat(path, &facts) == 0 else {
            throw errno == ENOENT
                ? refuse(ENOENT, "there is no such device or file") : refuse(errno, SystemError.text(of: errno))
        }
        let isBlockDevice: Bool
        switch facts.st_mode & S_IFMT {
        case S_IFBLK: isBlockDevice = true
        case S_IFREG: isBlockDevice = false
        case S_IFDIR: throw refuse(EISDIR, "it is a directory, not a block device or regular file")
        default: throw refuse(ENOTBLK, "it is not a block device or regular file")
        }
        if exclusive || access == .readWrite {
            let use = isBlockDevice
                ? DeviceUse.ofBlockDevice(DeviceNumber(facts.st_rdev))
                : DeviceUse.ofFile(device: facts.st_dev, inode: facts.st_ino)
            if let use { throw refuse(EBUSY, use) }
        }

        let fd = try openFile(path: path, access: access, exclusive: exclusive && isBlockDevice)
        var isOwned = false
        defer { if !isOwned { close(fd) } }
        // The path may have come to mean something else since it was looked at.
        var opened = stat()
        guard fstat(fd, &opened) == 0, opened.st_rdev == facts.st_rdev, opened.st_ino == facts.st_ino,
            opened.st_mode & S_IFMT == facts.st_mode & S_IFMT
        else { throw refuse(ESTALE, "it was replaced by another device or file meanwhile; try again") }
        if exclusive, !isBlockDevice, lockFile(fd, patienceMilliseconds: 0) != 0 {
            throw refuse(EAGAIN, "another program has locked it (is a second agent running on this disk?)")
        }

        let geometry = try geometry(of: fd, path: path, isBlockDevice: isBlockDevice, facts: opened)
        let canPunchHoles = access == .readWrite
            && (isBlockDevice
                ? Sysfs(DeviceNumber(opened.st_rdev)).canPunchHoles
                // Past the end: changes nothing, but fails where it is not supported.
                : ciouring_fallocate(fd, FileAllocation.punchHole, geometry.sizeBytes, UInt64(blockBytes)) == 0)
        isOwned = true
        return BlockDevice(
            path: path, fd: fd, access: access, geometry: geometry, isBlockDevice: isBlockDevice,
            canPunchHoles: canPunchHoles)
    }

    private static func openFile(path: String, access: Access, exclusive: Bool) throws(SystemError) -> Int32 {
        var flags = O_CLOEXEC | ciouring_o_direct
        flags |= access == .readWrite ? O_RDWR : O_RDONLY
        if exclusive { flags |= O_EXCL }
        var fd = Glibc.open(path, flags)
        if fd < 0 && errno == EINVAL {
            fd = Glibc.open(path, flags & ~ciouring_o_direct)       // a file system without direct I/O
        }
        guard fd < 0 else { return fd }
        // Whoever mounts it or is stacked on it was found before: this is a program's claim.
        let error = errno == EBUSY ? EAGAIN : errno
        let reason = switch errno {
        case EBUSY: "another program holds it open exclusively (is a second agent running on this disk, or is it mounted in another namespace?)"
        case EACCES, EPERM: "\(SystemError.text(of: errno)) (run as root)"
        case EROFS: "it is read-only"
        case ENXIO, ENOMEDIUM: "the device has no medium or is not there any more"
        default: SystemError.text(of: errno)
        }
        throw SystemError(errno: error, what: "cannot open \(path): \(reason)")
    }

    private static func geometry(
        of fd: Int32, path: String, isBlockDevice: Bool, facts: stat
    ) throws(SystemError) -> BlockGeometry {
        var sizeBytes = UInt64(facts.st_size)
        var logicalBytes: UInt32 = 512
        var optimalBytes: UInt32 = 0
        if isBlockDevice {
            var result = ciouring_block_size_bytes(fd, &sizeBytes)
            if result == 0 { result = ciouring_block_logical_bytes(fd, &logicalBytes) }
            if result == 0 { result = ciouring_block_optimal_bytes(fd, &optimalBytes) }
            guard result == 0 else {
                throw SystemError(errno: -result, doing: "read the geometry of \(path)")
            }
        } else {
            _ = ciouring_file_direct_alignment(fd, &logicalBytes)
            if logicalBytes < 512 { logicalBytes = 512 }
        }
        guard sizeBytes > 0 else {
            let advice = isBlockDevice ? "is a medium or backing file attached?" : "give it a size with truncate"
            throw SystemError(errno: ENXIO, what: "cannot use \(path): its size is zero (\(advice))")
        }
        guard sizeBytes % UInt64(logicalBytes) == 0 else {
            throw SystemError(
                errno: EINVAL,
                what: "cannot use \(path): its size of \(sizeBytes) bytes is not a multiple of its \(logicalBytes)-byte blocks (resize it with truncate)")
        }
        return BlockGeometry(
            sizeBytes: sizeBytes, logicalBlockBytes: logicalBytes,
            preferredBlockBytes: max(UInt32(blockBytes), optimalBytes.nonzeroBitCount == 1 ? optimalBytes : 0))
    }
}

extension SystemError {
    /// From `BlockDevice.open`: another program has claimed the device and may let go of it.
    var isHeldByProgram: Bool { errno == EAGAIN }
}

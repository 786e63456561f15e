import BlockTap
import CIoUring
import Glibc

#if arch(arm64)
private let directFlag: Int32 = 0o200000
#else
private let directFlag: Int32 = 0o40000  // O_DIRECT; not visible from Glibc
#endif

func errorText(_ code: Int32) -> String { String(cString: strerror(code)) }

/// ENOSPC and EDQUOT are the store being full, everything else is an I/O error.
func storageError(_ code: Int32, _ what: String) -> StoreError {
    code == ENOSPC || code == EDQUOT ? .full(what: what) : .io(errno: code, what: what)
}

/// Repeats a system call while it is interrupted. A bad descriptor or address is our bug, not the disk's.
@inline(__always)
private func retrying(_ body: () -> Int) -> Int {
    while true {
        let result = body()
        if result >= 0 { return result }
        precondition(errno != EBADF && errno != EFAULT, "bad descriptor or address in the store's I/O")
        if errno != EINTR { return result }
    }
}

/// A directory of a local file system.
public final class FileStorage: Storage, @unchecked Sendable {
    public let location: String
    private var lockDescriptor: Int32 = -1

    /// Creates the directory (not its parents) when missing.
    public init(directory: String) throws(StoreError) {
        location = directory
        if mkdir(directory, 0o700) == 0 {
            try syncDirectory("..")
        } else if errno != EEXIST {
            throw storageError(errno, "cannot create the store directory \(directory)")
        }
        var status = stat()
        guard stat(directory, &status) == 0 else { throw storageError(errno, "cannot look at \(directory)") }
        guard status.st_mode & S_IFMT == S_IFDIR else { throw .io(errno: ENOTDIR, what: "cannot open the store \(directory)") }
    }

    deinit { unlock() }

    private func full(_ path: String) -> String { path.isEmpty ? location : location + "/" + path }

    public func lock() throws(StoreError) {
        let descriptor = Glibc.open(full("LOCK"), O_RDWR | O_CREAT | O_CLOEXEC, 0o600)
        guard descriptor >= 0 else { throw storageError(errno, "cannot open \(full("LOCK"))") }
        let code = lockFile(descriptor)
        guard code == 0 else {
            Glibc.close(descriptor)
            if code == EWOULDBLOCK { throw .busy("the store \(location) is in use by another process: stop it first") }
            throw .io(errno: code, what: "cannot lock \(full("LOCK"))")
        }
        lockDescriptor = descriptor
    }

    public func unlock() {
        if lockDescriptor >= 0 { Glibc.close(lockDescriptor) }
        lockDescriptor = -1
    }

    public func createDirectory(_ path: String) throws(StoreError) {
        if mkdir(full(path), 0o700) != 0 && errno != EEXIST { throw storageError(errno, "cannot create \(full(path))") }
    }

    public func open(_ path: String, _ mode: StorageOpenMode, direct: Bool) throws(StoreError) -> any StorageFile {
        var flags = O_CLOEXEC
        switch mode {
        case .read: flags |= O_RDONLY
        case .readWrite: flags |= O_RDWR
        case .create: flags |= O_RDWR | O_CREAT | O_TRUNC
        }
        var descriptor = Glibc.open(full(path), flags | (direct ? directFlag : 0), 0o600)
        if descriptor < 0 && errno == EINVAL && direct { descriptor = Glibc.open(full(path), flags, 0o600) }
        guard descriptor >= 0 else { throw storageError(errno, "cannot open \(full(path))") }
        return LocalFile(path: full(path), descriptor: descriptor)
    }

    public func exists(_ path: String) throws(StoreError) -> Bool {
        if access(full(path), F_OK) == 0 { return true }
        if errno == ENOENT { return false }
        throw storageError(errno, "cannot look at \(full(path))")
    }

    public func remove(_ path: String) throws(StoreError) {
        if unlink(full(path)) != 0 && errno != ENOENT { throw storageError(errno, "cannot remove \(full(path))") }
    }

    public func rename(_ from: String, to: String) throws(StoreError) {
        if Glibc.rename(full(from), full(to)) != 0 { throw storageError(errno, "cannot rename \(full(from)) to \(to)") }
    }

    public func list(_ directory: String) throws(StoreError) -> [String] {
        guard let stream = opendir(full(directory)) else { throw storageError(errno, "cannot list \(full(directory))") }
        defer { closedir(stream) }
        var names: [String] = []
        while let entry = readdir(stream) {
            let name = withUnsafePointer(to: &entry.pointee.d_name) { String(cString: UnsafeRawPointer($0).assumingMemoryBound(to: CChar.self)) }
            if name != "." && name != ".." { names.append(name) }
        }
        return names.sorted()
    }

    public func syncDirectory(_ path: String) throws(StoreError) {
        let descriptor = Glibc.open(full(path), O_RDONLY | O_DIRECTORY | O_CLOEXEC)
        guard descriptor >= 0 else { throw storageError(errno, "cannot open \(full(path))") }
        defer { Glibc.close(descriptor) }
        if fsync(descriptor) != 0 { throw storageError(errno, "cannot sync \(full(path))") }
    }

    public func makeWriteQueue() -> any StorageWriteQueue {
        do throws(SystemError) { return try RingWrites() } catch { return OneByOneWrites() }
    }

    public func space() -> (freeBytes: UInt64, capacityBytes: UInt64) {
        var figures = statvfs()
        guard statvfs(location, &figures) == 0 else { return (0, 0) }
        let unit = UInt64(figures.f_frsize)
        return (UInt64(figures.f_bavail) * unit, UInt64(figures.f_blocks) * unit)
    }
}

private final class LocalFile: StorageFile, @unchecked Sendable {
    let path: String
    let descriptor: Int32

    init(path: String, descriptor: Int32) {
        self.path = path
        self.descriptor = descriptor
    }

    deinit { Glibc.close(descriptor) }

    func size() throws(StoreError) -> UInt64 {
        var status = stat()
        guard fstat(descriptor, &status) == 0 else { throw storageError(errno, "cannot look at \(path)") }
        return UInt64(status.st_size)
    }

    func read(into buffer: UnsafeMutableRawBufferPointer, at offsetBytes: UInt64) throws(StoreError) -> Int {
        var done = 0
        while done < buffer.count {
            let count = retrying { pread(descriptor, buffer.baseAddress! + done, buffer.count - done, off_t(offsetBytes) + off_t(done)) }
            if count < 0 { throw storageError(errno, "cannot read \(path) at byte \(offsetBytes)") }
            if count == 0 { break }
            done += count
            // A direct read that ends off a block boundary was the last one; asking on would be misaligned.
            if count % 512 != 0 { break }
        }
        return done
    }

    func write(_ buffer: UnsafeRawBufferPointer, at offsetBytes: UInt64) throws(StoreError) {
        var done = 0
        while done < buffer.count {
            let count = retrying { pwrite(descriptor, buffer.baseAddress! + done, buffer.count - done, off_t(offsetBytes) + off_t(done)) }
            if count < 0 { throw storageError(errno, "cannot write \(path) at byte \(offsetBytes)") }
            if count == 0 { throw .io(errno: EIO, what: "cannot write \(path) at byte \(offsetBytes)") }
            done += count
        }
    }

    func dataSync() throws(StoreError) {
        if retrying({ Int(fdatasync(descriptor)) }) != 0 { throw storageError(errno, "cannot sync \(path)") }
    }

    func truncate(to sizeBytes: UInt64) throws(StoreError) {
        if retrying({ Int(ftruncate(descriptor, off_t(sizeBytes))) }) != 0 { throw storageError(errno, "cannot truncate \(path)") }
    }

    func preallocate(offsetBytes: UInt64, lengthBytes: UInt64) -> Bool {
        posix_fallocate(descriptor, off_t(offsetBytes), off_t(lengthBytes)) == 0
    }

    func punch(offsetBytes: UInt64, lengthBytes: UInt64) throws(StoreError) -> Bool {
        var result = -EINTR
        while result == -EINTR { result = ciouring_fallocate(descriptor, FileAllocation.punchHole, offsetBytes, lengthBytes) }
        if result == 0 { return true }
        if result == -EOPNOTSUPP { return false }
        throw storageError(-result, "cannot give back space of \(path) at byte \(offsetBytes)")
    }

    func allocatedBytes() throws(StoreError) -> UInt64 {
        var status = stat()
        guard fstat(descriptor, &status) == 0 else { throw storageError(errno, "cannot look at \(path)") }
        return UInt64(status.st_blocks) * 512
    }
}

import CLiveTap
import Glibc

/// Mounted file systems held still (FIFREEZE): what is on their disks is what they hold, and nothing more is written. A process of its own thaws them
/// after the limit, or at once when this one is killed. Whoever holds this must not write to them, nor wait for anybody who may.
///
/// (A service manager that kills a whole control group kills that process too: the agent's unit says `KillMode=process`, or it is run outside.)
package struct FileSystemFreeze: ~Copyable {
    private let fds: [Int32]
    private let isFrozen: [Bool]
    private let guardian: [Int32]
    private let began: UInt64
    /// Mounted on these, and of a kind that cannot be frozen (vfat): only written out.
    package let unfreezable: [String]

    private init(fds: [Int32], isFrozen: [Bool], guardian: [Int32], began: UInt64, unfreezable: [String]) {
        self.fds = fds
        self.isFrozen = isFrozen
        self.guardian = guardian
        self.began = began
        self.unfreezable = unfreezable
    }

    package static func hold(mountPoints: [String], limitMilliseconds: Int) throws(SystemError) -> FileSystemFreeze {
        var opened: [(fd: Int32, mountPoint: String)] = []
        for path in mountPoints {
            let fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK)
            guard fd >= 0 else {
                let error = SystemError(errno: errno, doing: "open \(path) to freeze it")
                for (fd, _) in opened { close(fd) }
                throw error
            }
            opened.append((fd, path))
        }
        return try hold(opened, limitMilliseconds: limitMilliseconds)
    }

    /// Those that are mounted for writing here, of these block devices.
    static func opened(on devices: Set<DeviceNumber>) throws(SystemError) -> [(fd: Int32, mountPoint: String)] {
        var opened: [(fd: Int32, mountPoint: String)] = []
        for fileSystem in MountedFileSystem.on(devices) where !fileSystem.isReadOnly {
            guard let fd = fileSystem.opened() else {
                for (fd, _) in opened { close(fd) }
                throw SystemError(errno: ENOENT, what: "cannot freeze the file system on \(fileSystem.mountPoint): something else is mounted over it, or it is gone")
            }
            opened.append((fd, fileSystem.mountPoint))
        }
        return opened
    }

    /// Of those that can be frozen: one that is not. Somebody has thawed it, or mounted it since.
    static func unfrozen(_ opened: [(fd: Int32, mountPoint: String)]) -> String? {
        defer { for (fd, _) in opened { close(fd) } }
        return opened.first { clivetap_is_frozen($0.fd) == 0 }?.mountPoint
    }

    /// Writes out what they have in memory, again and again, until that took less than half of the limit of a freeze: what is written meanwhile is written out inside the
    /// freeze, where nobody can end it. Whether it did.
    static func isWrittenOut(_ fds: [Int32], limitMilliseconds: Int, syncsMax: Int) -> Bool {
        for _ in 0..<syncsMax {
            let began = LiveReconciliation.now()
            for fd in fds { _ = clivetap_sync(fd) }                // a failure shows in the freeze
            if LiveReconciliation.now() - began < UInt64(limitMilliseconds) * 500_000 { return true }
        }
        return false
    }

    /// Takes the descriptors over. What is dirty is written out first, so that the freeze itself is short.
    static func hold(_ opened: [(fd: Int32, mountPoint: String)], limitMilliseconds: Int, syncsMax: Int = 1) throws(SystemError) -> FileSystemFreeze {
        let fds = opened.map(\.fd)
        guard isWrittenOut(fds, limitMilliseconds: limitMilliseconds, syncsMax: syncsMax) else {
            for fd in fds { close(fd) }
            throw SystemError(errno: EBUSY, what: "cannot freeze \(opened.map(\.mountPoint).joined(separator: ", ")): so much is written there that writing it out takes more than half of the limit of \(limitMilliseconds) ms")
        }
        var guardian: [Int32] = [0, 0]
        var isFrozen = Array(repeating: false, count: fds.count)
        var failed: Int32 = 0
        let began = LiveReconciliation.now()
        let result = clivetap_freeze(fds, Int32(fds.count), Int32(limitMilliseconds), &isFrozen, &guardian, &failed)
        guard result == 0 else {
            for fd in fds { close(fd) }
            let place = opened.isEmpty ? "nothing" : opened[Int(failed)].mountPoint
            if result == -EBUSY { throw SystemError(errno: EBUSY, what: "cannot freeze the file system on \(place): somebody else has frozen it") }
            throw SystemError(errno: -result, doing: "freeze the file system on \(place)")
        }
        let unfreezable = zip(opened, isFrozen).filter { !$0.1 }.map(\.0.mountPoint)
        return FileSystemFreeze(fds: fds, isFrozen: isFrozen, guardian: guardian, began: began, unfreezable: unfreezable)
    }

    /// The limit begins anew; or there is none from now on, whatever becomes of this process. Returns whether they were frozen all the time.
    func keep(forever: Bool) -> Bool { clivetap_freeze_keep(guardian, forever) == 0 }

    /// Whether they were frozen all the time, and how long.
    package consuming func thaw() -> (wasHeld: Bool, milliseconds: Double) {
        let result = clivetap_thaw(fds, Int32(fds.count), isFrozen, guardian)
        for fd in fds { close(fd) }
        return (result == 0, Double(LiveReconciliation.now() - began) / 1e6)
    }
}

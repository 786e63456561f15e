import CLiveTap
import Glibc

/// Mounted file systems held still (FIFREEZE): what is on their disks is what they hold, and nothing more is written. A process of its own thaws them
/// after the limit, or at once when this one is killed. Whoever holds this must not write to them, nor wait for anybody who may.
///
/// (A service manager that kills a whole control group kills that process too: the agent's unit says `KillMode=mixed`, or it is run outside.)
package struct FileSystemFreeze: ~Copyable {
    private let fds: [Int32]
    private let guardian: [Int32]
    private let began: UInt64

    private init(fds: [Int32], guardian: [Int32], began: UInt64) {
        self.fds = fds
        self.guardian = guardian
        self.began = began
    }

    /// What is dirty is written out first, so that the freeze itself is short.
    package static func hold(mountPoints: [String], limitMilliseconds: Int) throws(SystemError) -> FileSystemFreeze {
        var fds: [Int32] = []
        func closeAll() { for fd in fds { close(fd) } }
        for path in mountPoints {
            let fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC)
            guard fd >= 0 else {
                let error = SystemError(errno: errno, doing: "open \(path) to freeze it")
                closeAll()
                throw error
            }
            fds.append(fd)
        }
        var guardian: [Int32] = [0, 0]
        let began = LiveReconciliation.now()
        let result = clivetap_freeze(fds, Int32(fds.count), Int32(limitMilliseconds), &guardian)
        guard result == 0 else {
            closeAll()
            throw SystemError(errno: -result, doing: "freeze \(mountPoints.joined(separator: ", "))")
        }
        return FileSystemFreeze(fds: fds, guardian: guardian, began: began)
    }

    /// Whether they were frozen all the time, and how long.
    package consuming func thaw() -> (wasHeld: Bool, milliseconds: Double) {
        let result = clivetap_thaw(fds, Int32(fds.count), guardian)
        for fd in fds { close(fd) }
        return (result == 0, Double(LiveReconciliation.now() - began) / 1e6)
    }
}

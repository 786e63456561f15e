import BlockTap
import Glibc

/// Keeps a second appliance off a state directory. The lock goes with the process, however it ends.
final class StateLock: Sendable {
    private let fd: Int32

    init(directory: String) throws(ApplianceError) {
        let path = directory + "/lock"
        let fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0o600)
        guard fd >= 0 else { throw .failed("cannot open \(path): \(String(cString: strerror(errno)))") }
        guard lockFile(fd) == 0 else {
            close(fd)
            throw .refused("another appliance runs on \(directory): stop it first, or give this one its own --state")
        }
        self.fd = fd
    }

    deinit { close(fd) }
}

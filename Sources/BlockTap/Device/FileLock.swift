import Glibc

/// Locks a file for this process alone (flock(2)): 0, or an errno. The lock goes with the descriptor, however the process ends.
///
/// Waits up to `patienceMilliseconds` for another holder, and blocks the thread meanwhile: a process that was killed holds its locks until the last of its
/// threads is out of the kernel, which may be after it is gone from the process table.
package func lockFile(_ fd: Int32, patienceMilliseconds: Int = 5000) -> Int32 {
    var patience = patienceMilliseconds
    while flock(fd, LOCK_EX | LOCK_NB) != 0 {
        guard errno == EWOULDBLOCK || errno == EINTR, patience > 0 else { return errno }
        usleep(50_000)
        patience -= 50
    }
    return 0
}

import Glibc

/// A POSIX semaphore, for threads that must wait for each other at start-up.
final class Semaphore: @unchecked Sendable {
    private let raw = UnsafeMutablePointer<sem_t>.allocate(capacity: 1)

    init() { sem_init(raw, 0, 0) }

    deinit {
        sem_destroy(raw)
        raw.deallocate()
    }

    func wait() { while sem_wait(raw) < 0 && errno == EINTR {} }
    func signal() { sem_post(raw) }
}

import Glibc

/// One lock per fork, for what takes several steps: opening a volume of it, sealing, committing, dropping. Never taken on the
/// store's thread, since whoever holds one may wait for that.
final class ForkLocks: @unchecked Sendable {
    private let mutex = UnsafeMutablePointer<pthread_mutex_t>.allocate(capacity: 1)
    private let freed = UnsafeMutablePointer<pthread_cond_t>.allocate(capacity: 1)
    private var held: Set<ForkID> = []

    init() {
        pthread_mutex_init(mutex, nil)
        pthread_cond_init(freed, nil)
    }

    deinit {
        pthread_cond_destroy(freed)
        pthread_mutex_destroy(mutex)
        freed.deallocate()
        mutex.deallocate()
    }

    func with<T>(_ id: ForkID, _ body: () throws(StoreError) -> T) throws(StoreError) -> T {
        pthread_mutex_lock(mutex)
        while !held.insert(id).inserted { pthread_cond_wait(freed, mutex) }
        pthread_mutex_unlock(mutex)
        defer {
            pthread_mutex_lock(mutex)
            held.remove(id)
            pthread_cond_broadcast(freed)
            pthread_mutex_unlock(mutex)
        }
        return try body()
    }
}

/// A volume of a fork that somebody has open. Nil while it is being opened or let go.
struct OpenForkVolume {
    let fork: ForkID
    weak var volume: ForkVolume?
    var pin: UInt64?
}

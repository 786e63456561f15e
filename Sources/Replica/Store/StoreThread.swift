import Glibc
import Synchronization

/// The store's own thread: everything that changes the store happens on it, in the order in which it was asked for.
///
/// The queue has no bound of its own: what is put on it holds a buffer of a bounded pool, or is a caller that waits.
///
/// A *stepped* one has no thread: the queue runs on the caller's when that calls `runQueued` or waits, so that a simulation decides
/// the order of everything.
final class StoreThread: @unchecked Sendable {
    private var mutex = UnsafeMutablePointer<pthread_mutex_t>.allocate(capacity: 1)
    private var wakeup = UnsafeMutablePointer<pthread_cond_t>.allocate(capacity: 1)
    private var queue: [() -> Void] = []
    private var stopping = false
    private var joined = false
    private var thread = pthread_t()
    private let isStepped: Bool
    private var isStepping = false

    init(isStepped: Bool = false) {
        self.isStepped = isStepped
        pthread_mutex_init(mutex, nil)
        pthread_cond_init(wakeup, nil)
        if isStepped { return }
        let this = Unmanaged.passRetained(self).toOpaque()
        let result = pthread_create(&thread, nil, { argument in
            let this = Unmanaged<StoreThread>.fromOpaque(argument!).takeRetainedValue()
            this.run()
            return nil
        }, this)
        precondition(result == 0, "cannot start the store's thread: \(errorText(result))")
    }

    deinit {
        pthread_cond_destroy(wakeup)
        pthread_mutex_destroy(mutex)
        wakeup.deallocate()
        mutex.deallocate()
    }

    var isCurrent: Bool { isStepped ? isStepping : pthread_equal(thread, pthread_self()) != 0 }

    /// Of a stepped one: runs at most `countMax` of the tasks that wait. Returns whether there are more.
    @discardableResult
    func runQueued(_ countMax: Int = .max) -> Bool {
        precondition(isStepped && !isStepping)
        isStepping = true
        defer { isStepping = false }
        var left = countMax
        while left > 0, !queue.isEmpty {
            queue.removeFirst()()
            left -= 1
        }
        return !queue.isEmpty
    }

    /// Of a stepped one: runs one task when there is one.
    func runOne() -> Bool {
        if queue.isEmpty { return false }
        runQueued(1)
        return true
    }

    private func run() {
        var batch: [() -> Void] = []
        while true {
            pthread_mutex_lock(mutex)
            while queue.isEmpty && !stopping { pthread_cond_wait(wakeup, mutex) }
            swap(&batch, &queue)
            let ended = batch.isEmpty
            pthread_mutex_unlock(mutex)
            if ended { return }
            for index in batch.indices {
                batch[index]()
                batch[index] = {}
            }
            batch.removeAll(keepingCapacity: true)
        }
    }

    /// False when the thread has been stopped; the task will not run then.
    @discardableResult
    func enqueue(_ task: @escaping () -> Void) -> Bool {
        pthread_mutex_lock(mutex)
        defer { pthread_mutex_unlock(mutex) }
        if stopping { return false }
        queue.append(task)
        pthread_cond_signal(wakeup)
        return true
    }

    /// Runs `body` on the thread and waits for it; directly when called on it.
    func perform<T>(_ body: @escaping () throws(StoreError) -> T) throws(StoreError) -> T {
        if isCurrent { return try body() }
        if isStepped {
            if stopping { throw .closed }
            runQueued()
            isStepping = true
            defer { isStepping = false }
            return try body()
        }
        var result: Result<T, StoreError>?
        let done = Semaphore()
        let accepted = enqueue {
            result = Result { () throws(StoreError) -> T in try body() }
            done.signal()
        }
        guard accepted else { throw .closed }
        done.wait()
        return try result!.get()
    }

    /// Runs what is queued, then ends the thread. Idempotent.
    func stop() {
        pthread_mutex_lock(mutex)
        stopping = true
        let first = !joined
        joined = true
        pthread_cond_signal(wakeup)
        pthread_mutex_unlock(mutex)
        if isStepped {
            if !isStepping { runQueued() }
        } else if first {
            if isCurrent { pthread_detach(thread) } else { pthread_join(thread, nil) }
        }
    }
}

/// Counts what is under way; one thread may wait until nothing is.
final class Underway: Sendable {
    private let state = Mutex((count: 0, waiter: Semaphore?.none))

    func begin() { state.withLock { $0.count += 1 } }

    func end() {
        let waiter = state.withLock { state -> Semaphore? in
            state.count -= 1
            guard state.count == 0 else { return nil }
            defer { state.waiter = nil }
            return state.waiter
        }
        waiter?.signal()
    }

    func wait() {
        let waiter = state.withLock { state -> Semaphore? in
            if state.count == 0 { return nil }
            state.waiter = Semaphore()
            return state.waiter
        }
        waiter?.wait()
    }
}

/// Counts; `wait` blocks the calling thread while the count is zero.
final class Semaphore: @unchecked Sendable {
    private let handle = UnsafeMutablePointer<sem_t>.allocate(capacity: 1)
    init(count: UInt32 = 0) { sem_init(handle, 0, count) }
    deinit {
        sem_destroy(handle)
        handle.deallocate()
    }
    func signal() { sem_post(handle) }
    func wait() { while sem_wait(handle) != 0 { precondition(errno == EINTR) } }
}

/// A page-aligned buffer of a fixed pool.
final class PoolBuffer: @unchecked Sendable {
    let memory: UnsafeMutableRawPointer
    private let owner: WriteMemory

    init(_ owner: WriteMemory, at offset: Int) {
        self.owner = owner
        memory = owner.bytes.baseAddress! + offset
    }
}

/// A fixed number of buffers in one piece of memory. `take` blocks until one is free: the back-pressure of the apply path.
final class BufferPool: @unchecked Sendable {
    let bufferBytes: Int
    let memory: WriteMemory
    private let free: Mutex<[PoolBuffer]>
    private let available: Semaphore
    private let made = Atomic<Int>(0)

    init(count: Int, bufferBytes: Int) {
        self.bufferBytes = bufferBytes
        memory = WriteMemory(byteCount: count * bufferBytes)
        free = Mutex([])
        available = Semaphore(count: UInt32(count))
    }

    func take() -> PoolBuffer {
        available.wait()
        if let buffer = free.withLock({ $0.popLast() }) { return buffer }
        return PoolBuffer(memory, at: made.wrappingAdd(1, ordering: .relaxed).oldValue * bufferBytes)
    }

    func give(_ buffer: PoolBuffer) {
        free.withLock { $0.append(buffer) }
        available.signal()
    }
}

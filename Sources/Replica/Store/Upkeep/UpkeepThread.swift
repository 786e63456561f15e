import Glibc
import Synchronization

/// The thread that does upkeep beside the store's own: its reads and writes are paced, and stopping it breaks off what it does.
final class UpkeepThread: @unchecked Sendable {
    private let mutex = UnsafeMutablePointer<pthread_mutex_t>.allocate(capacity: 1)
    private let wakeup = UnsafeMutablePointer<pthread_cond_t>.allocate(capacity: 1)
    private var thread = pthread_t()
    private var isStopping = false
    private var isWoken = false
    private var period: Double
    private let bytesPerSecond: Atomic<UInt64>
    private weak var store: ReplicaStore?

    /// `bytesPerSecond` 0 = as fast as it goes.
    init(store: ReplicaStore, everySeconds: Double, bytesPerSecond: UInt64) {
        self.store = store
        period = everySeconds
        self.bytesPerSecond = Atomic(bytesPerSecond)
        pthread_mutex_init(mutex, nil)
        var attributes = pthread_condattr_t()
        pthread_condattr_init(&attributes)
        pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC)
        pthread_cond_init(wakeup, &attributes)
        pthread_condattr_destroy(&attributes)
        let this = Unmanaged.passRetained(self).toOpaque()
        let result = pthread_create(&thread, nil, { argument in
            let this = Unmanaged<UpkeepThread>.fromOpaque(argument!).takeRetainedValue()
            this.run()
            return nil
        }, this)
        precondition(result == 0, "cannot start the upkeep thread: \(errorText(result))")
    }

    deinit {
        pthread_cond_destroy(wakeup)
        pthread_mutex_destroy(mutex)
        wakeup.deallocate()
        mutex.deallocate()
    }

    func set(everySeconds: Double, bytesPerSecond: UInt64) {
        self.bytesPerSecond.store(bytesPerSecond, ordering: .relaxed)
        pthread_mutex_lock(mutex)
        period = everySeconds
        pthread_mutex_unlock(mutex)
        wake()
    }

    /// Looks for work now.
    func wake() {
        pthread_mutex_lock(mutex)
        isWoken = true
        pthread_cond_signal(wakeup)
        pthread_mutex_unlock(mutex)
    }

    /// Breaks off what is being done and waits for the thread's end. Once.
    func stop() {
        pthread_mutex_lock(mutex)
        isStopping = true
        pthread_cond_signal(wakeup)
        pthread_mutex_unlock(mutex)
        // The last one to hold the store may be this very thread.
        if pthread_equal(thread, pthread_self()) != 0 { pthread_detach(thread) } else { pthread_join(thread, nil) }
    }

    private func run() {
        while let more = step() {
            if more { continue }
            pthread_mutex_lock(mutex)
            if !isWoken && !isStopping { wait(seconds: period) }
            isWoken = false
            pthread_mutex_unlock(mutex)
        }
    }

    /// One unit. False when there is nothing to do for now, nil when the thread is to end.
    private func step() -> Bool? {
        pthread_mutex_lock(mutex)
        let ends = isStopping
        pthread_mutex_unlock(mutex)
        guard !ends, let store else { return nil }
        do throws(StoreError) {
            guard let action = try store.upkeepStep(PacedStorage(store.storage, self)) else { return false }
            store.logger.debug("upkeep", metadata: ["did": "\(action)"])
            return true
        } catch {
            if case .closed = error { return nil }
            store.logger.warning("upkeep cannot go on for now", metadata: ["error": "\(error)"])
            return false
        }
    }

    /// With the mutex held; may return early.
    private func wait(seconds: Double) {
        var until = timespec()
        clock_gettime(CLOCK_MONOTONIC, &until)
        let nanoseconds = Double(until.tv_nsec) + max(0, min(seconds, 86_400)) * 1e9
        until.tv_sec += Int(nanoseconds / 1e9)
        until.tv_nsec = Int(nanoseconds.truncatingRemainder(dividingBy: 1e9))
        pthread_cond_timedwait(wakeup, mutex, &until)
    }

    /// Waits as long as so many bytes take. Throws `.closed` when the thread is to end.
    func pace(_ byteCount: Int) throws(StoreError) {
        let rate = bytesPerSecond.load(ordering: .relaxed)
        pthread_mutex_lock(mutex)
        if rate > 0, !isStopping {
            let end = ContinuousClock.now + .seconds(Double(byteCount) / Double(rate))
            while !isStopping, case let left = end - ContinuousClock.now, left > .zero { wait(seconds: left / .seconds(1)) }
        }
        let ends = isStopping
        pthread_mutex_unlock(mutex)
        if ends { throw .closed }
    }
}

extension ReplicaStore {
    /// Does upkeep on a thread of its own from now on until the store is closed: at once when something was dropped, and every so many
    /// seconds; reading and writing at most so many bytes per second (0: without a limit). A second call changes the figures.
    public func startUpkeep(everySeconds: Double, bytesPerSecond: UInt64) {
        precondition(!options.isStepped, "a stepped store does its upkeep in steps")
        let isClosed = shared.withLock { $0.isClosed }
        upkeep.settings.withLock { settings in
            if let thread = settings.thread {
                thread.set(everySeconds: everySeconds, bytesPerSecond: bytesPerSecond)
            } else if !isClosed {
                settings.thread = UpkeepThread(store: self, everySeconds: everySeconds, bytesPerSecond: bytesPerSecond)
            }
        }
    }

    /// Ends it; what it was doing is broken off.
    func stopUpkeep() {
        let thread = upkeep.settings.withLock { settings in
            defer { settings.thread = nil }
            return settings.thread
        }
        thread?.stop()
    }
}

/// The store's files as the upkeep thread opens them.
private final class PacedStorage: Storage {
    private let real: any Storage
    private let thread: UpkeepThread

    init(_ real: any Storage, _ thread: UpkeepThread) {
        self.real = real
        self.thread = thread
    }

    var location: String { real.location }
    func lock() throws(StoreError) { try real.lock() }
    func unlock() { real.unlock() }
    func createDirectory(_ path: String) throws(StoreError) { try real.createDirectory(path) }
    func open(_ path: String, _ mode: StorageOpenMode, direct: Bool) throws(StoreError) -> any StorageFile {
        PacedFile(try real.open(path, mode, direct: direct), thread)
    }
    func exists(_ path: String) throws(StoreError) -> Bool { try real.exists(path) }
    func remove(_ path: String) throws(StoreError) { try real.remove(path) }
    func rename(_ from: String, to: String) throws(StoreError) { try real.rename(from, to: to) }
    func list(_ directory: String) throws(StoreError) -> [String] { try real.list(directory) }
    func syncDirectory(_ path: String) throws(StoreError) { try real.syncDirectory(path) }
    func space() -> (freeBytes: UInt64, capacityBytes: UInt64) { real.space() }
}

private final class PacedFile: StorageFile {
    /// A large buffer goes in parts, so that the disk is not taken for long and stopping is prompt.
    private static let partBytes = 1 << 20
    private let real: any StorageFile
    private let thread: UpkeepThread

    init(_ real: any StorageFile, _ thread: UpkeepThread) {
        self.real = real
        self.thread = thread
    }

    var path: String { real.path }
    var descriptor: Int32 { real.descriptor }
    func size() throws(StoreError) -> UInt64 { try real.size() }

    func read(into buffer: UnsafeMutableRawBufferPointer, at offsetBytes: UInt64) throws(StoreError) -> Int {
        var done = 0
        while done < buffer.count {
            let part = UnsafeMutableRawBufferPointer(rebasing: buffer[done..<min(buffer.count, done + Self.partBytes)])
            try thread.pace(part.count)
            let count = try real.read(into: part, at: offsetBytes + UInt64(done))
            done += count
            if count < part.count { break }
        }
        return done
    }

    func write(_ buffer: UnsafeRawBufferPointer, at offsetBytes: UInt64) throws(StoreError) {
        var done = 0
        while done < buffer.count {
            let part = UnsafeRawBufferPointer(rebasing: buffer[done..<min(buffer.count, done + Self.partBytes)])
            try thread.pace(part.count)
            try real.write(part, at: offsetBytes + UInt64(done))
            done += part.count
        }
    }

    func dataSync() throws(StoreError) { try real.dataSync() }
    func truncate(to sizeBytes: UInt64) throws(StoreError) { try real.truncate(to: sizeBytes) }
    func preallocate(offsetBytes: UInt64, lengthBytes: UInt64) -> Bool { real.preallocate(offsetBytes: offsetBytes, lengthBytes: lengthBytes) }
    func punch(offsetBytes: UInt64, lengthBytes: UInt64) throws(StoreError) -> Bool {
        try thread.pace(0)
        return try real.punch(offsetBytes: offsetBytes, lengthBytes: lengthBytes)
    }
    func allocatedBytes() throws(StoreError) -> UInt64 { try real.allocatedBytes() }
}

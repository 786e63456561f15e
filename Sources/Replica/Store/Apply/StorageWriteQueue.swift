import BlockTap
import Glibc

/// Writes of large aligned buffers, several of them under way at once where the storage can. Thread-safe.
public protocol StorageWriteQueue: AnyObject, Sendable {
    /// False: `write` returns when the write is done, and calls `done` inside.
    var isConcurrent: Bool { get }
    /// Memory that will be written from, from now until `remove`: a hint.
    func add(_ memory: WriteMemory)
    func remove(_ memory: WriteMemory)
    /// Writes all of `bytes`, which stay in place until `done` is called, once, on any thread; it must not block. Writes run in any order. Keeps
    /// `file` open meanwhile. False once the queue is closed: nothing happens then.
    func write(_ bytes: UnsafeRawBufferPointer, to file: any StorageFile, at offsetBytes: UInt64, done: @escaping @Sendable (StoreError?) -> Void) -> Bool
    /// Makes what was written to `file` before durable (fdatasync); otherwise as `write`, but does not wait behind writes.
    func sync(_ file: any StorageFile, done: @escaping @Sendable (StoreError?) -> Void) -> Bool
    /// Waits for what is under way. Idempotent.
    func close()
}

/// Page-aligned memory; occupies nothing until it is used.
public final class WriteMemory: Sendable {
    nonisolated(unsafe) public let bytes: UnsafeMutableRawBufferPointer

    init(byteCount: Int) {
        let memory = mmap(nil, byteCount, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        precondition(memory != MAP_FAILED, "no memory for \(byteCount) bytes of buffers")
        bytes = UnsafeMutableRawBufferPointer(start: memory, count: byteCount)
    }

    deinit { munmap(bytes.baseAddress, bytes.count) }
}

final class OneByOneWrites: StorageWriteQueue {
    var isConcurrent: Bool { false }
    func add(_ memory: WriteMemory) {}
    func remove(_ memory: WriteMemory) {}
    func close() {}

    func write(_ bytes: UnsafeRawBufferPointer, to file: any StorageFile, at offsetBytes: UInt64, done: @escaping @Sendable (StoreError?) -> Void) -> Bool {
        do throws(StoreError) {
            try file.write(bytes, at: offsetBytes)
            done(nil)
        } catch { done(error) }
        return true
    }

    func sync(_ file: any StorageFile, done: @escaping @Sendable (StoreError?) -> Void) -> Bool {
        do throws(StoreError) {
            try file.dataSync()
            done(nil)
        } catch { done(error) }
        return true
    }
}

/// Through an io_uring on a thread of its own, from memory that the kernel has pinned.
final class RingWrites: StorageWriteQueue, @unchecked Sendable {
    /// More under way make a disk no faster, and one that is slow anyway answers reads later.
    static let depth = 8

    private struct Job {
        var file: any StorageFile
        /// Nil of a sync.
        var bytes: UnsafeRawBufferPointer?
        var offsetBytes: UInt64 = 0
        var doneBytes = 0
        var done: @Sendable (StoreError?) -> Void
    }

    /// On-loop.
    private final class Writer: IOHandler {
        unowned let loop: EventLoop
        var id: HandlerID!
        var jobs = [Job?](repeating: nil, count: RingWrites.depth)
        var free = Array(0..<UInt32(RingWrites.depth))
        /// Wait for a free slot; each holds a buffer of a bounded pool.
        var line: [Job] = []
        var whenIdle: (() -> Void)?

        init(loop: EventLoop) { self.loop = loop }

        func take(_ job: Job) {
            guard let slot = free.popLast() else { return job.bytes == nil ? line.insert(job, at: 0) : line.append(job) }
            jobs[Int(slot)] = job
            submit(slot)
        }

        func submit(_ slot: UInt32) {
            let job = jobs[Int(slot)]!
            guard let bytes = job.bytes else { return loop.submitDataSync(fd: job.file.descriptor, handler: id, token: slot) }
            loop.submitWrite(
                fd: job.file.descriptor, from: bytes.baseAddress! + job.doneBytes, count: bytes.count - job.doneBytes,
                offset: job.offsetBytes + UInt64(job.doneBytes), dsync: false, handler: id, token: slot)
        }

        override func ioCompleted(token: UInt32, result: Int32) {
            if result == -EAGAIN || result == -EINTR { return submit(token) }
            let job = jobs[Int(token)]!
            var error: StoreError?
            if result < 0 || (result == 0 && job.bytes != nil) {
                error = storageError(result == 0 ? EIO : -result, job.bytes == nil ? "cannot sync \(job.file.path)" : "cannot write \(job.file.path) at byte \(job.offsetBytes)")
            } else if let bytes = job.bytes, job.doneBytes + Int(result) < bytes.count {
                jobs[Int(token)]!.doneBytes += Int(result)
                return submit(token)
            }
            jobs[Int(token)] = nil
            free.append(token)
            if !line.isEmpty { take(line.removeFirst()) }
            job.done(error)
            if free.count == RingWrites.depth, let idle = whenIdle {
                whenIdle = nil
                idle()
            }
        }
    }

    private let loop: EventLoop
    private let writer: Writer

    init() throws(SystemError) {
        loop = try EventLoop(name: "store-writes", entries: 64)
        writer = Writer(loop: loop)
        loop.execute { [loop, writer = UncheckedReference(writer)] in writer.value.id = loop.register(writer.value) }
    }

    var isConcurrent: Bool { true }

    func add(_ memory: WriteMemory) { loop.execute { [loop] in loop.addFixedBuffer(memory.bytes) } }

    func remove(_ memory: WriteMemory) { loop.execute { [loop] in loop.removeFixedBuffer(memory.bytes) } }

    func write(_ bytes: UnsafeRawBufferPointer, to file: any StorageFile, at offsetBytes: UInt64, done: @escaping @Sendable (StoreError?) -> Void) -> Bool {
        nonisolated(unsafe) let bytes = bytes
        return loop.execute { [writer = UncheckedReference(writer)] in writer.value.take(Job(file: file, bytes: bytes, offsetBytes: offsetBytes, done: done)) }
    }

    func sync(_ file: any StorageFile, done: @escaping @Sendable (StoreError?) -> Void) -> Bool {
        loop.execute { [writer = UncheckedReference(writer)] in writer.value.take(Job(file: file, bytes: nil, done: done)) }
    }

    func close() {
        // The last reference to a store may be one that a completion held.
        guard !loop.isCurrent else {
            var thread = pthread_t()
            let this = Unmanaged.passRetained(self).toOpaque()
            let result = pthread_create(&thread, nil, { argument in
                Unmanaged<RingWrites>.fromOpaque(argument!).takeRetainedValue().close()
                return nil
            }, this)
            precondition(result == 0, "cannot start a thread: \(errorText(result))")
            pthread_detach(thread)
            return
        }
        let idle = Semaphore()
        let accepted = loop.execute { [writer = UncheckedReference(writer)] in
            if writer.value.free.count == Self.depth { idle.signal() } else { writer.value.whenIdle = { idle.signal() } }
        }
        if accepted { idle.wait() }
        loop.shutdown()
    }
}

/// Handed to the thread that alone uses it.
private struct UncheckedReference<Value: AnyObject>: @unchecked Sendable {
    let value: Value
    init(_ value: Value) { self.value = value }
}

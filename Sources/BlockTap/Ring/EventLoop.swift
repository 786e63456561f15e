import CIoUring
import Glibc
import Synchronization

/// One thread, one io_uring.
///
/// A turn of the loop: reap a batch of completions, hand each to its handler, run the tasks that other threads brought,
/// call `batchEnded` of the handlers that asked for it, then submit everything queued meanwhile and wait, in one system call.
///
/// Members marked *on-loop* may only be called from the loop's thread; a precondition checks it. Whoever does I/O on the loop ends
/// it before `shutdown`: what is still in flight then is cancelled and waited for, and its completions reach nobody.
public final class EventLoop: @unchecked Sendable {
    public let name: String
    private var thread = pthread_t()
    private let wakeUpFD: Int32
    private let shared = Mutex(Shared())
    private let joined = Mutex(false)

    private struct Shared {
        var tasks: [@Sendable () -> Void] = []
        var isStopping = false
    }

    /// Initialised by the thread, touched by it only. Behind a pointer so that no exclusivity check runs per request.
    private struct OnLoop: ~Copyable {
        var ring: Ring
        let handlers = HandlerTable()
        var buffers: FixedBuffers
        var inFlight = 0
    }
    private let wakeUpValue = UnsafeMutablePointer<UInt64>.allocate(capacity: 1)
    private let onLoop = UnsafeMutablePointer<OnLoop>.allocate(capacity: 1)

    /// user_data of the loop's own entries (slot 0).
    private static let wakeUpUserData: UInt64 = 1
    private static let ignoredUserData: UInt64 = 2

    /// Starts the thread. `entries` is the size of the submission queue, a power of two; more may be in flight.
    /// Throws when the kernel refuses an io_uring or a thread.
    public init(name: String, entries: UInt32 = 1024) throws(SystemError) {
        self.name = name
        wakeUpFD = ciouring_eventfd()
        guard wakeUpFD >= 0 else { throw SystemError(errno: -wakeUpFD, doing: "create an eventfd for event loop \(name)") }
        let start = ThreadStart(loop: self, entries: entries)
        var created = pthread_t()
        let result = pthread_create(
            &created, nil,
            { argument in
                let start = Unmanaged<ThreadStart>.fromOpaque(argument!).takeRetainedValue()
                start.loop.main(start)
                return nil
            }, Unmanaged.passRetained(start).toOpaque())
        guard result == 0 else {
            Unmanaged.passUnretained(start).release()
            joined.withLock { $0 = true }
            throw SystemError(errno: result, doing: "start a thread for event loop \(name)")
        }
        start.started.wait()
        if let error = start.error {
            pthread_join(created, nil)
            joined.withLock { $0 = true }
            throw error
        }
    }

    deinit {
        close(wakeUpFD)
        onLoop.deallocate()
        wakeUpValue.deallocate()
    }

    // MARK: Any thread

    /// Runs `task` on the loop, after what was brought before. For control, not for the data path. Dropped (false) once
    /// the loop is shut down.
    @discardableResult
    public func execute(_ task: @escaping @Sendable () -> Void) -> Bool {
        let accepted = shared.withLock { shared -> Bool in
            guard !shared.isStopping else { return false }
            shared.tasks.append(task)
            return true
        }
        if accepted { wakeUp() }
        return accepted
    }

    /// Runs `body` on the loop and returns its result. The loop must not be shut down.
    public func run<T: Sendable>(_ body: @escaping @Sendable () -> T) async -> T {
        await withUnsafeContinuation { continuation in
            let accepted = execute { continuation.resume(returning: body()) }
            precondition(accepted, "event loop \(name) has been shut down")
        }
    }

    /// The same, or nil when the loop is shut down.
    public func runUnlessShutDown<T: Sendable>(_ body: @escaping @Sendable () -> T) async -> T? {
        await withUnsafeContinuation { continuation in
            if !execute({ continuation.resume(returning: body()) }) { continuation.resume(returning: nil) }
        }
    }

    public var isCurrent: Bool { pthread_equal(pthread_self(), thread) != 0 }

    /// Runs the tasks already brought, cancels what is in flight, ends the thread and waits for it. Idempotent.
    public func shutdown() {
        precondition(!isCurrent, "an event loop cannot wait for its own end")
        shared.withLock { $0.isStopping = true }
        joined.withLock { joined in
            guard !joined else { return }
            wakeUp()
            pthread_join(thread, nil)
            joined = true
        }
    }

    private func wakeUp() {
        var one: UInt64 = 1
        while write(wakeUpFD, &one, 8) < 0 && errno == EINTR {}
    }

    // MARK: The thread

    private final class ThreadStart: @unchecked Sendable {
        let loop: EventLoop
        let entries: UInt32
        let started = Semaphore()
        var error: SystemError?
        init(loop: EventLoop, entries: UInt32) {
            self.loop = loop
            self.entries = entries
        }
    }

    private func main(_ start: ThreadStart) {
        thread = pthread_self()
        ciouring_name_thread(String(decoding: name.utf8.prefix(15), as: UTF8.self))
        var signals = sigset_t()
        sigfillset(&signals)
        pthread_sigmask(SIG_BLOCK, &signals, nil)
        do throws(SystemError) {
            let ring = try Ring(entries: start.entries)
            let buffers = FixedBuffers(ring.raw)
            onLoop.initialize(to: OnLoop(ring: ring, buffers: buffers))
        } catch {
            start.error = error
            start.started.signal()
            return
        }
        queueWakeUp()
        start.started.signal()
        turn()
        onLoop.deinitialize(count: 1)
    }

    private func turn() {
        let completions = UnsafeMutablePointer<ciouring_completion>.allocate(capacity: Ring.reapMax)
        defer { completions.deallocate() }
        while true {
            onLoop.pointee.ring.submitAndWait()
            let count = onLoop.pointee.ring.reap(into: completions)
            var isWoken = false
            for index in 0..<count {
                let completion = completions[index]
                if completion.user_data == Self.wakeUpUserData {
                    isWoken = true
                } else if completion.user_data != Self.ignoredUserData {
                    onLoop.pointee.inFlight -= 1
                    onLoop.pointee.handlers.dispatch(userData: completion.user_data, result: completion.res)
                }
            }
            var isStopping = false
            if isWoken { isStopping = runTasks() }
            endBatch()
            onLoop.pointee.handlers.releaseRetired()
            if isStopping { return drain(completions) }
            if isWoken { queueWakeUp() }
        }
    }

    private func runTasks() -> Bool {
        let (tasks, isStopping) = shared.withLock { shared in
            defer { shared.tasks.removeAll(keepingCapacity: true) }
            return (shared.tasks, shared.isStopping)
        }
        for task in tasks { task() }
        return isStopping
    }

    private func endBatch() {
        guard onLoop.pointee.handlers.hasBatchEnders else { return }
        // Handlers may ask again, or for others, from inside: those are served in the same pass.
        var index = 0
        while index < onLoop.pointee.handlers.batchEnderCount {
            if let handler = onLoop.pointee.handlers.takeBatchEnder(at: index) {
                handler._withUnsafeGuaranteedRef { $0.batchEnded() }
            }
            index += 1
        }
        onLoop.pointee.handlers.clearBatchEnders()
    }

    /// Cancels and waits for what is left, so that no buffer is written to after `shutdown` has returned.
    private func drain(_ completions: UnsafeMutablePointer<ciouring_completion>) {
        if onLoop.pointee.inFlight > 0 {
            queueUnobserved { ciouring_prep_cancel_all($0, -1, $1) }
        }
        while onLoop.pointee.inFlight > 0 {
            onLoop.pointee.ring.submitAndWait()
            let count = onLoop.pointee.ring.reap(into: completions)
            for index in 0..<count where completions[index].user_data &>> 48 != 0 {     // not the loop's own
                onLoop.pointee.inFlight -= 1
            }
        }
    }

    private func queueWakeUp() {
        while !ciouring_prep_read(onLoop.pointee.ring.raw, wakeUpFD, wakeUpValue, 8, 0, Self.wakeUpUserData) {
            onLoop.pointee.ring.makeRoom()
        }
    }

    // MARK: On-loop

    /// On-loop. The loop keeps the handler alive until `unregister`.
    public func register(_ handler: IOHandler) -> HandlerID {
        checkThread()
        return onLoop.pointee.handlers.add(handler)
    }

    /// On-loop. Completions of what the handler still has in flight reach nobody: it must have ended what uses its memory.
    public func unregister(_ id: HandlerID) {
        checkThread()
        onLoop.pointee.handlers.remove(id)
    }

    /// On-loop. The handler's `batchEnded` is called once when this batch of completions has been handed out.
    @inline(__always) public func afterBatch(_ handler: HandlerID) {
        checkThread()
        onLoop.pointee.handlers.wantBatchEnd(handler)
    }

    /// On-loop. Lets the kernel pin this memory once: reads and writes inside it become cheaper. Only a hint; the memory must
    /// stay in place until `removeFixedBuffer` or shutdown.
    public func addFixedBuffer(_ memory: UnsafeMutableRawBufferPointer) {
        checkThread()
        onLoop.pointee.buffers.add(memory, to: onLoop.pointee.ring.raw)
    }

    /// On-loop.
    public func removeFixedBuffer(_ memory: UnsafeMutableRawBufferPointer) {
        checkThread()
        onLoop.pointee.buffers.remove(memory, from: onLoop.pointee.ring.raw)
    }

    @inline(__always) private func checkThread() {
        precondition(isCurrent, "called off the event loop's thread")
    }

    /// Queues one entry, making room first when the queue is full.
    @inline(__always) func queue(_ prepare: (_ ring: OpaquePointer) -> Bool) {
        checkThread()
        while !prepare(onLoop.pointee.ring.raw) { onLoop.pointee.ring.makeRoom() }
        onLoop.pointee.inFlight &+= 1
    }

    /// Queues one entry whose completion nobody wants.
    func queueUnobserved(_ prepare: (_ ring: OpaquePointer, _ userData: UInt64) -> Bool) {
        checkThread()
        while !prepare(onLoop.pointee.ring.raw, Self.ignoredUserData) { onLoop.pointee.ring.makeRoom() }
    }

    @inline(__always) func fixedBufferIndex(_ pointer: UnsafeRawPointer, count: Int) -> UInt32? {
        onLoop.pointee.buffers.index(of: pointer, count: count)
    }
}

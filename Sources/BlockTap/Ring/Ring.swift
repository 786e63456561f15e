import CIoUring
import Glibc

/// One io_uring, used by one thread. Queueing never fails: a full submission queue is handed to the kernel and queueing
/// goes on; completions that stand in the way of that are kept aside for the next `reap`.
struct Ring: ~Copyable {
    static let reapMax = 256

    let raw: OpaquePointer
    /// Completions taken out early, because the kernel would not accept entries before.
    private var aside: [ciouring_completion] = []

    /// Must be called on the thread that will use the ring (single issuer). The best set-up that the kernel knows is taken.
    init(entries: UInt32) throws(SystemError) {
        let best = ciouring_setup_submit_all | ciouring_setup_coop_taskrun
            | ciouring_setup_single_issuer | ciouring_setup_defer_taskrun                                // Linux 6.1
        let choices = [best, ciouring_setup_submit_all | ciouring_setup_coop_taskrun, ciouring_setup_submit_all, 0]
        var pointer: OpaquePointer?
        var result: Int32 = 0
        for flags in choices {
            result = ciouring_create(&pointer, entries, entries * 8, flags)
            if result != -EINVAL { break }
        }
        guard result == 0, let pointer else {
            throw SystemError(errno: -result, what: Self.refusal(-result))
        }
        raw = pointer
        _ = ciouring_register_ring_fd(pointer)      // an optimisation only
    }

    deinit { ciouring_destroy(raw) }

    private static func refusal(_ error: Int32) -> String {
        switch error {
        case ENOSYS, EPERM:
            "cannot create an io_uring: this kernel does not offer it (see /proc/sys/kernel/io_uring_disabled)"
        case ENOMEM:
            "cannot create an io_uring: not enough lockable memory (raise `ulimit -l`)"
        default:
            "cannot create an io_uring: \(SystemError.text(of: error))"
        }
    }

    /// Hands queued entries over, so that at least one place is free.
    mutating func makeRoom() {
        let result = ciouring_submit(raw)
        if result > 0 { return }
        handleRefusal(result)
    }

    /// Submits everything queued and waits for a completion, unless some are there already.
    mutating func submitAndWait() {
        if !aside.isEmpty {
            _ = ciouring_submit(raw)
            return
        }
        let result = ciouring_submit_and_wait(raw, 1)
        if result < 0 { handleRefusal(result) }
    }

    private mutating func handleRefusal(_ result: Int32) {
        switch -result {
        case 0, EINTR, ETIME:
            break
        case EBUSY, EAGAIN, ENOMEM:
            // The completion queue is full or memory is short: take completions out, then the caller tries again.
            _ = ciouring_get_events(raw)
            withUnsafeTemporaryAllocation(of: ciouring_completion.self, capacity: Self.reapMax) { buffer in
                let count = Int(ciouring_reap(raw, buffer.baseAddress!, UInt32(buffer.count)))
                aside.append(contentsOf: buffer[..<count])
                if count == 0 { sched_yield() }
            }
        default:
            fatalError("io_uring_enter failed: \(SystemError.text(of: -result))")
        }
    }

    /// Moves at most `reapMax` completions into `buffer`.
    mutating func reap(into buffer: UnsafeMutablePointer<ciouring_completion>) -> Int {
        if aside.isEmpty { return Int(ciouring_reap(raw, buffer, UInt32(Self.reapMax))) }
        let count = min(aside.count, Self.reapMax)
        for index in 0..<count { buffer[index] = aside[index] }
        aside.removeFirst(count)
        return count
    }
}

import CIoUring
import Glibc

/// What can be submitted. All on-loop; none blocks or fails: errors arrive as the completion's negative result.
///
/// Memory passed by pointer (buffers, iovec arrays, msghdr) belongs to the kernel until the completion. Entries that are in flight
/// together run in any order. Reads and writes may be short; the caller submits the rest.
extension EventLoop {
    @inline(__always)
    public func submitRead(
        fd: Int32, into buffer: UnsafeMutableRawPointer, count: Int, offset: UInt64, handler: HandlerID, token: UInt32
    ) {
        let userData = handler.userData(token: token)
        if let index = fixedBufferIndex(buffer, count: count) {
            queue { ciouring_prep_read_fixed($0, fd, buffer, UInt32(count), offset, index, userData) }
        } else {
            queue { ciouring_prep_read($0, fd, buffer, UInt32(count), offset, userData) }
        }
    }

    /// `dsync`: the data is on stable storage before the completion (RWF_DSYNC).
    @inline(__always)
    public func submitWrite(
        fd: Int32, from buffer: UnsafeRawPointer, count: Int, offset: UInt64, dsync: Bool, handler: HandlerID, token: UInt32
    ) {
        let userData = handler.userData(token: token)
        let flags = dsync ? ciouring_rwf_dsync : 0
        if let index = fixedBufferIndex(buffer, count: count) {
            queue { ciouring_prep_write_fixed($0, fd, buffer, UInt32(count), offset, index, flags, userData) }
        } else {
            queue { ciouring_prep_write($0, fd, buffer, UInt32(count), offset, flags, userData) }
        }
    }

    public func submitReadv(
        fd: Int32, iovecs: UnsafePointer<iovec>, count: Int, offset: UInt64, handler: HandlerID, token: UInt32
    ) {
        queue { ciouring_prep_readv($0, fd, iovecs, UInt32(count), offset, handler.userData(token: token)) }
    }

    public func submitWritev(
        fd: Int32, iovecs: UnsafePointer<iovec>, count: Int, offset: UInt64, dsync: Bool, handler: HandlerID, token: UInt32
    ) {
        let flags = dsync ? ciouring_rwf_dsync : 0
        queue { ciouring_prep_writev($0, fd, iovecs, UInt32(count), offset, flags, handler.userData(token: token)) }
    }

    /// fdatasync: covers the writes that completed before this was submitted.
    public func submitDataSync(fd: Int32, handler: HandlerID, token: UInt32) {
        queue { ciouring_prep_datasync($0, fd, handler.userData(token: token)) }
    }

    /// `mode`: FALLOC_FL_*, see `FileAllocation`.
    public func submitFallocate(
        fd: Int32, mode: Int32, offset: UInt64, length: UInt64, handler: HandlerID, token: UInt32
    ) {
        queue { ciouring_prep_fallocate($0, fd, mode, offset, length, handler.userData(token: token)) }
    }

    /// Result: the new descriptor, close-on-exec.
    public func submitAccept(fd: Int32, handler: HandlerID, token: UInt32) {
        queue { ciouring_prep_accept($0, fd, Int32(SOCK_CLOEXEC.rawValue), handler.userData(token: token)) }
    }

    /// Result: bytes received, 0 at the end of the stream. `flags`: MSG_* (MSG_WAITALL completes short only at the end).
    public func submitReceive(
        fd: Int32, into buffer: UnsafeMutableRawPointer, count: Int, flags: Int32 = 0, handler: HandlerID, token: UInt32
    ) {
        queue { ciouring_prep_recv($0, fd, buffer, UInt64(count), flags, handler.userData(token: token)) }
    }

    /// As `submitReceive`, into the message's iovecs in turn.
    public func submitReceiveMessage(
        fd: Int32, message: UnsafeMutablePointer<msghdr>, flags: UInt32 = 0, handler: HandlerID, token: UInt32
    ) {
        queue { ciouring_prep_recvmsg($0, fd, message, flags, handler.userData(token: token)) }
    }

    public func submitSendMessage(
        fd: Int32, message: UnsafePointer<msghdr>, flags: UInt32 = 0, handler: HandlerID, token: UInt32
    ) {
        queue { ciouring_prep_sendmsg($0, fd, message, flags, handler.userData(token: token)) }
    }

    /// One-shot; result: the events that are set. `events`: POLLIN and so on.
    public func submitPoll(fd: Int32, events: UInt32, handler: HandlerID, token: UInt32) {
        queue { ciouring_prep_poll($0, fd, events, handler.userData(token: token)) }
    }

    /// Monotonic clock, from now. Completes with `-ETIME`, or `-ECANCELED`.
    public func submitTimeout(nanoseconds: UInt64, handler: HandlerID, token: UInt32) {
        queue { ciouring_prep_timeout($0, nanoseconds, handler.userData(token: token)) }
    }

    /// Asks for the end of what was submitted with this handler and token: its completion still arrives, `-ECANCELED` or not.
    public func submitCancel(handler: HandlerID, token: UInt32) {
        queueUnobserved { ciouring_prep_cancel($0, handler.userData(token: token), $1) }
    }

    /// Asks for the end of everything in flight on this descriptor; the completions still arrive.
    public func submitCancelAll(fd: Int32) {
        queueUnobserved { ciouring_prep_cancel_all($0, fd, $1) }
    }
}

/// Modes of `submitFallocate`; both keep the file's size, and what they cover reads as zero afterwards.
public enum FileAllocation {
    /// Gives the space back.
    public static let punchHole = ciouring_falloc_punch_hole | ciouring_falloc_keep_size
    /// Keeps the space allocated.
    public static let zeroRange = ciouring_falloc_zero_range | ciouring_falloc_keep_size
}

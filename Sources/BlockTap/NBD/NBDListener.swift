import Glibc

/// The listening socket and the server's timers.
final class NBDListener: IOHandler {
    private enum Token: UInt32 {
        case accept, retry, stall, stop
    }

    /// Connections that make others wait for memory may go this long without moving a byte.
    static let stallNanoseconds: UInt64 = 30_000_000_000
    static let stopNanoseconds: UInt64 = 5_000_000_000
    static let acceptRetryNanoseconds: UInt64 = 100_000_000

    unowned(unsafe) var core: NBDServerCore!
    private var fd: Int32
    private let address: NBDListenAddress
    private var loop: EventLoop!
    private var id: HandlerID?
    private var isStallTimerSet = false
    private var isStopTimerSet = false
    private var isAccepting = false
    private var isStopping = false

    init(fd: Int32, address: NBDListenAddress) {
        self.fd = fd
        self.address = address
    }

    deinit { closeSocket() }

    var isClosed: Bool { fd < 0 && !isAccepting }

    func start(on loop: EventLoop) {
        self.loop = loop
        id = loop.register(self)
        accept()
    }

    func stop() {
        isStopping = true
        if isAccepting, let id {
            loop.submitCancel(handler: id, token: Token.accept.rawValue)
            loop.submitCancel(handler: id, token: Token.retry.rawValue)
        } else {
            closeSocket()
        }
        // New clients are refused from here on, even before the accept has ended.
        if fd >= 0 { shutdown(fd, Int32(SHUT_RDWR)) }
        if case .unix(let path) = address { unlink(path) }
    }

    private func closeSocket() {
        guard fd >= 0 else { return }
        close(fd)
        fd = -1
    }

    func unregister() {
        if let id {
            if isStallTimerSet { loop.submitCancel(handler: id, token: Token.stall.rawValue) }
            if isStopTimerSet { loop.submitCancel(handler: id, token: Token.stop.rawValue) }
            loop.unregister(id)
        }
        id = nil
    }

    func resumeWaitingAfterBatch() { loop.afterBatch(id!) }
    override func batchEnded() { core.resumeWaiting() }

    func startStallTimer() {
        guard !isStallTimerSet, let id else { return }
        isStallTimerSet = true
        loop.submitTimeout(nanoseconds: Self.stallNanoseconds, handler: id, token: Token.stall.rawValue)
    }

    func startStopTimer() {
        guard let id else { return }
        isStopTimerSet = true
        loop.submitTimeout(nanoseconds: Self.stopNanoseconds, handler: id, token: Token.stop.rawValue)
    }

    private func accept() {
        isAccepting = true
        loop.submitAccept(fd: fd, handler: id!, token: Token.accept.rawValue)
    }

    override func ioCompleted(token: UInt32, result: Int32) {
        switch Token(rawValue: token)! {
        case .accept:
            isAccepting = false
            if result >= 0 { core.accepted(result) }
            if isStopping { return endAccepting() }
            switch -result {
            case EMFILE, ENFILE, ENOMEM, ENOBUFS:
                core.log("NBD server cannot accept clients for now: \(SystemError.text(of: -result))")
                isAccepting = true
                loop.submitTimeout(nanoseconds: Self.acceptRetryNanoseconds, handler: id!, token: Token.retry.rawValue)
            default:
                accept()
            }
        case .retry:
            isAccepting = false
            if isStopping { endAccepting() } else { accept() }
        case .stall:
            isStallTimerSet = false
            if result == -ETIME && core.cutOffStalled() { startStallTimer() }
        case .stop:
            isStopTimerSet = false
            if result == -ETIME { core.cutOffAll() }
        }
    }

    private func endAccepting() {
        closeSocket()
        core.finishStopping()
    }
}

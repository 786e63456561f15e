import BlockTap
import Glibc

/// Flushes of one fork: one at a time, each for everything that was committed before it began. On-loop.
///
/// The segment's sync and the journal's write and sync run side by side; requests are answered when both are done. A `synced` marker
/// then goes into the journal without a sync of its own, and only after it the next flush begins, so that frames stay in order.
final class ForkFlush: IOHandler {
    private enum Token: UInt32 {
        case dataSync, journalWrite, journalSync, markerWrite
    }

    private let fork: ForkVolume
    private let loop: EventLoop
    private unowned(unsafe) let io: ForkIO
    private var handler: HandlerID!
    private var isRunning = false
    /// None is begun.
    private var isHeld = false
    /// Waits for the running one to end.
    private var held: (() -> Void)?
    /// Parts of the running flush that have not ended.
    private var parts = 0
    private var error: StoreError?
    private(set) var lastError: StoreError?
    private var bytes: [UInt8] = []
    private var memory: UnsafeMutableRawPointer
    private var capacity = 64 << 10
    private var written = 0
    private var offset: UInt64 = 0
    /// Answered by the running flush, and by the next.
    private var waiting: [BlockRequestPointer] = []
    private var arrived: [BlockRequestPointer] = []
    private var afterwards: (() -> Void)?

    private init(fork: ForkVolume, loop: EventLoop, io: ForkIO) {
        self.fork = fork
        self.loop = loop
        self.io = io
        memory = .allocate(byteCount: capacity, alignment: pageBytes)
        super.init()
    }

    deinit { memory.deallocate() }

    static func start(fork: ForkVolume, loop: EventLoop, io: ForkIO) -> ForkFlush {
        let flush = ForkFlush(fork: fork, loop: loop, io: io)
        flush.handler = loop.register(flush)
        return flush
    }

    func end() { loop.unregister(handler) }

    /// A FLUSH, or a write with FUA that has been committed.
    func submit(_ request: BlockRequestPointer) {
        arrived.append(request)
        startIfIdle()
    }

    /// Writes have piled up.
    func startIfIdle() { if !isRunning && !isHeld { begin() } }

    /// Begins no more, and calls when none is running.
    func hold(_ body: @escaping () -> Void) {
        isHeld = true
        if isRunning { held = body } else { body() }
    }

    func goOn() {
        isHeld = false
        if !arrived.isEmpty || afterwards != nil { startIfIdle() }
    }

    /// Flushes once more, then calls.
    func flushThen(_ body: @escaping () -> Void) {
        afterwards = body
        startIfIdle()
    }

    private func begin() {
        swap(&waiting, &arrived)
        if fork.failure != nil || !fork.needsFlush {
            if fork.failure != nil { lastError = fork.failure }
            return answer(fork.failure)
        }
        isRunning = true
        error = nil
        lastError = nil
        (bytes, offset) = fork.beginFlush()
        parts = 1
        loop.submitDataSync(fd: fork.open.segment.file.descriptor, handler: handler, token: Token.dataSync.rawValue)
        if !bytes.isEmpty {
            parts = 2
            put(bytes)
            writeJournal(.journalWrite)
        }
    }

    private func put(_ bytes: [UInt8]) {
        if bytes.count > capacity {
            memory.deallocate()
            capacity = bytes.count
            memory = .allocate(byteCount: capacity, alignment: pageBytes)
        }
        bytes.withUnsafeBytes { memcpyBytes(memory, $0.baseAddress!, $0.count) }
        written = 0
    }

    private func writeJournal(_ token: Token) {
        loop.submitWrite(fd: fork.log.file.descriptor, from: memory + written, count: bytes.count - written, offset: offset + UInt64(written), dsync: false, handler: handler, token: token.rawValue)
    }

    override func ioCompleted(token: UInt32, result: Int32) {
        let token = Token(rawValue: token)!
        let isRetry = result == -EAGAIN || result == -EINTR
        switch token {
        case .dataSync:
            if isRetry { return loop.submitDataSync(fd: fork.open.segment.file.descriptor, handler: handler, token: token.rawValue) }
            if result < 0 { error = error ?? storageError(-result, "cannot sync \(fork.open.segment.file.path)") }
            partEnded()
        case .journalWrite:
            if result > 0 { written += Int(result) }
            if isRetry || (result > 0 && written < bytes.count) { return writeJournal(token) }
            if result <= 0 {
                error = error ?? storageError(result == 0 ? EIO : -result, "cannot write \(fork.log.file.path)")
                return partEnded()
            }
            loop.submitDataSync(fd: fork.log.file.descriptor, handler: handler, token: Token.journalSync.rawValue)
        case .journalSync:
            if isRetry { return loop.submitDataSync(fd: fork.log.file.descriptor, handler: handler, token: token.rawValue) }
            if result < 0 { error = error ?? storageError(-result, "cannot sync \(fork.log.file.path)") }
            partEnded()
        case .markerWrite:
            if result > 0 { written += Int(result) }
            if isRetry || (result > 0 && written < bytes.count) { return writeJournal(token) }
            if result <= 0 { fork.log.rewind(to: offset, sequence: fork.log.sequence - 1) }
            ended()
        }
    }

    private func partEnded() {
        parts -= 1
        if parts > 0 { return }
        fork.flushEnded(error)
        lastError = error
        let needsMarker = error == nil && !bytes.isEmpty
        // Answered before the marker: it proves, it does not promise.
        answer(error)
        guard needsMarker else { return ended() }
        offset = fork.log.endBytes
        bytes.removeAll(keepingCapacity: true)
        fork.log.encode(type: FramedLog.syncedType, payload: UnsafeRawBufferPointer(start: nil, count: 0), into: &bytes)
        put(bytes)
        writeJournal(.markerWrite)
    }

    private func answer(_ error: StoreError?) {
        let code = error.map(\.errnoForClient) ?? 0
        var answered: [BlockRequestPointer] = []
        swap(&answered, &waiting)
        for request in answered { request.complete(error: code) }
        if !isRunning { callAfterwards() }
    }

    private func ended() {
        isRunning = false
        if isHeld {
            let body = held
            held = nil
            body?()
            return
        }
        if !arrived.isEmpty || fork.pendingCount >= fork.store.options.journalEntriesMax && error == nil { return begin() }
        callAfterwards()
    }

    private func callAfterwards() {
        guard let body = afterwards else { return }
        if fork.needsFlush, fork.failure == nil, lastError == nil { return begin() }
        afterwards = nil
        body()
    }
}

extension StoreError {
    /// What a block client gets told.
    var errnoForClient: Int32 {
        switch self {
        case .full: ENOSPC
        case .io(let code, _): code == ENOSPC ? ENOSPC : EIO
        case .invalid: EINVAL
        default: EIO
        }
    }
}

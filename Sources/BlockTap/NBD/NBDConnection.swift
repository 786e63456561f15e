import Glibc

/// One client: what was received and not yet understood, the requests it has in flight, and its replies.
///
/// handshake → transmission → draining (no more reading; what is in flight is answered) → closed
///                        ↘ dead (nothing is sent any more; waits for the store) ↗
///
/// Bytes arrive in `buffer`; a WRITE's payload that is not all there yet is received straight into its memory, with whatever follows
/// it going to the buffer again. Replies of a batch leave together in one sendmsg; at most one receive and one send are in flight.
final class NBDConnection: IOHandler {
    enum Phase { case handshake, transmission, draining, dead, closed }
    private enum Token: UInt32 { case receive, send }

    static let bufferBytes = 256 << 10
    /// A receive that continues a payload at least this long, or follows one, leaves the next payload in the socket: it is to
    /// be received in place, not copied.
    static let largePayloadBytes = 64 << 10
    static let smallReceiveBytes = 4096

    let fd: Int32
    unowned(unsafe) let core: NBDServerCore
    let loop: EventLoop
    private(set) var id: HandlerID!
    private(set) var phase = Phase.handshake
    private var negotiation: NBDNegotiation
    private var export: NBDExport!

    // Receiving: buffer[unreadStart..<unreadEnd] is not yet understood.
    private let buffer: UnsafeMutableRawPointer
    private var unreadStart = 0
    private var unreadEnd = 0
    private var isReceiving = false
    private var isWaitingForMemory = false
    private let receiveMessage: UnsafeMutablePointer<msghdr>
    private let receiveVectors: UnsafeMutablePointer<iovec>
    /// The WRITE whose payload is arriving, and where its next byte goes.
    private var payloadSlot = NBDSlab.none
    private var payloadCursor: UnsafeMutableRawPointer?
    private var payloadRemaining = 0
    /// Payload of a refused WRITE, still to be thrown away.
    private var discardRemaining = 0
    private var lastPayloadBytes = 0

    // Requests.
    private var storeCount = 0
    var replies: NBDReplyQueue
    /// Grows whenever a byte moves; for finding stalled clients.
    private var progress: UInt64 = 0
    private var progressAtLastCheck: UInt64 = .max

    init(fd: Int32, core: NBDServerCore) {
        self.fd = fd
        self.core = core
        loop = core.loop
        negotiation = NBDNegotiation(exports: core.exports)
        buffer = .allocate(byteCount: Self.bufferBytes, alignment: 4096)
        receiveMessage = .allocate(capacity: 1)
        receiveMessage.initialize(to: msghdr())
        receiveVectors = .allocate(capacity: 2)
        receiveVectors.initialize(repeating: iovec(), count: 2)
        replies = NBDReplyQueue()
    }

    deinit {
        buffer.deallocate()
        receiveMessage.deallocate()
        receiveVectors.deallocate()
        if phase != .closed { Glibc.close(fd) }        // the loop was shut down before the server was stopped
    }

    func start() {
        id = loop.register(self)
        var one: Int32 = 1
        setsockopt(fd, Int32(IPPROTO_TCP), TCP_NODELAY, &one, socklen_t(MemoryLayout<Int32>.size))     // fails on unix sockets
        var sendBytes: Int32 = 4 << 20
        if setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &sendBytes, socklen_t(MemoryLayout<Int32>.size)) < 0 {
            setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &sendBytes, socklen_t(MemoryLayout<Int32>.size))
        }
        replies.control = negotiation.greeting
        flush()
        receive()
    }

    override func ioCompleted(token: UInt32, result: Int32) {
        switch Token(rawValue: token)! {
        case .receive: received(result)
        case .send: sent(result)
        }
    }

    override func batchEnded() { flush() }

    // MARK: Receiving

    private func receive() {
        guard !isReceiving, phase == .handshake || phase == .transmission, !isWaitingForMemory else { return }
        // A client in the handshake reads its answers before more is taken from it.
        if phase == .handshake && !replies.isIdle { return }
        isReceiving = true
        if unreadStart == unreadEnd {
            unreadStart = 0
            unreadEnd = 0
        } else if unreadStart > 0 {
            buffer.copyMemory(from: buffer + unreadStart, byteCount: unreadEnd - unreadStart)      // less than a header, or an option
            unreadEnd -= unreadStart
            unreadStart = 0
        }
        let isLarge = payloadRemaining >= Self.largePayloadBytes || lastPayloadBytes >= Self.largePayloadBytes
        let room = isLarge ? min(Self.smallReceiveBytes, Self.bufferBytes - unreadEnd) : Self.bufferBytes - unreadEnd
        if payloadRemaining == 0 {
            return loop.submitReceive(fd: fd, into: buffer + unreadEnd, count: room, handler: id, token: Token.receive.rawValue)
        }
        receiveVectors[0] = iovec(iov_base: payloadCursor, iov_len: payloadRemaining)
        receiveVectors[1] = iovec(iov_base: buffer + unreadEnd, iov_len: room)
        receiveMessage.pointee.msg_iov = receiveVectors
        receiveMessage.pointee.msg_iovlen = 2
        loop.submitReceiveMessage(fd: fd, message: receiveMessage, handler: id, token: Token.receive.rawValue)
    }

    private func received(_ result: Int32) {
        isReceiving = false
        guard phase == .handshake || phase == .transmission else { return settle() }
        guard result > 0 else {
            if result == -EINTR || result == -EAGAIN { return receive() }
            return inputEnded(result)
        }
        progress &+= 1
        var count = Int(result)
        if payloadRemaining > 0 {
            let taken = min(count, payloadRemaining)
            payloadRemaining -= taken
            payloadCursor = payloadCursor! + taken
            count -= taken
            if payloadRemaining == 0 { submit(takePayloadSlot()) }
        }
        unreadEnd += count
        understand()
        receive()
    }

    /// The client has gone, or half of it: what it asked for in full is still done.
    private func inputEnded(_ result: Int32) {
        if result < 0 && result != -ECONNRESET {
            return close(because: "receiving failed: \(SystemError.text(of: -result))")
        }
        if payloadRemaining > 0 || discardRemaining > 0 || unreadStart < unreadEnd {
            return close(because: "it went away in the middle of a message")
        }
        drain()
    }

    private func understand() {
        while unreadStart < unreadEnd {
            switch phase {
            case .handshake: guard negotiate() else { return }
            case .transmission: guard takeRequest() else { return }
            case .draining, .dead, .closed: return
            }
        }
    }

    /// Memory came back.
    func resume() {
        isWaitingForMemory = false
        understand()
        receive()
    }

    private func negotiate() -> Bool {
        let input = UnsafeRawBufferPointer(start: buffer + unreadStart, count: unreadEnd - unreadStart)
        let (bytes, outcome) = negotiation.consume(input, output: &replies.control)
        unreadStart += bytes
        if !replies.control.isEmpty { loop.afterBatch(id) }
        switch outcome {
        case .goesOn:
            // One answer at a time: the rest waits until it is sent.
            return bytes > 0 && replies.isIdle
        case .transmission(let index):
            export = core.exports[index]
            phase = .transmission
            return true
        case .closes(let reason):
            if let reason { core.log("NBD client refused: \(reason)") }
            drain()
            return false
        }
    }

    /// Takes one request off the buffer; false when there is no whole header, or no memory.
    @inline(__always) private func takeRequest() -> Bool {
        if discardRemaining > 0 {
            let count = min(discardRemaining, unreadEnd - unreadStart)
            discardRemaining -= count
            unreadStart += count
            return true
        }
        guard unreadEnd - unreadStart >= NBD.requestHeaderBytes else { return false }
        guard let header = NBDRequestHeader(buffer + unreadStart) else {
            close(because: "what it sent is not an NBD request (wrong magic number)")
            return false
        }
        if header.type == NBD.Command.disconnect.rawValue {
            drain()
            return false
        }
        let error = header.error(for: export)
        let needsMemory = error == 0 && header.type <= NBD.Command.write.rawValue
        guard let index = core.take(bytes: needsMemory ? Int(header.lengthBytes) : 0, for: self) else {
            isWaitingForMemory = true
            return false
        }
        unreadStart += NBD.requestHeaderBytes
        let slot = core.slab.slots + Int(index)
        slot.pointee.replyCookie = header.cookie
        if error != 0 {
            discardRemaining = header.payloadBytes
            reply(to: index, error: error)
            return true
        }
        let request = core.slab.requests + Int(index)
        request.pointee.operation = Self.operation(header.type)
        request.pointee.flags = BlockRequestFlags(rawValue: UInt8(truncatingIfNeeded: header.flags))
        request.pointee.offsetBytes = header.offsetBytes
        request.pointee.lengthBytes = header.lengthBytes
        request.pointee.buffer = needsMemory ? core.arena.pointer(chunk: Int(slot.pointee.firstChunk)) : nil
        let payloadBytes = header.payloadBytes
        if payloadBytes > 0 {
            lastPayloadBytes = payloadBytes
            let count = min(payloadBytes, unreadEnd - unreadStart)
            request.pointee.buffer!.copyMemory(from: buffer + unreadStart, byteCount: count)
            unreadStart += count
            if count < payloadBytes {
                payloadSlot = index
                payloadCursor = request.pointee.buffer! + count
                payloadRemaining = payloadBytes - count
                return false
            }
        }
        submit(index)
        return true
    }

    @inline(__always) private static func operation(_ type: UInt16) -> BlockOperation {
        switch NBD.Command(rawValue: type)! {
        case .read: .read
        case .write: .write
        case .flush: .flush
        case .trim: .trim
        case .writeZeroes: .writeZeroes
        case .disconnect: fatalError("DISC is not for the store")
        }
    }

    private func takePayloadSlot() -> Int32 {
        defer { payloadSlot = NBDSlab.none }
        return payloadSlot
    }

    // MARK: Requests and replies

    @inline(__always) private func submit(_ index: Int32) {
        storeCount += 1
        export.submit(core.slab.requests + Int(index))
    }

    @inline(__always) func requestCompleted(_ index: Int32, error: Int32) {
        storeCount -= 1
        let isRead = core.slab.requests[Int(index)].operation == .read
        if !isRead || error != 0 { core.giveBackMemory(of: index) }
        reply(to: index, error: error)
    }

    @inline(__always) private func reply(to index: Int32, error: Int32) {
        if phase == .dead {
            core.giveBack(index)
            return settle()
        }
        let slot = core.slab.slots + Int(index)
        slot.pointee.replyError = NBD.wireError(error).bigEndian
        // Memory still held at this point is a READ's data.
        slot.pointee.replyBytes = slot.pointee.chunkCount > 0 ? core.slab.requests[Int(index)].lengthBytes : 0
        replies.append(index, slots: core.slab.slots)
        loop.afterBatch(id)
    }

    private func flush() {
        guard phase != .dead, phase != .closed else { return settle() }
        if let message = replies.nextMessage(core) {
            loop.submitSendMessage(
                fd: fd, message: message, flags: UInt32(MSG_NOSIGNAL), handler: id,
                token: Token.send.rawValue)
        } else {
            settle()
        }
    }

    private func sent(_ result: Int32) {
        if result < 0 && result != -EINTR && result != -EAGAIN {
            replies.sendFailed(core)
            // The peer left without taking its replies; that is its business.
            let isGone = result == -EPIPE || result == -ECONNRESET
            close(because: isGone ? nil : "sending failed: \(SystemError.text(of: -result))")
            return settle()
        }
        progress &+= 1
        replies.sent(max(0, Int(result)), core)
        flush()
        if phase == .handshake {
            understand()
            receive()
        }
    }

    // MARK: Ending

    /// No more requests; what is in flight is finished and answered, then the connection closes.
    func drain() {
        guard phase == .handshake || phase == .transmission else { return }
        phase = .draining
        stopWaiting()
        shutdown(fd, Int32(SHUT_RD))        // ends the receive in flight
        loop.afterBatch(id)
    }

    /// Nothing more is sent or received; closes when the store is done with what it was given.
    func close(because reason: String?) {
        guard phase != .dead, phase != .closed else { return }
        if let reason { core.log("NBD connection closed: \(reason)") }
        phase = .dead
        stopWaiting()
        shutdown(fd, Int32(SHUT_RDWR))
        loop.afterBatch(id)
    }

    private func stopWaiting() {
        guard isWaitingForMemory else { return }
        isWaitingForMemory = false
        core.forgetWaiting(self)
    }

    func closeIfStalled() {
        defer { progressAtLastCheck = progress }
        let holdsMemory = payloadSlot != NBDSlab.none || !replies.isIdle
        if holdsMemory && storeCount == 0 && progress == progressAtLastCheck {
            close(because: "it has neither sent nor taken a byte for long while others wait for memory")
        }
    }

    private func settle() {
        // Until the receive in flight has ended, the kernel may still write into the payload's memory.
        guard phase == .draining || phase == .dead, !isReceiving else { return }
        if payloadSlot != NBDSlab.none { core.giveBack(takePayloadSlot()) }
        guard storeCount == 0 else { return }
        if phase == .dead { replies.drop(core) }
        guard replies.isIdle else { return }
        phase = .closed
        Glibc.close(fd)
        loop.unregister(id)
        core.ended(self)
    }
}

import Logging
import NIOCore
import NIOSSL
import NIOTLS

/// What a connection's owner is told, always on the connection's event loop.
protocol FrameStream: AnyObject {
    /// TLS is up. Nothing may be written before this: NIOSSL would hold it out of sight of `isWritable`.
    func opened(_ handler: FrameHandler)
    /// `frame`'s memory is valid only during the call. A thrown error ends the connection.
    func received(_ frame: FrameView) throws
    /// The channel takes bytes again.
    func writable()
    /// Once, whatever the cause; no call follows.
    func closed(_ reason: String)
    /// For ALIVE frames: whether an epoch is being made durable here.
    var isWorking: Bool { get }
}

/// The end of a link connection's pipeline: frames in both directions, liveness, orderly refusal.
/// Confined to the channel's event loop.
final class FrameHandler: ChannelInboundHandler, @unchecked Sendable {
    typealias InboundIn = ByteBuffer
    typealias OutboundOut = ByteBuffer

    private enum Phase { case handshake, greeting, open, draining, closed }

    private let stream: any FrameStream
    private let timing: LinkTiming
    private let refusesFailures: Bool
    private var phase = Phase.handshake
    private var assembler = FrameAssembler()
    /// What TLS still had is handed up within the write that found the connection dead, and that write may have been an answer to a frame.
    private var isReading = false
    private var readMeanwhile: [ByteBuffer] = []
    private var nextSequence: UInt64 = 0
    /// All bytes of frames written, payloads included; what the peer's ALIVE reports is compared with it.
    private(set) var sentBytes: UInt64 = 0
    private var context: ChannelHandlerContext?
    private var greetingLimit: Scheduled<Void>?
    private var aliveTask: RepeatedTask?
    private var lastRead: NIODeadline = .now()
    /// What `closed` is told when nothing better is known.
    private var reason = "the other side closed the connection"

    /// `refusesFailures`: tell the peer why with a REFUSED frame when its frames are not acceptable.
    init(stream: any FrameStream, timing: LinkTiming, refusesFailures: Bool) {
        self.stream = stream
        self.timing = timing
        self.refusesFailures = refusesFailures
    }

    // MARK: Writing

    /// False once the socket's buffer is full, and from the moment the connection is being given up.
    var isWritable: Bool { (phase == .open || phase == .greeting) && (context?.channel.isWritable ?? false) }
    var eventLoop: any NIOCore.EventLoop { context!.eventLoop }
    var remoteAddress: String { context?.remoteAddress?.description ?? "unknown address" }

    func tlsPeerCertificate() throws -> NIOSSLCertificate? { try context?.channel.pipeline.syncOperations.nioSSL_peerCertificate() }

    /// Writes one frame without payload and flushes.
    func send(_ type: FrameType, _ meta: (inout ByteBuffer) -> Void) {
        guard let context, phase == .open || phase == .greeting else { return }
        context.writeAndFlush(wrapOutboundOut(frame(context, type, payloadBytes: 0, meta)), promise: nil)
    }

    /// Writes one frame with `payload` and flushes. `meta` sees the finished meta bytes in `digest`.
    func send(
        _ type: FrameType, payload: ByteBuffer?, _ meta: (inout ByteBuffer) -> Void, digest: (UnsafeRawBufferPointer) -> Void
    ) {
        guard let context, phase == .open else { return }
        let head = frame(context, type, payloadBytes: payload?.readableBytes ?? 0, meta)
        head.withUnsafeReadableBytes { digest(UnsafeRawBufferPointer(rebasing: $0[FrameLimits.headerBytes...])) }
        context.write(wrapOutboundOut(head), promise: nil)
        if let payload { context.write(wrapOutboundOut(payload), promise: nil) }
        context.flush()
    }

    private func frame(
        _ context: ChannelHandlerContext, _ type: FrameType, payloadBytes: Int, _ meta: (inout ByteBuffer) -> Void
    ) -> ByteBuffer {
        var buffer = context.channel.allocator.buffer(capacity: 128)
        buffer.writeRepeatingByte(0, count: FrameLimits.headerBytes)
        meta(&buffer)
        buffer.withUnsafeMutableReadableBytes {
            FrameHeader.write(into: $0, type: type, payloadBytes: payloadBytes, sequence: nextSequence)
        }
        nextSequence &+= 1
        sentBytes &+= UInt64(buffer.readableBytes + payloadBytes)
        return buffer
    }

    /// HELLO and WELCOME are exchanged.
    func greeted() {
        guard phase == .greeting else { return }
        phase = .open
        greetingLimit?.cancel()
        greetingLimit = nil
    }

    // MARK: Ending

    /// Closes at once; `reason` is what the owner's `closed` gets, before this returns. (TLS's own farewell may take seconds
    /// when the peer is gone; nobody waits for it.)
    func close(_ reason: String) {
        guard phase != .closed else { return }
        if phase != .draining { self.reason = reason }
        let context = self.context
        ended()
        context?.close(promise: nil)
    }

    /// Closes a connection that nobody waits for any more, without a word to the owner.
    func discard() {
        guard phase != .closed else { return }
        phase = .closed
        greetingLimit?.cancel()
        aliveTask?.cancel()
        context?.close(promise: nil)
    }

    /// Sends a last frame and closes once the peer has read it: what still arrives is thrown away, since closing a socket
    /// with unread bytes would destroy the frame on its way.
    func finish(_ type: FrameType, _ meta: (inout ByteBuffer) -> Void, reason: String) {
        guard phase == .open || phase == .greeting, let context else { return close(reason) }
        send(type, meta)
        self.reason = reason
        phase = .draining
        let handler = NIOLoopBound(self, eventLoop: context.eventLoop)
        context.eventLoop.scheduleTask(in: .seconds(2)) { handler.value.close("") }
    }

    func refuse(_ refusal: Refusal) {
        finish(.refused, { $0.putJSON(refusal) }, reason: refusal.reason)
    }

    private func fail(_ error: any Error) {
        let words = (error as? FrameError)?.description ?? LinkTLS.describe(error)
        if refusesFailures, phase == .open || phase == .greeting, let error = error as? FrameError {
            if case .version = error { return refuse(Refusal(.version, words)) }
            // A peer that sends garbage would not understand a frame; one whose frames are framed well does.
            if case .notOurs = error { return close(words) }
            return refuse(Refusal(.protocolError, words))
        }
        close(words)
    }

    // MARK: Channel events

    func handlerAdded(context: ChannelHandlerContext) {
        self.context = context
        let handler = NIOLoopBound(self, eventLoop: context.eventLoop)
        greetingLimit = context.eventLoop.scheduleTask(in: timing.greeting) { handler.value.greetingExpired() }
    }

    private func greetingExpired() {
        close(
            phase == .handshake
                ? "no TLS handshake within \(timing.greeting.inWords)" : "no greeting within \(timing.greeting.inWords)")
    }

    func handlerRemoved(context: ChannelHandlerContext) {
        ended()
        self.context = nil
    }

    func channelInactive(context: ChannelHandlerContext) {
        ended()
        context.fireChannelInactive()
    }

    private func ended() {
        guard phase != .closed else { return }
        if phase == .handshake && reason == "the other side closed the connection" {
            reason = "the other side closed the connection during the TLS handshake"
        }
        phase = .closed
        greetingLimit?.cancel()
        aliveTask?.cancel()
        stream.closed(reason)
    }

    func userInboundEventTriggered(context: ChannelHandlerContext, event: Any) {
        if let event = event as? TLSUserEvent, case .handshakeCompleted = event, phase == .handshake {
            phase = .greeting
            startLiveness(context)
            stream.opened(self)
        }
        context.fireUserInboundEventTriggered(event)
    }

    func channelRead(context: ChannelHandlerContext, data: NIOAny) {
        lastRead = .now()
        guard phase == .open || phase == .greeting else { return }
        readMeanwhile.append(unwrapInboundIn(data))
        if isReading { return }
        isReading = true
        defer {
            isReading = false
            readMeanwhile.removeAll()
        }
        var count = 0
        while count < readMeanwhile.count, phase == .open || phase == .greeting {
            var bytes = readMeanwhile[count]
            count += 1
            do {
                try assembler.consume(&bytes) { frame in
                    guard phase == .open || phase == .greeting else { return }
                    if frame.header.type == .alive && phase == .greeting { return }
                    try stream.received(frame)
                }
            } catch {
                return fail(error)
            }
        }
    }

    func channelWritabilityChanged(context: ChannelHandlerContext) {
        if isWritable { stream.writable() }
        context.fireChannelWritabilityChanged()
    }

    func errorCaught(context: ChannelHandlerContext, error: any Error) {
        fail(error)
    }

    // MARK: Liveness

    private func startLiveness(_ context: ChannelHandlerContext) {
        let handler = NIOLoopBound(self, eventLoop: context.eventLoop)
        aliveTask = context.eventLoop.scheduleRepeatedTask(initialDelay: timing.alive, delay: timing.alive) { _ in
            handler.value.tick()
        }
    }

    private func tick() {
        guard phase == .open else { return }
        if NIODeadline.now() - lastRead > timing.silence {
            return close("nothing was heard from the other side for \(timing.silence.inWords)")
        }
        let meta = AliveMeta(receivedBytes: assembler.receivedBytes, isWorking: stream.isWorking)
        send(.alive) { meta.write(&$0) }
    }
}

import Foundation
import NIOCore
import NIOPosix

/// A connection to one QEMU's control socket. Thread-safe; answers are matched by id, events go to `events`.
public final class QMPClient: Sendable {
    private let channel: any Channel
    private let handler: NIOLoopBound<QMPHandler>
    private let path: String
    /// Ends when QEMU closes the socket. One consumer.
    public let events: AsyncStream<QMPEvent>

    /// Connects, waits for the greeting and leaves negotiation mode.
    /// - Throws: `QMPError`
    public static func connect(path: String, timeout: TimeAmount = .seconds(5), group: any EventLoopGroup = MultiThreadedEventLoopGroup.singleton)
        async throws -> QMPClient
    {
        let (events, continuation) = AsyncStream<QMPEvent>.makeStream(bufferingPolicy: .bufferingNewest(256))
        let client: QMPClient
        do {
            client = try await ClientBootstrap(group: group).connectTimeout(timeout)
                .channelInitializer { channel in
                    channel.eventLoop.makeCompletedFuture {
                        try channel.pipeline.syncOperations.addHandler(
                            QMPHandler(path: path, events: continuation, eventLoop: channel.eventLoop))
                    }
                }
                .connect(unixDomainSocketPath: path)
                .flatMapThrowing { channel in
                    let handler = try channel.pipeline.syncOperations.handler(type: QMPHandler.self)
                    return QMPClient(channel: channel, handler: NIOLoopBound(handler, eventLoop: channel.eventLoop), path: path, events: events)
                }.get()
        } catch {
            continuation.finish()
            throw QMPError.cannotConnect(path: path, why: "\(error)")
        }
        do {
            try await client.greeting(timeout: timeout)
            _ = try await client.execute("qmp_capabilities", timeout: timeout)
        } catch {
            await client.close()
            throw error
        }
        return client
    }

    private init(channel: any Channel, handler: NIOLoopBound<QMPHandler>, path: String, events: AsyncStream<QMPEvent>) {
        self.channel = channel
        self.handler = handler
        self.path = path
        self.events = events
    }

    private func greeting(timeout: TimeAmount) async throws {
        let handler = handler
        try await channel.eventLoop.flatSubmit { handler.value.waitForGreeting(timeout: timeout) }.get()
    }

    /// The command's `return` value. `timeout` bounds the wait; the command itself is not taken back.
    @discardableResult
    public func execute(_ command: String, arguments: [String: JSONValue]? = nil, timeout: TimeAmount = .seconds(10)) async throws -> JSONValue {
        let handler = handler
        return try await channel.eventLoop.flatSubmit {
            handler.value.execute(command, arguments: arguments, timeout: timeout)
        }.get()
    }

    /// QEMU's run state, for example `running`, `paused`, `shutdown`, `internal-error`.
    public func runState() async throws -> String {
        guard let status = try await execute("query-status")["status"]?.string else {
            throw QMPError.garbage(path: path, why: "query-status without status")
        }
        return status
    }

    public func close() async { try? await channel.close() }
}

/// Lives on its channel's event loop.
private final class QMPHandler: ChannelInboundHandler {
    typealias InboundIn = ByteBuffer
    private static let lineBytesMax = 1 << 20

    private let path: String
    private let events: AsyncStream<QMPEvent>.Continuation
    private let eventLoop: any EventLoop
    private let greeted: EventLoopPromise<Void>
    private var context: ChannelHandlerContext?
    private var received = ByteBuffer()
    private var pending: [Int: EventLoopPromise<JSONValue>] = [:]
    private var commands: [Int: String] = [:]
    private var nextID = 1

    init(path: String, events: AsyncStream<QMPEvent>.Continuation, eventLoop: any EventLoop) {
        self.path = path
        self.events = events
        self.eventLoop = eventLoop
        greeted = eventLoop.makePromise()
    }

    func handlerAdded(context: ChannelHandlerContext) { self.context = context }
    func handlerRemoved(context: ChannelHandlerContext) { end(QMPError.closed(path: path)) }
    func channelInactive(context: ChannelHandlerContext) { end(QMPError.closed(path: path)) }

    func errorCaught(context: ChannelHandlerContext, error: any Error) {
        end(error)
        context.close(promise: nil)
    }

    func waitForGreeting(timeout: TimeAmount) -> EventLoopFuture<Void> {
        let path = path
        let promise = greeted
        let timer = eventLoop.scheduleTask(in: timeout) { promise.fail(QMPError.timeout(path: path, command: "greeting")) }
        greeted.futureResult.whenComplete { _ in timer.cancel() }
        return greeted.futureResult
    }

    func execute(_ command: String, arguments: [String: JSONValue]?, timeout: TimeAmount) -> EventLoopFuture<JSONValue> {
        guard let context, context.channel.isActive else { return eventLoop.makeFailedFuture(QMPError.closed(path: path)) }
        let id = nextID
        nextID += 1
        let promise = eventLoop.makePromise(of: JSONValue.self)
        pending[id] = promise
        commands[id] = command
        do {
            var buffer = context.channel.allocator.buffer(bytes: try JSONEncoder().encode(QMPRequest(execute: command, arguments: arguments, id: id)))
            buffer.writeInteger(UInt8(ascii: "\n"))
            context.writeAndFlush(NIOAny(buffer), promise: nil)
        } catch {
            promise.fail(error)
        }
        let path = path
        let timer = eventLoop.scheduleTask(in: timeout) { promise.fail(QMPError.timeout(path: path, command: command)) }
        promise.futureResult.whenComplete { _ in timer.cancel() }
        return promise.futureResult
    }

    func channelRead(context: ChannelHandlerContext, data: NIOAny) {
        var bytes = unwrapInboundIn(data)
        received.writeBuffer(&bytes)
        while let end = received.readableBytesView.firstIndex(of: UInt8(ascii: "\n")) {
            let line = received.readSlice(length: end - received.readerIndex)!
            received.moveReaderIndex(forwardBy: 1)
            take(Data(line.readableBytesView), context: context)
        }
        received.discardReadBytes()
        if received.readableBytes > Self.lineBytesMax {
            errorCaught(context: context, error: QMPError.garbage(path: path, why: "a line of more than \(Self.lineBytesMax) bytes"))
        }
    }

    private func take(_ line: Data, context: ChannelHandlerContext) {
        let message: QMPIncoming
        do { message = try JSONDecoder().decode(QMPIncoming.self, from: line) } catch {
            errorCaught(context: context, error: QMPError.garbage(path: path, why: "\(error)"))
            return
        }
        if message.QMP != nil { greeted.succeed() }
        if let name = message.event { events.yield(QMPEvent(name: name, data: message.data)) }
        guard let id = message.id, let promise = pending.removeValue(forKey: id) else { return }
        let command = commands.removeValue(forKey: id) ?? "?"
        if let failure = message.error {
            promise.fail(QMPError.refused(command: command, why: failure.desc))
        } else {
            promise.succeed(message.return ?? .null)
        }
    }

    private func end(_ error: any Error) {
        greeted.fail(error)
        for promise in pending.values { promise.fail(error) }
        pending.removeAll()
        commands.removeAll()
        events.finish()
        context = nil
    }
}

import BlockTap
import Logging
import NIOCore
import NIOPosix

/// The agent's control stream: says hello, reports its status every half second, carries out the appliance's commands in the
/// order in which they come. Reconnects for ever. Thread-safe; the connection is confined to one event loop.
public final class AgentControlClient: FrameStream, @unchecked Sendable {
    private enum Link {
        case stopped
        case connecting(attempt: Int)
        case greeting(FrameHandler)
        case open(FrameHandler)
        case waiting(Scheduled<Void>)
    }

    private let endpoint: LinkEndpoint
    private let hello: @Sendable () -> AgentHello
    private let status: @Sendable () async -> AgentStatus
    private let onCommand: @Sendable (AgentCommand) async -> Void
    private let logger: Logger
    private let timing: LinkTiming
    private let eventLoop: any NIOCore.EventLoop
    private var link = Link.stopped
    private var attempt = 0
    private var retries = 0
    private var ticker: RepeatedTask?
    private var isReadingStatus = false
    private let commands: AsyncStream<AgentCommand>.Continuation
    private let worker: Task<Void, Never>

    /// `onCommand` is called for one command at a time; the same command may come again after a reconnect.
    public init(
        endpoint: LinkEndpoint, hello: @escaping @Sendable () -> AgentHello, status: @escaping @Sendable () async -> AgentStatus,
        onCommand: @escaping @Sendable (AgentCommand) async -> Void, logger: Logger, timing: LinkTiming = LinkTiming(),
        eventLoopGroup: any EventLoopGroup = MultiThreadedEventLoopGroup.singleton
    ) {
        self.endpoint = endpoint
        self.hello = hello
        self.status = status
        self.onCommand = onCommand
        self.logger = logger
        self.timing = timing
        eventLoop = eventLoopGroup.next()
        let (stream, continuation) = AsyncStream.makeStream(of: AgentCommand.self)
        commands = continuation
        worker = Task { for await command in stream { await onCommand(command) } }
    }

    public func start() {
        eventLoop.execute { [self] in
            guard case .stopped = link else { return }
            ticker = eventLoop.scheduleRepeatedTask(initialDelay: .milliseconds(500), delay: .milliseconds(500)) { [self] _ in
                reportStatus()
            }
            connect()
        }
    }

    /// Closes the stream and ends for good; returns when no command is being carried out any more. Not to be called from
    /// `onCommand`.
    public func stop() async {
        try? await eventLoop.submit { [self] in
            let old = link
            link = .stopped
            ticker?.cancel()
            ticker = nil
            switch old {
            case .greeting(let handler), .open(let handler): handler.close("stopped")
            case .waiting(let timer): timer.cancel()
            case .stopped, .connecting: break
            }
            commands.finish()
        }.get()
        await worker.value
    }

    // MARK: Connecting

    private func connect() {
        attempt += 1
        let attempt = attempt
        link = .connecting(attempt: attempt)
        LinkConnector.connect(endpoint, stream: self, timing: timing, eventLoop: eventLoop).whenComplete { [self] result in
            guard case .connecting(attempt) = link else {
                if case .success(let handler) = result { handler.discard() }
                return
            }
            switch result {
            case .success(let handler): link = .greeting(handler)
            case .failure(let error): lost("\(error)")
            }
        }
    }

    private func lost(_ why: String) {
        if case .stopped = link { return }
        logger.warning("the control stream is down: \(why)")
        let delay = LinkConnector.backOff(retries: retries, timing)
        retries += 1
        link = .waiting(eventLoop.scheduleTask(in: delay) { [self] in connect() })
    }

    private func reportStatus() {
        guard case .open = link, !isReadingStatus else { return }
        isReadingStatus = true
        Task { [self] in
            let status = await status()
            eventLoop.execute { [self] in
                isReadingStatus = false
                guard case .open(let handler) = link, handler.isWritable else { return }
                handler.send(.control) { $0.putJSON(ControlMessage.status(status)) }
            }
        }
    }

    // MARK: FrameStream

    var isWorking: Bool { false }

    func opened(_ handler: FrameHandler) {
        let hello = hello()
        handler.send(.hello) { $0.putJSON(Hello(agent: hello)) }
    }

    func received(_ frame: FrameView) throws {
        switch (frame.header.type, link) {
        case (.welcome, .greeting(let handler)):
            handler.greeted()
            link = .open(handler)
            retries = 0
            logger.info("the control stream is up")
        case (.refused, .greeting(let handler)), (.refused, .open(let handler)):
            let refusal = try frame.json(Refusal.self)
            // Two agents of one server would drive each other out as fast as they can connect.
            if refusal.code == Refusal.Code.superseded.rawValue { retries = max(retries, 5) }
            handler.close("the appliance refuses: \(refusal.reason)")
        case (.control, .open):
            do {
                if case .command(let command) = try frame.json(ControlMessage.self) { commands.yield(command) }
            } catch {
                logger.warning("a command was not understood (a newer appliance?): \(error)")
            }
        case (.alive, .open): break
        default: throw FrameError.unexpected(frame.header.type, "not part of a control stream from the appliance")
        }
    }

    func writable() {}
    func closed(_ reason: String) { lost(reason) }
}

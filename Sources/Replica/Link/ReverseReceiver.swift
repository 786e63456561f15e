import BlockTap
import Logging
import NIOCore
import NIOPosix
import Synchronization

/// The agent's end of reverse replication: connects, asks for what the appliance sends back, and writes it onto disks. Reconnects for ever.
/// Thread-safe; the connection is confined to one event loop.
public final class ReverseReceiver: FrameStream, @unchecked Sendable {
    private enum Link {
        case stopped
        case connecting(attempt: Int)
        case greeting(FrameHandler)
        case open(FrameHandler, Receiver)
        case waiting(Scheduled<Void>)
    }

    private let endpoint: LinkEndpoint
    private let group: GroupID
    private let generation: Generation
    private let specs: [VolumeSpec]
    private let target: DiskTarget
    private let original: DurablePosition?
    private let logger: Logger
    private let timing: LinkTiming
    private let eventLoop: any NIOCore.EventLoop
    private let workers: HashWorkers
    private let published = Mutex(AgentStatus())
    private var link = Link.stopped
    private var attempt = 0
    private var retries = 0
    private var isFinal = false

    /// `specs`: of the target's disks. `original`: the recovery point that they are, if they are one. `target` is not used any more once `stop` has returned; its owner closes it.
    public init(
        endpoint: LinkEndpoint, group: GroupID, generation: Generation, specs: [VolumeSpec], target: DiskTarget, original: DurablePosition? = nil,
        logger: Logger,
        timing: LinkTiming = LinkTiming(), eventLoopGroup: any EventLoopGroup = MultiThreadedEventLoopGroup.singleton
    ) {
        self.endpoint = endpoint
        self.group = group
        self.generation = generation
        self.specs = specs
        self.target = target
        self.original = original
        var logger = logger
        logger[metadataKey: "group"] = "\(group)"
        self.logger = logger
        self.timing = timing
        eventLoop = eventLoopGroup.next()
        workers = HashWorkers(bytesPerSecond: timing.hashBytesPerSecond)
    }

    public func start() {
        eventLoop.execute { [self] in
            guard case .stopped = link else { return }
            retries = 0
            isFinal = false
            connect()
        }
    }

    /// Returns when nothing is written any more.
    public func stop() async {
        let idle = try? await eventLoop.submit { [self] () -> EventLoopFuture<Void>? in
            isFinal = true
            switch link {
            case .open(let handler, let receiver):
                let idle = receiver.end(on: eventLoop)
                handler.close("stopped")
                return idle
            case .greeting(let handler): handler.close("stopped")
            case .waiting(let timer):
                timer.cancel()
                link = .stopped
            case .connecting: link = .stopped
            case .stopped: break
            }
            return nil
        }.get()
        try? await idle?.get()
        workers.stop()
        setPhase(.idle, nil)
    }

    /// How it goes; `lastAcknowledgedEpoch` is what the disks hold completely, or held last.
    public var status: AgentStatus {
        var status = published.withLock { $0 }
        let figures = target.figures
        status.lastAcknowledgedEpoch = figures.position.instance.hasPrefix("disks-") ? .none : figures.position.epoch
        if let failure = figures.failure {
            status.phase = .failed
            status.reason = "\(failure)"
        }
        return status
    }

    private func setPhase(_ phase: ReplicationPhase, _ reason: String?) {
        published.withLock {
            $0.phase = phase
            $0.reason = reason
        }
    }

    // MARK: Connection

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

    func opened(_ handler: FrameHandler) {
        let position = target.figures.position
        var hello = ReverseHello(
            group: group, generation: generation, disks: specs.map(\.name), windowBytes: target.windowBytes,
            position: .init(instance: position.instance, epoch: position.epoch, kind: position.kind))
        hello.original = original.map { .init(instance: $0.instance, epoch: $0.epoch, kind: $0.kind) }
        handler.send(.hello) { $0.putJSON(Hello(reverse: hello)) }
    }

    private func welcomed(_ welcome: Welcome, _ handler: FrameHandler) throws(FrameError) {
        guard let hello = welcome.reverse, hello.group == group, hello.generation == generation else { throw .malformed(.welcome, "it is not for a reverse stream of group \(group)") }
        guard hello.disks.map(\.name) == specs.map(\.name), zip(hello.disks, specs).allSatisfy({ $0.geometry.sizeBytes == $1.geometry.sizeBytes }) else {
            throw .malformed(.welcome, "the disks that are sent back are not those that were agreed on")
        }
        handler.greeted()
        target.take(hello.instance)
        link = .open(handler, Receiver(target: target, hello: hello, position: target.figures.position, handler: handler, timing: timing, workers: workers, logger: logger))
        retries = 0
        setPhase(.replicating, nil)
        logger.info("reverse stream: the disks are brought up to what runs at the appliance")
    }

    var isWorking: Bool {
        if case .open(_, let receiver) = link { receiver.isWorking } else { false }
    }

    func writable() {}

    func received(_ frame: FrameView) throws {
        switch (frame.header.type, link) {
        case (.welcome, .greeting(let handler)):
            try welcomed(frame.json(Welcome.self), handler)
        case (.refused, .greeting(let handler)), (.refused, .open(let handler, _)):
            let refusal = try frame.json(Refusal.self)
            // Two agents of one server would drive each other out as fast as they can connect.
            if refusal.code == Refusal.Code.superseded.rawValue { retries = max(retries, 5) }
            handler.close("the appliance refuses: \(refusal.reason)")
        case (.fenced, .greeting(let handler)), (.fenced, .open(let handler, _)):
            var reader = MetaReader(frame)
            isFinal = true
            handler.close("reverse replication ended: the group is at \(Generation(try NumberMeta(&reader).value)), this order has \(generation)")
        case (_, .open(_, let receiver)):
            try receiver.received(frame)
        default: throw FrameError.unexpected(frame.header.type, "not part of a reverse stream from the appliance")
        }
    }

    func closed(_ reason: String) { lost(reason) }

    private func lost(_ why: String) {
        switch link {
        case .stopped, .waiting: return
        case .open(_, let receiver):
            // Its seals end first: they say what the disks hold.
            link = .connecting(attempt: 0)
            receiver.end(on: eventLoop).whenComplete { [self] _ in again(why) }
        case .connecting, .greeting: again(why)
        }
    }

    private func again(_ why: String) {
        if isFinal {
            link = .stopped
            setPhase(.fenced, why)
            return
        }
        logger.warning("the reverse stream is down: \(why)")
        setPhase(.interrupted, why)
        let delay = LinkConnector.backOff(retries: retries, timing)
        retries += 1
        link = .waiting(eventLoop.scheduleTask(in: delay) { [self] in connect() })
    }
}

import BlockTap
import Logging
import NIOCore
import Synchronization

/// What an appliance sends back to a group's server, whenever that connects and asks for it. Lives as long as reverse replication does; each
/// connection has a `SenderLoop` of its own.
public final class ReverseOffer: Sendable {
    public let server: ServerID
    public let source: ForkSource
    public let order: ReplicationOrder
    private let base: ReplicationBase
    private let logger: Logger
    private let current = Mutex<SenderLoop?>(nil)

    public init(server: ServerID, source: ForkSource, order: ReplicationOrder, logger: Logger) {
        self.server = server
        self.source = source
        self.order = order
        self.logger = logger
        base = source.resumption.map { ReplicationBase(resuming: order.group, instance: source.instance, from: $0) } ?? ReplicationBase()
    }

    /// Of the connection that is, or of the last one; `interrupted` when there is none.
    public var status: AgentStatus {
        guard let sender = current.withLock({ $0 }) else {
            var status = AgentStatus()
            status.phase = .interrupted
            status.reason = "the agent with the disks has not connected"
            return status
        }
        var status = sender.published.withLock { $0 }
        if status.phase == .idle { status.phase = .interrupted }
        return status
    }

    /// Cuts as soon as possible.
    public func cutNow() {
        guard let sender = current.withLock({ $0 }) else { return }
        sender.eventLoop.execute { sender.cutNow(.crash) }
    }

    /// For a new connection; the one before is not used any more.
    func sender(timing: LinkTiming, eventLoop: any NIOCore.EventLoop) -> SenderLoop {
        let sender = SenderLoop(source: source, endpoint: nil, order: order, logger: logger, base: base, timing: timing, eventLoop: eventLoop)
        current.withLock { $0 = sender }
        return sender
    }

    /// Returns when no connection uses the source.
    func untilFree() async {
        guard let sender = current.withLock({ $0 }) else { return }
        let promise = sender.eventLoop.makePromise(of: Void.self)
        sender.eventLoop.execute { sender.stop(promise) }
        try? await promise.futureResult.get()
    }
}

import BlockTap
import Logging
import NIOCore
import NIOPosix
import Synchronization

/// Carries an `EpochSource`'s epochs to the appliance, for ever: connect, HELLO, full sync (or resync) if the replica needs one, then an
/// exact epoch every `epochMilliseconds`; after any interruption it gives the unacknowledged epochs back to the source and
/// reconnects with a jittered back-off. Thread-safe; the work is done on one event loop.
public final class Sender: Sendable {
    private let loop: SenderLoop
    private let eventLoop: any NIOCore.EventLoop

    /// `base` must be the same object for every Sender on one source (see `ReplicationBase`); without it every new Sender
    /// begins with a full sync.
    public init(
        source: any EpochSource, endpoint: LinkEndpoint, order: ReplicationOrder, logger: Logger,
        base: ReplicationBase = ReplicationBase(), timing: LinkTiming = LinkTiming(),
        eventLoopGroup: any EventLoopGroup = MultiThreadedEventLoopGroup.singleton
    ) {
        eventLoop = eventLoopGroup.next()
        loop = SenderLoop(
            source: source, endpoint: endpoint, order: order, logger: logger, base: base, timing: timing, eventLoop: eventLoop)
    }

    /// Begins, or begins again after an interruption from which the order does not let it restart by itself.
    public func start() { eventLoop.execute { self.loop.start() } }

    /// Ends the connection and gives unacknowledged epochs back to the source. Returns when the source is not used any more.
    public func stop() async {
        let promise = eventLoop.makePromise(of: Void.self)
        eventLoop.execute { self.loop.stop(promise) }
        try? await promise.futureResult.get()
    }

    /// Another throttle, compression or epoch length (`ReplicationOrder.isSameStream`), without interrupting the stream.
    public func adopt(_ order: ReplicationOrder) { eventLoop.execute { self.loop.adopt(order) } }

    /// Closes the running epoch as soon as the previous one has been sent, instead of at its time. `consistency` is asked of the next epoch
    /// that can be exact; what became of it, `AgentStatus.proofs` says.
    public func cutNow(consistency: CutConsistency = .crash) { eventLoop.execute { self.loop.cutNow(consistency) } }

    /// A snapshot, at most a quarter of a second old.
    public var status: AgentStatus { loop.published.withLock { $0 } }
}

import NIOCore
import NIOPosix
import NIOSSL

/// Opens an agent's connection to the appliance and says how long to wait before the next attempt.
enum LinkConnector {
    /// Connects and starts TLS; the stream's `opened` follows when that is done, `closed` when it fails. The future succeeds
    /// first, and fails, with a `PKIError` or `LinkError`, when there is no connection at all.
    static func connect(
        _ endpoint: LinkEndpoint, stream: any FrameStream & Sendable, timing: LinkTiming, eventLoop: any NIOCore.EventLoop
    ) -> EventLoopFuture<FrameHandler> {
        let context: NIOSSLContext
        do {
            context = try LinkTLS.clientContext(endpoint)
        } catch {
            return eventLoop.makeFailedFuture(error)
        }
        return ClientBootstrap(group: eventLoop)
            .connectTimeout(timing.greeting)
            .channelOption(.writeBufferWaterMark, value: .init(low: 1 << 20, high: 4 << 20))
            .connect(host: endpoint.host, port: endpoint.port)
            .hop(to: eventLoop)
            .flatMapThrowing { channel in
                // TLS begins when its handler is added to the connected channel: first there must be someone to tell.
                let handler = FrameHandler(stream: stream, timing: timing, refusesFailures: false)
                let tls = try LinkTLS.clientHandler(context, host: endpoint.host)
                try channel.pipeline.syncOperations.addHandlers(tls, handler)
                return handler
            }
            .flatMapErrorThrowing { error in
                throw LinkError.cannotConnect(host: endpoint.host, port: endpoint.port, LinkTLS.describe(error))
            }
    }

    /// Doubles with every retry from `retryFirst` to `retryLast`, ±50 %, so that agents do not come back all at once.
    static func backOff(retries: Int, _ timing: LinkTiming) -> TimeAmount {
        let ceiling = min(timing.retryFirst.nanoseconds << min(retries, 20), timing.retryLast.nanoseconds)
        return .nanoseconds(Int64(Double(max(ceiling, 1)) * .random(in: 0.5...1.5)))
    }
}

import NIOCore
import NIOPosix
import Synchronization

/// A TCP relay in front of the appliance that hurts connections: cuts them, in the middle of whatever is under way, or lets them
/// fall silent, after a number of relayed bytes that the test chooses for each connection.
final class HurtfulProxy: Sendable {
    enum Injury: Sendable {
        case none
        /// Both sides are closed after this many bytes in both directions together.
        case cut(afterBytes: Int)
        /// Nothing is relayed any more, and nothing closed.
        case silence(afterBytes: Int)
    }

    let port: Int
    private let listener: any Channel

    /// `injury` is asked for each connection, with its number from 0.
    static func start(to port: Int, injury: @escaping @Sendable (Int) -> Injury) async throws -> HurtfulProxy {
        let counter = Atomic(0)
        let listener = try await ServerBootstrap(group: MultiThreadedEventLoopGroup.singleton)
            .childChannelInitializer { client in
                let number = counter.add(1, ordering: .relaxed).oldValue
                // The server speaks only when spoken to, and the client is not read before this is done.
                return ClientBootstrap(group: client.eventLoop)
                    .connect(host: "127.0.0.1", port: port)
                    .flatMapThrowing { server in
                        let relay = Relay(client: client, server: server, injury: injury(number))
                        try client.pipeline.syncOperations.addHandler(Relay.End(relay, peer: server))
                        try server.pipeline.syncOperations.addHandler(Relay.End(relay, peer: client))
                    }
            }
            .bind(host: "127.0.0.1", port: 0).get()
        return HurtfulProxy(listener: listener)
    }

    private init(listener: any Channel) {
        self.listener = listener
        port = listener.localAddress!.port!
    }

    func stop() async { try? await listener.close() }

    /// Confined to the two channels' common event loop.
    final class Relay: @unchecked Sendable {
        private let client: any Channel
        private let server: any Channel
        private let injury: Injury
        private var bytes = 0

        init(client: any Channel, server: any Channel, injury: Injury) {
            self.client = client
            self.server = server
            self.injury = injury
        }

        /// What of `data` is still to be relayed.
        func pass(_ data: ByteBuffer) -> ByteBuffer? {
            let before = bytes
            bytes += data.readableBytes
            switch injury {
            case .none:
                return data
            case .silence(let limit):
                return bytes <= limit ? data : nil
            case .cut(let limit):
                if bytes < limit { return data }
                let rest = data.getSlice(at: data.readerIndex, length: max(0, limit - before))
                client.eventLoop.execute { self.close() }
                return rest
            }
        }

        func close() {
            client.close(promise: nil)
            server.close(promise: nil)
        }

        final class End: ChannelInboundHandler {
            typealias InboundIn = ByteBuffer
            private let relay: Relay
            private let peer: any Channel
            init(_ relay: Relay, peer: any Channel) {
                self.relay = relay
                self.peer = peer
            }
            func channelRead(context: ChannelHandlerContext, data: NIOAny) {
                if let data = relay.pass(unwrapInboundIn(data)) { peer.writeAndFlush(data, promise: nil) }
            }
            func channelInactive(context: ChannelHandlerContext) { relay.close() }
            func errorCaught(context: ChannelHandlerContext, error: any Error) { relay.close() }
        }
    }
}

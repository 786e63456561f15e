import BlockTap
import Foundation
import NIOCore
import NIOPosix
import NIOSSL
import Synchronization

@testable import Replica

/// An agent that says what the test wants it to say: raw bytes over TLS (or without), and the frames that come back.
final class RawPeer: Sendable {
    enum Event: Sendable, Equatable {
        case frame(FrameType, meta: [UInt8])
        case closed
    }

    let channel: any Channel
    let events: AsyncStream<Event>
    private let sequence = Mutex<UInt64>(0)

    private init(channel: any Channel, events: AsyncStream<Event>) {
        self.channel = channel
        self.events = events
    }

    /// `endpoint` nil: plain TCP.
    static func connect(port: Int, _ configuration: TLSConfiguration?) async throws -> RawPeer {
        let (events, continuation) = AsyncStream.makeStream(of: Event.self)
        let channel = try await ClientBootstrap(group: MultiThreadedEventLoopGroup.singleton)
            .channelInitializer { channel in
                channel.eventLoop.makeCompletedFuture {
                    if let configuration {
                        let context = try NIOSSLContext(configuration: configuration)
                        try channel.pipeline.syncOperations.addHandler(NIOSSLClientHandler(context: context, serverHostname: nil))
                    }
                    try channel.pipeline.syncOperations.addHandler(Reader(continuation, isTLS: configuration != nil))
                }
            }
            .connect(host: "127.0.0.1", port: port).get()
        return RawPeer(channel: channel, events: events)
    }

    static func connect(_ endpoint: LinkEndpoint) async throws -> RawPeer {
        var configuration = TLSConfiguration.makeClientConfiguration()
        configuration.trustRoots = .certificates(try NIOSSLCertificate.fromPEMBytes(Array(endpoint.caCertificatePEM.utf8)))
        configuration.certificateChain = try NIOSSLCertificate.fromPEMBytes(Array(endpoint.identity.certificatePEM.utf8)).map { .certificate($0) }
        configuration.privateKey = .privateKey(try NIOSSLPrivateKey(bytes: Array(endpoint.identity.keyPEM.utf8), format: .pem))
        return try await connect(port: endpoint.port, configuration)
    }

    func send(bytes: [UInt8]) { channel.writeAndFlush(ByteBuffer(bytes: bytes), promise: nil) }

    func send(
        _ type: FrameType, payload: [UInt8] = [], version: UInt16 = FrameHeader.version, _ meta: (inout ByteBuffer) -> Void = { _ in }
    ) {
        var buffer = ByteBuffer(repeating: 0, count: FrameLimits.headerBytes)
        meta(&buffer)
        let number = sequence.withLock { number in
            defer { number += 1 }
            return number
        }
        buffer.withUnsafeMutableReadableBytes {
            FrameHeader.write(into: $0, type: type, payloadBytes: payload.count, sequence: number, version: version)
        }
        buffer.writeBytes(payload)
        channel.writeAndFlush(buffer, promise: nil)
    }

    func hello(_ source: any EpochSource, generation: Generation = Generation(1)) {
        let hello = DataHello(group: TestAppliance.group, generation: generation, instance: source.instance, disks: source.disks)
        send(.hello) { $0.putJSON(Hello(data: hello)) }
    }

    /// The next frame that is no ALIVE; `.closed` at the end.
    func next() async -> Event {
        for await event in events {
            if case .frame(.alive, _) = event { continue }
            return event
        }
        return .closed
    }

    /// Skips everything up to a REFUSED frame; nil when the connection closes without one.
    func refusal() async -> Refusal? {
        for await event in events {
            if case .frame(.refused, let meta) = event { return try? JSONDecoder().decode(Refusal.self, from: Data(meta)) }
        }
        return nil
    }

    func untilClosed() async { for await _ in events {} }

    private final class Reader: ChannelInboundHandler {
        typealias InboundIn = ByteBuffer
        private let events: AsyncStream<Event>.Continuation
        private let isTLS: Bool
        private var assembler = FrameAssembler()
        init(_ events: AsyncStream<Event>.Continuation, isTLS: Bool) {
            self.events = events
            self.isTLS = isTLS
        }
        func channelRead(context: ChannelHandlerContext, data: NIOAny) {
            guard isTLS else { return }
            var bytes = unwrapInboundIn(data)
            try? assembler.consume(&bytes) { events.yield(.frame($0.header.type, meta: Array($0.meta))) }
        }
        func channelInactive(context: ChannelHandlerContext) {
            events.yield(.closed)
            events.finish()
        }
        func errorCaught(context: ChannelHandlerContext, error: any Error) { context.close(promise: nil) }
    }
}

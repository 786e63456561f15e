import BlockTap
import Dispatch
import Logging
import NIOCore
import NIOPosix
import NIOSSL
import Synchronization

/// The appliance's link port: every agent's control stream and data streams.
///
/// Connections are refused, with a line in the log, unless they speak TLS 1.3, show a client certificate of this CA that names
/// a server, and the delegate knows that server. Thread-safe.
public final class LinkServer: Sendable {
    let store: ReplicaStore
    let delegate: any LinkServerDelegate
    let logger: Logger
    let timing: LinkTiming
    let registry = ConnectionRegistry()
    let hashWorkers: HashWorkers
    /// What connections are let in with.
    private let context: Mutex<NIOSSLContext?>
    private let identity: TLSIdentity
    private let caCertificatePEM: String
    private let host: String
    private let port: Int
    private let group: any EventLoopGroup
    private let listener = Mutex<(any Channel)?>(nil)
    private let offers = Mutex<[GroupID: ReverseOffer]>([:])

    /// `port` 0 lets the system choose; `start` says which. `identity` is the appliance's server certificate
    /// (`CertificateAuthority.issueServer`), `caCertificatePEM` what clients' certificates are checked against.
    public init(
        store: ReplicaStore, identity: TLSIdentity, caCertificatePEM: String, host: String, port: Int,
        delegate: any LinkServerDelegate, logger: Logger, timing: LinkTiming = LinkTiming(),
        eventLoopGroup: any EventLoopGroup = MultiThreadedEventLoopGroup.singleton
    ) {
        self.store = store
        context = Mutex(nil)
        self.identity = identity
        self.caCertificatePEM = caCertificatePEM
        self.host = host
        self.port = port
        self.delegate = delegate
        self.logger = logger
        self.timing = timing
        group = eventLoopGroup
        hashWorkers = HashWorkers(bytesPerSecond: timing.hashBytesPerSecond)
    }

    /// Listens; returns the port. Throws `LinkError.cannotListen` or `PKIError`.
    public func start() async throws -> Int {
        let first = try LinkTLS.serverContext(identity: identity, caCertificatePEM: caCertificatePEM)
        context.withLock { $0 = $0 ?? first }
        let bootstrap = ServerBootstrap(group: group)
            .serverChannelOption(.backlog, value: 64)
            .serverChannelOption(.socketOption(.so_reuseaddr), value: 1)
            .childChannelOption(.recvAllocator, value: AdaptiveRecvByteBufferAllocator(minimum: 4096, initial: 16384, maximum: 1 << 19))
            .childChannelInitializer { [self] channel in
                channel.eventLoop.makeCompletedFuture {
                    let connection = ServerConnection(server: self, channel: channel)
                    try channel.pipeline.syncOperations.addHandlers(
                        NIOSSLServerHandler(context: self.context.withLock { $0 } ?? first),
                        FrameHandler(stream: connection, timing: timing, refusesFailures: true))
                }
            }
        let channel: any Channel
        do {
            channel = try await bootstrap.bind(host: host, port: port).get()
        } catch {
            throw LinkError.cannotListen(host: host, port: port, LinkTLS.describe(error))
        }
        listener.withLock { $0 = channel }
        let bound = channel.localAddress?.port ?? port
        logger.info("the link listens on \(host) port \(bound)")
        return bound
    }

    /// Another certificate, for connections from now on: the appliance has an address more.
    public func use(identity: TLSIdentity) throws {
        let next = try LinkTLS.serverContext(identity: identity, caCertificatePEM: caCertificatePEM)
        context.withLock { $0 = next }
    }

    /// Closes the port and every connection; returns when no epoch is being made durable for one any more.
    public func stop() async {
        let channel = listener.withLock { listener in
            defer { listener = nil }
            return listener
        }
        try? await channel?.close()
        for connection in registry.all() { await connection.end(Refusal(.shuttingDown, "the appliance is shutting down")) }
        // Whoever closes the store next finds no reader in it.
        await withCheckedContinuation { continuation in
            DispatchQueue.global(qos: .utility).async { [hashWorkers] in
                hashWorkers.stop()
                continuation.resume()
            }
        }
    }

    /// Sends a command on the server's control stream; throws `LinkError.notConnected` without one.
    public func send(_ command: AgentCommand, to server: ServerID) async throws {
        guard let connection = registry.control(of: server), await connection.send(command) else {
            throw LinkError.notConnected(server)
        }
    }

    /// Ends all connections of a server, for instance because it was removed. It may come back if `authorize` lets it.
    public func disconnect(_ server: ServerID) async {
        for connection in registry.all(of: server) {
            await connection.end(Refusal(.notAuthorized, "server \(server) was disconnected by the appliance"))
        }
    }

    /// From now on the group's server may fetch what the offer's source has. Ends a stream of another offer of this group.
    public func offerReverse(_ offer: ReverseOffer) async {
        let older = offers.withLock { offers in
            defer { offers[offer.order.group] = offer }
            return offers[offer.order.group]
        }
        if let older, older !== offer { await endReplication(of: offer.order.group, reason: "reverse replication was begun anew") }
    }

    /// Nothing is offered of the group any more; returns when its source is not used any more.
    public func endReverse(of group: GroupID, reason: String) async {
        guard offers.withLock({ $0.removeValue(forKey: group) }) != nil else { return }
        await endReplication(of: group, reason: reason)
    }

    func reverseOffer(of group: GroupID) -> ReverseOffer? { offers.withLock { $0[group] } }

    /// Ends the data streams of a group, for instance before its generation is raised or it is deleted; returns when none of
    /// its epochs is being made durable any more.
    public func endReplication(of group: GroupID, reason: String) async {
        if let connection = registry.data(of: group) { await connection.end(Refusal(.superseded, reason)) }
    }
}

/// Which connections there are, and which of them is the one for a group or a server's control stream.
final class ConnectionRegistry: Sendable {
    private struct State {
        var all: [ObjectIdentifier: ServerConnection] = [:]
        var servers: [ObjectIdentifier: ServerID] = [:]
        var control: [ServerID: ServerConnection] = [:]
        var data: [GroupID: ServerConnection] = [:]
        /// Of the newest control stream, even if that has ended.
        var controlTasks: [ServerID: Task<Void, Never>] = [:]
    }
    private let state = Mutex(State())

    func add(_ connection: ServerConnection, server: ServerID) {
        state.withLock {
            $0.all[ObjectIdentifier(connection)] = connection
            $0.servers[ObjectIdentifier(connection)] = server
        }
    }

    func remove(_ connection: ServerConnection) {
        state.withLock { state in
            let id = ObjectIdentifier(connection)
            state.all[id] = nil
            state.servers[id] = nil
            for (server, holder) in state.control where holder === connection { state.control[server] = nil }
            for (group, holder) in state.data where holder === connection { state.data[group] = nil }
        }
    }

    /// Makes `connection` the one for `group`; returns the one that was, which has to be ended.
    func takeData(_ group: GroupID, _ connection: ServerConnection) -> ServerConnection? {
        state.withLock { state in
            defer { state.data[group] = connection }
            return state.data[group]
        }
    }

    /// The same for the control stream; `task` is the one that talks to the delegate.
    func takeControl(
        _ server: ServerID, _ connection: ServerConnection, _ task: Task<Void, Never>?
    ) -> (connection: ServerConnection?, task: Task<Void, Never>?) {
        state.withLock { state in
            defer {
                state.control[server] = connection
                state.controlTasks[server] = task
            }
            return (state.control[server], state.controlTasks[server])
        }
    }

    func all() -> [ServerConnection] { state.withLock { Array($0.all.values) } }
    func all(of server: ServerID) -> [ServerConnection] {
        state.withLock { state in state.all.filter { state.servers[$0.key] == server }.map(\.value) }
    }
    func control(of server: ServerID) -> ServerConnection? { state.withLock { $0.control[server] } }
    func data(of group: GroupID) -> ServerConnection? { state.withLock { $0.data[group] } }
}

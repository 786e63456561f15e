import BlockTap
import Logging
import NIOCore
import NIOSSL

/// One connection at the appliance, from TLS over HELLO to a data or a control stream. Its state is confined to the channel's
/// event loop; what may wait (the delegate, the store's catalogue) is done in one task, step by step.
final class ServerConnection: FrameStream, @unchecked Sendable {
    private enum State {
        case handshake
        case awaitingHello(FrameHandler, ServerIdentity)
        case greeting(FrameHandler)
        case data(FrameHandler, Receiver)
        case control(FrameHandler, AsyncStream<AgentStatus>.Continuation)
        case ended
    }

    private let server: LinkServer
    private let eventLoop: any NIOCore.EventLoop
    private var logger: Logger
    private var state = State.handshake
    private var greeting: Task<Void, Never>?
    /// Succeeds once no epoch of this connection is being made durable any more.
    private var idle: EventLoopFuture<Void>

    init(server: LinkServer, channel: any Channel) {
        self.server = server
        eventLoop = channel.eventLoop
        idle = channel.eventLoop.makeSucceededVoidFuture()
        logger = server.logger
        logger[metadataKey: "peer"] = "\(channel.remoteAddress?.description ?? "unknown")"
    }

    // MARK: FrameStream

    func opened(_ handler: FrameHandler) {
        do {
            let certificate = try handler.peerCertificateDER()
            let identity = try ServerIdentity(certificateDER: certificate)
            logger[metadataKey: "server"] = "\(identity.server)"
            state = .awaitingHello(handler, identity)
        } catch {
            handler.close("\(error)")
        }
    }

    func received(_ frame: FrameView) throws {
        switch state {
        case .handshake, .ended:
            return
        case .awaitingHello(let handler, let identity):
            guard frame.header.type == .hello else { throw FrameError.unexpected(frame.header.type, "HELLO comes first") }
            let hello = try frame.json(Hello.self)
            guard (hello.agent == nil) != (hello.data == nil) else {
                throw FrameError.malformed(.hello, "it must be for a control stream or for a data stream")
            }
            state = .greeting(handler)
            server.registry.add(self, server: identity.server)
            greeting = Task { await greet(hello, identity) }
        case .greeting:
            throw FrameError.unexpected(frame.header.type, "WELCOME has not been sent")
        case .data(_, let receiver):
            try receiver.received(frame)
        case .control(_, let events):
            switch frame.header.type {
            case .alive: break
            case .control:
                do {
                    if case .status(let status) = try frame.json(ControlMessage.self) { events.yield(status) }
                } catch {
                    logger.warning("a control message was not understood: \(error)")
                }
            default: throw FrameError.unexpected(frame.header.type, "not part of a control stream")
            }
        }
    }

    func writable() {}

    var isWorking: Bool {
        if case .data(_, let receiver) = state { receiver.isWorking } else { false }
    }

    func closed(_ reason: String) {
        server.registry.remove(self)
        switch state {
        case .handshake, .awaitingHello: logger.warning("refused a connection: \(reason)")
        case .greeting: logger.warning("refused a stream: \(reason)")
        case .data(_, let receiver):
            idle = receiver.end(on: eventLoop)
            logger.info("data stream ended: \(reason)")
        case .control(_, let events):
            events.finish()
            logger.info("control stream ended: \(reason)")
        case .ended: break
        }
        state = .ended
    }

    // MARK: Greeting

    private func greet(_ hello: Hello, _ identity: ServerIdentity) async {
        guard await server.delegate.authorize(identity.server, certificateSerial: identity.certificateSerial) else {
            return await refuse(Refusal(.notAuthorized, "server \(identity.server) is not (any more) a protected server of this appliance"))
        }
        if let data = hello.data {
            await greetData(data, identity.server)
            // It may have closed before it was entered as the group's stream.
            if await onLoop({ if case .ended = self.state { true } else { false } }) { server.registry.remove(self) }
        }
        if let agent = hello.agent { await greetControl(agent, identity.server) }
    }

    private func greetData(_ hello: DataHello, _ id: ServerID) async {
        guard await server.delegate.mayReplicate(id, group: hello.group, generation: hello.generation) else {
            if let current = server.store.group(hello.group)?.generation, hello.generation < current {
                return await fence(current, hello)
            }
            return await refuse(Refusal(.unknownGroup, "group \(hello.group) is not replicated from server \(id) under \(hello.generation)"))
        }
        if let older = server.registry.takeData(hello.group, self) {
            await older.end(Refusal(.superseded, "a newer data stream of group \(hello.group) has taken over"))
        }
        do {
            // Last look before the store: whoever was ended while waiting must not touch the group any more.
            guard await isGreeting() else { return }
            try server.store.createGroup(hello.group, volumes: hello.disks.map { VolumeSpec(name: $0.name, geometry: $0.geometry) })
        } catch {
            let code: Refusal.Code = if case .full = error { .storeFull } else if case .shrunk = error { .volumeMismatch } else { .storeError }
            return await refuse(Refusal(code, "\(error)"))
        }
        guard let group = server.store.group(hello.group) else {
            return await refuse(Refusal(.unknownGroup, "group \(hello.group) was deleted"))
        }
        guard hello.generation >= group.generation else { return await fence(group.generation, hello) }
        var welcome = Welcome(windowBytes: Receiver.windowBytes(server.store))
        welcome.hashes = server.timing.fault == .isOlder ? nil : true
        welcome.position = group.lastDurable.map { .init(instance: $0.instance, epoch: $0.epoch, kind: $0.kind) }
        await welcomeData(welcome, hello, group.lastDurable)
    }

    private func greetControl(_ hello: AgentHello, _ id: ServerID) async {
        // The delegate hears of one stream of a server at a time: the older one's last call returns before our first.
        let task = await onLoop { self.greeting }
        let older = server.registry.takeControl(id, self, task)
        await older.connection?.end(Refusal(.superseded, "a newer control stream of server \(id) has taken over"))
        await older.task?.value
        let (statuses, continuation) = AsyncStream.makeStream(of: AgentStatus.self, bufferingPolicy: .bufferingNewest(1))
        if await welcomeControl(continuation) {
            for command in await server.delegate.agentConnected(id, hello) { _ = await send(command) }
            for await status in statuses { await server.delegate.agentStatus(id, status) }
        }
        server.registry.remove(self)
        // When a newer stream took over, the server stayed connected.
        if server.registry.control(of: id) == nil { await server.delegate.agentDisconnected(id) }
    }

    // MARK: From tasks onto the loop

    private func onLoop<T: Sendable>(_ body: @escaping @Sendable () -> T) async -> T {
        // Loops of this process live as long as it does: submitting cannot fail.
        try! await eventLoop.submit(body).get()
    }

    private func isGreeting() async -> Bool {
        await onLoop { if case .greeting = self.state { true } else { false } }
    }

    private func refuse(_ refusal: Refusal) async {
        await onLoop { if case .greeting(let handler) = self.state { handler.refuse(refusal) } }
    }

    private func fence(_ current: Generation, _ hello: DataHello) async {
        let reason = "group \(hello.group) is at \(current) here, the source came with \(hello.generation)"
        await onLoop {
            if case .greeting(let handler) = self.state {
                handler.finish(.fenced, { NumberMeta(current.rawValue).write(&$0) }, reason: reason)
            }
        }
    }

    private func welcomeData(_ welcome: Welcome, _ hello: DataHello, _ position: DurablePosition?) async {
        await onLoop { [self] in
            guard case .greeting(let handler) = state else { return }
            handler.send(.welcome) { $0.putJSON(welcome) }
            handler.greeted()
            state = .data(handler, Receiver(store: server.store, hello: hello, position: position, handler: handler, timing: server.timing, workers: server.hashWorkers, logger: logger))
            logger.info("data stream of group \(hello.group), \(hello.generation), from \(welcome.position.map { "\($0.epoch)" } ?? "nothing")")
        }
    }

    private func welcomeControl(_ events: AsyncStream<AgentStatus>.Continuation) async -> Bool {
        await onLoop { [self] in
            guard case .greeting(let handler) = state else { return false }
            handler.send(.welcome) { $0.putJSON(Welcome()) }
            handler.greeted()
            state = .control(handler, events)
            logger.info("control stream is up")
            return true
        }
    }

    // MARK: From other tasks

    /// False when the stream has ended.
    func send(_ command: AgentCommand) async -> Bool {
        await onLoop {
            guard case .control(let handler, _) = self.state else { return false }
            handler.send(.control) { $0.putJSON(ControlMessage.command(command)) }
            return true
        }
    }

    /// Ends this connection with a word to the peer. Returns when no epoch of it is being made durable any more.
    func end(_ refusal: Refusal) async {
        let done: EventLoopFuture<Void> = await onLoop { [self] in
            switch state {
            case .data(let handler, let receiver):
                idle = receiver.end(on: eventLoop)
                handler.refuse(refusal)
            case .control(let handler, let events):
                handler.refuse(refusal)
                events.finish()
            case .greeting(let handler):
                handler.refuse(refusal)
                state = .ended
            case .awaitingHello(let handler, _):
                handler.refuse(refusal)
            case .handshake, .ended: break
            }
            return self.idle
        }
        try? await done.get()
    }
}

extension FrameHandler {
    /// DER of the certificate that TLS has verified.
    func peerCertificateDER() throws -> [UInt8] {
        guard let certificate = try tlsPeerCertificate() else { throw PKIError("it showed no certificate") }
        return try certificate.toDERBytes()
    }
}

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
        case reverse(FrameHandler, SenderLoop)
        case control(FrameHandler, AsyncStream<AgentStatus>.Continuation)
        case ended
    }

    private let server: LinkServer
    private let eventLoop: any NIOCore.EventLoop
    private var logger: Logger
    private var state = State.handshake
    private var greeting: Task<Void, Never>?
    /// Of a control stream: commands until its hello is answered; nil: it is.
    private var waiting: [AgentCommand]? = []
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
            guard [hello.agent != nil, hello.data != nil, hello.reverse != nil].count(where: { $0 }) == 1 else {
                throw FrameError.malformed(.hello, "it must be for a control stream, a data stream or a reverse stream")
            }
            state = .greeting(handler)
            server.registry.add(self, server: identity.server)
            greeting = Task { await greet(hello, identity) }
        case .greeting:
            throw FrameError.unexpected(frame.header.type, "WELCOME has not been sent")
        case .data(_, let receiver):
            try receiver.received(frame)
        case .reverse(_, let sender):
            try sender.received(frame)
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

    func writable() {
        if case .reverse(_, let sender) = state { sender.writable() }
    }

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
        case .reverse(_, let sender):
            idle = sender.ended(reason)
            logger.info("reverse stream ended: \(reason)")
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
            return await refuse(
                Refusal(.notAuthorized, "server \(identity.server) is not (any more) a protected server of this appliance, or was enrolled again since under another certificate"))
        }
        if let data = hello.data {
            await greetData(data, identity.server)
            // It may have closed before it was entered as the group's stream.
            if await onLoop({ if case .ended = self.state { true } else { false } }) { server.registry.remove(self) }
        }
        if let reverse = hello.reverse {
            await greetReverse(reverse, identity.server)
            if await onLoop({ if case .ended = self.state { true } else { false } }) { server.registry.remove(self) }
        }
        if let agent = hello.agent { await greetControl(agent, identity.server) }
    }

    /// The roles turn: from WELCOME on this side sends.
    private func greetReverse(_ hello: ReverseHello, _ id: ServerID) async {
        guard let offer = server.reverseOffer(of: hello.group), offer.server == id else {
            return await refuse(Refusal(.unknownGroup, "nothing is sent back to server \(id) now: reverse replication is not running"))
        }
        guard offer.order.generation == hello.generation else { return await fence(offer.order.generation, hello.group, hello.generation) }
        guard offer.order.disks == hello.disks else {
            return await refuse(Refusal(.volumeMismatch, "the disks \(offer.order.disks.joined(separator: ", ")) are sent back, not \(hello.disks.joined(separator: ", "))"))
        }
        if let older = server.registry.takeData(hello.group, self) {
            await older.end(Refusal(.superseded, "a newer reverse stream of group \(hello.group) has taken over"))
        }
        // One that has ended by itself may still be giving back what was under way.
        await offer.untilFree()
        await onLoop { [self] in
            guard case .greeting(let handler) = state else { return }
            guard server.reverseOffer(of: hello.group) === offer, server.registry.data(of: hello.group) === self else {
                return handler.refuse(Refusal(.superseded, "reverse replication of group \(hello.group) was begun anew"))
            }
            let original = hello.original.map { DurablePosition(instance: $0.instance, epoch: $0.epoch, kind: $0.kind) }
            let isDifferenceKnown = offer.source.peerWas(original)
            let sender = offer.sender(timing: server.timing, eventLoop: eventLoop)
            let answer = DataHello(group: hello.group, generation: hello.generation, instance: offer.source.instance, disks: offer.source.disks)
            handler.send(.welcome) { $0.putJSON(Welcome(reverse: answer)) }
            state = .reverse(handler, sender)
            logger.info("reverse stream of group \(hello.group), \(hello.generation), to disks at \(hello.position.epoch)")
            sender.adopt(handler, windowBytes: hello.windowBytes, position: hello.position, isToCompare: !isDifferenceKnown)
        }
    }

    private func greetData(_ hello: DataHello, _ id: ServerID) async {
        guard await server.delegate.mayReplicate(id, group: hello.group, generation: hello.generation) else {
            if let current = server.store.group(hello.group)?.generation, hello.generation < current {
                return await fence(current, hello.group, hello.generation)
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
        guard hello.generation >= group.generation else { return await fence(group.generation, hello.group, hello.generation) }
        let target = GroupTarget(store: server.store, hello: hello)
        var welcome = Welcome(windowBytes: target.windowBytes)
        welcome.hashes = server.timing.fault == .isOlder ? nil : true
        welcome.position = group.lastDurable.map { .init(instance: $0.instance, epoch: $0.epoch, kind: $0.kind) }
        await welcomeData(welcome, hello, target, group.lastDurable)
    }

    private func greetControl(_ hello: AgentHello, _ id: ServerID) async {
        // The delegate hears of one stream of a server at a time: the older one's last call returns before our first.
        let task = await onLoop { self.greeting }
        let older = server.registry.takeControl(id, self, task)
        await older.connection?.end(Refusal(.superseded, "a newer control stream of server \(id) has taken over"))
        await older.task?.value
        let (statuses, continuation) = AsyncStream.makeStream(of: AgentStatus.self, bufferingPolicy: .bufferingNewest(1))
        if await welcomeControl(continuation) {
            await answer(await server.delegate.agentConnected(id, hello))
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

    /// What an agent that has said hello is to do comes first; what was sent meanwhile is newer.
    private func answer(_ commands: [AgentCommand]) async {
        await onLoop { [self] in
            let later = waiting ?? []
            waiting = nil
            guard case .control(let handler, _) = state else { return }
            for command in commands + later { handler.send(.control) { $0.putJSON(ControlMessage.command(command)) } }
        }
    }

    private func isGreeting() async -> Bool {
        await onLoop { if case .greeting = self.state { true } else { false } }
    }

    private func refuse(_ refusal: Refusal) async {
        await onLoop { if case .greeting(let handler) = self.state { handler.refuse(refusal) } }
    }

    private func fence(_ current: Generation, _ group: GroupID, _ theirs: Generation) async {
        let reason = "group \(group) is at \(current) here, the other side came with \(theirs)"
        await onLoop {
            if case .greeting(let handler) = self.state {
                handler.finish(.fenced, { NumberMeta(current.rawValue).write(&$0) }, reason: reason)
            }
        }
    }

    private func welcomeData(_ welcome: Welcome, _ hello: DataHello, _ target: GroupTarget, _ position: DurablePosition?) async {
        await onLoop { [self] in
            guard case .greeting(let handler) = state else { return }
            handler.send(.welcome) { $0.putJSON(welcome) }
            handler.greeted()
            state = .data(handler, Receiver(target: target, hello: hello, position: position, handler: handler, timing: server.timing, workers: server.hashWorkers, logger: logger))
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
            if self.waiting != nil {
                self.waiting?.append(command)
                return true
            }
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
            case .reverse(let handler, let sender):
                idle = sender.ended(refusal.reason)
                handler.refuse(refusal)
                // The sender has let go of it.
                state = .ended
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

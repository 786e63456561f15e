import BlockTap
import Logging
import Replica

/// Whoever carries out the appliance's commands at the agent.
protocol CommandedReplication: Sendable {
    /// Carrying out a command twice is harmless.
    func carryOut(_ command: AgentCommand) async
    func status() async -> AgentStatus
    /// The agent ends.
    func shutDown() async
}

/// What the appliance's commands amount to at the agent: at most one Sender over the tap group.
actor AgentReplication: CommandedReplication {
    private let tap: any AgentTap
    private let endpoint: LinkEndpoint
    private let logger: Logger
    private var sender: Sender?
    private var order: ReplicationOrder?
    /// The newest generation that it was fenced under: an order from before comes too late.
    private var fence: Generation?
    private var hold: WriteHold?
    private var holdEnds = ContinuousClock.now
    private var endedHold: String?

    init(tap: any AgentTap, endpoint: LinkEndpoint, logger: Logger) {
        self.tap = tap
        self.endpoint = endpoint
        self.logger = logger
    }

    /// Carrying out a command twice is harmless.
    func carryOut(_ command: AgentCommand) async {
        switch command {
        case .startReplication(let order):
            if let fence, order.generation < fence {
                logger.warning("told to replicate under \(order.generation), but fenced under \(fence): not replicating")
                return
            }
            await endHold("replication goes on")
            if order == self.order, let sender, sender.status.phase != .fenced {
                // Changes nothing unless it was interrupted and may not restart by itself: then this is the operator's restart.
                sender.start()
                return
            }
            if let current = self.order, order.isSameStream(as: current), let sender, sender.status.phase != .fenced {
                sender.adopt(order)
                sender.start()
                self.order = order
                return
            }
            await stop()
            logger.info("replication of group \(order.group) starts, \(order.generation), disks \(order.disks.joined(separator: ", "))")
            guard order.disks == tap.source.disks.map(\.name) else {
                logger.error("the appliance asks for disks \(order.disks), this agent has \(tap.source.disks.map(\.name)): not replicating")
                return
            }
            do { try tap.willReplicate(order.group) } catch {
                logger.error("cannot write down whose replica is kept: \(error); not replicating")
                return
            }
            // One base for all Senders: a new order (another generation or address) goes on from the tap's bitmaps.
            var endpoint = endpoint
            endpoint.host = order.linkHost ?? endpoint.host
            let sender = Sender(source: tap.source, endpoint: endpoint, order: order, logger: logger, base: tap.base)
            self.sender = sender
            self.order = order
            sender.start()
        case .stopReplication:
            await endHold("replication stops")
            if sender != nil { logger.info("replication stops") }
            await stop()
        case .fenced(let generation):
            hold?.isFinal = true
            fence = max(fence ?? generation, generation)
            let writes = hold == nil ? "" : "; writes to its disks stay held"
            logger.warning("fenced: this server was failed over under \(generation); replication stops until an operator decides\(writes)")
            await stop()
        case .restart, .keepConfiguration, .followDisks:
            // The agent's own business, not the replication's.
            break
        case .keepOriginal, .startReverse, .disksReady:
            logger.error("the appliance takes this agent for one in rescue mode: nothing is done")
        case .cutNow(let consistency):
            sender?.cutNow(consistency: consistency)
        case .holdWrites(let order):
            guard order.id != endedHold else { return }
            holdEnds = .now + .seconds(order.seconds)
            if hold?.id == order.id { return }
            let isNew = hold == nil
            hold = WriteHold(id: order.id)
            if isNew { logger.notice("writes are held: the last ones are on their way to the replica") }
            // Later commands do not wait for it.
            Task { await self.becomeQuiet(order.id) }
        }
    }

    // MARK: held writes

    private func becomeQuiet(_ id: String) async {
        await tap.holdWrites(id)
        // It may have been ended before it began.
        guard hold?.id == id else { return await tap.releaseWrites(id) }
        hold?.isQuiet = true
        while let hold, hold.id == id, !hold.isFinal {
            if ContinuousClock.now >= holdEnds { return await endHold("the appliance has not repeated it") }
            try? await Task.sleep(for: .milliseconds(100))
        }
    }

    private func endHold(_ why: String) async {
        guard let ended = hold else { return }
        // First: nobody is told that it holds when the first write is done.
        hold = nil
        endedHold = ended.id
        await tap.releaseWrites(ended.id)
        logger.notice("writes are held no longer: \(why)")
    }

    /// The agent ends. Its servers wait for the answers that they owe.
    func shutDown() async {
        await stop()
        guard let hold else { return }
        if hold.isFinal { await tap.refuseHeldWrites(hold.id) } else { await endHold("the agent stops") }
    }

    func status() async -> AgentStatus {
        var status = sender?.status ?? AgentStatus()
        status.source = await tap.source.statistics
        status.live = await tap.live()
        status.hostDisks = tap.hostDisks
        status.hold = hold
        status.endedHold = endedHold
        return status
    }

    func stop() async {
        await sender?.stop()
        sender = nil
        order = nil
    }
}

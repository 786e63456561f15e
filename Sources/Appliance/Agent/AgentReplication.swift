import BlockTap
import Logging
import Replica

/// Whoever carries out the appliance's commands at the agent.
protocol CommandedReplication: Sendable {
    /// Carrying out a command twice is harmless.
    func carryOut(_ command: AgentCommand) async
    /// What writes to this host's disks, once they are not held; of what is called the same, the newest.
    func unlessHeld(_ what: String, _ body: @escaping @Sendable () -> Void) async
    func status() async -> AgentStatus
    /// The agent ends.
    func shutDown() async
}

extension CommandedReplication {
    func unlessHeld(_ what: String, _ body: @escaping @Sendable () -> Void) async { body() }
}

/// What the appliance's commands amount to at the agent: at most one Sender over the tap group.
actor AgentReplication: CommandedReplication {
    private let tap: any AgentTap
    private let endpoint: LinkEndpoint
    private let logger: Logger
    private var sending = OrderedSender()
    /// The newest generation that it was fenced under: an order from before comes too late.
    private var fence: Generation?
    private var hold: WriteHold?
    private var holdEnds = ContinuousClock.now
    private var endedHold: String?
    private var endedHoldReason: String?
    private var whenReleased: [String: @Sendable () -> Void] = [:]

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
            await endLeftOverHold()
            if sending.goesOn(order) { return }
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
            sending.begin(order, source: tap.source, endpoint: endpoint, base: tap.base, logger: logger)
        case .stopReplication:
            await endHold("replication stops")
            await endLeftOverHold()
            if sending.sender != nil { logger.info("replication stops") }
            await stop()
        case .fenced(let generation):
            fence = max(fence ?? generation, generation)
            let stays = tap.holdsFileSystems ? "; its file systems stay frozen until then: switch this host off (echo o > /proc/sysrq-trigger)" : "; writes to its disks stay held"
            let writes = hold == nil ? "" : stays
            logger.warning("fenced: this server was failed over under \(generation); replication stops until an operator decides\(writes)")
            await stop()
            // Last: should this process have to wait for a file system that it holds (for its log's?), it is thawed, and the move taken back.
            await makeHoldFinal()
        case .restart, .keepConfiguration, .followDisks:
            // The agent's own business, not the replication's.
            break
        case .keepOriginal, .startReverse, .disksReady:
            logger.error("the appliance takes this agent for one in rescue mode: nothing is done")
        case .cutNow(let consistency):
            sending.sender?.cutNow(consistency: consistency)
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
        do {
            let unheld = try await tap.holdWrites(id)
            // It may have been ended before it began.
            guard hold?.id == id else { return await tap.releaseWrites(id) }
            hold?.unheld = unheld.isEmpty ? nil : unheld
            hold?.isQuiet = true
            while let hold, hold.id == id, !hold.isFinal {
                if ContinuousClock.now >= holdEnds { return await endHold("the appliance has not repeated it") }
                try? await Task.sleep(for: .milliseconds(100))
                if !hold.isFinal { try await tap.checkHeldWrites(id, forGood: false) }
            }
        } catch {
            if let hold, hold.id == id, !hold.isFinal { await endHold("\(error)") }
        }
    }

    /// What is said to be final is so, whatever becomes of this process, and whatever is written past it later.
    private func makeHoldFinal() async {
        guard let hold, !hold.isFinal else { return }
        let id = hold.id
        do {
            try await tap.checkHeldWrites(id, forGood: true)
            if self.hold?.id == id { self.hold?.isFinal = true }
        } catch {
            if self.hold?.id == id { await endHold("\(error)") }
        }
    }

    private func endLeftOverHold() async {
        do { try await tap.releaseLeftOverWrites() } catch { logger.error("not everything is let go that an agent before this one has held: \(error)") }
    }

    /// The host's file systems may stand still: what writes to them is done when they do not any more.
    func unlessHeld(_ what: String, _ body: @escaping @Sendable () -> Void) {
        if hold == nil || !tap.holdsFileSystems { body() } else { whenReleased[what] = body }
    }

    private func endHold(_ why: String) async {
        guard let ended = hold else { return }
        // First: nobody is told that it holds when the first write is done.
        hold = nil
        (endedHold, endedHoldReason) = (ended.id, why)
        await tap.releaseWrites(ended.id)
        logger.notice("writes are held no longer: \(why)")
        guard hold == nil else { return }
        for body in whenReleased.values { body() }
        whenReleased = [:]
    }

    /// The agent ends. Its servers wait for the answers that they owe.
    func shutDown() async {
        await stop()
        guard let hold else { return }
        if hold.isFinal { await tap.refuseHeldWrites(hold.id) } else { await endHold("the agent stops") }
    }

    func status() async -> AgentStatus {
        var status = sending.sender?.status ?? AgentStatus()
        status.source = await tap.source.statistics
        status.live = await tap.live()
        status.hostDisks = tap.hostDisks
        status.hold = hold
        status.endedHold = endedHold
        status.endedHoldReason = endedHoldReason
        status.canHold = tap.canHoldWrites
        return status
    }

    func stop() async {
        await sending.take()?.stop()
    }
}

import BlockTap
import Logging
import Replica

/// What the appliance's commands amount to at the agent: at most one Sender over the tap group.
actor AgentReplication {
    private let tap: any AgentTap
    private let endpoint: LinkEndpoint
    private let logger: Logger
    private var sender: Sender?
    private var order: ReplicationOrder?

    init(tap: any AgentTap, endpoint: LinkEndpoint, logger: Logger) {
        self.tap = tap
        self.endpoint = endpoint
        self.logger = logger
    }

    /// Carrying out a command twice is harmless.
    func carryOut(_ command: AgentCommand) async {
        switch command {
        case .startReplication(let order):
            if order == self.order, let sender, sender.status.phase != .fenced {
                // Changes nothing unless it was interrupted and may not restart by itself: then this is the operator's restart.
                sender.start()
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
            // One base for all Senders: a new order (another epoch length, throttle or generation) goes on from the tap's bitmaps.
            let sender = Sender(source: tap.source, endpoint: endpoint, order: order, logger: logger, base: tap.base)
            self.sender = sender
            self.order = order
            sender.start()
        case .stopReplication:
            if sender != nil { logger.info("replication stops") }
            await stop()
        case .fenced(let generation):
            logger.warning("fenced: this server was failed over under \(generation); replication stops until an operator decides")
            await stop()
        case .cutNow(let consistency):
            sender?.cutNow(consistency: consistency)
        }
    }

    func status() async -> AgentStatus {
        var status = sender?.status ?? AgentStatus()
        status.source = await tap.source.statistics
        status.live = await tap.live()
        return status
    }

    func stop() async {
        await sender?.stop()
        sender = nil
        order = nil
    }
}

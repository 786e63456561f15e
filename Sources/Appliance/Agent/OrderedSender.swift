import BlockTap
import Logging
import Replica

/// The Sender that carries out the appliance's newest order. An order of the same stream is adopted by the one that runs; any other one takes a new one, which goes on
/// from the source's marks and from `base`, that all of them share.
struct OrderedSender {
    private(set) var sender: Sender?
    private var order: ReplicationOrder?

    /// False: none that runs can, and a new one has to begin. The order that it has already changes nothing, unless it was interrupted and may not restart by itself:
    /// then this is the operator's restart.
    mutating func goesOn(_ order: ReplicationOrder) -> Bool {
        guard let sender, let current = self.order, sender.status.phase != .fenced else { return false }
        if order != current {
            guard order.isSameStream(as: current) else { return false }
            sender.adopt(order)
            self.order = order
        }
        sender.start()
        return true
    }

    /// Once the one before has ended.
    mutating func begin(_ order: ReplicationOrder, source: any EpochSource, endpoint: LinkEndpoint, base: ReplicationBase, logger: Logger) {
        var endpoint = endpoint
        endpoint.host = order.linkHost ?? endpoint.host
        let sender = Sender(source: source, endpoint: endpoint, order: order, logger: logger, base: base)
        self.sender = sender
        self.order = order
        sender.start()
    }

    /// To be stopped; there is none from now on.
    mutating func take() -> Sender? {
        defer { (sender, order) = (nil, nil) }
        return sender
    }
}

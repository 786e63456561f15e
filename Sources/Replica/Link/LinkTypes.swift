import BlockTap
import NIOCore

/// Where the appliance's link listens and how to prove who one is.
public struct LinkEndpoint: Sendable, Hashable {
    public var host: String
    public var port: Int
    /// The agent's client certificate and key.
    public var identity: TLSIdentity
    /// The appliance's CA: the only root that is trusted.
    public var caCertificatePEM: String

    public init(host: String, port: Int, identity: TLSIdentity, caCertificatePEM: String) {
        self.host = host
        self.port = port
        self.identity = identity
        self.caCertificatePEM = caCertificatePEM
    }
}

/// Time limits of the link; the defaults are the product's, tests shorten them.
public struct LinkTiming: Sendable, Hashable {
    /// Both sides send an ALIVE frame this often.
    public var alive: TimeAmount = .seconds(2)
    /// A connection on which nothing arrives for this long, or on which data in flight makes no progress, is closed.
    public var silence: TimeAmount = .seconds(15)
    /// The same while the replica says that it is busy making an epoch durable.
    public var sealing: TimeAmount = .seconds(120)
    /// From accept or connect to the end of HELLO/WELCOME.
    public var greeting: TimeAmount = .seconds(10)
    /// Reconnect back-off: doubles from the first to the last, each with ±50 % jitter.
    public var retryFirst: TimeAmount = .milliseconds(250)
    public var retryLast: TimeAmount = .seconds(15)
    /// After an epoch was abandoned because the source's disk could not be read.
    public var readErrorPause: TimeAmount = .seconds(5)
    /// The appliance looks this often whether it has lost blocks that the source may still have.
    public var repair: TimeAmount = .seconds(10)
    /// What an agent reads of its disks for that, at most.
    public var repairBytesPerSecond: UInt64 = 4 << 20
    /// What an agent compares in a resync, at most, and so reads of its disks; 0 = as fast as they go.
    public var compareBytesPerSecond: UInt64 = 1 << 30
    /// What an appliance reads of its replicas for resyncs, all of them together, at most; 0 = as fast as it goes.
    public var hashBytesPerSecond: UInt64 = 1 << 30
    var fault: LinkFault?
    public init() {}
}

public enum LinkError: Error, Sendable, Hashable, CustomStringConvertible {
    case notConnected(ServerID)
    case cannotListen(host: String, port: Int, String)
    case cannotConnect(host: String, port: Int, String)

    public var description: String {
        switch self {
        case .notConnected(let server): "server \(server) has no control stream at the moment: its agent is down or cannot reach this appliance"
        case .cannotConnect(let host, let port, let why): "cannot reach the appliance at \(host) port \(port): \(why)"
        case .cannotListen(let host, let port, let why): "cannot listen on \(host) port \(port): \(why)"
        }
    }
}

/// What the appliance decides about agents; called in order for each connection, never on an event-loop thread.
public protocol LinkServerDelegate: AnyObject, Sendable {
    /// Whether this server may connect with this certificate (serial: lower-case hex, as in `IssuedCertificate`). Removed
    /// servers are refused at once.
    func authorize(_ server: ServerID, certificateSerial: String) async -> Bool
    /// A control stream is up; the commands are sent at once. Called again at every reconnect, without `agentDisconnected`
    /// before it when the new stream replaced an old one.
    func agentConnected(_ server: ServerID, _ hello: AgentHello) async -> [AgentCommand]
    func agentDisconnected(_ server: ServerID) async
    func agentStatus(_ server: ServerID, _ status: AgentStatus) async
    /// Whether the group belongs to this server and is to be received under this generation.
    func mayReplicate(_ server: ServerID, group: GroupID, generation: Generation) async -> Bool
}

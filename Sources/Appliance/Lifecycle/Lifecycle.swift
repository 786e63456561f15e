import BlockTap
import Foundation
import GRDB
import Logging
import NIOPosix
import Replica

/// Carries out the operations on protected servers.
///
/// Every operation is one transaction (the table's verdict, the new state, the intent as a task or instance, the audit event), then
/// work that may be repeated: after a crash `resume()` starts the work of every unfinished task again. Nothing decides on state read
/// outside the transaction, so operations that race are refused by the table, never interleaved.
public actor Lifecycle {
    let catalogue: Catalogue
    let store: ReplicaStore
    let machines: RecoveryHost
    let exports: PointExporter
    let mounts: PointMounter
    nonisolated let authority: CertificateAuthority
    var settings: LifecycleSettings
    let tasks: TaskBoard
    let logger: Logger
    /// What agents said last; only in memory.
    var agents: [ServerID: LiveAgent] = [:]
    /// See `tellOrder`.
    private var orders: [ServerID: AgentOrders] = [:]
    var link: LinkServer?
    var isStopping = false
    /// What the audit log says of the store's space.
    var toldSpace = SpaceState.ok
    var damage = DamageBook()
    /// Of scrubbing, gathered until they are told.
    var findings: [ScrubFinding] = []
    var scrubTask: Task<Void, Never>?
    var tightensWhenLow = false
    var configurationTask: Task<Void, Never>?
    var alertDesk: AlertDesk?
    var alertTasks: [Task<Void, Never>] = []
    /// What is sent back, by server.
    var offers: [String: ReverseOffer] = [:]
    /// Servers whose original disks are being kept: their group takes what those hold.
    var keeping: Set<ServerID> = []
    /// Appliances that machines go to, by server.
    var others: [String: OtherAppliance] = [:]
    var otherContacts: [String: OtherContact] = [:]
    var otherWatches: [String: Task<Void, Never>] = [:]
    /// Putting in order what was handed over.
    var otherEndings: [String: Task<Void, Never>] = [:]
    var drillScheduleTask: Task<Void, Never>?

    init(
        catalogue: Catalogue, store: ReplicaStore, machines: RecoveryHost, exports: PointExporter, mounts: PointMounter, authority: CertificateAuthority,
        settings: LifecycleSettings, logger: Logger
    ) {
        self.catalogue = catalogue
        self.store = store
        self.machines = machines
        self.exports = exports
        self.mounts = mounts
        self.authority = authority
        self.settings = settings
        self.logger = logger
        tasks = TaskBoard(catalogue: catalogue, logger: logger)
    }

    func connect(link: LinkServer) { self.link = link }
    func setSettings(_ settings: LifecycleSettings) { self.settings = settings }

    /// Stops working; machines go on without their disks until the next start (their QEMUs wait for them).
    func stop() async {
        isStopping = true
        scrubTask?.cancel()
        configurationTask?.cancel()
        await stopAlerts()
        await stopDrillSchedules()
        await tasks.stop()
        await endOffers()
        await leaveOthers()
        await endMounts()
        await exports.stop()
        await machines.detachAll()
    }

    // MARK: helpers of the operations

    /// Sends to an agent when it is there; an agent that comes later is told at its hello.
    func tell(_ server: ServerID, _ command: AgentCommand) async {
        do { try await link?.send(command, to: server) } catch {
            logger.info("will be told when it connects: \(error)", metadata: ["server": "\(server)"])
        }
    }

    /// Tells the agent what it is to do now, as the catalogue has it; for whoever has changed that. One at a time of a server, each by what the catalogue says after
    /// it was asked for: of changes at once the agent's last order is that of the last one. `restarts`: the operator wants it to go on even if it may not by itself.
    func tellOrder(_ server: ServerID, restarts: Bool = false) async {
        if restarts { orders[server, default: AgentOrders()].restarts = true }
        guard orders[server]?.isTold != true else {
            orders[server]?.isOutdated = true
            return
        }
        var isOutdated = true
        while isOutdated {
            let restarts = orders[server]?.restarts == true
            orders[server] = AgentOrders(isTold: true)
            do {
                if agents[server]?.connected == true, agents[server]?.rescueInstance == nil,
                    let record = try await catalogue.read({ db in try ServerRecord.fetchOne(db, key: server.rawValue) })
                {
                    for command in try commands(for: record, restarts: restarts) { await tell(server, command) }
                }
            } catch {
                logger.error("cannot tell an agent what it is to do: \(error)", metadata: ["server": "\(server)"])
            }
            isOutdated = orders[server]?.isOutdated == true
        }
        orders[server] = nil
    }

    func hasRecoveryPoint(_ server: ServerRecord) -> Bool { newestPoint(server) != nil }

    func newestPoint(_ server: ServerRecord) -> RecoveryPoint? {
        guard server.settings != nil else { return nil }
        return store.newestRecoveryPoint(server.group)
    }

    /// nil and "latest" are the newest point.
    func point(of server: ServerRecord, named name: String?) throws -> RecoveryPoint {
        guard let newest = newestPoint(server) else { throw ApplianceError.refused(StateTable.noRecoveryPoint) }
        guard let name, name != "latest" else { return newest }
        guard let point = store.recoveryPoints(server.group).last(where: { $0.id.rawValue == name }) else {
            throw ApplianceError.notFound("Server \(server.name) has no recovery point \(name) (afterimage recovery-point list \(server.name)).")
        }
        return point
    }

    func server(_ name: String) async throws -> ServerRecord {
        try await catalogue.read { db in try db.server(name) }
    }
}

/// What the operations need to know of this appliance's set-up.
public struct LifecycleSettings: Sendable {
    /// The API as agents reach it.
    public var apiURL: String
    public var linkHost: String
    public var linkPort: Int
    public var storeDirectory: String
    public var stateDirectory: String
    public var enrolmentSeconds: Double
    /// After a failover the machine's disks become independent of recovery points.
    public var hydrates: Bool
    /// Names and addresses that the link's certificate has, beside those of networks.
    public var certificateHosts: [String]
    public init(
        apiURL: String, linkHost: String, linkPort: Int, storeDirectory: String, stateDirectory: String? = nil, enrolmentSeconds: Double = 15 * 60, hydrates: Bool = true,
        certificateHosts: [String] = []
    ) {
        self.stateDirectory = stateDirectory ?? storeDirectory + "-state"
        self.hydrates = hydrates
        self.certificateHosts = certificateHosts
        self.apiURL = apiURL
        self.linkHost = linkHost
        self.linkPort = linkPort
        self.storeDirectory = storeDirectory
        self.enrolmentSeconds = enrolmentSeconds
    }
}

/// An agent as its control stream shows it.
struct LiveAgent: Sendable {
    var status: AgentStatus?
    var connected: Bool
    /// Full-sync bytes per second, over the last seconds.
    var fullSyncRate = RateMeter()
    /// When a point that is more than crash-consistent is due.
    var nextConsistentPoint: Date?
    /// Proofs up to this epoch are in the catalogue.
    var provenInstance: String?
    var provenThrough = EpochNumber.none
    /// Hash of the copy that it was given.
    var configuration: Int?
    /// In rescue mode: the instance of its disks' source.
    var rescueInstance: String?
    /// Its disks have been followed since this epoch of `rescueInstance` was acknowledged.
    var followedSince: EpochNumber?
    /// Disks of its host that it was told to follow, too, by identity.
    var addedDisks: Set<String> = []
}

/// That an agent is being told what it is to do.
struct AgentOrders {
    var isTold = false
    /// Something has changed since.
    var isOutdated = false
    var restarts = false
}

/// Bytes per second over a sliding window.
struct RateMeter: Sendable {
    private var samples: [(time: ContinuousClock.Instant, bytes: UInt64)] = []
    private static let window: Duration = .seconds(5)

    mutating func note(_ bytes: UInt64, at time: ContinuousClock.Instant = .now) {
        if let last = samples.last, bytes < last.bytes { samples.removeAll() }
        samples.append((time, bytes))
        while samples.count > 2, time - samples[0].time > Self.window { samples.removeFirst() }
    }

    var bytesPerSecond: UInt64 {
        guard let first = samples.first, let last = samples.last, last.time > first.time else { return 0 }
        return UInt64(Double(last.bytes - first.bytes) / ((last.time - first.time) / .seconds(1)))
    }
}

/// Runs what blocks (file systems, joins of threads) away from the threads that run async code.
func blocking<T: Sendable>(_ body: @escaping @Sendable () throws -> T) async throws -> T {
    try await NIOThreadPool.singleton.runIfActive(body)
}

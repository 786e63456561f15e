/// States of a protected server, by the document's names (`rawValue`, shown to people and used in the API).
public enum ServerState: String, Sendable, Codable, CaseIterable {
    // Set-up
    case agentInstalling = "Agent Installing"
    case initialized = "Initialized"
    case abnormal = "Abnormal"
    // Forward
    case enableReplicating = "Enable Replicating"
    case initialFullSync = "Initial Full Sync"
    case replicating = "Replicating"
    case replicationInterrupted = "Replication Interrupted"
    // Drill: beside the main state, in a place of its own
    case testFailoverInProgress = "Test Failover In Progress"
    case testFailoverReady = "Test Failover Ready"
    case clearTestFailoverEnvironment = "Clear Test Failover Environment"
    // Failover
    case failoverInProgress = "Failover In Progress"
    case failedOver = "Failed Over"
    case failoverCommitted = "Failover Committed"
    // Reverse
    case reversedRegistering = "Reversed Registering"
    case reversedInitialized = "Reversed Initialized"
    case reversedEnableReplicating = "Reversed Enable Replicating"
    case reversedFullSync = "Reversed Full/Delta Sync"
    case reversedReplicating = "Reversed Replicating"
    // Failback
    case failbackInProgress = "Failback In Progress"
    case failedBack = "Failed Back"
    case registration = "Registration"

    public enum Phase: String, Sendable, Codable, CaseIterable {
        case setUp = "set-up"
        case forward, drill, failover, reverse, failback
    }

    public var phase: Phase {
        switch self {
        case .agentInstalling, .initialized, .abnormal: .setUp
        case .enableReplicating, .initialFullSync, .replicating, .replicationInterrupted: .forward
        case .testFailoverInProgress, .testFailoverReady, .clearTestFailoverEnvironment: .drill
        case .failoverInProgress, .failedOver, .failoverCommitted: .failover
        case .reversedRegistering, .reversedInitialized, .reversedEnableReplicating, .reversedFullSync, .reversedReplicating: .reverse
        case .failbackInProgress, .failedBack, .registration: .failback
        }
    }
}

/// What moves a server between states: an operator's operation, or something that happened.
public enum Trigger: String, Sendable, Codable, CaseIterable {
    // Operations
    case renewEnrolment = "Renew Enrolment"
    case startReplication = "Start Replication"
    case stopReplication = "Stop Replication"
    case pauseReplication = "Pause Replication"
    case restartServer = "Restart Server"
    case drill = "Disaster Recovery Drill"
    case clearDrill = "Clear Test Failover Environment"
    case failover = "Failover"
    case changeRecoveryPoint = "Change Recovery Point"
    case commitFailover = "Commit Failover"
    case startMachine = "Start Machine"
    case stopMachine = "Stop Machine"
    case unregister = "Unregister"
    case createRecoveryPoint = "Create Recovery Point"
    case exportRecoveryPoint = "Export Recovery Point"
    case hydrateMachine = "Hydrate Machine"
    case promoteMachine = "Promote Machine"
    case reversedRegister = "Reversed Register"
    case startReverse = "Initiate Reverse Replication"
    case stopReverse = "Stop Reverse Replication"
    case failback = "Failback"
    case cancelFailback = "Cancel Failback"
    case registration = "Registration"
    /// Of several servers, each of whose steps is an operation of its own: the table does not know it.
    case recoveryPlan = "Recovery Plan"
    // Happenings
    case agentConnected = "agent connected"
    case agentUnfit = "agent unfit"
    case fullSyncStarted = "full sync started"
    case pointsFollow = "recovery points follow"
    case linkLost = "link lost"
    case drillReady = "drill ready"
    case drillFailed = "drill failed"
    case drillCleared = "drill cleared"
    case failoverReady = "failover ready"
    case failoverFailed = "failover failed"
    case rescueConnected = "original disks there"
    case rescueUnfit = "original disks unfit"
    case reverseSyncStarted = "reverse sync started"
    case reverseFollows = "reverse cuts follow"
    case failbackReady = "failback ready"
    case failbackFailed = "failback failed"
    case failedOverElsewhere = "failed over elsewhere"

    public var isOperation: Bool { Trigger.operations.contains(self) }

    public static let operations: [Trigger] = [
        .renewEnrolment, .startReplication, .stopReplication, .pauseReplication, .restartServer, .drill, .clearDrill, .failover, .changeRecoveryPoint,
        .commitFailover, .startMachine, .stopMachine, .createRecoveryPoint, .exportRecoveryPoint, .hydrateMachine, .promoteMachine, .reversedRegister, .startReverse, .stopReverse, .failback,
        .cancelFailback, .registration, .unregister,
    ]
    public static let happenings: [Trigger] = allCases.filter { !$0.isOperation && $0 != .recoveryPlan }
}

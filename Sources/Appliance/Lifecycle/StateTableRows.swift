/// The cells of the state table. A cell that is not named answers with the state's own sentence: what is going on, what to do.
extension StateTable {
    static func cell(_ state: ServerState, _ trigger: Trigger) -> StateOutcome {
        if let named = named[state]?[trigger] { return named }
        // Read what is there, and disturb nothing.
        if [.exportRecoveryPoint, .hydrateMachine, .promoteMachine].contains(trigger) { return .stays }
        // What happens outside is never refused: it may simply come too late to mean anything.
        return trigger.isOperation ? .refused(sentence(state, trigger)) : .stays
    }

    private static let named: [ServerState: [Trigger: StateOutcome]] = [
        .agentInstalling: [
            .renewEnrolment: .stays, .unregister: .removes, .agentConnected: .to(.initialized), .agentUnfit: .to(.abnormal),
        ],
        .initialized: [
            .renewEnrolment: .stays, .startReplication: .to(.enableReplicating), .restartServer: .stays, .failover: .toWithPoint(.failoverInProgress),
            .unregister: .removes, .agentUnfit: .to(.abnormal),
        ],
        .abnormal: [
            .renewEnrolment: .stays, .startReplication: .to(.enableReplicating), .stopReplication: .stays, .restartServer: .stays,
            .failover: .toWithPoint(.failoverInProgress), .unregister: .removes, .agentConnected: .to(.initialized),
        ],
        .enableReplicating: [
            .stopReplication: .to(.initialized), .pauseReplication: .to(.replicationInterrupted), .restartServer: .stays,
            .failover: .toWithPoint(.failoverInProgress),
            .fullSyncStarted: .to(.initialFullSync), .pointsFollow: .to(.replicating), .linkLost: .to(.replicationInterrupted),
            .agentUnfit: .to(.abnormal),
        ],
        .initialFullSync: [
            .stopReplication: .to(.initialized), .pauseReplication: .to(.replicationInterrupted), .restartServer: .stays,
            .failover: .toWithPoint(.failoverInProgress),
            .pointsFollow: .to(.replicating), .linkLost: .to(.replicationInterrupted), .agentUnfit: .to(.abnormal),
        ],
        .replicating: [
            .stopReplication: .to(.initialized), .pauseReplication: .to(.replicationInterrupted), .restartServer: .stays, .createRecoveryPoint: .stays, .drill: .toWithPoint(.testFailoverInProgress),
            .failover: .toWithPoint(.failoverInProgress), .fullSyncStarted: .to(.initialFullSync),
            .linkLost: .to(.replicationInterrupted), .agentUnfit: .to(.abnormal),
        ],
        .replicationInterrupted: [
            .renewEnrolment: .stays, .startReplication: .to(.enableReplicating), .stopReplication: .to(.initialized),
            .pauseReplication: .stays, .restartServer: .stays, .failover: .toWithPoint(.failoverInProgress), .unregister: .removes, .fullSyncStarted: .to(.initialFullSync),
            .pointsFollow: .to(.replicating), .agentUnfit: .to(.abnormal),
        ],

        .testFailoverInProgress: [
            .renewEnrolment: .stays, .startReplication: .stays, .stopReplication: .stays, .pauseReplication: .stays, .restartServer: .stays,
            .clearDrill: .to(.clearTestFailoverEnvironment), .failover: .stays, .changeRecoveryPoint: .stays, .commitFailover: .stays,
            .startMachine: .stays, .stopMachine: .stays, .createRecoveryPoint: .stays, .drillReady: .to(.testFailoverReady), .drillFailed: .stays,
        ],
        .testFailoverReady: [
            .renewEnrolment: .stays, .startReplication: .stays, .stopReplication: .stays, .pauseReplication: .stays, .restartServer: .stays,
            .clearDrill: .to(.clearTestFailoverEnvironment), .failover: .stays, .changeRecoveryPoint: .stays, .commitFailover: .stays,
            .startMachine: .stays, .stopMachine: .stays, .createRecoveryPoint: .stays,
        ],
        .clearTestFailoverEnvironment: [
            .renewEnrolment: .stays, .startReplication: .stays, .stopReplication: .stays, .pauseReplication: .stays, .restartServer: .stays,
            .clearDrill: .stays, .failover: .stays, .changeRecoveryPoint: .stays, .commitFailover: .stays,
            .startMachine: .stays, .stopMachine: .stays, .createRecoveryPoint: .stays, .drillCleared: .endsDrill,
        ],

        .failoverInProgress: [
            .changeRecoveryPoint: .to(.failoverInProgress), .failoverReady: .to(.failedOver),
            .failoverFailed: .to(.replicationInterrupted),
        ],
        .failedOver: [
            .changeRecoveryPoint: .to(.failoverInProgress), .commitFailover: .to(.failoverCommitted), .startMachine: .stays, .stopMachine: .stays,
        ],
        .failoverCommitted: [
            .startMachine: .stays, .stopMachine: .stays, .unregister: .removes, .reversedRegister: .to(.reversedRegistering),
        ],

        .reversedRegistering: [
            .startMachine: .stays, .renewEnrolment: .stays, .reversedRegister: .stays, .stopReverse: .to(.failoverCommitted), .rescueConnected: .to(.reversedInitialized),
        ],
        .reversedInitialized: [
            .startMachine: .stays, .renewEnrolment: .stays, .reversedRegister: .stays, .startReverse: .to(.reversedEnableReplicating), .stopReverse: .to(.failoverCommitted),
            .rescueUnfit: .to(.reversedRegistering),
        ],
        .reversedEnableReplicating: [
            .startMachine: .stays, .stopReverse: .to(.reversedInitialized), .reverseSyncStarted: .to(.reversedFullSync), .reverseFollows: .to(.reversedReplicating),
            .failedOverElsewhere: .to(.failbackInProgress),
        ],
        .reversedFullSync: [
            .startMachine: .stays, .stopReverse: .to(.reversedInitialized), .reverseFollows: .to(.reversedReplicating), .failedOverElsewhere: .to(.failbackInProgress),
        ],
        .reversedReplicating: [
            .startMachine: .stays, .stopReverse: .to(.reversedInitialized), .failback: .to(.failbackInProgress), .reverseSyncStarted: .to(.reversedFullSync),
            .failedOverElsewhere: .to(.failbackInProgress),
        ],
        .failbackInProgress: [
            .cancelFailback: .stays, .failbackReady: .to(.failedBack), .failbackFailed: .to(.reversedReplicating),
        ],
        .failedBack: [
            .registration: .to(.registration), .failover: .toWithPoint(.failoverInProgress), .unregister: .removes,
        ],
        .registration: [
            .registration: .stays, .renewEnrolment: .stays, .failover: .toWithPoint(.failoverInProgress), .unregister: .removes,
            .agentConnected: .to(.initialized), .agentUnfit: .to(.abnormal),
        ],
    ]

    /// Why an operation is not permitted in a state, and what to do instead.
    private static func sentence(_ state: ServerState, _ trigger: Trigger) -> String {
        switch (state.phase, trigger) {
        case (.drill, .drill):
            return "A drill of this server exists already: clear it first (afterimage drill clear)."
        case (.drill, .unregister):
            return "A drill of this server exists: clear it first (afterimage drill clear)."
        case (.setUp, .clearDrill), (.forward, .clearDrill), (.failover, .clearDrill), (.reverse, .clearDrill), (.failback, .clearDrill):
            return "There is no drill of this server to clear."
        case (.setUp, .restartServer):
            return "The agent has not connected yet: run the enrolment command on the server (afterimage server token makes a new one)."
        case (.setUp, .stopReplication), (.failover, .stopReplication), (.failback, .stopReplication), (.setUp, .pauseReplication), (.failover, .pauseReplication),
            (.failback, .pauseReplication):
            return "Replication of this server is not running."
        case (.reverse, .stopReplication), (.reverse, .pauseReplication):
            return "What runs is reverse replication: afterimage reverse stop ends it."
        case (.setUp, .reversedRegister), (.forward, .reversedRegister), (.setUp, .startReverse), (.forward, .startReverse):
            return "The machine of this server does not run here: only what was failed over, and committed, goes back."
        case (.failover, .reversedRegister):
            return "Commit the failover first (afterimage failover commit)."
        case (.failover, .startReverse):
            return state == .failoverCommitted ? "Register the disks, or the appliance, that it is to go back to first (afterimage reverse register)." : "Commit the failover first (afterimage failover commit)."
        case (.reverse, .startReverse) where state == .reversedRegistering:
            return "What it goes back to is not there yet: start the agent with the original disks in rescue mode (afterimage agent rescue), or wait until the other appliance is connected."
        case (.reverse, .startReverse), (.reverse, .reversedRegister):
            return "Reverse replication of this server is running already."
        case (.setUp, .stopReverse), (.forward, .stopReverse), (.failover, .stopReverse), (.failback, .stopReverse):
            return state == .failbackInProgress ? "A failback is in progress: cancel it first (afterimage failback cancel)." : "Reverse replication of this server is not running."
        case (_, .failback) where state != .failbackInProgress:
            return "A failback is possible only in Reversed Replicating; this server is in \(state.rawValue)."
        case (.failback, .failback):
            return "A failback of this server is in progress (afterimage task list)."
        case (_, .cancelFailback):
            return "No failback of this server is in progress."
        case (_, .registration):
            return "Only a server that has Failed Back is registered; this one is in \(state.rawValue)."
        case (.failback, .startReplication) where state != .failbackInProgress:
            return "The source is not registered again yet (afterimage registration)."
        case (.setUp, .changeRecoveryPoint), (.forward, .changeRecoveryPoint), (.setUp, .commitFailover), (.forward, .commitFailover),
            (.setUp, .startMachine), (.forward, .startMachine), (.setUp, .stopMachine), (.forward, .stopMachine):
            return "This server is not failed over: start a failover first (afterimage failover start)."
        case (.setUp, .drill):
            return "A drill needs replication to be running: start it first (afterimage replication start)."
        case (.forward, .drill):
            return "A drill is started only in Replicating; this server is in \(state.rawValue)."
        case (.forward, .startReplication):
            return "Replication of this server is running already."
        case (.forward, .unregister):
            return "Stop replication first (afterimage replication stop)."
        case (_, .renewEnrolment):
            return "The agent of this server is enrolled and in use."
        case (.failover, .startMachine):
            return "The failover has not succeeded: there is no machine to start again."
        case (.failover, .stopMachine):
            return "The failover has not succeeded: choose another point, which ends its machine (afterimage failover change-recovery-point)."
        case (.failover, .commitFailover) where state == .failoverInProgress:
            return "The failover has not succeeded: wait for it, or change the recovery point (afterimage failover change-recovery-point)."
        case (.failover, .failover):
            switch state {
            case .failoverInProgress:
                return "A failover of this server is in progress. If its machine did not pass the boot check, choose another point (afterimage failover change-recovery-point)."
            case .failedOver:
                return "This server is failed over already: change the recovery point (afterimage failover change-recovery-point) or commit (afterimage failover commit)."
            default:
                return "The failover of this server is committed."
            }
        case (.failover, .unregister):
            return "This server is failed over: commit the failover first (afterimage failover commit)."
        case (.failover, .changeRecoveryPoint), (.failover, .commitFailover):
            return "The failover of this server is committed: its recovery point can no longer be changed."
        case (.failover, .startReplication), (.failover, .drill), (.failover, .restartServer):
            return "This server is failed over (\(state.rawValue)): its source is fenced."
        case (_, .createRecoveryPoint):
            return "A recovery point can be made only in Replicating; this server is in \(state.rawValue)."
        case (.reverse, _), (.failback, _):
            return "Not while this server is in \(state.rawValue)."
        case (.setUp, .startReplication):
            return "The agent has not connected yet: run the enrolment command on the server (afterimage server token makes a new one)."
        case (.setUp, .failover):
            return noRecoveryPoint
        default:
            return "Not possible in \(state.rawValue)."
        }
    }
}

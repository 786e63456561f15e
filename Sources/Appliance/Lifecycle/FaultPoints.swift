import Foundation
import Glibc
import Logging
import Synchronization

/// Moments of the operations at which a test has the appliance killed, as `kill -9` would do it: after each step that leaves something behind, and
/// before the next. What `StepCrashTests` does with them is generated from `passed(by:)`; a step that is added to an operation gets
/// a point, and with it a test.
///
/// They cost a look at a constant. None fires unless `AFTERIMAGE_TEST_CRASH_AT` is in the environment and names this very state directory, the operation and the
/// point (`/state/directory:Failover:fenced`); an appliance that is armed so says it when it starts.
enum FaultPoint: String, CaseIterable, Sendable {
    /// The new state and the task are in the catalogue; no work has begun.
    case intentStored
    /// The store has the new generation, the catalogue has not.
    case fenced
    /// Generation and recovery point are settled.
    case generationStored
    case forkMade
    case disksServed
    /// QEMU runs, and nobody has spoken to it.
    case machineSpawned
    case controlUp
    case bootCheckBegun
    /// The machine is ready; the server's state does not say so.
    case readyStored
    /// The server's state is the new one; the task has not ended.
    case stateMoved
    /// A machine is to be taken down.
    case removalStored
    /// QEMU and block server are gone, the fork is there.
    case machineGone
    case forkDropped
    case filesRemoved
    /// The catalogue knows nothing of the machine any more.
    case recordRemoved
    /// The group is the fork; the catalogue does not know the new generation.
    case forkCommitted
    case commitStored
    /// The agent of a server that is being removed is not let in any more.
    case accessRevoked
    case groupDeleted
    case serverRemoved
    /// Of an operation that is no task: it is stored, and whoever asked has no answer.
    case requestStored
    /// A group that was committed has a position again; its recovery point does not say what it is.
    case positionGiven
    /// A group is again what its source was when it was failed over, if that is known.
    case turnedBack
    /// What the original disks hold is a recovery point, which nothing holds yet.
    case originalReceived
    case originalHeld
    /// The catalogue knows that point: from here on the disks may be overwritten.
    case originalStored
    /// The fork is there to be asked for, and the agent has its order.
    case offerMade
    /// A failback's machine is to stop.
    case stopStored
    case machineStopped
    /// The disks hold everything; the catalogue does not say so.
    case lastCutAcknowledged
    case handedOver
    /// The fork is not sent any more; its marks are there.
    case offerEnded
    case marksForgotten
    /// A failback is taken back: its machine runs, and is not ready.
    case machineStartedAgain
    /// A boot check has QEMU forward a port.
    case checkForwarded

    private static let startsMachine: [FaultPoint] = [.forkMade, .disksServed, .machineSpawned, .controlUp, .bootCheckBegun, .readyStored, .stateMoved]
    private static let takesDown: [FaultPoint] = [.removalStored, .machineGone, .forkDropped, .filesRemoved, .recordRemoved]
    /// Of a failover whose machine cannot be started.
    static let rollBack: [FaultPoint] = takesDown.dropLast() + [.stateMoved]

    /// In the order in which the operation passes them.
    static func passed(by operation: Trigger) -> [FaultPoint] {
        switch operation {
        case .failover: [.intentStored, .fenced, .generationStored] + startsMachine
        case .drill: [.intentStored] + startsMachine
        case .changeRecoveryPoint: [.intentStored] + takesDown + startsMachine
        case .clearDrill: [.intentStored] + takesDown + [.stateMoved]
        case .commitFailover: [.intentStored, .forkCommitted, .commitStored]
        case .unregister: [.intentStored, .accessRevoked] + takesDown + [.groupDeleted, .serverRemoved]
        case .hydrateMachine: [.intentStored]
        case .reversedRegister, .registration: [.requestStored]
        case .startReverse: [.intentStored, .positionGiven, .turnedBack, .originalReceived, .originalHeld, .originalStored, .offerMade, .stateMoved]
        case .stopReverse: [.requestStored, .offerEnded, .marksForgotten]
        case .failback:
            [.intentStored, .stopStored, .machineStopped, .lastCutAcknowledged, .handedOver, .offerEnded, .marksForgotten, .forkCommitted, .positionGiven, .stateMoved]
                + takesDown
        case .cancelFailback: [.requestStored, .machineStartedAgain, .readyStored, .stateMoved]
        default: []
        }
    }

    // MARK: Arming

    static let variable = "AFTERIMAGE_TEST_CRASH_AT"

    private struct Armed: Sendable {
        var operation: Trigger
        var point: FaultPoint
    }
    private static let armed = Mutex<Armed?>(nil)

    /// Once, before any work. Throws when the variable is set and does not say what to do.
    static func arm(stateDirectory: String, logger: Logger) throws(ApplianceError) {
        guard let text = ProcessInfo.processInfo.environment[variable], text.hasPrefix(stateDirectory + ":") else { return }
        let words = text.dropFirst(stateDirectory.count + 1).split(separator: ":").map(String.init)
        guard words.count == 2, let operation = Trigger(rawValue: words[0]), let point = FaultPoint(rawValue: words[1]) else {
            throw .invalid("\(variable) is for tests, and is not STATE:OPERATION:POINT: unset it")
        }
        armed.withLock { $0 = Armed(operation: operation, point: point) }
        logger.critical("\(variable) is set: this appliance is under test and kills itself during \(operation.rawValue), at \(point.rawValue)")
    }

    /// Ends the process when it is armed for this. `operation` nil: the caller does not know in which it is.
    func reached(_ operation: Trigger? = nil) {
        guard let armed = FaultPoint.armed.withLock({ $0 }), armed.point == self, operation == nil || operation == armed.operation else { return }
        kill(getpid(), SIGKILL)
        while true { pause() }
    }
}

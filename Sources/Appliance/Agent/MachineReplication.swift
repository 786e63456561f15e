import BlockTap
import Foundation
import Logging
import Replica

/// Whoever has the machine that another appliance asks for: this appliance, which writes down each step before it does it.
protocol MachineKeeper: AnyObject, Sendable {
    /// Asked every half second, while the other appliance is connected.
    func otherAsks(_ server: String, _ status: AgentStatus) async
    /// Shuts the machine down; nil: it is stopped, with everything that it had written. Else why not, and nothing has changed.
    func holdMachine(_ server: String, _ hold: String) async -> String?
    /// A hold has ended without a fence: the machine starts again.
    func releaseMachine(_ server: String, _ hold: String, why: String) async
    /// `hold`: since it began nothing was written. Returns whether the machine is handed over with it.
    func machineFenced(_ server: String, _ generation: Generation, hold: String?) async -> MachineFence
    /// The other appliance follows (again): what it had failed over is rolled back. False: this machine is for nobody to follow any more.
    func machineIsFollowed(_ server: String, _ generation: Generation) async -> Bool
    func otherWantsAnew(_ server: String) async
}

enum MachineFence: Sendable {
    /// The other appliance has everything that the machine had written.
    case handedOver
    /// It was failed over there without the last of it: the machine stands still.
    case stopped
    /// Nothing was begun with the other appliance here: the machine goes on.
    case ignored
    /// A failover there has begun, and fenced nothing yet.
    case notYet
}

/// A recovery machine of this appliance as the source of another appliance, for which this one is the server's agent: its fork is what is sent, and holding
/// its writes means shutting it down. What is sent is the other appliance's order, from the moment on at which an operator here permits it.
///
/// A hold ends by itself as that of an agent does, and the machine starts again; a fence during one is written down before it is confirmed.
actor MachineReplication: CommandedReplication {
    static let tapName = "machine"

    private let server: String
    /// nil: it is handed over, and sent no more.
    private let source: ForkSource?
    private let endpoint: LinkEndpoint
    private let base: ReplicationBase
    private let configurationFile: String
    private let logger: Logger
    private weak var keeper: (any MachineKeeper)?
    private var isPermitted: Bool
    private var sending = OrderedSender()
    /// As the other appliance last asked.
    private var wanted: ReplicationOrder?
    private var hold: WriteHold?
    private var holdEnds = ContinuousClock.now
    private var holding: Task<Void, Never>?
    private var endedHold: String?
    private var endedHoldReason: String?
    private(set) var fence: MachineFence?
    /// The newest generation that it was fenced under by this process.
    private var fencedUnder: Generation?
    private var isOver = false

    init(
        server: String, source: ForkSource?, endpoint: LinkEndpoint, base: ReplicationBase, isPermitted: Bool, hold: WriteHold?, endedHold: String?, fence: MachineFence?,
        configurationFile: String, keeper: any MachineKeeper, logger: Logger
    ) {
        self.server = server
        self.source = source
        self.endpoint = endpoint
        self.base = base
        self.isPermitted = isPermitted
        self.hold = hold
        self.endedHold = endedHold
        self.fence = fence
        self.configurationFile = configurationFile
        self.keeper = keeper
        self.logger = logger
    }

    /// From now on the other appliance's order is carried out.
    func permit() async {
        isPermitted = true
        if let wanted { await follow(wanted) }
    }

    // MARK: Commands

    func carryOut(_ command: AgentCommand) async {
        switch command {
        case .startReplication(let order):
            // One from before a fence comes too late: somebody else's machine may run by now.
            if let fencedUnder, order.generation < fencedUnder { return }
            wanted = order
            await letGo("replication goes on")
            guard await keeper?.machineIsFollowed(server, order.generation) == true else { return }
            fence = nil
            if isPermitted { await follow(order) }
        case .stopReplication:
            wanted = nil
            await letGo("replication stops")
            await stopSending()
        case .fenced(let generation): await fenced(generation)
        case .cutNow: sending.sender?.cutNow()
        case .holdWrites(let order): holdWrites(order)
        case .restart: await keeper?.otherWantsAnew(server)
        case .keepConfiguration(let text):
            do { try KeyFile.write(text, to: configurationFile, mode: 0o600) } catch { logger.error("cannot keep the other appliance's configuration: \(error)") }
        case .keepOriginal, .startReverse, .disksReady, .followDisks: logger.error("the other appliance takes this machine for an agent in rescue mode: nothing is done")
        }
    }

    private func follow(_ order: ReplicationOrder) async {
        guard let source, !isOver else { return }
        if sending.goesOn(order) { return }
        await stopSending()
        guard order.disks == source.disks.map(\.name) else {
            return logger.error("the other appliance asks for disks \(order.disks), this machine has \(source.disks.map(\.name)): not sent")
        }
        logger.notice("the machine is sent to group \(order.group), \(order.generation), of the other appliance")
        sending.begin(order, source: source, endpoint: endpoint, base: base, logger: logger)
    }

    private func stopSending() async {
        await sending.take()?.stop()
    }

    // MARK: Held

    private func holdWrites(_ order: HoldOrder) {
        guard order.id != endedHold, isPermitted, fence == nil, !isOver else { return }
        holdEnds = .now + .seconds(order.seconds)
        guard hold == nil, holding == nil else { return }
        hold = WriteHold(id: order.id)
        // Later commands do not wait for it.
        holding = Task { await self.becomeQuiet(order.id) }
    }

    private func becomeQuiet(_ id: String) async {
        guard let keeper else { return }
        if let refusal = await keeper.holdMachine(server, id) {
            // Long enough for the other appliance to see that it has ended.
            endedHold = id
            endedHoldReason = refusal
            try? await Task.sleep(for: .seconds(1))
            if hold?.id == id { hold = nil }
            holding = nil
            return
        }
        holding = nil
        // It may have been ended before the machine was down, or been fenced.
        guard hold?.id == id else {
            if fence == nil { await keeper.releaseMachine(server, id, why: endedHoldReason ?? "the other appliance let go") }
            return
        }
        hold?.isQuiet = true
        while let hold, hold.id == id, !hold.isFinal, !isOver {
            if ContinuousClock.now >= holdEnds { return await letGo("the other appliance has not repeated it") }
            try? await Task.sleep(for: .milliseconds(100))
        }
    }

    /// Ends a hold that is not final; the machine starts again.
    func letGo(_ why: String) async {
        guard let ended = hold, !ended.isFinal, !isOver else { return }
        // First: nobody is told that it holds when the machine runs.
        hold = nil
        endedHold = ended.id
        endedHoldReason = why
        logger.notice("the machine is held no longer: \(why)")
        if ended.isQuiet { await keeper?.releaseMachine(server, ended.id, why: why) }
    }

    private func fenced(_ generation: Generation) async {
        if fence == .handedOver { return }
        let held = hold.flatMap { $0.isQuiet ? $0.id : nil }
        let outcome = await keeper?.machineFenced(server, generation, hold: held) ?? .notYet
        // A hold goes on until it is fenced or runs out.
        if outcome == .notYet { return await stopSending() }
        fencedUnder = max(fencedUnder ?? generation, generation)
        fence = outcome
        switch outcome {
        case .handedOver: hold = held.map { WriteHold(id: $0, isQuiet: true, isFinal: true) }
        case .stopped:
            if let hold { endedHold = hold.id }
            hold = nil
        case .ignored, .notYet: break
        }
        await stopSending()
    }

    // MARK: Told

    func snapshot() async -> AgentStatus {
        var status = sending.sender?.status ?? AgentStatus()
        if let source { status.source = source.statistics }
        status.hold = hold
        status.endedHold = endedHold
        status.endedHoldReason = endedHoldReason
        if sending.sender == nil {
            (status.phase, status.reason) = idleReason
        }
        return status
    }

    private var idleReason: (ReplicationPhase, String?) {
        switch fence {
        case .handedOver: (.interrupted, "this machine was handed over, and is stopped for good: it is failed over from the newest recovery point, without --graceful")
        case .stopped: (.interrupted, "this machine was fenced by a failover, and is stopped")
        case .ignored, .notYet: (.interrupted, "the server was failed over at the other appliance: register it there and here anew")
        case nil where wanted == nil: (.idle, "the other appliance does not ask for it: afterimage replication start there")
        case nil where !isPermitted: (.interrupted, "reverse replication was not initiated where the machine runs (afterimage reverse start … --to-appliance)")
        case nil: (.idle, nil)
        }
    }

    /// As the control stream asks.
    func status() async -> AgentStatus {
        let status = await snapshot()
        await keeper?.otherAsks(server, status)
        return status
    }

    /// Handed over: nothing is sent, and the source is free; that it is so stays told.
    func stopForGood() async {
        fence = fence ?? .handedOver
        if case .stopped = fence { fence = .handedOver }
        await stopSending()
    }

    /// Nothing is sent any more, and the source is free.
    func end() async {
        isOver = true
        holding?.cancel()
        await holding?.value
        await stopSending()
    }

    /// This process ends: a machine that is held stays down, and the next one decides.
    func shutDown() async { await end() }
}

/// The appliance that a machine goes to: the control stream to it, and what it asks for.
final class OtherAppliance: Sendable {
    let replication: MachineReplication
    let control: AgentControlClient
    let source: ForkSource?
    let fork: ForkID
    let directory: String

    init(replication: MachineReplication, control: AgentControlClient, source: ForkSource?, fork: ForkID, directory: String) {
        self.replication = replication
        self.control = control
        self.source = source
        self.fork = fork
        self.directory = directory
    }
}

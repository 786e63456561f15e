import BlockTap
import Foundation
import Logging
import Replica

/// The disks of an agent in rescue mode: held, so that nobody else uses them, and neither followed nor served.
///
/// They can be read as a source, as they are, for the copy that is kept of them; and they are what reverse replication writes onto. Where the live tap has followed
/// them until now, what it knows is taken over: then only what they wrote since their replica has to be read.
final class RescueDisks: AgentTap {
    static let tapName = "rescue"
    let source: any EpochSource
    let base: ReplicationBase
    let hello: AgentHello
    let disks: [(name: String, device: BlockDevice, serial: String?)]
    private let loop: EventLoop
    private let followed: Followed?

    init(configuration: AgentConfiguration, logger: Logger) async throws {
        disks = try configuration.disks.map { disk in
            let device = try BlockDevice.open(path: disk.devicePath, access: .readWrite, exclusive: true, patienceMilliseconds: 5000)
            return (disk.name, device, DiskSerial.of(path: disk.devicePath))
        }
        loop = try EventLoop(name: "rescue")
        followed = await Followed.found(configuration, logger: logger)
        let instance = followed?.tap.instance ?? "rescue-" + UUID().uuidString.lowercased()
        if let followed {
            source = followed.tap
            base = ReplicationBase(resuming: followed.group, instance: instance, from: followed.resumption)
        } else {
            source = await TapGroup(loop: loop, disks: disks.map { ($0.name, $0.device) }, instance: instance)
            base = ReplicationBase()
        }
        var hello = configuration.hello(
            instance: instance,
            disks: disks.map { DiskReport(name: $0.name, devicePath: $0.device.path, geometry: $0.device.geometry, tap: Self.tapName) })
        hello.followedSince = followed?.resumption.acknowledged
        hello.rescue = disks.map { RescueDisk(name: $0.name, serial: $0.serial) }
        self.hello = hello
        for disk in disks {
            logger.notice("disk \(disk.name): \(disk.device.path), \(disk.device.geometry.sizeBytes >> 20) MiB, \(disk.serial.map { "serial \($0)" } ?? "without a serial"), held; nothing is written before an operator confirms it")
        }
    }

    /// What an operator confirms a disk by.
    static func confirmation(serial: String?, path: String) -> String { serial ?? path }

    /// The epoch of `group` that the disks hold, if nobody has changed them since it was acknowledged. Nobody may be sending it.
    func unchangedSince(_ group: GroupID) async -> DurablePosition? {
        guard let epoch = base.acknowledged(of: group) else { return nil }
        if let followed {
            // They are held, but what an earlier process wrote to them, or who does not ask, is in the bitmaps.
            let cut = try? await followed.tap.cut(fuzzyBytesMax: 1, consistency: .crash)
            await followed.tap.abandonAll()
            guard let cut, cut.kind == .exact, cut.blockCount == 0 else { return nil }
        }
        return DurablePosition(instance: source.instance, epoch: epoch, kind: .exact)
    }

    func stop() async {
        followed?.tap.close()
        loop.shutdown()
    }

    /// The live tap of an agent that ran on this machine and has ended.
    private struct Followed {
        var tap: LiveTapGroup
        var group: GroupID
        var resumption: SourceResumption
        /// So that agent does not start meanwhile.
        var state: AgentState

        static func found(_ configuration: AgentConfiguration, logger: Logger) async -> Followed? {
            guard let directory = configuration.followerStateDirectory, AgentState.hasTap(directory), LiveTapGroup.isAvailable else { return nil }
            do {
                let state = try AgentState(directory: directory)
                let tap = try await LiveTapGroup(
                    disks: configuration.disks.map { ($0.name, $0.devicePath) }, pinDirectory: try LiveTaps.pinDirectory(state), configuration: configuration.live, mayAttach: false)
                guard let resumption = tap.resumption, let known = try state.tracked(), known.instance == tap.instance else {
                    tap.close()
                    throw AgentError("what it knows is of no replica")
                }
                logger.notice("the live tap has followed the disks until now: what they wrote since \(resumption.acknowledged) is known")
                return Followed(tap: tap, group: GroupID(known.group), resumption: resumption, state: state)
            } catch {
                logger.notice("what the disks wrote since they were replicated has to be found by comparing them (\(directory): \(error))")
                return nil
            }
        }
    }
}

/// What the appliance's commands amount to in rescue mode: sending what the disks hold, or writing onto them; never both, and never forward replication.
actor RescueReplication: CommandedReplication {
    private let disks: RescueDisks
    private let endpoint: LinkEndpoint
    private let logger: Logger
    private var sender: Sender?
    private var keeping: ReplicationOrder?
    private var receiver: ReverseReceiver?
    private var target: DiskTarget?
    private var order: ReverseOrder?
    private var trouble: String?
    private var hasToldReady = false

    init(disks: RescueDisks, endpoint: LinkEndpoint, logger: Logger) {
        self.disks = disks
        self.endpoint = endpoint
        self.logger = logger
    }

    func carryOut(_ command: AgentCommand) async {
        switch command {
        case .keepOriginal(let order): await keep(order)
        case .startReverse(let order): await reverse(order)
        case .stopReplication:
            if sender != nil || receiver != nil { logger.notice("nothing is sent or written any more") }
            await stop()
        case .disksReady:
            if !hasToldReady { logger.notice("the disks hold everything: end this agent, and start the machine from them") }
            hasToldReady = true
            await stop()
        case .startReplication: logger.error("this agent is in rescue mode: its disks are not replicated (afterimage agent run does that)")
        case .fenced(let generation):
            logger.warning("fenced: the group is at \(generation)")
            await stop()
        case .restart, .keepConfiguration, .followDisks, .cutNow, .holdWrites: break
        }
    }

    private func keep(_ order: ReplicationOrder) async {
        if order == keeping, let sender, sender.status.phase != .fenced { return sender.start() }
        await stop()
        guard order.disks == disks.disks.map(\.name) else { return refuse("the appliance asks for disks \(order.disks), this agent has \(disks.disks.map(\.name))") }
        logger.notice("what the disks hold is sent, to be kept as a recovery point")
        let sender = Sender(source: disks.source, endpoint: endpoint, order: order, logger: logger, base: disks.base)
        self.sender = sender
        keeping = order
        sender.start()
    }

    private func reverse(_ order: ReverseOrder) async {
        if order == self.order, let receiver, receiver.status.phase != .failed { return receiver.start() }
        await stop()
        guard order.disks.map(\.name) == disks.disks.map(\.name) else { return refuse("disks \(order.disks.map(\.name)) are sent back, this agent has \(disks.disks.map(\.name))") }
        for (disk, confirmed) in zip(disks.disks, order.confirmed) {
            let known = RescueDisks.confirmation(serial: disk.serial, path: disk.device.path)
            guard known == confirmed else { return refuse("disk \(disk.name) is \(known), but \(confirmed) was confirmed: it is not overwritten") }
        }
        guard order.confirmed.count == disks.disks.count else { return refuse("not every disk was confirmed") }
        let original = await disks.unchangedSince(order.group)
        do {
            let target = try DiskTarget(disks: zip(order.disks, disks.disks).map { .init(spec: $0, device: $1.device) })
            let receiver = ReverseReceiver(
                endpoint: endpoint, group: order.group, generation: order.generation, specs: order.disks, target: target, original: original, logger: logger)
            (self.target, self.receiver, self.order) = (target, receiver, order)
            (trouble, hasToldReady) = (nil, false)
            // A copy of them that is kept later has to find what is written from here on.
            disks.base.forget()
            logger.notice("the disks are overwritten with what runs at the appliance, under \(order.generation)")
            receiver.start()
        } catch { refuse("\(error)") }
    }

    private func refuse(_ why: String) {
        trouble = why
        logger.error("\(why)")
    }

    func status() async -> AgentStatus {
        var status = receiver?.status ?? sender?.status ?? AgentStatus()
        if let trouble {
            status.phase = .failed
            status.reason = trouble
        }
        return status
    }

    func shutDown() async { await stop() }

    private func stop() async {
        await sender?.stop()
        await receiver?.stop()
        target?.close()
        (sender, keeping, receiver, target, order, trouble) = (nil, nil, nil, nil, nil, nil)
    }
}

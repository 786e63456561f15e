import BlockTap
import Dispatch
import Foundation
import Logging
import Replica
import Synchronization

/// The agent's disks, followed by the live tap where they are. What the kernel's half knows outlives this process: the next one goes on from
/// there, if it is for the same disks.
final class LiveTaps: AgentTap {
    var source: any EpochSource { scripted }
    private let scripted: ScriptedSource
    let base: ReplicationBase
    let hello: AgentHello
    private let group: LiveTapGroup
    private let host: HostDisks
    private let mayFreeze: Bool
    private static let secondsBetweenLooks = 5
    private let state: AgentState
    private let logger: Logger
    static let bpffs = "/sys/fs/bpf"

    init(configuration: AgentConfiguration, state: AgentState, logger: Logger) async throws {
        self.state = state
        self.logger = logger
        guard LiveTapGroup.isAvailable else {
            throw AgentError(
                "the live tap needs a kernel that describes its types (/sys/kernel/btf/vmlinux) and a build with its program: use --tap nbd, or another kernel")
        }
        try LiveTapGroup.bpffs(at: Self.bpffs)
        do {
            let test = try await LiveTapGroup.selfTest(bpffs: Self.bpffs)
            logger.info("live tap: tried on this kernel: \(test)")
        } catch {
            throw AgentError("\(error)")
        }
        let pins = try Self.pinDirectory(state)
        // Off the tap's thread, which may be holding a file system still that the log is on.
        let logQueue = DispatchQueue(label: "tap-log")
        group = try await LiveTapGroup(
            disks: configuration.disks.map { (name: $0.name, path: $0.devicePath) }, pinDirectory: pins, configuration: configuration.live
        ) { line in
            logQueue.async { logger.notice("live tap: \(line)") }
        }
        scripted = try await configuration.scripted(group, state, logger: logger)
        let reports = zip(configuration.disks, group.disks).map { asked, disk in
            DiskReport(name: disk.name, devicePath: asked.devicePath, geometry: disk.geometry, tap: AgentConfiguration.TapKind.live.rawValue)
        }
        do {
            try state.rememberSizes(
                reports.map { (name: $0.name, path: $0.devicePath, bytes: $0.geometry.sizeBytes) }, acceptsSmaller: configuration.acceptsSmallerDisks)
        } catch {
            group.close()
            throw error
        }
        if let resumption = group.resumption, let known = try state.tracked(), known.instance == group.instance {
            base = ReplicationBase(resuming: GroupID(known.group), instance: group.instance, from: resumption)
            logger.info("the disks were followed while no agent ran: replication goes on from \(resumption.acknowledged)")
        } else {
            base = ReplicationBase()
        }
        mayFreeze = configuration.live.freezes
        host = HostDisks(followed: configuration.disks.map(\.devicePath), watched: configuration.watchedDevices)
        for report in reports { logger.info("disk \(report.name): \(report.devicePath), \(report.geometry.sizeBytes >> 20) MiB, followed by the live tap") }
        let specification = await HostInspection().specification()
        for warning in specification.warnings { logger.warning("recovery: \(warning)") }
        var hello = configuration.hello(instance: group.instance, disks: reports)
        hello.specification = specification
        self.hello = hello
    }

    func willReplicate(_ group: GroupID) throws { try state.track(AgentState.Tracked(group: group.rawValue, instance: self.group.instance)) }

    var hostDisks: [HostDisk]? { host.disks }

    func live() async -> LiveTapStatistics? { await group.liveStatistics }

    private struct Hold: Sendable {
        /// By whom.
        var id: String
        var hold: LiveHold
        var scripts: ScriptedSource.Pause
    }
    /// Changed while it blocks, on threads that may.
    private final class Held: Sendable {
        let now = Mutex<Hold?>(nil)
    }
    private let held = Held()
    let holdsFileSystems = true
    var canHoldWrites: Bool { mayFreeze }

    func holdWrites(_ id: String) async throws -> [String] {
        guard mayFreeze else { throw AgentError("this agent may not freeze file systems (--no-freeze), and so cannot hold writes") }
        let scripts = try await scripted.pause()
        let freezes = await group.pauseFreezes()
        return try await blocking { [held, group, state] in
            try held.now.withLock { now in
                if let hold = now?.hold {
                    // A later holder takes it over.
                    do { try hold.check() } catch {
                        hold.end()
                        now = nil
                        throw error
                    }
                    now?.id = id
                    return hold.unheld
                }
                try state.setHeld(true)
                do {
                    let hold = try group.hold(freezes)
                    now = Hold(id: id, hold: hold, scripts: scripts)
                    return hold.unheld
                } catch {
                    try? state.setHeld(false)
                    throw error
                }
            }
        }
    }

    func checkHeldWrites(_ id: String, forGood: Bool) async throws {
        try await blocking { [held] in
            try held.now.withLock { now in
                guard let now, now.id == id else { throw AgentError("they are not held any more") }
                try now.hold.check(forGood: forGood)
            }
        }
    }

    func releaseWrites(_ id: String) async {
        // Whoever asks may have been cancelled.
        await Task.detached { [held, state] in
            try? await blocking {
                try held.now.withLock { now in
                    guard now?.id == id else { return }
                    now?.hold.end()
                    now = nil
                    try state.setHeld(false)
                }
            }
        }.value
    }

    func releaseLeftOverWrites() async throws {
        guard state.mayBeHeld else { return }
        try await blocking { [held, group, state, logger] in
            try held.now.withLock { now in
                guard now == nil else { return }
                try group.endLeftOverHold()
                try state.setHeld(false)
                logger.notice("the file systems that an agent before this one had left held are held no longer")
            }
        }
    }

    func untilOutdated() async {
        var second = 0
        repeat {
            if second % Self.secondsBetweenLooks == 0 { try? await blocking { [host] in host.look() } }
            second += 1
            if let words = await group.changedQueues {
                logger.warning("\(words): they are attached anew, and compared with the replica")
                return
            }
            let resizes = await group.resizes
            if resizes.isEmpty { continue }
            for resize in resizes {
                logger.warning(
                    "disk \(resize.disk) had \(resize.fromBytes) bytes and has \(resize.toBytes) now: it is attached anew, and compared with the replica")
            }
            return
        } while (try? await Task.sleep(for: .seconds(1))) != nil
    }

    var mayReopen: Bool { true }

    func stop() async { group.close() }

    /// One per state directory, under a name that the next process finds.
    static func pinDirectory(_ state: AgentState) throws -> String { "\(bpffs)/afterimage-\(try state.tapName())" }

    /// Ends the following of disks by an agent that does not run; what was written from then on is unknown.
    static func detach(_ state: AgentState) throws {
        guard LiveTapGroup.isAvailable else { return }
        LiveTapGroup.detach(pinDirectory: try pinDirectory(state))
        try state.track(nil)
    }
}

/// `afterimage agent detach`.
public enum AgentDetachment {
    /// Nothing is left of the live tap in the kernel. Refused while the agent runs.
    public static func detach(stateDirectory: String) throws {
        try LiveTaps.detach(AgentState(directory: stateDirectory))
    }
}

import BlockTap
import Foundation
import Logging
import Replica

/// The agent's disks behind their taps: one consistency group.
protocol AgentTap: Sendable {
    var source: any EpochSource { get }
    /// What an earlier process of this agent had replicated, if the tap still knows it.
    var base: ReplicationBase { get }
    var hello: AgentHello { get }
    /// Before the first epoch of the source can be acknowledged on this group's behalf.
    func willReplicate(_ group: GroupID) throws
    /// Returns when the disks are not any more what was opened (one has grown), or when cancelled.
    func untilOutdated() async
    /// Figures of a live tap.
    func live() async -> LiveTapStatistics?
    /// Disks of the host that could be followed and are not; nil: nobody looks.
    var hostDisks: [HostDisk]? { get }
    /// Writes of the protected machine wait from now on; returns when all earlier ones are done. Throws in words, with none held. Returns mount points that do not wait.
    func holdWrites(_ id: String) async throws -> [String]
    /// Throws in words when they are not held any more, or not all. Asked all the time; `forGood`: they stay held until they are released, whatever becomes of this process.
    func checkHeldWrites(_ id: String, forGood: Bool) async throws
    func releaseWrites(_ id: String) async
    /// Those that a process before this one has held for good.
    func releaseLeftOverWrites() async throws
    /// Whether held writes are those of all programs of this host to the file systems on these disks, so that this process must not write there either.
    var holdsFileSystems: Bool { get }
    /// Whether it is able and permitted to.
    var canHoldWrites: Bool { get }
    /// Held writes are for nobody any more.
    func refuseHeldWrites(_ id: String) async
    /// Opening the disks again disturbs nobody, and loses no mark.
    var mayReopen: Bool { get }
    func stop() async
}

extension AgentTap {
    func willReplicate(_ group: GroupID) throws {}
    func live() async -> LiveTapStatistics? { nil }
    var hostDisks: [HostDisk]? { nil }
    var mayReopen: Bool { false }
    func holdWrites(_ id: String) async throws -> [String] { throw AgentError("this tap holds no write back") }
    func checkHeldWrites(_ id: String, forGood: Bool) async throws {}
    func releaseWrites(_ id: String) async {}
    func releaseLeftOverWrites() async throws {}
    var holdsFileSystems: Bool { false }
    var canHoldWrites: Bool { false }
    func refuseHeldWrites(_ id: String) async {}
    func untilOutdated() async { try? await Task.sleep(for: .seconds(UInt32.max)) }
}

extension AgentConfiguration {
    func open(_ state: AgentState, logger: Logger) async throws -> any AgentTap {
        guard !disks.isEmpty else { throw AgentError("no disk to protect: give at least one --disk NAME=DEVICE") }
        var names: Set<String> = []
        for disk in disks {
            guard !disk.name.isEmpty, disk.name.allSatisfy({ $0.isASCII && ($0.isLetter || $0.isNumber || $0 == "-" || $0 == "_") }) else {
                throw AgentError("\"\(disk.name)\" is no name for a disk: use letters, digits, - and _")
            }
            guard names.insert(disk.name).inserted else { throw AgentError("two disks are named \(disk.name)") }
        }
        if isRescue { return try await RescueDisks(configuration: self, logger: logger) }
        return switch tapKind {
        case .nbd: try await InlineTaps(configuration: self, state: state, logger: logger)
        case .live: try await LiveTaps(configuration: try withAddedDisks(state, logger: logger), state: state, logger: logger)
        }
    }

    /// With the operator's scripts around cuts that are to be application-consistent.
    func scripted(_ source: any EpochSource, _ state: AgentState, logger: Logger) async throws -> ScriptedSource {
        let scripts = ScriptedSource.Scripts(before: preScript, after: postScript, limitSeconds: scriptSeconds, pendingFile: state.scriptPendingFile)
        let scripted = ScriptedSource(source, scripts, logger: logger)
        await scripted.finishPending()
        return scripted
    }

    func hello(instance: String, disks: [DiskReport]) -> AgentHello {
        var kernel = utsname()
        uname(&kernel)
        return AgentHello(
            agentVersion: afterimageVersion, hostName: ProcessInfo.processInfo.hostName,
            kernel: withUnsafeBytes(of: kernel.release) { String(decoding: $0.prefix { $0 != 0 }, as: UTF8.self) }, instance: instance, disks: disks)
    }
}

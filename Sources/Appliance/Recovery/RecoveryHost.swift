import BlockTap
import Foundation
import Logging
import NIOCore
import Replica

/// The recovery instances of this appliance: for each a fork, a block server and a QEMU.
///
/// QEMU lives in its own session and survives the appliance; its disks are served again on the same socket at the next start, and
/// until then its requests wait (`reconnect-delay`). Every call may be repeated after a crash at any point in it.
actor RecoveryHost {
    struct Started: Sendable {
        var pid: pid_t
        /// nil when a running machine was taken over.
        var accelerator: Accelerator?
    }

    struct Machine {
        var disks: ServedDisks
        var process: QEMUProcess
        var qmp: QMPClient
        var watch: Task<Void, Never>
    }

    let store: ReplicaStore
    let qemu: QEMUConfiguration
    private let runtimeDirectory: String
    private let instancesDirectory: String
    let logger: Logger
    var machines: [String: Machine] = [:]
    /// Being stopped by `stop`, which lets their disks go.
    private var stopping: Set<String> = []
    /// QEMUs that run, with the memory that they were promised.
    private var promised: [String: (process: QEMUProcess, memoryMiB: Int)] = [:]
    /// How those ended that ended by themselves, until they are started again.
    private var endings: [String: String] = [:]
    /// Machines between their start and their boot check's end.
    nonisolated let boots: Gate
    nonisolated let bridges: HostBridges
    private let screenshotsDirectory: String
    private var knownVersion: (modified: Date, version: QEMUVersion)?
    private var onEnded: @Sendable (_ instance: String, _ why: String) async -> Void = { _, _ in }

    init(store: ReplicaStore, qemu: QEMUConfiguration, runtimeDirectory: String, stateDirectory: String, logger: Logger) {
        self.store = store
        self.qemu = qemu
        self.runtimeDirectory = runtimeDirectory
        instancesDirectory = stateDirectory + "/instances"
        screenshotsDirectory = stateDirectory + "/screenshots"
        boots = Gate(limit: max(1, qemu.bootsAtOnce))
        bridges = HostBridges(stateDirectory: stateDirectory, logger: logger)
        self.logger = logger
    }

    func setOnEnded(_ body: @escaping @Sendable (_ instance: String, _ why: String) async -> Void) { onEnded = body }

    nonisolated func consolePath(_ id: String) -> String { "\(instancesDirectory)/\(id)/console.log" }
    nonisolated func nbdSocketPath(_ id: String) -> String { "\(runtimeDirectory)/\(id)/nbd.sock" }
    nonisolated func qmpSocketPath(_ id: String) -> String { "\(runtimeDirectory)/\(id)/qmp.sock" }
    nonisolated func vncSocketPath(_ id: String) -> String { "\(runtimeDirectory)/\(id)/vnc.sock" }
    nonisolated func agentSocketPath(_ id: String) -> String { "\(runtimeDirectory)/\(id)/agent.sock" }
    /// What a task's machine showed when its boot check ended; PNG.
    nonisolated func screenshotPath(task: Int64) -> String { "\(screenshotsDirectory)/task-\(task).png" }
    private nonisolated func firmwareVariablesPath(_ id: String) -> String { "\(instancesDirectory)/\(id)/firmware-variables.fd" }
    nonisolated func agent(_ id: String) -> GuestAgent { GuestAgent(socketPath: agentSocketPath(id)) }
    /// What machines and QEMU wrote, of those that are there: a name and the file.
    func logs() -> [(name: String, path: String)] {
        ((try? FileManager.default.contentsOfDirectory(atPath: instancesDirectory)) ?? []).sorted().flatMap { id in
            [("\(id)/console.log", consolePath(id)), ("\(id)/qemu.log", qemuLogPath(id))].filter { FileManager.default.fileExists(atPath: $0.1) }
        }
    }
    private nonisolated func qemuLogPath(_ id: String) -> String { "\(instancesDirectory)/\(id)/qemu.log" }
    private nonisolated func machineName(_ id: String) -> String { "afterimage-\(id)" }

    /// Throws when this host cannot start machines at all.
    func checkQEMU() async throws {
        do { _ = try await version() } catch { throw ApplianceError.refused("\(error)") }
    }

    /// Asked once for each QEMU that is put there: the question takes as long as a good part of a failover.
    private func version() async throws -> QEMUVersion {
        let modified = try? FileManager.default.attributesOfItem(atPath: qemu.executable)[.modificationDate] as? Date
        if let known = knownVersion, known.modified == modified { return known.version }
        let version = try await QEMUVersion.of(qemu.executable)
        if let modified { knownVersion = (modified, version) }
        return version
    }

    /// Brings fork, disks and QEMU of an instance to life, taking over what is there. With `mayStart` false a missing QEMU is an error.
    func attach(_ instance: InstanceRecord, mayStart: Bool, log: @Sendable (String) async -> Void) async throws -> Started {
        let id = instance.id
        if let machine = machines[id] {
            if machine.process.isAlive { return Started(pid: machine.process.pid) }
            // It has just ended, and its end is not told yet: its disks are wanted again.
            machines[id] = nil
            machine.watch.cancel()
            await machine.qmp.close()
            await machine.disks.stop()
        }
        let running = QEMUProcess.find(name: machineName(id))
        if running == nil && !mayStart { throw ApplianceError.failed("the machine is no longer running") }
        guard let point = instance.point else { throw ApplianceError.failed("machine \(id) has no recovery point") }

        for directory in ["\(runtimeDirectory)/\(id)", "\(instancesDirectory)/\(id)"] {
            try FileManager.default.createDirectory(atPath: directory, withIntermediateDirectories: true, attributes: [.posixPermissions: 0o700])
        }
        let socketPath = nbdSocketPath(id)
        // Not one that is taken over, or started again, when the appliance starts.
        let isNew = instance.step == .planned || instance.step == .starting
        let disks = try await blocking { [store] in
            if !store.hasFork(instance.forkID) {
                try store.fork(instance.forkID, of: GroupID(instance.server), at: point, purpose: instance.kind.rawValue)
            }
            // Its way back needs to know what it has written.
            if instance.kind == .failover, isNew { try store.markBirth(of: instance.forkID) }
            if isNew { FaultPoint.forkMade.reached() }
            return try ServedDisks.fork(instance.forkID, names: instance.volumes, store: store, socketPath: socketPath)
        }
        if isNew { FaultPoint.disksServed.reached() }
        var process = running
        do {
            var accelerator: Accelerator?
            if let running {
                await log("the machine runs already (pid \(running.pid)): taken over")
            } else {
                (process, accelerator) = try await startQEMU(instance, log: log)
            }
            guard let process else { preconditionFailure("a machine is found or started") }
            if isNew { FaultPoint.machineSpawned.reached() }
            let qmp = try await control(process, id: id)
            if isNew { FaultPoint.controlUp.reached() }
            if running != nil { await removeCheckForwards(instance, qmp) }
            machines[id] = Machine(disks: disks, process: process, qmp: qmp, watch: watch(id, process, qmp))
            promised[id] = (process, instance.settings.memoryMiB)
            return Started(pid: process.pid, accelerator: accelerator)
        } catch {
            // Stopped with the appliance: the machine goes on and is found again. Else: none without somebody in charge of it.
            if !Task.isCancelled { await process?.terminate() }
            await disks.stop()
            throw error
        }
    }

    private func startQEMU(_ instance: InstanceRecord, log: @Sendable (String) async -> Void) async throws -> (QEMUProcess, Accelerator) {
        let version = try await version()
        let accelerator: Accelerator = qemu.accelerator == .kvm ? .kvm : .tcg
        switch qemu.accelerator {
        case .kvm: await log("\(version) with KVM")
        case .tcg: await log("\(version) without KVM (TCG): slower than the hardware")
        case .auto:
            let why = access("/dev/kvm", R_OK | W_OK) == 0
                ? "/dev/kvm is there, but that does not prove that guests run under it; where they do, use --accel kvm" : "there is no usable /dev/kvm"
            await log("\(version) without KVM (TCG): \(why)")
        }
        if let warning = version.warning(accelerator) { await log(warning) }
        let id = instance.id
        var command = QEMUCommand(
            name: machineName(id), machine: instance.settings, accelerator: accelerator, dataDirectories: qemu.dataDirectories,
            nbdSocketPath: nbdSocketPath(id), exports: instance.volumes, qmpSocketPath: qmpSocketPath(id), consolePath: consolePath(id),
            vncSocketPath: vncSocketPath(id), agentSocketPath: agentSocketPath(id))
        if instance.settings.firmware == .uefi {
            command.firmware = try FirmwareFiles.find(qemu.firmwareDirectories).withOwnVariables(at: firmwareVariablesPath(id))
        }
        if instance.settings.network == .bridge { command.taps = try await bridges.prepare(instance, log: log) }
        for path in [qmpSocketPath(id), vncSocketPath(id), agentSocketPath(id), consolePath(id)] { unlink(path) }
        // From here to the note of what was promised nothing may come between: two machines would count on the same memory.
        if instance.settings.allowsOvercommit != true { try checkMemory(instance.settings.memoryMiB) }
        let process = try QEMUProcess.spawn(executable: qemu.executable, arguments: command.arguments, logPath: qemuLogPath(id))
        promised[id] = (process, instance.settings.memoryMiB)
        endings[id] = nil
        await log("QEMU started (pid \(process.pid)): \(instance.settings.hardwareText)")
        return (process, accelerator)
    }

    /// QMP, as soon as QEMU listens; QEMU's own words when it ends before that.
    private func control(_ process: QEMUProcess, id: String) async throws -> QMPClient {
        let deadline = ContinuousClock.now + .seconds(20)
        while true {
            do { return try await QMPClient.connect(path: qmpSocketPath(id)) } catch {
                guard process.isAlive else { throw ApplianceError.failed("QEMU ended at once: \(tail(qemuLogPath(id)))") }
                if ContinuousClock.now > deadline { throw error }
            }
            try await Task.sleep(for: .milliseconds(20))
        }
    }

    private func watch(_ id: String, _ process: QEMUProcess, _ qmp: QMPClient) -> Task<Void, Never> {
        Task { [logger] in
            var last = "QEMU ended"
            for await event in qmp.events {
                logger.info("machine \(id): \(event.name)")
                if event.name == "SHUTDOWN", last == "QEMU ended" { last = "the machine was shut down (\(event.data?["reason"]?.string ?? "no reason given"))" }
                if event.name == "GUEST_PANICKED" { last = "the machine's kernel panicked" }
            }
            // The control socket closes when QEMU goes; it takes its process a moment more.
            if Task.isCancelled { return }
            guard await process.waitForEnd(seconds: 10) else {
                logger.error("machine \(id) lives, but closed its control socket")
                return
            }
            await self.ended(id, process, last)
        }
    }

    private func ended(_ id: String, _ process: QEMUProcess, _ why: String) async {
        if stopping.contains(id) { return }
        guard let machine = machines[id], machine.process == process else { return }
        machines[id] = nil
        promised[id] = nil
        endings[id] = why
        await machine.disks.stop()
        await onEnded(id, why)
    }

    /// As `ending`, of one that was ready a moment ago.
    func lastWords(_ id: String) async -> String {
        await machines[id]?.watch.value
        return endings[id] ?? "the machine ended right after it was ready"
    }

    /// Why a machine is gone, once its last words are read.
    func ending(_ id: String, _ machine: Machine) async -> String {
        await machine.watch.value
        return "the machine ended" + (endings[id].map { ": \($0)" } ?? "")
    }

    /// Throws when this host has not the memory for another machine.
    func checkMemory(_ wantedMiB: Int, instead replaced: String? = nil) throws(ApplianceError) {
        guard let memory = HostMemory.now() else { return }
        promised = promised.filter { $0.value.process.isAlive }
        let open = promised.filter { $0.key != replaced }.values.reduce(0) { $0 + max(0, $1.memoryMiB - HostMemory.residentMiB($1.process.pid)) }
        let comesBack = replaced.flatMap { promised[$0] }.map { HostMemory.residentMiB($0.process.pid) } ?? 0
        try memory.check(wantedMiB: wantedMiB, promisedMiB: open - comesBack)
    }

    /// Throws when this host cannot give machines what these settings ask for.
    func check(_ settings: MachineSettings) throws(ApplianceError) {
        if settings.firmware == .uefi { _ = try FirmwareFiles.find(qemu.firmwareDirectories) }
        if let bridge = settings.bridge { try bridges.check(bridge) }
    }

    /// Shuts the machine's system down: by its guest agent when that answers, else by the power button; after `secondsMax` it is ended all the same.
    /// Nobody is told that it ended, since somebody asked for it. Stopped with the appliance, it leaves the machine as it is.
    func shutDown(_ instance: InstanceRecord, secondsMax: Double, log: @Sendable (String) async -> Void) async {
        guard let machine = machines.removeValue(forKey: instance.id) else { return }
        machine.watch.cancel()
        let agent = agent(instance.id)
        if await agent.answers(within: 3), (try? await agent.shutDown(within: 3)) != nil {
            await log("the guest agent was asked to shut the machine down")
        } else {
            _ = try? await machine.qmp.execute("system_powerdown", timeout: .seconds(5))
            await log("no guest agent answers: the machine's power button was pressed")
        }
        let deadline = ContinuousClock.now + .seconds(secondsMax)
        var hasEnded = await machine.process.waitForEnd(seconds: 0.5)
        while !hasEnded, !Task.isCancelled, ContinuousClock.now < deadline { hasEnded = await machine.process.waitForEnd(seconds: 0.5) }
        if hasEnded {
            await log("the machine has shut down")
        } else if !Task.isCancelled {
            await log("WARNING: the machine did not shut down within \(Int(secondsMax)) s: it is ended as by a power cut")
            _ = try? await machine.qmp.execute("quit", timeout: .seconds(2))
            if !(await machine.process.waitForEnd(seconds: 2)) { await machine.process.terminate() }
        }
        await machine.qmp.close()
        await machine.disks.stop()
        promised[instance.id] = nil
    }

    /// The console's last lines, as people read them.
    nonisolated func consoleTail(_ id: String) -> String? {
        guard let file = FileHandle(forReadingAtPath: consolePath(id)), let size = try? file.seekToEnd() else { return nil }
        defer { try? file.close() }
        try? file.seek(toOffset: size > 4096 ? size - 4096 : 0)
        guard let data = try? file.readToEnd() else { return nil }
        return data.split(separator: UInt8(ascii: "\n")).suffix(20).map { SerialFollower.plain(Data($0)) }.joined(separator: "\n")
    }

    func isRunning(_ id: String) -> Bool { machines[id]?.process.isAlive ?? false }

    /// Ends QEMU, the block server, the fork and the instance's files.
    func takeDown(_ instance: InstanceRecord) async throws {
        let id = instance.id
        if let machine = machines.removeValue(forKey: id) {
            machine.watch.cancel()
            _ = try? await machine.qmp.execute("quit", timeout: .seconds(2))
            await machine.qmp.close()
            if !(await machine.process.waitForEnd(seconds: 2)) { await machine.process.terminate() }
            await machine.disks.stop()
        }
        await QEMUProcess.find(name: machineName(id))?.terminate()
        promised[id] = nil
        endings[id] = nil
        try await bridges.release(instance)
        FaultPoint.machineGone.reached()
        try await blocking { [store] in
            try store.forgetBirth(of: instance.forkID)
            if store.hasFork(instance.forkID) { try store.dropFork(instance.forkID) }
        }
        FaultPoint.forkDropped.reached()
        for directory in ["\(runtimeDirectory)/\(id)", "\(instancesDirectory)/\(id)"] {
            try? FileManager.default.removeItem(atPath: directory)
        }
        FaultPoint.filesRemoved.reached()
    }

    /// Stops a machine and lets its disks go, everything that reached them flushed; its fork stays. With `asksSeconds` the guest is asked to shut
    /// down, and goes on when it does not within that time: false. A machine that does not run is stopped already.
    func stop(_ id: String, asksSeconds: Double?) async throws -> Bool {
        guard let machine = machines[id] else {
            guard let process = QEMUProcess.find(name: machineName(id)) else { return true }
            guard asksSeconds == nil else { throw ApplianceError.failed("machine \(id) runs, but cannot be asked to shut down") }
            await process.terminate()
            return true
        }
        stopping.insert(id)
        defer { stopping.remove(id) }
        if let asksSeconds {
            _ = try await machine.qmp.execute("system_powerdown")
            let deadline = ContinuousClock.now + .seconds(asksSeconds)
            while !(await machine.process.waitForEnd(seconds: 0.5)) {
                try Task.checkCancellation()
                if ContinuousClock.now >= deadline { return false }
            }
        } else {
            _ = try? await machine.qmp.execute("quit", timeout: .seconds(2))
            if !(await machine.process.waitForEnd(seconds: 2)) { await machine.process.terminate() }
        }
        machine.watch.cancel()
        await machine.qmp.close()
        await machine.disks.stop()
        machines[id] = nil
        return true
    }

    /// Lets go of all machines; their QEMUs go on and wait for their disks.
    func detachAll() async {
        let all = machines
        machines.removeAll()
        for machine in all.values {
            machine.watch.cancel()
            await machine.qmp.close()
            await machine.disks.stop()
        }
    }

    /// The machine's screen as it is now, for people; what is wrong with it is no reason to fail.
    func keepScreenshot(_ id: String, task: Int64) async throws {
        guard let machine = machines[id], machine.process.isAlive else { throw ApplianceError.failed("the machine has ended") }
        try FileManager.default.createDirectory(atPath: screenshotsDirectory, withIntermediateDirectories: true, attributes: [.posixPermissions: 0o700])
        // QEMU writes it; under its own name it is whole or not there.
        let part = "\(instancesDirectory)/\(id)/screen.png"
        _ = try await machine.qmp.execute("screendump", arguments: ["filename": .string(part), "format": .string("png")], timeout: .seconds(20))
        guard rename(part, screenshotPath(task: task)) == 0 else { throw ApplianceError.failed("cannot keep \(part): \(SystemError.text(of: errno))") }
    }

    /// Says what the catalogue does not know. A crash leaves nothing of the kind (records are made first and go last), so it comes
    /// from another catalogue, perhaps an older copy: it may be somebody's running machine and is left alone.
    func reportUnknown(known: Set<String>) {
        for fork in store.forks() where !known.contains(fork.id.rawValue) && !fork.isMark {
            logger.warning("the store has a fork \(fork.id) of \(fork.group) that the catalogue does not know; it is left alone")
        }
        for id in (try? FileManager.default.contentsOfDirectory(atPath: instancesDirectory)) ?? [] where !known.contains(id) {
            logger.warning("\(instancesDirectory)/\(id) belongs to a machine that the catalogue does not know; it is left alone")
        }
    }

    private func tail(_ path: String) -> String {
        guard let data = FileManager.default.contents(atPath: path) else { return "no output" }
        return String(decoding: data.suffix(2000), as: UTF8.self).trimmingCharacters(in: .whitespacesAndNewlines)
    }
}

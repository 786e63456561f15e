import BlockTap
import Foundation
import GRDB
import Replica

/// Reverse replication into another appliance's store, and the machine's way there.
///
/// To the other appliance this one is a server's agent: it enrols with a token of there, and sends the running fork as an agent sends its disks
/// (`MachineReplication`). So all that can be done with a server can be done there, and the way back is its graceful failover, with a machine made as it is
/// asked for there (`Lifecycle+HandOver.swift`).
extension Lifecycle {
    // MARK: Register

    public func registerAppliance(_ name: String, _ request: RegisterReverse, who: String) async throws -> ServerView {
        let found = try await server(name)
        if case .refused(let why) = StateTable.verdict(found.lifecycle, .reversedRegister, hasRecoveryPoint: true) { throw ApplianceError.refused(why) }
        let token = try EnrolmentToken(text: request.token)
        guard token.caFingerprint != authority.fingerprint else {
            throw ApplianceError.refused("This token is of this appliance itself: \(found.name) goes back by that of another one (there: afterimage server add, or afterimage server token).")
        }
        let directory = Names.unique("to-" + found.id)
        let path = otherDirectory(directory)
        let outcome: AgentEnrolment.Outcome
        do { outcome = try await AgentEnrolment.enroll(token: request.token, stateDirectory: path) } catch {
            try? FileManager.default.removeItem(atPath: path)
            throw ApplianceError.refused("\(found.name) cannot be registered there: \(error)")
        }
        let appliance = ReverseAppliance(url: token.url, serverName: outcome.serverName, group: outcome.server.rawValue, directory: directory)
        let reverse: ReverseRecord
        do {
            reverse = try await catalogue.write { db in
                var record = try db.server(found.id)
                guard let machine = try db.instances(of: record, kind: .failover).last else {
                    throw ApplianceError.refused("The failed-over machine of \(record.name) is gone: there is nothing to go back with.")
                }
                let reverse = ReverseRecord(
                    server: record.id, instance: machine.id, source: Names.unique("reverse"), step: .registered, keepsOriginal: false, disks: [], confirmed: [],
                    throttleBytesPerSecond: 0, created: Date(), appliance: appliance)
                try reverse.upsert(db)
                try db.apply(.reversedRegister, to: &record, who: who, hasRecoveryPoint: true, detail: "the appliance at \(appliance.url), as \(appliance.serverName)")
                try db.apply(.rescueUnfit, to: &record, who: who, hasRecoveryPoint: true)
                return reverse
            }
        } catch {
            try? FileManager.default.removeItem(atPath: path)
            throw error
        }
        await leaveOther(found.id, forgets: true)
        // Of an agent in rescue mode that was registered before.
        await link?.disconnect(found.serverID)
        try await joinOther(reverse)
        return try await view(found.id)
    }

    private func otherDirectory(_ name: String) -> String { settings.stateDirectory + "/reverse/" + name }

    /// The control stream to the other appliance, whatever is begun there.
    func joinOther(_ reverse: ReverseRecord) async throws {
        guard others[reverse.server] == nil, let appliance = reverse.appliance, !isStopping else { return }
        let path = otherDirectory(appliance.directory)
        guard let enrolment = try AgentState.enrolment(path) else { throw ApplianceError.failed("\(path) has lost the enrolment with the appliance at \(appliance.url)") }
        let fork = ForkID(reverse.instance)
        let (store, logger) = (store, logger)
        let source = reverse.step == .handedOver ? nil : try await blocking { try ForkSource(store: store, fork: fork, instance: reverse.source, logger: logger) }
        let group = GroupID(appliance.group)
        let base = source?.resumption.map { ReplicationBase(resuming: group, instance: reverse.source, from: $0) } ?? ReplicationBase()
        let fence: MachineFence? = reverse.step == .fenced ? .stopped : reverse.step == .handedOver ? .handedOver : nil
        var hold: WriteHold?
        if reverse.step == .handedOver, let id = reverse.hold { hold = WriteHold(id: id, isQuiet: true, isFinal: true) }
        let replication = MachineReplication(
            server: reverse.server, source: source, endpoint: enrolment.endpoint, base: base, isPermitted: reverse.step != .registered, hold: hold, endedHold: reverse.hold, fence: fence,
            configurationFile: AgentState.configurationFile(path), keeper: self, logger: logger)
        let hello = try await machineHello(reverse)
        let control = AgentControlClient(
            endpoint: enrolment.endpoint, hello: { hello }, status: { await replication.status() }, onCommand: { await replication.carryOut($0) }, logger: logger)
        guard others[reverse.server] == nil, !isStopping else {
            source?.close()
            return
        }
        others[reverse.server] = OtherAppliance(replication: replication, control: control, source: source, fork: fork, directory: path)
        otherContacts[reverse.server] = OtherContact()
        control.start()
        watchOther(reverse.server)
    }

    /// `forgets`: what was acknowledged there, too.
    func leaveOther(_ server: String, forgets: Bool, keepsEnrolment: Bool = false) async {
        guard let other = others.removeValue(forKey: server) else { return }
        otherContacts[server] = nil
        otherWatches.removeValue(forKey: server)?.cancel()
        await otherEndings.removeValue(forKey: server)?.value
        await other.control.stop()
        await other.replication.end()
        do {
            try await blocking { [store] in
                other.source?.close()
                if forgets { try ForkSource.forget(other.fork, in: store) }
            }
        } catch { logger.error("what was sent of machine \(other.fork) cannot be forgotten: \(error)") }
        if !keepsEnrolment { try? FileManager.default.removeItem(atPath: other.directory) }
    }

    /// The appliance stops.
    func leaveOthers() async {
        for server in others.keys { await leaveOther(server, forgets: false, keepsEnrolment: true) }
    }

    /// What the machine says it is: as the other appliance's machine will be made, unless it is asked for otherwise.
    private func machineHello(_ reverse: ReverseRecord) async throws -> AgentHello {
        let (record, machine) = try await catalogue.read { db in (try db.server(reverse.server), try InstanceRecord.fetchOne(db, key: reverse.instance)) }
        let fork = store.forks().first { $0.id.rawValue == reverse.instance }
        let volumes = fork?.volumes ?? store.group(record.group)?.volumes ?? []
        var hello = AgentHello(
            agentVersion: afterimageVersion, hostName: ProcessInfo.processInfo.hostName, kernel: record.specification?.kernel ?? record.kernel ?? "", instance: reverse.source,
            disks: volumes.map { DiskReport(name: $0.name, devicePath: "machine \(reverse.instance)", geometry: $0.geometry, tap: MachineReplication.tapName) })
        if let settings = machine?.settings { hello.specification = Self.specification(of: settings, source: record.specification) }
        return hello
    }

    /// A recovery machine as a protected host; what is known of the original's cards and drivers still holds.
    static func specification(of machine: MachineSettings, source: HostSpecification?) -> HostSpecification {
        let known = source?.networkCards ?? []
        let macs = machine.network == .none ? [] : machine.cards ?? known.map(\.mac)
        let cards = macs.enumerated().map { number, mac -> HostSpecification.NetworkCard in
            var card = known.first { $0.mac.lowercased() == mac.lowercased() } ?? HostSpecification.NetworkCard(name: "eth\(number)", mac: mac, addresses: [])
            if let address = machine.address, address.card == number {
                card.addresses = ["\(address.interface)"]
                card.gateway = address.gateway.map { IPv4Interface.text($0) }
            }
            return card
        }
        return HostSpecification(
            cpus: machine.cpus, memoryMiB: machine.memoryMiB, firmware: machine.firmware == .uefi ? .uefi : .bios, kernel: source?.kernel ?? "", networkCards: cards, warnings: [],
            missingDrivers: source?.missingDrivers)
    }

    // MARK: Initiate Reverse Replication

    func appliancePreview(_ found: ServerRecord, _ appliance: ReverseAppliance) -> OperationPreview {
        OperationPreview(
            server: found.name, operation: .startReverse, deletedPointCount: 0, needsConfirmation: true,
            words: [
                "the appliance at \(appliance.url) may follow the machine from now on, as its server \(appliance.serverName) (there: afterimage replication start \(appliance.serverName))",
                "the machine goes on here; only what differs from what is there travels",
                "a failover there, of \(appliance.serverName), stops the machine here for good: gracefully, without a loss, or at once",
            ])
    }

    func startReverse(_ found: ServerRecord, _ request: StartReverse, to appliance: ReverseAppliance, who: String) async throws -> TaskRecord {
        guard request.toAppliance == true, request.originalMachine != true else {
            throw ApplianceError.invalid("say what it goes back to: \(found.name) is registered with the appliance at \(appliance.url) (--to-appliance)")
        }
        guard request.discardsOriginal == nil else { throw ApplianceError.invalid("another appliance keeps what it has, as recovery points: there is nothing to discard") }
        guard request.throttleBytesPerSecond == nil else {
            throw ApplianceError.invalid("the other appliance says how much may be sent: there, afterimage replication start \(appliance.serverName) --throttle")
        }
        guard request.confirm == [found.name] else {
            throw ApplianceError.refused("From now on a failover at \(appliance.url) stops the machine of \(found.name) here: confirm it by the server's name (--yes \(found.name)).")
        }
        guard let other = others[found.id] else { throw ApplianceError.failed("the appliance at \(appliance.url) is not asked: register it anew (afterimage reverse register \(found.name) --appliance TOKEN)") }
        guard await other.replication.fence == nil else {
            throw ApplianceError.refused("The appliance at \(appliance.url) has failed \(appliance.serverName) over: nothing of the machine here would be taken. It is registered there anew first.")
        }
        let task = try await catalogue.write { db in
            var record = try db.server(found.id)
            try db.updateReverse(of: record.id) { $0.step = .sending }
            try db.apply(.startReverse, to: &record, who: who, hasRecoveryPoint: true, detail: "to the appliance at \(appliance.url), as \(appliance.serverName)")
            return try TaskBoard.plan(.startReverse, server: record, parameters: TaskParameters(instance: try db.reverse(of: record.id).instance), who: who, in: db)
        }
        await other.replication.permit()
        await start(task)
        return task
    }

    /// Repeats itself after a restart.
    func untilFollowed(_ reverse: ReverseRecord, _ appliance: ReverseAppliance, _ task: TaskRecord) async throws -> TaskResult {
        try await joinOther(reverse)
        await tasks.log(task, "the appliance at \(appliance.url) may follow the machine, once it is asked to there: afterimage replication start \(appliance.serverName)")
        while true {
            guard let other = others[reverse.server] else { throw ApplianceError.failed("reverse replication was ended") }
            let status = await other.replication.snapshot()
            if status.phase == .replicating, status.lastRecoveryPointNanoseconds > 0 {
                await happened(.reverseFollows, ServerID(reverse.server))
                var result = TaskResult()
                result.instance = reverse.instance
                result.cutTimeNanoseconds = status.lastRecoveryPointNanoseconds
                result.message = "the other appliance follows what runs here; \(Amount.bytes(status.sentBytes)) were sent, \(Amount.bytes(status.resyncEqualBytes)) were there already"
                return result
            }
            if status.phase == .resync || status.phase == .fullSync {
                await tasks.report(
                    task, TaskProgress(
                        step: ServerState.reversedFullSync.rawValue, doneBytes: status.fullSyncDoneBytes, totalBytes: status.fullSyncTotalBytes,
                        bytesPerSecond: status.sentBytesPerSecond))
            }
            try await Task.sleep(for: .milliseconds(Self.reversePollMilliseconds))
        }
    }

    // MARK: After a restart of the appliance

    func resumeAppliance(_ reverse: ReverseRecord) async throws {
        switch reverse.step {
        case .registered, .keeping, .sending: break
        case .stopping:
            // Whether the other appliance has fenced it is not known: it starts its machine only when this one confirms.
            try await catalogue.write { db in try db.updateReverse(of: reverse.server) { $0.step = .cancelling } }
            await takeBack(reverse.server, reason: "the appliance was restarted in the middle of a move to the other appliance, which is taken back")
        case .cancelling: await takeBack(reverse.server, reason: nil)
        case .fenced: try await stopForGood(reverse.instance)
        case .handedOver: break
        }
        let now = try await catalogue.read { db in try db.reverse(of: reverse.server) }
        try await joinOther(now)
        guard now.step == .handedOver else { return }
        let isDone = try await catalogue.read { db in try InstanceRecord.fetchOne(db, key: now.instance) == nil && db.server(now.server).state != .failbackInProgress }
        if !isDone { endWithOther(reverse.server) }
    }

    // MARK: Shown

    func applianceView(_ reverse: ReverseRecord, _ appliance: ReverseAppliance) async -> ReverseView {
        let status = await others[reverse.server]?.replication.snapshot() ?? AgentStatus()
        return ReverseView(
            step: reverse.step, disks: [], applianceURL: appliance.url, applianceServer: appliance.serverName, isConnected: otherContacts[reverse.server]?.isThere == true,
            phase: status.phase, reason: status.reason, sentBytes: status.sentBytes, comparedBytes: status.resyncComparedBytes, equalBytes: status.resyncEqualBytes,
            behindBytes: status.source.behindBytes &+ status.source.unsyncedBytes,
            lastCutTime: status.lastRecoveryPointNanoseconds == 0 ? nil : Date(nanoseconds: status.lastRecoveryPointNanoseconds), originalPoint: nil)
    }
}

/// When the other appliance was heard of.
struct OtherContact: Sendable {
    var last: ContinuousClock.Instant?
    var fenced: ContinuousClock.Instant?
    /// Twice a second while it is connected.
    var askedSinceFence = 0

    var isThere: Bool { last.map { ContinuousClock.now - $0 < .seconds(Lifecycle.otherSilentSeconds) } ?? false }
}

extension ReverseView {
    /// What an operator would do next; nil: as for the original disks.
    func next(_ name: String, _ state: ServerState, machine: InstanceView?) -> String? {
        guard let url = applianceURL, let there = applianceServer else { return nil }
        switch state {
        case .reversedRegistering: return "wait until the appliance at \(url) is connected"
        case .reversedInitialized: return "afterimage reverse start \(name) --to-appliance, and afterimage replication start \(there) at \(url)"
        case .reversedEnableReplicating: return "at \(url): afterimage replication start \(there)"
        case .reversedFullSync: return "wait: the other appliance is brought up to what runs here"
        case .reversedReplicating where machine?.step == .stopped: return "its machine has stopped: afterimage failover start-machine \(name); or, at \(url), afterimage failover start \(there) --graceful"
        case .reversedReplicating: return "at \(url), when it is time to go back: afterimage failover start \(there) --graceful"
        case .failbackInProgress: return step == .fenced ? "wait: it stays stopped unless the failover at \(url) is rolled back" : "wait; until \(url) has it, afterimage failback cancel \(name) takes it back"
        case .failedBack: return "it runs at \(url); to protect it here: afterimage registration \(name), and there afterimage reverse register \(there) --appliance TOKEN"
        default: return nil
        }
    }
}

import BlockTap
import Foundation
import GRDB
import Replica

/// Failback, its cancelling, and Registration.
///
/// Order of a failback: the disks' agent is there and follows → the machine here is stopped → a cut that is made after that is acknowledged: the disks are
/// synced, and hold it completely → *handed over*, durably: from here on the machine never starts here again, whatever happens → nothing more is offered →
/// the group becomes what was handed over, under a new generation, with a recovery point of it → Failed Back → machine and fork go. Up to the handing over
/// everything is taken back by starting the machine again; it loses nothing, since its fork is never written by anybody else. So there is no moment
/// at which both sides may run.
extension Lifecycle {
    /// How long a guest may take to shut down.
    static let shutDownSeconds = 180.0
    static let lastCutSeconds = 600.0
    private static let finishAgainSeconds = 5.0

    public func failbackPreview(_ name: String, forced: Bool) async throws -> OperationPreview {
        let found = try await server(name)
        if case .refused(let why) = StateTable.verdict(found.lifecycle, .failback, hasRecoveryPoint: true) { throw ApplianceError.refused(why) }
        try await refuseFailbackToAppliance(found)
        let reverse = try await catalogue.read { db in try db.reverse(of: found.id) }
        var words = [
            forced
                ? "the machine here is stopped at once: what its guest had only in memory is lost, what it had written is not"
                : "the machine here is asked to shut down; if it does not within \(Int(Self.shutDownSeconds)) s it goes on, and so does reverse replication"
        ]
        words.append("everything it has written is brought onto \(reverse.disks.map(\.devicePath).joined(separator: ", ")), and the disks are ready to boot the original machine")
        words.append("until then it can be cancelled (afterimage failback cancel \(found.name)): the machine starts here again")
        words.append("after it the machine here, and its fork, are deleted; a recovery point of its last state stays")
        if let point = reverse.originalPoint { words.append("what the disks held before stays as recovery point \(point)") }
        return OperationPreview(server: found.name, operation: .failback, deletedPointCount: 0, needsConfirmation: true, words: words)
    }

    public func startFailback(_ name: String, _ request: StartFailback, who: String) async throws -> TaskRecord {
        let found = try await server(name)
        if case .refused(let why) = StateTable.verdict(found.lifecycle, .failback, hasRecoveryPoint: true) { throw ApplianceError.refused(why) }
        try await refuseFailbackToAppliance(found)
        guard request.confirm == found.name else {
            throw ApplianceError.refused("Failback stops the machine of \(found.name) here: confirm it by the server's name (--yes \(found.name)).")
        }
        try refuseUnlessFollowing(found)
        let task = try await catalogue.write { db in
            var record = try db.server(found.id)
            if let running = try db.runningTask(of: record, [.startMachine]) {
                throw ApplianceError.refused("Task \(running.id ?? 0) starts the machine of \(record.name): wait for it (afterimage task show \(running.id ?? 0)).")
            }
            let reverse = try db.reverse(of: record.id)
            try db.apply(.failback, to: &record, who: who, hasRecoveryPoint: true, detail: request.forced == true ? "forced" : "graceful")
            try db.updateReverse(of: record.id) { $0.step = .stopping }
            var parameters = TaskParameters(instance: reverse.instance)
            parameters.isForced = request.forced
            return try TaskBoard.plan(.failback, server: record, parameters: parameters, who: who, in: db)
        }
        await start(task)
        return task
    }

    /// In between two connections the disks may be in the middle of a cut.
    private func refuseUnlessFollowing(_ server: ServerRecord) throws(ApplianceError) {
        let status = offers[server.id]?.status
        guard status?.phase == .replicating else {
            throw .refused("The disks that \(server.name) goes back to do not follow now\((status?.reason ?? server.reason).map { ": \($0)" } ?? ""): start their agent (afterimage agent rescue), and wait until they do.")
        }
    }

    /// May be repeated from the beginning until the handing over, and from there on.
    func performFailback(_ task: TaskRecord) async throws -> TaskResult {
        guard let id = task.server else { throw ApplianceError.failed("the task has no server") }
        do {
            switch try await catalogue.read({ db in try db.reverse(of: id) }).step {
            case .stopping: try await handOver(ServerID(id), task)
            case .handedOver: break
            // The machine runs here again: nothing of it may go. It was this task's to take over.
            case .registered, .keeping, .sending, .cancelling, .fenced:
                await revive(try await instance(task))
                throw ApplianceError.failed("the failback had failed, and was taken back, when the appliance ended")
            }
        } catch {
            if Task.isCancelled { throw error }
            let reverse = try await catalogue.read { db in try db.reverse(of: id) }
            if reverse.step == .stopping {
                await tasks.log(task, "failed, and is taken back: \(error)")
                try await catalogue.write { db in try db.updateReverse(of: id) { $0.step = .cancelling } }
                await takeBack(id, reason: "the failback failed: \(error)")
            }
            throw error
        }
        // It ends here, whatever comes in between: nobody could take it back.
        var told = ""
        while true {
            do { return try await finishFailback(ServerID(id), task) } catch {
                if Task.isCancelled || isStopping { throw error }
                if "\(error)" != told {
                    told = "\(error)"
                    await tasks.log(task, "not done yet, and tried again: \(told)")
                }
                try await Task.sleep(for: .seconds(Self.finishAgainSeconds))
            }
        }
    }

    private func handOver(_ server: ServerID, _ task: TaskRecord) async throws {
        let reverse = try await catalogue.read { db in try db.reverse(of: server.rawValue) }
        let machine = try await instance(task)
        let offer = try await offer(reverse)
        await tasks.report(task, TaskProgress(step: "stopping the machine"))
        let isForced = task.parameters.isForced == true
        if !isForced {
            // After a restart it runs without anybody in charge of it, if it runs.
            do { _ = try await machines.attach(machine, mayStart: false, log: { _ in }) } catch { await tasks.log(task, "the machine has stopped already") }
        }
        // Before it stops: that it ends is no surprise.
        try await update(machine.id) {
            $0.step = .stopped
            $0.reason = "a failback is in progress"
            $0.pid = nil
        }
        FaultPoint.stopStored.reached(task.operation)
        guard try await machines.stop(machine.id, asksSeconds: isForced ? nil : Self.shutDownSeconds) else {
            try await update(machine.id) {
                $0.step = .ready
                $0.reason = nil
            }
            throw ApplianceError.failed("the machine did not shut down within \(Int(Self.shutDownSeconds)) s; it goes on (--forced does not ask it)")
        }
        FaultPoint.machineStopped.reached(task.operation)
        let stopped = UInt64(Date().timeIntervalSince1970 * 1e9)
        await tasks.log(task, "the machine is stopped, with everything that it had written")
        await tasks.report(task, TaskProgress(step: "the last cut"))
        let deadline = ContinuousClock.now + .seconds(Self.lastCutSeconds)
        while true {
            let status = offer.status
            if status.phase == .replicating, status.lastRecoveryPointNanoseconds > stopped { break }
            guard ContinuousClock.now < deadline else {
                throw ApplianceError.failed("the last cut was not there within \(Int(Self.lastCutSeconds)) s: \(status.reason ?? status.phase.rawValue)")
            }
            offer.cutNow()
            try await Task.sleep(for: .milliseconds(50))
        }
        FaultPoint.lastCutAcknowledged.reached(task.operation)
        try await catalogue.write { db in
            guard try TaskRecord.fetchOne(db, key: task.id)?.status == .running else { throw CancellationError() }
            try db.updateReverse(of: server.rawValue) { $0.step = .handedOver }
        }
        FaultPoint.handedOver.reached(task.operation)
        await tasks.log(task, "the disks hold everything that the machine had written")
    }

    private func finishFailback(_ server: ServerID, _ task: TaskRecord) async throws -> TaskResult {
        let reverse = try await catalogue.read { db in try db.reverse(of: server.rawValue) }
        let group = GroupID(server.rawValue)
        try await endOffer(server.rawValue, reason: "the failback is done", forgets: true)
        let point = try await becomeHandedOver(reverse, note: "as it was failed back")
        let generation = store.group(group)?.generation
        let machine = try await catalogue.read { db in try InstanceRecord.fetchOne(db, key: reverse.instance) }
        try await catalogue.write { db in
            var record = try db.server(server.rawValue)
            if record.state == .failbackInProgress {
                try db.apply(.failbackReady, to: &record, who: "appliance", hasRecoveryPoint: true, detail: point.map { "recovery point \($0.id)" })
            }
            if var machine = try InstanceRecord.fetchOne(db, key: reverse.instance) {
                machine.step = .removing
                try machine.update(db)
            }
        }
        FaultPoint.stateMoved.reached(task.operation)
        if let machine { try await takeDown(machine, task: task) }
        await tell(server, .disksReady)
        var result = TaskResult()
        result.recoveryPoint = point?.id
        result.cutTimeNanoseconds = point?.cutTimeNanoseconds
        result.generation = generation?.rawValue
        result.message = "failed back: \(reverse.disks.map { "\($0.name) on \($0.devicePath)" }.joined(separator: ", ")) hold everything; end the rescue agent, start the machine from them, then register it (afterimage registration)"
        return result
    }

    /// The group becomes what the machine's fork is. May be repeated; not again once its state is stored: it may be failed over again already, from a point that a
    /// commit would delete.
    func becomeHandedOver(_ reverse: ReverseRecord, note: String) async throws -> RecoveryPoint? {
        let (fork, group) = (ForkID(reverse.instance), GroupID(reverse.server))
        if try await server(reverse.server).state == .failbackInProgress, store.hasFork(fork) {
            try await blocking { [store] in try store.commitFork(fork) }
            FaultPoint.forkCommitted.reached(.failback)
            try await givePosition(group, instance: "failback", note: note, for: .failback)
        }
        return store.recoveryPoints(group).last
    }

    // MARK: Cancel

    /// Until the disks are handed over: the machine starts here again, with all that it had written, and reverse replication goes on.
    public func cancelFailback(_ name: String, who: String) async throws -> ServerView {
        let found = try await server(name)
        let running = try await catalogue.write { db in
            var record = try db.server(found.id)
            try db.apply(.cancelFailback, to: &record, who: who, hasRecoveryPoint: true)
            guard try db.reverse(of: record.id).step != .handedOver else {
                throw ApplianceError.refused("\(record.name) has been handed over: the failback ends by itself. Then it can be failed over again.")
            }
            guard try db.reverse(of: record.id).step != .fenced else {
                throw ApplianceError.refused("\(record.name) was failed over at the other appliance: its machine starts here again only if that is rolled back there.")
            }
            try db.updateReverse(of: record.id) { $0.step = .cancelling }
            let running = try db.runningTask(of: record, [.failback])
            if let running { try TaskBoard.finish(running, error: "cancelled by \(who)", in: db) }
            return running
        }
        FaultPoint.requestStored.reached(.cancelFailback)
        if let running { await tasks.cancel(running) }
        // A machine that is shutting down for another appliance is started again when it has.
        if let other = others[found.id] { await other.replication.letGo("cancelled by \(who)") } else { await takeBack(found.id, reason: nil) }
        return try await view(found.id)
    }

    /// The machine starts here again. May be repeated.
    func takeBack(_ server: String, reason: String?) async {
        var trouble: String?
        do {
            let reverse = try await catalogue.read { db in try db.reverse(of: server) }
            guard reverse.step == .cancelling else { return }
            if let machine = try await catalogue.read({ db in try InstanceRecord.fetchOne(db, key: reverse.instance) }) {
                do {
                    let started = try await machines.attach(machine, mayStart: true, log: { [logger] line in logger.info("\(line)") })
                    FaultPoint.machineStartedAgain.reached(.cancelFailback)
                    try await update(machine.id) {
                        $0.step = .ready
                        $0.reason = nil
                        $0.pid = started.pid
                    }
                    FaultPoint.readyStored.reached(.cancelFailback)
                } catch { trouble = "\(reason.map { $0 + "; " } ?? "")its machine could not be started again: \(error)" }
            }
            let said = trouble ?? reason
            let step = try await catalogue.write { db in
                var record = try db.server(server)
                let step = try db.reverse(of: server).step
                guard step == .cancelling else { return step }
                try db.updateReverse(of: server) { $0.step = .sending }
                try db.apply(.failbackFailed, to: &record, who: "appliance", hasRecoveryPoint: true, reason: said)
                return step
            }
            FaultPoint.stateMoved.reached(.cancelFailback)
            // Fenced while it was started.
            if step == .fenced || step == .handedOver { try await stopForGood(reverse.instance) }
        } catch {
            logger.error("a failback cannot be taken back: \(error)", metadata: ["server": "\(server)"])
        }
    }

    // MARK: After a restart of the appliance

    func resumeReverse() async {
        let records: [ReverseRecord]
        do {
            records = try await catalogue.read { db in try ReverseRecord.fetchAll(db) }
            // A stop that was cut off leaves marks of a fork that is not sent any more.
            let sent = Set(records.filter { [.sending, .stopping, .cancelling, .fenced].contains($0.step) }.map(\.instance))
            try await blocking { [store] in
                for fork in store.forks() where !fork.isMark && !sent.contains(fork.id.rawValue) { try ForkSource.forget(fork.id, in: store) }
            }
        } catch { return logger.error("reverse replication cannot go on: \(error)") }
        for reverse in records {
            do {
                if reverse.appliance != nil {
                    try await resumeAppliance(reverse)
                    continue
                }
                switch reverse.step {
                case .sending, .stopping: _ = try await offer(reverse)
                case .cancelling:
                    _ = try await offer(reverse)
                    await takeBack(reverse.server, reason: nil)
                case .registered, .keeping, .handedOver, .fenced: break
                }
            } catch {
                logger.error("reverse replication cannot go on: \(error)", metadata: ["server": "\(reverse.server)"])
            }
        }
    }

    // MARK: Registration

    /// Protected again in the forward direction: its agent is enrolled anew, and begins with what was handed over.
    public func registration(_ name: String, who: String) async throws -> Enrolment {
        let found = try await server(name)
        var withToken = found
        let enrolment = try issueToken(&withToken)
        let (hash, expires) = (withToken.enrolmentHash, withToken.enrolmentExpires)
        try await catalogue.write { db in
            var record = try db.server(found.id)
            if let running = try db.runningTask(of: record, [.failback]) {
                throw ApplianceError.refused("The failback of \(record.name) has not ended (afterimage task show \(running.id ?? 0)).")
            }
            try db.apply(.registration, to: &record, who: who, hasRecoveryPoint: true)
            record.enrolmentHash = hash
            record.enrolmentExpires = expires
            // Whoever comes with an older one, a rescue agent or what the disks remember of before, is not let in.
            record.certificateSerial = nil
            try record.update(db)
            _ = try ReverseRecord.deleteOne(db, key: record.id)
        }
        FaultPoint.requestStored.reached(.registration)
        await leaveOther(found.id, forgets: false)
        await link?.disconnect(found.serverID)
        return enrolment
    }
}

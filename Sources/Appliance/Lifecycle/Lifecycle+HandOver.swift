import BlockTap
import Foundation
import GRDB
import Replica

/// The machine's way to another appliance, at that appliance's orders: held, fenced, handed over; or let go, and started again.
///
/// The steps here (`ReverseStep`), each written down before it is done:
///
///     registered → sending → stopping → handedOver          held, quiet, fenced: the other appliance has everything
///                     ↑  ↑       │
///                     │  └─ cancelling                       the hold ended without a fence, or was cancelled: the machine starts again
///                     └──────┐   ↑
///                          fenced ──→ handedOver             failed over there without the last writes; final when it was not rolled back for a while
///
/// The machine runs in `sending` only, and is started only on the way from `cancelling`. The other appliance starts its own, after a graceful failover, only when
/// this one has confirmed the fence with the hold unbroken, which is after `handedOver` is durable. So one of both can run, whoever is killed when.
extension Lifecycle: MachineKeeper {
    /// A failover there that has not been rolled back for so long, with the other appliance connected, will not be: its steps until its machine runs are shorter.
    static let fenceSettlesSeconds = 90.0
    /// The same when it is not connected.
    static let fenceSettlesAloneSeconds = 900.0
    static let otherSilentSeconds = 6.0

    // MARK: What the other appliance says

    func otherAsks(_ server: String, _ status: AgentStatus) async {
        guard others[server] != nil else { return }
        otherContacts[server, default: OtherContact()].last = .now
        do {
            let (record, reverse) = try await catalogue.read { db in (try db.server(server), try db.reverse(of: server)) }
            switch reverse.step {
            case .registered:
                if record.state == .reversedRegistering { await happened(.rescueConnected, record.serverID) }
                await noteReverse(record.serverID, nil)
            case .sending:
                switch status.phase {
                case .resync, .fullSync: if record.state == .reversedReplicating || record.state == .reversedEnableReplicating { await happened(.reverseSyncStarted, record.serverID) }
                case .replicating where status.lastRecoveryPointNanoseconds > 0:
                    if record.state == .reversedFullSync || record.state == .reversedEnableReplicating { await happened(.reverseFollows, record.serverID) }
                default: break
                }
                await noteReverse(record.serverID, status.phase == .replicating || status.phase == .resync || status.phase == .fullSync ? nil : status.reason)
            case .fenced:
                let asked = otherContacts[server]?.askedSinceFence ?? 0
                otherContacts[server]?.askedSinceFence = asked + 1
                if Double(asked) / 2 >= Self.fenceSettlesSeconds { endWithOther(server) }
            case .keeping, .stopping, .handedOver, .cancelling: break
            }
        } catch {
            logger.error("cannot store how reverse replication goes: \(error)", metadata: ["server": "\(server)"])
        }
    }

    /// Says so when the other appliance is silent; ends what waits for it in vain.
    func watchOther(_ server: String) {
        let began = ContinuousClock.now
        otherWatches[server] = Task { [weak self] in
            while (try? await Task.sleep(for: .seconds(2))) != nil { await self?.lookAtOther(server, began) }
        }
    }

    private func lookAtOther(_ server: String, _ began: ContinuousClock.Instant) async {
        guard let contact = otherContacts[server], let reverse = try? await catalogue.read({ db in try ReverseRecord.fetchOne(db, key: server) }) else { return }
        if !contact.isThere { await noteReverse(ServerID(server), "the other appliance\(reverse.appliance.map { " at " + $0.url } ?? "") is not connected") }
        switch reverse.step {
        case .fenced where ContinuousClock.now - (contact.fenced ?? began) > .seconds(Self.fenceSettlesAloneSeconds): endWithOther(server)
        // An attempt that failed is repeated.
        case .handedOver: if let record = try? await self.server(server), record.state == .failbackInProgress { endWithOther(server) }
        default: break
        }
    }

    func otherWantsAnew(_ server: String) async {
        // Not in the middle of its own command.
        Task {
            guard let reverse = try? await self.catalogue.read({ db in try ReverseRecord.fetchOne(db, key: server) }), reverse.step == .registered || reverse.step == .sending else { return }
            await self.leaveOther(server, forgets: false, keepsEnrolment: true)
            do { try await self.joinOther(reverse) } catch { self.logger.error("the other appliance cannot be reached anew: \(error)", metadata: ["server": "\(server)"]) }
        }
    }

    // MARK: Held, and let go

    func holdMachine(_ server: String, _ hold: String) async -> String? {
        do {
            let machine = try await catalogue.write { db -> InstanceRecord in
                var record = try db.server(server)
                let reverse = try db.reverse(of: server)
                guard reverse.step == .sending, reverse.hold != hold else { throw ApplianceError.refused("\(record.name) is in the middle of something else.") }
                if let running = try db.runningTask(of: record, [.startMachine]) { throw ApplianceError.refused("Task \(running.id ?? 0) starts the machine of \(record.name).") }
                guard let machine = try InstanceRecord.fetchOne(db, key: reverse.instance) else { throw ApplianceError.refused("The machine of \(record.name) is gone.") }
                let who = "appliance at \(reverse.appliance?.url ?? "")"
                // It would not ask otherwise; what it says of itself may not have come here yet.
                if record.state == .reversedEnableReplicating || record.state == .reversedFullSync { try db.apply(.reverseFollows, to: &record, who: who, hasRecoveryPoint: true) }
                try db.apply(.failback, to: &record, who: who, hasRecoveryPoint: true, reason: "the other appliance takes over: the machine is asked to shut down", detail: "a graceful failover there")
                try db.updateReverse(of: server) {
                    $0.step = .stopping
                    $0.hold = hold
                }
                return machine
            }
            logger.notice("the other appliance takes over: the machine is asked to shut down", metadata: ["server": "\(server)"])
            do {
                // After a restart it runs without anybody in charge of it, if it runs.
                do { _ = try await machines.attach(machine, mayStart: false, log: { _ in }) } catch { logger.info("machine \(machine.id) has stopped already") }
                try await update(machine.id) {
                    $0.step = .stopped
                    $0.reason = "the other appliance takes over"
                    $0.pid = nil
                }
                guard try await machines.stop(machine.id, asksSeconds: Self.shutDownSeconds) else {
                    throw ApplianceError.failed("the machine did not shut down within \(Int(Self.shutDownSeconds)) s; it goes on")
                }
                return nil
            } catch {
                if !Task.isCancelled && !isStopping { await release(server, hold, why: "\(error)") }
                return "\(error)"
            }
        } catch {
            logger.warning("the machine is not held: \(error)", metadata: ["server": "\(server)"])
            return "\(error)"
        }
    }

    func releaseMachine(_ server: String, _ hold: String, why: String) async { await release(server, hold, why: why) }

    func release(_ server: String, _ hold: String, why: String) async {
        if isStopping { return }
        do {
            let isReleased = try await catalogue.write { db in
                let reverse = try db.reverse(of: server)
                guard reverse.hold == hold, reverse.step == .stopping || reverse.step == .cancelling else { return false }
                try db.updateReverse(of: server) { $0.step = .cancelling }
                return true
            }
            guard isReleased else { return }
        } catch {
            return logger.error("a hold cannot be ended: \(error)", metadata: ["server": "\(server)"])
        }
        await takeBack(server, reason: "the move to the other appliance was taken back: \(why)")
    }

    // MARK: Fenced

    func machineFenced(_ server: String, _ generation: Generation, hold: String?) async -> MachineFence {
        do {
            let (fence, instance, running) = try await catalogue.write { db -> (MachineFence, String, [TaskRecord]) in
                var record = try db.server(server)
                var reverse = try db.reverse(of: server)
                let who = "appliance at \(reverse.appliance?.url ?? "")"
                if reverse.step != .handedOver, let known = reverse.generation, generation.rawValue <= UInt64(known) { return (.notYet, reverse.instance, []) }
                switch reverse.step {
                case .handedOver: return (.handedOver, reverse.instance, [])
                case .stopping where hold != nil && reverse.hold == hold:
                    reverse.step = .handedOver
                    try reverse.update(db)
                    try db.event(who, "Source fenced", server: record, detail: "\(generation), with the machine stopped and all it had written there: it never starts here again")
                    return (.handedOver, reverse.instance, [])
                case .registered, .keeping:
                    try db.event(who, "Source fenced", server: record, detail: "\(generation): failed over there from what was there; the machine goes on here")
                    return (.ignored, reverse.instance, [])
                case .fenced: return (.stopped, reverse.instance, [])
                case .sending, .stopping, .cancelling:
                    reverse.step = .fenced
                    // What was held then says nothing of now.
                    reverse.hold = nil
                    try reverse.update(db)
                    let running = try TaskBoard.finishAll([.startReverse, .startMachine, .stopMachine], of: record, error: "the server was failed over at the other appliance", in: db)
                    let reason = "failed over at \(reverse.appliance?.url ?? "the other appliance") without the machine's last writes: it is stopped here, and they are kept as a held recovery point"
                    try db.apply(.failedOverElsewhere, to: &record, who: who, hasRecoveryPoint: true, reason: reason, detail: "\(generation)")
                    record.reason = reason
                    try record.update(db)
                    return (.stopped, reverse.instance, running)
                }
            }
            if case .stopped = fence {
                otherContacts[server]?.askedSinceFence = 0
                if otherContacts[server]?.fenced == nil { otherContacts[server]?.fenced = .now }
                for task in running { await tasks.cancel(task) }
                try await stopForGood(instance)
            }
            if case .handedOver = fence { endWithOther(server) }
            return fence
        } catch {
            logger.error("cannot store that the machine is fenced: \(error)", metadata: ["server": "\(server)"])
            // Not confirmed: the other appliance rolls a graceful failover back, and says any other again.
            return .notYet
        }
    }

    /// As by a power cut: somebody else has taken over.
    func stopForGood(_ machine: String) async throws {
        try await update(machine) {
            $0.step = .stopped
            $0.reason = "the server was failed over at the other appliance"
            $0.pid = nil
        }
        _ = try await machines.stop(machine, asksSeconds: nil)
    }

    /// The other appliance follows: a failover that had fenced the machine is rolled back there.
    func machineIsFollowed(_ server: String, _ generation: Generation) async -> Bool {
        do {
            let step = try await catalogue.write { db -> ReverseStep in
                let step = try db.reverse(of: server).step
                if step != .handedOver { try db.updateReverse(of: server) { $0.generation = Int64(generation.rawValue) } }
                if step == .fenced {
                    let record = try db.server(server)
                    try db.updateReverse(of: server) { $0.step = .cancelling }
                    try db.event("appliance", "Failover elsewhere rolled back", server: record, detail: "the machine starts here again")
                }
                return step
            }
            if step == .fenced {
                otherContacts[server]?.fenced = nil
                await takeBack(server, reason: "the failover at the other appliance was rolled back")
            }
            return step != .handedOver
        } catch {
            logger.error("cannot store that the machine is followed again: \(error)", metadata: ["server": "\(server)"])
            return false
        }
    }

    // MARK: The end

    /// In the background, once at a time: it waits for what the caller may be in the middle of.
    func endWithOther(_ server: String) {
        guard otherEndings[server] == nil, !isStopping else { return }
        otherEndings[server] = Task {
            do { try await self.finishWithOther(server) } catch {
                self.logger.error("what was handed over cannot be put in order here yet: \(error)", metadata: ["server": "\(server)"])
            }
            self.otherEndings[server] = nil
        }
    }

    /// The group becomes what the machine had written last; machine and fork go. May be repeated.
    func finishWithOther(_ server: String) async throws {
        let reverse = try await catalogue.write { db -> ReverseRecord in
            var reverse = try db.reverse(of: server)
            if reverse.step == .fenced {
                reverse.step = .handedOver
                try reverse.update(db)
            }
            return reverse
        }
        guard reverse.step == .handedOver, let appliance = reverse.appliance else { return }
        // What is sent has been acknowledged, or is not taken any more. The control stream stays: it confirms.
        if let other = others[server] {
            await other.replication.stopForGood()
            try await blocking { [store] in
                other.source?.close()
                try ForkSource.forget(ForkID(reverse.instance), in: store)
            }
        }
        try await stopForGood(reverse.instance)
        let isWhole = reverse.hold != nil
        let group = GroupID(server)
        let point = try await becomeHandedOver(reverse, note: isWhole ? "as it was handed over to \(appliance.url)" : "as it was when it was failed over at \(appliance.url)")
        if !isWhole, let point, point.hold == nil {
            let name = "fenced-\(reverse.instance)"
            try await blocking { [store] in try store.holdRecoveryPoint(group, point.id, name: name) }
            try await catalogue.write { db in
                try db.event("appliance", "Hold recovery point", server: try db.server(server), after: name, detail: "\(point.id): what the machine here had written last")
            }
        }
        let machine = try await catalogue.write { db -> InstanceRecord? in
            var record = try db.server(server)
            if record.state == .failbackInProgress {
                let place = "as \(appliance.serverName) at \(appliance.url)"
                try db.apply(
                    .failbackReady, to: &record, who: "appliance", hasRecoveryPoint: true,
                    reason: isWhole
                        ? "it runs \(place), with everything that was written here"
                        : "it was failed over \(place) without the machine's last writes here: they are recovery point \(point?.id.rawValue ?? "-"), held",
                    detail: point.map { "recovery point \($0.id)" })
            }
            guard var machine = try InstanceRecord.fetchOne(db, key: reverse.instance) else { return nil }
            machine.step = .removing
            try machine.update(db)
            return machine
        }
        if let machine { try await takeDown(machine, task: nil) }
    }

    func refuseFailbackToAppliance(_ found: ServerRecord) async throws {
        guard let appliance = try await catalogue.read({ db in try ReverseRecord.fetchOne(db, key: found.id) })?.appliance else { return }
        throw ApplianceError.refused(
            "\(found.name) goes to the appliance at \(appliance.url) by a failover there, with the machine asked for there: afterimage failover start \(appliance.serverName) --graceful [--cpus N --memory MIB --network NETWORK --ip ADDRESS --script FILE].")
    }
}

import BlockTap
import Foundation
import GRDB
import Replica

/// Reversed Register, Initiate Reverse Replication, and their end.
///
/// After a commit the machine runs on its fork here; its old source is fenced and stays so. An agent in rescue mode holds the original disks, enrolled by
/// a certificate of its own. First what they hold is taken into the group as a recovery point, which is held: the group's own layers are those of the
/// commit, so only what differs from them travels. Then the fork is sent, cut by cut (`ForkSource`), onto the disks.
///
/// Forward and reverse orders never meet: the orders are different commands, an agent is in rescue mode or is not, and the link takes a forward stream
/// of such a server only while its original is kept, a reverse stream only while the fork is offered.
extension Lifecycle {
    static let reversePollMilliseconds = 100

    public func reversedRegister(_ name: String, who: String) async throws -> Enrolment {
        let found = try await server(name)
        if case .refused(let why) = StateTable.verdict(found.lifecycle, .reversedRegister, hasRecoveryPoint: true) { throw ApplianceError.refused(why) }
        var withToken = found
        var enrolment = try issueToken(&withToken)
        let (hash, expires) = (withToken.enrolmentHash, withToken.enrolmentExpires)
        try await catalogue.write { db in
            var record = try db.server(found.id)
            guard let machine = try db.instances(of: record, kind: .failover).last else {
                throw ApplianceError.refused("The failed-over machine of \(record.name) is gone: there is nothing to go back with.")
            }
            record.enrolmentHash = hash
            record.enrolmentExpires = expires
            let known = try ReverseRecord.fetchOne(db, key: record.id)
            if record.state == .failoverCommitted || known?.appliance != nil {
                try ReverseRecord(
                    server: record.id, instance: machine.id, source: Names.unique("reverse"), step: .registered, keepsOriginal: true, disks: [], confirmed: [],
                    throttleBytesPerSecond: 0, created: Date()
                ).upsert(db)
            }
            try db.apply(.reversedRegister, to: &record, who: who, hasRecoveryPoint: true)
            if known?.appliance != nil { try db.apply(.rescueUnfit, to: &record, who: who, hasRecoveryPoint: true, reason: "the original disks are awaited instead of the other appliance") }
        }
        FaultPoint.requestStored.reached(.reversedRegister)
        await leaveOther(found.id, forgets: true)
        enrolment.command += " --state DIRECTORY && afterimage agent rescue --state DIRECTORY --disk NAME=DEVICE"
        return enrolment
    }

    /// What Initiate Reverse Replication would overwrite and keep.
    public func reversePreview(_ name: String) async throws -> OperationPreview {
        let found = try await server(name)
        if case .refused(let why) = StateTable.verdict(found.lifecycle, .startReverse, hasRecoveryPoint: true) { throw ApplianceError.refused(why) }
        let reverse = try await catalogue.read { db in try db.reverse(of: found.id) }
        if let appliance = reverse.appliance { return appliancePreview(found, appliance) }
        var words = reverse.disks.map { "disk \($0.name): \($0.devicePath) (\(Amount.bytes($0.sizeBytes))) is overwritten with what runs here; confirmed by \($0.confirmation)" }
        words.append("what these disks hold now is kept first, as a held recovery point; with --discard-original it is lost for good")
        words.append("the machine goes on here; what it writes follows")
        let machine = try await catalogue.read { db in try InstanceRecord.fetchOne(db, key: reverse.instance) }
        let isKnown = machine?.pointPosition.map { isFollowed(ServerID(found.id), since: $0) && store.hasBirth(ForkID(reverse.instance)) } == true
        words.append("only what differs travels; " + (isKnown ? "what the disks wrote since is known from their live tap" : "both sides read everything once"))
        return OperationPreview(server: found.name, operation: .startReverse, deletedPointCount: 0, needsConfirmation: true, words: words)
    }

    public func startReverse(_ name: String, _ request: StartReverse, who: String) async throws -> TaskRecord {
        let found = try await server(name)
        if case .refused(let why) = StateTable.verdict(found.lifecycle, .startReverse, hasRecoveryPoint: true) { throw ApplianceError.refused(why) }
        if let appliance = try await catalogue.read({ db in try db.reverse(of: found.id) }).appliance {
            return try await startReverse(found, request, to: appliance, who: who)
        }
        guard request.toAppliance != true else { throw ApplianceError.invalid("\(found.name) is registered to go back to its original disks (--original-machine), not to an appliance (afterimage reverse register --appliance TOKEN)") }
        guard request.originalMachine == true else {
            throw ApplianceError.invalid("say what it goes back to: the original machine's disks, which are overwritten (--original-machine)")
        }
        let task = try await catalogue.write { db in
            var record = try db.server(found.id)
            var reverse = try db.reverse(of: record.id)
            let given = Set(request.confirm ?? []), wanted = reverse.disks.map(\.confirmation)
            guard given == Set(wanted), Set(wanted).count == wanted.count else {
                throw ApplianceError.refused(
                    "Initiate Reverse Replication overwrites the disks of \(record.name): confirm each by its serial, or its path where it has none (\(wanted.map { "--confirm '\($0)'" }.joined(separator: " "))).")
            }
            reverse.confirmed = wanted
            reverse.keepsOriginal = request.discardsOriginal != true
            reverse.throttleBytesPerSecond = request.throttleBytesPerSecond ?? 0
            // Not those that an earlier attempt has begun to overwrite: what was kept then is what they held.
            reverse.step = reverse.keepsOriginal && reverse.originalPoint == nil ? .keeping : .sending
            try reverse.update(db)
            try db.apply(
                .startReverse, to: &record, who: who, hasRecoveryPoint: true,
                detail: "onto \(wanted.joined(separator: ", "))\(reverse.keepsOriginal ? "" : "; what they hold is not kept")")
            return try TaskBoard.plan(.startReverse, server: record, parameters: TaskParameters(instance: reverse.instance), who: who, in: db)
        }
        await start(task)
        return task
    }

    /// Repeats itself after a restart, from the step that it had come to.
    func performStartReverse(_ task: TaskRecord) async throws -> TaskResult {
        guard let id = task.server else { throw ApplianceError.failed("the task has no server") }
        let server = ServerID(id)
        if try await catalogue.read({ db in try db.reverse(of: id) }).step == .keeping { try await keepOriginal(server, task) }
        let reverse = try await catalogue.read { db in try db.reverse(of: id) }
        guard reverse.step == .sending else { throw ApplianceError.failed("reverse replication was ended") }
        if let appliance = reverse.appliance { return try await untilFollowed(reverse, appliance, task) }
        let offer = try await offer(reverse)
        await tell(server, .startReverse(try reverseOrder(reverse, offer)))
        FaultPoint.offerMade.reached(task.operation)
        await tasks.log(task, "what runs here is compared with the disks; what differs is sent")
        var shown = ReplicationPhase.idle
        while true {
            let status = offer.status
            if status.phase == .replicating, status.lastRecoveryPointNanoseconds > 0 {
                await happened(.reverseFollows, server)
                FaultPoint.stateMoved.reached(task.operation)
                var result = TaskResult()
                result.instance = reverse.instance
                result.recoveryPoint = reverse.originalPoint
                result.cutTimeNanoseconds = status.lastRecoveryPointNanoseconds
                result.message = "the disks follow what runs here; \(Amount.bytes(status.sentBytes)) were sent, \(Amount.bytes(status.resyncEqualBytes)) were there already"
                return result
            }
            if status.phase == .resync || status.phase == .fullSync {
                if shown != status.phase { await happened(.reverseSyncStarted, server) }
                await tasks.report(
                    task, TaskProgress(
                        step: ServerState.reversedFullSync.rawValue, doneBytes: status.fullSyncDoneBytes, totalBytes: status.fullSyncTotalBytes,
                        bytesPerSecond: status.sentBytesPerSecond))
            }
            shown = status.phase
            try await Task.sleep(for: .milliseconds(Self.reversePollMilliseconds))
        }
    }

    // MARK: The original

    /// Takes what the disks hold into the group, as a recovery point that is held. One of before this task says what they held then.
    private func keepOriginal(_ server: ServerID, _ task: TaskRecord) async throws {
        let group = GroupID(server.rawValue)
        let settings = try await self.server(server.rawValue).settings
        try await givePosition(group, instance: Self.committed, note: "as the failover was committed", for: task.operation)
        // What is to be turned back depends on who holds the disks.
        while agents[server]?.connected != true || agents[server]?.rescueInstance == nil { try await Task.sleep(for: .milliseconds(Self.reversePollMilliseconds)) }
        let position = try await turnBack(server, task)
        FaultPoint.turnedBack.reached(task.operation)
        // Not before: an epoch of the disks would take the place of that one.
        keeping.insert(server)
        defer { keeping.remove(server) }
        let begun = UInt64(task.created.timeIntervalSince1970 * 1e9)
        guard let settings else { throw ApplianceError.failed("the server has no settings of replication") }
        await tell(server, .keepOriginal(try order(server.rawValue, settings)))
        await tasks.log(task, "what the disks hold is taken into a recovery point first")
        while true {
            let received = store.recoveryPoints(group).filter {
                // Not what the group was turned back to: that has an epoch of the disks, too.
                $0.instance == agents[server]?.rescueInstance && $0.receivedTimeNanoseconds > begun && !($0.instance == position?.instance && $0.epoch <= position!.epoch)
            }
            // One that is held already was, before a restart.
            if let point = received.first(where: { $0.hold != nil }) ?? received.last {
                FaultPoint.originalReceived.reached(task.operation)
                let hold = "original-" + Self.stamp(Date(nanoseconds: point.cutTimeNanoseconds))
                if point.hold == nil { try await blocking { [store] in try store.holdRecoveryPoint(group, point.id, name: hold) } }
                FaultPoint.originalHeld.reached(task.operation)
                try await catalogue.write { db in
                    // Stopped meanwhile: nothing may be overwritten.
                    guard try TaskRecord.fetchOne(db, key: task.id)?.status == .running else { throw CancellationError() }
                    try db.updateReverse(of: server.rawValue) {
                        $0.originalPoint = point.id
                        $0.step = .sending
                    }
                    try db.event("appliance", "Hold recovery point", server: try db.server(server.rawValue), after: hold, detail: "\(point.id): what the original disks held")
                }
                FaultPoint.originalStored.reached(task.operation)
                await tell(server, .stopReplication)
                await link?.endReplication(of: group, reason: "the original is kept")
                await tasks.log(task, "it is recovery point \(point.id), held as \(hold)")
                return
            }
            if let status = agents[server]?.status {
                await tasks.report(
                    task, TaskProgress(
                        step: "keeping the original", doneBytes: status.fullSyncDoneBytes, totalBytes: status.fullSyncTotalBytes, bytesPerSecond: status.sentBytesPerSecond))
            }
            try await Task.sleep(for: .milliseconds(Self.reversePollMilliseconds))
        }
    }

    static let committed = "committed"

    /// When what the disks wrote is known since the recovery point that the machine was made of, or earlier: that point is what their next epoch goes on top of.
    /// Returns where the source was at that point, whether the group is there or not.
    private func turnBack(_ server: ServerID, _ task: TaskRecord) async throws -> DurablePosition? {
        let reverse = try await catalogue.read { db in try db.reverse(of: server.rawValue) }
        guard let machine = try await catalogue.read({ db in try InstanceRecord.fetchOne(db, key: reverse.instance) }), let position = machine.pointPosition else { return nil }
        guard isFollowed(server, since: position) else { return position }
        let group = GroupID(server.rawValue)
        do {
            let isBack = try await onThread("turn-back") { [store] isCancelled in
                // Only on top of what was committed: once what the disks hold has come, it stays.
                guard let info = store.group(group), info.lastDurable?.instance == "\(Self.committed)-\(info.generation.rawValue)" else { return false }
                let point = try store.turnBack(
                    group, generation: info.generation, toBirthOf: machine.forkID, as: position, cutTimeNanoseconds: UInt64(Date().timeIntervalSince1970 * 1e9),
                    goesOn: { !isCancelled() })
                guard let point else { return false }
                try store.markRecoveryPoint(group, point.id, note: "as the source was when it was failed over", isOnDemand: true)
                return true
            }
            if isBack { await tasks.log(task, "the disks were followed all the time: only what they wrote since the failover is read") }
        } catch StoreError.closed { throw StoreError.closed } catch {
            try Task.checkCancellation()
            // It only saves reading: everything is compared.
            await tasks.log(task, "what the disks wrote since the failover cannot be used, and they are compared: \(error)")
        }
        return position
    }

    /// Whether what the disks of the agent in rescue mode wrote is known from there on.
    private func isFollowed(_ server: ServerID, since position: DurablePosition) -> Bool {
        guard let agent = agents[server], let since = agent.followedSince else { return false }
        return position.instance == agent.rescueInstance && since <= position.epoch
    }

    /// What the disks held, for a source that knows then in what they can differ.
    private func original(_ reverse: ReverseRecord, _ group: GroupID) -> ForkSource.Original? {
        let points = store.recoveryPoints(group)
        guard let kept = points.firstIndex(where: { $0.id == reverse.originalPoint }), let generation = store.group(group)?.generation.rawValue,
            let committed = points[..<kept].last(where: { $0.instance == "\(Self.committed)-\(generation)" })
        else { return nil }
        return ForkSource.Original(committed: committed.id, kept: points[kept])
    }

    private static func stamp(_ date: Date) -> String {
        String(APIJSON.text(date).prefix(19)).replacingOccurrences(of: ":", with: "").replacingOccurrences(of: "-", with: "").replacingOccurrences(of: "T", with: "-").lowercased()
    }

    /// A group that was committed knows no position, and could not be compared with anything. An epoch with nothing in it gives it one, and a recovery
    /// point of what it is.
    func givePosition(_ group: GroupID, instance: String, note: String, for operation: Trigger) async throws {
        try await blocking { [store] in
            guard let info = store.group(group) else { throw StoreError.unknownGroup(group) }
            let name = "\(instance)-\(info.generation.rawValue)"
            let point: RecoveryPoint?
            if info.lastDurable == nil {
                let now = UInt64(Date().timeIntervalSince1970 * 1e9)
                point = try store.sealNothing(group, generation: info.generation, cut: Cut(epoch: EpochNumber(1), kind: .exact, timeNanoseconds: now, blockCount: 0), instance: name)
            } else {
                // Made before a restart, which came before it was marked.
                point = store.recoveryPoints(group).first { $0.instance == name && $0.note == nil }
            }
            FaultPoint.positionGiven.reached(operation)
            if let point { try store.markRecoveryPoint(group, point.id, note: note, isOnDemand: true) }
        }
    }

    // MARK: Offers

    /// The fork is sent to whoever holds the disks, from now on.
    func offer(_ reverse: ReverseRecord) async throws -> ReverseOffer {
        if let offer = offers[reverse.server] { return offer }
        let record = try await server(reverse.server)
        guard let info = store.group(record.group), let settings = record.settings else { throw ApplianceError.failed("the store has lost group \(record.group)") }
        let (store, logger, original) = (store, logger, original(reverse, record.group))
        let source = try await blocking { try ForkSource(store: store, fork: ForkID(reverse.instance), instance: reverse.source, original: original, logger: logger) }
        let order = ReplicationOrder(
            group: record.group, generation: info.generation, disks: source.disks.map(\.name), epochMilliseconds: settings.epochMilliseconds,
            throttleBytesPerSecond: reverse.throttleBytesPerSecond)
        if let offer = offers[reverse.server] {
            source.close()
            return offer
        }
        let offer = ReverseOffer(server: record.serverID, source: source, order: order, logger: logger)
        offers[reverse.server] = offer
        await link?.offerReverse(offer)
        return offer
    }

    func reverseOrder(_ reverse: ReverseRecord, _ offer: ReverseOffer) throws -> ReverseOrder {
        ReverseOrder(
            group: offer.order.group, generation: offer.order.generation, disks: offer.source.disks.map { VolumeSpec(name: $0.name, geometry: $0.geometry) },
            confirmed: reverse.confirmed)
    }

    /// Nothing is sent any more; what was acknowledged stays known unless `forgets`.
    func endOffer(_ server: String, reason: String, forgets: Bool) async throws {
        if let offer = offers.removeValue(forKey: server) {
            await link?.endReverse(of: offer.order.group, reason: reason)
            try await blocking { offer.source.close() }
        }
        guard forgets else { return }
        FaultPoint.offerEnded.reached()
        if let reverse = try await catalogue.read({ db in try ReverseRecord.fetchOne(db, key: server) }) {
            try await blocking { [store] in try ForkSource.forget(ForkID(reverse.instance), in: store) }
        }
        FaultPoint.marksForgotten.reached()
    }

    /// The appliance stops.
    func endOffers() async {
        for server in offers.keys { try? await endOffer(server, reason: "the appliance is shutting down", forgets: false) }
    }

    // MARK: Stop

    /// Back to where reverse replication was not: the machine goes on here, the disks are left in the middle of being overwritten.
    public func stopReverse(_ name: String, who: String) async throws -> ServerView {
        let found = try await server(name)
        let running = try await catalogue.write { db in
            var record = try db.server(found.id)
            try db.apply(.stopReverse, to: &record, who: who, hasRecoveryPoint: true)
            let running = try db.runningTask(of: record, [.startReverse])
            if let running { try TaskBoard.finish(running, error: "reverse replication was stopped by \(who)", in: db) }
            if record.state == .failoverCommitted {
                _ = try ReverseRecord.deleteOne(db, key: record.id)
            } else {
                try db.updateReverse(of: record.id) { $0.step = .registered }
            }
            return running
        }
        FaultPoint.requestStored.reached(.stopReverse)
        if let running { await tasks.cancel(running) }
        await tell(found.serverID, .stopReplication)
        if let reverse = try await catalogue.read({ db in try ReverseRecord.fetchOne(db, key: found.id) }), reverse.appliance != nil {
            // Connected all the same, and sending nothing.
            await leaveOther(found.id, forgets: true, keepsEnrolment: true)
            try await joinOther(reverse)
            return try await view(found.id)
        }
        await leaveOther(found.id, forgets: true)
        try await endOffer(found.id, reason: "reverse replication was stopped", forgets: true)
        await link?.endReplication(of: found.group, reason: "reverse replication was stopped")
        return try await view(found.id)
    }

    // MARK: The agent in rescue mode

    func rescueConnected(_ server: ServerID, _ hello: AgentHello, _ rescue: [RescueDisk]) async -> [AgentCommand] {
        var live = LiveAgent(connected: true)
        live.rescueInstance = hello.instance
        live.followedSince = hello.followedSince
        agents[server] = live
        do {
            let (record, reverse) = try await catalogue.write { [store] db -> (ServerRecord, ReverseRecord?) in
                var record = try db.server(server.rawValue)
                record.lastSeen = Date()
                try record.update(db)
                guard var reverse = try ReverseRecord.fetchOne(db, key: server.rawValue), reverse.appliance == nil else { return (record, nil) }
                // Its fork may be gone already, and nothing is asked of the disks any more.
                if reverse.step == .handedOver { return (record, reverse) }
                let who = "rescue agent of \(record.name)"
                let wanted = store.forks().first { $0.id.rawValue == reverse.instance }?.volumes ?? []
                if let unfit = Self.rescueUnfitness(hello.disks, for: wanted) {
                    try db.apply(.rescueUnfit, to: &record, who: who, hasRecoveryPoint: true, reason: unfit)
                    return (record, nil)
                }
                let disks = zip(hello.disks, rescue).map {
                    ReverseDisk(
                        name: $0.name, devicePath: $0.devicePath, sizeBytes: $0.geometry.sizeBytes, confirmation: RescueDisks.confirmation(serial: $1.serial, path: $0.devicePath))
                }
                if reverse.disks != disks {
                    reverse.disks = disks
                    try reverse.update(db)
                }
                record.reason = nil
                try db.apply(.rescueConnected, to: &record, who: who, hasRecoveryPoint: true)
                return (record, reverse)
            }
            guard let reverse else { return [.stopReplication] }
            switch (record.state, reverse.step) {
            case (.reversedEnableReplicating, .keeping):
                guard let settings = record.settings, keeping.contains(server) else { return [.stopReplication] }
                return [.keepOriginal(try order(record.id, settings))]
            case (_, .sending) where record.state.phase == .reverse, (.failbackInProgress, .stopping), (.failbackInProgress, .cancelling):
                guard let offer = offers[record.id] else { return [.stopReplication] }
                return [.startReverse(try reverseOrder(reverse, offer))]
            // Not of one that was failed over again since: its machine runs here.
            case (.failbackInProgress, .handedOver), (.failedBack, .handedOver): return [.disksReady]
            default: return [.stopReplication]
            }
        } catch {
            logger.error("cannot take in the rescue agent's hello: \(error)", metadata: ["server": "\(server)"])
            return []
        }
    }

    /// Why these disks cannot take the place of what runs here, or nil.
    static func rescueUnfitness(_ disks: [DiskReport], for volumes: [VolumeSpec]) -> String? {
        guard disks.map(\.name) == volumes.map(\.name) else {
            return "the disks \(volumes.map(\.name).joined(separator: ", ")) run here, the rescue agent holds \(disks.map(\.name).joined(separator: ", ")): give it those, in this order (afterimage agent rescue --disk …)"
        }
        for (disk, volume) in zip(disks, volumes) where disk.geometry.sizeBytes < volume.geometry.sizeBytes {
            return "\(disk.devicePath) has \(disk.geometry.sizeBytes) bytes, disk \(volume.name) needs \(volume.geometry.sizeBytes)"
        }
        return nil
    }

    func rescueStatus(_ server: ServerID, _ status: AgentStatus) async {
        guard status.phase == .failed || offers[server.rawValue] != nil else { return }
        // Its disks may have been compared anew since; Initiate Reverse Replication looks by itself.
        if let sending = offers[server.rawValue]?.status, let record = try? await self.server(server.rawValue) {
            switch sending.phase {
            case .resync, .fullSync: if record.state == .reversedReplicating { await happened(.reverseSyncStarted, server) }
            case .replicating where sending.lastRecoveryPointNanoseconds > 0: if record.state == .reversedFullSync { await happened(.reverseFollows, server) }
            default: break
            }
        }
        await noteReverse(server, status.phase == .failed || status.phase == .interrupted ? status.reason : nil)
    }

    func rescueGone(_ server: ServerID) async { await noteReverse(server, "the rescue agent is not connected") }

    func noteReverse(_ server: ServerID, _ reason: String?) async {
        do {
            try await catalogue.write { db in
                guard var record = try ServerRecord.fetchOne(db, key: server.rawValue), record.state.phase == .reverse, record.reason != reason else { return }
                record.reason = reason
                try record.update(db)
            }
        } catch {
            logger.error("cannot store how reverse replication goes: \(error)", metadata: ["server": "\(server)"])
        }
    }

    /// Forward epochs of a server whose machine runs here: only what its original disks hold, while that is kept.
    func mayKeepOriginal(_ server: ServerID) async -> Bool {
        guard agents[server]?.rescueInstance != nil, keeping.contains(server) else { return false }
        return (try? await catalogue.read { db in try ReverseRecord.fetchOne(db, key: server.rawValue) })?.step == .keeping
    }

    func reverseView(_ server: String) async throws -> ReverseView? {
        guard let reverse = try await catalogue.read({ db in try ReverseRecord.fetchOne(db, key: server) }) else { return nil }
        if let appliance = reverse.appliance { return await applianceView(reverse, appliance) }
        let live = agents[ServerID(server)]
        let isConnected = live?.connected == true && live?.rescueInstance != nil
        let status = offers[server]?.status ?? (isConnected ? live?.status : nil) ?? AgentStatus()
        return ReverseView(
            step: reverse.step, disks: reverse.disks, isConnected: isConnected, phase: status.phase, reason: status.reason, sentBytes: status.sentBytes,
            comparedBytes: status.resyncComparedBytes, equalBytes: status.resyncEqualBytes, behindBytes: status.source.behindBytes &+ status.source.unsyncedBytes,
            lastCutTime: offers[server] == nil || status.lastRecoveryPointNanoseconds == 0 ? nil : Date(nanoseconds: status.lastRecoveryPointNanoseconds),
            originalPoint: reverse.originalPoint)
    }
}

import BlockTap
import Foundation
import GRDB
import Replica

/// Recovery points by people's hands: the policy, points on demand, held points, deleting.
extension Lifecycle {
    // MARK: Recovery Point Policy

    public func setPolicy(_ name: String, _ request: SetPolicy, ifMatch: Precondition = .none, who: String) async throws -> ServerView {
        let policy = try PolicyText(request.policy)
        let record = try await catalogue.write { db in
            var record = try db.server(name)
            try ifMatch.check(try record.policyTag, "the Recovery Point Policy of \(record.name)")
            let before = record.policy
            record.policy = policy.description
            try record.update(db)
            if before != record.policy { try db.event(who, "Set Recovery Point Policy", server: record, before: before, after: record.policy) }
            return record
        }
        giveRetention(record)
        return try await view(record.id)
    }

    /// The store keeps it in memory only: said at the start and at every change.
    func giveRetention(_ record: ServerRecord) {
        guard store.group(record.group) != nil else { return }
        do { store.setRetention(record.group, try PolicyText(record.policy).policy) } catch {
            // Of a catalogue that somebody else has edited. Keeping everything loses nothing.
            logger.error("every recovery point is kept: \(error)", metadata: ["server": "\(record.name)"])
            store.setRetention(record.group, nil)
        }
    }

    // MARK: On demand

    /// How many epochs must become durable after the request until one is certain to have been cut after it. The source cuts only while
    /// at most one epoch that it sent is not acknowledged. So when it cut the third of those that become durable from now on,
    /// it had our acknowledgement of the first, which we had not sent at the request. The second may have been cut before: its
    /// beginning may have been on its way.
    static let epochsUntilLater = 3
    static let pointSecondsMax = 600.0
    static let consistentAttemptsMax = 20

    /// A recovery point whose cut is made after this request; the task ends when it is durable.
    public func createPoint(_ name: String, _ request: CreatePoint, who: String) async throws -> TaskRecord {
        let found = try await server(name)
        if let note = request.note { try checkText(note, "a note") }
        guard agents[found.serverID]?.connected == true || found.state != .replicating else {
            throw ApplianceError.refused("The agent of \(found.name) is not connected: no recovery point can be made.")
        }
        let task = try await catalogue.write { db in
            var record = try db.server(found.id)
            try db.apply(.createRecoveryPoint, to: &record, who: who, hasRecoveryPoint: true, detail: request.note)
            return try TaskBoard.plan(.createRecoveryPoint, server: record, parameters: TaskParameters(note: request.note, consistency: request.consistency), who: who, in: db)
        }
        await start(task)
        return task
    }

    /// Repeated after a restart it counts anew: later than asked for, never earlier.
    func performCreatePoint(_ task: TaskRecord) async throws -> TaskResult {
        guard let server = task.server else { throw ApplianceError.failed("the task has no server") }
        let (id, group) = (ServerID(server), GroupID(server))
        var known = Set(store.recoveryPoints(group).map(\.id))
        var count = 0
        let wanted = task.parameters.consistency ?? .crash
        var lesserCount = 0
        let deadline = ContinuousClock.now + .seconds(Self.pointSecondsMax)
        await tell(id, .cutNow(.crash))
        while true {
            for point in store.recoveryPoints(group) where known.insert(point.id).inserted {
                count += 1
                // Epochs are short, but may be hours.
                guard count >= Self.epochsUntilLater else {
                    await tell(id, .cutNow(count + 1 < Self.epochsUntilLater ? .crash : wanted.cut))
                    continue
                }
                guard point.consistency >= wanted else {
                    lesserCount += 1
                    // Cut before the agent knew, or by the clock, or the attempt failed.
                    guard lesserCount < Self.consistentAttemptsMax else {
                        throw ApplianceError.failed(
                            "\(lesserCount) recovery points were made, none of them \(wanted.words): the agent's log says why (\(point.id) is the last, and is \(point.consistency.words))")
                    }
                    // Not at once: scripts are to run once for what was asked for once.
                    await tell(id, .cutNow(lesserCount % 3 == 0 ? wanted.cut : .crash))
                    continue
                }
                do { return try await markOnDemand(point, task) } catch StoreError.unknownRecoveryPoint {
                    // Its policy keeps few points, and it was not marked in time: the next one.
                    continue
                }
            }
            let record = try await self.server(server)
            guard record.state.phase == .forward else {
                throw ApplianceError.failed("\(record.name) is in \(record.state.rawValue): no recovery points follow any more")
            }
            guard record.settings?.isPaused != true else {
                throw ApplianceError.failed("replication of \(record.name) was paused: no recovery points follow until it is resumed (afterimage replication resume \(record.name))")
            }
            guard ContinuousClock.now < deadline else {
                throw ApplianceError.failed("no recovery point followed within \(Int(Self.pointSecondsMax)) s; the server is in \(record.state.rawValue)\(record.reason.map { ": " + $0 } ?? "")")
            }
            try await Task.sleep(for: .milliseconds(20))
        }
    }

    private func markOnDemand(_ point: RecoveryPoint, _ task: TaskRecord) async throws -> TaskResult {
        let note = task.parameters.note
        try await blocking { [store] in try store.markRecoveryPoint(point.group, point.id, note: note, isOnDemand: true) }
        var result = TaskResult()
        result.recoveryPoint = point.id
        result.cutTimeNanoseconds = point.cutTimeNanoseconds
        result.message = "recovery point \(point.id) was cut after the request, is durable, and is \(point.consistency.words)"
        return result
    }

    // MARK: By the clock

    /// At every word of the agent: asks for the point that the settings want now and then.
    func askForConsistentPoint(_ record: ServerRecord) async {
        guard record.state == .replicating, let settings = record.settings, let every = settings.consistentEverySeconds, every > 0 else { return }
        let wanted = settings.consistency ?? .filesystem
        let now = Date()
        if agents[record.serverID]?.nextConsistentPoint == nil {
            let newest = store.recoveryPoints(record.group).last { $0.consistency >= wanted }
            agents[record.serverID]?.nextConsistentPoint = newest.map { Date(nanoseconds: $0.cutTimeNanoseconds).addingTimeInterval(Double(every)) } ?? now
        }
        guard let next = agents[record.serverID]?.nextConsistentPoint, next <= now else { return }
        agents[record.serverID]?.nextConsistentPoint = now.addingTimeInterval(Double(every))
        await tell(record.serverID, .cutNow(wanted.cut))
    }

    // MARK: Held points

    public func holdPoint(_ name: String, point: String, _ request: HoldPoint, who: String) async throws -> RecoveryPoint {
        try checkText(request.name, "the name of a held recovery point")
        let (found, chosen) = try await named(name, point)
        if let hold = chosen.hold {
            guard hold == request.name else { throw ApplianceError.refused("Recovery point \(chosen.id) of \(found.name) is held as \"\(hold)\" already.") }
            return chosen
        }
        try await catalogue.read { db in try db.refuseWhileRemoved(found) }
        try await inStore { store in try store.holdRecoveryPoint(found.group, chosen.id, name: request.name) }
        do { try await catalogue.read { db in try db.refuseWhileRemoved(found) } } catch {
            // Its removal was asked for meanwhile, and waits for nothing to be held.
            try await inStore { store in try store.releaseRecoveryPoint(found.group, chosen.id) }
            throw error
        }
        try await catalogue.write { db in try db.event(who, "Hold recovery point", server: found, after: request.name, detail: chosen.id.rawValue) }
        return try await named(name, chosen.id.rawValue).point
    }

    /// In two steps: `confirm` names what it is held as.
    public func releasePoint(_ name: String, point: String, _ request: Confirmation, who: String) async throws -> RecoveryPoint {
        let (found, chosen) = try await named(name, point)
        guard let hold = chosen.hold else { throw ApplianceError.refused("Recovery point \(chosen.id) of \(found.name) is not held.") }
        guard request.confirm == hold else {
            throw ApplianceError.refused("Recovery point \(chosen.id) is held as \"\(hold)\"; released, it expires by the policy: confirm it by that name (--yes '\(hold)').")
        }
        try await inStore { store in try store.releaseRecoveryPoint(found.group, chosen.id) }
        try await catalogue.write { db in try db.event(who, "Release recovery point", server: found, before: hold, detail: chosen.id.rawValue) }
        return try await named(name, chosen.id.rawValue).point
    }

    public func deletePoint(_ name: String, point: String, _ request: Confirmation, who: String) async throws {
        let (found, chosen) = try await named(name, point)
        if let hold = chosen.hold {
            throw ApplianceError.refused("Recovery point \(chosen.id) is held as \"\(hold)\": release it first (afterimage recovery-point release \(found.name) \(chosen.id)).")
        }
        let user = try await catalogue.read { db -> String? in
            if try PointExportRecord.filter(Column("server") == found.id && Column("point") == chosen.id.rawValue).fetchOne(db) != nil {
                return "is exported: end that first (afterimage recovery-point unexport \(found.name) --point \(chosen.id))"
            }
            if let mount = try PointMountRecord.filter(Column("server") == found.id && Column("point") == chosen.id.rawValue).fetchOne(db) {
                return "is mounted: end that first (afterimage recovery-point unmount \(mount.directory))"
            }
            for task in try TaskRecord.filter(Column("server") == found.id && Column("status") == TaskStatus.running).fetchAll(db) {
                let instance = try task.parameters.instance.flatMap { try InstanceRecord.fetchOne(db, key: $0) }
                if task.parameters.copy?.point == chosen.id || instance?.point == chosen.id {
                    return "is used by task \(task.id ?? 0) (\(task.operation.rawValue)): wait for it"
                }
            }
            return nil
        }
        if let user { throw ApplianceError.refused("Recovery point \(chosen.id) of \(found.name) \(user).") }
        guard request.confirm == chosen.id.rawValue else {
            throw ApplianceError.refused("Recovery point \(chosen.id) of \(found.name) would be gone for good: confirm it by its ID (--yes \(chosen.id)).")
        }
        try await inStore { store in try store.dropRecoveryPoints(found.group, [chosen.id]) }
        try await catalogue.write { db in try db.event(who, "Delete recovery point", server: found, detail: chosen.id.rawValue) }
    }

    // MARK: Helpers

    private func named(_ server: String, _ point: String) async throws -> (server: ServerRecord, point: RecoveryPoint) {
        let found = try await self.server(server)
        return (found, try self.point(of: found, named: point))
    }

    /// What the store refuses is a refusal of ours.
    private func inStore(_ body: @escaping @Sendable (ReplicaStore) throws -> Void) async throws {
        do { try await blocking { [store] in try body(store) } } catch let error as StoreError {
            switch error {
            case .invalid, .busy: throw ApplianceError.refused("\(error).")
            case .unknownRecoveryPoint: throw ApplianceError.notFound("\(error).")
            default: throw error
            }
        }
    }

    private func checkText(_ text: String, _ what: String) throws(ApplianceError) {
        guard (1...200).contains(text.count), !text.unicodeScalars.contains(where: { $0.value < 0x20 || $0.value == 0x7F }) else {
            throw .invalid("\(what) has 1 to 200 characters, and no control characters")
        }
    }
}

extension Consistency: Comparable {
    private var rank: Int { self == .crash ? 0 : self == .filesystem ? 1 : 2 }
    public static func < (a: Consistency, b: Consistency) -> Bool { a.rank < b.rank }

    var cut: CutConsistency {
        switch self {
        case .crash: .crash
        case .filesystem: .fileSystem
        case .application: .application
        }
    }

    public var words: String {
        switch self {
        case .crash: "crash-consistent"
        case .filesystem: "file-system-consistent"
        case .application: "application-consistent"
        }
    }
}

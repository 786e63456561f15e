import Foundation
import GRDB

/// Recovery plans: what they are. How they are run: `Lifecycle+PlanRuns.swift`, `Lifecycle+PlanSteps.swift`.
extension Lifecycle {
    public func createPlan(_ definition: PlanDefinition, who: String) async throws -> PlanView {
        try await checkPlan(definition)
        try await catalogue.write { db in
            guard try PlanRecord.fetchOne(db, key: definition.name) == nil else { throw ApplianceError.refused("There is a recovery plan \(definition.name) already.") }
            try PlanRecord(name: definition.name, groups: definition.groups, created: Date(), changed: Date()).insert(db)
            try db.event(who, "Create recovery plan", after: definition.name, detail: try Self.text(definition))
        }
        return try await plan(definition.name)
    }

    /// A run that goes on keeps the steps that it began with.
    public func editPlan(_ name: String, _ definition: PlanDefinition, ifMatch: Precondition = .none, who: String) async throws -> PlanView {
        guard definition.name == name else { throw ApplianceError.invalid("the plan in the request is called \(definition.name), not \(name): a plan keeps its name") }
        try await checkPlan(definition)
        try await catalogue.write { db in
            var plan = try db.plan(name)
            try ifMatch.check(try EntityTag(of: plan.definition), "the plan \(name)")
            let before = try Self.text(plan.definition)
            plan.groups = definition.groups
            plan.changed = Date()
            try plan.update(db)
            try db.event(who, "Edit recovery plan", before: before, after: try Self.text(definition), detail: name)
        }
        return try await plan(name)
    }

    public func deletePlan(_ name: String, _ request: Confirmation, who: String) async throws {
        try await catalogue.write { db in
            let plan = try db.plan(name)
            if let run = try db.lastRun(of: name) {
                guard !run.status.isActive else { throw ApplianceError.refused("A run of the plan \(name) goes on: stop it first (afterimage plan stop \(name)).") }
                guard try db.planSteps(run.id ?? 0).allSatisfy({ try db.drill(of: $0) == nil }) else {
                    throw ApplianceError.refused("There are drills of the plan \(name): clear them first (afterimage plan clear \(name)).")
                }
            }
            guard request.confirm == name else {
                throw ApplianceError.refused("The plan \(name) and the record of its runs are deleted for good: confirm it by its name (--yes \(name)).")
            }
            try PlanRecord.deleteOne(db, key: name)
            try db.event(who, "Delete recovery plan", before: try Self.text(plan.definition), detail: name)
        }
    }

    public func plans() async throws -> [PlanView] {
        try await catalogue.read { db in try PlanRecord.order(Column("name")).fetchAll(db).map { try Self.view($0, db) } }
    }

    public func plan(_ name: String) async throws -> PlanView {
        try await catalogue.read { db in try Self.view(try db.plan(name), db) }
    }

    /// Newest first.
    public func planRuns(_ name: String, limit: Int, before: Int64? = nil) async throws -> [PlanRunView] {
        try await catalogue.read { db in
            _ = try db.plan(name)
            var request = PlanRunRecord.filter(Column("plan") == name).order(Column("id").desc).limit(limit)
            if let before { request = request.filter(Column("id") < before) }
            return try request.fetchAll(db).map { PlanRunView($0, try db.planSteps($0.id ?? 0)) }
        }
    }

    static func planServers(_ groups: [PlanGroup]) -> [PlanServer] { groups.flatMap { $0.servers ?? [] } }

    private static func view(_ plan: PlanRecord, _ db: Database) throws -> PlanView {
        let there = Set(try String.fetchAll(db, ServerRecord.select(Column("name"))))
        let missing = planServers(plan.groups).map(\.server).filter { !there.contains($0) }
        let run = try db.lastRun(of: plan.name).map { PlanRunView($0, try db.planSteps($0.id ?? 0)) }
        return PlanView(name: plan.name, groups: plan.groups, created: plan.created, changed: plan.changed, missingServers: missing, lastRun: run)
    }

    private static func text(_ definition: PlanDefinition) throws -> String { String(decoding: try APIJSON.encoder().encode(definition), as: UTF8.self) }

    /// Everything that can be known before a run.
    private func checkPlan(_ definition: PlanDefinition) async throws {
        try Names.check(definition.name, what: "recovery plan")
        guard (1...50).contains(definition.groups.count) else { throw ApplianceError.invalid("a recovery plan has 1 to 50 groups, not \(definition.groups.count)") }
        guard Set(definition.groups.map(\.name)).count == definition.groups.count else { throw ApplianceError.invalid("two groups of the plan have one name") }
        let servers = Self.planServers(definition.groups)
        for name in servers.map(\.server) where servers.count(where: { $0.server == name }) > 1 { throw ApplianceError.invalid("server \(name) is twice in the plan") }
        for group in definition.groups {
            try Names.check(group.name, what: "group")
            let (scripts, manual) = (group.scripts ?? [], group.manualSteps ?? [])
            guard (group.servers ?? []).count <= 50, scripts.count <= 20, manual.count <= 20 else {
                throw ApplianceError.invalid("group \(group.name): at most 50 servers, 20 scripts and 20 manual steps")
            }
            guard !(group.servers ?? []).isEmpty || group.waitSeconds != nil || !scripts.isEmpty || !manual.isEmpty else { throw ApplianceError.invalid("group \(group.name) is empty") }
            if let seconds = group.waitSeconds, !(1...86_400).contains(seconds) { throw ApplianceError.invalid("group \(group.name): waitSeconds is 1 to 86400, not \(seconds)") }
            for server in group.servers ?? [] { try await check(server, of: group) }
            for script in scripts {
                if let refusal = HostScript.refusal(script.path) { throw ApplianceError.invalid("group \(group.name): \(refusal)") }
                let arguments = script.arguments ?? []
                guard arguments.count <= 100, arguments.allSatisfy({ $0.utf8.count <= 4096 && !$0.utf8.contains(0) }) else {
                    throw ApplianceError.invalid("group \(group.name): a script has at most 100 arguments of at most 4096 bytes")
                }
                let limit = script.limitSeconds ?? PlanScript.limitSecondsStandard
                guard (1...86_400).contains(limit) else { throw ApplianceError.invalid("group \(group.name): limitSeconds is 1 to 86400, not \(limit)") }
            }
            for step in manual {
                guard (1...500).contains(step.text.count), !step.text.contains(where: \.isNewline) else {
                    throw ApplianceError.invalid("group \(group.name): a manual step is one line of 1 to 500 characters")
                }
            }
        }
    }

    private func check(_ server: PlanServer, of group: PlanGroup) async throws {
        let record: ServerRecord
        do { record = try await self.server(server.server) } catch { throw ApplianceError.invalid("group \(group.name): \(error)") }
        // Names, since a plan is written and read by people.
        guard record.name == server.server else { throw ApplianceError.invalid("group \(group.name): name the server \(record.name), not its ID \(server.server)") }
        guard let machine = server.machine else { return }
        guard machine.graceful == nil else { throw ApplianceError.invalid("group \(group.name), server \(record.name): graceful is said when the plan is run, not in it") }
        do { _ = try await machineSettings(record, machine) } catch let error as ApplianceError { throw ApplianceError.invalid("group \(group.name), server \(record.name): \(error)") }
    }
}

import Foundation
import GRDB
import Testing

@testable import Appliance

@Suite("Recovery plans")
struct PlanTests {
    private func run(_ bed: LifecycleBed) async throws -> PlanRunView { try #require(try await bed.lifecycle.plan("shop").lastRun) }

    private func statuses(_ bed: LifecycleBed) async throws -> [PlanStepStatus] { try await run(bed).steps.map(\.status) }

    private func ended(_ bed: LifecycleBed) async throws -> PlanRunView {
        try await until("the run's end") { try await ![.running, .clearing].contains(run(bed).status) }
        return try await run(bed)
    }

    @Test("a group's servers are one stage; its wait, scripts and manual steps follow one by one; what is for the other kind, or left out, is skipped")
    func order() {
        let plan = PlanDefinition(name: "shop", groups: [
            PlanGroup(name: "db", servers: [PlanServer(server: "a"), PlanServer(server: "b")], waitSeconds: 5),
            PlanGroup(
                name: "web", servers: [PlanServer(server: "c")], scripts: [PlanScript(path: "/x", only: .failover), PlanScript(path: "/y")],
                manualSteps: [PlanManualStep(text: "look", only: .drill)]),
        ])
        let steps = PlanStepRecord.steps(of: plan, run: 1, kind: .drill, without: ["b"])
        #expect(steps.map(\.words) == ["a", "b", "wait 5 s", "c", "/x", "/y", "look"])
        #expect(steps.map(\.stage) == [1, 1, 2, 3, 4, 5, 6] && steps.map(\.number) == Array(1...7))
        #expect(steps.map(\.status) == [.waiting, .skipped, .waiting, .waiting, .skipped, .waiting, .waiting])
        #expect(PlanStepRecord.steps(of: plan, run: 1, kind: .failover, without: []).map(\.status).filter { $0 == .skipped }.count == 1)
    }

    @Test("a plan that makes no sense is refused with the place and the reason", arguments: [
        (#"{"name":"shop"}"#, "groups is missing"), (#"{"name":"shop","groups":[]}"#, "1 to 50 groups"), (#"{"name":"Shop","groups":[{"name":"a","waitSeconds":1}]}"#, "cannot be the name"),
        (#"{"name":"shop","groups":[{"name":"a"}]}"#, "group a is empty"), (#"{"name":"shop","groups":[{"name":"a","waitSeconds":0}]}"#, "1 to 86400"),
        (#"{"name":"shop","groups":[{"name":"a","wait":5}]}"#, "no field groups[0].wait"), (#"{"name":"shop","groups":[{"name":"a","servers":[{"server":"web","machine":{"cpu":1}}]}]}"#, "machine.cpu"),
        (#"{"name":"shop","groups":[{"name":"a","servers":[{"server":"none"}]}]}"#, "There is no server none"),
        (#"{"name":"shop","groups":[{"name":"a","servers":[{"server":"web"},{"server":"web"}]}]}"#, "twice"),
        (#"{"name":"shop","groups":[{"name":"a","servers":[{"server":"web","machine":{"bootCheck":"hope"}}]}]}"#, "server web: cannot use the boot check"),
        (#"{"name":"shop","groups":[{"name":"a","servers":[{"server":"web","machine":{"graceful":true}}]}]}"#, "when the plan is run"),
        (#"{"name":"shop","groups":[{"name":"a","scripts":[{"path":"true"}]}]}"#, "absolute path"), (#"{"name":"shop","groups":[{"name":"a","scripts":[{"path":"/nonexistent/x"}]}]}"#, "no script"),
        (#"{"name":"shop","groups":[{"name":"a","scripts":[{"path":"/etc/passwd"}]}]}"#, "not executable"), (#"{"name":"shop","groups":[{"name":"a","scripts":[{"path":"/bin/true","limitSeconds":0}]}]}"#, "limitSeconds"),
        (#"{"name":"shop","groups":[{"name":"a","waitSeconds":1},{"name":"a","waitSeconds":1}]}"#, "one name"), (#"{"name":"shop","groups":[{"name":"a","manualSteps":[{"text":""}]}]}"#, "manual step"),
        ("nonsense", "cannot understand"),
    ])
    func refused(text: String, words: String) async throws {
        let bed = try LifecycleBed()
        try await bed.catalogue.write { db in try Fixture.server(db, "web", state: .replicating) }
        let error = await #expect(throws: ApplianceError.self) { _ = try await bed.lifecycle.createPlan(try PlanText.definition(Data(text.utf8)), who: "me") }
        #expect(error.map { "\($0)".contains(words) } == true, "\(String(describing: error))")
        try await bed.end()
    }

    @Test("what a plan is shown as makes the same plan; it says which of its servers are gone; it is deleted by its name")
    func definition() async throws {
        let bed = try LifecycleBed()
        try await bed.catalogue.write { db in try Fixture.server(db, "web", state: .replicating) }
        let plan = PlanDefinition(name: "shop", groups: [PlanGroup(name: "a", servers: [PlanServer(server: "web")], scripts: [PlanScript(path: "/bin/true", arguments: ["x y"])])])
        let made = try await bed.lifecycle.createPlan(plan, who: "me")
        let text = try APIJSON.encoder().encode(made.definition)
        #expect(try APIJSON.encoder().encode(try PlanText.definition(text)) == text)
        await #expect(throws: ApplianceError.self) { _ = try await bed.lifecycle.createPlan(plan, who: "me") }
        #expect(try await bed.lifecycle.plan("shop").missingServers == [])
        _ = try await bed.catalogue.write { db in try ServerRecord.deleteAll(db) }
        #expect(try await bed.lifecycle.plan("shop").missingServers == ["web"])
        await #expect { _ = try await bed.lifecycle.runPlan("shop", RunPlan(kind: .drill), who: "me") } throws: { "\($0)".contains("web: The server is not there any more") }
        await #expect { try await bed.lifecycle.deletePlan("shop", Confirmation(), who: "me") } throws: { "\($0)".contains("--yes shop") }
        try await bed.lifecycle.deletePlan("shop", Confirmation(confirm: "shop"), who: "me")
        #expect(try await bed.lifecycle.plans().isEmpty)
        try await bed.end()
    }

    @Test("scripts run in order with the run's facts, their output is kept; one that fails or hangs ends the run there, and resuming begins with it")
    func scripts() async throws {
        let bed = try LifecycleBed()
        let first = try bed.script("first", "echo \"$AFTERIMAGE_PLAN $AFTERIMAGE_PLAN_KIND $1\" >> \(bed.directory.path)/out; echo hello; echo trouble >&2")
        let second = try bed.script("second", "echo second >> \(bed.directory.path)/out; [ -e \(bed.directory.path)/mended ]")
        // Its child would keep a pipe open.
        let third = try bed.script("third", "sleep 1000 & echo third >> \(bed.directory.path)/out; [ -e \(bed.directory.path)/quick ] || sleep 1000")
        _ = try await bed.lifecycle.createPlan(PlanDefinition(name: "shop", groups: [
            PlanGroup(name: "a", scripts: [PlanScript(path: first, arguments: ["x y"]), PlanScript(path: second), PlanScript(path: third, limitSeconds: 1)]),
            PlanGroup(name: "b", waitSeconds: 1),
        ]), who: "me")
        _ = try await bed.lifecycle.runPlan("shop", RunPlan(kind: .drill), who: "me")
        let failed = try await ended(bed)
        #expect(failed.status == .failed && failed.steps.map(\.status) == [.done, .failed, .waiting, .waiting])
        #expect(failed.error?.contains("exit code 1") == true && failed.error?.contains("plan resume shop") == true)
        #expect(bed.lines("out") == ["shop drill x y", "second"])
        let task = try await bed.lifecycle.taskView(try #require(failed.task))
        let log = try #require(task.log).map(\.line)
        #expect(task.status == .failed && log.contains { $0.hasSuffix("first: hello") } && log.contains { $0.hasSuffix("first: trouble") })
        await #expect { _ = try await bed.lifecycle.cancelTask(task.id, who: "me") } throws: { "\($0)".contains("has ended") }

        FileManager.default.createFile(atPath: bed.directory.path + "/mended", contents: nil)
        _ = try await bed.lifecycle.resumePlan("shop", ResumePlan(), who: "me")
        let hung = try await ended(bed)
        #expect(hung.steps.map(\.status) == [.done, .done, .failed, .waiting] && hung.error?.contains("did not end within 1 s") == true)
        #expect(bed.lines("out") == ["shop drill x y", "second", "second", "third"])

        _ = try await bed.lifecycle.resumePlan("shop", ResumePlan(skip: true), who: "me")
        let last = try await ended(bed)
        #expect(last.status == .succeeded && last.steps.map(\.status) == [.done, .done, .skipped, .done])
        #expect(bed.lines("out").count == 4)
        await #expect { _ = try await bed.lifecycle.resumePlan("shop", ResumePlan(), who: "me") } throws: { "\($0)".contains("has failed or was stopped") }
        try await bed.end()
    }

    @Test("a manual step waits for somebody, over a restart; two runs of a plan never go on at once; a stopped run goes on where it was")
    func manual() async throws {
        let bed = try LifecycleBed()
        let mark = try bed.script("mark", "echo \"$1\" >> \(bed.directory.path)/out")
        let plan = PlanDefinition(name: "shop", groups: [
            PlanGroup(name: "a", scripts: [PlanScript(path: mark, arguments: ["one"])], manualSteps: [PlanManualStep(text: "look at it"), PlanManualStep(text: "look again")]),
            PlanGroup(name: "b", scripts: [PlanScript(path: mark, arguments: ["two"])]),
        ])
        _ = try await bed.lifecycle.createPlan(plan, who: "me")
        await #expect(throws: ApplianceError.self) { _ = try await bed.lifecycle.continuePlan("shop", who: "me") }
        _ = try await bed.lifecycle.runPlan("shop", RunPlan(kind: .drill), who: "me")
        try await until("the manual step") { try await run(bed).waitsFor == "look at it" }
        await #expect { _ = try await bed.lifecycle.runPlan("shop", RunPlan(kind: .drill), who: "me") } throws: { "\($0)".contains("goes on") }
        await #expect { try await bed.lifecycle.deletePlan("shop", Confirmation(confirm: "shop"), who: "me") } throws: { "\($0)".contains("stop it first") }
        // What it does next is as it was when it began.
        _ = try await bed.lifecycle.editPlan("shop", PlanDefinition(name: "shop", groups: [PlanGroup(name: "c", waitSeconds: 1)]), who: "me")
        try await bed.restart()
        #expect(try await run(bed).waitsFor == "look at it")
        #expect(try await bed.lifecycle.continuePlan("shop", who: "me").status == .running)
        try await until("the next manual step") { try await run(bed).waitsFor == "look again" }
        let stopped = try await bed.lifecycle.stopPlan("shop", who: "me")
        #expect(stopped.status == .stopped && stopped.waitsFor == nil)
        await #expect(throws: ApplianceError.self) { _ = try await bed.lifecycle.continuePlan("shop", who: "me") }
        await #expect(throws: ApplianceError.self) { _ = try await bed.lifecycle.stopPlan("shop", who: "me") }
        _ = try await bed.lifecycle.resumePlan("shop", ResumePlan(), who: "me")
        try await until("the manual step again") { try await run(bed).waitsFor == "look again" }
        _ = try await bed.lifecycle.continuePlan("shop", who: "me")
        #expect(try await ended(bed).status == .succeeded)
        #expect(bed.lines("out") == ["one", "two"])
        let events = try await bed.lifecycle.events(server: nil, limit: 50).map(\.what)
        for what in ["Create recovery plan", "Edit recovery plan", "Run recovery plan", "Continue recovery plan", "Stop recovery plan", "Resume recovery plan", "Recovery plan has run"] {
            #expect(events.contains(what), "\(what)")
        }
        try await bed.end()
    }

    @Test("ended in any step and begun again, a run does no finished step twice; a script that was at work is asked about, unless it may be repeated", arguments: 0..<5, [true, false])
    func killed(step: Int, isRepeatable: Bool) async throws {
        let bed = try LifecycleBed()
        // Each says that it has begun, waits for its gate, and says that it has ended.
        let gated = try bed.script("gated", "echo \"begin $1\" >> \(bed.directory.path)/out; while [ ! -e \(bed.directory.path)/gate-$1 ]; do sleep 0.02; done; echo \"end $1\" >> \(bed.directory.path)/out")
        let scripts = (0..<5).map { PlanScript(path: gated, arguments: ["\($0)"], isRepeatable: isRepeatable) }
        _ = try await bed.lifecycle.createPlan(
            PlanDefinition(name: "shop", groups: [PlanGroup(name: "a", scripts: Array(scripts[..<2])), PlanGroup(name: "b", scripts: Array(scripts[2...]))]), who: "me")
        for other in 0..<5 where other != step { FileManager.default.createFile(atPath: bed.directory.path + "/gate-\(other)", contents: nil) }
        _ = try await bed.lifecycle.runPlan("shop", RunPlan(kind: .drill), who: "me")
        try await until("script \(step) to begin") { bed.lines("out").contains("begin \(step)") }
        try await bed.restart()
        if !isRepeatable {
            let asked = try await ended(bed)
            #expect(asked.status == .failed && asked.steps[step].status == .interrupted && asked.error?.contains("what it has done is not known") == true)
            _ = try await bed.lifecycle.resumePlan("shop", ResumePlan(), who: "me")
        }
        try await until("script \(step) to begin again") { bed.lines("out").count { $0 == "begin \(step)" } == 2 }
        FileManager.default.createFile(atPath: bed.directory.path + "/gate-\(step)", contents: nil)
        #expect(try await ended(bed).status == .succeeded)
        for other in 0..<5 {
            #expect(bed.lines("out").count { $0 == "begin \(other)" } == (other == step ? 2 : 1) && bed.lines("out").count { $0 == "end \(other)" } == 1)
        }
        try await bed.end()
    }

    @Test("a wait ends when it would have ended without the restart")
    func wait() async throws {
        let bed = try LifecycleBed()
        _ = try await bed.lifecycle.createPlan(PlanDefinition(name: "shop", groups: [PlanGroup(name: "a", waitSeconds: 86_400)]), who: "me")
        _ = try await bed.lifecycle.runPlan("shop", RunPlan(kind: .drill), who: "me")
        try await until("the wait") { try await statuses(bed) == [.running] }
        let end = try await run(bed).steps[0].until
        try await bed.restart()
        try await until("the run to go on") { try await bed.lifecycle.taskView(try #require(try await run(bed).task)).progress != nil }
        #expect(try await run(bed).steps[0].until == end)
        // The time is moved, not waited for.
        await bed.lifecycle.stop()
        try await bed.catalogue.write { db in try db.execute(sql: "UPDATE planStep SET until = '2020-01-01 00:00:00.000'") }
        try await bed.restart()
        #expect(try await ended(bed).status == .succeeded)
        try await bed.end()
    }

    @Test("a server's step is the operation itself: the table refuses it as ever; a task that was begun is waited for, and none is begun for who is failed over already")
    func servers() async throws {
        let bed = try LifecycleBed()
        try await bed.catalogue.write { db in
            try Fixture.server(db, "web", state: .failoverInProgress)
            try Fixture.server(db, "db", state: .failedOver)
            try Fixture.server(db, "idle", state: .initialized)
            for (server, step) in [("web", InstanceStep.starting), ("db", .ready)] {
                try InstanceRecord(
                    id: "failover-\(server)", server: "\(server)-1", kind: .failover, step: step, point: .init("p1"), pointCutTimeNanoseconds: 5,
                    settings: MachineSettings(cpus: 1, memoryMiB: 64, network: .none, forwards: [], bootCheck: .running, bootSecondsMax: 9), volumes: ["vda"], accepted: Date()
                ).insert(db)
            }
        }
        let groups = [PlanGroup(name: "a", servers: [PlanServer(server: "web"), PlanServer(server: "db")]), PlanGroup(name: "b", waitSeconds: 1)]
        _ = try await bed.lifecycle.createPlan(PlanDefinition(name: "shop", groups: groups), who: "me")
        await #expect { _ = try await bed.lifecycle.runPlan("shop", RunPlan(kind: .drill), who: "me") } throws: { "\($0)".contains("its source is fenced") && "\($0)".contains("--without") }
        await #expect { _ = try await bed.lifecycle.runPlan("shop", RunPlan(kind: .failover, without: ["nobody"]), who: "me") } throws: { "\($0)".contains("not in the plan") }
        await #expect { _ = try await bed.lifecycle.runPlan("shop", RunPlan(kind: .failover, without: ["web"]), who: "me") } throws: { "\($0)".contains("--yes shop") }
        // As a run has it whose appliance was killed while its server's task was at work.
        let child = try await bed.catalogue.write { db in
            let child = try TaskBoard.plan(.failover, server: try db.server("web"), who: "me", in: db)
            var run = PlanRunRecord(id: nil, plan: "shop", kind: .failover, isGraceful: false, status: .running, who: "me", started: Date())
            try run.insert(db)
            let task = try TaskBoard.plan(.recoveryPlan, server: nil, parameters: TaskParameters(planRun: run.id), who: "me", in: db)
            run.task = task.id
            try run.update(db)
            for var step in PlanStepRecord.steps(of: PlanDefinition(name: "shop", groups: groups), run: run.id ?? 0, kind: .failover, without: []) {
                if step.number == 1 {
                    step.status = .running
                    step.tasks = [try #require(child.id)]
                }
                try step.insert(db)
            }
            return task
        }
        await bed.lifecycle.start(child)
        try await until("the other server's step") { try await statuses(bed)[1] == .done }
        #expect(try await statuses(bed) == [.running, .done, .waiting])
        try await bed.catalogue.write { db in try TaskBoard.finish(try #require(try TaskRecord.filter(Column("operation") == Trigger.failover).fetchOne(db)), error: "no luck", in: db) }
        let failed = try await ended(bed)
        #expect(failed.steps.map(\.status) == [.failed, .done, .waiting] && failed.steps[0].error?.contains("no luck") == true)
        // Nobody was asked for a second machine: the table says what to do first.
        _ = try await bed.lifecycle.resumePlan("shop", ResumePlan(), who: "me")
        let again = try await ended(bed)
        #expect(again.steps[0].error?.contains("change-recovery-point") == true && again.steps[0].tasks.count == 1)
        // Somebody has chosen another point.
        try await bed.catalogue.write { db in
            try db.execute(sql: "UPDATE server SET state = ? WHERE name = 'web'", arguments: [ServerState.failedOver.rawValue])
            try db.execute(sql: "UPDATE instance SET step = 'ready'")
        }
        _ = try await bed.lifecycle.resumePlan("shop", ResumePlan(), who: "me")
        #expect(try await ended(bed).status == .succeeded)
        await #expect { _ = try await bed.lifecycle.clearPlan("shop", who: "me") } throws: { "\($0)".contains("committed, server by server") }
        try await bed.end()
    }

    @Test("a run of drills is cleared whole; one that goes on is stopped by it")
    func clear() async throws {
        let bed = try LifecycleBed()
        _ = try await bed.lifecycle.createPlan(PlanDefinition(name: "shop", groups: [PlanGroup(name: "a", manualSteps: [PlanManualStep(text: "look")])]), who: "me")
        await #expect { _ = try await bed.lifecycle.clearPlan("shop", who: "me") } throws: { "\($0)".contains("never run") }
        let task = try await bed.lifecycle.runPlan("shop", RunPlan(kind: .drill), who: "me")
        try await until("the manual step") { try await run(bed).waitsFor != nil }
        _ = try await bed.lifecycle.clearPlan("shop", who: "me")
        #expect(try await ended(bed).status == .cleared)
        #expect(try await bed.lifecycle.taskView(try #require(task.id)).error == "the run was cleared by me")
        await #expect { _ = try await bed.lifecycle.clearPlan("shop", who: "me") } throws: { "\($0)".contains("cleared already") }
        try await bed.lifecycle.deletePlan("shop", Confirmation(confirm: "shop"), who: "me")
        try await bed.end()
    }
}

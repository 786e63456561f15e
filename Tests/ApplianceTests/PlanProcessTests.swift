import Foundation
import Testing

@testable import Appliance

/// A recovery plan over three servers, as a person uses it: real processes, real boots.
@Suite("Recovery plans of machines", .serialized, .enabled(if: Program.canBoot, Program.missing))
struct PlanProcessTests {
    @Test("three servers in two groups: drilled and cleared whole, then failed over with the appliance killed and a machine that does not boot at first")
    func plan() async throws {
        let sites = try TwoSites()
        try await sites.protect()
        let others = [try await another("db", of: sites), try await another("web", of: sites)]
        let plan = sites.directory.path + "/plan.json"
        func write(webCheck: String) throws {
            try """
                {"name": "all", "groups": [
                  {"name": "data", "servers": [{"server": "db", "machine": {"bootCheck": "serial:RUNS", "bootSecondsMax": 60}}], "waitSeconds": 1,
                   "scripts": [{"path": "/usr/bin/touch", "arguments": ["\(sites.directory.path)/turned"], "isRepeatable": true, "only": "failover"}]},
                  {"name": "front", "servers": [{"server": "shop", "machine": {"bootCheck": "serial:RUNS", "bootSecondsMax": 60}},
                                                {"server": "web", "machine": {"bootCheck": "\(webCheck)", "bootSecondsMax": 5}}],
                   "manualSteps": [{"text": "look at it"}]}]}
                """.write(toFile: plan, atomically: true, encoding: .utf8)
        }
        try write(webCheck: "serial:NEVER")
        #expect(try await sites.cli("plan create \(plan)").code == 0)
        #expect(try await sites.cli("plan create \(plan)").code == 3)
        let shown = sites.directory.path + "/shown.json"
        try await sites.cli("plan show all --json").output.write(toFile: shown, atomically: true, encoding: .utf8)
        #expect(try await sites.cli("plan edit \(shown)").code == 0)
        func run() async throws -> PlanRunView { try #require(try await sites.json([PlanRunView].self, "plan runs all").first) }

        // As a drill: the web's check fails, is corrected in a new run, and all is cleared.
        let failed = try await sites.cli("plan run all --as drill --wait")
        #expect(failed.code == 1 && failed.errors.contains("NEVER"), "\(failed)")
        #expect(try await run().steps.map(\.status) == [.done, .done, .skipped, .done, .failed, .waiting])
        let drills = try await run().steps[4].tasks
        #expect(try await sites.cli("plan resume all --wait").code == 1)
        #expect(try await run().steps[4].tasks.count == drills.count + 1, "its drill of before is cleared, and another one started")
        #expect(try await sites.cli("plan clear all --wait").code == 0)
        try sites.expectNoMachines()
        try write(webCheck: "serial:RUNS")
        #expect(try await sites.cli("plan edit \(plan)").code == 0)
        #expect(try await sites.cli("plan run all --as drill").code == 0)
        try await until("the manual step") { try await run().waitsFor == "look at it" }
        let drilled = try await sites.json([ServerView].self, "server list")
        #expect(drilled.allSatisfy { $0.drill == .testFailoverReady && $0.state == .replicating && $0.lastProven != nil })
        let task = try #require(try await run().task)
        #expect(try await sites.cli("plan continue all").code == 0)
        #expect(try await sites.cli("task show \(task) --wait").code == 0)
        #expect(try await sites.cli("plan show all").output.contains("succeeded"))
        #expect(!FileManager.default.fileExists(atPath: sites.directory.path + "/turned"))
        #expect(try await sites.cli("plan delete all --yes all").errors.contains("clear them first"))
        #expect(try await sites.cli("plan clear all --wait").code == 0)
        try sites.expectNoMachines()

        // The disaster.
        try write(webCheck: "serial:NEVER")
        #expect(try await sites.cli("plan edit \(plan)").code == 0)
        let preview = try await sites.cli("plan run all --as failover --preview")
        #expect(preview.code == 0 && ["db: replication of db stops", "web: replication of web stops", "touch", "look at it"].allSatisfy { preview.output.contains($0) }, "\(preview)")
        #expect(try await sites.cli("plan run all --as failover").code == 3)
        #expect(try await sites.cli("plan run all --as failover --yes db").code == 3)
        sites.endAgent(SIGKILL)
        for other in others { other.end(SIGKILL) }
        let began = try await sites.json(TaskView.self, "plan run all --as failover --yes all")
        try await until("machines of the second group") { try await run().steps[4].status == .running }
        sites.endAppliance(SIGKILL)
        try await sites.startAppliance()
        let ended = try await sites.cli("task show \(began.id) --wait")
        #expect(ended.code == 1 && ended.errors.contains("NEVER"), "\(ended)")
        #expect(try await run().steps.map(\.status) == [.done, .done, .done, .done, .failed, .waiting])
        #expect(FileManager.default.fileExists(atPath: sites.directory.path + "/turned"))
        let point = try #require(try await sites.json([TwoSites.Point].self, "recovery-point list web").last).id
        #expect(try await sites.cli("failover change-recovery-point web --yes web --point \(point) --boot-check serial:RUNS --boot-timeout 60 --wait").code == 0)
        let resumed = try await sites.json(TaskView.self, "plan resume all")
        try await until("the manual step again") { try await run().waitsFor == "look at it" }
        #expect(try await sites.cli("plan continue all").code == 0)
        #expect(try await sites.cli("task show \(resumed.id) --wait").code == 0)
        let over = try await sites.json([ServerView].self, "server list")
        #expect(over.allSatisfy { $0.state == .failedOver && $0.instances.count == 1 && $0.generation == 2 })
        #expect(try await sites.cli("plan clear all").code == 3)
        #expect(try await sites.cli("plan delete all --yes all").code == 0)
        withExtendedLifetime(others) {}
    }

    /// One more server of the pair, replicating; its agent.
    private func another(_ name: String, of sites: TwoSites) async throws -> Daemon {
        let directory = sites.directory.path
        try (BootSector.image("VERSION 1 RUNS") + Data(count: (4 << 20) - 4096)).write(to: URL(fileURLWithPath: "\(directory)/\(name).img"))
        let agent = try Daemon(
            ["agent", "run", "--tap", "nbd", "--state", "\(directory)/g-\(name)", "--socket-dir", "\(directory)/t-\(name)", "--disk", "vda=\(directory)/\(name).img"],
            logPath: "\(directory)/agent-\(name).log")
        let token = try #require(try await sites.json([TwoSites.EnrolledServer].self, "server add \(name) --pair pair").first).token
        let enrolled = try await sites.cli("agent enroll --token \(token) --state \(directory)/g-\(name)")
        try #require(enrolled.code == 0, "\(enrolled.errors)")
        try await until("Initialized") { try await sites.json(ServerView.self, "server show \(name)").state == .initialized }
        let started = try await sites.cli("replication start \(name) --epoch-ms 500 --cpus 1 --memory 64 --wait")
        try #require(started.code == 0, "\(started.errors)")
        return agent
    }
}

import Foundation
import GRDB
import Testing

@testable import Appliance

/// The appliance is killed and started again: what was begun is finished, what ran goes on.
@Suite("Killed appliance", .serialized, .enabled(if: Program.canBoot, Program.missing))
struct CrashTests {
    @Test("replication goes on by itself after SIGKILL of the appliance, the agent, and both")
    func replication() async throws {
        let sites = try TwoSites()
        try await sites.protect()
        for (killsAppliance, killsAgent) in [(true, false), (false, true), (true, true)] {
            if killsAppliance { sites.endAppliance(SIGKILL) }
            if killsAgent { sites.endAgent(SIGKILL) }
            if killsAppliance { try await sites.startAppliance() }
            if killsAgent { try sites.startAgent() }
            try await until("Replicating again") { try await sites.view().state == .replicating }
            try await sites.write(version: 7)
            let point = try await sites.point()
            let drill = try await sites.json(TaskView.self, "drill start shop --point \(point) --boot-check serial:RUNS --wait")
            #expect(drill.result?.bootLine == "VERSION 7 RUNS")
            #expect(try await sites.cli("drill clear shop --wait").code == 0)
        }
    }

    @Test("machines survive their appliance and are taken over", arguments: [SIGKILL, SIGTERM])
    func machines(signal: Int32) async throws {
        let sites = try TwoSites()
        try await sites.protect()
        #expect(try await sites.cli("drill start shop --boot-check serial:RUNS --wait").code == 0)
        #expect(try await sites.cli("failover start shop --yes shop --boot-check serial:RUNS --wait").code == 0)
        let before = try await sites.view().instances
        #expect(before.count == 2)
        sites.endAppliance(signal)
        for machine in before { #expect(QEMUProcess.find(name: "afterimage-\(machine.id)")?.pid == machine.pid) }
        try await sites.startAppliance()
        let after = try await sites.view()
        #expect(after.state == .failedOver && after.drill == .testFailoverReady)
        #expect(after.instances.map(\.pid) == before.map(\.pid))
        for machine in after.instances {
            #expect(machine.step == .ready)
            let read = try await Program.run(Program.qemuIO, ["-r", "-f", "raw", "-c", "read -v 32 32", "nbd+unix:///vda?socket=\(machine.nbdSocketPath)"])
            #expect(read.output.contains("VERSION.1.RUNS"), "\(read.output)\(read.errors)")
        }
        #expect(try await sites.cli("drill clear shop --wait").code == 0)
        #expect(try await sites.cli("failover commit shop --yes shop").code == 0)
        #expect(try await sites.cli("server remove shop --yes shop --delete-points --stop-machine --wait").code == 0)
        try sites.expectNoMachines()
    }

    @Test("a failover that was cut off is finished by the next start", arguments: [SIGKILL, SIGTERM])
    func failoverGoesOn(signal: Int32) async throws {
        let sites = try TwoSites()
        try await sites.protect()
        // A time limit that outlives the restart; the machine says nothing that matches.
        let task = try await sites.json(TaskView.self, "failover start shop --yes shop --boot-check serial:NEVER --boot-timeout 6")
        try await until("the machine to run") { try await sites.view().instances.first?.pid != nil }
        let pid = try await sites.view().instances.first?.pid
        sites.endAppliance(signal)
        try await sites.startAppliance()
        #expect(try await sites.view().state == .failoverInProgress)
        let ended = try await sites.cli("task show \(task.id) --wait")
        #expect(ended.code == 1 && ended.errors.contains("NEVER"))
        #expect(try await sites.view().instances.first?.pid == pid)
        #expect(try await sites.view().generation == 2)
    }

    @Test("a failover that was being rolled back when the appliance was killed is rolled back by the next start")
    func rollBackGoesOn() async throws {
        let sites = try TwoSites()
        try await sites.protect()
        let task = try await sites.json(TaskView.self, "failover start shop --yes shop --boot-check serial:NEVER --boot-timeout 600")
        try await until("the machine to run") { try await sites.view().instances.first?.pid != nil }
        sites.endAppliance(SIGKILL)
        // As the kill leaves it in the middle of the roll-back, which the test cannot hit.
        let catalogue = try DatabaseQueue(path: sites.state + "/catalogue.sqlite")
        try await catalogue.write { db in try db.execute(sql: "UPDATE instance SET step = 'removing'") }
        try catalogue.close()
        try await sites.startAppliance()
        let ended = try await sites.cli("task show \(task.id) --wait")
        #expect(ended.code == 1 && ended.errors.contains("rolled back"))
        try await until("Replicating again, under the new generation") { try await sites.view().state == .replicating }
        let view = try await sites.view()
        #expect(view.generation == 2 && view.instances.isEmpty)
        try sites.expectNoMachines()
    }

    @Test("killed at a random moment of drills and clears, the appliance ends in a state of the table with nothing left over")
    func randomKills() async throws {
        let sites = try TwoSites()
        try await sites.protect()
        var generator = SplitMix(seed: 20_261_123)
        for _ in 0..<6 {
            if try await sites.view().drill == nil {
                try await until("Replicating") { try await sites.view().state == .replicating }
                #expect(try await sites.cli("drill start shop --boot-check serial:RUNS").code == 0)
            } else {
                #expect(try await sites.cli("drill clear shop").code == 0)
            }
            try await Task.sleep(for: .milliseconds(Int(generator.next() % 700)))
            sites.endAppliance(SIGKILL)
            try await sites.startAppliance()
            #expect(try await sites.view().state.phase == .forward)
            try await until("the task's end") { try await sites.json([TaskView].self, "task list --limit 5").allSatisfy { $0.status != .running } }
            let view = try await sites.view()
            #expect(view.instances.count == (view.drill == nil ? 0 : 1))
        }
        if try await sites.view().drill != nil { #expect(try await sites.cli("drill clear shop --wait").code == 0) }
        try sites.expectNoMachines()
    }

    @Test("a failed-over machine whose QEMU dies is reported, and started again with what it had written")
    func machineDies() async throws {
        let sites = try TwoSites()
        try await sites.protect()
        #expect(try await sites.cli("failover start shop --yes shop --boot-check serial:RUNS --wait").code == 0)
        let machine = try #require(try await sites.view().instances.first)
        kill(try #require(machine.pid), SIGKILL)
        try await until("the report") { try await sites.view().instances.first?.step == .stopped }
        #expect(try await sites.view().next.contains("start-machine"))
        #expect(try await sites.cli("failover start-machine shop --wait").code == 0)
        let again = try #require(try await sites.view().instances.first)
        #expect(again.step == .ready && again.pid != machine.pid && again.id == machine.id)
        // The host reboots: QEMU and appliance go together.
        sites.endAppliance(SIGKILL)
        kill(try #require(again.pid), SIGKILL)
        try await sites.startAppliance()
        try await until("its start by the appliance") {
            let third = try await sites.view().instances.first
            return third?.step == .ready && third?.pid != nil && third?.pid != again.pid
        }
    }
}

import Foundation
import Testing

@testable import Appliance

/// The whole product as a person uses it: real processes, a real disk behind the tap, TLS, real boots.
@Suite("Walkthrough", .serialized, .enabled(if: Program.canBoot, Program.missing))
struct WalkthroughTests {
    private let check = "--boot-check serial:RUNS --boot-timeout 60"

    @Test("protect, drill, fail over, change the point, commit, remove")
    func walkthrough() async throws {
        let sites = try TwoSites()
        try await sites.protect()
        let first = try await sites.point()
        try await sites.write(version: 2)
        let second = try await sites.point()

        // A recovery point, read over NBD.
        let export = try await sites.json(ExportAnswer.self, "recovery-point export shop --point \(first)")
        let read = try await Program.run(Program.qemuIO, ["-r", "-f", "raw", "-c", "read -v 32 32", export.uris[0]])
        #expect(read.output.contains("VERSION.1.RUNS"), "\(read.output) \(read.errors)")
        #expect(try await sites.cli("recovery-point unexport shop --point \(first)").code == 0)
        #expect(try await sites.cli("recovery-point unexport shop --point \(first)").code == 4)

        // Drill, from the older point, beside running replication.
        #expect(try await sites.cli("status").output.contains("proven        never"))
        #expect(try await sites.cli("drill clear shop").code == 3)
        let drill = try await sites.json(TaskView.self, "drill start shop --point \(first) \(check) --wait")
        #expect(drill.result?.bootLine == "VERSION 1 RUNS" && drill.result?.recoveryPoint?.rawValue == first)
        #expect(try await sites.view().drill == .testFailoverReady)
        #expect(try await sites.view().state == .replicating)
        let proven = try #require(try await sites.view().lastProven)
        #expect(proven.kind == .drill && proven.recoveryPoint.rawValue == first && proven.bootLine == "VERSION 1 RUNS" && proven.rtoSeconds > 0)
        #expect(try await sites.cli("status").output.contains("a drill from \(first) booted in"))
        #expect(try await sites.cli("drill start shop").code == 3)
        #expect(try await sites.cli("server remove shop --yes shop --delete-points").code == 3)
        #expect(try await sites.cli("drill clear shop --wait").code == 0)
        let cleared = try await sites.view()
        #expect(cleared.drill == nil && cleared.lastProven == proven)
        try sites.expectNoMachines()

        // The disaster.
        sites.endAgent(SIGKILL)
        try await until("Replication Interrupted") { try await sites.view().state == .replicationInterrupted }
        #expect(try await sites.cli("failover start shop --yes shop --point rp-none").code == 4)
        let failover = try await sites.json(TaskView.self, "failover start shop --yes shop \(check) --wait")
        #expect(failover.result?.bootLine == "VERSION 2 RUNS" && failover.result?.generation == 2)
        #expect((failover.result?.rtoSeconds ?? 99) < 60)
        #expect(try await sites.view().state == .failedOver)
        let again = try await sites.cli("failover start shop --yes shop")
        #expect(again.code == 3 && again.errors.contains("failed over already"))

        // Another point, as often as wanted; "latest" only once.
        #expect(try await sites.cli("failover change-recovery-point shop --yes shop --point latest").code == 64)
        let changed = try await sites.json(TaskView.self, "failover change-recovery-point shop --yes shop --point \(first) --wait")
        #expect(changed.result?.bootLine == "VERSION 1 RUNS")
        let back = try await sites.json(TaskView.self, "failover change-recovery-point shop --yes shop --point \(second) --wait")
        #expect(back.result?.bootLine == "VERSION 2 RUNS")
        #expect(try await sites.view().instances.count == 1)

        // The source comes back: fenced.
        try sites.startAgent()
        try await until("the agent") { try await sites.view().agentConnected }
        #expect(try await sites.view().state == .failedOver)
        #expect(try await sites.cli("replication start shop").code == 3)

        #expect(try await sites.cli("failover commit shop --yes shop").code == 0)
        #expect(try await sites.cli("failover change-recovery-point shop --yes shop --point \(first)").code == 3)
        #expect(try await sites.cli("server remove shop --yes shop --delete-points").code == 3)
        #expect(try await sites.cli("server remove shop --yes shop --delete-points --stop-machine --wait").code == 0)
        #expect(try await sites.cli("server show shop").code == 4)
        try sites.expectNoMachines()
        let events = try await sites.json([EventRecord].self, "event list --limit 200")
        for what in [Trigger.drill, .clearDrill, .failover, .changeRecoveryPoint, .commitFailover, .unregister] {
            #expect(events.contains { $0.what == what.rawValue && $0.who == "administrator" }, "\(what.rawValue) is not in the audit log")
        }
    }
    private struct ExportAnswer: Decodable { var uris: [String] }

    @Test("a failed boot check is said with the console's words; another point may follow; the machine can be looked at")
    func bootCheckFails() async throws {
        let sites = try TwoSites()
        try await sites.protect()
        let first = try await sites.point()
        let drill = try await sites.cli("drill start shop --boot-check serial:NEVER --boot-timeout 2 --wait")
        #expect(drill.code == 1 && drill.errors.contains("VERSION 1 RUNS") && drill.errors.contains("NEVER"))
        #expect(try await sites.view().drill == .testFailoverInProgress)
        #expect(try await sites.view().instances.first?.step == .unproven)
        #expect(try await sites.cli("drill clear shop --wait").code == 0)

        let failover = try await sites.cli("failover start shop --yes shop --boot-check serial:NEVER --boot-timeout 2 --wait")
        #expect(failover.code == 1)
        #expect(try await sites.view().state == .failoverInProgress)
        #expect(try await sites.cli("failover start shop --yes shop").code == 3)
        #expect(try await sites.cli("failover commit shop").code == 3)
        let changed = try await sites.json(TaskView.self, "failover change-recovery-point shop --yes shop --point \(first) --boot-check serial:RUNS --boot-timeout 60 --wait")
        #expect(changed.status == .succeeded)
        #expect(try await sites.view().state == .failedOver)
    }

    @Test("a failover that cannot start its machine is rolled back and replication goes on under the new generation")
    func rolledBack() async throws {
        let sites = try TwoSites()
        try await sites.protect()
        sites.endAppliance(SIGTERM)
        // It is executable and answers --version, but it is no machine.
        let fake = sites.directory.path + "/qemu"
        try "#!/bin/sh\n[ \"$1\" = --version ] && echo 'QEMU emulator version 10.0.0' && exit 0\necho 'no memory for this' >&2\nexit 1\n"
            .write(toFile: fake, atomically: true, encoding: .utf8)
        chmod(fake, 0o755)
        try await sites.startAppliance(qemu: fake)
        try await until("Replicating again") { try await sites.view().state == .replicating }
        let failover = try await sites.cli("failover start shop --yes shop --wait")
        #expect(failover.code == 1 && failover.errors.contains("no memory for this"))
        try sites.expectNoMachines()
        try await until("Replicating under generation 2") {
            let view = try await sites.view()
            return view.state == .replicating && view.generation == 2
        }
        _ = try await sites.point()
    }

    @Test("without QEMU a failover is refused before anything is fenced")
    func withoutQEMU() async throws {
        let sites = try TwoSites()
        try await sites.protect()
        sites.endAppliance(SIGTERM)
        try await sites.startAppliance(qemu: "/nonexistent/qemu")
        try await until("Replicating again") { try await sites.view().state == .replicating }
        let failover = try await sites.cli("failover start shop --yes shop")
        #expect(failover.code == 3 && failover.errors.contains("/nonexistent/qemu"))
        #expect(try await sites.view().generation == 1)
    }
}

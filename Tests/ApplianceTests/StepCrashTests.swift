import Foundation
import Testing

@testable import Appliance

/// The appliance is killed after each step of each operation on a machine, in turn, as `FaultPoint` lists them, and started again: the operation
/// is done, or rolled back, and nothing of it is left over.
@Suite("Killed at every step", .serialized, .enabled(if: Program.canBoot, Program.missing))
struct StepCrashTests {
    @Test("of a failover, of its commit, of the server's removal", arguments: FaultPoint.passed(by: .failover).indices)
    func failover(number: Int) async throws {
        let sites = try TwoSites()
        try await sites.protect()
        let task = try await sites.crash(.failover, number) { try await sites.cli("failover start shop --yes shop --boot-check serial:RUNS") }
        #expect(task.status == .succeeded && task.result?.bootLine == "VERSION 1 RUNS", "\(task)")
        let view = try await sites.view()
        // Raised, and killed before that was written down: raised once more.
        #expect(view.state == .failedOver && view.generation == (FaultPoint.passed(by: .failover)[number] == .fenced ? 3 : 2))
        try await sites.expectOnly(view.instances)

        // There are fewer steps in these: each is hit by one of the arguments.
        let commit = try await sites.crash(.commitFailover, number) { try await sites.cli("failover commit shop --yes shop") }
        #expect(commit.status == .succeeded, "\(commit)")
        let committed = try await sites.view()
        #expect(committed.state == .failoverCommitted && committed.recoveryPointCount == 0)
        try await sites.expectOnly(committed.instances)

        let removal = try await sites.crash(.unregister, number) { try await sites.cli("server remove shop --yes shop --delete-points --stop-machine") }
        #expect(removal.status == .succeeded, "\(removal)")
        #expect(try await sites.cli("server show shop").code == 4)
        try await sites.expectOnly([])
    }

    @Test("of a drill and of its end")
    func drill() async throws {
        let sites = try TwoSites()
        try await sites.protect()
        for number in FaultPoint.passed(by: .drill).indices {
            let drill = try await sites.crash(.drill, number) { try await sites.cli("drill start shop --boot-check serial:RUNS") }
            #expect(drill.status == .succeeded && drill.result?.bootLine == "VERSION 1 RUNS", "\(drill)")
            let view = try await sites.view()
            #expect(view.drill == .testFailoverReady)
            try await sites.expectOnly(view.instances)
            let clear = try await sites.crash(.clearDrill, number) { try await sites.cli("drill clear shop") }
            #expect(clear.status == .succeeded, "\(clear)")
            #expect(try await sites.view().drill == nil)
            try await sites.expectOnly([])
        }
    }

    @Test("of a change of the recovery point")
    func changePoint() async throws {
        let sites = try TwoSites()
        try await sites.protect()
        let point = try await sites.point()
        #expect(try await sites.cli("failover start shop --yes shop --boot-check serial:RUNS --wait").code == 0)
        for number in FaultPoint.passed(by: .changeRecoveryPoint).indices {
            let before = try await sites.view().instances.map(\.id)
            let change = try await sites.crash(.changeRecoveryPoint, number) { try await sites.cli("failover change-recovery-point shop --yes shop --point \(point)") }
            #expect(change.status == .succeeded && change.result?.bootLine == "VERSION 1 RUNS", "\(change)")
            let view = try await sites.view()
            #expect(view.state == .failedOver && view.instances.map(\.id) != before)
            try await sites.expectOnly(view.instances)
        }
    }

    @Test("of a failover's roll-back", arguments: FaultPoint.rollBack)
    func rollBack(point: FaultPoint) async throws {
        let sites = try TwoSites()
        try await sites.protect()
        // It answers --version, but it is no machine.
        let fake = sites.directory.path + "/qemu"
        try "#!/bin/sh\n[ \"$1\" = --version ] && echo 'QEMU emulator version 10.0.0' && exit 0\nexit 1\n".write(toFile: fake, atomically: true, encoding: .utf8)
        chmod(fake, 0o755)
        let task = try await sites.crash(.failover, point, qemu: fake) { try await sites.cli("failover start shop --yes shop") }
        #expect(task.status == .failed)
        try await until("Replicating under the new generation") {
            let view = try await sites.view()
            return view.state == .replicating && view.generation == 2
        }
        try await sites.expectOnly([])
    }

    @Test("a variable that is set for another state directory does nothing, and one that says nonsense is refused")
    func arming() async throws {
        let sites = try TwoSites()
        try await sites.startAppliance(environment: [FaultPoint.variable: "/somewhere/else:Failover:fenced"])
        #expect(sites.appliance?.log.contains(FaultPoint.variable) == false)
        sites.endAppliance(SIGTERM)
        let refused = try Daemon(sites.applianceArguments(), environment: [FaultPoint.variable: sites.state + ":Failover:noon"], logPath: sites.directory.path + "/refused.log")
        try await until("its end") { !refused.process.isRunning }
        #expect(refused.log.contains("is for tests"))
    }
}

extension TwoSites {
    /// The operation's points in turn.
    func crash(_ operation: Trigger, _ number: Int, _ command: () async throws -> Program.Outcome) async throws -> TaskView {
        let points = FaultPoint.passed(by: operation)
        return try await crash(operation, points[number % points.count], command)
    }

    /// Has the appliance killed at that point of the operation that `command` begins, starts it again and waits for the task's end. `always` is true while
    /// the appliance is dead, and as long as it is waited for.
    func crash(
        _ operation: Trigger, _ point: FaultPoint, qemu: String? = TestQEMU.path, always: () -> Bool = { true }, _ command: () async throws -> Program.Outcome
    ) async throws -> TaskView {
        try await crashRequest(operation, point, qemu: qemu, always: always, command)
        var last: TaskView?
        try await until("the end of \(operation.rawValue), killed at \(point.rawValue)") {
            let holds = always()
            #expect(holds, "after \(point.rawValue) of \(operation.rawValue)")
            last = try await json([TaskView].self, "task list --limit 20").first { $0.operation == operation }
            return last.map { $0.status != .running } ?? false
        }
        return try #require(last)
    }

    func crashRequest(_ operation: Trigger, _ number: Int, _ command: () async throws -> Program.Outcome) async throws {
        let points = FaultPoint.passed(by: operation)
        try await crashRequest(operation, points[number % points.count], command)
    }

    /// As `crash`, of an operation that may be no task.
    func crashRequest(
        _ operation: Trigger, _ point: FaultPoint, qemu: String? = TestQEMU.path, always: () -> Bool = { true }, _ command: () async throws -> Program.Outcome
    ) async throws {
        let followed = try await view().state.phase == .forward
        endAppliance(SIGTERM)
        try await startAppliance(qemu: qemu, environment: [FaultPoint.variable: "\(state):\(operation.rawValue):\(point.rawValue)"])
        if followed { try await until("Replicating") { try await view().state == .replicating } }
        _ = try await command()
        let killed = try #require(appliance)
        try await until("the appliance's end at \(point.rawValue) of \(operation.rawValue)") { !killed.process.isRunning }
        #expect(killed.process.terminationReason == .uncaughtSignal && killed.process.terminationStatus == SIGKILL)
        let holds = always()
        #expect(holds, "at \(point.rawValue) of \(operation.rawValue)")
        try await startAppliance(qemu: qemu)
    }

    /// These machines, and nothing of any other: processes, sockets, files, forks.
    func expectOnly(_ machines: [InstanceView]) async throws {
        let ids = Set(machines.map(\.id))
        #expect(Set(try FileManager.default.contentsOfDirectory(atPath: state + "/instances")) == ids)
        let sockets = try FileManager.default.contentsOfDirectory(atPath: runtime)
        #expect(Set(sockets) == ids, "\(sockets)")
        let store = try await json(StatusView.self, "status").store
        // What a failed-over one was made of is marked for its way back.
        #expect(store.forkCount == machines.count && store.markCount == machines.count(where: { $0.kind == .failover }))
        #expect(Set(processes(naming: state)) == Set(machines.compactMap(\.pid)))
        #expect(machines.allSatisfy { $0.step == .ready })
    }

    /// Live ones that have the path on their command line, but for the daemons of the test.
    func processes(naming path: String) -> [pid_t] {
        ((try? FileManager.default.contentsOfDirectory(atPath: "/proc")) ?? []).compactMap { entry in
            guard let pid = pid_t(entry), pid != appliance?.process.processIdentifier, pid != agent?.process.processIdentifier, pid != rescue?.process.processIdentifier,
                let words = FileManager.default.contents(atPath: "/proc/\(pid)/cmdline"), String(decoding: words, as: UTF8.self).contains(path)
            else { return nil }
            return pid
        }
    }
}

import Foundation
import Testing

@testable import Appliance

/// Recovery machines with their settings, on real processes and real boots of a boot sector.
@Suite("Recovery machines", .serialized, .enabled(if: Program.canBoot, Program.missing))
struct MachineTests {
    private let check = "--boot-check serial:RUNS --boot-timeout 120"

    private func program(_ sites: TwoSites, _ name: String, _ text: String) throws -> String {
        let path = sites.directory.path + "/" + name
        try Data("#!/bin/sh\n\(text)\n".utf8).write(to: URL(fileURLWithPath: path))
        try FileManager.default.setAttributes([.posixPermissions: 0o700], ofItemAtPath: path)
        return path
    }

    private func log(_ sites: TwoSites, _ task: TaskView) async throws -> String {
        (try await sites.json(TaskView.self, "task show \(task.id)").log ?? []).map(\.line).joined(separator: "\n")
    }

    @Test("on SATA, with checks by a program of the host, a screenshot, and a console that is found")
    func drill() async throws {
        let sites = try TwoSites()
        try await sites.protect()
        let asks = try program(sites, "asks", "grep -q 'VERSION 1 RUNS' \"$AFTERIMAGE_CONSOLE\" && [ -S \"$AFTERIMAGE_VNC_SOCKET\" ] && echo \"$AFTERIMAGE_SERVER $AFTERIMAGE_KIND is up\"")
        let drill = try await sites.json(TaskView.self, "drill start shop --disk-bus sata --nic e1000e \(check) --boot-check script:\(asks) --wait")
        #expect(drill.result?.bootLine == "VERSION 1 RUNS; shop drill is up")
        let machine = try #require(try await sites.view().instances.first)
        let pid = try #require(machine.pid)
        let words = try #require(FileManager.default.contents(atPath: "/proc/\(pid)/cmdline")).split(separator: 0).map { String(decoding: $0, as: UTF8.self) }
        #expect(words.contains("q35") && words.contains { $0.hasPrefix("ide-hd,") })
        #expect(words.contains { $0.hasPrefix("e1000e,") })
        #expect(try await log(sites, drill).contains("BIOS, disks on SATA, network isolated (e1000e)"))

        let image = sites.directory.path + "/screen.png"
        #expect(try await sites.cli("task screenshot \(drill.id) \(image)").code == 0)
        #expect(FileManager.default.contents(atPath: image)?.prefix(4) == Data([0x89, 0x50, 0x4E, 0x47]))
        #expect(try await sites.cli("task screenshot 1 \(image)").code == 4)
        #expect(try await sites.cli("machine console shop").output.contains("VERSION 1 RUNS"))
        #expect(try await sites.cli("machine vnc shop").output.contains(machine.vncSocketPath))
        #expect(try await sites.cli("drill clear shop --wait").code == 0)
        try sites.expectNoMachines()
    }

    @Test("what this host cannot give is refused before anything is begun")
    func refusals() async throws {
        let sites = try TwoSites()
        try await sites.protect()
        for (options, words) in [
            ("--memory 900000", "--allow-overcommit"), ("--network user --forward 192.0.2.7:8080:80", "not an address of this host"),
            ("--network bridge --bridge nosuchbridge", "nosuchbridge"), ("--network bridge", "say which"), ("--network bridge --bridge-subnet 127.0.0.1/24", "overlaps"),
            ("--network bridge --bridge-subnet 10.213.7.1/24 --ip 10.213.8.9/24", "outside of the recovery network"), ("--ip keep", "not known"),
            ("--network none --ip 10.0.0.2/24", "needs a network"), ("--network none --boot-check tcp:22", "needs a network"), ("--boot-check script:/nowhere", "no script /nowhere"),
            ("--host-script /etc", "no script /etc"), ("--on-end restart", "for a failover"), ("--ip 10.0.0.0/24", "of the network itself"),
        ] {
            let outcome = try await sites.cli("drill start shop \(options)")
            #expect(outcome.code != 0 && outcome.errors.contains(words), "\(options): \(outcome.errors)")
        }
        let untouched = try await sites.view()
        #expect(untouched.drill == nil && untouched.instances.isEmpty)

        // Naming a program of the host takes the host's rights.
        let profile = sites.directory.path + "/operator.json"
        #expect(try await sites.cli("token create op --role operator --write-profile \(profile)").code == 0)
        for option in ["--host-script /bin/true", "--boot-check script:/bin/true"] {
            let outcome = try await sites.cli("drill start shop \(option) --profile \(profile)")
            #expect(outcome.code == 6 && outcome.errors.contains("administrators only"), "\(outcome.errors)")
        }
    }

    @Test("a script after failover that fails or hangs fails the task, and leaves the machine")
    func scripts() async throws {
        let sites = try TwoSites()
        try await sites.protect()
        let fails = try program(sites, "fails", "echo \"it is $AFTERIMAGE_SERVER\"; exit 3")
        let drill = try await sites.cli("drill start shop \(check) --host-script \(fails) --wait")
        #expect(drill.code == 1 && drill.errors.contains("the machine is ready") && drill.errors.contains("exit code 3"), "\(drill.errors)")
        #expect(drill.output.contains("it is shop"))
        #expect(try await sites.view().instances.first?.step == .ready)
        #expect(try await sites.view().drill == .testFailoverReady)
        #expect(try await sites.cli("drill clear shop --wait").code == 0)

        let hangs = try program(sites, "hangs", "echo begun; sleep 1000")
        let failover = try await sites.cli("failover start shop --yes shop \(check) --host-script \(hangs) --script-timeout 2 --wait")
        #expect(failover.code == 1 && failover.errors.contains("did not end within 2 s"), "\(failover.errors)")
        #expect(try await sites.view().state == .failedOver)
        let machine = try #require(try await sites.view().instances.first)
        #expect(machine.step == .ready && QEMUProcess.find(name: "afterimage-\(machine.id)")?.pid == machine.pid)

        // Nobody is at home in a boot sector.
        let script = sites.directory.path + "/script.sh"
        try Data("true".utf8).write(to: URL(fileURLWithPath: script))
        let point = try #require(machine.recoveryPoint)
        let changed = try await sites.cli("failover change-recovery-point shop --yes shop --point \(point) --script \(script) --script-timeout 3 --wait")
        #expect(changed.code == 1 && changed.errors.contains("qemu-guest-agent"), "\(changed.errors)")
        #expect(try await sites.view().state == .failedOver)
    }

    @Test("a machine that ends by itself is started again where that was asked for, and not without end")
    func restarts() async throws {
        let sites = try TwoSites()
        try await sites.protect()
        #expect(try await sites.cli("failover start shop --yes shop --on-end restart \(check) --wait").code == 0)
        for round in 1...3 {
            let before = try #require(try await sites.view().instances.first?.pid)
            kill(before, SIGKILL)
            try await until("start \(round) by the appliance") {
                let machine = try await sites.view().instances.first
                return machine?.step == .ready && machine?.pid != nil && machine?.pid != before
            }
        }
        let last = try #require(try await sites.view().instances.first?.pid)
        kill(last, SIGKILL)
        try await until("giving up") { try await sites.view().instances.first?.reason?.contains("is left now") == true }
        #expect(try await sites.view().instances.first?.step == .stopped)
        #expect(try await sites.cli("machine stop shop").code == 3)
        #expect(try await sites.cli("failover start-machine shop --wait").code == 0)
        #expect(try await sites.view().instances.first?.step == .ready)
    }

    @Test("a port that is in use is refused; the machine that is replaced does not stand in its own way")
    func ports() async throws {
        let sites = try TwoSites()
        try await sites.protect()
        let first = try await sites.point()
        let port = try #require(HostPorts.free())
        #expect(try await sites.cli("failover start shop --yes shop --network user --forward \(port):22 \(check) --wait").code == 0)
        let busy = #expect(throws: ApplianceError.self) { try HostPorts.check([PortForward(hostPort: port, guestPort: 22)]) }
        let busyText = "\(try #require(busy))"
        #expect(busyText.contains("in use"))
        let changed = try await sites.cli("failover change-recovery-point shop --yes shop --point \(first) --wait")
        #expect(changed.code == 0, "\(changed.errors)")
        #expect(try await sites.view().instances.first?.machine.forwards == [PortForward(hostPort: port, guestPort: 22)])
    }
}

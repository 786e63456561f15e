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

    @Test("one boots at once: the other's task says that it waits, and it boots after the first; also when the appliance starts")
    func turns() async throws {
        let sites = try TwoSites()
        try await sites.protect()
        sites.endAppliance(SIGTERM)
        try await sites.startAppliance(options: ["--boots-at-once", "1"])
        try await until("Replicating") { try await sites.view().state == .replicating }
        let waits = "one machine boots at once: waiting"
        let drill = try await sites.json(TaskView.self, "drill start shop --boot-check serial:NEVER --boot-timeout 10")
        try await until("the drill's machine") { try await sites.view().instances.first?.pid != nil }
        let failover = try await sites.json(TaskView.self, "failover start shop --yes shop \(check)")
        try await until("it waits") { try await log(sites, failover).contains(waits) }
        #expect(try await sites.view().instances.filter { $0.pid != nil }.count == 1)
        #expect(try await sites.cli("task show \(failover.id) --wait").code == 0)
        let (first, second) = (try await sites.json(TaskView.self, "task show \(drill.id)"), try await sites.json(TaskView.self, "task show \(failover.id)"))
        #expect(first.status == .failed && second.status == .succeeded)
        let ready = try #require(try await sites.view().instances.first { $0.kind == .failover }?.ready)
        let hasEnded = try #require(first.finished)
        #expect(hasEnded <= ready)
        #expect(try await sites.cli("drill clear shop --wait").code == 0)

        // The host goes, and comes back: the machine is started again in its turn, which the change of another one has.
        let before = try #require(try await sites.view().instances.first?.pid)
        sites.endAppliance(SIGKILL)
        kill(before, SIGKILL)
        try await sites.startAppliance(options: ["--boots-at-once", "1"])
        let start = try #require(try await sites.json([TaskView].self, "task list --limit 20").first { $0.operation == .startMachine })
        #expect(try await sites.cli("task show \(start.id) --wait").code == 0)
        let again = try #require(try await sites.view().instances.first)
        #expect(again.step == .ready && again.pid != before && again.reason == nil)
    }

    @Test("a boot check of a port that nobody takes fails; one in which the appliance was killed leaves no forward")
    func forwards() async throws {
        let sites = try TwoSites()
        try await sites.protect()
        let ended = try await sites.crash(.drill, .checkForwarded) { try await sites.cli("drill start shop --boot-check tcp:22 --boot-timeout 5") }
        #expect(ended.status == .failed && ended.error?.contains("port 22 of the machine took no connection") == true, "\(ended)")
        #expect(sites.appliance?.log.contains("was left by a boot check that was cut off: removed") == true)
        let machine = try #require(try await sites.view().instances.first)
        #expect(machine.step == .unproven)
        let pid = try #require(machine.pid)
        #expect(listeners(pid) == [])
        #expect(try await sites.cli("drill clear shop --wait").code == 0)
        try sites.expectNoMachines()
    }

    /// TCP ports on which a process listens.
    private func listeners(_ pid: pid_t) -> [String] {
        let directory = "/proc/\(pid)/fd"
        var sockets: Set<String> = []
        for entry in (try? FileManager.default.contentsOfDirectory(atPath: directory)) ?? [] {
            if let target = try? FileManager.default.destinationOfSymbolicLink(atPath: directory + "/" + entry) { sockets.insert(target) }
        }
        var ports: [String] = []
        for line in String(decoding: FileManager.default.contents(atPath: "/proc/net/tcp") ?? Data(), as: UTF8.self).split(separator: "\n") {
            let words = line.split(separator: " ").map(String.init)
            // 0A: it listens.
            if words.count > 9, words[3] == "0A", sockets.contains("socket:[" + words[9] + "]") { ports.append(words[1]) }
        }
        return ports
    }

    @Test("a kernel that panics fails the task in words, with what it said")
    func panics() async throws {
        let sites = try TwoSites()
        try await sites.protect()
        try await sites.write(version: 2, panics: true)
        let point = try await sites.point()
        let drill = try await sites.cli("drill start shop --point \(point) --boot-check serial:NEVER --boot-timeout 120 --wait")
        #expect(drill.code == 1 && drill.errors.contains("the machine's kernel panicked") && drill.errors.contains("VERSION 2 RUNS"), "\(drill.errors)")
        #expect(try await sites.view().drillReason?.contains("kernel panicked") == true)
        #expect(try await sites.cli("drill clear shop --wait").code == 0)
        // Once it is ready, its end is an event, with the same words.
        #expect(try await sites.cli("failover start shop --yes shop --point \(point) \(check)").code == 0)
        try await until("the report") { try await sites.view().instances.first?.reason?.contains("kernel panicked") == true }
    }

    @Test("without the right to set up network interfaces a bridge is refused, and all else works")
    func unprivileged() async throws {
        let sites = try TwoSites()
        try await sites.protect()
        sites.endAppliance(SIGTERM)
        try await sites.startAppliance(wrapper: ["/usr/bin/setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin"])
        try await until("Replicating") { try await sites.view().state == .replicating }
        for options in ["--bridge-subnet 10.213.7.1/24", "--bridge lo"] {
            let refused = try await sites.cli("drill start shop --network bridge \(options)")
            #expect(refused.code == 3 && refused.errors.contains("CAP_NET_ADMIN"), "\(refused.code): \(refused.errors)")
        }
        let untouched = try await sites.view()
        #expect(untouched.drill == nil && untouched.instances.isEmpty)
        #expect(try await sites.cli("drill start shop --network user \(check) --wait").code == 0)
        #expect(try await sites.cli("drill clear shop --wait").code == 0)
    }
}

import Foundation
import GRDB
import Replica

/// What is done with a machine that is ready: its IP address, and *Execute script after failover*. It stays ready whatever comes of these; it is the task that
/// fails. After a crash in between they are done again.
extension Lifecycle {
    func afterBoot(_ task: TaskRecord, _ result: TaskResult) async throws -> TaskResult {
        let instance = try await instance(task)
        if let address = instance.settings.address { await give(address, to: instance, task: task) }
        guard let script = instance.settings.script else { return result }
        await tasks.report(task, TaskProgress(step: "script after failover"))
        switch script.place {
        case .guest(let text): try await runInMachine(text, script.secondsMax, instance, task)
        case .host(let path): try await runOnHost(path, script.secondsMax, instance, task)
        }
        return result
    }

    /// What programs of the host are told of a machine.
    func facts(_ instance: InstanceRecord) async -> [String: String] {
        let server = try? await catalogue.read { db in try ServerRecord.fetchOne(db, key: instance.server) }
        var facts = [
            "SERVER": server?.name ?? "", "MACHINE": instance.id, "KIND": instance.kind.rawValue, "RECOVERY_POINT": instance.point?.rawValue ?? "",
            "NETWORK": instance.settings.network.rawValue, "FORWARDS": instance.settings.forwards.map(\.text).joined(separator: ","),
            "CONSOLE": machines.consolePath(instance.id), "QMP_SOCKET": machines.qmpSocketPath(instance.id), "AGENT_SOCKET": machines.agentSocketPath(instance.id),
            "VNC_SOCKET": machines.vncSocketPath(instance.id),
        ]
        facts["ADDRESS"] = instance.settings.address?.interface.addressText ?? machines.bridges.leasedAddress(instance)
        return Dictionary(uniqueKeysWithValues: facts.map { ("AFTERIMAGE_" + $0.key, $0.value) })
    }

    // MARK: IP address

    /// A machine that has the address already (built in, or by DHCP) is left alone; else its guest agent gives it to the card, until the next boot.
    func give(_ address: MachineAddress, to instance: InstanceRecord, task: TaskRecord) async {
        let wanted = address.interface
        let agent = machines.agent(instance.id)
        do {
            let interfaces = try await agent.interfaces(within: 10).filter { $0.name != "lo" }
            if let there = interfaces.first(where: { ($0.addresses ?? []).contains { $0.address == wanted.addressText } }) {
                await tasks.log(task, "the machine has its address \(wanted) on \(there.name)")
                return
            }
            let mac = instance.settings.cards.flatMap { address.card < $0.count ? $0[address.card] : nil }
            guard let card = interfaces.first(where: { mac != nil && $0.mac?.lowercased() == mac }) ?? interfaces.first(where: { $0.mac != nil && $0.mac != "00:00:00:00:00:00" }) else {
                throw ApplianceError.failed("it has no network card that could have it")
            }
            let gateway = address.gateway.map { IPv4Interface.text($0) } ?? ""
            let outcome = try await agent.run("/bin/sh", ["-c", Self.addressScript, "sh", card.name, wanted.addressText, "\(wanted.prefixLength)", IPv4Interface.text(wanted.mask), gateway], within: 30)
            guard outcome.exitCode == 0 else { throw ApplianceError.failed(outcome.output.trimmingCharacters(in: .whitespacesAndNewlines)) }
            await tasks.log(task, "the machine's guest agent gave \(card.name) the address \(wanted)\(gateway.isEmpty ? "" : ", gateway \(gateway)"), until the next boot")
        } catch {
            if Task.isCancelled { return }
            let hope = address.isKept ? "it has \(wanted) if that is set up in it, or by DHCP" : "it has \(wanted) only by DHCP"
            await tasks.log(task, "WARNING: the machine's address cannot be seen or set: \(error); \(hope)")
        }
    }

    /// $1 card, $2 address, $3 prefix length, $4 mask, $5 gateway or nothing.
    private static let addressScript = """
        if command -v ip >/dev/null; then
            ip link set dev "$1" up && ip -4 address flush dev "$1" scope global && ip address add "$2/$3" dev "$1" || exit 1
            [ -z "$5" ] || ip route replace default via "$5" dev "$1"
        elif command -v ifconfig >/dev/null; then
            ifconfig "$1" "$2" netmask "$4" up || exit 1
            [ -z "$5" ] || route add default gw "$5"
        else
            echo "there is neither ip nor ifconfig in it"; exit 1
        fi
        """

    // MARK: Script

    private func runInMachine(_ text: String, _ secondsMax: Int, _ instance: InstanceRecord, _ task: TaskRecord) async throws {
        await tasks.log(task, "script after failover: run in the machine, for at most \(secondsMax) s")
        let outcome: GuestAgent.Execution
        do { outcome = try await machines.agent(instance.id).run("/bin/sh", ["-s"], input: text, within: Double(secondsMax)) } catch {
            if Task.isCancelled { throw error }
            if case GuestAgentError.overdue = error {
                throw ApplianceError.failed("the machine is ready, but its script did not end within \(secondsMax) s, and was killed")
            }
            throw ApplianceError.failed("the machine is ready, but its script could not be run: \(error)")
        }
        await keep(outcome.output, task)
        if outcome.isTruncated { await tasks.log(task, "the script said more than its guest agent keeps") }
        guard outcome.exitCode == 0 else {
            throw ApplianceError.failed("the machine is ready, but its script " + (outcome.exitCode.map { "ended with exit code \($0)" } ?? "was ended by signal \(outcome.signal ?? 0)"))
        }
        await tasks.log(task, "the script ended with exit code 0")
    }

    private func runOnHost(_ path: String, _ secondsMax: Int, _ instance: InstanceRecord, _ task: TaskRecord) async throws {
        await tasks.log(task, "script after failover: \(path) on this host, for at most \(secondsMax) s")
        do {
            try await HostScript(path: path, environment: await facts(instance), limitSeconds: secondsMax).run { [tasks] line in await tasks.log(task, "  " + line) }
        } catch {
            if Task.isCancelled { throw error }
            throw ApplianceError.failed("the machine is ready, but \(error)")
        }
        await tasks.log(task, "\(path) ended with exit code 0")
    }

    /// Its last lines, in the task's log.
    private func keep(_ output: String, _ task: TaskRecord) async {
        for line in output.split(whereSeparator: \.isNewline).suffix(Self.outputLinesMax) { await tasks.log(task, "  " + line.prefix(Self.outputLineMax)) }
    }
    private static let outputLinesMax = 200
    private static let outputLineMax = 1000

    // MARK: Screenshot

    /// What the screen showed when the boot check ended, for whoever looks at the task.
    func keepScreenshot(_ instance: InstanceRecord, task: TaskRecord) async {
        guard let id = task.id, !instance.settings.bootCheck.parts.isEmpty else { return }
        do { try await machines.keepScreenshot(instance.id, task: id) } catch {
            if !Task.isCancelled { await tasks.log(task, "no screenshot: \(error)") }
        }
    }

    /// PNG.
    public func screenshot(task id: Int64) async throws -> Data {
        _ = try await taskView(id)
        guard let data = FileManager.default.contents(atPath: machines.screenshotPath(task: id)) else {
            throw ApplianceError.notFound("Task \(id) has no screenshot: there is one of each machine with a boot check, when that has ended.")
        }
        return data
    }
}

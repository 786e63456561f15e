import Foundation
import NIOCore

/// Boot checks: how it is seen that a machine is ready.
extension RecoveryHost {
    /// Waits until every check has passed; what they found, in one line; nil when QEMU's word was enough. Throws with the console's last
    /// lines when one does not pass in time, or the machine ends. `facts` are for programs of the host.
    func bootCheck(_ instance: InstanceRecord, facts: [String: String]) async throws -> String? {
        guard let machine = machines[instance.id] else { throw ApplianceError.failed("machine \(instance.id) is not running") }
        let checks = instance.settings.bootCheck.parts
        if checks.isEmpty {
            let state = try await machine.qmp.runState()
            guard state == "running" else { throw ApplianceError.failed("QEMU is up, but the machine is \(state)") }
            return nil
        }
        let deadline = ContinuousClock.now + .seconds(instance.settings.bootSecondsMax)
        var found: [String] = []
        for check in checks { found.append(try await pass(check, instance, machine, facts, until: deadline)) }
        return found.joined(separator: "; ")
    }

    /// Asks again and again. What an attempt leaves in `why` is what the error says.
    private func pass(_ check: BootCheck, _ instance: InstanceRecord, _ machine: Machine, _ facts: [String: String], until deadline: ContinuousClock.Instant)
        async throws -> String
    {
        var why = ""
        var console = try SerialFollower(path: consolePath(instance.id), pattern: check.pattern)
        while true {
            let alive = machine.process.isAlive
            let left = max(1, (deadline - .now) / .seconds(1))
            let line = try console.poll()
            let found: String? =
                switch check {
                case .serial: line
                case .agent: await agentAnswers(instance, left)
                case .tcp(let port): try await takesConnection(port, instance, machine, &why)
                case .script(let path): try await succeeds(path, instance, facts, left, &why)
                case .running, .all: preconditionFailure("not a check of its own")
                }
            if let found { return found }
            let tail = console.tail.isEmpty ? "the console is silent" : "the console's last lines:\n" + console.tail.joined(separator: "\n")
            guard alive else { throw ApplianceError.failed("the boot check did not pass: \(await ending(instance.id, machine)); \(tail)") }
            guard ContinuousClock.now < deadline else {
                throw ApplianceError.failed("the boot check did not pass: \(check.failure(why)) within \(instance.settings.bootSecondsMax) s; \(tail)")
            }
            try await Task.sleep(for: .milliseconds(check.pauseMilliseconds))
        }
    }

    // MARK: Guest agent

    private func agentAnswers(_ instance: InstanceRecord, _ secondsLeft: Double) async -> String? {
        let agent = agent(instance.id)
        guard await agent.answers(within: min(2, secondsLeft)) else { return nil }
        let interfaces = (try? await agent.interfaces(within: 3)) ?? []
        let addresses = interfaces.filter { $0.name != "lo" }.flatMap { interface in
            (interface.addresses ?? []).filter { $0.type == "ipv4" }.map { "\(interface.name) \($0.address)/\($0.prefixLength)" }
        }
        return "the guest agent answers" + (addresses.isEmpty ? "" : ": " + addresses.joined(separator: ", "))
    }

    // MARK: TCP

    private func takesConnection(_ port: UInt16, _ instance: InstanceRecord, _ machine: Machine, _ why: inout String) async throws -> String? {
        switch instance.settings.network {
        case .none:
            throw ApplianceError.failed("the boot check tcp:\(port) needs a network; this machine has none")
        case .bridge:
            guard let address = await bridgedAddress(instance), let number = IPv4Interface.address(address) else {
                why = "the machine's address is not known yet"
                return nil
            }
            why = "\(address) takes no connection"
            return await HostPorts.withConnection(to: number, port, seconds: 3) { "\(address):\(port) takes connections" }
        case .isolated, .user:
            return try await takesUserConnection(port, machine, &why)
        }
    }

    private func bridgedAddress(_ instance: InstanceRecord) async -> String? {
        if let address = instance.settings.address { return address.interface.addressText }
        if let leased = bridges.leasedAddress(instance) { return leased }
        let interfaces = (try? await agent(instance.id).interfaces(within: 2)) ?? []
        return interfaces.filter { $0.name != "lo" }.flatMap { $0.addresses ?? [] }.first { $0.type == "ipv4" }?.address
    }

    /// QEMU takes a connection to a forwarded port at once, whether or not anybody in the machine does; but it tells how far its own half has come. The
    /// forward is made for the check, on 127.0.0.1, and goes with it: from an isolated machine it leads nowhere.
    private func takesUserConnection(_ port: UInt16, _ machine: Machine, _ why: inout String) async throws -> String? {
        func monitor(_ line: String) async throws -> String {
            try await machine.qmp.execute("human-monitor-command", arguments: ["command-line": .string(line)]).string ?? ""
        }
        why = "nothing in the machine takes a connection"
        guard let own = HostPorts.free() else { return nil }
        let forward = "tcp:127.0.0.1:\(own)-:\(port)"
        let refusal = try await monitor("hostfwd_add net0 \(forward)")
        guard refusal.isEmpty else {
            why = "QEMU makes no forward: \(refusal.trimmingCharacters(in: .whitespacesAndNewlines))"
            return nil
        }
        FaultPoint.checkForwarded.reached()
        do {
            let found = try await HostPorts.withConnection(to: 0x7F00_0001, own, seconds: 3) { () async throws -> String? in
                for _ in 0..<20 {
                    let table = try await monitor("info usernet")
                    if UserNetwork.isEstablished(table, hostPort: own, guestPort: port) { return "port \(port) takes connections" }
                    try await Task.sleep(for: .milliseconds(100))
                }
                return nil
            }
            _ = try await monitor("hostfwd_remove net0 tcp:127.0.0.1:\(own)")
            return found ?? nil
        } catch {
            _ = try? await monitor("hostfwd_remove net0 tcp:127.0.0.1:\(own)")
            throw error
        }
    }

    /// Of a check in which the appliance was killed: QEMU would keep the forward for as long as the machine lives.
    func removeCheckForwards(_ instance: InstanceRecord, _ qmp: QMPClient) async {
        guard [.isolated, .user].contains(instance.settings.network) else { return }
        do {
            let table = try await qmp.execute("human-monitor-command", arguments: ["command-line": .string("info usernet")]).string ?? ""
            for port in UserNetwork.forwards(table, of: "127.0.0.1") where !instance.settings.forwards.contains(where: { $0.hostPort == port && $0.hostAddress == "127.0.0.1" }) {
                _ = try await qmp.execute("human-monitor-command", arguments: ["command-line": .string("hostfwd_remove net0 tcp:127.0.0.1:\(port)")])
                logger.info("machine \(instance.id): the forward of port \(port) was left by a boot check that was cut off: removed")
            }
        } catch {
            logger.warning("machine \(instance.id): forwards of a boot check that was cut off may be left: \(error)")
        }
    }

    // MARK: Programs of the host

    private func succeeds(_ path: String, _ instance: InstanceRecord, _ facts: [String: String], _ secondsLeft: Double, _ why: inout String) async throws -> String? {
        let (said, note) = AsyncStream<String>.makeStream()
        let failure: ApplianceError?
        do {
            try await HostScript(path: path, environment: facts, limitSeconds: max(1, Int(secondsLeft))).run { note.yield($0) }
            failure = nil
        } catch let error as ApplianceError { failure = error }
        note.finish()
        let lines = await said.reduce(into: [String]()) { $0.append($1) }
        guard let failure else { return lines.last ?? "\(path) ended with exit code 0" }
        why = "\(failure)" + (lines.isEmpty ? "" : ", and said: \(lines.suffix(10).joined(separator: "; "))")
        return nil
    }
}

/// What QEMU tells of the network that it plays.
enum UserNetwork {
    /// `info usernet`: "  TCP[ESTABLISHED]   25  127.0.0.1 40144  10.0.2.15  22  0  0"
    static func isEstablished(_ table: String, hostPort: UInt16, guestPort: UInt16) -> Bool {
        table.split(whereSeparator: \.isNewline).contains { line in
            let words = line.split(separator: " ")
            return words.count >= 6 && words[0] == "TCP[ESTABLISHED]" && words[3] == "\(hostPort)" && words[5] == "\(guestPort)"
        }
    }

    /// Ports of this address that are forwarded: "  TCP[HOST_FORWARD]   12  127.0.0.1  8022  10.0.2.15  22  0  0"
    static func forwards(_ table: String, of address: String) -> [UInt16] {
        table.split(whereSeparator: \.isNewline).compactMap { line in
            let words = line.split(separator: " ")
            return words.count >= 6 && words[0] == "TCP[HOST_FORWARD]" && words[2] == address ? UInt16(words[3]) : nil
        }
    }
}

extension BootCheck {
    /// Of the console's lines; what is not looked for there matches nothing.
    fileprivate var pattern: String { if case .serial(let pattern) = self { pattern } else { "(?!)" } }

    fileprivate var pauseMilliseconds: Int {
        switch self {
        case .serial: 25
        case .script: 1000
        default: 200
        }
    }

    fileprivate func failure(_ why: String) -> String {
        switch self {
        case .serial(let pattern): "no console line matched /\(pattern)/"
        case .agent: "no guest agent answered (qemu-guest-agent in the machine)"
        case .tcp(let port): "port \(port) of the machine took no connection (\(why))"
        default: "\(why);"
        }
    }
}

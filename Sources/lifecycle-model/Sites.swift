import Appliance
import Foundation
import Glibc

/// An appliance and its servers' agents as processes of their own on this computer, to be killed and started again. Everything lies below one directory.
actor Sites {
    nonisolated let directory: String
    nonisolated let servers: [String]
    private let program: String, qemu: String
    private let apiPort: UInt16
    private var appliance: Daemon?
    private var agents: [String: Daemon] = [:]
    /// Counts the appliance's lives: what was asked of one is not answered by the next.
    private(set) var life = 0

    static let diskBytes = 1 << 20

    init(directory: String, program: String, qemu: String, serverCount: Int, random: inout SplitMix) throws {
        (self.directory, self.program, self.qemu) = (directory, program, qemu)
        servers = (1...serverCount).map { "server-\($0)" }
        apiPort = try Ports.freePair(&random)
        for name in servers + ["copies"] { try FileManager.default.createDirectory(atPath: "\(directory)/\(name)", withIntermediateDirectories: true) }
        for name in servers {
            let disk = "\(directory)/\(name)/disk"
            guard FileManager.default.createFile(atPath: disk, contents: nil), truncate(disk, Self.diskBytes) == 0 else { throw Trouble("cannot make \(disk)") }
        }
    }

    nonisolated var state: String { directory + "/a" }
    nonisolated var runtime: String { directory + "/r" }
    nonisolated var profilePath: String { state + "/client.json" }
    nonisolated func tapSocket(_ server: String) -> String { "\(directory)/\(server)/t/vda.sock" }

    func startAppliance() async throws {
        let daemon = try Daemon(
            "the appliance", program,
            ["appliance", "--state", state, "--runtime-dir", runtime, "--listen", "127.0.0.1:\(apiPort)", "--link", "127.0.0.1:\(apiPort + 1)", "--qemu", qemu, "--accel", "tcg"],
            logPath: directory + "/appliance.log")
        appliance = daemon
        life += 1
        try await until("the appliance answers") {
            guard daemon.isRunning else { throw Trouble("the appliance ended at its start: \(daemon.tail)") }
            return await isAnswering()
        }
    }

    private func isAnswering() async -> Bool {
        do {
            let _: Ignored = try await APIClient.with(try ClientProfile.load(path: profilePath)) { client in try await client.get("/v1/status") }
            return true
        } catch { return false }
    }

    @discardableResult
    func endAppliance(_ signal: Int32) async throws -> Int32? {
        guard let daemon = appliance else { return nil }
        appliance = nil
        return try await daemon.end(signal)
    }

    func startAgent(_ server: String) throws {
        let home = "\(directory)/\(server)"
        agents[server] = try Daemon(
            "the agent of \(server)", program, ["agent", "run", "--tap", "nbd", "--state", home + "/g", "--socket-dir", home + "/t", "--disk", "vda=\(home)/disk"], logPath: home + "/agent.log")
    }

    func endAgent(_ server: String, _ signal: Int32) async throws {
        guard let daemon = agents[server] else { return }
        agents[server] = nil
        try await daemon.end(signal)
    }

    func enrol(_ server: String, token: String) async throws {
        let outcome = try await Daemon.run(program, ["agent", "enroll", "--token", token, "--state", "\(directory)/\(server)/g"])
        guard outcome.status == 0 else { throw Trouble("cannot enrol \(server): \(outcome.output)") }
    }

    /// At the end: the store is whole, and `inspect` lists no group.
    func storeReport() async throws -> (check: (status: Int32, output: String), inspect: (status: Int32, output: String)) {
        (try await Daemon.run(program, ["store", "check", state + "/store"]), try await Daemon.run(program, ["store", "inspect", state + "/store", "--json"]))
    }

    /// Whatever has happened, nothing stays behind.
    func end() {
        appliance?.killAtOnce()
        for agent in agents.values { agent.killAtOnce() }
        (appliance, agents) = (nil, [:])
        for machine in Machine.all(below: runtime) where machine.isAlive { kill(machine.pid, SIGKILL) }
    }
}

import Foundation

/// Both sites of one run as separate processes on loopback, with loop devices as disks; everything is named after the run and
/// removed by `tearDown`.
final class TestBed {
    let binary: String
    let directory: URL
    let profile: String
    private(set) var devices: [String] = []
    private var appliance: Process?
    private var agent: Process?
    private let apiPort = Int.random(in: 20_000..<28_000)
    private let linkPort = Int.random(in: 28_000..<32_000)

    struct Failure: Error, CustomStringConvertible { var description: String }

    init(binary: String) throws {
        self.binary = binary
        directory = URL(fileURLWithPath: (ProcessInfo.processInfo.environment["TMPDIR"] ?? "/tmp") + "/order-check.\(getpid())")
        try FileManager.default.createDirectory(at: directory, withIntermediateDirectories: true)
        profile = directory.appendingPathComponent("appliance/client.json").path
        setenv("AFTERIMAGE_PROFILE", profile, 1)
    }

    func path(_ name: String) -> String { directory.appendingPathComponent(name).path }
    func socket(_ disk: Int) -> String { path("s/d\(disk).sock") }

    func makeDisks(count: Int, megabytes: Int) throws {
        for i in 0..<count {
            let image = path("disk\(i).img")
            FileManager.default.createFile(atPath: image, contents: nil)
            guard truncate(image, off_t(megabytes) << 20) == 0 else { throw Failure(description: "cannot make \(image)") }
            devices.append(try output("losetup", ["--find", "--show", "--direct-io=on", image]).trimmingCharacters(in: .whitespacesAndNewlines))
        }
    }

    func startAppliance() throws {
        appliance = try start("appliance", [
            "appliance", "--state", path("appliance"), "--store", path("store"), "--listen", "127.0.0.1:\(apiPort)",
            "--link", "127.0.0.1:\(linkPort)", "--runtime-dir", path("r"),
        ])
    }

    func startAgent() throws {
        let disks = devices.enumerated().flatMap { ["--disk", "d\($0.offset)=\($0.element)"] }
        agent = try start("agent", ["agent", "run", "--state", path("agent"), "--socket-dir", path("s")] + disks)
    }

    func kill(_ which: String) {
        guard let process = which == "agent" ? agent : appliance else { return }
        Foundation.kill(process.processIdentifier, SIGKILL)
        process.waitUntilExit()
    }

    func stop(_ which: String) {
        guard let process = which == "agent" ? agent : appliance else { return }
        if process.isRunning { Foundation.kill(process.processIdentifier, SIGTERM) }
        process.waitUntilExit()
    }

    @discardableResult
    func afterimage(_ arguments: [String]) throws -> String {
        try output(binary, arguments)
    }

    func tearDown() {
        for process in [agent, appliance] {
            guard let process, process.isRunning else { continue }
            Foundation.kill(process.processIdentifier, SIGKILL)
            process.waitUntilExit()
        }
        for i in devices.indices {
            // Whose device it is now is asked, not remembered.
            let now = (try? output("losetup", ["--associated", path("disk\(i).img"), "--noheadings", "--output", "NAME"])) ?? ""
            for device in now.split(separator: "\n") { _ = try? output("losetup", ["--detach", String(device)]) }
        }
        try? FileManager.default.removeItem(at: directory)
    }

    private func start(_ name: String, _ arguments: [String]) throws -> Process {
        let log = path("\(name).log")
        if !FileManager.default.fileExists(atPath: log) { FileManager.default.createFile(atPath: log, contents: nil) }
        let handle = FileHandle(forWritingAtPath: log)!
        handle.seekToEndOfFile()
        let process = Process()
        process.executableURL = URL(fileURLWithPath: binary)
        process.arguments = arguments
        process.standardOutput = handle
        process.standardError = handle
        process.standardInput = FileHandle.nullDevice
        try process.run()
        return process
    }

    private func output(_ program: String, _ arguments: [String]) throws -> String {
        let process = Process()
        process.executableURL = URL(fileURLWithPath: "/usr/bin/env")
        process.arguments = [program] + arguments
        let pipe = Pipe()
        let errors = Pipe()
        process.standardOutput = pipe
        process.standardError = errors
        process.standardInput = FileHandle.nullDevice
        try process.run()
        let data = pipe.fileHandleForReading.readDataToEndOfFile()
        let errorData = errors.fileHandleForReading.readDataToEndOfFile()
        process.waitUntilExit()
        guard process.terminationStatus == 0 else {
            throw Failure(description: "\(program) \(arguments.joined(separator: " ")): \(String(decoding: errorData + data, as: UTF8.self))")
        }
        return String(decoding: data, as: UTF8.self)
    }
}

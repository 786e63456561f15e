import BlockTap
import Foundation

/// Both sites of one run as separate processes on loopback, with loop devices as disks; everything is named after the run and
/// removed by `tearDown`.
// Its processes and devices are changed by one thread; other threads read what stays.
final class TestBed: @unchecked Sendable {
    let binary: String
    let tap: Tap
    let fileSystem: FileSystem
    let drop: Drop?
    let directory: URL
    let profile: String
    private(set) var devices: [String] = []
    private var appliance: Process?
    private var agent: Process?
    private let apiPort = Int.random(in: 20_000..<28_000)
    private let linkPort = Int.random(in: 28_000..<32_000)

    struct Failure: Error, CustomStringConvertible { var description: String }

    enum Tap: String { case nbd, live }

    /// What is on the disks: nothing, or one on each, mounted, with the chains' blocks in a file of it.
    enum FileSystem: String {
        case none, ext4, xfs

        /// Besides the file.
        var megabytes: Int { self == .none ? 0 : self == .ext4 ? 24 : 320 }
        var makeCommand: [String] { self == .ext4 ? ["mkfs.ext4", "-q", "-F"] : ["mkfs.xfs", "-q", "-f"] }
        var checkCommand: [String] { self == .ext4 ? ["e2fsck", "-f", "-n"] : ["xfs_repair", "-n"] }
        var mountOptions: String { self == .xfs ? "nouuid" : "noatime" }
    }

    /// Events that the live tap's program is not to see, in bursts.
    enum Drop: String { case issues, completions }

    init(binary: String, tap: Tap, fileSystem: FileSystem, drop: Drop? = nil) throws {
        self.binary = binary
        self.tap = tap
        self.fileSystem = fileSystem
        self.drop = drop
        directory = URL(fileURLWithPath: (ProcessInfo.processInfo.environment["TMPDIR"] ?? "/tmp") + "/order-check.\(getpid())")
        try FileManager.default.createDirectory(at: directory, withIntermediateDirectories: true)
        profile = directory.appendingPathComponent("appliance/client.json").path
        setenv("AFTERIMAGE_PROFILE", profile, 1)
    }

    func path(_ name: String) -> String { directory.appendingPathComponent(name).path }
    func socket(_ disk: Int) -> String { path("s/d\(disk).sock") }
    func mountPoint(_ disk: Int) -> String { path("m\(disk)") }

    /// For a chain of writes to a disk.
    func target(_ disk: Int) -> (any ChainTarget)? {
        switch (tap, fileSystem) {
        case (.nbd, _): NBDConnection(socketPath: socket(disk))
        case (.live, .none): DirectFile(path: devices[disk], isSynchronous: false)
        case (.live, _): DirectFile(path: mountPoint(disk) + "/chains", isSynchronous: true)
        }
    }

    func makeDisks(count: Int, megabytes: Int) throws {
        for i in 0..<count {
            let image = path("disk\(i).img")
            FileManager.default.createFile(atPath: image, contents: nil)
            guard truncate(image, off_t(megabytes + fileSystem.megabytes) << 20) == 0 else { throw Failure(description: "cannot make \(image)") }
            devices.append(try output("losetup", ["--find", "--show", "--direct-io=on", image]).trimmingCharacters(in: .whitespacesAndNewlines))
            guard fileSystem != .none else { continue }
            try output(fileSystem.makeCommand[0], Array(fileSystem.makeCommand.dropFirst()) + [devices[i]])
            try mount(devices[i], at: mountPoint(i))
            // Written once, so that later writes change only what they are about.
            try output("dd", ["if=/dev/zero", "of=\(mountPoint(i))/chains", "bs=1M", "count=\(megabytes)", "conv=fsync", "status=none"])
        }
    }

    /// Where a disk is not what `image` is; in blocks. Only while nobody writes.
    func firstDifference(disk: Int, from image: UnsafeRawBufferPointer) throws -> Int? {
        let fd = open(devices[disk], O_RDONLY | O_CLOEXEC)
        guard fd >= 0 else { throw Failure(description: "cannot open \(devices[disk])") }
        defer { close(fd) }
        // What was read before the chains wrote past it is not what it holds.
        posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED)
        let piece = UnsafeMutableRawBufferPointer.allocate(byteCount: blockBytes, alignment: blockBytes)
        defer { piece.deallocate() }
        for block in 0..<image.count / blockBytes {
            guard pread(fd, piece.baseAddress!, blockBytes, off_t(block * blockBytes)) == blockBytes else { throw Failure(description: "\(devices[disk]) is not whole") }
            if memcmp(piece.baseAddress!, image.baseAddress! + block * blockBytes, blockBytes) != 0 { return block }
        }
        return nil
    }

    func mount(_ device: String, at directory: String) throws {
        try FileManager.default.createDirectory(atPath: directory, withIntermediateDirectories: true)
        try output("mount", ["-t", fileSystem.rawValue, "-o", fileSystem.mountOptions, device, directory])
    }

    /// A program that another thread is starting has our files open for a moment.
    private func unmount(_ directory: String) throws {
        for _ in 0..<100 {
            do { return _ = try output("umount", [directory]) } catch { usleep(50_000) }
        }
        try output("umount", [directory])
    }

    /// A loop device over `image` and its file system, mounted while `body` reads in it; checked afterwards.
    func withMounted<T>(_ image: String, _ body: (String) throws -> T) throws -> T {
        let device = try output("losetup", ["--find", "--show", image]).trimmingCharacters(in: .whitespacesAndNewlines)
        defer { _ = try? output("losetup", ["--detach", device]) }
        let directory = image + ".m"
        try mount(device, at: directory)
        let result: T
        do {
            result = try body(directory)
            try unmount(directory)
        } catch {
            _ = try? unmount(directory)
            throw error
        }
        try FileManager.default.removeItem(atPath: directory)
        try output(fileSystem.checkCommand[0], Array(fileSystem.checkCommand.dropFirst()) + [device])
        return result
    }

    func startAppliance() throws {
        appliance = try start("appliance", [
            "appliance", "--state", path("appliance"), "--store", path("store"), "--listen", "127.0.0.1:\(apiPort)",
            "--link", "127.0.0.1:\(linkPort)", "--runtime-dir", path("r"),
        ])
    }

    func startAgent() throws {
        let disks = devices.enumerated().flatMap { ["--disk", "d\($0.offset)=\($0.element)"] }
        agent = try start("agent", ["agent", "run", "--tap", tap.rawValue, "--state", path("agent"), "--socket-dir", path("s")] + disks + (drop.map { ["--drop-events", $0.rawValue] } ?? []))
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
        if tap == .live { _ = try? afterimage(["agent", "detach", "--state", path("agent")]) }
        for i in devices.indices {
            if fileSystem != .none { _ = try? output("umount", ["--lazy", mountPoint(i)]) }
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

    @discardableResult
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

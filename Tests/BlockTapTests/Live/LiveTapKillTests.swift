import Foundation
import Testing

@testable import BlockTap

/// The tap in a process of its own, which is killed at any moment: in a harvest, in a round, while it hands out, before an acknowledgement.
@Suite(
    .serialized,
    .enabled(if: LiveTapBed.isAvailable, "needs root, loop devices, a kernel with BTF, and the live tap's program (tools/test compiles it)"))
struct LiveTapKillTests {
    @Test("A process killed fifty times loses no write, and every proven point is exact")
    func killedAtAnyMoment() async throws {
        let bed = try LiveTapBed(disks: 2, bytes: 32 << 20)
        let writers = DependentWriters(bed, .init(pauseMicroseconds: 100))
        try writers.start()
        defer { writers.stop() }
        var holder = try HeldTap(bed)
        let instance = holder.instance
        #expect(!holder.wasAdopted)
        holder.tell("s")
        while case .carried(_, let hasMore) = try holder.carry(), hasMore { holder.tell("a") }
        holder.tell("a")
        var kills = 0
        var points = 0
        while kills < 50 {
            // Kill it while it works, a random time after it was told to, one time in two: in a round or in the verdict, or when it hands out; acknowledge or not.
            let isKilling = Bool.random()
            switch try holder.carry(killAfterMicroseconds: isKilling ? UInt32.random(in: 0..<(Bool.random() ? 6000 : 60_000)) : nil) {
            case .carried(let isExact, _):
                if isExact {
                    points += 1
                    let violations = writers.violations(in: bed.images)
                    try #require(violations.isEmpty, "after \(kills) kills, point \(points): \(violations.prefix(3))")
                }
                if Int.random(in: 0..<4) > 0 { holder.tell("a") }
            case .died: break
            }
            guard isKilling else { continue }
            kills += 1
            holder.kill()
            try await writers.progress(by: 20)                     // nobody looks on
            holder = try HeldTap(bed)
            try #require(holder.wasAdopted)
            #expect(holder.instance == instance)
        }
        writers.stop()
        #expect(writers.failures.withLock { $0 } == [])
        var isProven = false
        for _ in 0..<100 where !isProven {
            if case .carried(true, _) = try holder.carry() { isProven = true }
        }
        #expect(isProven)
        #expect(try bed.imagesEqualDisks())
        print("kills: \(kills), \(points) points, \(writers.writeCount) writes, \(holder.unseenCompletions) unseen completions")
        holder.kill()
    }
}

/// The freeze, and what becomes of it when its process is killed or hangs.
@Suite(
    .serialized,
    .enabled(if: LiveTapBed.isAvailable, "needs root, loop devices, a kernel with BTF, and the live tap's program (tools/test compiles it)"))
struct FileSystemFreezeTests {
    @Test("A process killed, or hanging, inside a freeze: the file system is thawed", arguments: [true, false])
    func thawedWithoutUs(isKilled: Bool) throws {
        let bed = try LiveTapBed(disks: 1, bytes: 32 << 20)
        let mount = try MountPoint()
        try Program.run(["mkfs.ext4", "-q", bed.loops[0].path])
        try Program.run(["mount", bed.loops[0].path, mount.path])
        let holder = try HeldTap(bed, environment: ["FREEZE": mount.path])
        holder.tell("z")
        #expect(try holder.isFrozen())
        let began = ContinuousClock.now
        if isKilled { holder.kill() }
        try Program.run(["timeout", "30", "touch", mount.path + "/a"])
        print("thawed \(ContinuousClock.now - began) after \(isKilled ? "the process was killed" : "freezing")")
        if !isKilled { holder.kill() }
    }

    @Test("A file system on a loop device whose file is on another one is frozen before that; in the other order, where a freeze cannot end, both are thawed")
    func loopOnAnother() throws {
        let bed = try LiveTapBed(disks: 1, bytes: 96 << 20)
        let outer = try MountPoint(), inner = try MountPoint()
        try Program.run(["mkfs.ext4", "-q", bed.loops[0].path])
        try Program.run(["mount", bed.loops[0].path, outer.path])
        let file = outer.path + "/inner"
        try Program.run(["truncate", "--size=32M", file])
        let device = try Program.run(["losetup", "--find", "--show", file]).trimmingCharacters(in: .whitespacesAndNewlines)
        defer { _ = try? Program.run(["losetup", "--detach", device]) }
        try Program.run(["mkfs.ext4", "-q", device])
        try Program.run(["mount", device, inner.path])
        defer { _ = try? inner.unmount() }
        let devices = Set([bed.loops[0].path, device].compactMap { DeviceNumber(path: $0) })
        #expect(MountedFileSystem.on(devices).map(\.mountPoint) == [inner.path, outer.path])
        let holder = try HeldTap(bed, environment: ["FREEZE": "\(outer.path):\(inner.path)"])
        defer { holder.kill() }
        holder.tell("z")
        #expect(try holder.isFrozen())
        try Program.run(["timeout", "30", "touch", inner.path + "/a", outer.path + "/a"])
    }
}

/// `live-tap-holder` on a bed's disks, its epochs applied to the bed's images.
final class HeldTap {
    enum Outcome { case carried(isExact: Bool, hasMore: Bool), died }

    let instance: String
    let wasAdopted: Bool
    private(set) var unseenCompletions: UInt64 = 0
    private let process = Process()
    private let input = Pipe()
    private let output = Pipe()
    private let bed: LiveTapBed

    struct Failure: Error, CustomStringConvertible { var description: String }

    init(_ bed: LiveTapBed, environment: [String: String] = [:]) throws {
        self.bed = bed
        process.environment = ProcessInfo.processInfo.environment.merging(environment) { $1 }
        signal(SIGPIPE, SIG_IGN)
        process.executableURL = try Self.executable()
        process.arguments = [bed.pins] + bed.loops.map(\.path)
        process.standardInput = input
        process.standardOutput = output
        try process.run()
        var frame = Frame()
        let fd = output.fileHandleForReading.fileDescriptor
        guard Self.read(fd, &frame) else { throw Failure(description: "the holder has died") }
        var text = [UInt8](repeating: 0, count: Int(frame.length))
        _ = text.withUnsafeMutableBytes { Self.read(fd, $0) }
        guard frame.kind == UInt8(ascii: "h") else { throw Failure(description: String(decoding: text, as: UTF8.self)) }
        wasAdopted = frame.number == 1
        instance = String(decoding: text, as: UTF8.self)
    }

    /// Beside the tests' bundle.
    private static func executable() throws -> URL {
        for argument in CommandLine.arguments {
            let candidate = URL(fileURLWithPath: argument).deletingLastPathComponent().appendingPathComponent("live-tap-holder")
            if FileManager.default.isExecutableFile(atPath: candidate.path) { return candidate }
        }
        throw Failure(description: "live-tap-holder is not beside the tests: \(CommandLine.arguments)")
    }

    func tell(_ command: Character) {
        var byte = command.asciiValue!
        _ = write(input.fileHandleForWriting.fileDescriptor, &byte, 1)
    }

    func kill() {
        Foundation.kill(process.processIdentifier, SIGKILL)
        process.waitUntilExit()
    }

    func isFrozen() throws -> Bool {
        var frame = Frame()
        return Self.read(output.fileHandleForReading.fileDescriptor, &frame) && frame.kind == UInt8(ascii: "f")
    }

    func carry(killAfterMicroseconds: UInt32? = nil) throws -> Outcome {
        tell("c")
        if let killAfterMicroseconds {
            usleep(killAfterMicroseconds)
            Foundation.kill(process.processIdentifier, SIGKILL)
        }
        let fd = output.fileHandleForReading.fileDescriptor
        var isExact = false
        var hasMore = false
        while true {
            var frame = Frame()
            guard Self.read(fd, &frame) else { return .died }
            switch Unicode.Scalar(frame.kind) {
            case "c":
                isExact = frame.disk == 1
                hasMore = frame.length == 1
            case "d":
                let target = UnsafeMutableRawBufferPointer(start: bed.images[Int(frame.disk)] + Int(frame.number), count: Int(frame.length))
                guard Self.read(fd, target) else { return .died }
            case "z": memset(bed.images[Int(frame.disk)] + Int(frame.number), 0, Int(frame.length))
            case "e":
                unseenCompletions = frame.number
                return .carried(isExact: isExact, hasMore: hasMore)
            case "x":
                var text = [UInt8](repeating: 0, count: Int(frame.length))
                _ = text.withUnsafeMutableBytes { Self.read(fd, $0) }
                throw Failure(description: String(decoding: text, as: UTF8.self))
            default: throw Failure(description: "frame of kind \(frame.kind)")
            }
        }
    }

    private struct Frame {
        var kind: UInt8 = 0
        var padding: (UInt8, UInt8, UInt8) = (0, 0, 0)
        var disk: UInt32 = 0
        var number: UInt64 = 0
        var length: UInt64 = 0
    }

    private static func read(_ fd: Int32, _ frame: inout Frame) -> Bool { withUnsafeMutableBytes(of: &frame) { read(fd, $0) } }

    private static func read(_ fd: Int32, _ bytes: UnsafeMutableRawBufferPointer) -> Bool {
        var done = 0
        while done < bytes.count {
            let count = Glibc.read(fd, bytes.baseAddress! + done, bytes.count - done)
            if count < 0 && errno == EINTR { continue }
            guard count > 0 else { return false }
            done += count
        }
        return true
    }
}

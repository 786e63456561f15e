import Foundation
import Glibc
import Synchronization
import Testing

@testable import BlockTap

/// Disks held still for a planned move.
@Suite(
    .serialized,
    .enabled(if: LiveTapBed.isAvailable, "needs root, loop devices, a kernel with BTF, and the live tap's program (tools/test compiles it)"))
struct LiveTapHoldTests {
    /// Two disks, the first with a mounted ext4.
    private struct Host {
        let bed: LiveTapBed
        let mount: MountPoint
        let log: SyncedLog

        init() async throws {
            bed = try LiveTapBed(disks: 2, bytes: 64 << 20)
            bed.configuration.skipsFreeSpace = false
            mount = try MountPoint()
            try Program.run(["mkfs.ext4", "-q", bed.loops[0].path])
            try Program.run(["mount", bed.loops[0].path, mount.path])
            try await bed.start()
            log = try SyncedLog(directory: mount.path)
            try await bed.fullSync()
            log.start()
            try await log.progress(by: 3)
        }

        /// Whether no record was appended for a while.
        func stands() async throws -> Bool {
            try await Task.sleep(for: .milliseconds(100))
            let before = log.synced
            try await Task.sleep(for: .milliseconds(300))
            return log.synced == before
        }

        func hold(limitMilliseconds: Int = LiveHold.limitMilliseconds) async throws -> LiveHold {
            try bed.group.hold(await bed.group.pauseFreezes(), limitMilliseconds: limitMilliseconds)
        }

        func writeToSecondDisk() throws { try Program.run(["dd", "if=/dev/zero", "of=\(bed.loops[1].path)", "bs=4096", "count=1", "oflag=direct", "status=none"]) }

        /// Whatever becomes of `body`, nothing stays frozen.
        static func with(_ body: (Host) async throws -> Void) async throws {
            let host = try await Host()
            do { try await body(host) } catch {
                try? host.end()
                throw error
            }
            try host.end()
        }

        private func end() throws {
            try bed.group.endLeftOverHold()
            log.stop()
            bed.kill()
            try mount.unmount()
        }
    }

    @Test("Held: nothing is appended, longer than the limit, while somebody asks; what was appended is on the disk; let go, it goes on")
    func held() async throws {
        try await Host.with { host in
            let limit = 2000
            // A busy machine may keep us from asking in time: then the end is right, and says nothing.
            for attempt in 1... {
                let hold = try await host.hold(limitMilliseconds: limit)
                defer { hold.end() }
                let began = ContinuousClock.now
                var last = began
                do {
                    while last - began < .milliseconds(limit + 500) {
                        try await Task.sleep(for: .milliseconds(50))
                        try hold.check()
                        last = .now
                    }
                    let count = host.log.synced
                    try await host.bed.carryUntilProven()
                    try hold.check(forGood: true)
                    #expect(host.log.synced == count)
                } catch {
                    guard attempt < 10, .now - last > .milliseconds(limit / 2) else { throw error }
                    continue
                }
                #expect(try host.bed.imagesEqualDisks())
                break
            }
            let count = host.log.synced
            while host.log.synced == count { try await Task.sleep(for: .milliseconds(10)) }
        }
    }

    @Test("Nobody asks any more: it ends by itself, and that is known")
    func forgotten() async throws {
        try await Host.with { host in
            let hold = try await host.hold(limitMilliseconds: 2000)
            let count = host.log.synced
            while host.log.synced <= count + 1 { try await Task.sleep(for: .milliseconds(10)) }
            let error = #expect(throws: SystemError.self) { try hold.check() }
            #expect(error?.what.contains("thawed") == true)
            #expect(throws: SystemError.self) { try hold.check(forGood: true) }
            hold.end()
        }
    }

    @Test("For good: it stays without anybody asking, and a process that comes later lets go")
    func forGood() async throws {
        try await Host.with { host in
            // Three times the limit: a busy machine has to come to the check within one.
            let hold = try await host.hold(limitMilliseconds: 3000)
            try hold.check(forGood: true)
            try await Task.sleep(for: .seconds(9))
            #expect(try await host.stands())
            let count = host.log.synced
            try host.bed.group.endLeftOverHold()
            while host.log.synced == count { try await Task.sleep(for: .milliseconds(10)) }
            hold.end()
        }
    }

    @Test("Written to past the file systems: that is known, and which disk it was", arguments: [false, true])
    func past(forGood: Bool) async throws {
        try await Host.with { host in
            let hold = try await host.hold()
            try hold.check()
            try host.writeToSecondDisk()
            let error = #expect(throws: SystemError.self) { try hold.check(forGood: forGood) }
            #expect(error?.what.contains(host.bed.group.disks[1].name) == true)
            hold.end()
        }
    }

    @Test("Written to past the file systems all the time: refused at once or at the next question, with that disk's name alone, and nothing is held")
    func pastAllTheTime() async throws {
        try await Host.with { host in
            let writer = try RestlessWriter(path: host.bed.loops[1].path)
            let error = await #expect(throws: SystemError.self) {
                let hold = try await host.hold()
                defer { hold.end() }
                try await writer.progress()
                try hold.check()
            }
            writer.stop()
            #expect(error?.what.contains(host.bed.group.disks[1].name) == true)
            #expect(error?.what.contains(host.bed.group.disks[0].name) == false)
            let count = host.log.synced
            while host.log.synced == count { try await Task.sleep(for: .milliseconds(10)) }
        }
    }

    @Test("A cut that would freeze the file systems for itself does not let go of them")
    func cutWhileHeld() async throws {
        try await Host.with { host in
            let hold = try await host.hold()
            _ = try await host.bed.carry(consistency: .fileSystem)
            #expect(try await host.stands())
            try hold.check(forGood: true)
            hold.end()
            let after = await host.bed.group.liveStatistics
            #expect(after.freezeCount == 0 && after.freezeFailedCount == 0)
        }
    }

    @Test("Thawed by somebody else: that is known")
    func thawedByOthers() async throws {
        try await Host.with { host in
            let hold = try await host.hold()
            try Program.run(["fsfreeze", "--unfreeze", host.mount.path])
            #expect(throws: SystemError.self) { try hold.check(forGood: true) }
            hold.end()
        }
    }

    @Test("Somebody else has frozen a file system: refused, with nothing held")
    func frozenAlready() async throws {
        try await Host.with { host in
            try Program.run(["fsfreeze", "--freeze", host.mount.path])
            await #expect(throws: SystemError.self) { _ = try await host.hold() }
            let count = host.log.synced
            try Program.run(["fsfreeze", "--unfreeze", host.mount.path])
            while host.log.synced == count { try await Task.sleep(for: .milliseconds(10)) }
        }
    }
}

/// Writes to a device, one write after the other, until it is stopped.
private final class RestlessWriter: @unchecked Sendable {
    private let device: BlockDevice
    private let count = Atomic<Int>(0)
    private let isStopping = Atomic<Bool>(false)
    private let done = DispatchSemaphore(value: 0)

    init(path: String) throws {
        device = try BlockDevice.open(path: path, access: .readWrite, exclusive: false)
        Thread { [self] in
            let memory = UnsafeMutableRawPointer.allocate(byteCount: blockBytes, alignment: blockBytes)
            defer { memory.deallocate() }
            memset(memory, 7, blockBytes)
            while !isStopping.load(ordering: .relaxed), pwrite(device.fd, memory, blockBytes, 0) == blockBytes { count.add(1, ordering: .relaxed) }
            // Whoever waits for progress need not wait for ever.
            count.store(.max / 2, ordering: .relaxed)
            done.signal()
        }.start()
    }

    func progress() async throws {
        let goal = count.load(ordering: .relaxed) + 2
        while count.load(ordering: .relaxed) < goal { try await Task.sleep(for: .milliseconds(1)) }
    }

    func stop() {
        isStopping.store(true, ordering: .relaxed)
        done.wait()
    }
}

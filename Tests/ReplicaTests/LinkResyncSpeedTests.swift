import BlockTap
import Foundation
import Logging
import Testing

@testable import Replica

/// A resync of an unchanged replica against a full sync, of the same file on the same machine, through the NBD tap and TLS on loopback.
/// AFTERIMAGE_RESYNC_GIB=4 runs it, and needs twice as much space in TMPDIR.
@Suite(.timeLimit(.minutes(30))) struct LinkResyncSpeedTests {
    static let gibibytes = Int(ProcessInfo.processInfo.environment["AFTERIMAGE_RESYNC_GIB"] ?? "") ?? 0

    @Test(.enabled(if: gibibytes > 0, "AFTERIMAGE_RESYNC_GIB is not set"))
    func unchangedReplica() async throws {
        let appliance = try TestAppliance(timing: LinkTiming())
        try await appliance.start()
        let path = appliance.directory.path + "/disk"
        try fill(path)
        let loop = try BlockTap.EventLoop(name: "tap-speed")
        let device = try BlockDevice.open(path: path, access: .readWrite, exclusive: true)
        for round in 0..<4 {
            let group = await TapGroup(loop: loop, disks: [("root", device)], instance: UUID().uuidString)
            let sender = try appliance.sender(group, epochMilliseconds: 1000)
            let points = appliance.store.recoveryPoints(TestAppliance.group).count
            let begin = ContinuousClock.now
            var used = Self.processorSeconds()
            sender.start()
            while appliance.store.recoveryPoints(TestAppliance.group).count == points { try await Task.sleep(for: .milliseconds(2)) }
            let seconds = (ContinuousClock.now - begin) / .seconds(1)
            used = Self.processorSeconds() - used
            await sender.stop()
            let status = sender.status
            print("round \(round): \(seconds) s, \(used) s of processor, \(status.sentBytes) bytes sent, \(status.resyncComparedBytes) compared, \(status.resyncEqualBytes) equal")
            if round > 0 { #expect(status.sentBytes == 0 && status.resyncEqualBytes == UInt64(Self.gibibytes) << 30) }
        }
        loop.shutdown()
        await appliance.stop()
    }

    private func fill(_ path: String) throws {
        let file = open(path, O_RDWR | O_CREAT, 0o600)
        defer { close(file) }
        var random = SeededRandom(seed: 1)
        for _ in 0..<Self.gibibytes << 6 {
            let piece = noise(16 << 20, &random)
            try #require(piece.withUnsafeBytes { write(file, $0.baseAddress!, $0.count) } == piece.count)
        }
        fsync(file)
    }

    private static func processorSeconds() -> Double {
        var usage = rusage()
        getrusage(__rusage_who_t(RUSAGE_SELF.rawValue), &usage)
        func seconds(_ time: timeval) -> Double { Double(time.tv_sec) + Double(time.tv_usec) / 1e6 }
        return seconds(usage.ru_utime) + seconds(usage.ru_stime)
    }
}

import BlockTap
import Foundation
import Glibc
import Testing

@testable import Replica

/// A process that is killed at any moment: what it had acknowledged is there.
@Suite struct StoreKillTests {
    static let size = 64 * 4096

    /// The disk after `epoch`: each block carries the last epoch that wrote it. Epoch 1 is empty.
    static func image(after epoch: UInt64) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: size)
        guard epoch > 1 else { return bytes }
        for number in 2...epoch { for block in blocks(number) { bytes.replaceSubrange(block * 4096..<(block + 1) * 4096, with: repeatElement(UInt8(truncatingIfNeeded: number), count: 4096)) } }
        return bytes
    }

    static func blocks(_ epoch: UInt64) -> [Int] {
        var random = SeededRandom(seed: epoch)
        return (0..<8).map { _ in random.below(64) }
    }

    /// Receives epochs and writes to a fork for ever; what is durable goes into the file `acknowledged`, a byte per epoch ('e') and
    /// per flushed fork write ('f').
    static func work(in path: String, killAfterMicroseconds: UInt32) throws -> Never {
        let store = try ReplicaStore(storage: FileStorage(directory: path + "/store"), options: smallOptions, logger: quiet)
        try store.createGroup(webGroup, volumes: [spec("vda", bytes: UInt64(size))])
        let log = open(path + "/acknowledged", O_WRONLY | O_CREAT | O_APPEND, 0o600)
        let before = try String(contentsOfFile: path + "/acknowledged", encoding: .utf8)
        var epoch = store.group(webGroup)!.lastDurable?.epoch.rawValue ?? 0
        var writes = UInt64(before.filter { $0 == "f" }.count)
        let id = ForkID("f")
        if store.forks().isEmpty {
            if epoch == 0 {
                _ = try store.begin(1).seal()
                epoch = 1
            }
            try store.fork(id, of: webGroup, at: store.recoveryPoints(webGroup)[0].id, purpose: "")
        }
        let fork = try store.openFork(id, volume: 0)
        Thread.detachNewThread {
            usleep(killAfterMicroseconds)
            kill(getpid(), SIGKILL)
        }
        while true {
            epoch += 1
            let writer = try store.begin(epoch)
            for block in blocks(epoch) { try writer.append(volume: 0, offsetBytes: UInt64(block) * 4096, [UInt8](repeating: UInt8(truncatingIfNeeded: epoch), count: 4096)) }
            _ = try writer.seal()
            write(log, "e", 1)
            writes += 1
            try [UInt8](repeating: UInt8(truncatingIfNeeded: writes), count: 4096).withUnsafeBytes { try fork.write(offsetBytes: (writes % 64) * 4096, $0) }
            try fork.flush()
            write(log, "f", 1)
        }
    }

    @Test func whatWasAcknowledgedSurvivesTenKills() async throws {
        let directory = TemporaryDirectory()
        var random = SeededRandom(seed: 70)
        for round in 0..<10 {
            let path = directory.path
            let delay = UInt32(random.below(60_000))
            await #expect(processExitsWith: .signal(SIGKILL)) { [path = path as String, delay = delay as UInt32] in try StoreKillTests.work(in: path, killAfterMicroseconds: delay) }
            let text = try String(contentsOfFile: path + "/acknowledged", encoding: .utf8)
            let store = try ReplicaStore(storage: FileStorage(directory: path + "/store"), options: smallOptions, logger: quiet)
            let points = store.recoveryPoints(webGroup)
            if round > 0 { #expect(points.count >= text.filter { $0 == "e" }.count) }
            for point in points.suffix(3) {
                let expected = Self.image(after: point.epoch.rawValue)
                #expect(try store.image(point.id, volume: 0) == expected, "round \(round)")
            }
            if let fork = store.forks().first {
                let volume = try store.openFork(fork.id, volume: 0)
                let image = try volume.image()
                let flushed = text.filter { $0 == "f" }.count
                // One more may have been flushed than was noted.
                #expect((flushed...flushed + 1).contains { count in
                    var expected = [UInt8](repeating: 0, count: Self.size)
                    if count > 0 { for write in max(1, count - 63)...count { expected.replaceSubrange((write % 64) * 4096..<(write % 64 + 1) * 4096, with: repeatElement(UInt8(truncatingIfNeeded: write), count: 4096)) } }
                    return expected == image
                }, "round \(round)")
                try volume.close()
            }
            store.close()
        }
        #expect(try String(contentsOfFile: directory.path + "/acknowledged", encoding: .utf8).count > 10)
    }
}

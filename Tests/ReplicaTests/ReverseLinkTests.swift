import BlockTap
import Foundation
import Glibc
import Testing

@testable import Replica

/// A fork sent back onto disks, over real connections.
@Suite(.timeLimit(.minutes(20))) struct ReverseLinkTests {
    static let specs = [spec("vda", bytes: 8 << 20), spec("vdb", bytes: (1 << 20) + 512)]

    /// Disks as files, and what stands in for a machine.
    final class Scene {
        let appliance: TestAppliance
        let fork = ForkID("failover-1")
        var images: [[UInt8]]
        var volumes: [ForkVolume] = []
        var random: SeededRandom
        let paths: [String]
        let source: ForkSource
        let offer: ReverseOffer

        init(seed: UInt64, timing: LinkTiming = TestAppliance.quick, original: (inout [[UInt8]], inout SeededRandom) -> Void = { _, _ in }) throws {
            random = SeededRandom(seed: seed)
            appliance = try TestAppliance(timing: timing)
            let store = appliance.store
            try store.createGroup(TestAppliance.group, volumes: ReverseLinkTests.specs)
            images = ReverseLinkTests.specs.map { [UInt8](repeating: 0, count: Int($0.geometry.sizeBytes)) }
            let writer = try store.begin(1, group: TestAppliance.group)
            for disk in images.indices {
                let bytes = noise(images[disk].count / 2 / 4096 * 4096, &random)
                try writer.append(volume: disk, offsetBytes: 0, bytes)
                images[disk].replaceSubrange(0..<bytes.count, with: bytes)
            }
            let point = try writer.seal()!
            try store.fork(fork, of: TestAppliance.group, at: point.id, purpose: "failover")
            volumes = try images.indices.map { [fork] in try store.openFork(fork, volume: $0) }
            var disks = images
            original(&disks, &random)
            paths = images.indices.map { [directory = appliance.directory.path] in "\(directory)/disk-\($0)" }
            for (path, bytes) in zip(paths, disks) { try Data(bytes).write(to: URL(fileURLWithPath: path)) }
            source = try ForkSource(store: store, fork: fork, instance: "r-\(seed)", logger: appliance.log.logger)
            let order = ReplicationOrder(group: TestAppliance.group, generation: Generation(1), disks: ReverseLinkTests.specs.map(\.name), epochMilliseconds: 5)
            offer = ReverseOffer(server: ServerID("web-1"), source: source, order: order, logger: appliance.log.logger)
        }

        func target() throws -> DiskTarget {
            try DiskTarget(disks: zip(ReverseLinkTests.specs, paths).map { spec, path in
                .init(spec: spec, device: try BlockDevice.open(path: path, access: .readWrite, exclusive: true, patienceMilliseconds: 5000))
            })
        }

        func receiver(_ target: DiskTarget, port: Int? = nil, generation: Generation = Generation(1)) throws -> ReverseReceiver {
            ReverseReceiver(
                endpoint: try appliance.endpoint(port: port), group: TestAppliance.group, generation: generation, specs: ReverseLinkTests.specs, target: target,
                logger: appliance.log.logger, timing: appliance.timing)
        }

        func write(blocks: Int = 4) throws {
            let disk = random.below(images.count)
            let start = random.below(images[disk].count / 512) * 512
            let bytes = noise(min(images[disk].count - start, blocks * 4096), &random)
            try bytes.withUnsafeBytes { try volumes[disk].write(offsetBytes: UInt64(start), $0) }
            images[disk].replaceSubrange(start..<start + bytes.count, with: bytes)
        }

        func disks() throws -> [[UInt8]] { try paths.map { Array(try Data(contentsOf: URL(fileURLWithPath: $0))) } }

        /// A cut that is made from now on is acknowledged.
        func untilSent() async throws {
            let now = appliance.store.options.now()
            try await eventually("a later cut") { offer.cutNow(); return offer.status.lastRecoveryPointNanoseconds > now }
        }

        func end() async throws {
            await appliance.server.endReverse(of: TestAppliance.group, reason: "the test ends")
            source.close()
            for volume in volumes { try volume.close() }
            await appliance.stop()
        }
    }

    @Test func onlyWhatDiffersTravels() async throws {
        // The original went on after the failover, and so did the fork.
        let scene = try Scene(seed: 1) { disks, random in
            for block in [3, 4, 700, 2000] { disks[0].replaceSubrange(block * 4096..<(block + 1) * 4096, with: noise(4096, &random)) }
        }
        for _ in 0..<20 { try scene.write() }
        try await scene.appliance.start()
        await scene.appliance.server.offerReverse(scene.offer)
        let before = try scene.disks()
        let differing = zip(before, scene.images).reduce(0) { sum, pair in
            sum + stride(from: 0, to: pair.0.count, by: 4096).count { pair.0[$0..<min($0 + 4096, pair.0.count)] != pair.1[$0..<min($0 + 4096, pair.1.count)] }
        }
        let target = try scene.target()
        let receiver = try scene.receiver(target)
        receiver.start()
        try await scene.untilSent()
        #expect(try scene.disks() == scene.images)
        let status = scene.offer.status
        #expect(status.phase == .replicating && status.resyncComparedBytes >= 9 << 20)
        #expect(target.figures.writtenBytes <= UInt64(differing * 4096) && target.figures.writtenBytes > 0)
        #expect(Double(status.sentBytes) <= 1.1 * Double(differing * 4096))
        // And then what is written.
        let sent = target.figures.writtenBytes
        try scene.write(blocks: 1)
        try await scene.untilSent()
        #expect(try scene.disks() == scene.images)
        #expect(target.figures.writtenBytes - sent <= 2 * 4096)
        await receiver.stop()
        #expect(!target.figures.isInTheMiddle && target.figures.position.instance == "r-1")
        target.close()
        try await scene.end()
    }

    @Test(arguments: [2, 3, 4] as [UInt64])
    func theDisksEqualTheForkAtEachAcknowledgedCutWhateverHappensToTheLine(seed: UInt64) async throws {
        let scene = try Scene(seed: seed) { disks, random in disks[0] = noise(disks[0].count, &random) }
        try await scene.appliance.start()
        await scene.appliance.server.offerReverse(scene.offer)
        let proxy = try await HurtfulProxy.start(to: scene.appliance.port) { number in
            number < 12 ? .cut(afterBytes: 20_000 + number * number * 40_000) : .none
        }
        var target: DiskTarget? = try scene.target()
        var receiver: ReverseReceiver? = try scene.receiver(target!, port: proxy.port)
        receiver?.start()
        for step in 0..<12 {
            for _ in 0..<5 { try scene.write() }
            if step % 5 == 4 {
                // The agent is gone, and somebody writes to its disks: a new one compares.
                await receiver?.stop()
                target?.close()
                (receiver, target) = (nil, nil)
                target = try scene.target()
                receiver = try scene.receiver(target!, port: proxy.port)
                receiver?.start()
            }
            try await scene.untilSent()
            #expect(try scene.disks() == scene.images, "step \(step)")
        }
        await receiver?.stop()
        target?.close()
        await proxy.stop()
        try await scene.end()
    }

    @Test func whoeverIsNotMeantIsRefusedAndTold() async throws {
        let scene = try Scene(seed: 5)
        try await scene.appliance.start()
        let target = try scene.target()
        let early = try scene.receiver(target)
        early.start()
        try await eventually("told that nothing is sent back") { early.status.reason?.contains("reverse replication is not running") == true }
        await early.stop()
        await scene.appliance.server.offerReverse(scene.offer)
        let old = try scene.receiver(target, generation: Generation(0))
        old.start()
        try await eventually("fenced") { old.status.phase == .fenced }
        #expect(old.status.reason?.contains("generation 1") == true)
        await old.stop()
        // Another server's agent.
        let other = ReverseReceiver(
            endpoint: try scene.appliance.endpoint(server: ServerID("web-2")), group: TestAppliance.group, generation: Generation(1), specs: Self.specs, target: target,
            logger: scene.appliance.log.logger, timing: scene.appliance.timing)
        other.start()
        try await eventually("refused") { other.status.reason?.contains("nothing is sent back to server web-2") == true }
        await other.stop()
        #expect(target.figures.writtenBytes == 0 && !target.figures.isInTheMiddle)
        target.close()
        try await scene.end()
    }

    @Test func disksThatCannotTakeItAreRefusedBeforeAnythingIsWritten() throws {
        let directory = TemporaryDirectory()
        let path = directory.path + "/small"
        FileManager.default.createFile(atPath: path, contents: nil)
        truncate(path, 1 << 20)
        let device = try BlockDevice.open(path: path, access: .readWrite, exclusive: true)
        #expect { _ = try DiskTarget(disks: [.init(spec: spec("vda", bytes: 2 << 20), device: device)]) } throws: {
            "\($0)".contains("has 1 MiB, disk vda needs 2 MiB")
        }
        #expect(throws: SystemError.self) { _ = try BlockDevice.open(path: path, access: .readWrite, exclusive: true) }
    }

    @Test func aDiskThatFailsStopsEverythingAndSaysWhy() throws {
        let directory = TemporaryDirectory()
        let path = directory.path + "/disk"
        FileManager.default.createFile(atPath: path, contents: nil)
        truncate(path, 1 << 20)
        let target = try DiskTarget(disks: [.init(spec: spec("vda", bytes: 1 << 20), device: try BlockDevice.open(path: path, access: .readOnly, exclusive: false))])
        target.take("r")
        let epoch = try target.beginEpoch(Cut(epoch: EpochNumber(1), kind: .exact, timeNanoseconds: 1, blockCount: 1), after: nil)
        let bytes = [UInt8](repeating: 1, count: 4096)
        try bytes.withUnsafeBytes { bytes in
            try sums(Array(bytes), offset: 0).withUnsafeBufferPointer { try epoch.append(volume: 0, offsetBytes: 0, bytes: bytes, checksums: $0) }
        }
        let done = Replica.Semaphore()
        nonisolated(unsafe) var result: Result<RecoveryPoint?, StoreError>!
        epoch.seal(consistency: .crash) {
            result = $0
            done.signal()
        }
        done.wait()
        #expect(throws: StoreError.self) { _ = try result.get() }
        #expect(target.figures.isInTheMiddle && target.figures.failure?.description.contains("cannot write \(path)") == true)
        #expect(throws: StoreError.self) { _ = try target.beginEpoch(Cut(epoch: EpochNumber(2), kind: .exact, timeNanoseconds: 2, blockCount: 1), after: nil) }
        target.close()
    }
}

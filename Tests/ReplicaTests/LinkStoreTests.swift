import BlockTap
import Foundation
import NIOCore
import Testing

@testable import Replica

/// Between the link and the store: blocks that do not verify, a full store, a slow one.
@Suite(.timeLimit(.minutes(10))) struct LinkStoreTests {
    private let epoch = EpochNumber(1)
    private let block = [UInt8](repeating: 7, count: blockBytes)

    private func extents(_ peer: RawPeer, _ block: [UInt8], checksum: UInt64, volume: UInt32 = 0, offset: UInt64 = 0) {
        peer.send(.extents, payload: block) { buffer in
            ExtentsFront(epoch: epoch, plainBytes: block.count, extentCount: 1, checksumCount: 1, encoding: .plain).write(&buffer)
            WireExtent(volume: volume, length: UInt32(block.count), offsetBytes: offset).write(&buffer)
            buffer.put(checksum)
        }
    }

    /// A data stream that has begun epoch 1.
    private func openEpoch(_ appliance: TestAppliance) async throws -> RawPeer {
        let peer = try await RawPeer.connect(appliance.endpoint())
        peer.hello(ModelSource(sizes: [1 << 20], seed: 1, instance: "raw"))
        guard case .frame(.welcome, _) = await peer.next() else {
            Issue.record("no WELCOME")
            return peer
        }
        peer.send(.epochBegin) { EpochBeginMeta(cut: Cut(epoch: epoch, kind: .exact, timeNanoseconds: 1, blockCount: 1)).write(&$0) }
        return peer
    }

    @Test func damagedBlocksAreNotTaken() async throws {
        let appliance = try TestAppliance()
        try await appliance.start()
        let good = block.withUnsafeBytes { BlockChecksum.of($0.baseAddress!, count: $0.count, blockIndex: 0) }
        var damaged = block
        damaged[100] ^= 1
        for (bytes, volume, offset) in [(damaged, UInt32(0), UInt64(0)), (block, 0, 4096), (block, 1, 0), (block, 0, 1 << 20), (block, 0, 512)] {
            let peer = try await openEpoch(appliance)
            extents(peer, bytes, checksum: good, volume: volume, offset: offset)
            #expect(await peer.refusal()?.code == "protocolError", "volume \(volume), offset \(offset)")
        }
        #expect(appliance.log.text.contains("block 0 of disk disk-0 does not match its checksum"))
        #expect(appliance.store.recoveryPoints(TestAppliance.group).isEmpty)
        await appliance.stop()
    }

    @Test func sealMustFitWhatWasSent() async throws {
        let appliance = try TestAppliance()
        try await appliance.start()
        let peer = try await openEpoch(appliance)
        let sum = block.withUnsafeBytes { BlockChecksum.of($0.baseAddress!, count: $0.count, blockIndex: 0) }
        extents(peer, block, checksum: sum)
        peer.send(.epochSeal) {
            EpochSealMeta(epoch: epoch, dataBytes: 4096, zeroBytes: 0, digest: 12345, consistency: .crash).write(&$0)
        }
        #expect(await peer.refusal()?.code == "protocolError")
        #expect(appliance.store.recoveryPoints(TestAppliance.group).isEmpty)
        await appliance.stop()
    }

    @Test func fullStoreInterruptsUntilThereIsSpace() async throws {
        let directory = ScratchDirectory()
        let storage = try FaultStorage(directory: directory.path + "/store")
        let appliance = try TestAppliance(storage: storage)
        try await appliance.start()
        let source = ModelSource(sizes: [2 << 20], seed: 12)
        source.writeRandomly(count: 50)
        let sender = try appliance.sender(source)
        sender.start()
        for round in 1...3 {
            await source.untilAcknowledged(exact: source.acknowledgedExactCount + 3)
            storage.faults.withLock { $0.isFull = true }
            source.writeRandomly(count: 50)
            try await eventually("phase interrupted, round \(round)") { sender.status.phase == .interrupted }
            #expect(sender.status.reason?.contains("the store is full") == true)
            source.writeRandomly(count: 50)
            storage.faults.withLock { $0.isFull = false }
        }
        await source.untilAcknowledged(exact: source.acknowledgedExactCount + 3)
        #expect(sender.status.reason == nil)
        await sender.stop()
        #expect(source.fullSyncCount == 1)
        #expect(try appliance.checkRecoveryPoints(source) >= 12)
        await appliance.stop()
    }

    /// Whatever call of the store it is that fails: what is acknowledged and published stays exact.
    @Test(arguments: 0..<8) func storeThatIsFullNowAndThenLeavesOnlyExactPoints(seed: UInt64) async throws {
        let directory = ScratchDirectory()
        let storage = try FaultStorage(directory: directory.path + "/store")
        let appliance = try TestAppliance(storage: storage)
        try await appliance.start()
        let source = ModelSource(sizes: [1 << 20, 1 << 20], seed: seed)
        source.writeRandomly(count: 50)
        let sender = try appliance.sender(source, epochMilliseconds: 1)
        sender.start()
        await source.untilAcknowledged(exact: 2)
        let writer = Task {
            var random = SeededRandom(seed: seed)
            while !Task.isCancelled {
                source.writeRandomly(count: 3)
                storage.faults.withLock { $0.isFull = random.below(3) == 0 }
                try? await Task.sleep(for: .microseconds(random.below(4000)))
            }
            storage.faults.withLock { $0.isFull = false }
        }
        await source.untilAcknowledged(exact: 40)
        writer.cancel()
        await writer.value
        await source.untilAcknowledged(exact: source.acknowledgedExactCount + 3)
        await sender.stop()
        #expect(source.fullSyncCount == 1)
        #expect(try appliance.checkRecoveryPoints(source, "seed \(seed)") >= 43)
        await appliance.stop()
    }

    /// A disk at the replica that takes nothing: the sender stops at the window, and the appliance's other work goes on.
    @Test func creditsBoundWhatIsInFlight() async throws {
        let directory = ScratchDirectory()
        let storage = try FaultStorage(directory: directory.path + "/store")
        var options = StoreOptions()
        options.writeBufferBytes = 64 << 10
        options.writeBufferCount = 16
        var timing = TestAppliance.quick
        timing.silence = .seconds(60)
        let appliance = try TestAppliance(timing: timing, options: options, storage: storage)
        try await appliance.start()
        let gate = FaultStorage.Gate()
        storage.faults.withLock { $0.gate = gate }
        let source = ModelSource(sizes: [8 << 20], seed: 13)
        source.fillRandomly()
        let sender = try appliance.sender(source)
        let window = (16 - 5) * (64 << 10)
        sender.start()
        try await eventually("the window is used") { source.handedOutBytes > window - 2 * ModelSource.drainBufferBytes }
        // The connections' event loops are free: control streams come up and carry messages.
        let client = AgentControlClient(
            endpoint: try appliance.endpoint(),
            hello: { AgentHello(agentVersion: "1", hostName: "web", kernel: "6", instance: "i", disks: []) },
            status: { sender.status }, onCommand: { _ in }, logger: appliance.log.logger, timing: timing)
        client.start()
        try await eventually("three statuses") { appliance.policy.withLock { $0.statuses.count >= 3 } }
        #expect(source.handedOutBytes <= window)
        #expect(sender.status.lastAcknowledgedEpoch == .none)
        gate.open()
        await source.untilAcknowledged(exact: 2)
        await client.stop()
        await sender.stop()
        #expect(try appliance.checkRecoveryPoints(source) >= 2)
        await appliance.stop()
    }
}

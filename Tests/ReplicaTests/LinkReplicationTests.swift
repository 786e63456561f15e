import BlockTap
import Foundation
import NIOCore
import Testing

@testable import Replica

@Suite(.timeLimit(.minutes(10))) struct LinkReplicationTests {
    @Test func fullSyncAndEpochsMakeExactRecoveryPoints() async throws {
        let appliance = try TestAppliance()
        try await appliance.start()
        // The second disk ends in the middle of a block.
        let source = ModelSource(sizes: [4 << 20, (2 << 20) + 1536], seed: 1)
        source.writeRandomly(count: 400)
        let sender = try appliance.sender(source)
        sender.start()
        for round in 1...10 {
            await source.untilAcknowledged(exact: round * 3)
            source.writeRandomly(count: 50)
        }
        try await eventually("phase replicating") { sender.status.phase == .replicating }
        await sender.stop()
        #expect(sender.status.phase == .idle)
        #expect(try appliance.checkRecoveryPoints(source) >= 30)
        #expect(source.fullSyncCount == 1)
        #expect(source.heldBuffersMax <= 1)
        await appliance.stop()
    }

    /// Connections that die at any byte of any frame in either direction, epochs that are abandoned half-way, a source that
    /// hesitates: every recovery point must be exact, and replication must get on. AFTERIMAGE_LINK_SEEDS=1000 for a long run.
    @Test(arguments: 0..<(Int(ProcessInfo.processInfo.environment["AFTERIMAGE_LINK_SEEDS"] ?? "") ?? 24)) func cutConnectionsLeaveOnlyExactPoints(seed: Int) async throws {
        let appliance = try TestAppliance()
        try await appliance.start()
        let source = ModelSource(sizes: [2 << 20, (1 << 20) + 512], seed: UInt64(seed))
        source.abandonPercent = seed % 3 == 0 ? 0 : 15
        source.hesitatePercent = seed % 2 == 0 ? 0 : 10
        source.writeRandomly(count: 100)
        // Most connections live for some epochs, some die in the handshake or the greeting.
        let proxy = try await HurtfulProxy.start(to: appliance.port) { number in
            var random = SeededRandom(seed: UInt64(seed) << 32 | UInt64(number))
            if number >= 40 { return .none }
            return .cut(afterBytes: 1 << Int.random(in: 8...21, using: &random) + Int.random(in: 0..<4096, using: &random))
        }
        let sender = try appliance.sender(source, endpoint: appliance.endpoint(port: proxy.port), epochMilliseconds: 2)
        sender.start()
        for round in 1...12 {
            await source.untilAcknowledged(exact: round * 2)
            source.writeRandomly(count: 30)
        }
        await sender.stop()
        await proxy.stop()
        #expect(try appliance.checkRecoveryPoints(source, "seed \(seed)") >= 24)
        await appliance.stop()
    }

    /// Getting through at all is the proof: the first three connections fall silent before the full sync is over.
    @Test func silentConnectionIsNoticedAndReplaced() async throws {
        var timing = TestAppliance.quick
        timing.silence = .milliseconds(400)
        timing.greeting = .milliseconds(800)
        let appliance = try TestAppliance(timing: timing)
        try await appliance.start()
        let source = ModelSource(sizes: [2 << 20], seed: 7)
        source.writeRandomly(count: 100)
        let proxy = try await HurtfulProxy.start(to: appliance.port) { number in
            let limits = [600_000, 40_000, 500]
            return number < limits.count ? .silence(afterBytes: limits[number]) : .none
        }
        let sender = try appliance.sender(source, endpoint: appliance.endpoint(port: proxy.port))
        sender.start()
        await source.untilAcknowledged(exact: 5)
        await sender.stop()
        #expect(try appliance.checkRecoveryPoints(source) >= 5)
        await proxy.stop()
        await appliance.stop()
    }

    /// The same agent connects again while the appliance still believes in the old connection.
    @Test func secondStreamOfAGroupSupersedesTheFirst() async throws {
        let appliance = try TestAppliance()
        try await appliance.start()
        let old = ModelSource(sizes: [1 << 20], seed: 3)
        let first = try appliance.sender(old, automaticRestart: false)
        first.start()
        await old.untilAcknowledged(exact: 3)
        let new = ModelSource(sizes: [1 << 20], seed: 4)
        new.writeRandomly(count: 50)
        let second = try appliance.sender(new)
        second.start()
        await new.untilAcknowledged(exact: 3)
        try await eventually("the first one hears of it") { first.status.phase == .interrupted }
        #expect(first.status.reason?.contains("newer data stream") == true)
        await first.stop()
        await second.stop()
        #expect(try appliance.checkRecoveryPoints(new) >= 3)
        #expect(try appliance.checkRecoveryPoints(old) >= 3)
        await appliance.stop()
    }

    /// A disk with an unreadable sector: the sender waits between attempts instead of reading all the time.
    @Test func readErrorsDoNotKeepTheSourcesDiskBusy() async throws {
        let appliance = try TestAppliance()
        try await appliance.start()
        let source = ModelSource(sizes: [2 << 20], seed: 11)
        source.abandonPercent = 100
        source.abandonReason = .readError
        let sender = try appliance.sender(source)
        sender.start()
        try await eventually("the first error") { await source.statistics.abandonedCount > 0 }
        try await Task.sleep(for: .milliseconds(300))
        #expect(await source.statistics.cutCount <= 2)
        // It is told, until it is over.
        try await eventually("it is told") { sender.status.reason?.contains("read error on the source disk") == true }
        source.abandonPercent = 0
        try await eventually("a recovery point") { sender.status.phase == .replicating }
        #expect(sender.status.reason == nil)
        await sender.stop()
        await appliance.stop()
    }

    /// What an agent says of its disks and cuts is checked before anybody computes with it.
    @Test func absurdShapesAndTimesAreRefused() throws {
        let appliance = try TestAppliance()
        for geometry in [
            BlockGeometry(sizeBytes: .max, logicalBlockBytes: 512), BlockGeometry(sizeBytes: 1 << 20, logicalBlockBytes: 0),
            BlockGeometry(sizeBytes: 1 << 20, logicalBlockBytes: 513),
        ] {
            let group = GroupID("web-\(geometry.logicalBlockBytes)")
            #expect(throws: StoreError.self) { try appliance.store.createGroup(group, volumes: [VolumeSpec(name: "a", geometry: geometry)]) }
        }
        var buffer = ByteBuffer()
        EpochBeginMeta(cut: Cut(epoch: EpochNumber(1), kind: .exact, timeNanoseconds: .max, blockCount: 0)).write(&buffer)
        buffer.withUnsafeReadableBytes { bytes in
            let header = FrameHeader(type: .epochBegin, metaBytes: bytes.count, payloadBytes: 0, sequence: 0)
            var reader = MetaReader(FrameView(header: header, meta: bytes, payload: .init(start: nil, count: 0)))
            #expect(throws: FrameError.self) { try EpochBeginMeta(&reader) }
        }
        appliance.store.close()
    }

    @Test func newSenderGoesOnWithTheBitmapsIfItKnowsTheirBase() async throws {
        let appliance = try TestAppliance()
        try await appliance.start()
        let source = ModelSource(sizes: [2 << 20], seed: 5)
        let base = ReplicationBase()
        for round in 1...3 {
            source.writeRandomly(count: 50)
            let sender = try appliance.sender(source, base: base)
            sender.start()
            await source.untilAcknowledged(exact: round * 4)
            #expect(sender.status.lastAcknowledgedEpoch > .none)
            await sender.stop()
        }
        #expect(source.fullSyncCount == 1)
        let stranger = try appliance.sender(source)
        stranger.start()
        await source.untilAcknowledged(exact: source.acknowledgedExactCount + 2)
        await stranger.stop()
        #expect(source.fullSyncCount == 2)
        _ = try appliance.checkRecoveryPoints(source)
        await appliance.stop()
    }

    @Test func restartOfTheApplianceIsSurvived() async throws {
        let appliance = try TestAppliance()
        try await appliance.start()
        let source = ModelSource(sizes: [2 << 20], seed: 8)
        let sender = try appliance.sender(source)
        sender.start()
        for round in 1...4 {
            await source.untilAcknowledged(exact: round * 3)
            source.writeRandomly(count: 40)
            await appliance.server.stop()
            try await eventually("interrupted") { sender.status.phase == .interrupted }
            try await appliance.start()
        }
        await source.untilAcknowledged(exact: 15)
        await sender.stop()
        #expect(source.fullSyncCount == 1)
        #expect(try appliance.checkRecoveryPoints(source) >= 15)
        await appliance.stop()
    }

    @Test func throttleHoldsTheRate() async throws {
        let appliance = try TestAppliance()
        try await appliance.start()
        let source = ModelSource(sizes: [1 << 20], seed: 9)
        source.fillRandomly()
        let sender = try appliance.sender(source, throttle: 1_000_000)
        let begin = ContinuousClock.now
        sender.start()
        await source.untilAcknowledged(exact: 1)
        let seconds = (ContinuousClock.now - begin) / .seconds(1)
        // 1 MiB, of which a quarter second's worth and one frame may go at once.
        #expect(seconds > 0.5)
        #expect(sender.status.sentBytes >= 1 << 20)
        await sender.stop()
        await appliance.stop()
    }

    @Test func compressibleDataTravelsSmallOverASlowLink() async throws {
        let appliance = try TestAppliance()
        try await appliance.start()
        let source = ModelSource(sizes: [4 << 20], seed: 11)
        source.fill { UInt8(truncatingIfNeeded: $0 >> 8) | 1 }
        let sender = try appliance.sender(source, throttle: 4_000_000)
        sender.start()
        await source.untilAcknowledged(exact: 1)
        await sender.stop()
        #expect(sender.status.sentBytes < 3 << 20)
        #expect(try appliance.checkRecoveryPoints(source) >= 1)
        await appliance.stop()
    }

    @Test func cutNowDoesNotWaitForTheEpoch() async throws {
        let appliance = try TestAppliance()
        try await appliance.start()
        let source = ModelSource(sizes: [1 << 20], seed: 10)
        let sender = try appliance.sender(source, epochMilliseconds: 3_600_000)
        sender.start()
        await source.untilAcknowledged(exact: 1)
        for count in 2...5 {
            source.writeRandomly(count: 5)
            sender.cutNow()
            await source.untilAcknowledged(exact: count)
        }
        await sender.stop()
        #expect(try appliance.checkRecoveryPoints(source) == 5)
        await appliance.stop()
    }
}

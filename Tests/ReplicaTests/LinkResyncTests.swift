import BlockTap
import Foundation
import NIOCore
import Synchronization
import Testing

@testable import Replica

/// An agent that has forgotten everything compares its disks with what the replica has: only what differs travels, and the first recovery point
/// after it is exact, whatever happens meanwhile.
@Suite(.timeLimit(.minutes(10))) struct LinkResyncTests {
    private static let sizes = [4 << 20, (2 << 20) + 1536]

    /// A replica of these disks. Returns what they hold.
    private func replicated(_ appliance: TestAppliance, sizes: [Int] = sizes, seed: UInt64, fill: Bool = false) async throws -> ModelSource {
        let source = ModelSource(sizes: sizes, seed: seed)
        if fill { source.fillRandomly() } else { source.writeRandomly(count: 300) }
        try await replicate(appliance, source)
        return source
    }

    /// Until the first recovery points are there. Returns the figures of the end.
    @discardableResult
    private func replicate(_ appliance: TestAppliance, _ source: ModelSource, points: Int = 2, port: Int? = nil, timing: LinkTiming? = nil) async throws -> AgentStatus {
        let sender = try appliance.sender(source, endpoint: appliance.endpoint(port: port), epochMilliseconds: 2, timing: timing)
        sender.start()
        await source.untilAcknowledged(exact: source.acknowledgedExactCount + points)
        await sender.stop()
        return sender.status
    }

    private func byteCount(_ source: ModelSource) -> UInt64 { source.disks.reduce(0) { $0 + $1.geometry.sizeBytes } }

    // MARK: What travels

    @Test func whatTheReplicaHasIsNotSentAgain() async throws {
        let appliance = try TestAppliance()
        try await appliance.start()
        let source = ModelSource(restarted: try await replicated(appliance, seed: 1), seed: 2)
        let status = try await replicate(appliance, source)
        #expect(status.sentBytes == 0)
        #expect(status.resyncComparedBytes == byteCount(source) && status.resyncEqualBytes == status.resyncComparedBytes)
        #expect(try appliance.checkRecoveryPoints(source) >= 2)
        await appliance.stop()
    }

    @Test(arguments: [1, 10, 50, 100]) func onlyWhatDiffersTravels(percent: Int) async throws {
        let appliance = try TestAppliance()
        try await appliance.start()
        let source = ModelSource(restarted: try await replicated(appliance, seed: UInt64(percent), fill: true), seed: 7)
        var random = SeededRandom(seed: UInt64(percent))
        var differing = 0
        for disk in source.disks.indices {
            let blocks = (0..<Int(source.disks[disk].geometry.blockCount)).filter { _ in random.below(100) < percent }
            source.changeUnseen(disk: disk, blocks: blocks)
            differing += blocks.count * blockBytes
        }
        let status = try await replicate(appliance, source)
        #expect(Double(status.sentBytes) <= 1.1 * Double(differing) + 65536, "\(status.sentBytes) bytes for \(differing)")
        #expect(status.resyncComparedBytes == byteCount(source))
        #expect(status.resyncComparedBytes - status.resyncEqualBytes <= UInt64(differing))
        #expect(try appliance.checkRecoveryPoints(source) >= 2)
        await appliance.stop()
    }

    /// Zeroes that replaced data, and data that replaced zeroes; what the replica never got is answered for without being read.
    @Test func zeroesAreComparedLikeAnythingElse() async throws {
        let appliance = try TestAppliance()
        try await appliance.start()
        let old = ModelSource(sizes: [8 << 20], seed: 3)
        old.changeUnseen(disk: 0, blocks: Array(100..<200))
        try await replicate(appliance, old)
        let source = ModelSource(restarted: old, seed: 4)
        source.changeUnseen(disk: 0, blocks: [101, 102, 103] + Array(120..<160), to: 0)
        source.changeUnseen(disk: 0, blocks: [1000])
        let status = try await replicate(appliance, source)
        #expect(status.sentBytes < 8 * UInt64(blockBytes))
        #expect(status.resyncComparedBytes - status.resyncEqualBytes == 44 * UInt64(blockBytes))
        #expect(try appliance.checkRecoveryPoints(source) >= 2)
        await appliance.stop()
    }

    @Test func aDiskThatGrewIsComparedAsFarAsItWas() async throws {
        let appliance = try TestAppliance()
        try await appliance.start()
        // It ended, and ends, within a block.
        let old = try await replicated(appliance, sizes: [(2 << 20) + 512], seed: 5, fill: true)
        let source = ModelSource(restarted: old, seed: 6, grownTo: [(5 << 20) + 1024])
        source.changeUnseen(disk: 0, blocks: [900])
        let status = try await replicate(appliance, source)
        #expect(status.sentBytes == UInt64(blockBytes))
        #expect(status.resyncComparedBytes == byteCount(source))
        #expect(try appliance.checkRecoveryPoints(source) >= 2)
        await appliance.stop()
    }

    /// The last block was written to beyond where the disk ended: the replica has zeroes there.
    @Test func whatWasWrittenBehindTheOldEndTravels() async throws {
        let appliance = try TestAppliance()
        try await appliance.start()
        let old = try await replicated(appliance, sizes: [(1 << 20) + 512], seed: 8, fill: true)
        let source = ModelSource(restarted: old, seed: 9, grownTo: [2 << 20])
        source.changeUnseen(disk: 0, blocks: [256])
        let status = try await replicate(appliance, source)
        #expect(status.sentBytes == UInt64(blockBytes))
        #expect(try appliance.checkRecoveryPoints(source) >= 2)
        await appliance.stop()
    }

    @Test func phaseAndFiguresSayThatItCompares() async throws {
        let appliance = try TestAppliance()
        try await appliance.start()
        let source = ModelSource(restarted: try await replicated(appliance, seed: 10), seed: 11)
        source.abandonPercent = 100
        let sender = try appliance.sender(source)
        sender.start()
        // No epoch gets through: it stays where it is.
        try await eventually("phase resync") { sender.status.phase == .resync && sender.status.resyncComparedBytes > 0 }
        source.abandonPercent = 0
        try await eventually("phase replicating") { sender.status.phase == .replicating }
        await sender.stop()
        #expect(try appliance.checkRecoveryPoints(source) >= 1)
        await appliance.stop()
    }

    /// Beside the disks' own pace there is a bound for what is read of the protected machine's disks.
    @Test func comparingIsThrottledAtTheSource() async throws {
        var timing = TestAppliance.quick
        timing.compareBytesPerSecond = 4 << 20
        timing.hashBytesPerSecond = 64 << 20
        let appliance = try TestAppliance(timing: timing)
        try await appliance.start()
        let source = ModelSource(restarted: try await replicated(appliance, seed: 12), seed: 13)
        let begin = ContinuousClock.now
        try await replicate(appliance, source, points: 1)
        // 6 MiB, of which a quarter second's worth and one item may go at once.
        #expect((ContinuousClock.now - begin) / .seconds(1) > 1)
        await appliance.stop()
    }

    // MARK: What happens meanwhile

    @Test func writesGoOnMeanwhile() async throws {
        let appliance = try TestAppliance()
        try await appliance.start()
        let source = ModelSource(restarted: try await replicated(appliance, seed: 14, fill: true), seed: 15)
        source.changeUnseen(disk: 0, blocks: Array(stride(from: 0, to: 1000, by: 7)))
        let writer = Task { while !Task.isCancelled { source.writeRandomly(count: 2); await Task.yield() } }
        try await replicate(appliance, source, points: 10)
        writer.cancel()
        await writer.value
        #expect(try appliance.checkRecoveryPoints(source) >= 10)
        await appliance.stop()
    }

    /// The first connections die on the way. What has been acknowledged is neither compared nor sent again.
    @Test func itGoesOnWhereTheConnectionWasLost() async throws {
        let appliance = try TestAppliance()
        try await appliance.start()
        let source = ModelSource(restarted: try await replicated(appliance, sizes: [12 << 20], seed: 16, fill: true), seed: 17)
        source.changeUnseen(disk: 0, blocks: Array(stride(from: 0, to: 3072, by: 3)))
        let proxy = try await HurtfulProxy.start(to: appliance.port) { $0 < 3 ? .cut(afterBytes: 1_500_000) : .none }
        let status = try await replicate(appliance, source, port: proxy.port)
        #expect(source.fullSyncCount == 1)
        // Each loss costs at most the two epochs that were not acknowledged, and the one on its way.
        #expect(status.resyncComparedBytes <= (12 << 20) + 3 * 3 * 300 * 4096, "\(status.resyncComparedBytes)")
        #expect(status.resyncComparedBytes > 12 << 20)
        #expect(try appliance.checkRecoveryPoints(source) >= 2)
        await proxy.stop()
        await appliance.stop()
    }

    /// The tap itself begins a full sync, in the midst of replication and then again in the midst of that.
    @Test func aSourceMayBeginItByItself() async throws {
        let appliance = try TestAppliance()
        try await appliance.start()
        let source = ModelSource(sizes: Self.sizes, seed: 18)
        source.fillRandomly()
        let sender = try appliance.sender(source)
        sender.start()
        await source.untilAcknowledged(exact: 3)
        let sent = sender.status.sentBytes
        for _ in 0..<3 {
            source.changeUnseen(disk: 0, blocks: [3, 500, 1023])
            source.missedWrites()
            source.writeRandomly(count: 3)
            // Two that were cut before may be on their way.
            await source.untilAcknowledged(exact: source.acknowledgedExactCount + 4)
        }
        await sender.stop()
        #expect(sender.status.resyncComparedBytes > 0 && sender.status.sentBytes >= sent)
        let newest = try #require(appliance.store.recoveryPoints(TestAppliance.group).last)
        for disk in source.disks.indices {
            #expect(try appliance.store.image(newest.id, volume: disk, group: TestAppliance.group) == source.exactSnapshots[newest.epoch]![disk])
        }
        await appliance.stop()
    }

    /// Blocks that cannot be read at the replica differ from everything: they are sent anew, and the newest state is whole again.
    @Test(arguments: [StoreCompression.lz4, .zstd]) func whatRottedAtTheReplicaIsSentAnew(compression: StoreCompression) async throws {
        var options = StoreOptions()
        options.compression = compression
        let appliance = try TestAppliance(options: options)
        try await appliance.start()
        let old = ModelSource(sizes: [4 << 20], seed: 19)
        old.fillRandomly()
        // A compressed cluster is lost as a whole.
        for block in 64..<96 { old.changeUnseen(disk: 0, blocks: [block], to: UInt8(block)) }
        try await replicate(appliance, old)
        for block in [0, 17, 18, 300, 1023] as [UInt64] { try rot(appliance, block: block) }
        try rot(appliance, block: 64, at: 5)
        let source = ModelSource(restarted: old, seed: 20)
        let status = try await replicate(appliance, source)
        let sentBlocks = (status.resyncComparedBytes - status.resyncEqualBytes) / UInt64(blockBytes)
        #expect(sentBlocks >= 6 && sentBlocks <= 5 + 16)
        #expect(try appliance.checkRecoveryPoints(source) >= 2)
        await appliance.stop()
    }

    /// Restarts with random differences, connections cut at random, epochs given up, writes, merges of layers and expiry of points, all at once.
    /// AFTERIMAGE_LINK_SEEDS=1000 for a long run.
    @Test(arguments: 0..<(Int(ProcessInfo.processInfo.environment["AFTERIMAGE_LINK_SEEDS"] ?? "") ?? 16)) func thePointsAfterItAreExact(seed: Int) async throws {
        var options = StoreOptions()
        options.segmentBytes = 1 << 20
        options.preallocationBytes = 128 << 10
        // Small, but not below what the credits of the link are put together to.
        options.writeBufferBytes = 256 << 10
        options.garbageBytesMin = 64 << 10
        options.indexFileCostMin = 50
        let appliance = try TestAppliance(options: options)
        try await appliance.start()
        appliance.store.setRetention(TestAppliance.group, RecoveryPointPolicy(tiers: [.init(everySeconds: 0, forSeconds: 1)]))
        appliance.store.startUpkeep(everySeconds: 0.001, bytesPerSecond: 0)
        var random = SeededRandom(seed: UInt64(seed) &+ 1000)
        var source = ModelSource(sizes: [2 << 20, (1 << 20) + 512], seed: UInt64(seed))
        source.writeRandomly(count: 100)
        for round in 0..<4 {
            if round > 0 {
                let grown = random.below(3) == 0 ? source.disks.map { Int($0.geometry.sizeBytes) + 512 * random.below(300) } : nil
                source = ModelSource(restarted: source, seed: random.next(), grownTo: grown)
                for disk in source.disks.indices {
                    let percent = [0, 1, 20, 80][random.below(4)]
                    source.changeUnseen(disk: disk, blocks: (0..<Int(source.disks[disk].geometry.blockCount)).filter { _ in random.below(100) < percent })
                }
            }
            source.abandonPercent = random.below(2) * 15
            source.hesitatePercent = random.below(2) * 10
            let base = random.next()
            let proxy = try await HurtfulProxy.start(to: appliance.port) { number in
                var random = SeededRandom(seed: base &+ UInt64(number))
                return number >= 12 ? .none : .cut(afterBytes: 1 << Int.random(in: 10...20, using: &random) + Int.random(in: 0..<4096, using: &random))
            }
            let sender = try appliance.sender(source, endpoint: appliance.endpoint(port: proxy.port), epochMilliseconds: 2)
            sender.start()
            let current = source
            let writer = Task { while !Task.isCancelled { current.writeRandomly(count: 1); try? await Task.sleep(for: .milliseconds(1)) } }
            await source.untilAcknowledged(exact: 3)
            writer.cancel()
            await writer.value
            await source.untilAcknowledged(exact: source.acknowledgedExactCount + 1)
            await sender.stop()
            await proxy.stop()
            let newest = try #require(appliance.store.recoveryPoints(TestAppliance.group).last)
            #expect(newest.instance == source.instance)
            for disk in source.disks.indices {
                let image = try appliance.store.image(newest.id, volume: disk, group: TestAppliance.group)
                #expect(image == source.exactSnapshots[newest.epoch]![disk], "seed \(seed), round \(round), disk \(disk)")
            }
        }
        appliance.store.stopUpkeep()
        _ = try appliance.checkRecoveryPoints(source, "seed \(seed)")
        await appliance.stop()
        #expect(try StoreCheck.run(directory: appliance.directory.path + "/store", readsData: true).isClean)
    }

    // MARK: Deliberate faults

    /// Whether the newest recovery point is what the source had at its cut.
    private func isExact(_ appliance: TestAppliance, _ source: ModelSource) throws -> Bool {
        let newest = try #require(appliance.store.recoveryPoints(TestAppliance.group).last)
        let expected = try #require(source.exactSnapshots[newest.epoch])
        return try source.disks.indices.allSatisfy { try appliance.store.image(newest.id, volume: $0, group: TestAppliance.group) == expected[$0] }
    }

    /// Three lives of an agent, each with a block that differs from the one before and the last like the first; and a block that is sent once,
    /// and then is again what the replica had, seen by nobody.
    private func pointAfterResyncIsExact(_ fault: LinkFault?) async throws -> Bool {
        var timing = TestAppliance.quick
        timing.fault = fault
        let appliance = try TestAppliance(timing: timing)
        try await appliance.start()
        var source = ModelSource(sizes: [2 << 20], seed: 21)
        source.fillRandomly()
        source.changeUnseen(disk: 0, blocks: [5], to: 1)
        try await replicate(appliance, source)
        var isExact = true
        for value in [2, 1] as [UInt8] {
            source = ModelSource(restarted: source, seed: UInt64(value))
            source.changeUnseen(disk: 0, blocks: [5], to: value)
            try await replicate(appliance, source)
            let isThisExact = try self.isExact(appliance, source)
            isExact = isExact && isThisExact
        }
        source = ModelSource(restarted: source, seed: 22)
        source.changeUnseen(disk: 0, blocks: [5], to: 9)
        let last = source
        // The first epoch of the full sync has block 5; before the second one it begins anew.
        source.onCut = { [unowned last] number in
            if number != 1 { return }
            last.changeUnseen(disk: 0, blocks: [5], to: 1)
            last.missedWrites()
        }
        try await replicate(appliance, source)
        let isExactInTheEnd = try self.isExact(appliance, source)
        await appliance.stop()
        return isExact && isExactInTheEnd
    }

    @Test func nothingOfItMakesAWrongPoint() async throws {
        #expect(try await pointAfterResyncIsExact(nil))
    }

    @Test(arguments: [LinkFault.comparesNothing, .comparesWhatWasSent, .hashesTheOldest]) func aDeliberateFaultIsFoundOut(fault: LinkFault) async throws {
        #expect(try await !pointAfterResyncIsExact(fault))
    }

    // MARK: Peers

    @Test(arguments: [
        (LinkFault.answersUnasked, "nobody asked question"), (.answersLackABlock, "asked for were"), (.answersLackAHash, "its tables do not fit"),
    ]) func wrongAnswersEndTheConnectionWithWords(fault: LinkFault, words: String) async throws {
        let appliance = try TestAppliance()
        try await appliance.start()
        let old = try await replicated(appliance, sizes: [2 << 20], seed: 23, fill: true)
        await appliance.server.stop()
        var timing = appliance.timing
        timing.fault = fault
        try await appliance.start(timing)
        let source = ModelSource(restarted: old, seed: 24)
        source.changeUnseen(disk: 0, blocks: [1])
        let sender = try appliance.sender(source)
        sender.start()
        try await eventually("it says why") { sender.status.reason?.contains(words) == true }
        #expect(sender.status.phase == .interrupted)
        await sender.stop()
        // The last epoch of its predecessor may have become durable meanwhile; nothing of its own has.
        #expect(source.acknowledgedExactCount == 0)
        #expect(appliance.store.recoveryPoints(TestAppliance.group).allSatisfy { $0.instance != source.instance })
        // The same agent gets through where the answers are right.
        await appliance.server.stop()
        try await appliance.start()
        try await replicate(appliance, source)
        #expect(try appliance.checkRecoveryPoints(source) >= 2)
        await appliance.stop()
    }

    @Test func questionsThatMakeNoSenseAreRefused() async throws {
        let appliance = try TestAppliance()
        try await appliance.start()
        let old = try await replicated(appliance, sizes: [2 << 20], seed: 25, fill: true)
        let questions: [@Sendable (RawPeer) -> Void] = [
            { $0.send(.hashesWanted) { HashesWantedMeta(question: 2, volume: 0, blockCount: 1, firstBlock: 0).write(&$0) } },
            { $0.send(.hashesWanted) { HashesWantedMeta(question: 1, volume: 1, blockCount: 1, firstBlock: 0).write(&$0) } },
            { $0.send(.hashesWanted) { HashesWantedMeta(question: 1, volume: 0, blockCount: 2, firstBlock: 511).write(&$0) } },
            { $0.send(.hashesWanted) { HashesWantedMeta(question: 1, volume: 0, blockCount: 1, firstBlock: 512).write(&$0) } },
            { $0.send(.hashesWanted) { HashesWantedMeta(question: 1, volume: 0, blockCount: 2000, firstBlock: 0).write(&$0) } },
            { $0.send(.hashesWanted) { $0.put(UInt64(1)) } },
            { $0.send(.resync) { ResyncMeta(isWanted: true).write(&$0) } },
            { peer in for question in 1...200 { peer.send(.hashesWanted) { HashesWantedMeta(question: UInt64(question), volume: 0, blockCount: 512, firstBlock: 0).write(&$0) } } },
        ]
        for (number, question) in questions.enumerated() {
            for isOpen in number == questions.count - 1 ? [true] : [true, false] where isOpen || number != 6 {
                let peer = try await RawPeer.connect(appliance.endpoint())
                peer.hello(ModelSource(restarted: old, seed: 26))
                guard case .frame(.welcome, let welcome) = await peer.next() else {
                    Issue.record("no WELCOME")
                    return
                }
                #expect(try JSONDecoder().decode(Welcome.self, from: Data(welcome)).hashes == true)
                if isOpen {
                    peer.send(.resync) { ResyncMeta(isWanted: true).write(&$0) }
                    guard case .frame(.resyncReady, let meta) = await peer.next() else {
                        Issue.record("no RESYNC_READY")
                        return
                    }
                    #expect(meta.count == 16 + 192 && meta[8] == 1)
                }
                question(peer)
                #expect(await peer.refusal()?.code == "protocolError", "question \(number)")
            }
        }
        // Within an epoch.
        let peer = try await RawPeer.connect(appliance.endpoint())
        peer.hello(ModelSource(restarted: old, seed: 27))
        _ = await peer.next()
        peer.send(.epochBegin) { EpochBeginMeta(cut: Cut(epoch: EpochNumber(1), kind: .fuzzy, timeNanoseconds: 1, blockCount: 0)).write(&$0) }
        peer.send(.resync) { ResyncMeta(isWanted: true).write(&$0) }
        #expect(await peer.refusal()?.reason.contains("an epoch is under way") == true)
        await appliance.stop()
    }

    @Test func anOlderApplianceGetsEverything() async throws {
        var timing = TestAppliance.quick
        timing.fault = .isOlder
        let appliance = try TestAppliance(timing: timing)
        try await appliance.start()
        let source = ModelSource(restarted: try await replicated(appliance, seed: 28, fill: true), seed: 29)
        let status = try await replicate(appliance, source)
        #expect(status.resyncComparedBytes == 0)
        #expect(status.sentBytes >= byteCount(source) * 9 / 10)
        #expect(try appliance.checkRecoveryPoints(source) >= 2)
        await appliance.stop()
    }

    /// What an older agent reports, and what an older appliance orders, is understood.
    @Test func olderMessagesAreUnderstood() throws {
        var object = try #require(try JSONSerialization.jsonObject(with: JSONEncoder().encode(AgentStatus())) as? [String: Any])
        for key in ["resyncComparedBytes", "resyncEqualBytes", "unprovenEpochs", "proofs"] { #expect(object.removeValue(forKey: key) != nil) }
        #expect(try JSONDecoder().decode(AgentStatus.self, from: JSONSerialization.data(withJSONObject: object)) == AgentStatus())
        #expect(try JSONDecoder().decode(AgentCommand.self, from: Data(#"{"cutNow":{}}"#.utf8)) == .cutNow(.crash))
        let order = ReplicationOrder(group: TestAppliance.group, generation: Generation(1), disks: ["vda"])
        for command in [.startReplication(order), .stopReplication, .fenced(Generation(4)), .cutNow(.crash), .cutNow(.fileSystem)] as [AgentCommand] {
            #expect(try JSONDecoder().decode(AgentCommand.self, from: JSONEncoder().encode(command)) == command)
        }
        #expect(String(decoding: try JSONEncoder().encode(AgentCommand.stopReplication), as: UTF8.self) == #"{"stopReplication":{}}"#)
        #expect(throws: DecodingError.self) { try JSONDecoder().decode(AgentCommand.self, from: Data(#"{"dance":{}}"#.utf8)) }
    }

    // MARK: Proofs

    /// What a tap could not prove is sent, is no recovery point, and no reason to cut at once again.
    @Test func unprovenEpochsAreCountedAndNotHurried() async throws {
        let appliance = try TestAppliance()
        try await appliance.start()
        let source = ModelSource(sizes: [1 << 20], seed: 30)
        let sender = try appliance.sender(source, epochMilliseconds: 3_600_000)
        sender.start()
        await source.untilAcknowledged(exact: 1)
        try await eventually("phase replicating") { sender.status.phase == .replicating }
        let cuts = await source.statistics.cutCount
        source.leaveUnproven(3)
        for number in 1...3 as ClosedRange<UInt64> {
            source.writeRandomly(count: 5)
            sender.cutNow()
            try await eventually("it is acknowledged") { sender.status.lastAcknowledgedEpoch == EpochNumber(cuts + number) }
            #expect(sender.status.phase == .replicating && sender.status.unprovenEpochs == number)
        }
        sender.cutNow()
        await source.untilAcknowledged(exact: 2)
        #expect(await source.statistics.cutCount == cuts + 4)
        await sender.stop()
        #expect(sender.status.unprovenEpochs == 3)
        #expect(try appliance.checkRecoveryPoints(source) == 2)
        await appliance.stop()
    }

    @Test func pointsSayHowTheyWereProven() async throws {
        let appliance = try TestAppliance()
        try await appliance.start()
        let source = ModelSource(sizes: [1 << 20], seed: 31)
        let sender = try appliance.sender(source, epochMilliseconds: 3_600_000)
        sender.start()
        await source.untilAcknowledged(exact: 1)
        source.leaveUnproven(1)
        sender.cutNow(consistency: .fileSystem)
        try await eventually("an unproven epoch") { sender.status.unprovenEpochs == 1 && sender.status.lastAcknowledgedEpoch == EpochNumber(3) }
        // Asked for still, of the next one.
        sender.cutNow()
        await source.untilAcknowledged(exact: 2)
        sender.cutNow()
        await source.untilAcknowledged(exact: 3)
        await sender.stop()
        #expect(source.askedConsistencies == [.crash, .fileSystem, .fileSystem, .crash])
        #expect(appliance.store.recoveryPoints(TestAppliance.group).map(\.consistency) == [.crash, .filesystem, .crash])
        let proofs = sender.status.proofs
        #expect(proofs.map(\.epoch) == appliance.store.recoveryPoints(TestAppliance.group).map(\.epoch))
        #expect(proofs.map(\.proof.consistency) == [.crash, .fileSystem, .crash] && proofs.allSatisfy { $0.instance == source.instance })
        let base = ReplicationBase()
        base.beginFullSync(group: TestAppliance.group, instance: "a")
        for epoch in 1...100 as ClosedRange<UInt64> {
            base.wasAcknowledged(Cut(epoch: EpochNumber(epoch), kind: .exact, timeNanoseconds: 1, blockCount: 0, proof: CutProof(method: .rounds)))
        }
        #expect(base.read { $0.proofs }.map(\.epoch.rawValue) == Array(37...100))
        await appliance.stop()
    }
}

import BlockTap
import Foundation
import NIOCore
import Synchronization
import Testing

@testable import Replica

/// Damages a block as the newest layer with it has it.
func rot(_ appliance: TestAppliance, block: UInt64, at place: Int = 100) throws {
    let store = appliance.store
    for layer in store.read({ $0.layers.keys.sorted(by: >) }) {
        guard let (path, byte) = try ReplicaTests.place(store, layer: layer, block: block) else { continue }
        let file = open(appliance.directory.path + "/store/" + path, O_RDWR)
        defer { close(file) }
        var bad: UInt8 = 0
        pread(file, &bad, 1, off_t(byte + place))
        bad ^= 0x10
        pwrite(file, &bad, 1, off_t(byte + place))
        fsync(file)
        return
    }
    Issue.record("no layer has block \(block)")
}

/// Blocks that rotted in the store come back from the source, as long as that still has them.
@Suite(.timeLimit(.minutes(10))) struct LinkRepairTests {
    private func scrub(_ store: ReplicaStore) { while case .read? = store.scrubStep() {} }

    @Test func whatRottedIsRepairedFromTheSource() async throws {
        let appliance = try TestAppliance()
        try await appliance.start()
        let source = ModelSource(sizes: [1 << 20, (64 << 10) + 512], seed: 31)
        source.fillRandomly()
        let sender = try appliance.sender(source)
        sender.start()
        await source.untilAcknowledged(exact: 2)
        let repaired = Mutex<[UInt64]>([])
        appliance.store.scrubber.state.withLock { $0.onFinding = { if case .repaired(_, _, let block, _) = $0 { repaired.withLock { $0.append(block) } } } }
        for block in [0, 17, 18, 19, 200] as [UInt64] { try rot(appliance, block: block) }
        scrub(appliance.store)
        try await eventually("five blocks are repaired") { appliance.store.statistics().scrub.repairedBlockCount >= 5 }
        #expect(appliance.store.badExtents().isEmpty)
        #expect(Set(repaired.withLock { $0 }) == [0, 17, 18, 19, 200] || repaired.withLock { $0.count } == 5)
        scrub(appliance.store)
        #expect(appliance.store.badExtents().isEmpty)
        // Replication went on.
        await source.untilAcknowledged(exact: source.acknowledgedExactCount + 2)
        await sender.stop()
        #expect(try appliance.checkRecoveryPoints(source) >= 4)
        await appliance.stop()
    }

    @Test func whatTheSourceHasOverwrittenIsNotRepairedAndSaidSo() async throws {
        let appliance = try TestAppliance()
        try await appliance.start()
        let source = ModelSource(sizes: [1 << 20], seed: 32)
        source.fillRandomly()
        // Epochs are far apart: the source changes before the next one.
        let sender = try appliance.sender(source)
        sender.start()
        await source.untilAcknowledged(exact: 1)
        let told = Mutex<[String]>([])
        appliance.store.scrubber.state.withLock { $0.onFinding = { if case .notRepaired(_, let disk, let block, _, let why) = $0 { told.withLock { $0.append("\(disk) \(block): \(why)") } } } }
        source.fillRandomly()
        try rot(appliance, block: 7)
        scrub(appliance.store)
        try await eventually("it is said") { !told.withLock { $0.isEmpty } }
        #expect(told.withLock { $0 } == ["disk-0 7: the source has something else there now"])
        #expect(appliance.store.statistics().scrub.repairedBlockCount == 0)
        #expect(appliance.store.badExtents().map(\.block) == [7])
        #expect(appliance.log.text.contains("a damaged block cannot be repaired: the source has something else there now"))
        let first = appliance.store.recoveryPoints(TestAppliance.group)[0]
        #expect(throws: StoreError.self) { try appliance.store.image(first.id, volume: 0, group: TestAppliance.group) }
        await sender.stop()
        await appliance.stop()
    }

    private func peer(_ appliance: TestAppliance, answersWanted: Bool) async throws -> RawPeer {
        let source = ModelSource(sizes: [1 << 20], seed: 1, instance: "raw")
        let peer = try await RawPeer.connect(appliance.endpoint())
        let hello = DataHello(group: TestAppliance.group, generation: Generation(1), instance: source.instance, disks: source.disks, answersWanted: answersWanted)
        peer.send(.hello) { $0.putJSON(Hello(data: hello)) }
        guard case .frame(.welcome, _) = await peer.next() else {
            Issue.record("no WELCOME")
            return peer
        }
        return peer
    }

    /// A store with one bad block, known.
    private func damaged() async throws -> TestAppliance {
        let appliance = try TestAppliance()
        try await appliance.start()
        try appliance.store.createGroup(TestAppliance.group, volumes: [VolumeSpec(name: "disk-0", geometry: BlockGeometry(sizeBytes: 1 << 20, logicalBlockBytes: 512))])
        let writer = try appliance.store.begin(1, instance: "before", group: TestAppliance.group)
        var random = SeededRandom(seed: 4)
        try writer.append(volume: 0, offsetBytes: 0, noise(4 * 4096, &random))
        _ = try writer.seal()
        try rot(appliance, block: 2)
        scrub(appliance.store)
        #expect(appliance.store.badExtents().map(\.block) == [2])
        return appliance
    }

    @Test func answersThatNobodyAskedForOrThatDoNotMatchEndTheStream() async throws {
        let appliance = try await damaged()
        // Nobody asked.
        var peer = try await peer(appliance, answersWanted: false)
        peer.send(.blocks) { BlocksMeta(question: 1, places: []).write(&$0) }
        #expect(await peer.refusal()?.code == "protocolError")
        // Wrong bytes; a place that was not asked for; less data than it says; tables that lie.
        let bad: [(RawPeer) -> Void] = [
            { $0.send(.blocks, payload: [UInt8](repeating: 1, count: 4096)) { BlocksMeta(question: 1, places: [0]).write(&$0) } },
            { $0.send(.blocks, payload: [UInt8](repeating: 1, count: 4096)) { BlocksMeta(question: 1, places: [1]).write(&$0) } },
            { $0.send(.blocks, payload: [UInt8](repeating: 1, count: 100)) { BlocksMeta(question: 1, places: [0]).write(&$0) } },
            { $0.send(.blocks) { BlocksMeta(question: 2, places: []).write(&$0) } },
            { $0.send(.blocks) { $0.put(UInt64(1), UInt64(1 << 40)) } },
        ]
        for (number, answer) in bad.enumerated() {
            peer = try await self.peer(appliance, answersWanted: true)
            guard case .frame(.blocksWanted, let meta) = await peer.next() else {
                Issue.record("it was not asked")
                return
            }
            #expect(meta.count == 16 + 24)
            answer(peer)
            #expect(await peer.refusal()?.code == "protocolError", "answer \(number)")
        }
        #expect(appliance.store.badExtents().map(\.block) == [2])
        await appliance.stop()
    }

    /// Whatever the source says: bytes that are not the ones that are wanted never come near the data.
    @Test func randomAnswersRepairOnlyWhatTheyMatch() async throws {
        let appliance = try await damaged()
        var random = SeededRandom(seed: 77)
        let segments = try segmentBytes(appliance)
        // An answer that there is nothing keeps it from being asked before the next pass.
        let store = appliance.store
        let passes = Task {
            while !Task.isCancelled {
                while case .read? = store.scrubStep() {}
                try await Task.sleep(for: .milliseconds(1))
            }
        }
        for round in 0..<40 {
            let peer = try await self.peer(appliance, answersWanted: true)
            guard case .frame(.blocksWanted, _) = await peer.next() else {
                Issue.record("it was not asked, round \(round)")
                return
            }
            var meta: [UInt8] = []
            var table = ByteBuffer()
            BlocksMeta(question: UInt64(random.below(3)), places: Array(0..<random.below(3))).write(&table)
            meta = Array(buffer: table)
            for _ in 0..<random.below(4) { meta[random.below(meta.count)] ^= UInt8(1 << random.below(8)) }
            if random.below(4) == 0 { meta.removeLast(random.below(meta.count)) }
            let payload = random.below(4) == 0 ? [] : noise(4096 * random.below(3), &random)
            peer.send(.blocks, payload: payload) { $0.writeBytes(meta) }
            // Some say no more than that they have nothing; the stream goes on then.
            peer.send(.epochSeal) { $0.put(UInt64(1)) }
            #expect(await peer.refusal()?.code == "protocolError", "round \(round)")
        }
        passes.cancel()
        _ = await passes.result
        #expect(appliance.store.badExtents().map(\.block) == [2])
        #expect(try segmentBytes(appliance) == segments)
        await appliance.stop()
    }

    private func segmentBytes(_ appliance: TestAppliance) throws -> [String: Data] {
        let directory = appliance.directory.path + "/store/segments"
        return try Dictionary(uniqueKeysWithValues: FileManager.default.contentsOfDirectory(atPath: directory).map { ($0, try Data(contentsOf: URL(fileURLWithPath: directory + "/" + $0))) })
    }

    /// Blocks that are in compressed clusters, of the newest layer and of older ones.
    @Test(arguments: [StoreCompression.lz4, .zstd]) func clustersThatRottedAreRepairedFromTheSource(compression: StoreCompression) async throws {
        var options = StoreOptions()
        options.compression = compression
        let appliance = try TestAppliance(options: options)
        try await appliance.start()
        let source = ModelSource(sizes: [1 << 20], seed: 33)
        source.fill { UInt8(truncatingIfNeeded: $0 >> 9) | 1 }
        let sender = try appliance.sender(source)
        sender.start()
        await source.untilAcknowledged(exact: 2)
        // Headers of clusters: all that is in them is lost.
        for block in [0, 16, 96] as [UInt64] { try rot(appliance, block: block, at: 5) }
        scrub(appliance.store)
        #expect(appliance.store.statistics().scrub.badBlockCount + appliance.store.statistics().scrub.repairedBlockCount >= 24)
        try await eventually("all is repaired") { appliance.store.badExtents().isEmpty }
        scrub(appliance.store)
        #expect(appliance.store.badExtents().isEmpty && appliance.store.statistics().scrub.repairedBlockCount >= 24)
        source.writeRandomly(count: 20)
        await source.untilAcknowledged(exact: source.acknowledgedExactCount + 2)
        await sender.stop()
        #expect(try appliance.checkRecoveryPoints(source) >= 4)
        await appliance.stop()
        #expect(try StoreCheck.run(directory: appliance.directory.path + "/store", readsData: true).isClean)
    }

    /// Some of it the source still has, some of it is overwritten there: each block for itself.
    @Test func whatIsLeftOfAClusterAtTheSourceIsEnoughForThose() async throws {
        let appliance = try TestAppliance()
        try await appliance.start()
        let image = (0..<1 << 20).map { UInt8(truncatingIfNeeded: $0 >> 9) | 1 }
        try appliance.store.createGroup(TestAppliance.group, volumes: [VolumeSpec(name: "disk-0", geometry: BlockGeometry(sizeBytes: 1 << 20, logicalBlockBytes: 512))])
        let writer = try appliance.store.begin(1, instance: "before", group: TestAppliance.group)
        try writer.append(volume: 0, offsetBytes: 0, image)
        _ = try writer.seal()
        try rot(appliance, block: 32, at: 5)
        scrub(appliance.store)
        #expect(appliance.store.badExtents().map(\.block) == [32] && appliance.store.badExtents().map(\.count) == [16])
        let peer = try await peer(appliance, answersWanted: true)
        guard case .frame(.blocksWanted, _) = await peer.next() else {
            Issue.record("it was not asked")
            return
        }
        peer.send(.blocks, payload: Array(image[34 * 4096..<35 * 4096] + image[40 * 4096..<41 * 4096])) { BlocksMeta(question: 1, places: [2, 8]).write(&$0) }
        try await eventually("two blocks are repaired") { appliance.store.statistics().scrub.repairedBlockCount == 2 }
        #expect(appliance.store.badExtents().map(\.block) == [32, 35, 41] && appliance.store.badExtents().map(\.count) == [2, 5, 7])
        await appliance.stop()
    }

    /// The agent says nothing: its epochs are taken all the same, and it is asked again on its next stream.
    @Test func whoNeverAnswersReplicatesAllTheSame() async throws {
        let appliance = try await damaged()
        for round in 1...3 as ClosedRange<UInt64> {
            let peer = try await peer(appliance, answersWanted: true)
            guard case .frame(.blocksWanted, _) = await peer.next() else {
                Issue.record("it was not asked, stream \(round)")
                return
            }
            let number = EpochNumber(round)
            for epoch in [EpochNumber(round * 10), EpochNumber(round * 10 + 1)] {
                peer.send(.epochBegin) { EpochBeginMeta(cut: Cut(epoch: epoch, kind: .exact, timeNanoseconds: 1, blockCount: 0)).write(&$0) }
                peer.send(.epochSeal) { EpochSealMeta(epoch: epoch, dataBytes: 0, zeroBytes: 0, digest: 0, consistency: .crash).write(&$0) }
                guard case .frame(.ack, _) = await peer.next() else {
                    Issue.record("no ACK, stream \(round), \(number)")
                    return
                }
            }
            // Closed between the question and its answer.
            try await peer.channel.close()
        }
        #expect(appliance.store.badExtents().map(\.block) == [2])
        await appliance.stop()
    }

    /// What was asked about is in another layer when the answer comes: nothing is touched, and the next pass asks again.
    @Test func anAnswerThatComesAfterAMergeIsAskedForAgain() async throws {
        let appliance = try await damaged()
        let store = appliance.store
        let told = Mutex<[String]>([])
        store.scrubber.state.withLock { $0.onFinding = { if case .notRepaired(_, _, let block, _, let why) = $0 { told.withLock { $0.append("\(block): \(why)") } } } }
        let good = try goodBlock()
        let peer = try await peer(appliance, answersWanted: true)
        guard case .frame(.blocksWanted, _) = await peer.next() else {
            Issue.record("it was not asked")
            return
        }
        // As upkeep does when it moves data away; to the same place here.
        let layer = try #require(store.read { $0.layers.values.first })
        let merged = try LayerMerge.write(store.storage, store: store.uuid, id: store.shared.withLock { $0.newFile() }, layers: [layer])
        #expect(try store.publish([layer.id], merged))
        let segments = try segmentBytes(appliance)
        peer.send(.blocks, payload: good) { BlocksMeta(question: 1, places: [0]).write(&$0) }
        try await eventually("it is said") { !told.withLock { $0.isEmpty } }
        #expect(told.withLock { $0 } == ["2: its layer was merged meanwhile; the next pass finds it again"])
        #expect(try segmentBytes(appliance) == segments)
        scrub(store)
        guard case .frame(.blocksWanted, _) = await peer.next() else {
            Issue.record("it was not asked again")
            return
        }
        peer.send(.blocks, payload: good) { BlocksMeta(question: 2, places: [0]).write(&$0) }
        try await eventually("it is repaired") { store.badExtents().isEmpty }
        scrub(store)
        #expect(store.badExtents().isEmpty && store.statistics().scrub.repairedBlockCount == 1)
        await appliance.stop()
    }

    /// Block 2 as `damaged` wrote it.
    private func goodBlock() throws -> [UInt8] {
        var random = SeededRandom(seed: 4)
        return Array(noise(4 * 4096, &random)[2 * 4096..<3 * 4096])
    }

    /// An older agent does not know the question.
    @Test func whoDoesNotAnswerIsNotAsked() async throws {
        let appliance = try await damaged()
        let peer = try await peer(appliance, answersWanted: false)
        // Its next frame is the answer to this, after many times the interval between questions.
        try await eventually("time passes") { appliance.log.text.contains("data stream of group") }
        peer.send(.epochSeal) { $0.put(UInt64(1)) }
        #expect(await peer.refusal()?.code == "protocolError")
        await appliance.stop()
    }
}

import BlockTap
import Foundation
import NIOCore
import Synchronization
import Testing

@testable import Replica

/// Blocks that rotted in the store come back from the source, as long as that still has them.
@Suite(.timeLimit(.minutes(10))) struct LinkRepairTests {
    /// Damages a block as the newest layer with it has it; returns the points that show it.
    private func rot(_ appliance: TestAppliance, block: UInt64) throws {
        let store = appliance.store
        for layer in store.read({ $0.layers.keys.sorted(by: >) }) {
            guard let (path, byte) = try place(store, layer: layer, block: block) else { continue }
            let file = open(appliance.directory.path + "/store/" + path, O_RDWR)
            defer { close(file) }
            var bad: UInt8 = 0
            pread(file, &bad, 1, off_t(byte + 100))
            bad ^= 0x10
            pwrite(file, &bad, 1, off_t(byte + 100))
            fsync(file)
            return
        }
        Issue.record("no layer has block \(block)")
    }

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

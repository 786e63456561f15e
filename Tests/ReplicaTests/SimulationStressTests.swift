import BlockTap
import Foundation
import Synchronization
import Testing

@testable import Replica
@testable import StoreSimulation

/// The store with its real threads on real files: epochs, readers, forks, people who drop points, and upkeep, all at once. The simulation
/// takes one step after the other; this is about what happens at the same time.
@Suite struct SimulationStressTests {
    private static let blockCount = 1024
    private static let epochCount = 400
    private static let pointsKept = 6

    /// A stamp per block.
    private typealias Blocks = [UInt32]

    private final class Model: Sendable {
        struct Values {
            var points: [(id: RecoveryPointID, disks: [Blocks])] = []
            /// Nobody may count on these any more.
            var dropped: Set<RecoveryPointID> = []
            var problems: [String] = []
            var isDone = false
            var readCount = 0
            var forkCount = 0
        }
        let values = Mutex(Values())

        func problem(_ what: String) { values.withLock { $0.problems.append(what) } }
        var isOver: Bool { values.withLock { $0.isDone || !$0.problems.isEmpty } }
    }

    /// Runs all of `bodies` on threads of their own.
    private func together(_ model: Model, _ bodies: [@Sendable () throws -> Void]) {
        let ended = Replica.Semaphore()
        for body in bodies {
            Thread.detachNewThread {
                do { try body() } catch { model.problem("\(error)") }
                ended.signal()
            }
        }
        for _ in bodies { ended.wait() }
    }

    @Test func epochsReadersForksAndUpkeepDoNotDisturbEachOther() throws {
        let directory = TemporaryDirectory()
        var options = smallOptions
        options.garbageBytesMin = 64 << 10
        options.reclaimBytesMin = 4096
        options.manifestRewriteBytes = 64 << 10
        options.lowSpaceBytes = 0
        options.lowSpacePercent = 0
        let store = try openStore(directory, options)
        let bytes = UInt64(Self.blockCount * 4096)
        try store.createGroup(webGroup, volumes: [spec("vda", bytes: bytes), spec("vdb", bytes: bytes)])
        store.startUpkeep(everySeconds: 0.001, bytesPerSecond: 0)
        let model = Model()

        let writer: @Sendable () throws -> Void = {
            var random = SeededRandom(seed: 1)
            var disks = [Blocks](repeating: Blocks(repeating: 0, count: Self.blockCount), count: 2)
            defer { model.values.withLock { $0.isDone = true } }
            for epoch in 1...UInt64(Self.epochCount) {
                if model.isOver { return }
                let epochWriter = try store.begin(epoch)
                for number in 0..<12 {
                    let disk = random.below(2)
                    let start = random.below(Self.blockCount)
                    let count = min(Self.blockCount - start, 1 + random.below(24))
                    let stamp = random.below(6) == 0 ? 0 : UInt32(epoch) * 16 + UInt32(number)
                    let data = Self.data(stamp, count)
                    if stamp == 0 {
                        try epochWriter.zero(volume: disk, offsetBytes: UInt64(start * 4096), lengthBytes: UInt64(count * 4096))
                    } else {
                        try epochWriter.append(volume: disk, offsetBytes: UInt64(start * 4096), data)
                    }
                    disks[disk].replaceSubrange(start..<start + count, with: repeatElement(stamp, count: count))
                }
                let point = try epochWriter.seal()!
                let gone = model.values.withLock { values -> [RecoveryPointID] in
                    values.points.append((point.id, disks))
                    guard values.points.count > Self.pointsKept * 2 else { return [] }
                    // Not the oldest only, so that merges happen in the middle.
                    let ids = (0..<Self.pointsKept).map { _ in values.points.remove(at: random.below(values.points.count - 1)).id }
                    values.dropped.formUnion(ids)
                    return ids
                }
                if !gone.isEmpty { try store.dropRecoveryPoints(webGroup, gone) }
            }
        }

        func reader(_ seed: UInt64) -> @Sendable () throws -> Void {
            {
                var random = SeededRandom(seed: seed)
                var held: [(VolumeReader, Blocks)] = []
                while !model.isOver {
                    if held.count > 3 { held.remove(at: random.below(held.count)) }
                    guard let point = model.values.withLock({ $0.points.randomElement(using: &random) }) else { continue }
                    let disk = random.below(2)
                    do throws(StoreError) { held.append((try store.openRecoveryPoint(webGroup, point.id, volume: disk), point.disks[disk])) } catch {
                        guard case .unknownRecoveryPoint(_, let id) = error, model.values.withLock({ $0.dropped.contains(id) }) else { throw error }
                        continue
                    }
                    for (volume, blocks) in held { try Self.compare(volume.read, blocks, &random, "a reader") }
                    model.values.withLock { $0.readCount += 1 }
                }
            }
        }

        func forker(_ name: String, _ seed: UInt64) -> @Sendable () throws -> Void {
            {
                var random = SeededRandom(seed: seed)
                var stamp: UInt32 = UInt32(seed) << 24
                while !model.isOver {
                    guard let point = model.values.withLock({ $0.points.randomElement(using: &random) }) else { continue }
                    do throws(StoreError) { try store.fork(ForkID(name), of: webGroup, at: point.id, purpose: "") } catch {
                        guard case .unknownRecoveryPoint = error else { throw error }
                        continue
                    }
                    var blocks = point.disks[0]
                    let fork = try store.openFork(ForkID(name), volume: 0)
                    for round in 0..<8 {
                        for _ in 0..<20 {
                            let start = random.below(Self.blockCount)
                            let count = min(Self.blockCount - start, 1 + random.below(8))
                            stamp += 1
                            try Self.data(stamp, count).withUnsafeBytes { try fork.write(offsetBytes: UInt64(start * 4096), $0) }
                            blocks.replaceSubrange(start..<start + count, with: repeatElement(stamp, count: count))
                        }
                        try Self.compare(fork.read, blocks, &random, "fork \(name)")
                        if round % 3 == 0 { try fork.flush() }
                        if round % 3 == 1 { try store.sealFork(ForkID(name)) }
                        if round == 5 {
                            try store.fork(ForkID(name + "-child"), ofFork: ForkID(name), purpose: "")
                            let child = try store.openFork(ForkID(name + "-child"), volume: 0)
                            try Self.compare(child.read, blocks, &random, "child of fork \(name)")
                            try child.close()
                            try store.dropFork(ForkID(name + "-child"))
                        }
                    }
                    try Self.compare(fork.read, blocks, nil, "fork \(name) at its end")
                    try fork.close()
                    try store.dropFork(ForkID(name))
                    model.values.withLock { $0.forkCount += 1 }
                }
            }
        }

        together(model, [writer, reader(2), reader(3), forker("f1", 4), forker("f2", 5)])
        let values = model.values.withLock { $0 }
        #expect(values.problems.isEmpty, "\(values.problems)")
        let upkeep = store.statistics().upkeep
        #expect(upkeep.layersMerged > 0 && upkeep.bytesReclaimed > 0 && values.readCount > 0 && values.forkCount > 0, "\(upkeep), \(values.readCount) reads, \(values.forkCount) forks")
        store.close()

        // And once more from the disk.
        let again = try openStore(directory, options)
        #expect(again.recoveryPoints(webGroup).map(\.id) == values.points.map(\.id))
        for point in values.points {
            for disk in 0..<2 { try Self.compare(again.openRecoveryPoint(webGroup, point.id, volume: disk).read, point.disks[disk], nil, "\(point.id) after opening") }
        }
        again.close()
    }

    private static func data(_ stamp: UInt32, _ blocks: Int) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: blocks * 4096)
        bytes.withUnsafeMutableBytes { fill($0.baseAddress!, repeatElement(stamp, count: blocks * sectorsPerBlock)) }
        return bytes
    }

    /// A part of the disk, or with no `random` all of it.
    private static func compare(_ read: (UInt64, UnsafeMutableRawBufferPointer) throws(StoreError) -> Void, _ blocks: Blocks, _ random: inout SeededRandom, _ what: String) throws {
        let start = random.below(blocks.count)
        try compare(read, blocks, start..<min(blocks.count, start + 1 + random.below(200)), what)
    }

    private static func compare(_ read: (UInt64, UnsafeMutableRawBufferPointer) throws(StoreError) -> Void, _ blocks: Blocks, _: Never?, _ what: String) throws {
        try compare(read, blocks, blocks.indices, what)
    }

    private static func compare(_ read: (UInt64, UnsafeMutableRawBufferPointer) throws(StoreError) -> Void, _ blocks: Blocks, _ range: Range<Int>, _ what: String) throws {
        let bytes = UnsafeMutableRawBufferPointer.allocate(byteCount: range.count * 4096, alignment: 4096)
        defer { bytes.deallocate() }
        try read(UInt64(range.lowerBound * 4096), bytes)
        for (sector, stamp) in stamps(UnsafeRawBufferPointer(bytes)).enumerated() where stamp != blocks[range.lowerBound + sector / sectorsPerBlock] {
            throw StressFailure(what: "\(what): block \(range.lowerBound + sector / sectorsPerBlock) has stamp \(stamp), not \(blocks[range.lowerBound + sector / sectorsPerBlock])")
        }
    }

    private struct StressFailure: Error, CustomStringConvertible {
        var what: String
        var description: String { what }
    }
}

import BlockTap
import Foundation
import Glibc
import Testing

@testable import Replica
@testable import StoreSimulation

/// A store with one disk, and which version of each block it has at each recovery point. A block's bytes follow from its number and its
/// version, so that a model is 4 bytes per block.
final class UpkeepScene {
    let blockCount: Int
    let storage: any Storage
    var options: StoreOptions
    var store: ReplicaStore!
    var random: SeededRandom
    var current: [UInt32]
    var points: [RecoveryPointID: [UInt32]] = [:]
    var epoch: UInt64 = 0
    private var version: UInt32 = 0
    /// Bytes of data.
    var received: UInt64 = 0
    var clock: Clock
    /// Of each block; the rest of it is all the same, so that it shrinks.
    var noiseBytes = 4096

    /// Nanoseconds since 1970; only tests move it.
    final class Clock: @unchecked Sendable { var now: UInt64 = 1_700_000_000_000_000_000 }

    init(seed: UInt64, storage: any Storage, blockCount: Int, options: StoreOptions = smallOptions) throws {
        random = SeededRandom(seed: seed)
        self.blockCount = blockCount
        self.storage = storage
        let clock = Clock()
        self.clock = clock
        self.options = options
        self.options.now = { clock.now }
        self.options.garbageBytesMin = 64 << 10
        self.options.reclaimBytesMin = 16 << 10
        current = [UInt32](repeating: 0, count: blockCount)
        try open()
        try store.createGroup(webGroup, volumes: [spec("vda", bytes: UInt64(blockCount * 4096))])
    }

    func open() throws { store = try ReplicaStore(storage: storage, options: options, logger: quiet) }

    func bytes(block: Int, version: UInt32, into bytes: UnsafeMutableRawBufferPointer) {
        var word = UInt64(version) << 32 | UInt64(block)
        if version == 0 {
            bytes.initializeMemory(as: UInt8.self, repeating: 0)
            return
        }
        bytes.initializeMemory(as: UInt8.self, repeating: 0)
        for offset in stride(from: 0, to: noiseBytes, by: 8) {
            word = word &* 6_364_136_223_846_793_005 &+ 1_442_695_040_888_963_407
            bytes.storeBytes(of: word, toByteOffset: offset, as: UInt64.self)
        }
    }

    /// Some overwritten extents, sometimes zeroes; the model follows when it was acknowledged.
    @discardableResult
    func receive(extents: Int, blocksMax: Int, kind: EpochKind = .exact) throws -> RecoveryPoint? {
        epoch += 1
        var next = current
        let writer = try store.begin(epoch, kind)
        for _ in 0..<extents {
            // Half of it goes to a tenth of the disk.
            let start = random.below(2) == 0 ? random.below(blockCount) : random.below(blockCount / 10)
            let count = min(1 + random.below(blocksMax), blockCount - start)
            if random.below(16) == 0 {
                try writer.zero(volume: 0, offsetBytes: UInt64(start * 4096), lengthBytes: UInt64(count * 4096))
                for block in start..<start + count { next[block] = 0 }
                continue
            }
            version += 1
            var bytes = [UInt8](repeating: 0, count: count * 4096)
            bytes.withUnsafeMutableBytes { raw in
                for block in 0..<count { self.bytes(block: start + block, version: version, into: UnsafeMutableRawBufferPointer(rebasing: raw[block * 4096..<(block + 1) * 4096])) }
            }
            try writer.append(volume: 0, offsetBytes: UInt64(start * 4096), bytes)
            received += UInt64(bytes.count)
            for block in start..<start + count { next[block] = version }
        }
        nonisolated(unsafe) var result: Result<RecoveryPoint?, StoreError>?
        let done = Replica.Semaphore()
        writer.seal(consistency: .crash) {
            result = $0
            done.signal()
        }
        if options.isStepped { store.thread.runQueued() } else { done.wait() }
        let point = try result!.get()
        current = next
        if let point { points[point.id] = next }
        return point
    }

    func upkeep() throws {
        while try store.upkeepStep() != nil {}
    }

    /// The points that the store has are exactly as the model says.
    func check(_ what: String = "") throws {
        let have = store.recoveryPoints(webGroup).map(\.id)
        for id in have { try check(id, what) }
        points = points.filter { have.contains($0.key) }
    }

    func check(_ id: RecoveryPointID, _ what: String = "") throws {
        let model = try #require(points[id], "\(id) \(what)")
        try check(store.openRecoveryPoint(webGroup, id, volume: 0), model, "\(id) \(what)")
    }

    func check(_ reader: VolumeReader, _ model: [UInt32], _ what: String) throws {
        let batch = 256
        let bytes = UnsafeMutableRawBufferPointer.allocate(byteCount: batch * 4096, alignment: 4096)
        let expected = UnsafeMutableRawBufferPointer.allocate(byteCount: 4096, alignment: 4096)
        defer {
            bytes.deallocate()
            expected.deallocate()
        }
        for start in stride(from: 0, to: blockCount, by: batch) {
            let count = min(batch, blockCount - start)
            try reader.read(offsetBytes: UInt64(start * 4096), into: UnsafeMutableRawBufferPointer(rebasing: bytes[..<(count * 4096)]))
            for block in 0..<count {
                self.bytes(block: start + block, version: model[start + block], into: expected)
                if memcmp(bytes.baseAddress! + block * 4096, expected.baseAddress!, 4096) != 0 {
                    Issue.record("\(what): block \(start + block) is not as it was")
                    return
                }
            }
        }
    }

    /// Different blocks that the kept points and the disk as it is now need.
    var liveBlocks: Int {
        let kept = store.recoveryPoints(webGroup).compactMap { points[$0.id] } + [current]
        var total = 0
        var versions: Set<UInt32> = []
        for block in 0..<blockCount {
            versions.removeAll(keepingCapacity: true)
            for model in kept where model[block] != 0 { versions.insert(model[block]) }
            total += versions.count
        }
        return total
    }

    /// What the files of a directory take on disk.
    func allocatedBytes(_ directory: String) throws -> UInt64 {
        try storage.list(directory).reduce(0) { $0 + (try storage.open(directory + "/" + $1, .read, direct: false).allocatedBytes()) }
    }

    func chainLength() -> Int { store.read { $0.chain($0.groups[webGroup]!.volumes[0].top).count } }
}

import BlockTap
import Foundation
import Replica
import Synchronization

/// An `EpochSource` over arrays in memory, simple enough to be believed: an exact cut copies the dirty blocks (and, as the model
/// to compare with, the whole disks); a fuzzy epoch reads its blocks when they are asked for.
final class ModelSource: EpochSource, @unchecked Sendable {
    struct Key: Hashable {
        var disk: Int
        var block: Int
    }

    private struct Epoch {
        var cut: Cut
        var blocks: Set<Key>
        var isFullSync: Bool
    }

    private enum Pending {
        case run(EpochNumber, disk: Int, block: Int, count: Int, content: [UInt8]?)
        case zero(EpochNumber, disk: Int, block: Int, count: Int)
        case end(EpochNumber)
        case abandoned(EpochNumber, AbandonReason)
    }

    static let drainBufferBytes = 128 * 1024
    let instance: String
    let disks: [SourceDisk]
    private let lock = NSLock()
    private var content: [[UInt8]]
    private var trimmed: Set<Key> = []
    private var dirty: Set<Key> = []
    private var unsynced: Set<Key> = []
    private var unacknowledged: [Epoch] = []
    private var queue: [Pending] = []
    private var lastEpoch = EpochNumber.none
    private var freeSlots: [Int]
    private let slots: [UnsafeMutableRawPointer]
    private var wakeup: (@Sendable () -> Void)?
    private var random: SeededRandom
    private var counters = SourceStatistics()
    private var waiters: [(count: Int, continuation: CheckedContinuation<Void, Never>)] = []
    private(set) var fullSyncCount = 0
    private(set) var acknowledgedExact: [EpochNumber] = []
    /// The disks at each exact cut.
    private(set) var snapshots: [EpochNumber: [[UInt8]]] = [:]
    /// Chance in percent that an epoch is abandoned half-way, and that `nextItem` says "not yet".
    var abandonPercent = 0
    var abandonReason = AbandonReason.preservedBudget
    var hesitatePercent = 0
    /// So many cuts outside of a full sync are not proven.
    private var unprovenLeft = 0
    /// Before each cut, with the number of those before it.
    var onCut: (@Sendable (UInt64) -> Void)?
    /// What exact cuts were asked to be.
    private var asked: [CutConsistency] = []
    private(set) var heldBuffersMax = 0
    private var handedOut = 0

    init(sizes: [Int], seed: UInt64, instance: String = UUID().uuidString.lowercased()) {
        self.instance = instance
        random = SeededRandom(seed: seed)
        disks = sizes.enumerated().map {
            SourceDisk(name: "disk-\($0)", geometry: BlockGeometry(sizeBytes: UInt64($1), logicalBlockBytes: 512))
        }
        content = sizes.map { [UInt8](repeating: 0, count: $0) }
        slots = (0..<8).map { _ in .allocate(byteCount: Self.drainBufferBytes, alignment: 4096) }
        freeSlots = Array(0..<8)
    }

    deinit { for slot in slots { slot.deallocate() } }

    /// The same disks after a restart of the agent, which has forgotten everything; they may have grown.
    convenience init(restarted old: ModelSource, seed: UInt64, grownTo sizes: [Int]? = nil) {
        let image = old.image
        self.init(sizes: sizes ?? image.map(\.count), seed: seed)
        for (disk, bytes) in image.enumerated() { content[disk].replaceSubrange(0..<bytes.count, with: bytes) }
    }

    // MARK: The protected machine

    /// Puts random bytes into whole blocks, and nobody notices: the agent is down, or the tap missed it.
    func changeUnseen(disk: Int, blocks: [Int], to value: UInt8? = nil) {
        lock.withLock {
            for block in blocks {
                // It is no zero any more, for whoever reads it.
                trimmed.remove(Key(disk: disk, block: block))
                let end = min((block + 1) * blockBytes, content[disk].count)
                for index in block * blockBytes..<end { content[disk][index] = value ?? UInt8.random(in: 0...255, using: &random) }
            }
        }
    }

    /// The tap finds out by itself that it missed something.
    func missedWrites() { beginFullSync() }

    func leaveUnproven(_ count: Int) { lock.withLock { unprovenLeft = count } }
    var askedConsistencies: [CutConsistency] { lock.withLock { asked } }

    /// Random writes of all kinds: random, compressible and zero bytes, and discards.
    func writeRandomly(count: Int) {
        lock.withLock {
            for _ in 0..<count {
                let disk = Int.random(in: 0..<disks.count, using: &random)
                let blocks = Int(disks[disk].geometry.blockCount)
                let first = Int.random(in: 0..<blocks, using: &random)
                let run = min(blocks - first, Int.random(in: 0..<4, using: &random) == 0 ? Int.random(in: 1...80, using: &random) : 1)
                let start = first * blockBytes
                let end = min((first + run) * blockBytes, content[disk].count)
                let kind = Int.random(in: 0..<8, using: &random)
                for block in first..<(first + run) {
                    let key = Key(disk: disk, block: block)
                    dirty.insert(key)
                    if kind == 0 { trimmed.insert(key) } else { trimmed.remove(key) }
                }
                switch kind {
                case 0, 1: for index in start..<end { content[disk][index] = 0 }
                case 2, 3:
                    let value = UInt8.random(in: 1...255, using: &random)
                    for index in start..<end { content[disk][index] = value &+ UInt8(truncatingIfNeeded: index >> 9) }
                default:
                    var index = start
                    while index < end {
                        var word = random.next()
                        for _ in 0..<8 where index < end {
                            content[disk][index] = UInt8(truncatingIfNeeded: word)
                            word >>= 8
                            index += 1
                        }
                    }
                }
                counters.writtenBytes += UInt64(end - start)
            }
        }
    }

    func fill(_ byte: (Int) -> UInt8) {
        lock.withLock {
            for disk in content.indices {
                for index in content[disk].indices { content[disk][index] = byte(index) }
            }
        }
    }

    /// Every disk full of bytes that do not compress.
    func fillRandomly() {
        lock.withLock {
            for disk in content.indices {
                for index in content[disk].indices where index % 8 == 0 {
                    let word = random.next()
                    for byte in 0..<min(8, content[disk].count - index) { content[disk][index + byte] = UInt8(truncatingIfNeeded: word >> (8 * byte)) }
                }
            }
        }
    }

    var image: [[UInt8]] { lock.withLock { content } }
    var exactSnapshots: [EpochNumber: [[UInt8]]] { lock.withLock { snapshots } }
    /// Bytes of data handed out so far.
    var handedOutBytes: Int { lock.withLock { handedOut } }
    var acknowledgedExactCount: Int { lock.withLock { acknowledgedExact.count } }

    /// Returns once `count` exact epochs have been acknowledged in all.
    func untilAcknowledged(exact count: Int) async {
        await withCheckedContinuation { continuation in
            let isDone = lock.withLock { () -> Bool in
                if acknowledgedExact.count >= count { return true }
                waiters.append((count, continuation))
                return false
            }
            if isDone { continuation.resume() }
        }
    }

    // MARK: EpochSource

    func beginFullSync() {
        lock.withLock {
            fullSyncCount += 1
            for disk in disks.indices {
                for block in 0..<Int(disks[disk].geometry.blockCount) { unsynced.insert(Key(disk: disk, block: block)) }
            }
        }
    }

    var needsFuzzyCut: Bool { get async { lock.withLock { !unsynced.isEmpty } } }

    func cut(fuzzyBytesMax: UInt64, consistency: CutConsistency) async throws -> Cut {
        onCut?(lock.withLock { counters.cutCount })
        return try lock.withLock {
            guard queue.isEmpty else { throw EpochError.draining(lastEpoch) }
            lastEpoch = lastEpoch.next
            counters.cutCount += 1
            let isFullSync = !unsynced.isEmpty
            let isFuzzy = isFullSync || unprovenLeft > 0
            // Far smaller than asked for, so that a full sync of a small disk takes several epochs.
            let blocks = isFullSync ? Set(sorted(unsynced).prefix(min(Int(fuzzyBytesMax) / blockBytes, 300))) : dirty
            if isFullSync {
                unsynced.subtract(blocks)
            } else {
                dirty = []
                if isFuzzy { unprovenLeft -= 1 } else { snapshots[lastEpoch] = content }
                asked.append(consistency)
            }
            let cut = Cut(
                epoch: lastEpoch, kind: isFuzzy ? .fuzzy : .exact,
                timeNanoseconds: UInt64(Date().timeIntervalSince1970 * 1e9), blockCount: UInt64(blocks.count),
                proof: isFuzzy ? nil : CutProof(method: consistency == .crash ? .rounds : .freeze, consistency: consistency))
            unacknowledged.append(Epoch(cut: cut, blocks: blocks, isFullSync: isFullSync))
            enqueue(cut, sorted(blocks))
            if Int.random(in: 0..<100, using: &random) < abandonPercent {
                queue.removeLast(Int.random(in: 1...queue.count, using: &random))
                queue.append(.abandoned(lastEpoch, abandonReason))
            }
            return cut
        }
    }

    private func sorted(_ keys: Set<Key>) -> [Key] { keys.sorted { ($0.disk, $0.block) < ($1.disk, $1.block) } }

    private func enqueue(_ cut: Cut, _ keys: [Key]) {
        let runMax = Self.drainBufferBytes / blockBytes
        var index = 0
        while index < keys.count {
            let first = keys[index]
            let isZero = trimmed.contains(first)
            var count = 1
            while index + count < keys.count, keys[index + count] == Key(disk: first.disk, block: first.block + count),
                count < runMax, trimmed.contains(keys[index + count]) == isZero
            { count += 1 }
            if isZero {
                queue.append(.zero(cut.epoch, disk: first.disk, block: first.block, count: count))
            } else {
                let end = min((first.block + count) * blockBytes, content[first.disk].count)
                queue.append(
                    .run(
                        cut.epoch, disk: first.disk, block: first.block, count: count,
                        content: cut.kind == .exact ? Array(content[first.disk][(first.block * blockBytes)..<end]) : nil))
            }
            index += count
        }
        queue.append(.end(cut.epoch))
    }

    func nextItem() -> DrainItem? {
        lock.lock()
        defer { lock.unlock() }
        guard let next = queue.first else { return nil }
        if Int.random(in: 0..<100, using: &random) < hesitatePercent {
            let wakeup = wakeup
            DispatchQueue.global().async { wakeup?() }
            return nil
        }
        switch next {
        case .run(let epoch, let disk, let block, let count, let bytes):
            guard let slot = freeSlots.popLast() else { return nil }
            heldBuffersMax = max(heldBuffersMax, slots.count - freeSlots.count)
            queue.removeFirst()
            let start = block * blockBytes
            handedOut += count * blockBytes
            let data = bytes ?? Array(content[disk][start..<min(start + count * blockBytes, content[disk].count)])
            data.withUnsafeBytes { slots[slot].copyMemory(from: $0.baseAddress!, byteCount: $0.count) }
            return .data(
                epoch, DrainBuffer(disk: disk, offsetBytes: UInt64(start), lengthBytes: data.count, memory: slots[slot], slot: slot))
        case .zero(let epoch, let disk, let block, let count):
            queue.removeFirst()
            let start = block * blockBytes
            let end = min(start + count * blockBytes, content[disk].count)
            return .zero(epoch, disk: disk, offsetBytes: UInt64(start), lengthBytes: UInt64(end - start))
        case .end(let epoch):
            queue.removeFirst()
            return .end(epoch)
        case .abandoned(let epoch, let why):
            queue.removeFirst()
            counters.abandonedCount += 1
            let index = unacknowledged.firstIndex { $0.cut.epoch == epoch }!
            giveBack(unacknowledged.remove(at: index))
            return .abandoned(epoch, why)
        }
    }

    private func giveBack(_ epoch: Epoch) {
        if epoch.isFullSync { unsynced.formUnion(epoch.blocks) } else { dirty.formUnion(epoch.blocks) }
    }

    func setWakeup(_ wakeup: (@Sendable () -> Void)?) { lock.withLock { self.wakeup = wakeup } }

    func release(_ buffer: DrainBuffer) {
        lock.withLock {
            // What a consumer reads after giving a buffer back must not look right.
            memset(buffer.memory, 0xA5, Self.drainBufferBytes)
            freeSlots.append(buffer.slot)
        }
    }

    func acknowledge(_ epoch: EpochNumber) {
        let ready = lock.withLock { () -> [CheckedContinuation<Void, Never>] in
            for done in unacknowledged where done.cut.epoch <= epoch && done.cut.kind == .exact {
                acknowledgedExact.append(done.cut.epoch)
            }
            unacknowledged.removeAll { $0.cut.epoch <= epoch }
            defer { waiters.removeAll { $0.count <= acknowledgedExact.count } }
            return waiters.filter { $0.count <= acknowledgedExact.count }.map(\.continuation)
        }
        for continuation in ready { continuation.resume() }
    }

    func abandonAll() async {
        lock.withLock {
            queue = []
            for epoch in unacknowledged { giveBack(epoch) }
            unacknowledged = []
        }
    }

    func read(disk: Int, offsetBytes: UInt64, lengthBytes: Int) async -> [UInt8]? {
        lock.withLock { Array(content[disk][Int(offsetBytes)..<Int(offsetBytes) + lengthBytes]) }
    }

    var statistics: SourceStatistics {
        get async {
            lock.withLock {
                var figures = counters
                let open = unacknowledged.filter { !$0.isFullSync }.reduce(0) { $0 + $1.blocks.count }
                let fuzzy = unacknowledged.filter { $0.isFullSync }.reduce(0) { $0 + $1.blocks.count }
                figures.behindBytes = UInt64((dirty.count + open) * blockBytes)
                figures.unsyncedBytes = UInt64((unsynced.count + fuzzy) * blockBytes)
                return figures
            }
        }
    }
}

import BlockTap
import Glibc

/// A block that the store lost and would take back from anywhere: its checksum says whether it is the one.
struct WantedBlock: Sendable, Hashable {
    var layer: UInt64
    var volume: Int
    var block: UInt64
    /// Of the block; 4096 but for the last one of a volume of odd size.
    var byteCount: Int
    var checksum: UInt64
}

/// Putting bad blocks right, beside everything else that goes on. Two ways:
///
/// - *In place*, a block that is stored plain. It is written only while the block there is not what the checksum of a live layer says, and only
///   with bytes that match it. The layer is pinned meanwhile, and has been live since it was made: so its blocks are alive in the sense of
///   `SegmentLook`, no hole is being punched into them, and nobody else appends there. A crash in the middle leaves a bad block where a
///   bad block was. Upkeep that is moving the block away verifies what it read; whoever has the point open reads the right block from
///   now on.
/// - *By moving*, whatever lies in a compressed cluster, and what the disk would not take in place. To write a cluster anew in place would risk
///   the blocks of it that are still good: in a crash, and with upkeep, which moves clusters as they are. So the blocks go, plain, to a
///   new segment, and the layer is written anew with their new places, in the same order and with the same record as when upkeep
///   moves data: copies synced, their name, the layer's file, its name, the record. When the layer was merged or moved in the
///   meantime the record does not fit any more, and the next pass finds the damage in the new layer.
extension ReplicaStore {
    /// Known bad blocks of the group's own disks that the source has not been asked for yet, at most `limit`.
    func wantedBlocks(_ group: GroupID, limit: Int) -> [WantedBlock] {
        let known = scrubber.state.withLock { $0.known }
        if known.isEmpty { return [] }
        let owners = read { state in state.owners(of: Set(known.keys), views: state.views) }
        var wanted: [WantedBlock] = []
        for (layer, entry) in known.sorted(by: { $0.key < $1.key }) {
            // What a fork wrote was never at the source.
            guard let owner = owners[layer], owner.group == group else { continue }
            if case .fork = owner.kind { continue }
            for run in entry.runs {
                for index in 0..<Int(run.blockCount) {
                    if wanted.count == limit { return wanted }
                    let block = run.startBlock + UInt64(index)
                    if entry.lost.contains(block) { continue }
                    wanted.append(WantedBlock(layer: layer, volume: owner.volume, block: block, byteCount: blockLength(block, sizeBytes: entry.sizeBytes), checksum: run.sums[index]))
                }
            }
        }
        return wanted
    }

    /// Nobody could help with these. They are not asked for again before the next pass has found them again.
    func notRepaired(_ blocks: [WantedBlock], group: GroupID, why: String) {
        if blocks.isEmpty { return }
        scrubber.state.withLock { state in
            for wanted in blocks { state.known[wanted.layer]?.lost.insert(wanted.block) }
        }
        for wanted in blocks {
            let disk = diskName(group, wanted.volume)
            logger.warning("a damaged block cannot be repaired: \(why)", metadata: ["group": "\(group)", "disk": "\(disk)", "block": "\(wanted.block)"])
            scrubber.tell(.notRepaired(group, disk: disk, block: wanted.block, count: 1, why: why))
        }
    }

    private func diskName(_ group: GroupID, _ volume: Int) -> String {
        read { state in
            // The group may have gone, and come back with fewer disks.
            guard let disks = state.groups[group]?.volumes, disks.indices.contains(volume) else { return "number \(volume)" }
            return disks[volume].spec.name
        }
    }

    /// Puts one block right that scrubbing found bad, wherever the store has it: in each layer whose checksum these bytes match. Throws
    /// `.invalid` when nothing bad is known there or the bytes are not what was there; then nothing is changed.
    public func repair(_ group: GroupID, volume: Int, block: UInt64, bytes: UnsafeRawBufferPointer) throws(StoreError) {
        let candidates = wantedBlocks(group, limit: .max).filter { $0.volume == volume && $0.block == block }
        guard !candidates.isEmpty else { throw .invalid("no damage is known of block \(block) of disk number \(volume) of group \(group)") }
        let matching = candidates.filter { $0.byteCount <= bytes.count && BlockChecksum.of(bytes.baseAddress!, count: $0.byteCount, blockIndex: block) == $0.checksum }
        guard !matching.isEmpty else { throw .invalid("these bytes are not what block \(block) of disk number \(volume) of group \(group) held") }
        let repaired = try repair(group, matching.map { ($0, Array(bytes.prefix($0.byteCount))) })
        guard !repaired.isEmpty else { throw .invalid("the layer that has block \(block) was merged meanwhile: the next pass finds the damage again") }
    }

    /// Puts right, durably, what matches its checksum, and returns what is right now: less, when layers were merged meanwhile. Any thread but
    /// the store's. When it throws what was repaired before stays repaired.
    func repair(_ group: GroupID, _ blocks: [(WantedBlock, [UInt8])]) throws(StoreError) -> [WantedBlock] {
        try withRepairs { () throws(StoreError) in
            var repaired: [WantedBlock] = []
            for (layer, part) in Dictionary(grouping: blocks, by: { $0.0.layer }).sorted(by: { $0.key < $1.key }) {
                repaired += try repair(group, layer: layer, part.sorted { $0.0.block < $1.0.block })
            }
            return repaired
        }
    }

    private func withRepairs<R>(_ body: () throws(StoreError) -> R) throws(StoreError) -> R {
        try scrubber.repairing.withLock { _ throws(StoreError) in
            nonisolated(unsafe) let result = try body()
            return result
        }
    }

    private struct Repair {
        var wanted: WantedBlock
        var bytes: [UInt8]
        /// What is known of where it lies.
        var run: BadRun

        var place: UInt64 { UInt64(run.segmentBlock + UInt32(wanted.block - run.startBlock)) * UInt64(blockBytes) }

        func matches(_ bytes: UnsafeRawPointer) -> Bool { BlockChecksum.of(bytes, count: wanted.byteCount, blockIndex: wanted.block) == wanted.checksum }
    }

    /// Of one layer, in the order of the blocks.
    private func repair(_ group: GroupID, layer: UInt64, _ blocks: [(WantedBlock, [UInt8])]) throws(StoreError) -> [WantedBlock] {
        let runs = scrubber.state.withLock { $0.known[layer]?.runs ?? [] }
        var repairs: [Repair] = []
        for (wanted, bytes) in blocks {
            // Only what is known to be bad, and only what it was.
            guard bytes.count == wanted.byteCount, let run = runs.first(where: { $0.startBlock <= wanted.block && wanted.block < $0.startBlock + $0.blockCount }) else { continue }
            let repair = Repair(wanted: wanted, bytes: bytes, run: run)
            guard run.sums[Int(wanted.block - run.startBlock)] == wanted.checksum,
                options.deliberateFault == .repairsNotChecked || bytes.withUnsafeBytes({ repair.matches($0.baseAddress!) }), repairs.last?.wanted.block != wanted.block else { continue }
            repairs.append(repair)
        }
        if repairs.isEmpty { return [] }
        // Layers and pins under one lock: while it is in the state or pinned nothing of it is given back.
        let pinned = shared.withLock { shared -> (record: LayerRecord, fresh: UInt32, id: UInt64, pin: UInt64)? in
            guard let record = shared.state.layers[layer] else { return nil }
            let (fresh, id) = (UInt32(shared.newFile()), shared.newFile())
            var held = Pin([record])
            held.layers.insert(id)
            held.segments.insert(fresh)
            return (record, fresh, id, shared.add(held))
        }
        guard let (record, fresh, id, pin) = pinned else { return [] }
        defer { unpin(pin) }

        var done: [Repair] = []
        var left: [Repair] = []
        for (segment, part) in Dictionary(grouping: repairs, by: { $0.run.segment }).sorted(by: { $0.key < $1.key }) {
            let plain = part.filter { !$0.run.cluster.isCompressed }
            let isRight = writeInPlace(plain, segment)
            left += part.filter { $0.run.cluster.isCompressed }
            for (repair, isRight) in zip(plain, isRight) { if isRight { done.append(repair) } else { left.append(repair) } }
        }
        forget(done.map(\.wanted), group)
        if left.isEmpty { return done.map(\.wanted) }
        left.sort { $0.wanted.block < $1.wanted.block }
        guard try move(left, of: record, to: fresh, id: id) else { return done.map(\.wanted) }
        scrubber.state.withLock { state in
            // What else is bad of the layer is so in the new one.
            state.known[id] = state.known.removeValue(forKey: layer)
        }
        forget(left.map { repair in
            var wanted = repair.wanted
            wanted.layer = id
            return wanted
        }, group)
        return (done + left).map(\.wanted)
    }

    // MARK: In place

    /// Which of them are right now, durably. A segment that cannot be written, or a disk that does not keep what it is given, is no error:
    /// there is another way.
    private func writeInPlace(_ repairs: [Repair], _ id: UInt32) -> [Bool] {
        if repairs.isEmpty { return [] }
        let memory = UnsafeMutableRawBufferPointer.allocate(byteCount: blockBytes, alignment: pageBytes)
        defer { memory.deallocate() }
        do throws(StoreError) {
            let file = try SegmentFile.open(storage, store: uuid, id: id, writable: true).file
            for repair in repairs {
                // Right after all: the disk could not read it then, or somebody was here before.
                if let count = try? file.read(into: memory, at: repair.place), count == memory.count, repair.matches(memory.baseAddress!) { continue }
                memset(memory.baseAddress!, 0, memory.count)
                repair.bytes.withUnsafeBytes { memcpyBytes(memory.baseAddress!, $0.baseAddress!, $0.count) }
                try file.write(UnsafeRawBufferPointer(memory), at: repair.place)
            }
            try file.dataSync()
            return try repairs.map { (repair) throws(StoreError) in try file.read(into: memory, at: repair.place) == memory.count && repair.matches(memory.baseAddress!) }
        } catch {
            logger.warning("bad blocks cannot be written anew where they are", metadata: ["segment": "\(id)", "error": "\(error)"])
            return repairs.map { _ in false }
        }
    }

    // MARK: By moving

    /// False when the layer was merged meanwhile.
    private func move(_ repairs: [Repair], of record: LayerRecord, to fresh: UInt32, id: UInt64) throws(StoreError) -> Bool {
        // Whatever of it is not named in the end.
        defer { upkeep.hasUnnamedFiles.store(true, ordering: .relaxed) }
        let layer: LayerRecord
        do throws(StoreError) {
            let target = try SegmentFile.create(storage, store: uuid, id: fresh).file
            let memory = UnsafeMutableRawBufferPointer.allocate(byteCount: repairs.count * blockBytes, alignment: pageBytes)
            defer { memory.deallocate() }
            memset(memory.baseAddress!, 0, memory.count)
            for (index, repair) in repairs.enumerated() {
                repair.bytes.withUnsafeBytes { memcpyBytes(memory.baseAddress! + index * blockBytes, $0.baseAddress!, $0.count) }
            }
            try target.write(UnsafeRawBufferPointer(memory), at: UInt64(blockBytes))
            try target.dataSync()
            try storage.syncDirectory("segments")
            layer = try rewrite(record, as: id, moved: repairs, to: fresh)
            try storage.syncDirectory("layers")
        } catch {
            // No record names them.
            try? storage.remove(LayerFile.path(id))
            try? storage.remove(SegmentFile.path(fresh))
            throw error
        }
        return try publish([record.id], layer)
    }

    /// The layer as it is, but for the blocks of `repairs`, which lie one after the other in `segment`.
    private func rewrite(_ record: LayerRecord, as id: UInt64, moved repairs: [Repair], to segment: UInt32) throws(StoreError) -> LayerRecord {
        let old = try LayerReader(storage, store: uuid, record: record)
        let writer = try LayerWriter(storage, store: uuid, id: id)
        var next = 0
        try old.forEachExtents { extents throws(StoreError) in
            for extent in extents {
                var rest = extent
                while next < repairs.count, !rest.isZero, repairs[next].wanted.block < rest.endBlock {
                    let block = repairs[next].wanted.block
                    guard block >= rest.startBlock else { throw .invalid("block \(block) is not in layer \(record.id)") }
                    if block > rest.startBlock { try writer.append(rest.part(from: rest.startBlock, to: block)) }
                    var moved = rest.part(from: block, to: block + 1)
                    moved.segment = segment
                    moved.segmentBlock = UInt32(1 + next)
                    moved.storedBytes = UInt32(blockBytes)
                    moved.encoding = ExtentEncoding.plain.rawValue
                    (moved.clusterSkip, moved.clusterBlocks) = (0, 0)
                    try writer.append(moved)
                    next += 1
                    if block + 1 == rest.endBlock { rest.blockCount = 0 } else { rest = rest.part(from: block + 1, to: rest.endBlock) }
                    if rest.blockCount == 0 { break }
                }
                if rest.blockCount > 0 { try writer.append(rest) }
            }
        }
        guard next == repairs.count else { throw .invalid("block \(repairs[next].wanted.block) is not in layer \(record.id)") }
        let sums = UnsafeMutablePointer<UInt64>.allocate(capacity: 1 << 16)
        defer { sums.deallocate() }
        try old.forEachExtents { extents throws(StoreError) in
            for extent in extents where !extent.isZero {
                var first = Int(extent.checksumIndex)
                let end = first + Int(extent.blockCount)
                while first < end {
                    let count = min(1 << 16, end - first)
                    try old.readChecksums(first..<first + count, into: sums)
                    try writer.append(UnsafeBufferPointer(start: sums, count: count))
                    first += count
                }
            }
        }
        let header = old.header
        return try writer.finish(LayerIdentity(
            id: id, parent: record.parent, volumeIndex: header.volumeIndex, sizeBytes: header.sizeBytes,
            cut: Cut(epoch: EpochNumber(header.epoch), kind: EpochKind(rawValue: header.kind) ?? .fuzzy, timeNanoseconds: header.cutTimeNanoseconds, blockCount: 0),
            consistency: Consistency(formatValue: header.consistency)))
    }

    /// They are not bad any more.
    private func forget(_ repaired: [WantedBlock], _ group: GroupID) {
        if repaired.isEmpty { return }
        scrubber.state.withLock { state in
            for wanted in repaired {
                state.statistics.repairedBlockCount += 1
                guard var known = state.known[wanted.layer], let index = known.runs.firstIndex(where: { $0.startBlock <= wanted.block && wanted.block < $0.startBlock + $0.blockCount }) else { continue }
                known.runs.replaceSubrange(index...index, with: known.runs[index].without(wanted.block))
                state.known[wanted.layer] = known.runs.isEmpty && known.damage == nil ? nil : known
            }
        }
        for wanted in repaired {
            let disk = diskName(group, wanted.volume)
            logger.notice("a damaged block was repaired", metadata: ["group": "\(group)", "disk": "\(disk)", "block": "\(wanted.block)"])
            scrubber.tell(.repaired(group, disk: disk, block: wanted.block, count: 1))
        }
    }
}

extension StoredExtent {
    /// Its blocks from `start` up to `end`, as they lie.
    fileprivate func part(from start: UInt64, to end: UInt64) -> StoredExtent {
        var part = self
        let skipped = UInt32(start - startBlock)
        part.startBlock = start
        part.blockCount = UInt32(end - start)
        part.checksumIndex += skipped
        if isCompressed {
            part.clusterSkip += UInt8(skipped)
        } else {
            part.segmentBlock += skipped
            part.storedBytes = part.blockCount * UInt32(blockBytes)
        }
        return part
    }
}

extension BadRun {
    /// What is left of it: nothing, one run or two.
    fileprivate func without(_ block: UInt64) -> [BadRun] {
        let offset = Int(block - startBlock)
        return [0..<offset, offset + 1..<Int(blockCount)].filter { !$0.isEmpty }.map { range in
            var part = self
            part.startBlock += UInt64(range.lowerBound)
            part.blockCount = UInt64(range.count)
            part.sums = Array(sums[range])
            if cluster.isCompressed { part.cluster.skip += range.lowerBound } else { part.segmentBlock += UInt32(range.lowerBound) }
            return part
        }
    }
}

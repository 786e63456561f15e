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
    /// Blocks with the same number (not 0) can only be put right together: they are in one compressed cluster.
    var cluster: UInt64
}

extension ReplicaStore {
    /// Known bad blocks of the group's own disks that the source has not been asked for yet, at most `limit`, whole clusters.
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
                if wanted.count + min(Int(run.blockCount), ClusterPart.blocksMax) > limit, run.cluster.isCompressed || wanted.count >= limit { return wanted }
                for index in 0..<min(Int(run.blockCount), limit - wanted.count) {
                    let block = run.startBlock + UInt64(index)
                    if entry.lost.contains(block) { continue }
                    wanted.append(WantedBlock(
                        layer: layer, volume: owner.volume, block: block, byteCount: blockLength(block, sizeBytes: entry.sizeBytes), checksum: run.sums[index],
                        cluster: run.cluster.isCompressed ? UInt64(run.segment) << 32 | UInt64(run.segmentBlock) : 0))
                }
            }
        }
        return wanted
    }

    /// The source could not help with these. They are not asked for again before the next pass has found them again.
    func notRepaired(_ blocks: [WantedBlock], group: GroupID, why: String) {
        if blocks.isEmpty { return }
        scrubber.state.withLock { state in
            for wanted in blocks { state.known[wanted.layer]?.lost.insert(wanted.block) }
        }
        for wanted in blocks {
            let disk = read { $0.groups[group]?.volumes[wanted.volume].spec.name } ?? "\(wanted.volume)"
            logger.warning("a damaged block cannot be repaired: \(why)", metadata: ["group": "\(group)", "disk": "\(disk)", "block": "\(wanted.block)"])
            scrubber.tell(.notRepaired(group, disk: disk, block: wanted.block, count: 1, why: why))
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
        guard !repaired.isEmpty else { throw .invalid("block \(block) lies in a compressed cluster, which can only be put right with all of its damaged blocks") }
    }

    /// Writes what matches its checksum in place, durably, and reads it back. Returns what is right again. Any thread but the store's.
    func repair(_ group: GroupID, _ blocks: [(WantedBlock, [UInt8])]) throws(StoreError) -> [WantedBlock] {
        var places: [UInt64: [BadRun]] = [:]
        var sizes: [UInt64: UInt64] = [:]
        let layers = Set(blocks.map(\.0.layer))
        scrubber.state.withLock { state in
            for layer in layers {
                places[layer] = state.known[layer]?.runs
                sizes[layer] = state.known[layer]?.sizeBytes
            }
        }
        // A layer that is gone by now may not be where it was: its place is somebody else's.
        let pins = shared.withLock { shared -> UInt64? in
            let live = layers.compactMap { shared.state.layers[$0] }
            guard live.count == layers.count else { return nil }
            let number = shared.nextPin
            shared.nextPin += 1
            shared.pins[number] = Pin(live)
            return number
        }
        guard let pins else { throw .invalid("the layers were merged meanwhile: the next pass finds the damage again") }
        defer { unpin(pins) }

        return try withRepairs { () throws(StoreError) in
            var files: [UInt32: SegmentFile] = [:]
            func file(_ segment: UInt32) throws(StoreError) -> SegmentFile {
                if let file = files[segment] { return file }
                let file = try SegmentFile.open(storage, store: uuid, id: segment, writable: true)
                files[segment] = file
                return file
            }
            var repaired: [WantedBlock] = []
            for (wanted, bytes) in blocks where wanted.cluster == 0 {
                guard let run = places[wanted.layer]?.first(where: { $0.startBlock <= wanted.block && wanted.block < $0.startBlock + $0.blockCount && !$0.cluster.isCompressed }),
                    matches(wanted, bytes), run.sums[Int(wanted.block - run.startBlock)] == wanted.checksum
                else { continue }
                let segment = try file(run.segment)
                try write(bytes, to: segment, at: run.segmentBlock + UInt32(wanted.block - run.startBlock))
                repaired.append(wanted)
            }
            for (_, part) in Dictionary(grouping: blocks.filter { $0.0.cluster != 0 }, by: { Cluster(layer: $0.0.layer, place: $0.0.cluster) }).sorted(by: { $0.key.place < $1.key.place }) {
                if try rebuild(part, places[part[0].0.layer] ?? [], file) { repaired += part.map(\.0) }
            }
            for segment in files.values { try segment.file.dataSync() }
            try check(repaired, places, sizes, file)
            forget(repaired, group)
            return repaired
        }
    }

    private struct Cluster: Hashable {
        var layer: UInt64
        var place: UInt64
    }

    private func matches(_ wanted: WantedBlock, _ bytes: [UInt8]) -> Bool {
        if options.deliberateFault == .repairsNotChecked { return bytes.count == wanted.byteCount }
        return bytes.count == wanted.byteCount && bytes.withUnsafeBytes { BlockChecksum.of($0.baseAddress!, count: $0.count, blockIndex: wanted.block) } == wanted.checksum
    }

    private func withRepairs<R>(_ body: () throws(StoreError) -> R) throws(StoreError) -> R {
        try scrubber.repairing.withLock { _ throws(StoreError) in
            nonisolated(unsafe) let result = try body()
            return result
        }
    }

    private func write(_ bytes: [UInt8], to segment: SegmentFile, at block: UInt32) throws(StoreError) {
        let memory = UnsafeMutableRawBufferPointer.allocate(byteCount: roundUp(bytes.count, to: blockBytes), alignment: pageBytes)
        defer { memory.deallocate() }
        memset(memory.baseAddress!, 0, memory.count)
        bytes.withUnsafeBytes { memcpyBytes(memory.baseAddress!, $0.baseAddress!, $0.count) }
        try segment.file.write(UnsafeRawBufferPointer(memory), at: UInt64(block) * UInt64(blockBytes))
    }

    /// A cluster with its bad blocks replaced, when all of them are there and it fits where it was.
    private func rebuild(_ part: [(WantedBlock, [UInt8])], _ places: [BadRun], _ file: (UInt32) throws(StoreError) -> SegmentFile) throws(StoreError) -> Bool {
        let place = part[0].0.cluster
        let (segment, segmentBlock) = (UInt32(place >> 32), UInt32(place & 0xFFFF_FFFF))
        let runs = places.filter { $0.cluster.isCompressed && $0.segment == segment && $0.segmentBlock == segmentBlock }
        guard let cluster = runs.first?.cluster else { return false }
        let given = Dictionary(part.map { ($0.0.block, $0) }, uniquingKeysWith: { a, _ in a })
        let stored = UnsafeMutableRawBufferPointer.allocate(byteCount: cluster.storedBlocks * blockBytes, alignment: pageBytes)
        let plain = UnsafeMutableRawBufferPointer.allocate(byteCount: ClusterPart.blocksMax * blockBytes, alignment: pageBytes)
        defer {
            stored.deallocate()
            plain.deallocate()
        }
        memset(plain.baseAddress!, 0, plain.count)
        // Blocks of it that are not bad stay; when it cannot be decompressed all that the layer has of it are.
        let count = (try? file(segment).file.read(into: stored, at: UInt64(segmentBlock) * UInt64(blockBytes))) ?? 0
        if count < stored.count || !ClusterAccess.unpack(UnsafeRawBufferPointer(stored), cluster, into: plain) { memset(plain.baseAddress!, 0, plain.count) }
        for run in runs {
            for index in 0..<Int(run.blockCount) {
                guard let (wanted, bytes) = given[run.startBlock + UInt64(index)], matches(wanted, bytes), run.sums[index] == wanted.checksum else { return false }
                let target = plain.baseAddress! + (run.cluster.skip + index) * blockBytes
                memset(target, 0, blockBytes)
                bytes.withUnsafeBytes { memcpyBytes(target, $0.baseAddress!, $0.count) }
            }
        }
        guard let packed = ClusterAccess.pack(UnsafeRawBufferPointer(rebasing: plain[..<(cluster.blockCount * blockBytes)]), storedBlocks: cluster.storedBlocks) else { return false }
        try write(packed, to: file(segment), at: segmentBlock)
        return true
    }

    /// What was written is read again, from the disk.
    private func check(_ repaired: [WantedBlock], _ places: [UInt64: [BadRun]], _ sizes: [UInt64: UInt64], _ file: (UInt32) throws(StoreError) -> SegmentFile) throws(StoreError) {
        let stored = UnsafeMutableRawBufferPointer.allocate(byteCount: ClusterPart.blocksMax * blockBytes, alignment: pageBytes)
        let plain = UnsafeMutableRawBufferPointer.allocate(byteCount: ClusterPart.blocksMax * blockBytes, alignment: pageBytes)
        defer {
            stored.deallocate()
            plain.deallocate()
        }
        for wanted in repaired {
            guard let run = places[wanted.layer]?.first(where: { $0.startBlock <= wanted.block && wanted.block < $0.startBlock + $0.blockCount }) else { continue }
            let offset = Int(wanted.block - run.startBlock)
            let error = StoreError.badBlock(volume: "number \(wanted.volume)", block: wanted.block, segment: run.segment, layer: wanted.layer)
            let isCluster = run.cluster.isCompressed
            let count = isCluster ? run.cluster.storedBlocks : 1
            let read = try file(run.segment).file.read(
                into: UnsafeMutableRawBufferPointer(rebasing: stored[..<(count * blockBytes)]), at: UInt64(run.segmentBlock + (isCluster ? 0 : UInt32(offset))) * UInt64(blockBytes))
            guard read == count * blockBytes else { throw error }
            var block = UnsafeRawPointer(stored.baseAddress!)
            if isCluster {
                guard ClusterAccess.unpack(UnsafeRawBufferPointer(rebasing: stored[..<(count * blockBytes)]), run.cluster, into: plain) else { throw error }
                block = UnsafeRawPointer(plain.baseAddress! + (run.cluster.skip + offset) * blockBytes)
            }
            guard BlockChecksum.of(block, count: wanted.byteCount, blockIndex: wanted.block) == wanted.checksum else { throw error }
        }
    }

    /// They are not bad any more.
    private func forget(_ repaired: [WantedBlock], _ group: GroupID) {
        scrubber.state.withLock { state in
            for wanted in repaired {
                guard let index = state.known[wanted.layer]?.runs.firstIndex(where: { $0.startBlock <= wanted.block && wanted.block < $0.startBlock + $0.blockCount }) else { continue }
                let run = state.known[wanted.layer]!.runs[index]
                state.known[wanted.layer]!.runs.replaceSubrange(index...index, with: run.without(wanted.block))
                if state.known[wanted.layer]!.runs.isEmpty, state.known[wanted.layer]!.damage == nil { state.known[wanted.layer] = nil }
            }
            state.statistics.repairedBlockCount += UInt64(repaired.count)
        }
        for wanted in repaired {
            let disk = read { $0.groups[group]?.volumes[wanted.volume].spec.name } ?? "\(wanted.volume)"
            logger.notice("a damaged block was repaired", metadata: ["group": "\(group)", "disk": "\(disk)", "block": "\(wanted.block)"])
            scrubber.tell(.repaired(group, disk: disk, block: wanted.block, count: 1))
        }
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

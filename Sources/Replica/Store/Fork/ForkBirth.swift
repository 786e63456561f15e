import BlockTap

/// What a fork was when it was made, kept apart from what was written to it since.
///
/// A birth is a mark (`ForkMarks.swift`) that is made of the fork's recovery point. It outlives that point and the fork's hydration, so that what the
/// fork has written stays known block by block; it goes with the fork.
extension ReplicaStore {
    public static let birthPurpose = "birth"
    /// More blocks are turned back only if they are less than half of the disks.
    private static let turnBackBlocksMin: UInt64 = 4096

    static func birth(of fork: ForkID) -> ForkID { ForkID("\(fork)-born") }

    public func hasBirth(_ fork: ForkID) -> Bool { hasFork(Self.birth(of: fork)) }

    /// Marks what a fork of a recovery point began with, whatever it has written since. Nothing happens when that is marked, and when the point is gone.
    public func markBirth(of fork: ForkID) throws(StoreError) {
        try thread.perform { () throws(StoreError) in
            guard let record = self.read({ $0.forks[fork] }), record.parentFork == nil, self.read({ $0.forks[Self.birth(of: fork)] }) == nil,
                let point = self.read({ $0.groups[record.group]?.points.last { $0.point.id == record.point } })
            else { return }
            try self.createFork(point.volumes.map { ($0.spec, $0.top) }) { volumes in
                ForkRecord(
                    id: Self.birth(of: fork), group: record.group, point: record.point, purpose: Self.birthPurpose, createdTimeNanoseconds: self.options.now(),
                    volumes: volumes, parentFork: fork)
            }
        }
    }

    public func forgetBirth(of fork: ForkID) throws(StoreError) {
        if hasBirth(fork) { try dropFork(Self.birth(of: fork)) }
    }

    private struct VolumeTop {
        var top: UInt64
        var blockCount: UInt64
    }
    private typealias States = (lower: VolumeTop, upper: VolumeTop)

    /// The layers between two states of a disk of which one came of the other; nil when that is not known any more.
    ///
    /// Blocks that were written stay in them as long as both states are there: merging keeps what layers name, but at the bottom of a chain, where a block that
    /// says nothing is one that never was. So nothing is known above an empty disk.
    private func between(_ states: States?, _ state: StoreState) -> [LayerRecord]? {
        guard let states, states.lower.top != 0 else { return nil }
        let chain = state.chain(states.upper.top)
        return chain.lastIndex { $0.id == states.lower.top }.map { Array(chain[($0 + 1)...]) }
    }

    /// Runs of blocks in which they may differ.
    private func changed(_ states: (StoreState) -> States?) throws(StoreError) -> [Range<UInt64>]? {
        let found = try shared.withLock { shared throws(StoreError) -> (layers: [LayerRecord], blockCount: UInt64, pin: UInt64)? in
            if shared.isClosed { throw .closed }
            guard let states = states(shared.state), let layers = between(states, shared.state) else { return nil }
            return (layers, states.upper.blockCount, shared.add(Pin(layers)))
        }
        guard let found else { return nil }
        defer { unpin(found.pin) }
        return try written(options.deliberateFault == .olderWritesForgotten ? found.layers.suffix(1) : found.layers, blockCount: found.blockCount)
    }

    private func sinceBirth(_ fork: ForkID, _ mark: ForkID, _ volume: Int) -> (StoreState) -> States? {
        { state in
            guard let born = state.forks[Self.birth(of: fork)]?.volumes, let now = state.forks[mark]?.volumes, born.indices.contains(volume), now.indices.contains(volume)
            else { return nil }
            func top(_ disk: ForkVolumeRecord) -> VolumeTop { VolumeTop(top: disk.parent, blockCount: disk.spec.geometry.blockCount) }
            return (top(born[volume]), top(now[volume]))
        }
    }

    private func since(_ point: RecoveryPointID, _ group: GroupID, _ volume: Int) -> (StoreState) -> States? {
        { state in
            guard let now = state.groups[group]?.volumes, let before = state.groups[group]?.points.last(where: { $0.point.id == point })?.volumes,
                before.indices.contains(volume), now.indices.contains(volume)
            else { return nil }
            func top(_ disk: VolumeRecord) -> VolumeTop { VolumeTop(top: disk.top, blockCount: disk.spec.geometry.blockCount) }
            return (top(before[volume]), top(now[volume]))
        }
    }

    /// What a fork may have written to a disk since it was made, up to `mark`, one of its marks; nil when that is not known.
    func written(to fork: ForkID, upTo mark: ForkID, volume: Int) throws(StoreError) -> [Range<UInt64>]? { try changed(sinceBirth(fork, mark, volume)) }
    func isKnown(writtenTo fork: ForkID, volume: Int) -> Bool { read { between(sinceBirth(fork, fork, volume)($0), $0) != nil } }

    /// In what a group's disk may differ now from what it was at a recovery point; nil when that is not known.
    func written(to group: GroupID, since point: RecoveryPointID, volume: Int) throws(StoreError) -> [Range<UInt64>]? { try changed(since(point, group, volume)) }
    func isKnown(writtenTo group: GroupID, since point: RecoveryPointID, volume: Int) -> Bool { read { between(since(point, group, volume)($0), $0) != nil } }

    /// Turns a group whose newest state is that of a committed fork back to what the fork was made of, as an epoch of its own that is `position`: whoever
    /// holds the disks of that time can go on from there. Only what the fork has written is read and written. Nil, and nothing is done, when that is not
    /// known any more, or is so much that comparing costs no more. Blocks; not for the store's thread. Throws `.abandoned` when `goesOn` says no.
    public func turnBack(
        _ group: GroupID, generation: Generation, toBirthOf fork: ForkID, as position: DurablePosition, cutTimeNanoseconds: UInt64, goesOn: () -> Bool = { true }
    ) throws(StoreError) -> RecoveryPoint? {
        let writer = try beginTurnBack(group, generation: generation, toBirthOf: fork, as: position, cutTimeNanoseconds: cutTimeNanoseconds, goesOn: goesOn)
        guard let writer else { return nil }
        return try sealed(writer)
    }

    /// All of that epoch, to be sealed.
    func beginTurnBack(
        _ group: GroupID, generation: Generation, toBirthOf fork: ForkID, as position: DurablePosition, cutTimeNanoseconds: UInt64, goesOn: () -> Bool = { true }
    ) throws(StoreError) -> EpochWriter? {
        let specs = read { state in (state.forks[fork]?.volumes.map(\.spec) ?? [], state.groups[group]?.volumes.map(\.spec) ?? []) }
        // A disk that has grown meanwhile may end in a block that the fork has a part of.
        guard hasBirth(fork), specs.0.count <= specs.1.count, zip(specs.0, specs.1).allSatisfy({ $0.geometry.sizeBytes == $1.geometry.sizeBytes }) else { return nil }
        var parts: [(reader: VolumeReader, blocks: [Range<UInt64>])] = []
        for disk in specs.0.indices {
            guard let blocks = try written(to: fork, upTo: fork, volume: disk) else { return nil }
            parts.append((try openMark(Self.birth(of: fork), volume: disk, above: nil).reader, blocks))
        }
        let blockCount = parts.reduce(0) { $0 + $1.blocks.reduce(0) { $0 + UInt64($1.count) } }
        guard blockCount <= max(Self.turnBackBlocksMin, specs.0.reduce(0) { $0 + $1.geometry.blockCount } / 2) else { return nil }
        let cut = Cut(epoch: position.epoch, kind: .exact, timeNanoseconds: cutTimeNanoseconds, blockCount: blockCount)
        let writer = try beginEpoch(group, generation: generation, cut: cut, instance: position.instance, after: self.group(group)?.lastDurable)
        do throws(StoreError) {
            for (disk, part) in parts.enumerated() { try copy(part.reader, part.blocks, to: writer, volume: disk, goesOn) }
        } catch {
            writer.abandon()
            throw error
        }
        return writer
    }

    private func copy(_ reader: VolumeReader, _ runs: [Range<UInt64>], to writer: EpochWriter, volume: Int, _ goesOn: () -> Bool) throws(StoreError) {
        let bufferBlocks: UInt64 = 256
        let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: Int(bufferBlocks) * blockBytes, alignment: pageBytes)
        let sums = UnsafeMutableBufferPointer<UInt64>.allocate(capacity: Int(bufferBlocks))
        defer {
            buffer.deallocate()
            sums.deallocate()
        }
        let size = reader.geometry.sizeBytes
        for run in runs {
            var next = run.lowerBound
            while next < run.upperBound {
                guard goesOn() else { throw .abandoned("it is not wanted any more") }
                let (extent, pieceEnd) = reader.map.index.piece(at: next, end: run.upperBound)
                let offset = next * UInt64(blockBytes)
                if extent == nil {
                    try writer.zero(volume: volume, offsetBytes: offset, lengthBytes: min(pieceEnd * UInt64(blockBytes), size) - offset)
                    next = pieceEnd
                    continue
                }
                let end = min(pieceEnd, next + bufferBlocks)
                let bytes = UnsafeMutableRawBufferPointer(rebasing: buffer[..<Int(min(end * UInt64(blockBytes), size) - offset)])
                try reader.read(offsetBytes: offset, into: bytes)
                for block in next..<end {
                    let start = Int(block - next) * blockBytes
                    sums[Int(block - next)] = BlockChecksum.of(bytes.baseAddress! + start, count: min(blockBytes, bytes.count - start), blockIndex: block)
                }
                try writer.append(
                    volume: volume, offsetBytes: offset, bytes: UnsafeRawBufferPointer(bytes), checksums: UnsafeBufferPointer(rebasing: sums[..<Int(end - next)]))
                next = end
            }
        }
    }
}

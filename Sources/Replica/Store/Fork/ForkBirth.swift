import BlockTap

/// What a fork was when it was made, kept apart from what was written to it since.
///
/// A birth is a mark (`ForkMarks.swift`) that is made of the fork's recovery point. It outlives that point and the fork's hydration, so that what the
/// fork has written stays known block by block; it goes with the fork.
extension ReplicaStore {
    public static let birthPurpose = "birth"

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

    /// Runs of blocks of a disk that may differ between two states of which one came of the other; nil when that is not known any more.
    ///
    /// Blocks that were written stay in it as long as both states are there: merging keeps what layers name, but at the bottom of a chain, where a block that
    /// says nothing is one that never was. So it is not known above an empty disk.
    private func changed(_ volume: Int, from lower: [VolumeTop], to upper: [VolumeTop]) throws(StoreError) -> [Range<UInt64>]? {
        guard lower.indices.contains(volume), upper.indices.contains(volume), lower[volume].top != 0 else { return nil }
        let blockCount = upper[volume].blockCount
        let (above, pin) = try shared.withLock { shared throws(StoreError) -> (ArraySlice<LayerRecord>?, UInt64) in
            if shared.isClosed { throw .closed }
            let chain = shared.state.chain(upper[volume].top)
            return (chain.lastIndex { $0.id == lower[volume].top }.map { chain[($0 + 1)...] }, shared.add(Pin(chain)))
        }
        defer { unpin(pin) }
        guard let above else { return nil }
        return try written(Array(options.deliberateFault == .olderWritesForgotten ? above.suffix(1) : above), blockCount: blockCount)
    }

    private struct VolumeTop {
        var top: UInt64
        var blockCount: UInt64
    }

    /// What a fork may have written to a disk since it was made, up to `mark`, one of its marks.
    func written(to fork: ForkID, upTo mark: ForkID, volume: Int) throws(StoreError) -> [Range<UInt64>]? {
        func tops(_ id: ForkID) -> [VolumeTop]? {
            read { $0.forks[id]?.volumes.map { VolumeTop(top: $0.parent, blockCount: $0.spec.geometry.blockCount) } }
        }
        guard let born = tops(Self.birth(of: fork)), let now = tops(mark) else { return nil }
        return try changed(volume, from: born, to: now)
    }

    /// In what a group's disk may differ now from what it was at a recovery point.
    func written(to group: GroupID, since point: RecoveryPointID, volume: Int) throws(StoreError) -> [Range<UInt64>]? {
        func tops(_ volumes: [VolumeRecord]) -> [VolumeTop] { volumes.map { VolumeTop(top: $0.top, blockCount: $0.spec.geometry.blockCount) } }
        let found = read { state -> (before: [VolumeTop], now: [VolumeTop])? in
            guard let record = state.groups[group], let before = record.points.last(where: { $0.point.id == point }) else { return nil }
            return (tops(before.volumes), tops(record.volumes))
        }
        guard let found else { return nil }
        return try changed(volume, from: found.before, to: found.now)
    }

    /// Turns a group whose newest state is that of a committed fork back to what the fork was made of, as an epoch of its own that is `position`: whoever
    /// holds the disks of that time can go on from there. Only what the fork has written is read and written. Nil, and nothing is done, when that is not
    /// known any more. Blocks; not for the store's thread.
    public func turnBack(
        _ group: GroupID, generation: Generation, toBirthOf fork: ForkID, as position: DurablePosition, cutTimeNanoseconds: UInt64
    ) throws(StoreError) -> RecoveryPoint? {
        guard let writer = try beginTurnBack(group, generation: generation, toBirthOf: fork, as: position, cutTimeNanoseconds: cutTimeNanoseconds) else { return nil }
        return try sealed(writer)
    }

    /// All of that epoch, to be sealed.
    func beginTurnBack(
        _ group: GroupID, generation: Generation, toBirthOf fork: ForkID, as position: DurablePosition, cutTimeNanoseconds: UInt64
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
        let cut = Cut(epoch: position.epoch, kind: .exact, timeNanoseconds: cutTimeNanoseconds, blockCount: blockCount)
        let writer = try beginEpoch(group, generation: generation, cut: cut, instance: position.instance, after: self.group(group)?.lastDurable)
        do throws(StoreError) {
            for (disk, part) in parts.enumerated() { try copy(part.reader, part.blocks, to: writer, volume: disk) }
        } catch {
            writer.abandon()
            throw error
        }
        return writer
    }

    private func copy(_ reader: VolumeReader, _ runs: [Range<UInt64>], to writer: EpochWriter, volume: Int) throws(StoreError) {
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

import BlockTap

/// Marks: what another fork was at one moment, kept apart from what came later.
///
/// A mark is a fork of the fork that nobody opens. It names the layers on top at that moment, so that merging never puts layers from before and
/// after it together: the layers between two marks of a fork are what was written to it between them, also after a restart.
extension ReplicaStore {
    /// Seals the fork as a consistent cut over its disks, in use or not, and marks it. False, and no mark is made, when it is what `previous` says.
    /// Nothing happens when the same mark exists. Not to be called on a loop that serves the fork.
    func mark(_ id: ForkID, of fork: ForkID, purpose: String, unlessEqual previous: ForkID?) throws(StoreError) -> Bool {
        try checkName(id.rawValue)
        return try forkLocks.with(fork) { () throws(StoreError) -> Bool in
            if read({ $0.forks[id] }) != nil { return true }
            try sealLocked(fork)
            return try thread.perform { () throws(StoreError) -> Bool in
                guard let origin = self.read({ $0.forks[fork] }) else { throw .unknownFork(fork) }
                if let previous, let before = self.read({ $0.forks[previous] }), before.volumes.map(\.parent) == origin.volumes.map(\.parent) { return false }
                try self.createFork(origin.volumes.map { ($0.spec, $0.parent) }) { volumes in
                    ForkRecord(
                        id: id, group: origin.group, point: origin.point, purpose: purpose, createdTimeNanoseconds: self.options.now(), volumes: volumes,
                        // A mark of a mark is one of the same fork.
                        parentFork: origin.purpose == purpose ? origin.parentFork : fork)
                }
                return true
            }
        }
    }

    /// A disk as it is at a mark: all of it, or, with `lower`, only what was written after that mark. Where nothing was is a hole, and so is
    /// what was zeroed. `changed`: the runs of blocks that were written, in order; the whole disk without `lower`.
    func openMark(_ id: ForkID, volume: Int, above lower: ForkID?) throws(StoreError) -> (reader: VolumeReader, changed: [Range<UInt64>]) {
        let (fork, chain, pin) = try shared.withLock { shared throws(StoreError) -> (ForkRecord, [LayerRecord], UInt64) in
            if shared.isClosed { throw .closed }
            guard let fork = shared.state.forks[id] else { throw .unknownFork(id) }
            var chain = shared.state.chain(fork.volumes[volume].parent)
            if let lower {
                guard let before = shared.state.forks[lower] else { throw .unknownFork(lower) }
                let top = before.volumes[volume].parent
                guard top == 0 || chain.contains(where: { $0.id == top }) else { throw .invalid("mark \(lower) is not below mark \(id)") }
                if let place = chain.lastIndex(where: { $0.id == top }) { chain.removeFirst(place + 1) }
            }
            return (fork, chain, shared.add(Pin(chain)))
        }
        let spec = fork.volumes[volume].spec
        do throws(StoreError) {
            var (snapshot, table) = (IndexSnapshot(), SegmentTable([]))
            if lower == nil {
                (snapshot, table) = try open(fork.group, volume, chain: chain)
            } else {
                try apply(chain, to: &snapshot)
                table = try segments.open(Set(chain.lazy.flatMap { $0.segments.lazy.map(\.segment) }))
            }
            let map = BlockMap(spec: spec, snapshot: snapshot, segments: table, report: BadBlockReport(store: self, context: "what fork \(id) adds"))
            let changed = lower == nil ? [0..<spec.geometry.blockCount] : try written(chain, blockCount: spec.geometry.blockCount)
            return (VolumeReader(store: self, spec: spec, map: map, pin: pin), changed)
        } catch {
            unpin(pin)
            throw error
        }
    }

    /// The blocks that any of these layers says something about.
    func written(_ chain: [LayerRecord], blockCount: UInt64) throws(StoreError) -> [Range<UInt64>] {
        var runs: [Range<UInt64>] = []
        for record in chain {
            let reader = try LayerReader(storage, store: uuid, record: record)
            try reader.forEachExtents { extents throws(StoreError) in
                for extent in extents { runs.append(extent.startBlock..<extent.endBlock) }
            }
        }
        return ForkSource.union(runs, [], blockCount: blockCount)
    }
}

extension ForkInfo {
    /// Nobody's disk: what another fork was at one moment.
    public var isMark: Bool { Self.isMark(purpose: purpose) }
    static func isMark(purpose: String) -> Bool { purpose == ForkSource.purpose || purpose == ReplicaStore.birthPurpose }
}

extension ReplicaStore {
    /// The disks of a fork as they are now, sealed, at one moment over all of them; the fork goes on. What is read stays as it was, whatever becomes of the
    /// fork. Not to be called on a loop that serves it.
    public func openSealed(_ id: ForkID) throws(StoreError) -> [VolumeReader] {
        try forkLocks.with(id) { () throws(StoreError) in
            try sealLocked(id)
            guard let fork = read({ $0.forks[id] }) else { throw .unknownFork(id) }
            var readers: [VolumeReader] = []
            for number in fork.volumes.indices { readers.append(try openSealedDisk(fork, number)) }
            return readers
        }
    }

    /// The fork's lock keeps another seal away; layers may be merged, which changes nothing that is read.
    private func openSealedDisk(_ fork: ForkRecord, _ number: Int) throws(StoreError) -> VolumeReader {
        let (chain, pin) = try shared.withLock { shared throws(StoreError) -> ([LayerRecord], UInt64) in
            if shared.isClosed { throw .closed }
            guard let parent = shared.state.forks[fork.id]?.volumes[number].parent else { throw .unknownFork(fork.id) }
            let chain = shared.state.chain(parent)
            return (chain, shared.add(Pin(chain)))
        }
        do throws(StoreError) {
            let spec = fork.volumes[number].spec
            let (snapshot, table) = try open(fork.group, number, chain: chain)
            let map = BlockMap(spec: spec, snapshot: snapshot, segments: table, report: BadBlockReport(store: self, context: "fork \(fork.id), as it was sealed"))
            return VolumeReader(store: self, spec: spec, map: map, pin: pin)
        } catch {
            unpin(pin)
            throw error
        }
    }
}

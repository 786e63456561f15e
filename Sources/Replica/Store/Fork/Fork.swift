import BlockTap
import Glibc

extension ReplicaStore {
    /// Makes a writable copy of a group as it was at a recovery point: one record and two empty files per volume, whatever the size.
    /// Nothing happens when the same fork exists.
    public func fork(_ id: ForkID, of group: GroupID, at point: RecoveryPointID, purpose: String) throws(StoreError) {
        try checkName(id.rawValue)
        try thread.perform { () throws(StoreError) in
            if let existing = self.read({ $0.forks[id] }) {
                guard existing.group == group, existing.point == point, existing.parentFork == nil else { throw .invalid("fork \(id) exists, of group \(existing.group) at \(existing.point)") }
                return
            }
            guard let record = self.read({ $0.groups[group] }) else { throw .unknownGroup(group) }
            guard let origin = record.points.last(where: { $0.point.id == point }) else { throw .unknownRecoveryPoint(group, point) }
            try self.createFork(origin.volumes.map { ($0.spec, $0.top) }) { volumes in
                ForkRecord(id: id, group: group, point: point, purpose: purpose, createdTimeNanoseconds: self.options.now(), volumes: volumes)
            }
        }
    }

    /// On the store's thread. A fork that starts at these layers.
    func createFork(_ origin: [(spec: VolumeSpec, top: UInt64)], _ record: ([ForkVolumeRecord]) -> ForkRecord) throws(StoreError) {
        var volumes: [ForkVolumeRecord] = []
        do throws(StoreError) {
            for volume in origin {
                let (segment, journal) = shared.withLock { (UInt32($0.newFile()), $0.newFile()) }
                volumes.append(ForkVolumeRecord(spec: volume.spec, parent: volume.top, segment: segment, journal: journal))
                _ = try createOpenLayer(segment: segment, journal: journal)
            }
            try storage.syncDirectory("segments")
            try storage.syncDirectory("journals")
            try change(.forked(record(volumes)))
        } catch {
            if manifest.failure == nil { collectGarbage() }
            throw error
        }
    }

    /// The two files of an empty open layer, synced; their directories are not.
    func createOpenLayer(segment: UInt32, journal: UInt64) throws(StoreError) -> (SegmentFile, FramedLog) {
        let data = try SegmentFile.create(storage, store: uuid, id: segment)
        try data.file.dataSync()
        let file = try storage.open(ForkJournal.path(journal), .create, direct: false)
        let log = try FramedLog.create(file, header: FileHeader(kind: .journal, id: journal, store: uuid))
        try file.dataSync()
        return (data, log)
    }

    public func hasFork(_ id: ForkID) -> Bool { read { $0.forks[id] != nil } }

    public func forks() -> [ForkInfo] {
        let records = read { state -> [(ForkRecord, UInt64)] in
            var shared: Set<UInt64> = []
            for group in state.groups.values {
                for volume in group.volumes { state.mark(volume.top, &shared) }
                for point in group.points { for volume in point.volumes { state.mark(volume.top, &shared) } }
            }
            return state.forks.values.sorted { $0.id.rawValue < $1.id.rawValue }.map { fork in
                var own = shared
                for volume in fork.volumes { state.mark(volume.parent, &own) }
                return (fork, own.subtracting(shared).reduce(0) { $0 + (state.layers[$1]?.dataBytes ?? 0) })
            }
        }
        return records.map { fork, sealedBytes in
            var bytes = sealedBytes
            for volume in fork.volumes {
                bytes += sizeOf(SegmentFile.path(volume.segment)) + sizeOf(ForkJournal.path(volume.journal))
            }
            return ForkInfo(
                id: fork.id, group: fork.group, recoveryPoint: fork.point, purpose: fork.purpose, createdTimeNanoseconds: fork.createdTimeNanoseconds,
                volumes: fork.volumes.map(\.spec), ownBytes: bytes, parentFork: fork.parentFork)
        }
    }

    private func sizeOf(_ path: String) -> UInt64 { (try? storage.open(path, .read, direct: false).size()) ?? 0 }

    /// Removes a fork with everything written to it. When a volume of it is open its files go once that is closed.
    public func dropFork(_ id: ForkID) throws(StoreError) {
        try forkLocks.with(id) { () throws(StoreError) in
            try thread.perform { () throws(StoreError) in
                guard self.read({ $0.forks[id] }) != nil else { throw .unknownFork(id) }
                try self.change(.forkDropped(id))
                self.endHydration(id)
                self.collectGarbage()
            }
        }
    }

    /// Opens one volume of a fork for reading and writing; its journal is replayed. Throws `.busy` while it is open already.
    public func openFork(_ id: ForkID, volume: Int) throws(StoreError) -> ForkVolume {
        try forkLocks.with(id) { () throws(StoreError) in try openLocked(id, volume, isForSealing: false) }
    }

    /// One that is opened to be sealed knows its own open layer only and cannot be read.
    func openLocked(_ id: ForkID, _ volume: Int, isForSealing: Bool) throws(StoreError) -> ForkVolume {
        let key = "\(id)/\(volume)"
        let (fork, record, chain, pin) = try shared.withLock { shared throws(StoreError) -> (ForkRecord, ForkVolumeRecord, [LayerRecord], UInt64) in
            if shared.isClosed { throw .closed }
            guard let fork = shared.state.forks[id] else { throw .unknownFork(id) }
            guard fork.volumes.indices.contains(volume) else { throw .invalid("fork \(id) has no disk number \(volume)") }
            guard shared.openForks[key] == nil else { throw .busy("disk \(fork.volumes[volume].spec.name) of fork \(id) is open already: one writer at a time") }
            guard !shared.uncertainForks.contains(key) else { throw .io(errno: EIO, what: "disk \(fork.volumes[volume].spec.name) of fork \(id) may or may not have been sealed: the store has to be opened again") }
            let record = fork.volumes[volume]
            let chain = shared.state.chain(record.parent)
            var held = Pin(chain)
            held.segments.insert(record.segment)
            held.journals.insert(record.journal)
            let pin = shared.add(held)
            shared.openForks[key] = OpenForkVolume(fork: id, pin: isForSealing ? nil : pin)
            return (fork, record, chain, pin)
        }
        do throws(StoreError) {
            let (snapshot, table) = isForSealing ? (IndexSnapshot(), SegmentTable([])) : try open(fork.group, volume, chain: chain)
            let segment = try SegmentFile.open(storage, store: uuid, id: record.segment, writable: true)
            let journal = try storage.open(ForkJournal.path(record.journal), .readWrite, direct: false)
            let (log, frames) = try FramedLog.open(journal, expecting: .journal, id: record.journal, store: uuid)
            let map = BlockMap(
                spec: record.spec, snapshot: snapshot, segments: table, report: BadBlockReport(store: self, context: "fork \(id)"),
                open: OpenLayerData(segment: segment))
            let opened = try ForkVolume(store: self, id: id, spec: record.spec, chain: isForSealing ? nil : chain, map: map, log: log, frames: frames, pin: pin, journal: record.journal, key: key)
            shared.withLock { $0.openForks[key] = OpenForkVolume(fork: id, volume: opened, pin: isForSealing ? nil : pin) }
            return opened
        } catch {
            shared.withLock { $0.openForks[key] = nil }
            unpin(pin)
            throw error
        }
    }
}

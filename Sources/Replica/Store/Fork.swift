import BlockTap

extension ReplicaStore {
    /// Makes a writable copy of a group as it was at a recovery point: one record and two empty files per volume, whatever the size.
    /// Nothing happens when the same fork exists.
    public func fork(_ id: ForkID, of group: GroupID, at point: RecoveryPointID, purpose: String) throws(StoreError) {
        try checkName(id.rawValue)
        try thread.perform { () throws(StoreError) in
            if let existing = self.read({ $0.forks[id] }) {
                guard existing.group == group, existing.point == point else { throw .invalid("fork \(id) exists, of group \(existing.group) at \(existing.point)") }
                return
            }
            guard let record = self.read({ $0.groups[group] }) else { throw .unknownGroup(group) }
            guard let origin = record.points.last(where: { $0.point.id == point }) else { throw .unknownRecoveryPoint(group, point) }
            var volumes: [ForkVolumeRecord] = []
            do throws(StoreError) {
                for volume in origin.volumes {
                    let (segment, journal) = self.shared.withLock { (UInt32($0.newFile()), $0.newFile()) }
                    volumes.append(ForkVolumeRecord(spec: volume.spec, parent: volume.top, segment: segment, journal: journal))
                    try SegmentFile.create(self.storage, store: self.uuid, id: segment).file.dataSync()
                    let file = try self.storage.open(ForkJournal.path(journal), .create, direct: false)
                    _ = try FramedLog.create(file, header: FileHeader(kind: .journal, id: journal, store: self.uuid))
                    try file.dataSync()
                }
                try self.storage.syncDirectory("segments")
                try self.storage.syncDirectory("journals")
                try self.change(.forked(ForkRecord(id: id, group: group, point: point, purpose: purpose, createdTimeNanoseconds: self.options.now(), volumes: volumes)))
            } catch {
                if self.manifest.failure == nil { self.collectGarbage() }
                throw error
            }
        }
    }

    public func forks() -> [ForkInfo] {
        let records = read { $0.forks.values.sorted { $0.id.rawValue < $1.id.rawValue } }
        return records.map { fork in
            var bytes: UInt64 = 0
            for volume in fork.volumes {
                bytes += sizeOf(SegmentFile.path(volume.segment)) + sizeOf(ForkJournal.path(volume.journal))
            }
            return ForkInfo(
                id: fork.id, group: fork.group, recoveryPoint: fork.point, purpose: fork.purpose, createdTimeNanoseconds: fork.createdTimeNanoseconds,
                volumes: fork.volumes.map(\.spec), ownBytes: bytes)
        }
    }

    private func sizeOf(_ path: String) -> UInt64 { (try? storage.open(path, .read, direct: false).size()) ?? 0 }

    /// Removes a fork with everything written to it. When a volume of it is open its files go once that is closed.
    public func dropFork(_ id: ForkID) throws(StoreError) {
        try thread.perform { () throws(StoreError) in
            guard self.read({ $0.forks[id] }) != nil else { throw .unknownFork(id) }
            try self.change(.forkDropped(id))
            self.collectGarbage()
        }
    }

    /// Opens one volume of a fork for reading and writing; its journal is replayed. Throws `.busy` while it is open already.
    public func openFork(_ id: ForkID, volume: Int) throws(StoreError) -> ForkVolume {
        let key = "\(id)/\(volume)"
        let (fork, record, chain, pin) = try shared.withLock { shared throws(StoreError) -> (ForkRecord, ForkVolumeRecord, [LayerRecord], UInt64) in
            if shared.isClosed { throw .closed }
            guard let fork = shared.state.forks[id] else { throw .unknownFork(id) }
            guard fork.volumes.indices.contains(volume) else { throw .invalid("fork \(id) has no disk number \(volume)") }
            guard shared.openForks.insert(key).inserted else { throw .busy("disk \(fork.volumes[volume].spec.name) of fork \(id) is open already: one writer at a time") }
            let record = fork.volumes[volume]
            let chain = shared.state.chain(record.parent)
            var held = Pin(chain)
            held.segments.insert(record.segment)
            held.journals.insert(record.journal)
            let pin = shared.nextPin
            shared.nextPin += 1
            shared.pins[pin] = held
            return (fork, record, chain, pin)
        }
        do throws(StoreError) {
            let (snapshot, table) = try open(fork.group, volume, chain: chain)
            let segment = try SegmentFile.open(storage, store: uuid, id: record.segment, writable: true)
            let journal = try storage.open(ForkJournal.path(record.journal), .readWrite, direct: false)
            let (log, frames) = try FramedLog.open(journal, expecting: .journal, id: record.journal, store: uuid)
            let map = BlockMap(
                volume: record.spec.name, sizeBytes: record.spec.geometry.sizeBytes, index: snapshot.index, layers: snapshot.layers, segments: table,
                report: BadBlockReport(store: self, context: "fork \(id)"), open: OpenLayerData(segment: segment))
            return try ForkVolume(store: self, id: id, spec: record.spec, map: map, log: log, frames: frames, pin: pin, key: key)
        } catch {
            shared.withLock { _ = $0.openForks.remove(key) }
            unpin(pin)
            throw error
        }
    }
}

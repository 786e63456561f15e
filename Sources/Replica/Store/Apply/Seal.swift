import BlockTap
import Synchronization

extension ReplicaStore {
    /// Begins receiving one epoch of a group; one that is still being received is abandoned.
    ///
    /// `parent` is what the epoch goes on top of, as the caller knows it: the group's `lastDurable`, or the epoch whose seal was asked
    /// for last and has not been answered; nil = nothing. An epoch holds only what changed since, so it is worth something on top of
    /// exactly that: `.abandoned` is thrown here, or by the seal, when the group is or comes to be anywhere else. Throws `.fenced` when
    /// `generation` is not the group's.
    public func beginEpoch(_ id: GroupID, generation: Generation, cut: Cut, instance: String, after parent: DurablePosition?) throws(StoreError) -> EpochWriter {
        let (group, receiver) = try shared.withLock { shared throws(StoreError) -> (GroupRecord, GroupReceiver) in
            if shared.isClosed { throw .closed }
            guard let group = shared.state.groups[id] else { throw .unknownGroup(id) }
            try checkGeneration(group, id, generation)
            if let last = group.lastDurable, last.instance == instance, cut.epoch <= last.epoch {
                throw .invalid("\(cut.epoch) of group \(id) is durable already (up to \(last.epoch))")
            }
            if let receiver = shared.receivers[id] { return (group, receiver) }
            let writes = shared.writes ?? storage.makeWriteQueue()
            shared.writes = writes
            let receiver = GroupReceiver(store: self, writes: writes)
            shared.receivers[id] = receiver
            return (group, receiver)
        }
        let predecessor = receiver.sealing
        // Looked at after `sealing`: what is not in there any more has been published, or will never be.
        try checkParent(parent, of: cut, id, last: predecessor?.positionWhenSealed ?? read { $0.groups[id]?.lastDurable })
        return receiver.begin(predecessor: predecessor) { start in
            EpochWriter(
                store: self, receiver: receiver, group: id, generation: generation, cut: cut, instance: instance, parent: parent,
                specs: group.volumes.map(\.spec), start: start, predecessor: predecessor)
        }
    }

    private func checkParent(_ parent: DurablePosition?, of cut: Cut, _ id: GroupID, last: DurablePosition?) throws(StoreError) {
        if parent == last { return }
        func words(_ position: DurablePosition?) -> String { position.map { "\($0.epoch) of \($0.instance)" } ?? "nothing" }
        throw .abandoned("\(cut.epoch) of group \(id) goes on top of \(words(parent)), but the newest here is \(words(last))")
    }

    private func checkGeneration(_ group: GroupRecord, _ id: GroupID, _ generation: Generation) throws(StoreError) {
        if generation < group.generation { throw .fenced(id, current: group.generation) }
        if generation > group.generation { throw .invalid("group \(id) is at \(group.generation), \(generation) is not known here") }
    }

    /// On the store's thread, after all of the epoch's buffers have been handed over. Data, layers and names, then the record: only then
    /// is it acknowledged.
    func seal(_ writer: EpochWriter, consistency: Consistency, done: (Result<RecoveryPoint?, StoreError>) -> Void) {
        var added: (volumes: [Int], records: [LayerRecord], written: [LayerFile.Written])?
        done(publish(writer, consistency, &added))
        // The acknowledgement does not wait for what only makes opening faster.
        if let added { bringIndexesForward(writer.group, added.volumes, added.records, added.written) }
    }

    private func publish(
        _ writer: EpochWriter, _ consistency: Consistency, _ added: inout (volumes: [Int], records: [LayerRecord], written: [LayerFile.Written])?
    ) -> Result<RecoveryPoint?, StoreError> {
        if let failure = writer.failure {
            writer.receiver.fail(writer, failure)
            writer.receiver.unsealed(writer)
            return .failure(failure)
        }
        var written: [LayerFile.Written] = []
        let syncs = EpochWrites()
        do throws(StoreError) {
            guard let group = read({ $0.groups[writer.group] }), shared.withLock({ $0.receivers[writer.group] === writer.receiver }) else {
                throw .unknownGroup(writer.group)
            }
            try checkGeneration(group, writer.group, writer.generation)
            try checkParent(writer.parent, of: writer.cut, writer.group, last: group.lastDurable)
            // Data, layers and names become durable in any order; nothing names any of them before all are. The last of the data may be on its way
            // while the layers are made.
            var changed: [Int] = []
            var records: [LayerRecord] = []
            for (volume, pending) in writer.volumes.enumerated() where !pending.isEmpty {
                let identity = LayerIdentity(
                    id: shared.withLock { $0.newFile() }, parent: group.volumes[volume].top, volumeIndex: UInt32(volume),
                    sizeBytes: pending.spec.geometry.sizeBytes, cut: writer.cut, consistency: consistency)
                let (extents, sums) = pending.layer()
                let layer = try sums.withUnsafeBufferPointer { sums throws(StoreError) in
                    try LayerFile.write(storage, store: uuid, identity: identity, extents: extents, sums: sums, isSynced: false, cache: checksums)
                }
                written.append(layer)
                if options.deliberateFault != .layerNotSynced { writer.receiver.startSync(layer.file, syncs) }
                if let error = syncs.error { throw error }
                changed.append(volume)
                records.append(layer.record(parent: identity.parent))
            }
            writer.writes.underway.wait()
            if let failure = writer.failure { throw failure }
            writer.receiver.startSync(writer.segmentsUsed, syncs)
            if let error = syncs.error { throw error }
            if !written.isEmpty, options.deliberateFault != .namesNotSynced { try storage.syncDirectory("layers") }
            try writer.receiver.finish(syncs)

            var point: RecoveryPoint?
            if writer.cut.kind == .exact {
                point = RecoveryPoint(
                    id: RecoveryPointID("rp-\(read { $0.nextPoint })"), group: writer.group, epoch: writer.cut.epoch, instance: writer.instance,
                    cutTimeNanoseconds: writer.cut.timeNanoseconds, consistency: consistency, receivedTimeNanoseconds: options.now(),
                    dataBytes: records.reduce(0) { $0 + $1.dataBytes })
            }
            try change(.epochSealed(writer.group, writer.positionWhenSealed, volumes: changed, layers: records, point: point))
            writer.receiver.sealed(writer)
            shared.withLock { $0.statistics.sealedEpochCount += 1 }
            spaceFound()
            added = (changed, records, written)
            return .success(point)
        } catch {
            syncs.underway.wait()
            // A record that may or may not have reached the disk names these files: then they stay, and the next start decides.
            if manifest.failure == nil {
                for layer in written { try? storage.remove(LayerFile.path(layer.checksums.layer)) }
                // One that was being written is there, too.
                upkeep.hasUnnamedFiles.store(true, ordering: .relaxed)
                writer.receiver.fail(writer, error)
            } else {
                // Before anybody can begin where this one did.
                writer.receiver.leaveSegment()
                writer.end(.failed(error))
                logger.critical("the MANIFEST cannot be written: the store takes nothing more until it is opened again", metadata: ["error": "\(error)"])
            }
            writer.receiver.unsealed(writer)
            return .failure(error)
        }
    }
}

extension LayerFile.Written {
    func record(parent: UInt64) -> LayerRecord {
        var tally = SegmentTally()
        for extent in extents { tally.add(extent) }
        return LayerRecord(
            id: checksums.layer, parent: parent, sizeBytes: checksums.sizeBytes, fileBytes: fileBytes, digest: digest, extentCount: extents.count,
            dataBytes: tally.dataBytes, zeroBytes: tally.zeroBytes, segments: tally.segments)
    }
}

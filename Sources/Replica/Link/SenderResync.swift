import BlockTap
import NIOCore

// Resync: a full sync of a replica that has something already. Its newest state is hashed there, block for block, ahead of what the source hands
// out; what both have alike is not sent. Why that is sound is in docs/link-protocol.md, *Resync*.

/// One pass of a full sync on one connection.
struct ResyncPass {
    let hasher: BlockHasher
    var hashes: ReplicaHashes
    /// What the replica has got since the state that it hashes: never compared again, always sent.
    var sent = SentBlocks()
}

extension SenderLoop {
    enum Resync {
        /// No full sync is under way, or none that has cut anything on this connection.
        case off
        case opening
        /// Everything is copied until the full sync ends.
        case refused
        case open
    }

    /// A full sync has blocks to cut, and the replica could tell what it has. It tells of the state that is durable when it is asked, so nothing
    /// may be on its way then; acknowledgements come back here.
    func openResync() {
        isCutInFlight = false
        guard case .streaming(let handler) = link else { return recover() }
        needsFuzzyCut = true
        // Nor may questions of an earlier one be open: so many at a time are answered.
        guard sealed.isEmpty, orphanedQuestions.isEmpty else { return }
        resync = .opening
        lastProgress = .now()
        handler.send(.resync) { ResyncMeta(isWanted: true).write(&$0) }
    }

    func resyncReady(_ ready: ResyncReadyMeta) throws(FrameError) {
        guard resync == .opening else { throw .unexpected(.resyncReady, "nobody asked") }
        if ready.isReady {
            guard ready.epoch == peerEpoch else {
                throw .unexpected(.resyncReady, "it would compare with \(ready.epoch), but the newest epoch there is \(peerEpoch)")
            }
            pass = ResyncPass(hasher: ready.hasher, hashes: ReplicaHashes(disks: source.disks))
            resync = .open
            logger.info("what the replica has since \(ready.epoch) is compared, and only what differs is sent")
        } else {
            resync = .refused
            logger.warning("the replica cannot be compared: everything is sent")
        }
        base.fullSyncGoesOn()
        setPhase(ready.isReady ? .resync : .fullSync, nil)
        lastProgress = .now()
        scheduleCut()
    }

    /// The full sync has cut its last block, or the connection has ended.
    func endResync(_ handler: FrameHandler?) {
        if let pass {
            orphanedQuestions.formUnion(pass.hashes.openQuestions)
            handler?.send(.resync) { ResyncMeta(isWanted: false).write(&$0) }
        }
        pass = nil
        resync = .off
        if let heldItem, case .data(_, let buffer) = heldItem { source.release(buffer) }
        heldItem = nil
    }

    /// Whether all is known that an item is to be compared with; asks for what is not.
    func isKnown(_ buffer: DrainBuffer, _ handler: FrameHandler) -> Bool {
        guard pass != nil, buffer.lengthBytes > 0 else { return true }
        let first = buffer.offsetBytes / UInt64(blockBytes)
        let count = (UInt64(buffer.lengthBytes) + UInt64(blockBytes) - 1) / UInt64(blockBytes)
        let (isKnown, missing) = pass!.hashes.need(volume: buffer.disk, firstBlock: first, blockCount: count)
        for span in missing {
            questionCount += 1
            guard let wanted = pass?.hashes.ask(span, question: questionCount) else { return false }
            handler.send(.hashesWanted) { wanted.write(&$0) }
        }
        return isKnown
    }

    func hashed(_ answer: HashesMeta) throws(FrameError) {
        lastProgress = .now()
        if orphanedQuestions.remove(answer.question) != nil {
            if orphanedQuestions.isEmpty { scheduleCut() }
            return
        }
        guard try pass?.hashes.put(answer) == true else { throw .unexpected(.hashes, "nobody asked question \(answer.question)") }
        pump()
    }

    /// Puts what the replica does not have into the batch.
    func compare(_ buffer: DrainBuffer) {
        let first = buffer.offsetBytes / UInt64(blockBytes)
        let bytes = UnsafeRawBufferPointer(start: buffer.memory, count: buffer.lengthBytes)
        let hasSent = !pass!.sent.isEmpty && timing.fault != .comparesWhatWasSent
        var equalBytes: UInt64 = 0
        var start = 0
        var offset = 0
        func send(upTo end: Int) {
            if end == start { return }
            batch.append(disk: buffer.disk, offsetBytes: buffer.offsetBytes + UInt64(start), bytes: UnsafeRawBufferPointer(rebasing: bytes[start..<end]))
            pass!.sent.insert(
                volume: buffer.disk, firstBlock: first + UInt64(start / blockBytes), blockCount: UInt64((end - start + blockBytes - 1) / blockBytes))
        }
        while offset < bytes.count {
            let end = min(offset + blockBytes, bytes.count)
            let block = first + UInt64(offset / blockBytes)
            let isEqual = !(hasSent && pass!.sent.contains(volume: buffer.disk, block: block))
                && (pass!.hashes.isEqual(volume: buffer.disk, block: block, UnsafeRawBufferPointer(rebasing: bytes[offset..<end]), pass!.hasher)
                    || timing.fault == .comparesNothing)
            if isEqual {
                send(upTo: offset)
                equalBytes += UInt64(end - offset)
                start = end
            }
            offset = end
        }
        send(upTo: bytes.count)
        epochEqualBytes += equalBytes
        compareThrottle.spend(bytes.count)
        base.compared(UInt64(bytes.count), equalBytes: equalBytes)
    }
}

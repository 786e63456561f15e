import BlockTap
import CXXHash
import NIOCore

// Epochs on their way: cut, drain, seal, acknowledge.

extension SenderLoop {
    /// A new connection starts from nothing: the source has everything that was not acknowledged.
    func resetStream(windowBytes: UInt64) {
        draining = nil
        sealed = []
        cutTimer?.cancel()
        cutTimer = nil
        pumpTimer?.cancel()
        pumpTimer = nil
        isOutOfCredit = false
        self.windowBytes = windowBytes
        sentPlainBytes = 0
        creditedBytes = 0
        batch.clearData()
        batch.clearZeroes()
        lastProgress = .now()
        peerReceivedBytes = 0
        isPeerWorking = false
        isAnswering = false
        nextCut = .now()
        endResync(nil)
        orphanedQuestions = []
        questionCount = 0
        isFullSyncCut = false
    }

    // MARK: Cuts

    func cutNow(_ consistency: CutConsistency) {
        isCutRequested = true
        want(consistency)
        source.hurry()
        scheduleCut()
    }

    private var isStreaming: Bool { if case .streaming = link { true } else { false } }

    private func want(_ consistency: CutConsistency) {
        if consistency.rawValue > wantedConsistency.rawValue { wantedConsistency = consistency }
    }

    /// Cuts now if it is time and the epochs before allow it; otherwise whatever it waits for calls again.
    func scheduleCut() {
        guard case .streaming = link, draining == nil, !isCutInFlight, sealed.count < Self.unacknowledgedMax, resync != .opening else { return }
        cutTimer?.cancel()
        cutTimer = nil
        guard isCutRequested || needsFuzzyCut || nextCut <= .now() else {
            cutTimer = eventLoop.scheduleTask(deadline: nextCut) { [self] in scheduleCut() }
            return
        }
        isCutRequested = false
        isCutInFlight = true
        nextCut = .now() + .milliseconds(Int64(order.epochMilliseconds))
        let (consistency, opensResync) = (wantedConsistency, canCompare && resync == .off)
        // What is asked for from now on is for the next one.
        wantedConsistency = .crash
        Task { [self] in
            // Asked before: a source that begins a full sync of its own accord does it within a cut, whose epoch is none of that yet.
            let isFullSync = await source.needsFuzzyCut
            if isFullSync, opensResync {
                return eventLoop.execute { [self] in
                    want(consistency)
                    openResync()
                }
            }
            do {
                // Nothing is stopped for an epoch of a full sync.
                let cut = try await source.cut(fuzzyBytesMax: Self.fuzzyBytesMax, consistency: isFullSync ? .crash : consistency)
                let needsMore = await source.needsFuzzyCut
                eventLoop.execute { [self] in
                    // Not proven, or nobody gets it: it is still owed.
                    if cut.kind == .fuzzy || !isStreaming { want(consistency) }
                    didCut(cut, isFullSync: isFullSync, needsMore: needsMore)
                }
            } catch {
                eventLoop.execute { [self] in
                    want(consistency)
                    didNotCut(error)
                }
            }
        }
    }

    private func didCut(_ cut: Cut, isFullSync: Bool, needsMore: Bool) {
        isCutInFlight = false
        base.wasCut(cut)
        guard case .streaming(let handler) = link else { return recover() }
        needsFuzzyCut = needsMore
        isFullSyncCut = isFullSync
        if isFullSync {
            // The first exact epoch after a full sync makes the first recovery point: no reason to wait for it.
            nextCut = .now()
            base.fullSyncGoesOn()
            // One that begins at a replica with nothing goes on as it began.
            if resync == .off { resync = .refused }
            if !isCopying { setPhase(resync == .open ? .resync : .fullSync, nil) }
        } else {
            endResync(handler)
            // What a source could not prove is sent all the same, and is no reason to hurry: the next one may be.
            if cut.kind == .fuzzy { base.read { $0.unprovenEpochs += 1 } }
        }
        draining = cut
        epochDataBytes = 0
        epochZeroBytes = 0
        epochEqualBytes = 0
        epochDigest = 0
        handler.send(.epochBegin) { EpochBeginMeta(cut: cut).write(&$0) }
        pump()
    }

    private func didNotCut(_ error: any Error) {
        isCutInFlight = false
        guard case .streaming(let handler) = link else { return recover() }
        handler.close("the source could not be cut: \(error)")
    }

    // MARK: Draining

    /// Moves items from the source to the channel until something says stop; each of those calls `pump` again: writability,
    /// a throttle's timer, credits, the source's wake-up.
    func pump() {
        guard !isPumping, case .streaming = link else { return }
        isPumping = true
        defer { isPumping = false }
        let begin = NIODeadline.now()
        let sentBefore = base.read { $0.sentBytes }
        pumpItems()
        compression.account(
            begin: Int64(begin.uptimeNanoseconds), end: Int64(NIODeadline.now().uptimeNanoseconds),
            wireBytes: Int(base.read { $0.sentBytes } - sentBefore))
    }

    private func pumpItems() {
        var turnBytes = 0
        isOutOfCredit = false
        while case .streaming(let handler) = link, let cut = draining, handler.isWritable {
            let now = Int64(NIODeadline.now().uptimeNanoseconds)
            let delay = max(throttle.delay(now: now), pass == nil ? 0 : compareThrottle.delay(now: now))
            if delay > 0 {
                pumpTimer?.cancel()
                pumpTimer = eventLoop.scheduleTask(in: .nanoseconds(delay)) { [self] in pump() }
                return
            }
            guard windowBytes - (sentPlainBytes - creditedBytes) >= UInt64(batch.dataBytes + drainBytes) else {
                isOutOfCredit = true
                return flush(handler, cut)
            }
            guard turnBytes < 8 << 20 else {
                // Others have this loop too: acknowledgements, timers, ALIVE.
                return eventLoop.execute { [self] in pump() }
            }
            guard let item = heldItem ?? source.nextItem() else { return flush(handler, cut) }
            if pass != nil, case .data(_, let buffer) = item {
                heldItem = item
                guard isKnown(buffer, handler) else { return flush(handler, cut) }
                // Asking may have ended the connection, which gave the buffer back.
                guard heldItem != nil else { return }
                heldItem = nil
            }
            turnBytes += take(item, handler, cut)
            if batch.dataBytes >= throttle.frameBytes || batch.isFull(forAnother: drainBytes, isScattered: pass != nil) { flush(handler, cut) }
        }
    }

    /// Returns the item's bytes.
    private func take(_ item: DrainItem, _ handler: FrameHandler, _ cut: Cut) -> Int {
        switch item {
        case .data(let epoch, let buffer):
            defer { source.release(buffer) }
            guard expect(epoch, cut, handler) else { return 0 }
            if pass != nil {
                compare(buffer)
                return buffer.lengthBytes
            }
            batch.append(
                disk: buffer.disk, offsetBytes: buffer.offsetBytes,
                bytes: UnsafeRawBufferPointer(start: buffer.memory, count: buffer.lengthBytes))
            return buffer.lengthBytes
        case .zero(let epoch, let disk, let offset, let length):
            guard expect(epoch, cut, handler) else { return 0 }
            batch.appendZero(disk: disk, offsetBytes: offset, lengthBytes: length)
            pass?.sent.insert(
                volume: disk, firstBlock: offset / UInt64(blockBytes), blockCount: (length + UInt64(blockBytes) - 1) / UInt64(blockBytes))
            // Of many there is a turn's work, too.
            return blockBytes
        case .end(let epoch):
            guard expect(epoch, cut, handler) else { return 0 }
            flush(handler, cut)
            let meta = EpochSealMeta(
                epoch: epoch, dataBytes: epochDataBytes, zeroBytes: epochZeroBytes, digest: epochDigest, consistency: Consistency(cut))
            handler.send(.epochSeal) { meta.write(&$0) }
            // Writing may have ended the connection, and with it this epoch.
            guard case .streaming = link else { return 0 }
            sealed.append(cut)
            draining = nil
            if isReadErrorTold {
                isReadErrorTold = false
                setPhase(phase, nil)
            }
            scheduleCut()
        case .abandoned(let epoch, let why):
            guard expect(epoch, cut, handler) else { return 0 }
            logger.warning("\(epoch) was abandoned: \(why.rawValue)")
            batch.clearData()
            batch.clearZeroes()
            handler.send(.epochAbandon) { NumberMeta(epoch.rawValue).write(&$0) }
            draining = nil
            guard case .streaming = link else { return 0 }
            if why == .readError {
                // It will hardly read better at once: do not keep the protected machine's disk busy with trying.
                needsFuzzyCut = false
                nextCut = .now() + timing.readErrorPause
                isReadErrorTold = true
                setPhase(phase, "\(why.rawValue): nothing that was written since can be recovered; tried again every few seconds (see the agent's log)")
            }
            scheduleCut()
        }
        return 0
    }

    private func expect(_ epoch: EpochNumber, _ cut: Cut, _ handler: FrameHandler) -> Bool {
        if epoch == cut.epoch { return true }
        handler.close("the source handed out a part of \(epoch) while \(cut.epoch) was draining")
        return false
    }

    /// Sends what the batch holds. The credits for it were checked before it was filled.
    private func flush(_ handler: FrameHandler, _ cut: Cut) {
        if batch.hasData {
            let plainBytes = batch.dataBytes
            let packed = compression.pack(batch.payload)
            let payload = packed ?? batch.payload
            let front = ExtentsFront(
                epoch: cut.epoch, plainBytes: plainBytes, extentCount: batch.extents.count,
                checksumCount: batch.checksums.count, encoding: packed == nil ? .plain : .lz4)
            sentPlainBytes &+= UInt64(plainBytes)
            epochDataBytes &+= UInt64(plainBytes)
            base.read { $0.sentBytes &+= UInt64(payload.readableBytes) }
            throttle.spend(payload.readableBytes)
            handler.send(.extents, payload: payload) { buffer in
                front.write(&buffer)
                for extent in batch.extents { extent.write(&buffer) }
                batch.checksums.withUnsafeBytes { _ = buffer.writeBytes($0) }
            } digest: { epochDigest = XXH3_64bits_withSeed($0.baseAddress, $0.count, epochDigest) }
            batch.clearData()
        }
        if batch.hasZeroes {
            epochZeroBytes &+= batch.zeroBytes
            handler.send(.zero, payload: nil) { buffer in
                buffer.put(cut.epoch.rawValue)
                for run in batch.zeroRuns { run.write(&buffer) }
            } digest: { epochDigest = XXH3_64bits_withSeed($0.baseAddress, $0.count, epochDigest) }
            batch.clearZeroes()
        }
    }

    // MARK: Answers

    func acknowledged(_ epoch: EpochNumber) throws(FrameError) {
        guard sealed.contains(where: { $0.epoch == epoch }) else { throw .unexpected(.ack, "\(epoch) is not waiting for one") }
        while let cut = sealed.first, cut.epoch <= epoch {
            sealed.removeFirst()
            source.acknowledge(cut.epoch)
            base.wasAcknowledged(cut)
            peerEpoch = cut.epoch
            if cut.kind == .exact, isCopying { setPhase(.replicating, nil) }
        }
        lastProgress = .now()
        scheduleCut()
    }

    func credited(_ total: UInt64) throws(FrameError) {
        guard total >= creditedBytes, total <= sentPlainBytes else { throw .unexpected(.credit, "\(total) bytes of \(sentPlainBytes)") }
        creditedBytes = total
        lastProgress = .now()
        pump()
    }
}

extension Consistency {
    init(_ cut: Cut) {
        self =
            switch cut.kind == .exact ? cut.proof?.consistency : nil {
            case .fileSystem: .filesystem
            case .application: .application
            case .crash, nil: .crash
            }
    }
}

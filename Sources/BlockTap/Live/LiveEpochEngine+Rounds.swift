import CLiveTap
import Glibc

/// Rounds until the image is proven, and freezes (see `LiveEpochEngine`).
///
/// For a *crash-consistent* point: rounds until one is proven; if their budget is used up, one more while the file systems are frozen. For a
/// *file-system-consistent* one: the file systems write out what they have, rounds until one was short, then the last one while they are
/// frozen. Only the cut and the reads are inside the freeze. If that fails, the point is what the rounds prove.
///
/// A crash-consistent point that nobody asked for takes no more of the disks' time than its share (`LiveReadShare`), unless it is urgent
/// (`LiveUrgency`): rounds of many blocks that would take more are not run, and nothing is frozen for them; the epoch is handed out as it is read.
extension LiveEpochEngine {
    struct Convergence {
        /// All that was taken.
        var blocks: [BlockBitmap]
        var collided: [LiveStage.Place] = []
        /// All of it is in the stage, as it was read last.
        var isStaged = true
        /// Of the last cut.
        var timeNanoseconds: UInt64 = 0
        var proof: CutProof?
        var roundCount: UInt32 = 0
        var collisionCount: UInt64 = 0
        var lastRoundNanoseconds: UInt64 = 0
        var lastRoundBlockCount: UInt64?
        /// It would have taken more than its share.
        var gaveWay = false
        /// Somebody asked for this point.
        var isAsked = false
    }

    private enum Step {
        /// There were collisions, or the kernel's account is not known yet.
        case goOn
        case proven
        /// Rounds do not help.
        case ended
    }

    /// What was taken goes back if it throws: no epoch has it.
    func converge(_ consistency: CutConsistency) throws(SystemError) -> Convergence {
        var run = Convergence(blocks: disks.map { BlockBitmap(blockCount: $0.disk.blockCount) }, isAsked: consistency != .crash)
        do throws(SystemError) {
            try converge(&run, consistency)
        } catch {
            if !faults.contains(.forgetWhatWasTaken) {
                for disk in disks { disk.dirty.formUnion(run.blocks[disk.index]) }
            }
            throw error
        }
        return run
    }

    private func converge(_ run: inout Convergence, _ consistency: CutConsistency) throws(SystemError) {
        stage.clear()
        var step: Step
        if consistency == .fileSystem, mayFreeze {
            // What they have in memory is written now, and not inside the freeze.
            let fds = MountedFileSystem.on(devices).filter { !$0.isReadOnly }.compactMap { $0.opened() }
            _ = FileSystemFreeze.isWrittenOut(fds, limitMilliseconds: configuration.freezeMilliseconds, syncsMax: 5)
            for fd in fds { close(fd) }
            let isShort = UInt64(configuration.freezeMilliseconds) * 1_000_000 / 4
            step = try rounds(&run) { $0.lastRoundNanoseconds < isShort }
            if step != .ended {
                step = try frozenRound(&run, isAsked: true) ?? step
                if step == .goOn { step = try rounds(&run) { $0.proof != nil } }
            }
        } else {
            step = try rounds(&run) { $0.proof != nil }
            if step == .goOn, mayFreeze, isSmall(run.lastRoundBlockCount ?? 0) || isUrgent() {
                if freezePause.left > 0 {
                    freezePause.left -= 1
                } else if try frozenRound(&run, isAsked: false) == .proven {
                    freezePause.next = 1
                } else {
                    freezePause = (freezePause.next, min(freezePause.next * 2, 64))
                }
            }
        }
        figures.roundCount += UInt64(run.roundCount)
        figures.roundsMax = max(figures.roundsMax, UInt64(run.roundCount))
        figures.collisionCount += run.collisionCount
        if !run.isStaged, !run.gaveWay { figures.unstagedCount += 1 }
        if let proof = run.proof {
            figures.provenCount += 1
            if run.roundCount <= 3 { depth = max(configuration.readDepth, depth / 2) }
            if proof.consistency == .fileSystem { figures.fileSystemConsistentCount += 1 }
        } else {
            figures.unprovenCount += 1
            if !run.gaveWay { deepen() }
        }
    }

    /// The budget of time begins after an epoch's first round.
    private func rounds(_ run: inout Convergence, until isEnough: (Convergence) -> Bool) throws(SystemError) -> Step {
        var deadline: UInt64?
        for _ in 0..<max(1, configuration.roundsMax) {
            let step = try round(&run)
            let now = LiveReconciliation.now()
            if step == .ended || isEnough(run) { return step }
            if deadline == nil { deadline = now + UInt64(configuration.roundsMilliseconds) * 1_000_000 }
            if now >= deadline! { return step }
        }
        return run.proof == nil ? .goOn : .proven
    }

    private func round(_ run: inout Convergence) throws(SystemError) -> Step {
        let step = try read(&run)
        return step == .proven ? judge(&run) : step
    }

    /// A cut, and its blocks to the stage. `proven` here: nothing collided.
    private func read(_ run: inout Convergence, isFrozen: Bool = false) throws(SystemError) -> Step {
        let began = LiveReconciliation.now()
        run.proof = nil
        if faults.contains(.failInRound), run.roundCount > 0 { throw SystemError(errno: ENOMEM, doing: "make a bitmap, as a test wants it") }
        run.timeNanoseconds = try flip()
        run.roundCount += 1
        var round: [BlockBitmap] = []
        for disk in disks {
            round.append(disk.dirty)
            run.blocks[disk.index].formUnion(disk.dirty)
            disk.dirty = BlockBitmap(blockCount: disk.disk.blockCount)
        }
        let blockCount = round.reduce(0) { $0 + $1.count }
        let isFree = isFrozen || run.isAsked || isUrgent()
        var considering = LiveReader.Consideration(priority: .normal, isBudgeted: false, isFree: isFree)
        if run.roundCount == 1, !isFrozen {
            considering.priority = configuration.readPriority
            considering.isBudgeted = true
        }
        if run.roundCount == 1 { expect(blockCount, now: began) }
        var isTooMuch = false
        if !isFree, !isSmall(blockCount), reader.share.share < 1 {
            _ = reader.share.wait(now: began)
            // Later rounds may be owed: they are what the first one was for.
            isTooMuch = reader.share.credit < (run.roundCount == 1 ? Double(blockCount) * reader.pace.nanosecondsPerBlock : -reader.share.creditMax / 2)
            if isTooMuch {
                figures.gaveWayCount += 1
                run.gaveWay = true
            }
        }
        // What is too large for the stage, or cannot be read, is not handed out as if it had been read.
        guard !isTooMuch, run.blocks.reduce(0, { $0 + $1.count }) <= UInt64(stage.blockCount),
            let collisions = readRound(round, first: run.collided, considering: considering)
        else {
            run.isStaged = false
            return .ended
        }
        if let last = run.lastRoundBlockCount, blockCount > 256, blockCount > last / 2 { deepen() }
        run.lastRoundBlockCount = blockCount
        run.lastRoundNanoseconds = LiveReconciliation.now() - began
        run.collided = collisions
        run.collisionCount += UInt64(collisions.count)
        return collisions.isEmpty ? .proven : .goOn
    }

    private func expect(_ blockCount: UInt64, now: UInt64) {
        let last = lastFirstRound, sectors = issuedSectors
        lastFirstRound = (now, sectors)
        if last.nanoseconds == 0 { return }
        let written = (sectors - min(sectors, last.issuedSectors)) / UInt64(blockBytes / 512)
        reader.share.expect(blockCount: blockCount, writtenCount: written, since: last.nanoseconds, now: now, nanosecondsEach: reader.pace.nanosecondsPerBlock)
    }

    /// Whether a round is over before anybody notices.
    private func isSmall(_ blockCount: UInt64) -> Bool { blockCount <= 4096 && Double(blockCount) * reader.pace.nanosecondsPerBlock < 100e6 }

    /// Whether a recovery point is worth more now than what others do with the disks.
    func isUrgent() -> Bool {
        if configuration.readShare >= 1 { return true }
        return !needsFuzzyCut && draining?.isFullSync != true
            && urgency.isUrgent(now: LiveReconciliation.now()) { (reader.readBytes, issuedSectors &* 512) }
    }

    /// Somebody waits for a point that is cut after now.
    func hurry() {
        urgency.hurry()
        hurriedAfter = maps.state.pointee.last_epoch
    }

    /// Of all disks, since they are followed.
    private var issuedSectors: UInt64 { disks.reduce(0) { $0 &+ maps.disks[$1.index].issued_sectors } }

    /// Rounds that do not shrink are read with more at once, up to a limit, and so are epochs after one that was not proven: otherwise the writers'
    /// share of the disk is the larger one, and they stay ahead for ever. It goes down again while few rounds are enough.
    private func deepen() { depth = min(depth * 2, max(configuration.readDepth, configuration.readDepthMax)) }

    /// Of a cut without collisions: whether the kernel's account agrees. It may be asked later: it is about all writes so far.
    private func judge(_ run: inout Convergence) -> Step {
        let verdict = faults.contains(.skipReconciliation) ? .exact : reconciliation.verdict(withinMilliseconds: configuration.reconcileMilliseconds)
        switch verdict {
        case .exact:
            run.proof = CutProof(method: .rounds, roundCount: run.roundCount, collisionCount: run.collisionCount)
            return .proven
        case .open:
            say("account", "the kernel's account of the disks could not be compared with what was seen (completions not shown, or no quiet moment): asked again, and nothing is proven before")
            return .goOn
        case .unknown(let words): say("account", "nothing is proven: \(words)")
        case .missed(let reason): resync(reason)
        case .outgrown(let words): say("writes past the end", words)
        }
        return .ended
    }

    private static let frozenVerdictsMax = 3

    /// One round while the file systems are held still; nil when they could not be. Its proof is the same: that nothing collided. (Whoever writes to the
    /// disk past the file systems is not held.) `isAsked`: the point is to be file-system-consistent.
    private func frozenRound(_ run: inout Convergence, isAsked: Bool) throws(SystemError) -> Step? {
        let freeze: FileSystemFreeze
        do throws(SystemError) {
            let opened = try FileSystemFreeze.opened(on: devices)
            guard !opened.isEmpty else {
                if isAsked { say("freeze", "no file system of these disks is mounted for writing here: points are crash-consistent") }
                return nil
            }
            freeze = try FileSystemFreeze.hold(opened, limitMilliseconds: configuration.freezeMilliseconds)
        } catch {
            figures.freezeFailedCount += 1
            say("freeze", "\(error)" + (isAsked ? "; the point is crash-consistent" : ""))
            return nil
        }
        figures.freezeCount += 1
        let unfreezable = freeze.unfreezable
        // The log may lie on what is frozen, and so may anything that another thread of this process waits for.
        let log = onEvent
        var lines: [String] = []
        onEvent = { lines.append($0) }
        let result = Result { () throws(SystemError) in try read(&run, isFrozen: true) }
        whileFrozen?()
        let (wasHeld, milliseconds) = freeze.thaw()
        onEvent = log
        for line in lines { log?(line) }
        figures.freezeMillisecondsMax = max(figures.freezeMillisecondsMax, milliseconds)
        var step = try result.get()
        if step == .proven {
            step = judge(&run)
            // The account is about all writes so far: asked again, it says no less of these.
            for _ in 1..<Self.frozenVerdictsMax where step == .goOn { step = judge(&run) }
        }
        run.proof?.method = .freeze
        run.proof?.freezeMilliseconds = milliseconds
        if wasHeld {
            run.proof?.consistency = .fileSystem
            if run.proof != nil { saidLast["freeze"] = nil }
            if !unfreezable.isEmpty { say("unfreezable", "written out, but cannot be frozen: \(unfreezable.joined(separator: ", "))") }
        } else {
            figures.freezeFailedCount += 1
            say(
                "freeze",
                "the file systems were thawed at the limit of \(configuration.freezeMilliseconds) ms, before all was read" + (isAsked ? "; the point is crash-consistent" : ""))
        }
        return step
    }

    private var devices: Set<DeviceNumber> { LiveDisk.devices(of: disks.map(\.disk)) }

    /// Reads a round's blocks to the stage. Returns those that were written meanwhile, or nil when something could not be read.
    private func readRound(_ round: [BlockBitmap], first: [LiveStage.Place], considering: LiveReader.Consideration?) -> [LiveStage.Place]? {
        var ranges: [LiveReader.Range] = []
        var places: [(disk: Int, block: UInt64, count: Int)] = []
        func add(_ disk: Int, _ block: UInt64) {
            let slot = stage.slot(disk: disk, block: block)
            let memory = stage.memory(slot)
            let size = disks[disk].disk.geometry.sizeBytes
            let length = Int(min(UInt64(blockBytes), size - block * UInt64(blockBytes)))
            if let last = places.last, last.disk == disk, last.block + UInt64(last.count) == block, last.count < 32,
                ranges[ranges.count - 1].memory + ranges[ranges.count - 1].lengthBytes == memory
            {
                places[places.count - 1].count += 1
                ranges[ranges.count - 1].lengthBytes += length
            } else {
                places.append((disk, block, 1))
                ranges.append(.init(fd: disks[disk].disk.device.fd, offsetBytes: block * UInt64(blockBytes), lengthBytes: length, memory: memory))
            }
        }
        for place in first where round[place.disk].contains(place.block) {
            round[place.disk].clear(first: place.block, length: 1)
            add(place.disk, place.block)
        }
        for (disk, blocks) in round.enumerated() {
            blocks.forEachSetWord { word, bits in
                var rest = bits
                while rest != 0 {
                    add(disk, UInt64(word * 64 + rest.trailingZeroBitCount))
                    rest &= rest &- 1
                }
            }
        }
        var collisions: [LiveStage.Place] = []
        var hasFailed = false
        reader.read(ranges, depth: depth, considering: considering) { index, succeeded in
            if !succeeded { hasFailed = true }
            let place = places[index]
            for block in place.block..<place.block + UInt64(place.count) where maps.isIssued(disk: place.disk, block: block) {
                collisions.append(.init(disk: place.disk, block: block))
            }
        }
        if hasFailed { return nil }
        return faults.contains(.skipCollisionCheck) ? [] : collisions
    }
}

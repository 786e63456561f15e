import BlockTap
import Glibc
import Logging

/// An open layer that becomes a sealed one, and the empty one that takes its place.
struct OpenLayerSeal {
    /// Its place in the fork.
    let number: Int
    let volume: ForkVolume
    /// Nil: nothing of it needs to be kept.
    let layer: LayerFile.Written?
    /// The new open layer.
    let segment: SegmentFile
    let journal: UInt64
    let log: FramedLog
}

/// Sealing a fork: what was written to it becomes one layer per disk, of one moment over all disks, while it is in use.
///
/// 1. *Quiet*: new writes and flushes of all open disks are held, those in flight end. From the moment in which all disks are quiet
///    until they go on nothing is acknowledged: a write that was acknowledged before is in the layers on whatever disk it was, and one
///    that was submitted on the strength of it is not, or comes after it.
/// 2. *Write*: data is synced, layer files and the files of new open layers are written and synced, their directories too.
/// 3. *Publish*: one MANIFEST record for all disks. Before it the old open layers are the truth, with it the new ones.
/// 4. *Turn*: the disks' indexes look at the layer instead of the open one; held requests go on.
///
/// Reads go on all the time, but for two moments in which those in flight are waited for: after 1, so that none is left that began before
/// an overwrite and reads what no layer keeps, and at the end of 4, when the checksums of the old open layer go.
extension ReplicaStore {
    /// Makes what was written to the fork so far layers, durable, as a consistent cut over its disks; open or not, in use or not. The
    /// time it takes, and for which writes wait, depends on what was written since the last seal only. Nothing happens when nothing was.
    /// Not to be called on a loop that serves the fork.
    public func sealFork(_ id: ForkID) throws(StoreError) {
        try forkLocks.with(id) { () throws(StoreError) in try sealLocked(id) }
    }

    /// Makes a fork of a fork as it is now. The parent is sealed and goes on; either may be dropped without the other.
    /// Nothing happens when the same fork exists.
    public func fork(_ id: ForkID, ofFork parent: ForkID, purpose: String) throws(StoreError) {
        try checkName(id.rawValue)
        guard id != parent else { throw .invalid("a fork cannot be made of itself") }
        try forkLocks.with(parent) { () throws(StoreError) in
            if let existing = read({ $0.forks[id] }) {
                guard existing.parentFork == parent else { throw .invalid("fork \(id) exists, \(existing.parentFork.map { "of fork \($0)" } ?? "of group \(existing.group) at \(existing.point)")") }
                return
            }
            try sealLocked(parent)
            try thread.perform { () throws(StoreError) in
                guard let origin = self.read({ $0.forks[parent] }) else { throw .unknownFork(parent) }
                try self.createFork(origin.volumes.map { ($0.spec, $0.parent) }) { volumes in
                    ForkRecord(
                        id: id, group: origin.group, point: origin.point, purpose: purpose, createdTimeNanoseconds: self.options.now(), volumes: volumes,
                        parentFork: parent)
                }
            }
        }
    }

    /// The group becomes what the fork is now: its recovery points go, but for held ones, and its generation is raised, so that whoever
    /// wrote to it until now is fenced and has to begin with a full sync. The fork stays, open and writable.
    public func commitFork(_ id: ForkID) throws(StoreError) {
        try forkLocks.with(id) { () throws(StoreError) in
            guard let group = read({ $0.forks[id]?.group }) else { throw .unknownFork(id) }
            guard read({ $0.groups[group] != nil }) else { throw .unknownGroup(group) }
            try sealLocked(id)
            try thread.perform { () throws(StoreError) in
                try self.change(.forkCommitted(id))
                // What is queued to be sealed finds the generation raised.
                self.shared.withLock { $0.receivers[group] }?.abandonCurrent("fork \(id) became the group")
                self.indexes.remove(group, volumeCount: self.read { $0.groups[group]?.volumes.count ?? 0 })
                self.collectGarbage()
            }
        }
    }

    // MARK: Steps

    /// The caller holds the fork's lock.
    func sealLocked(_ id: ForkID) throws(StoreError) {
        let cut = try quiet(id)
        var seals: [OpenLayerSeal] = []
        var isUnknown = false
        do throws(StoreError) {
            for (number, disk) in cut.disks.enumerated() where disk.volume.hasOwnBlocks {
                seals.append(try disk.volume.prepareSeal(number))
            }
            if !seals.isEmpty {
                if options.deliberateFault != .namesNotSynced { for directory in ["layers", "segments", "journals"] { try storage.syncDirectory(directory) } }
                let written = seals
                try thread.perform { () throws(StoreError) in
                    let couldRecord = self.manifest.failure == nil
                    do throws(StoreError) { try self.publish(id, written) } catch {
                        isUnknown = couldRecord && self.manifest.failure != nil
                        throw error
                    }
                }
            }
        } catch {
            for disk in cut.disks { disk.volume.sealFailed(error, isUnknown: isUnknown) }
            cut.goOn([])
            logger.error("a fork cannot be sealed", metadata: ["fork": "\(id)", "error": "\(error)"])
            throw error
        }
        cut.goOn(seals)
    }

    /// On the store's thread.
    private func publish(_ id: ForkID, _ seals: [OpenLayerSeal]) throws(StoreError) {
        guard let fork = read({ $0.forks[id] }) else { throw .unknownFork(id) }
        // The layer below may have been merged with others since the fork was opened.
        let record = ManifestRecord.forkSealed(id, seals.map { seal in
            ForkSeal(volume: seal.number, layer: seal.layer?.record(parent: fork.volumes[seal.number].parent), segment: seal.segment.id, journal: seal.journal)
        })
        try change(record)
        for seal in seals {
            do throws(StoreError) { try storage.remove(ForkJournal.path(fork.volumes[seal.number].journal)) } catch {
                logger.warning("cannot remove the journal of a sealed layer", metadata: ["fork": "\(id)", "error": "\(error)"])
            }
        }
        shared.withLock { $0.statistics.sealedForkCount += 1 }
    }

    // MARK: Quiet

    /// All disks of a fork with nothing in flight but reads.
    struct QuietFork {
        /// `io` is the ring that serves the disk; without one this thread holds its gate. One that was opened for the seal is closed after it.
        var disks: [(volume: ForkVolume, io: ForkIO?)] = []

        /// The disks turn to what was sealed, if anything was, and go on. Those without a ring first: a loop may wait for their gate.
        func goOn(_ seals: [OpenLayerSeal]) {
            for (number, disk) in disks.enumerated() where disk.io == nil {
                disk.volume.goOn(seals.first { $0.number == number })
                if disk.volume.isForSealing { disk.volume.release() }
                disk.volume.gate.signal()
            }
            let left = Semaphore()
            var count = 0
            for (number, disk) in disks.enumerated() {
                guard let io = disk.io else { continue }
                nonisolated(unsafe) let (target, seal) = (io, seals.first { $0.number == number })
                if io.loop.execute({ target.goOn(seal) { left.signal() } }) { count += 1 }
            }
            for _ in 0..<count { left.wait() }
        }
    }

    private func quiet(_ id: ForkID) throws(StoreError) -> QuietFork {
        while true {
            guard let fork = read({ $0.forks[id] }) else { throw .unknownFork(id) }
            var volumes: [ForkVolume] = []
            for number in fork.volumes.indices { volumes.append(try openForSealing(id, number)) }
            if let cut = Self.hold(volumes) { return cut }
            // Somebody began or ended to use a disk meanwhile.
            sched_yield()
        }
    }

    /// The disk as it is open already, or opened now for nothing but to be sealed.
    private func openForSealing(_ id: ForkID, _ number: Int) throws(StoreError) -> ForkVolume {
        while true {
            let (isOpen, volume) = shared.withLock { shared -> (Bool, ForkVolume?) in
                guard let entry = shared.openForks["\(id)/\(number)"] else { return (false, nil) }
                return (true, entry.volume)
            }
            if let volume { return volume }
            if !isOpen { return try openLocked(id, number, isForSealing: true) }
            // Being let go by its last user.
            sched_yield()
        }
    }

    /// Nil when a disk changed hands. Rings first: a loop that must become quiet must not be waiting for a gate that is held here.
    private static func hold(_ volumes: [ForkVolume]) -> QuietFork? {
        var cut = QuietFork(disks: volumes.map { ($0, nil) })
        var isHeld = [Bool](repeating: false, count: volumes.count)
        var failed = false
        for (number, volume) in volumes.enumerated() {
            volume.gate.wait()
            let io = volume.io
            volume.gate.signal()
            guard let io else { continue }
            let answered = Semaphore()
            nonisolated(unsafe) var isQuiet = false
            nonisolated(unsafe) let target = io
            guard io.loop.execute({ target.quiet { isQuiet = $0; answered.signal() } }) else {
                // The loop is gone, and with it whatever it did.
                volume.gate.wait()
                if volume.io === io { volume.io = nil }
                volume.gate.signal()
                failed = true
                break
            }
            answered.wait()
            guard isQuiet else {
                failed = true
                break
            }
            cut.disks[number].io = io
            isHeld[number] = true
        }
        for (number, volume) in volumes.enumerated() where cut.disks[number].io == nil && !failed {
            volume.gate.wait()
            isHeld[number] = true
            failed = volume.io != nil || volume.isClosed
        }
        if !failed { return cut }
        let held = cut.disks.enumerated().filter { isHeld[$0.offset] }.map(\.element)
        QuietFork(disks: held).goOn([])
        return nil
    }
}

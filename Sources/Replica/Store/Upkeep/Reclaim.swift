import Synchronization

/// Files that nothing names: at start-up whatever a crash left, later what was dropped. Records go first, files after.

/// Keeps files from being removed, and what they name from being given back, while somebody reads through them.
struct Pin {
    /// Their data is in use as far as they name it.
    let records: [LayerRecord]
    /// Files to be kept: those of the records, and new ones that no record names yet.
    var layers: Set<UInt64>
    /// Kept whole, whatever is named in them: segments of open layers, and new ones.
    var segments: Set<UInt32> = []
    var journals: Set<UInt64> = []

    init(_ chain: [LayerRecord]) {
        records = chain
        layers = Set(chain.lazy.map(\.id))
    }
}

/// Tells the store that files may have become garbage, as long as there is a store.
final class GarbageBell: @unchecked Sendable {
    /// Set once, before anything rings.
    weak var store: ReplicaStore?
    @Sendable func ring() { store?.lookForGarbage() }
}

extension ReplicaStore {
    static let reservePath = "RESERVE"
    static let reserveBytes: UInt64 = 1 << 20

    func pin(_ pin: Pin) -> UInt64 { shared.withLock { $0.add(pin) } }

    func unpin(_ number: UInt64) {
        let look = shared.withLock { shared -> Bool in
            shared.pins[number] = nil
            return shared.hasGarbage && !shared.isClosed
        }
        if look { thread.enqueue { [weak self] in self?.collectGarbage() } }
    }

    /// Somebody stopped reading; any thread.
    func lookForGarbage() {
        thread.enqueue { [weak self] in
            guard let self, self.shared.withLock({ $0.hasGarbage && !$0.isClosed }) else { return }
            self.collectGarbage()
        }
    }

    /// On the store's thread. A failure only leaks until the next time. Returns how many files went.
    @discardableResult
    func collectGarbage() -> Int {
        // A record that may have reached the disk may name what looks like garbage: the next start decides.
        if manifest.failure != nil { return 0 }
        var removed = 0
        do throws(StoreError) { removed = try removeUnreferencedFiles() } catch {
            // Looked for again by the next upkeep.
            upkeep.hasUnnamedFiles.store(true, ordering: .relaxed)
            logger.warning("cannot remove files that nothing refers to", metadata: ["error": "\(error)"])
        }
        keepReserve()
        return removed
    }

    /// On the store's thread. Other threads make files meanwhile, pinned from the moment in which they get their numbers: those that come
    /// after the look at what is pinned have higher ones, and are left alone unless the store is just being opened. Returns how many went.
    @discardableResult
    func removeUnreferencedFiles(isOpening: Bool = false) throws(StoreError) -> Int {
        let readLayers = checksums.layersInUse
        let ignoresPins = options.deliberateFault == .pinsIgnored
        let (layers, segments, journals, nextFile) = shared.withLock { shared -> (Set<UInt64>, Set<UInt64>, Set<UInt64>, UInt64) in
            var layers = Set(shared.state.layers.keys)
            var segments: Set<UInt64> = []
            var journals: Set<UInt64> = []
            for layer in shared.state.layers.values { for use in layer.segments { segments.insert(UInt64(use.segment)) } }
            for fork in shared.state.forks.values {
                for volume in fork.volumes {
                    segments.insert(UInt64(volume.segment))
                    journals.insert(volume.journal)
                }
            }
            let before = (layers.count, segments.count, journals.count)
            for pin in shared.pins.values where !ignoresPins {
                layers.formUnion(pin.layers)
                segments.formUnion(pin.segments.lazy.map { UInt64($0) })
                for record in pin.records { segments.formUnion(record.segments.lazy.map { UInt64($0.segment) }) }
                journals.formUnion(pin.journals)
            }
            // Read by indexes that were merged before these layers were; files of what is gone stay while somebody reads their checksums.
            layers.formUnion(readLayers)
            shared.hasGarbage = before != (layers.count, segments.count, journals.count)
            for receiver in shared.receivers.values { segments.formUnion(receiver.heldSegments.lazy.map { UInt64($0) }) }
            return (layers, segments, journals, isOpening ? .max : shared.state.nextFile)
        }
        var removed = try removeFiles(in: "layers", suffix: ".layer", except: layers, before: nextFile)
        removed += try removeFiles(in: "indexes", suffix: ".index", except: layers, before: nextFile)
        self.segments.keep(segments)
        removed += try removeFiles(in: "segments", suffix: ".seg", except: segments, before: nextFile)
        removed += try removeFiles(in: "journals", suffix: ".journal", except: journals, before: nextFile)
        return removed
    }

    private func removeFiles(in directory: String, suffix: String, except kept: Set<UInt64>, before nextFile: UInt64) throws(StoreError) -> Int {
        var removed = 0
        for name in try storage.list(directory) {
            if name.hasSuffix(suffix), let number = UInt64(name.dropLast(suffix.count)), kept.contains(number) || number >= nextFile { continue }
            try storage.remove(directory + "/" + name)
            removed += 1
        }
        if removed > 0 {
            try storage.syncDirectory(directory)
            logger.debug("removed files that nothing refers to", metadata: ["directory": "\(directory)", "count": "\(removed)"])
        }
        return removed
    }

    /// At open: gives back what segments hold beyond their last layer (reserved space, a broken-off epoch).
    func trimSegments() {
        var ends: [UInt32: UInt32] = [:]
        let (layers, forks) = read { ($0.layers, $0.forks) }
        for layer in layers.values { for use in layer.segments { ends[use.segment] = max(ends[use.segment] ?? 0, use.endBlock) } }
        for fork in forks.values { for volume in fork.volumes { ends[volume.segment] = nil } }
        for (segment, end) in ends.sorted(by: { $0.key < $1.key }) {
            do throws(StoreError) {
                let file = try storage.open(SegmentFile.path(segment), .readWrite, direct: false)
                let size = try file.size()
                let wanted = UInt64(end) * UInt64(pageBytes)
                if size > wanted { try file.truncate(to: wanted) }
                if size < wanted { logger.error("a segment is shorter than its layers say", metadata: ["file": "\(file.path)", "bytes": "\(size)", "expected": "\(wanted)"]) }
            } catch {
                // Other groups are whole: who reads this one gets the error.
                logger.error("cannot look at a segment", metadata: ["error": "\(error)"])
            }
        }
    }

    /// How much of a growing file to reserve at a time.
    var preallocationStep: UInt64 {
        min(options.preallocationBytes, max(1 << 16, storage.space().freeBytes / 16))
    }

    /// A little space that is given up when the disk is full, so that dropping can still be recorded.
    func keepReserve() {
        do throws(StoreError) {
            if try storage.exists(Self.reservePath) { return }
            let file = try storage.open(Self.reservePath, .create, direct: false)
            if !file.preallocate(offsetBytes: 0, lengthBytes: Self.reserveBytes) { try storage.remove(Self.reservePath) }
        } catch {
            logger.debug("no space for the reserve", metadata: ["error": "\(error)"])
        }
    }

    func releaseReserve() -> Bool {
        guard let exists = try? storage.exists(Self.reservePath), exists else { return false }
        return (try? storage.remove(Self.reservePath)) != nil
    }
}

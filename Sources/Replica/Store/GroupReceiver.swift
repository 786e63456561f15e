import Synchronization

/// Where the epochs of one group go: its buffers and the segment that it appends to. Groups have segments of their own, so that
/// an epoch that fails gives back exactly its space, and a dropped group leaves nothing of itself in others' files.
final class GroupReceiver: Sendable {
    unowned let store: ReplicaStore
    let pool: BufferPool
    /// Buffers on their way to the disk.
    let writesQueued = Atomic<Int>(0)

    private struct State {
        /// Where the last sealed epoch ended; nil = the next epoch begins a new segment.
        var sealedEnd: SegmentPosition?
        /// The newest segment that a sealed epoch uses: it and those before are never given back.
        var sealedSegment: UInt32 = 0
        var current: EpochWriter?
        /// The newest epoch whose seal has been asked for.
        var sealing: EpochWriter?
        /// Segments handed out whose data no sealed epoch refers to yet, and the one being filled.
        var held: Set<UInt32> = []
    }

    private let state = Mutex(State())

    /// On the store's thread only.
    private final class Files {
        var open: [UInt32: (file: SegmentFile, reservedBytes: UInt64)] = [:]
        /// A file was created and its name is not durable yet.
        var hasNewNames = false
    }
    nonisolated(unsafe) private let files = Files()

    init(store: ReplicaStore) {
        self.store = store
        pool = BufferPool(count: store.options.writeBufferCount, bufferBytes: store.options.writeBufferBytes)
    }

    /// Segments that must not be removed although no layer refers to them.
    var heldSegments: Set<UInt32> { state.withLock { $0.held } }

    // MARK: Any thread

    /// The newest epoch whose seal has been asked for and not been answered.
    var sealing: EpochWriter? { state.withLock { $0.sealing } }

    /// Begins an epoch behind the one that was `sealing`; one still being received is abandoned.
    func begin(predecessor: EpochWriter?, _ make: (_ start: SegmentPosition?) -> EpochWriter) -> EpochWriter {
        abandonCurrent("a newer epoch of the group began")
        return state.withLock { state in
            // One that failed takes this one with it.
            let start = predecessor?.failure == nil ? predecessor?.position ?? state.sealedEnd : state.sealedEnd
            let writer = make(start)
            state.current = writer
            return writer
        }
    }

    func abandonCurrent(_ why: String) {
        let current = state.withLock { state in
            defer { state.current = nil }
            return state.current
        }
        current?.giveUp(why)
    }

    func willSeal(_ writer: EpochWriter) {
        state.withLock { state in
            if state.current === writer { state.current = nil }
            state.sealing = writer
        }
    }

    func newSegment() -> UInt32 {
        let number = store.shared.withLock { $0.newFile() }
        precondition(number <= UInt64(UInt32.max), "the store has used up its segment numbers")
        state.withLock { _ = $0.held.insert(UInt32(number)) }
        return UInt32(number)
    }

    // MARK: The store's thread

    /// Writes one buffer; a failure becomes the writer's fate.
    func write(_ buffer: PoolBuffer, byteCount: Int, at position: SegmentPosition, for writer: EpochWriter) {
        guard writer.failure == nil else { return }
        do throws(StoreError) {
            let file = try segment(position.segment, upTo: UInt64(position.block) * UInt64(pageBytes) + UInt64(byteCount))
            try file.file.write(UnsafeRawBufferPointer(start: buffer.memory, count: byteCount), at: UInt64(position.block) * UInt64(pageBytes))
            store.shared.withLock { $0.statistics.appendedBytes += UInt64(byteCount) }
        } catch {
            fail(writer, error)
        }
    }

    private func segment(_ id: UInt32, upTo endBytes: UInt64) throws(StoreError) -> SegmentFile {
        if files.open[id] == nil {
            files.hasNewNames = true
            files.open[id] = (try SegmentFile.create(store.storage, store: store.uuid, id: id), UInt64(pageBytes))
        }
        let (file, reserved) = files.open[id]!
        if endBytes > reserved {
            let wanted = max(store.preallocationStep, endBytes - reserved)
            let step = min(wanted, max(store.options.segmentBytes, endBytes) - reserved)
            // Without a reservation the write itself finds out whether there is space.
            _ = file.file.preallocate(offsetBytes: reserved, lengthBytes: step)
            files.open[id]!.reservedBytes = reserved + step
        }
        return file
    }

    /// Makes the data of an epoch durable.
    func sync(_ segments: Set<UInt32>) throws(StoreError) {
        if store.options.deliberateFault != .dataNotSynced {
            for id in segments.sorted() { try files.open[id]?.file.file.dataSync() }
        }
        if files.hasNewNames {
            try store.storage.syncDirectory("segments")
            files.hasNewNames = false
        }
    }

    /// Its failure is about to be told.
    func unsealed(_ writer: EpochWriter) { state.withLock { if $0.sealing === writer { $0.sealing = nil } } }

    /// The epoch has been published.
    func sealed(_ writer: EpochWriter) {
        // The position first: an epoch that begins meanwhile goes behind this one either way.
        state.withLock { state in
            state.sealedEnd = writer.position
            state.sealedSegment = writer.position?.segment ?? state.sealedSegment
            if state.sealing === writer { state.sealing = nil }
            // Numbers only grow: what lies before is full, and the layers name it now.
            if let current = writer.position?.segment { state.held = state.held.filter { $0 >= current } }
        }
        writer.end(.sealed)
        for id in files.open.keys where id < writer.position?.segment ?? 0 { files.open[id] = nil }
    }

    /// Ends an epoch that cannot be sealed. After an I/O error nothing more goes into the segment that had it.
    func fail(_ writer: EpochWriter, _ error: StoreError) {
        let isFirst = writer.fate.withLock { if case .failed = $0 { false } else { true } }
        guard isFirst else { return }
        writer.end(.failed(error))
        store.logger.error("an epoch failed", metadata: ["group": "\(writer.group)", "epoch": "\(writer.cut.epoch)", "error": "\(error)"])
        store.shared.withLock { $0.statistics.abandonedEpochCount += 1 }
        giveBack()
        if case .full = error { store.spaceRefused() }
        if case .io = error { state.withLock { $0.sealedEnd = nil } }
    }

    /// Cuts everything off that no sealed epoch owns. What is still queued for failed epochs will not be written, and an epoch
    /// that began behind a failed one fails as well, so nothing that counts lies there.
    func giveBack() {
        // A record that may have reached the disk may name any of it.
        if store.manifest.failure != nil { return }
        let (sealedEnd, sealedSegment) = state.withLock { ($0.sealedEnd, $0.sealedSegment) }
        for id in files.open.keys.sorted() {
            do throws(StoreError) {
                if id == sealedEnd?.segment {
                    try files.open[id]!.file.file.truncate(to: UInt64(sealedEnd!.block) * UInt64(pageBytes))
                    files.open[id]!.reservedBytes = UInt64(sealedEnd!.block) * UInt64(pageBytes)
                } else if id > sealedSegment {
                    files.open[id] = nil
                    state.withLock { _ = $0.held.remove(id) }
                    try store.storage.remove(SegmentFile.path(id))
                }
            } catch {
                store.logger.warning("cannot give back the space of an epoch", metadata: ["segment": "\(id)", "error": "\(error)"])
            }
        }
    }
}

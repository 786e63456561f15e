import Synchronization

/// Where the epochs of one group go: its buffers and the segment that it appends to. Groups have segments of their own, so that
/// an epoch that fails gives back exactly its space, and a dropped group leaves nothing of itself in others' files.
///
/// A full buffer goes to the storage's write queue at once, from the thread that filled it, while its segment is open and has space
/// reserved; so the next epoch's data flows while the store's thread syncs this one's. Else the store's thread readies the segment first.
/// Space is given back by the store's thread alone, when nothing of the group is under way: from before an epoch is seen to have failed until
/// its space is given back (`willGiveBack`, `didGiveBack`) nothing is started from elsewhere, since the next epoch begins at the same place.
final class GroupReceiver: Sendable {
    unowned let store: ReplicaStore
    let pool: BufferPool
    private let writes: any StorageWriteQueue
    /// Buffers on their way to the disk.
    let writesQueued = Atomic<Int>(0)
    /// Those of them that the write queue has.
    private let underway = Underway()

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

    /// Changed on the store's thread, but for `givingBack`.
    private struct Files {
        var open: [UInt32: (file: SegmentFile, reservedBytes: UInt64)] = [:]
        /// A file was created and its name is not durable yet.
        var hasNewNames = false
        /// Epochs that have failed, or are about to, and whose space has not been given back.
        var givingBack = 0
        /// A write failed for other reasons than space.
        var hadIOError = false
    }
    private let files = Mutex(Files())

    init(store: ReplicaStore, writes: any StorageWriteQueue) {
        self.store = store
        self.writes = writes
        pool = BufferPool(count: store.options.writeBufferCount, bufferBytes: store.options.writeBufferBytes)
        writes.add(pool.memory)
    }

    deinit { writes.remove(pool.memory) }

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

    func willGiveBack() { files.withLock { $0.givingBack += 1 } }
    func didGiveBack() { files.withLock { $0.givingBack -= 1 } }

    // MARK: Writing

    /// Writes one buffer and gives it back to the pool; a failure becomes the writer's fate.
    func write(_ buffer: PoolBuffer, byteCount: Int, payloadBytes: Int, at position: SegmentPosition, for writer: EpochWriter) {
        writesQueued.add(1, ordering: .relaxed)
        let write = BufferWrite(buffer: buffer, byteCount: byteCount, payloadBytes: payloadBytes, position: position, onWritten: writer.onWritten)
        if startAtOnce(write, for: writer) { return }
        let accepted = store.thread.enqueue { self.startOnThread(write, for: writer) }
        if !accepted { ended(write) }
    }

    private func startAtOnce(_ write: BufferWrite, for writer: EpochWriter) -> Bool {
        guard writes.isConcurrent else { return false }
        return files.withLock { files in
            guard files.givingBack == 0, let (file, reserved) = files.open[write.position.segment], write.endBytes <= reserved, writer.failure == nil else { return false }
            return start(write, to: file, for: writer)
        }
    }

    private func startOnThread(_ write: BufferWrite, for writer: EpochWriter) {
        guard writer.failure == nil else { return ended(write) }
        // A record that may have reached the disk may name the place: then what is there stays.
        if let failure = store.manifest.failure {
            ended(write)
            return fail(writer, failure)
        }
        let file: SegmentFile
        do throws(StoreError) { file = try segment(write.position.segment, upTo: write.endBytes) } catch {
            ended(write)
            return fail(writer, error)
        }
        if !start(write, to: file, for: writer) { return ended(write) }
        if let error = writer.writes.error { fail(writer, error) }
    }

    private func start(_ write: BufferWrite, to file: SegmentFile, for writer: EpochWriter) -> Bool {
        let fate = writer.writes
        underway.begin()
        fate.underway.begin()
        let bytes = UnsafeRawBufferPointer(start: write.buffer.memory, count: write.byteCount)
        let accepted = writes.write(bytes, to: file.file, at: write.startBytes) { [self, weak writer] error in
            if let error {
                fate.failed(error)
                if case .io = error { files.withLock { $0.hadIOError = true } }
                // One-by-one writes are on the store's thread, which looks when they return.
                if writes.isConcurrent, let writer { writer.store.thread.enqueue { writer.receiver.fail(writer, error) } }
            }
            ended(write)
            fate.underway.end()
            underway.end()
        }
        if accepted {
            store.shared.withLock { $0.statistics.appendedBytes += UInt64(write.byteCount) }
        } else {
            fate.underway.end()
            underway.end()
        }
        return accepted
    }

    /// Written, or not to be written.
    private func ended(_ write: BufferWrite) {
        writesQueued.subtract(1, ordering: .relaxed)
        pool.give(write.buffer)
        write.onWritten?(write.payloadBytes)
    }

    // MARK: The store's thread

    private func segment(_ id: UInt32, upTo endBytes: UInt64) throws(StoreError) -> SegmentFile {
        var (file, reserved): (SegmentFile, UInt64)
        if let open = files.withLock({ $0.open[id] }) {
            (file, reserved) = open
        } else {
            files.withLock { $0.hasNewNames = true }
            (file, reserved) = (try SegmentFile.create(store.storage, store: store.uuid, id: id), UInt64(pageBytes))
        }
        if endBytes > reserved {
            let wanted = max(store.preallocationStep, endBytes - reserved)
            let step = min(wanted, max(store.options.segmentBytes, endBytes) - reserved)
            // Without a reservation the write itself finds out whether there is space.
            _ = file.file.preallocate(offsetBytes: reserved, lengthBytes: step)
            reserved += step
        }
        files.withLock { $0.open[id] = (file, reserved) }
        return file
    }

    /// Begins to make data that has been written durable; `finish` the syncs.
    func startSync(_ segments: Set<UInt32>, _ syncs: EpochWrites) {
        if store.options.deliberateFault == .dataNotSynced { return }
        for id in segments.sorted() {
            guard let file = files.withLock({ $0.open[id] })?.file.file else { continue }
            startSync(file, syncs)
        }
    }

    /// The same of one file.
    func startSync(_ file: any StorageFile, _ syncs: EpochWrites) {
        syncs.underway.begin()
        let accepted = writes.sync(file) { error in
            if let error { syncs.failed(error) }
            syncs.underway.end()
        }
        if !accepted {
            syncs.failed(.closed)
            syncs.underway.end()
        }
    }

    func finish(_ syncs: EpochWrites) throws(StoreError) {
        syncs.underway.wait()
        if let error = syncs.error { throw error }
        if files.withLock({ $0.hasNewNames }) {
            try store.storage.syncDirectory("segments")
            files.withLock { $0.hasNewNames = false }
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
            guard let current = writer.position?.segment, state.held.contains(where: { $0 < current }) else { return }
            state.held = state.held.filter { $0 >= current }
            // Unless all that went into one of them was written again later in its epoch.
            store.upkeep.hasUnnamedFiles.store(true, ordering: .relaxed)
        }
        writer.end(.sealed)
        files.withLock { files in files.open = files.open.filter { $0.key >= writer.position?.segment ?? 0 } }
    }

    /// Ends an epoch that cannot be sealed. After an I/O error nothing more goes into the segment that had it.
    func fail(_ writer: EpochWriter, _ error: StoreError) {
        willGiveBack()
        defer { didGiveBack() }
        let isFirst = writer.fate.withLock { if case .failed = $0 { false } else { true } }
        guard isFirst else { return }
        writer.end(.failed(error))
        store.logger.error("an epoch failed", metadata: ["group": "\(writer.group)", "epoch": "\(writer.cut.epoch)", "error": "\(error)"])
        store.shared.withLock { $0.statistics.abandonedEpochCount += 1 }
        giveBack()
        if case .full = error { store.spaceRefused() }
        let isSpoilt = if case .io = error { true } else { store.manifest.failure != nil }
        if isSpoilt { leaveSegment() }
    }

    /// Nothing more goes into the segment that sealed data ends in: the disk behind it failed, or a record with an unknown fate may name what
    /// lies there.
    func leaveSegment() { state.withLock { $0.sealedEnd = nil } }

    /// Cuts everything off that no sealed epoch owns. What is still queued for failed epochs will not be written, and an epoch
    /// that began behind a failed one fails as well, so nothing that counts lies there.
    func giveBack() {
        underway.wait()
        // A record that may have reached the disk may name any of it.
        if store.manifest.failure != nil { return }
        let (sealedEnd, sealedSegment) = state.withLock { ($0.sealedEnd, $0.sealedSegment) }
        let open = files.withLock { $0.open }
        for (id, (file, _)) in open.sorted(by: { $0.key < $1.key }) {
            do throws(StoreError) {
                if id == sealedEnd?.segment {
                    let endBytes = UInt64(sealedEnd!.block) * UInt64(pageBytes)
                    try file.file.truncate(to: endBytes)
                    files.withLock { $0.open[id]!.reservedBytes = endBytes }
                } else if id > sealedSegment {
                    files.withLock { $0.open[id] = nil }
                    state.withLock { _ = $0.held.remove(id) }
                    try store.storage.remove(SegmentFile.path(id))
                }
            } catch {
                store.logger.warning("cannot give back the space of an epoch", metadata: ["segment": "\(id)", "error": "\(error)"])
            }
        }
        let hadIOError = files.withLock { files in
            defer { files.hadIOError = false }
            return files.hadIOError
        }
        if hadIOError { state.withLock { $0.sealedEnd = nil } }
    }
}

/// One buffer on its way, and who hears of it.
private struct BufferWrite {
    let buffer: PoolBuffer
    let byteCount: Int
    let payloadBytes: Int
    let position: SegmentPosition
    let onWritten: (@Sendable (Int) -> Void)?

    var startBytes: UInt64 { UInt64(position.block) * UInt64(pageBytes) }
    var endBytes: UInt64 { startBytes + UInt64(byteCount) }
}

/// What becomes of an epoch's buffers, or of its syncs. Apart from the writer so that a write under way does not keep that alive.
final class EpochWrites: Sendable {
    let underway = Underway()
    private let first = Mutex<StoreError?>(nil)

    /// Of the first that failed.
    var error: StoreError? { first.withLock { $0 } }

    func failed(_ error: StoreError) { first.withLock { $0 = $0 ?? error } }
}

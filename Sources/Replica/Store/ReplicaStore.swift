import BlockTap
import Glibc
import Logging
import Synchronization

/// Sizes that a store works with; the defaults are for production, tests make them small.
struct StoreOptions: Sendable {
    /// A new segment file is begun when the current one would grow beyond this.
    var segmentBytes: UInt64 = 1 << 30
    /// Segments are reserved on the file system in steps of this, or of 1/16 of what is free when that is less.
    var preallocationBytes: UInt64 = 256 << 20
    var writeBufferBytes = 2 << 20
    /// Per group that receives.
    var writeBufferCount = 16
    /// A buffer that is not full is written too when it holds this much and the disk has nothing else of the group to do.
    var writeBytesMin = 1 << 20
    /// The MANIFEST is rewritten at open when it is longer; by upkeep when it is also four times as long as the state alone.
    var manifestRewriteBytes: UInt64 = 4 << 20
    /// Upkeep does not merge for less overwritten data than this in the whole store, nor punch for less dead space in a segment.
    var garbageBytesMin: UInt64 = 1 << 20
    var reclaimBytesMin: UInt64 = 64 << 10
    /// Space is low when less than the larger of these is free; see `lowSpaceMark`.
    var lowSpaceBytes: UInt64 = 2 << 30
    var lowSpacePercent: UInt64 = 5
    /// How data that arrives is stored.
    var compression = StoreCompression.lz4
    /// Memory for checksums of blocks, of all readers together.
    var checksumCacheBytes = 64 << 20
    /// A layer with more checksums is never held in memory as a whole.
    var residentChecksumCountMax = 32 << 10
    /// Layer files that are kept open for their checksums.
    var layerFilesOpenMax = 128
    /// A merged index is kept on disk when merging it anew takes as long as this many extents.
    var indexFileCostMin = 100_000
    /// Merges of layers with more extents are followed in the background.
    var rebaseExtentsMax = 200_000
    /// A fork's journal is flushed when this many writes wait, even when nobody asks.
    var journalEntriesMax = 4096
    /// A fork is sealed when a disk's journal is longer than this, or when more of its open segment was overwritten than this and than what
    /// was not.
    var forkJournalBytesMax: UInt64 = 64 << 20
    var forkDeadBytesMax: UInt64 = 256 << 20
    /// No thread of its own: see `StoreThread`. For simulations, like the next two.
    var isStepped = false
    var newUUID: @Sendable () -> StoreUUID = { .random() }
    var deliberateFault: DeliberateFault?
    var now: @Sendable () -> UInt64 = {
        var time = timespec()
        clock_gettime(CLOCK_REALTIME, &time)
        return UInt64(time.tv_sec) * 1_000_000_000 + UInt64(time.tv_nsec)
    }
}

/// Mistakes that the store makes when told to: tests of the tests, which must notice each of them.
enum DeliberateFault: CaseIterable, Sendable {
    /// An epoch is acknowledged although its data was not synced.
    case dataNotSynced
    /// The MANIFEST names a layer whose file was not synced.
    case layerNotSynced
    /// Names of new files in `layers` are not synced.
    case namesNotSynced
    /// Blocks are handed out without a look at their checksums.
    case blocksNotChecked
    /// A reopened fork writes over blocks that its journal names.
    case forkBlocksReused
    /// Data that was moved is given up before the record with its new place is durable.
    case spaceReusedBeforeRecord
    /// Space is given back although a reader is pinned to it.
    case pinsIgnored
    /// Held recovery points expire and are dropped like others.
    case holdsIgnored
    /// Merged indexes in memory stay as they are when layers in them become one, or move.
    case indexesNotRebased
    /// A merged index out of a file is believed, whatever its checksums say and whatever layers it was merged from.
    case indexFilesNotChecked
    /// Layers name data that was moved and not synced.
    case movedDataNotSynced
    /// The MANIFEST names a layer, made of several, whose file was not synced.
    case mergedLayersNotSynced
    /// Only as many blocks of a compressed cluster count as used as its extent shows.
    case clustersCutShort
    /// An open fork looks at merged layers oldest first.
    case forksFollowBackwards
    /// Bad blocks are repaired with whatever is offered.
    case repairsNotChecked
    /// Of what was written between two states only the newest layer is known.
    case olderWritesForgotten
}

/// The replica's data: volumes as chains of layers, recovery points, forks. One per directory, held by one process at a time.
///
/// Thread-safe. Changes are made by the store's own thread, one after the other; calls that change something wait for it and
/// return when the change is durable. `docs/store-format.md` describes the files.
public final class ReplicaStore: @unchecked Sendable {
    let storage: any Storage
    let options: StoreOptions
    let logger: Logger
    let uuid: StoreUUID
    let thread: StoreThread
    /// For merged indexes that take long. The same as `thread` when that is stepped.
    let background: StoreThread
    /// Used on the store's thread only.
    let manifest: Manifest
    let shared: Mutex<Shared>
    let segments: SegmentCache
    let indexes: IndexCache
    let upkeep = Upkeep()
    let forkLocks = ForkLocks()
    let checksums: ChecksumCache
    /// For what forks need while they are open; it may wait for the store's thread.
    let forkThread: StoreThread
    let scrubber = Scrubber()

    /// What several threads look at.
    struct Shared {
        var state: StoreState
        var receivers: [GroupID: GroupReceiver] = [:]
        /// Of all receivers; made for the first.
        var writes: (any StorageWriteQueue)?
        var pins: [UInt64: Pin] = [:]
        var nextPin: UInt64 = 1
        /// Something was dropped while it was pinned: look again when a pin goes.
        var hasGarbage = false
        /// By "fork/volume".
        var openForks: [String: OpenForkVolume] = [:]
        /// Layers that they read through were merged, and they have not been told yet.
        var forksToFollow: Set<ForkID> = []
        /// Nobody knows whether they were sealed.
        var uncertainForks: Set<String> = []
        var statistics = StoreStatistics()
        var figures = StoreFigures()
        var isClosed = false

        mutating func newFile() -> UInt64 {
            defer { state.nextFile += 1 }
            return state.nextFile
        }

        /// Returns the number by which it is taken away again.
        mutating func add(_ pin: Pin) -> UInt64 {
            defer { nextPin += 1 }
            pins[nextPin] = pin
            return nextPin
        }
    }

    /// Opens the store in `directory`, making it when it is not there: takes the lock, replays the MANIFEST, removes what nothing
    /// refers to.
    public static func open(directory: String, logger: Logger) throws(StoreError) -> ReplicaStore {
        try ReplicaStore(storage: FileStorage(directory: directory), options: StoreOptions(), logger: logger)
    }

    init(storage: any Storage, options: StoreOptions, logger: Logger) throws(StoreError) {
        assertFormatSizes()
        self.storage = storage
        self.options = options
        self.logger = logger
        thread = StoreThread(isStepped: options.isStepped)
        forkThread = StoreThread(isStepped: options.isStepped)
        var opened = false
        try storage.lock()
        defer { if !opened { storage.unlock() } }
        try storage.createDirectory("segments")
        try storage.createDirectory("layers")
        try storage.createDirectory("journals")
        try storage.createDirectory("indexes")
        // Also the MANIFEST's own name, when a kill came between its renaming and its sync.
        try storage.syncDirectory("")
        let (manifest, state, tornBytes) = try Manifest.open(storage, rewriteBytes: options.manifestRewriteBytes, newUUID: options.newUUID)
        self.manifest = manifest
        background = options.isStepped ? thread : StoreThread()
        uuid = state.uuid
        shared = Mutex(Shared(state: state))
        segments = SegmentCache(storage: storage, store: state.uuid)
        indexes = IndexCache()
        let garbage = GarbageBell()
        checksums = ChecksumCache(storage: storage, store: state.uuid, options: options, unused: garbage.ring)
        garbage.store = self
        opened = true
        indexes.store = self
        if tornBytes > 0 { logger.notice("cut a torn record off the MANIFEST", metadata: ["bytes": "\(tornBytes)", "store": "\(storage.location)"]) }
        do throws(StoreError) {
            try thread.perform { () throws(StoreError) in
                try self.removeUnreferencedFiles(isOpening: true)
                self.trimSegments()
                try self.findIndexFiles()
            }
        } catch {
            end()
            throw error
        }
        keepReserve()
    }

    deinit { end() }

    /// Ends unfinished epochs and gives the directory free. Open readers and forks must have been closed. Idempotent.
    public func close() {
        if !shared.withLock({ $0.isClosed }) {
            // Behind the index of the last epoch, which was acknowledged before it was brought forward.
            try? thread.perform {}
            writeLastIndexFiles()
        }
        end()
    }

    private func end() {
        scrubber.stop()
        let receivers = shared.withLock { shared -> [GroupReceiver] in
            if shared.isClosed { return [] }
            shared.isClosed = true
            return shared.receivers.sorted { $0.key.rawValue < $1.key.rawValue }.map(\.value)
        }
        stopUpkeep()
        for receiver in receivers { receiver.abandonCurrent("the store closes") }
        forkThread.stop()
        if background !== thread { background.stop() }
        thread.stop()
        shared.withLock { $0.writes }?.close()
        segments.removeAll()
        checksums.close()
        storage.unlock()
    }

    // MARK: Groups

    /// 4 PiB: an index has 40 bits for a block.
    public static let volumeBytesMax: UInt64 = 1 << 52

    /// Makes a group with these volumes. Nothing happens when it exists so; volumes may have grown, and new ones may follow the
    /// old. Throws `.shrunk` when one is smaller than it was.
    public func createGroup(_ id: GroupID, volumes: [VolumeSpec]) throws(StoreError) {
        try checkName(id.rawValue)
        guard !volumes.isEmpty else { throw .invalid("group \(id) must have a disk") }
        for spec in volumes where spec.geometry.sizeBytes == 0 { throw .invalid("disk \(spec.name) of group \(id) has no size") }
        // Agents say what shape their disks have; what is accepted here is computed with, and served, later.
        for spec in volumes where spec.geometry.sizeBytes > Self.volumeBytesMax || spec.geometry.logicalBlockBytes.nonzeroBitCount != 1 {
            throw .invalid("disk \(spec.name) of group \(id) cannot have \(spec.geometry.sizeBytes) bytes in blocks of \(spec.geometry.logicalBlockBytes)")
        }
        try thread.perform { () throws(StoreError) in
            if let group = self.read({ $0.groups[id] }) {
                let old = group.volumes.map(\.spec)
                if old == volumes { return }
                guard volumes.count >= old.count else { throw .invalid("group \(id) has \(old.count) disks, not \(volumes.count)") }
                for (was, now) in zip(old, volumes) {
                    guard was.name == now.name else { throw .invalid("disk \(was.name) of group \(id) cannot become \(now.name)") }
                    if now.geometry.sizeBytes < was.geometry.sizeBytes {
                        throw .shrunk(volume: now.name, nowBytes: now.geometry.sizeBytes, wasBytes: was.geometry.sizeBytes)
                    }
                }
            }
            try self.change(.groupCreated(id, volumes: volumes))
        }
    }

    public func groups() -> [GroupInfo] {
        shared.withLock { shared in shared.state.groups.keys.sorted { $0.rawValue < $1.rawValue }.map { shared.figures.info($0, shared.state)! } }
    }

    public func group(_ id: GroupID) -> GroupInfo? { shared.withLock { $0.figures.info(id, $0.state) } }

    /// Removes the group and its recovery points. What forks and open readers still read stays until they go. Throws `.invalid` while a
    /// recovery point of it is held.
    public func deleteGroup(_ id: GroupID) throws(StoreError) {
        try thread.perform { () throws(StoreError) in
            guard let count = self.read({ $0.groups[id]?.volumes.count }) else { throw .unknownGroup(id) }
            if let point = self.recoveryPoints(id).first(where: { $0.hold != nil }) {
                throw .invalid("recovery point \(point.id) of group \(id) is held as \"\(point.hold!)\": release it before the group is deleted")
            }
            self.shared.withLock { $0.receivers[id] }?.abandonCurrent("the group is deleted")
            try self.change(.groupDeleted(id))
            self.shared.withLock { $0.receivers[id] = nil }
            self.indexes.remove(id, volumeCount: count)
            self.upkeep.settings.withLock { $0.policies[id] = nil }
            self.collectGarbage()
        }
    }

    /// Fences whoever writes with an older generation, durably. Returns the new one.
    public func raiseGeneration(_ id: GroupID) throws(StoreError) -> Generation {
        try thread.perform { () throws(StoreError) -> Generation in
            guard let generation = self.read({ $0.groups[id]?.generation.next }) else { throw .unknownGroup(id) }
            try self.change(.generationRaised(id, generation))
            return generation
        }
    }

    /// The disks that a recovery point has: those that the group had then.
    public func volumes(of id: RecoveryPointID, in group: GroupID) throws(StoreError) -> [VolumeSpec] {
        guard let record = read({ $0.groups[group] }) else { throw .unknownGroup(group) }
        guard let point = record.points.last(where: { $0.point.id == id }) else { throw .unknownRecoveryPoint(group, id) }
        return point.volumes.map(\.spec)
    }

    /// Oldest first.
    public func recoveryPoints(_ id: GroupID) -> [RecoveryPoint] {
        read { $0.groups[id]?.points.map(\.point) ?? [] }
    }

    /// The last of them, without a copy of all the others.
    public func newestRecoveryPoint(_ id: GroupID) -> RecoveryPoint? { read { $0.groups[id]?.points.last?.point } }

    public func statistics() -> StoreStatistics {
        var figures = shared.withLock { shared -> StoreStatistics in
            var figures = shared.statistics
            let layers = shared.figures.layers(shared.state)
            figures.groupCount = shared.state.groups.count
            figures.markCount = shared.state.forks.values.count(where: { ForkInfo.isMark(purpose: $0.purpose) })
            figures.forkCount = shared.state.forks.count - figures.markCount
            figures.layerCount = shared.state.layers.count
            figures.storedBytes = layers.storedBytes
            figures.segmentCount = layers.segmentCount
            return figures
        }
        figures.upkeep = upkeep.settings.withLock { $0.statistics }
        (figures.freeBytes, figures.capacityBytes) = storage.space()
        figures.scrub = scrubber.statistics
        return figures
    }

    // MARK: Inside

    func read<T>(_ body: (StoreState) -> T) -> T {
        shared.withLock { shared in
            nonisolated(unsafe) let result = body(shared.state)
            return result
        }
    }

    /// Makes one change durable, then visible. On the store's thread.
    func change(_ record: ManifestRecord) throws(StoreError) {
        precondition(thread.isCurrent)
        if let conflict = read({ $0.conflict(record) }) { throw .invalid(conflict) }
        do throws(StoreError) { try manifest.append(record) } catch {
            // The reserve is there so that dropping things works on a full disk.
            guard case .full = error, releaseReserve() else { throw error }
            try manifest.append(record)
        }
        shared.withLock {
            $0.state.apply(record)
            $0.figures.changed(by: record)
        }
        switch record {
        case .groupDeleted, .forkDropped, .pointsDropped, .layersMerged, .forkSealed, .forkCommitted, .forkHydrated: upkeep.hasUnnamedFiles.store(true, ordering: .relaxed)
        case .snapshot, .groupCreated, .generationRaised, .epochSealed, .forked, .pointMarked: break
        }
        switch record {
        case .layersMerged(let replaced, _), .forkHydrated(_, _, let replaced, _): forksFollow(replaced)
        default: break
        }
    }

    func checkName(_ name: String) throws(StoreError) {
        let valid = name.utf8.allSatisfy { $0 == UInt8(ascii: "-") || (UInt8(ascii: "0")...UInt8(ascii: "9")).contains($0) || (UInt8(ascii: "a")...UInt8(ascii: "z")).contains($0) }
        guard valid, !name.isEmpty, name.utf8.count <= 64 else { throw .invalid("\"\(name)\" is no name: 1 to 64 of a-z, 0-9 and -") }
    }
}

extension StoreState {
    func info(_ id: GroupID) -> GroupInfo? {
        guard let group = groups[id] else { return nil }
        var live: Set<UInt64> = []
        for volume in group.volumes { mark(volume.top, &live) }
        for point in group.points { for volume in point.volumes { mark(volume.top, &live) } }
        return GroupInfo(
            id: id, volumes: group.volumes.map(\.spec), generation: group.generation, lastDurable: group.lastDurable,
            storedBytes: live.reduce(0) { $0 + (layers[$1]?.dataBytes ?? 0) }, layerCount: live.count, recoveryPointCount: group.points.count,
            heldPointCount: group.points.count { $0.point.hold != nil })
    }
}

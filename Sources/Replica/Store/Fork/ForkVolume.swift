import BlockTap
import Glibc
import Logging
import Synchronization

/// One volume of a fork, open for writing: the parent's merged index with the fork's own open layer over it.
///
/// Blocks are never overwritten in place: a write goes behind the last one in the fork's segment, and the index turns to it
/// once it is there (`commit`), so that readers of the old place are not disturbed. A flush makes the data and the journal
/// durable; what was flushed survives the process and the power, what was not is lost from some write on.
///
/// `ForkStore` drives it through a ring, on one thread; `read`/`write`/`zero`/`flush` do so synchronously, one at a time. Not both.
public final class ForkVolume: @unchecked Sendable {
    public let id: ForkID
    public let name: String
    public let geometry: BlockGeometry
    let store: ReplicaStore
    let map: BlockMap
    private(set) var open: OpenLayerData
    private(set) var log: FramedLog
    /// The layers that it reads through, oldest first: those below its open layer.
    var chain: [LayerRecord]
    /// Opened by a seal for itself: it knows no layers below its open one and cannot be read.
    let isForSealing: Bool
    /// What the open layer says, tombstones included: what a seal writes.
    private var own = ExtentIndex()
    /// Held during each synchronous call, by whoever changes `io`, and by a seal of a volume that no ring serves.
    let gate = Semaphore(count: 1)
    /// The ring that serves it, if one does. Under `gate`.
    weak var io: ForkIO?
    private let key: String
    private var pin: UInt64?
    private var journal: UInt64

    /// Next free block of the segment.
    private var nextBlock: UInt32 = 1
    private var reservedBytes: UInt64
    /// Completed writes that no journal frame holds yet, and those of the frame being written.
    private var pending: [StoredExtent] = []
    private var flushing: [StoredExtent] = []
    private var flushBegan: (endBytes: UInt64, sequence: UInt64) = (0, 0)
    /// A data write completed since the last sync of the segment began.
    private var hasUnsyncedData = false
    /// Set by a failed flush: what is on disk is unknown, so nothing is promised any more.
    private(set) var failure: StoreError?
    /// Files of a seal that is not published yet.
    private var preparing: (layer: UInt64, segment: UInt32, journal: UInt64)?
    /// What a seal that failed means for the volume; noted by the sealing thread, minded when the volume goes on.
    private var sealFailure: StoreError?
    private var turningSlot: UInt32 = 0
    /// A bound was reached, and the fork's next seal has not come yet.
    let isSealAsked = Atomic(false)
    private var journalBytesMax: UInt64
    /// Where the segment ended when overwritten blocks were counted last.
    private var countedBlock: UInt32 = 1

    init(store: ReplicaStore, id: ForkID, spec: VolumeSpec, chain: [LayerRecord]?, map: BlockMap, log: FramedLog, frames: [FramedLog.Frame], pin: UInt64, journal: UInt64, key: String) throws(StoreError) {
        self.store = store
        self.id = id
        self.key = key
        name = spec.name
        geometry = spec.geometry
        self.chain = chain ?? []
        isForSealing = chain == nil
        self.map = map
        open = map.open!
        journalBytesMax = store.options.forkJournalBytesMax
        self.log = log
        self.pin = pin
        self.journal = journal
        reservedBytes = try open.segment.file.size()
        try recover(frames)
    }

    deinit { release() }

    /// Flushes and gives the fork free for the next opener. Nothing may be in flight.
    public func close() throws(StoreError) {
        gate.wait()
        defer { gate.signal() }
        defer { release() }
        if pin != nil, failure == nil { try flushNow() }
    }

    func release() {
        guard let pin else { return }
        self.pin = nil
        store.shared.withLock { $0.openForks[key] = nil }
        store.unpin(pin)
    }

    // MARK: Core, shared with ForkStore

    var blockCount: UInt64 { geometry.blockCount }

    /// A place for the data of a write. Given up when the write fails.
    func allocate(blocks: Int) throws(StoreError) -> UInt32 {
        if let failure { throw failure }
        guard UInt64(nextBlock) + UInt64(blocks) < UInt64(UInt32.max) else { throw .full(what: "fork \(id) has used up its segment") }
        defer { nextBlock += UInt32(blocks) }
        open.reserve(Int(nextBlock) + blocks)
        let end = (UInt64(nextBlock) + UInt64(blocks)) * UInt64(pageBytes)
        if end > reservedBytes {
            let step = max(min(store.preallocationStep, 64 << 20), end - reservedBytes)
            _ = open.segment.file.preallocate(offsetBytes: reservedBytes, lengthBytes: step)
            reservedBytes += step
        }
        return nextBlock
    }

    /// Notes the checksums of what is being written to `segmentBlock`; before or after the write, before `commit`.
    func hash(_ bytes: UnsafeRawPointer, startBlock: UInt64, blocks: Int, segmentBlock: UInt32) {
        for index in 0..<blocks {
            let block = startBlock + UInt64(index)
            let length = blockLength(block, sizeBytes: geometry.sizeBytes)
            open.set(BlockChecksum.of(bytes + index * blockBytes, count: length, blockIndex: block), segmentBlock: Int(segmentBlock) + index)
        }
    }

    /// The data is in place: from now on it is what readers get.
    func commit(startBlock: UInt64, blocks: Int, segmentBlock: UInt32) {
        put(IndexExtent(startBlock: startBlock, blockCount: UInt32(blocks), slot: IndexExtent.openSlot, segment: open.segment.id, segmentBlock: segmentBlock, checksumIndex: segmentBlock))
        hasUnsyncedData = true
        let entry = StoredExtent(
            startBlock: startBlock, blockCount: UInt32(blocks), segment: open.segment.id, segmentBlock: segmentBlock, checksumIndex: 0,
            storedBytes: UInt32(blocks * blockBytes), encoding: ExtentEncoding.plain.rawValue)
        if let last = pending.last, !last.isZero, last.endBlock == startBlock, last.segmentBlock + last.blockCount == segmentBlock, Int(last.blockCount) + blocks <= 1 << 12 {
            pending[pending.count - 1].blockCount += UInt32(blocks)
            pending[pending.count - 1].storedBytes += UInt32(blocks * blockBytes)
        } else {
            pending.append(entry)
        }
    }

    /// Whole blocks become zero.
    func commitZero(startBlock: UInt64, blocks: UInt64) {
        var block = startBlock
        while block < startBlock + blocks {
            let count = UInt32(min(startBlock + blocks - block, 1 << 30))
            erase(from: block, to: block + UInt64(count))
            pending.append(StoredExtent(startBlock: block, blockCount: count, segment: 0, segmentBlock: 0, checksumIndex: 0, storedBytes: 0, encoding: ExtentEncoding.zero.rawValue))
            block += UInt64(count)
        }
    }

    private func put(_ extent: IndexExtent) {
        map.index.apply(extent)
        own.apply(extent)
    }

    private func erase(from start: UInt64, to end: UInt64) {
        map.index.erase(from: start, to: end)
        var block = start
        while block < end {
            let count = min(end - block, UInt64(IndexExtent.blockCountMax))
            own.apply(IndexExtent(startBlock: block, blockCount: UInt32(count), slot: IndexExtent.zeroSlot, segment: 0, segmentBlock: 0, checksumIndex: 0))
            block += count
        }
    }

    /// Whether a flush has anything to do.
    var needsFlush: Bool { hasUnsyncedData || !pending.isEmpty }
    var pendingCount: Int { pending.count }

    /// Begins a flush of everything committed so far: the bytes to write to the journal and where. The caller syncs the segment,
    /// writes and syncs the journal, then calls `flushEnded`; one flush at a time.
    func beginFlush() -> (bytes: [UInt8], offset: UInt64) {
        flushBegan = (log.endBytes, log.sequence)
        var bytes: [UInt8] = []
        swap(&pending, &flushing)
        if !flushing.isEmpty {
            let payload = ForkJournal.payload(flushing, open)
            payload.withUnsafeBytes { log.encode(type: ForkJournal.frameType, payload: $0, into: &bytes) }
        }
        hasUnsyncedData = false
        return (bytes, flushBegan.endBytes)
    }

    /// A flush that found no space may be tried again; after any other failure nobody knows what is on disk.
    func flushEnded(_ error: StoreError?) {
        defer { flushing.removeAll(keepingCapacity: true) }
        guard let error else { return askForSealWhenDue() }
        if case .full = error {
            log.rewind(to: flushBegan.endBytes, sequence: flushBegan.sequence)
            pending.insert(contentsOf: flushing, at: 0)
            hasUnsyncedData = true
        } else if failure == nil {
            failure = error
        }
        store.logger.error("a fork cannot be flushed", metadata: ["fork": "\(id)", "volume": "\(name)", "error": "\(error)"])
    }

    // MARK: Synchronous

    public func read(offsetBytes: UInt64, into buffer: UnsafeMutableRawBufferPointer) throws(StoreError) {
        try check(offsetBytes, UInt64(buffer.count))
        gate.wait()
        defer { gate.signal() }
        try map.read(offsetBytes: offsetBytes, into: buffer)
    }

    /// Any offset and length; blocks written in part are read, changed and written as new ones.
    public func write(offsetBytes: UInt64, _ bytes: UnsafeRawBufferPointer) throws(StoreError) {
        gate.wait()
        defer { gate.signal() }
        try writeNow(offsetBytes: offsetBytes, bytes)
    }

    private func writeNow(offsetBytes: UInt64, _ bytes: UnsafeRawBufferPointer) throws(StoreError) {
        try check(offsetBytes, UInt64(bytes.count))
        if bytes.count == 0 { return }
        let bounceBytes = 1 << 20
        let bounce = UnsafeMutableRawPointer.allocate(byteCount: bounceBytes, alignment: pageBytes)
        defer { bounce.deallocate() }
        var done = 0
        while done < bytes.count {
            let offset = offsetBytes + UInt64(done)
            let startBlock = offset / UInt64(blockBytes)
            let skip = Int(offset % UInt64(blockBytes))
            let count = min(bounceBytes - skip, bytes.count - done)
            let blocks = (skip + count + blockBytes - 1) / blockBytes
            if skip > 0 || (skip + count) % blockBytes > 0 {
                try readBlock(startBlock, into: bounce)
                if blocks > 1 { try readBlock(startBlock + UInt64(blocks - 1), into: bounce + (blocks - 1) * blockBytes) }
            }
            memcpyBytes(bounce + skip, bytes.baseAddress! + done, count)
            let place = try allocate(blocks: blocks)
            try open.segment.file.write(UnsafeRawBufferPointer(start: bounce, count: blocks * blockBytes), at: UInt64(place) * UInt64(blockBytes))
            hash(bounce, startBlock: startBlock, blocks: blocks, segmentBlock: place)
            commit(startBlock: startBlock, blocks: blocks, segmentBlock: place)
            done += count
        }
        if pending.count >= store.options.journalEntriesMax { try flushNow() }
    }

    public func zero(offsetBytes: UInt64, lengthBytes: UInt64) throws(StoreError) {
        try check(offsetBytes, lengthBytes)
        gate.wait()
        defer { gate.signal() }
        if let failure { throw failure }
        let unit = UInt64(blockBytes)
        let end = offsetBytes + lengthBytes
        let first = (offsetBytes + unit - 1) / unit
        let last = end == geometry.sizeBytes ? blockCount : end / unit
        if first >= last { return try writeZeroes(offsetBytes, lengthBytes) }
        if offsetBytes < first * unit { try writeZeroes(offsetBytes, first * unit - offsetBytes) }
        commitZero(startBlock: first, blocks: last - first)
        if end > last * unit { try writeZeroes(last * unit, end - last * unit) }
    }

    private func writeZeroes(_ offset: UInt64, _ length: UInt64) throws(StoreError) {
        if length == 0 { return }
        let zeroes = [UInt8](repeating: 0, count: Int(length))
        try zeroes.withBytes { bytes throws(StoreError) in try writeNow(offsetBytes: offset, bytes) }
    }

    /// Everything written so far is durable on return.
    public func flush() throws(StoreError) {
        gate.wait()
        defer { gate.signal() }
        try flushNow()
    }

    private func flushNow() throws(StoreError) {
        if let failure { throw failure }
        if !needsFlush { return }
        let (bytes, offset) = beginFlush()
        do throws(StoreError) {
            try open.segment.file.dataSync()
            if !bytes.isEmpty {
                try bytes.withBytes { bytes throws(StoreError) in try log.file.write(bytes, at: offset) }
                try log.file.dataSync()
                try? log.markSynced()
            }
        } catch {
            flushEnded(error)
            throw error
        }
        flushEnded(nil)
    }

    private func readBlock(_ block: UInt64, into memory: UnsafeMutableRawPointer) throws(StoreError) {
        memset(memory, 0, blockBytes)
        if let extent = map.index.piece(at: block, end: block + 1).extent { try map.read(extent, into: memory) }
    }

    private func check(_ offset: UInt64, _ length: UInt64) throws(StoreError) {
        guard length <= geometry.sizeBytes, offset <= geometry.sizeBytes - length else {
            throw .invalid("bytes \(offset)+\(length) are not inside disk \(name) of fork \(id) (\(geometry.sizeBytes) bytes)")
        }
    }

    // MARK: Recovery

    private func recover(_ frames: [FramedLog.Frame]) throws(StoreError) {
        for (number, frame) in frames.enumerated() {
            guard frame.type == ForkJournal.frameType, let batch = ForkJournal.parse(frame.payload) else {
                throw .damaged(path: log.file.path, offsetBytes: frame.offsetBytes, what: "a journal frame contradicts itself")
            }
            for (index, entry) in batch.entries.enumerated() {
                if !frame.isSynced, !entry.isZero, try !matches(entry, batch.sums) {
                    store.logger.notice("cut unflushed writes off a fork", metadata: ["fork": "\(id)", "volume": "\(name)", "writes": "\(batch.entries.count - index)"])
                    try keep(Array(batch.entries[..<index]), of: frame, later: frames.count - number - 1)
                    return
                }
                replay(entry, batch.sums)
            }
        }
        if frames.last.map({ !$0.isSynced }) ?? false {
            try open.segment.file.dataSync()
            try log.file.dataSync()
            try? log.markSynced()
        }
    }

    private func replay(_ entry: StoredExtent, _ sums: [UInt64]) {
        if entry.isZero { return erase(from: entry.startBlock, to: entry.endBlock) }
        open.reserve(Int(entry.segmentBlock) + Int(entry.blockCount))
        for index in 0..<Int(entry.blockCount) { open.set(sums[Int(entry.checksumIndex) + index], segmentBlock: Int(entry.segmentBlock) + index) }
        put(IndexExtent(startBlock: entry.startBlock, blockCount: entry.blockCount, slot: IndexExtent.openSlot, segment: open.segment.id, segmentBlock: entry.segmentBlock, checksumIndex: entry.segmentBlock))
        if store.options.deliberateFault != .forkBlocksReused { nextBlock = max(nextBlock, entry.segmentBlock + entry.blockCount) }
    }

    private func matches(_ entry: StoredExtent, _ sums: [UInt64]) throws(StoreError) -> Bool {
        let memory = UnsafeMutableRawBufferPointer.allocate(byteCount: Int(entry.blockCount) * blockBytes, alignment: pageBytes)
        defer { memory.deallocate() }
        let count = try open.segment.file.read(into: memory, at: UInt64(entry.segmentBlock) * UInt64(blockBytes))
        guard count == memory.count else { return false }
        for index in 0..<Int(entry.blockCount) {
            let block = entry.startBlock + UInt64(index)
            let length = blockLength(block, sizeBytes: geometry.sizeBytes)
            if BlockChecksum.of(memory.baseAddress! + index * blockBytes, count: length, blockIndex: block) != sums[Int(entry.checksumIndex) + index] { return false }
        }
        return true
    }

    /// The journal ends with the first writes of `frame`: that is what it says from now on, durably.
    private func keep(_ entries: [StoredExtent], of frame: FramedLog.Frame, later: Int) throws(StoreError) {
        try log.cut(at: frame)
        pending = entries
        hasUnsyncedData = true
        try flushNow()
    }
}

// MARK: Seals

extension ForkVolume {
    var isClosed: Bool { pin == nil }
    var hasOwnBlocks: Bool { !own.isEmpty }

    /// Writes the open layer's layer file and makes the files of the next open layer, all of them synced, but not their directories. On the
    /// sealing thread, while the volume is quiet. When it throws, `sealFailed` follows.
    func prepareSeal(_ number: Int) throws(StoreError) -> OpenLayerSeal {
        if let failure { throw failure }
        guard let pin, let parent = store.read({ $0.forks[id]?.volumes[number].parent }) else { throw .unknownFork(id) }
        let names = store.shared.withLock { shared in
            let names = (layer: shared.newFile(), segment: UInt32(shared.newFile()), journal: shared.newFile())
            // Nothing names them yet: without this they would be taken for garbage.
            shared.pins[pin]!.layers.insert(names.layer)
            shared.pins[pin]!.segments.insert(names.segment)
            shared.pins[pin]!.journals.insert(names.journal)
            return names
        }
        preparing = names
        let file = open.segment.file
        let endBytes = UInt64(nextBlock) * UInt64(pageBytes)
        do throws(StoreError) {
            if try file.size() > endBytes {
                try file.truncate(to: endBytes)
                reservedBytes = endBytes
            }
            if store.options.deliberateFault != .dataNotSynced { try file.dataSync() }
        } catch {
            // As after a flush that failed.
            if case .full = error {} else { sealFailure = error }
            throw error
        }
        // Below the lowest layer everything is zero anyway.
        let extents = own.extents.lazy.filter { parent != 0 || !$0.isZero }.map { StoredExtent($0) }
        var layer: LayerFile.Written?
        if !extents.isEmpty {
            let identity = LayerIdentity(
                id: names.layer, parent: parent, volumeIndex: UInt32(number), sizeBytes: geometry.sizeBytes,
                cut: Cut(epoch: EpochNumber(0), kind: .exact, timeNanoseconds: store.options.now(), blockCount: 0), consistency: .crash)
            layer = try LayerFile.write(
                store.storage, store: store.uuid, identity: identity, extents: Array(extents), sums: UnsafeBufferPointer(start: open.base(0), count: Int(nextBlock)),
                isSynced: store.options.deliberateFault != .layerNotSynced, cache: store.checksums)
        }
        let (segment, log) = try store.createOpenLayer(segment: names.segment, journal: names.journal)
        return OpenLayerSeal(number: number, volume: self, layer: layer, segment: segment, journal: names.journal, log: log)
    }

    /// On the sealing thread. When nobody knows whether the record reached the disk nothing more can be promised here: the next start may
    /// find the old open layer or the new one.
    func sealFailed(_ error: StoreError, isUnknown: Bool) {
        guard let names = preparing else { return }
        preparing = nil
        if isUnknown {
            sealFailure = error
            // What is flushed into the old open layer from here on would be lost if the record is there.
            store.shared.withLock { _ = $0.uncertainForks.insert(key) }
            return
        }
        for path in [LayerFile.path(names.layer), SegmentFile.path(names.segment), ForkJournal.path(names.journal)] { try? store.storage.remove(path) }
        store.upkeep.hasUnnamedFiles.store(true, ordering: .relaxed)
        store.shared.withLock { shared in
            guard let pin, shared.pins[pin] != nil else { return }
            shared.pins[pin]!.layers.remove(names.layer)
            shared.pins[pin]!.segments.remove(names.segment)
            shared.pins[pin]!.journals.remove(names.journal)
        }
    }

    /// Ends a seal in one step; nothing may be in flight. Without a seal only notes what failed.
    func goOn(_ seal: OpenLayerSeal?) {
        if let seal {
            turn(beginTurn(seal)[...])
            endTurn(seal)
        } else {
            if let sealFailure, failure == nil { failure = sealFailure }
            // Asked again when more has been written.
            journalBytesMax = max(journalBytesMax, log.endBytes + store.options.forkJournalBytesMax / 4)
            isSealAsked.store(false, ordering: .releasing)
        }
    }

    /// The layer joins the table; its extents are still those of the open one. `turn` turns them, in parts if need be, `endTurn` lets the
    /// old open layer go. Nothing is written in between; reads may go on until the end.
    func beginTurn(_ seal: OpenLayerSeal) -> [StoredExtent] {
        guard let layer = seal.layer else { return [] }
        turningSlot = map.add(layer.checksums)
        map.segments.add(SegmentTable([open.segment]))
        return layer.extents
    }

    func turn(_ extents: ArraySlice<StoredExtent>) {
        for extent in extents where !extent.isZero { map.index.apply(extent.indexed(slot: turningSlot)) }
    }

    /// No read may be in flight.
    func endTurn(_ seal: OpenLayerSeal) {
        if let layer = seal.layer { chain.append(layer.record(parent: chain.last?.id ?? 0)) }
        open = OpenLayerData(segment: seal.segment)
        map.open = open
        log = seal.log
        own = ExtentIndex()
        pending.removeAll(keepingCapacity: true)
        hasUnsyncedData = false
        nextBlock = 1
        reservedBytes = UInt64(pageBytes)
        preparing = nil
        journal = seal.journal
        journalBytesMax = store.options.forkJournalBytesMax
        countedBlock = 1
        isSealAsked.store(false, ordering: .releasing)
        hold(chain)
    }

    /// Holds these layers and the open one, and nothing else.
    func hold(_ layers: [LayerRecord]) {
        var held = Pin(layers)
        held.segments.insert(open.segment.id)
        held.journals.insert(journal)
        let hasGarbage = store.shared.withLock { shared -> Bool in
            guard let pin, shared.pins[pin] != nil else { return false }
            shared.pins[pin] = held
            return shared.hasGarbage && !shared.isClosed
        }
        if hasGarbage { store.thread.enqueue { [weak store] in store?.collectGarbage() } }
    }

    /// After each flush: a long journal takes long to open, and overwritten blocks take space that only layers can give back.
    private func askForSealWhenDue() {
        if isSealAsked.load(ordering: .relaxed) { return }
        var isDue = log.endBytes > journalBytesMax
        let bytesMax = store.options.forkDeadBytesMax
        if !isDue, UInt64(nextBlock - countedBlock) * UInt64(pageBytes) > bytesMax / 4 {
            countedBlock = nextBlock
            let live = own.extents.reduce(0) { $0 + ($1.isZero ? 0 : UInt64($1.blockCount)) } * UInt64(pageBytes)
            isDue = UInt64(nextBlock - 1) * UInt64(pageBytes) > live + max(bytesMax, live)
        }
        guard isDue else { return }
        isSealAsked.store(true, ordering: .releasing)
        store.askForSeal(id)
    }
}

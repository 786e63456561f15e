import BlockTap
import Synchronization

/// A place in the segments of a group.
struct SegmentPosition {
    var segment: UInt32
    /// In blocks from the file's beginning.
    var block: UInt32
}

/// One epoch of one group on its way into the store. `append` and `zero` copy into the group's fixed buffers, the store's thread
/// writes them; nothing is visible before `seal` has published all of it in one record.
///
/// Fate: receiving → sealing → sealed, or → failed (full, I/O error, fenced, abandoned): what was written is given back, and
/// an epoch that was begun behind a failed one fails too. All calls are made from one thread at a time.
public final class EpochWriter: @unchecked Sendable {
    enum Fate {
        case receiving, sealing, sealed
        case failed(StoreError)
    }

    /// Called with a number of appended bytes that no longer occupy the writer's buffers: written, or thrown away because the epoch
    /// failed. Sums up to exactly what was appended once the epoch has ended. Called on any thread; must not block. Set it before `append`.
    public var onWritten: (@Sendable (Int) -> Void)?

    let group: GroupID
    let generation: Generation
    let cut: Cut
    let instance: String
    /// What it goes on top of; the seal is refused when the group is anywhere else by then.
    let parent: DurablePosition?
    let store: ReplicaStore
    let receiver: GroupReceiver
    /// The epoch before, when it had not ended when this one began.
    private let predecessor: Mutex<EpochWriter?>
    let fate = Mutex<Fate>(.receiving)
    /// Its buffers on their way.
    let writes = EpochWrites()

    // Owned by the caller's thread until `seal`, by the store's thread after.
    private(set) var volumes: [PendingLayer]
    private(set) var position: SegmentPosition?
    private(set) var segmentsUsed: Set<UInt32> = []
    private var buffer: PoolBuffer?
    private var bufferStart = SegmentPosition(segment: 0, block: 0)
    private var bufferFill = 0
    private var bufferPayload = 0
    private var bufferLimit = 0
    private var encoder: ClusterEncoder?

    init(store: ReplicaStore, receiver: GroupReceiver, group: GroupID, generation: Generation, cut: Cut, instance: String, parent: DurablePosition?, specs: [VolumeSpec], start: SegmentPosition?, predecessor: EpochWriter?) {
        self.store = store
        self.receiver = receiver
        self.group = group
        self.generation = generation
        self.cut = cut
        self.instance = instance
        self.parent = parent
        self.predecessor = Mutex(predecessor)
        position = start
        volumes = specs.map { PendingLayer(spec: $0) }
    }

    deinit {
        if let buffer { receiver.pool.give(buffer) }
    }

    /// Data of one disk: whole blocks, except where the disk ends within one; one checksum (`BlockChecksum`) per block. The same
    /// block may come again: the later one wins. Blocks the thread while all of the group's buffers wait to be written.
    public func append(volume: Int, offsetBytes: UInt64, bytes: UnsafeRawBufferPointer, checksums: UnsafeBufferPointer<UInt64>) throws(StoreError) {
        try check(volume, offsetBytes, UInt64(bytes.count))
        let blockCount = (bytes.count + blockBytes - 1) / blockBytes
        guard checksums.count == blockCount else { throw .invalid("\(checksums.count) checksums for \(blockCount) blocks") }
        let first = offsetBytes / UInt64(blockBytes)
        // Blocks before `plain` are stored, those up to `next` will be as they are.
        var plain = 0
        var next = 0
        while next < blockCount {
            let zeroes = zeroRun(bytes, checksums, from: next, first: first)
            if zeroes > 0 {
                appendPlain(volume, first, bytes, checksums, plain..<next)
                volumes[volume].addZero(startBlock: first + UInt64(next), blockCount: UInt32(zeroes))
                bufferPayload += min(bytes.count, (next + zeroes) * blockBytes) - next * blockBytes
                next += zeroes
                plain = next
                continue
            }
            // Clusters end at multiples of their size on the volume, so that blocks written again together lie in few.
            let limit = min(blockCount, next + ClusterPart.blocksMax - Int(truncatingIfNeeded: first + UInt64(next)) % ClusterPart.blocksMax)
            var end = next + 1
            while end < limit, !isZero(bytes, end) { end += 1 }
            let whole = min(end, bytes.count / blockBytes)
            if let encoded = encode(volume, bytes, next..<whole) {
                appendPlain(volume, first, bytes, checksums, plain..<next)
                plain = next
                // A cluster lies in one segment.
                if encoded.count / blockBytes <= segmentRoom {
                    appendCluster(volume, first + UInt64(next), encoded, UnsafeBufferPointer(rebasing: checksums[next..<whole]))
                    end = whole
                    plain = whole
                }
            }
            next = end
        }
        appendPlain(volume, first, bytes, checksums, plain..<blockCount)
        if buffer == nil {
            // Nothing but zeroes since the last buffer went.
            if bufferPayload > 0 { onWritten?(bufferPayload) }
            bufferPayload = 0
        } else if bufferPayload >= receiver.pool.bufferBytes || (bufferPayload >= store.options.writeBytesMin && receiver.writesQueued.load(ordering: .relaxed) == 0) {
            // Compressed, what the sender waits to hear of may fill little of a buffer.
            submitBuffer()
        }
    }

    private func isZero(_ bytes: UnsafeRawBufferPointer, _ block: Int) -> Bool {
        let count = min(blockBytes, bytes.count - block * blockBytes)
        return count % 8 == 0 && count >= 16 && isAllZero(bytes.baseAddress! + block * blockBytes, count: count)
    }

    /// How many blocks from this one on are zero, and were so when they were hashed.
    private func zeroRun(_ bytes: UnsafeRawBufferPointer, _ checksums: UnsafeBufferPointer<UInt64>, from start: Int, first: UInt64) -> Int {
        var block = start
        while block < checksums.count, isZero(bytes, block),
            BlockChecksum.of(bytes.baseAddress! + block * blockBytes, count: min(blockBytes, bytes.count - block * blockBytes), blockIndex: first + UInt64(block)) == checksums[block]
        {
            block += 1
        }
        return block - start
    }

    /// Blocks `range` of `bytes` as they are; a last one that the disk ends in is padded.
    private func appendPlain(_ volume: Int, _ first: UInt64, _ bytes: UnsafeRawBufferPointer, _ checksums: UnsafeBufferPointer<UInt64>, _ range: Range<Int>) {
        var done = range.lowerBound * blockBytes
        let end = min(bytes.count, range.upperBound * blockBytes)
        while done < end {
            if buffer == nil { startBuffer() }
            let count = min(bufferLimit - bufferFill, end - done)
            memcpyBytes(buffer!.memory + bufferFill, bytes.baseAddress! + done, count)
            let padded = roundUp(count, to: blockBytes)
            if padded > count { (buffer!.memory + bufferFill + count).initializeMemory(as: UInt8.self, repeating: 0, count: padded - count) }
            let block = done / blockBytes
            volumes[volume].add(startBlock: first + UInt64(block), checksums: UnsafeBufferPointer(rebasing: checksums[block..<block + padded / blockBytes]), at: bufferPosition)
            bufferFill += padded
            bufferPayload += count
            done += count
            if bufferFill == bufferLimit { submitBuffer() }
        }
    }

    /// Blocks `range` compressed, when that pays.
    private func encode(_ volume: Int, _ bytes: UnsafeRawBufferPointer, _ range: Range<Int>) -> UnsafeRawBufferPointer? {
        guard store.options.compression != .none, range.count >= 2 else { return nil }
        if encoder == nil { encoder = ClusterEncoder(store.options.compression, volumeCount: volumes.count) }
        return encoder!.encode(bytes.baseAddress! + range.lowerBound * blockBytes, blockCount: range.count, volume: volume)
    }

    private func appendCluster(_ volume: Int, _ block: UInt64, _ encoded: UnsafeRawBufferPointer, _ checksums: UnsafeBufferPointer<UInt64>) {
        if buffer == nil { startBuffer() }
        volumes[volume].addCluster(startBlock: block, checksums: checksums, at: bufferPosition, storedBlocks: encoded.count / blockBytes)
        var done = 0
        while done < encoded.count {
            // Goes on in the next buffer, which goes on in the same segment.
            if buffer == nil { startBuffer() }
            let count = min(bufferLimit - bufferFill, encoded.count - done)
            memcpyBytes(buffer!.memory + bufferFill, encoded.baseAddress! + done, count)
            bufferFill += count
            done += count
            if done == encoded.count { bufferPayload += checksums.count * blockBytes }
            if bufferFill == bufferLimit { submitBuffer() }
        }
    }

    /// These blocks are zero at the cut.
    public func zero(volume: Int, offsetBytes: UInt64, lengthBytes: UInt64) throws(StoreError) {
        try check(volume, offsetBytes, lengthBytes)
        var block = offsetBytes / UInt64(blockBytes)
        let end = (offsetBytes + lengthBytes + UInt64(blockBytes) - 1) / UInt64(blockBytes)
        while block < end {
            let count = min(end - block, 1 << 18)
            volumes[volume].addZero(startBlock: block, blockCount: UInt32(count))
            block += count
        }
    }

    /// Makes the epoch durable, all volumes or none, and publishes a recovery point when it is exact. `done` is called once, on the
    /// store's thread (or at once when the epoch has failed already), and must not block. The writer takes nothing more.
    public func seal(consistency: Consistency, done: @escaping @Sendable (Result<RecoveryPoint?, StoreError>) -> Void) {
        if bufferFill > 0 { submitBuffer() }
        fate.withLock { if case .receiving = $0 { $0 = .sealing } }
        receiver.willSeal(self)
        let accepted = store.thread.enqueue { self.store.seal(self, consistency: consistency, done: done) }
        if !accepted { done(.failure(.closed)) }
    }

    /// What the group's `lastDurable` is once this epoch has been sealed: the parent of the next.
    public var positionWhenSealed: DurablePosition { DurablePosition(instance: instance, epoch: cut.epoch, kind: cut.kind) }

    /// Throws the epoch away and gives its space back. Nothing happens when it has been sealed.
    public func abandon() {
        giveUp("by its sender")
        dropBuffer()
    }

    /// Any thread.
    func giveUp(_ why: String) {
        receiver.willGiveBack()
        let isFirst = fate.withLock { fate -> Bool in
            guard case .receiving = fate else { return false }
            fate = .failed(.abandoned(why))
            return true
        }
        if !isFirst { return receiver.didGiveBack() }
        store.shared.withLock { $0.statistics.abandonedEpochCount += 1 }
        store.thread.enqueue {
            self.receiver.giveBack()
            self.receiver.didGiveBack()
        }
    }

    /// What ended this epoch, or the one that it goes on top of.
    var failure: StoreError? {
        if let own = fate.withLock({ fate -> StoreError? in if case .failed(let error) = fate { error } else { nil } }) { return own }
        if let failed = writes.error { return failed }
        return predecessor.withLock({ $0 })?.failure.map { _ in .abandoned("the epoch before it failed") }
    }

    /// The epoch has ended this way; on the store's thread.
    func end(_ fate: Fate) {
        self.fate.withLock { $0 = fate }
        predecessor.withLock { $0 = nil }
    }

    private func check(_ volume: Int, _ offset: UInt64, _ length: UInt64) throws(StoreError) {
        switch fate.withLock({ $0 }) {
        case .receiving:
            // Once per buffer: a write that failed, or the epoch before, soon becomes its fate, and the seal looks again.
            guard buffer == nil, let failure else { break }
            throw failure
        case .failed(let error):
            dropBuffer()
            throw error
        case .sealing, .sealed: throw .invalid("\(cut.epoch) of group \(group) is being sealed already")
        }
        guard volumes.indices.contains(volume) else { throw .invalid("group \(group) has no disk number \(volume)") }
        let size = volumes[volume].spec.geometry.sizeBytes
        guard offset % UInt64(blockBytes) == 0, length > 0, offset < size, length <= size - offset,
            length % UInt64(blockBytes) == 0 || offset + length == size
        else { throw .invalid("bytes \(offset)+\(length) are not whole blocks of disk \(volumes[volume].spec.name) (\(size) bytes)") }
    }

    // MARK: Buffers

    /// Where the next byte goes; there is a buffer.
    private var bufferPosition: SegmentPosition { SegmentPosition(segment: bufferStart.segment, block: bufferStart.block + UInt32(bufferFill / blockBytes)) }

    /// Blocks that the segment being filled still has room for.
    private var segmentRoom: Int {
        let end = Int(store.options.segmentBytes / UInt64(pageBytes))
        if buffer != nil { return end - Int(bufferPosition.block) }
        guard let position, Int(position.block) < end else { return end - 1 }
        return end - Int(position.block)
    }

    private func startBuffer() {
        let pool = receiver.pool
        buffer = pool.take()
        let segmentBlocks = UInt32(store.options.segmentBytes / UInt64(pageBytes))
        if position == nil || position!.block >= segmentBlocks {
            // Block 0 is the segment's header.
            position = SegmentPosition(segment: receiver.newSegment(), block: 1)
        }
        bufferStart = position!
        bufferFill = 0
        bufferLimit = min(pool.bufferBytes, Int(segmentBlocks - bufferStart.block) * pageBytes)
        segmentsUsed.insert(bufferStart.segment)
    }

    private func submitBuffer() {
        guard let full = buffer else { return }
        buffer = nil
        position = SegmentPosition(segment: bufferStart.segment, block: bufferStart.block + UInt32(bufferFill / pageBytes))
        let (start, fill, payload) = (bufferStart, bufferFill, bufferPayload)
        bufferFill = 0
        bufferPayload = 0
        receiver.write(full, byteCount: fill, payloadBytes: payload, at: start, for: self)
    }

    private func dropBuffer() {
        guard let dropped = buffer else { return }
        let payload = bufferPayload
        buffer = nil
        bufferFill = 0
        bufferPayload = 0
        receiver.pool.give(dropped)
        onWritten?(payload)
    }
}

/// What one volume got in an epoch so far, in the order of arrival.
struct PendingLayer {
    let spec: VolumeSpec
    private var extents: [IndexExtent] = []
    private var sums: [UInt64] = []
    /// Arrived in order, without overlap: the usual case needs no sorting.
    private var isSorted = true
    private(set) var dataBytes: UInt64 = 0

    init(spec: VolumeSpec) { self.spec = spec }

    var isEmpty: Bool { extents.isEmpty }

    mutating func add(startBlock: UInt64, checksums: UnsafeBufferPointer<UInt64>, at position: SegmentPosition) {
        let extent = IndexExtent(startBlock: startBlock, blockCount: UInt32(checksums.count), slot: 0, segment: position.segment, segmentBlock: position.block, checksumIndex: UInt32(sums.count))
        sums.append(contentsOf: checksums)
        dataBytes += UInt64(checksums.count) * UInt64(blockBytes)
        put(extent)
    }

    mutating func addCluster(startBlock: UInt64, checksums: UnsafeBufferPointer<UInt64>, at position: SegmentPosition, storedBlocks: Int) {
        let extent = IndexExtent(
            startBlock: startBlock, blockCount: UInt32(checksums.count), slot: 0, segment: position.segment, segmentBlock: position.block, checksumIndex: UInt32(sums.count),
            cluster: ClusterPart(storedBlocks: storedBlocks, blockCount: checksums.count, skip: 0))
        sums.append(contentsOf: checksums)
        dataBytes += UInt64(checksums.count) * UInt64(blockBytes)
        put(extent)
    }

    mutating func addZero(startBlock: UInt64, blockCount: UInt32) {
        put(IndexExtent(startBlock: startBlock, blockCount: blockCount, slot: IndexExtent.zeroSlot, segment: 0, segmentBlock: 0, checksumIndex: 0))
    }

    private mutating func put(_ extent: IndexExtent) {
        guard let last = extents.last else { return extents.append(extent) }
        if last.continues(into: extent) {
            extents[extents.count - 1].blockCount += extent.blockCount
        } else {
            if extent.startBlock < last.endBlock { isSorted = false }
            extents.append(extent)
        }
    }

    /// Sorted, later ones over earlier ones; with the checksums that `checksumIndex` points into.
    func layer() -> (extents: [StoredExtent], sums: [UInt64]) {
        var sorted = extents
        if !isSorted {
            var index = ExtentIndex()
            for extent in extents { index.apply(extent) }
            sorted = index.extents
        }
        let stored = sorted.map { StoredExtent($0) }
        return (stored, sums)
    }
}

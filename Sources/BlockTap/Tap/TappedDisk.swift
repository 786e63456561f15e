import Glibc

/// One disk under an inline tap: a `BlockStore` that knows which blocks changed, and that saves what a closed epoch still needs
/// before it is overwritten (copy-before-write).
///
/// State per block, for the epoch that drains (`EpochEngine` holds which that is):
///
///     not in the epoch ── or ── pending → (drain read | preserve read in flight) → handed out
///
/// A write touching a pending block first starts a read of its old content (preserve read) and waits for it; a write touching a
/// block that is being read waits for that read only. Then the block's bit in `active` is set, the write is issued, and when the
/// device has answered, the client is. Invariants:
/// - the bit in `active` is set before the write is issued, and stays set if the write fails;
/// - no write is issued to a block that is pending (unless it was zero at the cut) or being read in an exact epoch;
/// - reads and flushes of the client never wait for the tap.
///
/// Confined to the tap's thread.
public final class TappedDisk: BlockStore {
    public let name: String
    public let geometry: BlockGeometry
    public var isReadOnly: Bool { false }
    public var supportsTrim: Bool { io.supportsZeroing }

    let io: DiskIO
    unowned(unsafe) let engine: EpochEngine
    let index: Int
    let blockCount: UInt64

    /// Blocks written since the last exact cut.
    var active: BlockBitmap
    /// Blocks whose present content is known to be zero: set when an exclusive zeroing ended, cleared when a write is issued.
    let zeroed: BlockBitmap
    /// Blocks of a full sync that no fuzzy epoch has taken yet.
    let unsynced: BlockBitmap
    /// Blocks of the draining epoch that are neither handed out nor being read.
    let pending: BlockBitmap
    /// Blocks of the draining epoch that were zero at the cut.
    let zeroAtCut: BlockBitmap
    /// No pending block lies before it (pending only shrinks while an epoch drains).
    var drainCursor: UInt64 = 0
    /// Old content waiting to be handed out, in no order that matters.
    var preserved: [PreservedRun] = []
    var readsInFlight = 0

    var operations: TapOperationSlab
    /// Writes held back, oldest first; and, when the slab was exhausted, requests not yet begun.
    private var waiting: [Int] = []
    private var overflow: [BlockRequestPointer] = []
    /// Writes that came while the group's writes are held (`TapGroup.holdWrites`), oldest first.
    private var held: [BlockRequestPointer] = []
    /// In-flight reads of the exact draining epoch, which writes to their blocks must wait for.
    private var blockingReads: [Int] = []
    /// Whether any in-flight operation is a zeroing (rare): spares the scan otherwise.
    private var zeroesInFlight = 0
    private var writesInFlight = 0

    private(set) var writtenBytes: UInt64 = 0
    private(set) var flushCount: UInt64 = 0

    struct PreservedRun {
        var firstBlock: UInt64
        var blockCount: Int
        var slot: Int
    }

    /// Slots of the slab that only the tap's own reads may use, so that a flood of requests cannot keep an epoch from draining.
    private static let reservedOperations = 256

    init(name: String, geometry: BlockGeometry, io: DiskIO, engine: EpochEngine, index: Int, requestsMax: Int) {
        self.name = name
        self.geometry = geometry
        self.io = io
        self.engine = engine
        self.index = index
        blockCount = geometry.blockCount
        active = BlockBitmap(blockCount: blockCount)
        zeroed = BlockBitmap(blockCount: blockCount)
        unsynced = BlockBitmap(blockCount: blockCount)
        pending = BlockBitmap(blockCount: blockCount)
        zeroAtCut = BlockBitmap(blockCount: blockCount)
        operations = TapOperationSlab(capacity: requestsMax + Self.reservedOperations)
        waiting.reserveCapacity(requestsMax)
        blockingReads.reserveCapacity(Self.reservedOperations)
        io.disk = Unmanaged.passUnretained(self)
    }

    // MARK: requests of the protected machine

    public func submit(_ request: BlockRequestPointer) {
        let operation = request.pointee.operation
        if operation != .flush {
            precondition(request.pointee.lengthBytes > 0)
            precondition(request.pointee.offsetBytes + UInt64(request.pointee.lengthBytes) <= geometry.sizeBytes)
        }
        if engine.holdsWrites, operation.changesContent {
            if let error = engine.refusal { return request.complete(error: error) }
            held.append(request)
            return
        }
        guard overflow.isEmpty, operations.freeCount > Self.reservedOperations else {
            overflow.append(request)
            return
        }
        begin(request)
    }

    private func begin(_ request: BlockRequestPointer) {
        let kind: TapOperation.Kind =
            switch request.pointee.operation {
            case .read: .read
            case .write: .write
            case .flush: .flush
            case .trim, .writeZeroes: .zero
            }
        let index = operations.take(kind)!
        let op = operations[index]
        op.pointee.request = request
        op.pointee.lengthBytes = Int(request.pointee.lengthBytes)
        if kind != .flush {
            let first = request.pointee.offsetBytes / UInt64(blockBytes)
            let last = (request.pointee.offsetBytes + UInt64(request.pointee.lengthBytes) - 1) / UInt64(blockBytes)
            op.pointee.firstBlock = first
            op.pointee.blockCount = last - first + 1
        }
        switch kind {
        case .read:
            io.read(into: request.pointee.buffer!, count: op.pointee.lengthBytes, offset: request.pointee.offsetBytes, token: UInt32(index))
        case .flush:
            flushCount &+= 1
            io.flush(token: UInt32(index))
        default:
            writtenBytes &+= UInt64(request.pointee.lengthBytes)
            advance(index)
        }
    }

    /// Takes a write as far as it can go now: held back, or issued.
    private func advance(_ index: Int) {
        let op = operations[index]
        let first = op.pointee.firstBlock
        let count = op.pointee.blockCount
        if engine.isDrainingExact {
            if isBeingRead(first: first, count: count) {
                hold(index)
                return
            }
            if pending.intersects(first: first, length: count) && !engine.faults.contains(.skipCopyBeforeWrite) {
                switch preserve(first: first, count: count) {
                case .reading:
                    hold(index)
                    return
                case .nothingToRead:
                    break
                case .overBudget:
                    engine.abandonDraining(.preservedBudget)
                }
            }
        }
        issueWrite(index)
    }

    private func hold(_ index: Int) {
        operations[index].pointee.stage = .waiting
        waiting.append(index)
    }

    @inline(__always)
    private func isBeingRead(first: UInt64, count: UInt64) -> Bool {
        for read in blockingReads where operations[read].pointee.overlaps(first: first, count: count) { return true }
        return false
    }

    private enum Preservation { case reading, nothingToRead, overBudget }

    /// Starts reads of the old content of all pending blocks in the range.
    private func preserve(first: UInt64, count: UInt64) -> Preservation {
        var result = Preservation.nothingToRead
        var position = first
        while let block = pending.nextSet(from: position, limit: first + count) {
            var run = pending.runLength(first: block, limit: first + count - block)
            run = min(run, zeroAtCut.runLength(first: block, limit: run))
            // What was zero at the cut needs no saving: it stays pending and is handed out as zeroes, whatever it holds by then.
            if !zeroAtCut.contains(block) {
                guard let (slot, got) = engine.preservedArena.allocate(wanted: Int(run)) else { return .overBudget }
                guard let index = operations.take(.preserveRead) else {
                    engine.preservedArena.release(slot: slot, count: got)
                    return .overBudget
                }
                run = UInt64(got)
                startRead(index, firstBlock: block, blockCount: run, slot: slot, into: engine.preservedArena.memory(slot))
                result = .reading
            }
            position = block + run
        }
        return result
    }

    private func issueWrite(_ index: Int) {
        let op = operations[index]
        let request = op.pointee.request!
        let first = op.pointee.firstBlock
        let count = op.pointee.blockCount
        op.pointee.stage = .issued
        if !engine.faults.contains(.markAfterWrite) { active.set(first: first, length: count) }
        if !zeroed.isEmpty { zeroed.clear(first: first, length: count) }
        if zeroesInFlight > 0 || op.pointee.kind == .zero { settleExclusiveness(index) }
        writesInFlight += 1
        if op.pointee.kind == .write {
            io.write(
                from: UnsafeRawPointer(request.pointee.buffer!), count: op.pointee.lengthBytes, offset: request.pointee.offsetBytes,
                dsync: request.pointee.flags.contains(.fua), token: UInt32(index))
        } else {
            zeroesInFlight += 1
            io.zero(
                offset: request.pointee.offsetBytes, length: UInt64(op.pointee.lengthBytes),
                allocate: request.pointee.flags.contains(.noHole), token: UInt32(index))
        }
    }

    /// A zeroing is exclusive when no other write overlaps it in time and place.
    private func settleExclusiveness(_ index: Int) {
        let op = operations[index]
        op.pointee.isExclusive = op.pointee.kind == .zero
        forEachIssuedWrite { other in
            guard other != index, operations[other].pointee.overlaps(first: op.pointee.firstBlock, count: op.pointee.blockCount) else { return }
            operations[other].pointee.isExclusive = false
            op.pointee.isExclusive = false
        }
    }

    private func forEachIssuedWrite(_ body: (Int) -> Void) {
        if writesInFlight == 0 { return }
        for i in 0..<operations.capacity {
            let op = operations[i]
            if op.pointee.stage == .issued && (op.pointee.kind == .write || op.pointee.kind == .zero) { body(i) }
        }
    }

    // MARK: reads of a closed epoch

    /// Takes the blocks out of pending and reads them; writes to them wait (in an exact epoch).
    func startRead(_ index: Int, firstBlock: UInt64, blockCount count: UInt64, slot: Int, into memory: UnsafeMutableRawPointer) {
        pending.clear(first: firstBlock, length: count)
        let op = operations[index]
        op.pointee.firstBlock = firstBlock
        op.pointee.blockCount = count
        op.pointee.slot = slot
        op.pointee.epoch = engine.drainingEpoch!
        let offset = firstBlock * UInt64(blockBytes)
        op.pointee.lengthBytes = Int(min(count * UInt64(blockBytes), geometry.sizeBytes - offset))
        if engine.isDrainingExact { blockingReads.append(index) }
        readsInFlight += 1
        io.read(into: memory, count: op.pointee.lengthBytes, offset: offset, token: UInt32(index))
    }

    // MARK: cut

    /// Swaps the running epoch's blocks out. In-flight writes may land after they were read, so their blocks are marked again.
    func swapActive(with fresh: BlockBitmap) -> BlockBitmap {
        precondition(fresh.isEmpty && pending.isEmpty && preserved.isEmpty)
        let closed = active
        active = fresh
        if !engine.faults.contains(.forgetInFlightAtCut) {
            forEachIssuedWrite { i in
                active.set(first: operations[i].pointee.firstBlock, length: operations[i].pointee.blockCount)
            }
        }
        pending.formUnion(closed)
        drainCursor = 0
        // Not all of `zeroed`: on a discarded disk that is nearly everything, and no write is admitted meanwhile.
        zeroAtCut.assignIntersection(closed, zeroed)
        return closed
    }

    /// The draining epoch is no more: its reads in flight become stale, writes that waited for them go on.
    func forgetDraining() {
        pending.clearAll()
        for run in preserved { engine.preservedArena.release(slot: run.slot, count: run.blockCount) }
        preserved.removeAll(keepingCapacity: true)
        blockingReads.removeAll(keepingCapacity: true)
        releaseWaiting()
    }

    // MARK: completions

    func ioCompleted(token: UInt32, result: Int32) {
        let index = Int(token)
        let op = operations[index]
        // Nothing was done; that is no reason to fail the protected machine's request.
        if result == -EINTR || result == -EAGAIN { return resubmit(index) }
        if result > 0, op.pointee.kind != .zero, op.pointee.kind != .flush {
            op.pointee.doneBytes += Int(result)
            if op.pointee.doneBytes < op.pointee.lengthBytes {
                resubmit(index)
                return
            }
        }
        switch op.pointee.kind {
        case .drainRead, .preserveRead:
            closedEpochReadCompleted(index, result: result)
        case .read:
            finish(index, error: result > 0 ? 0 : result < 0 ? -result : EIO)
        case .write:
            writesInFlight -= 1
            if engine.faults.contains(.markAfterWrite) { active.set(first: op.pointee.firstBlock, length: op.pointee.blockCount) }
            finish(index, error: result > 0 ? 0 : result < 0 ? -result : EIO)
        case .zero:
            zeroCompleted(index, result: result)
        case .flush:
            finish(index, error: result < 0 ? -result : 0)
        case .free:
            preconditionFailure("a completion for a free tap operation")
        }
    }

    /// The device did a part, or was interrupted: go on with the rest.
    private func resubmit(_ index: Int) {
        let op = operations[index]
        let done = op.pointee.doneBytes
        let rest = op.pointee.lengthBytes - done
        switch op.pointee.kind {
        case .read:
            let request = op.pointee.request!
            io.read(into: request.pointee.buffer! + done, count: rest, offset: request.pointee.offsetBytes + UInt64(done), token: UInt32(index))
        case .write:
            let request = op.pointee.request!
            io.write(
                from: request.pointee.buffer! + done, count: rest, offset: request.pointee.offsetBytes + UInt64(done),
                dsync: request.pointee.flags.contains(.fua), token: UInt32(index))
        case .drainRead, .preserveRead:
            let memory = op.pointee.kind == .drainRead ? engine.queue.memory(slot: op.pointee.slot) : engine.preservedArena.memory(op.pointee.slot)
            io.read(into: memory + done, count: rest, offset: op.pointee.firstBlock * UInt64(blockBytes) + UInt64(done), token: UInt32(index))
        case .zero:
            let request = op.pointee.request!
            io.zero(
                offset: request.pointee.offsetBytes, length: UInt64(rest),
                allocate: op.pointee.isFallback || request.pointee.flags.contains(.noHole), token: UInt32(index))
        case .flush:
            io.flush(token: UInt32(index))
        case .free:
            preconditionFailure("a completion for a free tap operation")
        }
    }

    private func closedEpochReadCompleted(_ index: Int, result: Int32) {
        let op = operations[index].pointee
        operations.release(index)
        readsInFlight -= 1
        if let at = blockingReads.firstIndex(of: index) { blockingReads.remove(at: at) }
        let isStale = op.epoch != engine.drainingEpoch
        if isStale || result <= 0 {
            if op.kind == .drainRead {
                engine.queue.freeBuffer(slot: op.slot)
            } else {
                engine.preservedArena.release(slot: op.slot, count: Int(op.blockCount))
            }
            if !isStale { engine.abandonDraining(.readError) }
        } else if op.kind == .drainRead {
            engine.handOut(disk: self, firstBlock: op.firstBlock, lengthBytes: op.lengthBytes, slot: op.slot)
        } else {
            preserved.append(PreservedRun(firstBlock: op.firstBlock, blockCount: Int(op.blockCount), slot: op.slot))
        }
        releaseWaiting()
        startOverflow()
        engine.pump()
    }

    private func zeroCompleted(_ index: Int, result: Int32) {
        let op = operations[index]
        let request = op.pointee.request!
        if result == -EOPNOTSUPP && !op.pointee.isFallback && request.pointee.operation == .writeZeroes && !request.pointee.flags.contains(.noHole) {
            op.pointee.isFallback = true
            io.zero(offset: request.pointee.offsetBytes, length: UInt64(op.pointee.lengthBytes), allocate: true, token: UInt32(index))
            return
        }
        writesInFlight -= 1
        zeroesInFlight -= 1
        if result >= 0 && op.pointee.isExclusive { markZeroed(request.pointee.offsetBytes, UInt64(op.pointee.lengthBytes)) }
        if result == -EOPNOTSUPP && request.pointee.operation == .trim {
            finish(index, error: 0)  // TRIM is advice
        } else if result >= 0 && request.pointee.flags.contains(.fua) {
            // The zeroing itself carries no FUA: make it durable before it is answered.
            op.pointee.kind = .flush
            io.flush(token: UInt32(index))
        } else {
            finish(index, error: result < 0 ? -result : 0)
        }
    }

    private func markZeroed(_ offset: UInt64, _ length: UInt64) {
        let block = UInt64(blockBytes)
        let first = (offset + block - 1) / block
        let end = offset + length == geometry.sizeBytes ? blockCount : (offset + length) / block
        if end > first { zeroed.set(first: first, length: end - first) }
    }

    private func finish(_ index: Int, error: Int32) {
        let request = operations[index].pointee.request!
        operations.release(index)
        startOverflow()
        request.complete(error: error)
    }

    /// Writes that waited for a read look again, in the order in which they came.
    private func releaseWaiting() {
        if waiting.isEmpty { return }
        let held = waiting
        waiting.removeAll(keepingCapacity: true)
        for index in held { advance(index) }
    }

    // MARK: held writes

    /// No write of before the hold is still to be done or answered.
    var isQuiet: Bool { writesInFlight == 0 && waiting.isEmpty && !overflow.contains { $0.pointee.operation.changesContent } }

    func releaseHeld() {
        let requests = held
        held.removeAll(keepingCapacity: false)
        for request in requests { submit(request) }
    }

    func refuseHeld(error: Int32) {
        let requests = held
        held.removeAll(keepingCapacity: false)
        for request in requests { request.complete(error: error) }
    }

    private func startOverflow() {
        while !overflow.isEmpty, operations.freeCount > Self.reservedOperations {
            begin(overflow.removeFirst())
        }
    }
}

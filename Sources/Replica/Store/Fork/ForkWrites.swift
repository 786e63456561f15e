import BlockTap
import Glibc

/// Writes, TRIM and WRITE_ZEROES to one fork through a ring. On-loop.
///
/// A request occupies a slot from `submit` until it is answered and goes on step by step (`advance`): runs of whole blocks are written
/// from the request's own buffer, or become tombstones; what begins or ends within a block goes through the slot's bounce
/// buffer: read the blocks at its edges, change, write as new blocks.
///
/// Requests of whole blocks may run together even where they overlap, since each write has a place of its own and the one that
/// commits last wins. One that changes part of a block must not lose what another does to the rest of it: it waits for
/// everything that overlaps it, and everything that overlaps it waits for it. Who waits keeps its place before later ones.
final class ForkWrites: IOHandler {
    static let slotCount = 256
    static let bounceBytes = 64 << 10

    private struct Slot {
        var request: BlockRequestPointer?
        var startBlock: UInt64 = 0
        var endBlock: UInt64 = 0
        var isPartial = false
        var isWaiting = false
        /// Bytes of the request that are committed.
        var doneBytes = 0
        // The step that is running.
        var stepBlock: UInt64 = 0
        var stepBlocks = 0
        var stepBytes = 0
        var stepSkip = 0
        var place: UInt32 = 0
        var memory: UnsafeMutableRawPointer?
        var writtenBytes = 0
        var readsLeft = 0
        var readError: Int32 = 0
        var bounce: UnsafeMutableRawPointer?
    }

    private let fork: ForkVolume
    private let loop: EventLoop
    private unowned(unsafe) let io: ForkIO
    private var handler: HandlerID!
    private let slots: UnsafeMutablePointer<Slot>
    private var free: [UInt32]
    /// In order of arrival.
    private var active: [UInt32] = []
    private var partialCount = 0
    private var waitingCount = 0
    /// Nothing new is begun.
    private var isHeld = false
    /// For slots: all were taken, or writes are held.
    private var line: [BlockRequestPointer] = []
    private var bounces: [UnsafeMutableRawPointer] = []
    private var needRead: [(slot: UInt32, block: UInt64, memory: UnsafeMutableRawPointer)] = []
    private(set) var readOwner: BlockReadOwner!

    private final class ReadOwner: BlockReadOwner {
        unowned(unsafe) let writes: ForkWrites
        init(_ writes: ForkWrites) { self.writes = writes }
        override func blockRead(token: UInt32, error: Int32) { writes.edgeRead(token, error) }
        override func readSlotFree() { writes.readAgain() }
    }

    private init(fork: ForkVolume, loop: EventLoop, io: ForkIO) {
        self.fork = fork
        self.loop = loop
        self.io = io
        slots = .allocate(capacity: Self.slotCount)
        slots.initialize(repeating: Slot(), count: Self.slotCount)
        free = (0..<UInt32(Self.slotCount)).reversed()
        active.reserveCapacity(Self.slotCount)
        super.init()
        readOwner = ReadOwner(self)
    }

    deinit {
        for bounce in bounces { bounce.deallocate() }
        slots.deallocate()
    }

    static func start(fork: ForkVolume, loop: EventLoop, io: ForkIO) -> ForkWrites {
        let writes = ForkWrites(fork: fork, loop: loop, io: io)
        writes.handler = loop.register(writes)
        return writes
    }

    var isIdle: Bool { active.isEmpty && line.isEmpty }
    func end() { loop.unregister(handler) }

    func submit(_ request: BlockRequestPointer) {
        if fork.failure != nil { return request.complete(error: EIO) }
        guard !isHeld, let number = free.popLast() else { return line.append(request) }
        let offset = request.pointee.offsetBytes
        let end = offset + UInt64(request.pointee.lengthBytes)
        let unit = UInt64(blockBytes)
        let slot = slots + Int(number)
        slot.pointee = Slot()
        slot.pointee.request = request
        slot.pointee.startBlock = offset / unit
        slot.pointee.endBlock = (end + unit - 1) / unit
        // A last block that the volume ends in is whole for a tombstone, and rewritten for data.
        slot.pointee.isPartial = offset % unit != 0 || (end % unit != 0 && (end != fork.geometry.sizeBytes || request.pointee.operation == .write))
        let mustWait = conflicts(number, before: active.count)
        active.append(number)
        if slot.pointee.isPartial { partialCount += 1 }
        if mustWait {
            slot.pointee.isWaiting = true
            waitingCount += 1
        } else {
            advance(number)
        }
    }

    /// Begins none of the writes that come from now on, until `goOn`; those that are here go on, and `ForkIO.writesEnded` is called when the
    /// last has been answered or handed to the flush.
    func hold() {
        isHeld = true
        if active.isEmpty { io.writesEnded() }
    }

    func goOn() {
        isHeld = false
        wakeWaiting()
    }

    /// Whether one of the first `count` requests must end before this one begins.
    private func conflicts(_ number: UInt32, before count: Int) -> Bool {
        let slot = slots + Int(number)
        if partialCount == 0 && !slot.pointee.isPartial { return false }
        for index in 0..<count {
            let other = slots + Int(active[index])
            if slot.pointee.isPartial || other.pointee.isPartial, other.pointee.startBlock < slot.pointee.endBlock, slot.pointee.startBlock < other.pointee.endBlock { return true }
        }
        return false
    }

    /// Begins the next step of a request, or ends it.
    private func advance(_ number: UInt32) {
        let slot = slots + Int(number)
        let request = slot.pointee.request!
        let operation = request.pointee.operation
        let length = Int(request.pointee.lengthBytes)
        let unit = UInt64(blockBytes)
        while slot.pointee.doneBytes < length {
            let offset = request.pointee.offsetBytes + UInt64(slot.pointee.doneBytes)
            let skip = Int(offset % unit)
            let left = length - slot.pointee.doneBytes
            let reachesEnd = offset + UInt64(left) == fork.geometry.sizeBytes
            let block = offset / unit
            if operation != .write {
                if skip == 0 && (left >= blockBytes || reachesEnd) {
                    let blocks = reachesEnd ? fork.blockCount - block : UInt64(left / blockBytes)
                    fork.commitZero(startBlock: block, blocks: blocks)
                    slot.pointee.doneBytes += min(left, Int(blocks) * blockBytes)
                    continue
                }
                let count = min(left, blockBytes - skip)
                if operation == .trim {
                    slot.pointee.doneBytes += count
                    continue
                }
                return change(number, block: block, blocks: 1, skip: skip, count: count)
            }
            let source = request.pointee.buffer! + slot.pointee.doneBytes
            if skip == 0 && left >= blockBytes && UInt(bitPattern: source) % UInt(pageBytes) == 0 {
                let blocks = left / blockBytes
                slot.pointee.stepBytes = blocks * blockBytes
                return write(number, from: source, block: block, blocks: blocks)
            }
            let count = min(left, Self.bounceBytes - skip)
            return change(number, block: block, blocks: (skip + count + blockBytes - 1) / blockBytes, skip: skip, count: count)
        }
        committed(number)
    }

    /// Part of some blocks changes: gets what the blocks at the edges hold.
    private func change(_ number: UInt32, block: UInt64, blocks: Int, skip: Int, count: Int) {
        let slot = slots + Int(number)
        if slot.pointee.bounce == nil { slot.pointee.bounce = bounces.popLast() ?? .allocate(byteCount: Self.bounceBytes, alignment: pageBytes) }
        let bounce = slot.pointee.bounce!
        slot.pointee.stepBlock = block
        slot.pointee.stepBlocks = blocks
        slot.pointee.stepSkip = skip
        slot.pointee.stepBytes = count
        slot.pointee.readError = 0
        slot.pointee.readsLeft = 1
        let lastIsPart = (skip + count) % blockBytes != 0
        if skip > 0 || (blocks == 1 && lastIsPart) { readEdge(number, block, bounce) }
        if blocks > 1 && lastIsPart { readEdge(number, block + UInt64(blocks - 1), bounce + (blocks - 1) * blockBytes) }
        edgeRead(number, 0)
    }

    private func readEdge(_ number: UInt32, _ block: UInt64, _ memory: UnsafeMutableRawPointer) {
        slots[Int(number)].readsLeft += 1
        switch io.reads.readBlock(block, into: memory, token: number) {
        case true: break
        case false:
            memset(memory, 0, blockBytes)
            slots[Int(number)].readsLeft -= 1
        case nil: needRead.append((number, block, memory))
        }
    }

    fileprivate func readAgain() {
        var again: [(slot: UInt32, block: UInt64, memory: UnsafeMutableRawPointer)] = []
        swap(&again, &needRead)
        for read in again {
            switch io.reads.readBlock(read.block, into: read.memory, token: read.slot) {
            case true: break
            case false:
                memset(read.memory, 0, blockBytes)
                edgeRead(read.slot, 0)
            case nil: needRead.append(read)
            }
        }
    }

    fileprivate func edgeRead(_ number: UInt32, _ error: Int32) {
        let slot = slots + Int(number)
        if error != 0 { slot.pointee.readError = error }
        slot.pointee.readsLeft -= 1
        if slot.pointee.readsLeft > 0 { return }
        if slot.pointee.readError != 0 { return end(number, error: slot.pointee.readError) }
        let request = slot.pointee.request!
        let target = slot.pointee.bounce! + slot.pointee.stepSkip
        if let source = request.pointee.buffer {
            memcpy(target, source + slot.pointee.doneBytes, slot.pointee.stepBytes)
        } else {
            memset(target, 0, slot.pointee.stepBytes)
        }
        write(number, from: slot.pointee.bounce!, block: slot.pointee.stepBlock, blocks: slot.pointee.stepBlocks)
    }

    private func write(_ number: UInt32, from memory: UnsafeMutableRawPointer, block: UInt64, blocks: Int) {
        let slot = slots + Int(number)
        do throws(StoreError) { slot.pointee.place = try fork.allocate(blocks: blocks) } catch { return end(number, error: error.errnoForClient) }
        slot.pointee.memory = memory
        slot.pointee.stepBlock = block
        slot.pointee.stepBlocks = blocks
        slot.pointee.writtenBytes = 0
        fork.hash(memory, startBlock: block, blocks: blocks, segmentBlock: slot.pointee.place)
        startWrite(number)
    }

    private func startWrite(_ number: UInt32) {
        let slot = slots + Int(number)
        let done = slot.pointee.writtenBytes
        loop.submitWrite(
            fd: fork.open.segment.file.descriptor, from: slot.pointee.memory! + done, count: slot.pointee.stepBlocks * blockBytes - done,
            offset: UInt64(slot.pointee.place) * UInt64(blockBytes) + UInt64(done), dsync: false, handler: handler, token: number)
    }

    override func ioCompleted(token: UInt32, result: Int32) {
        let slot = slots + Int(token)
        if result == -EAGAIN || result == -EINTR { return startWrite(token) }
        if result <= 0 {
            let error = storageError(result == 0 ? EIO : -result, "cannot write \(fork.open.segment.file.path)")
            fork.store.logger.error("a write to a fork failed", metadata: ["fork": "\(fork.id)", "volume": "\(fork.name)", "error": "\(error)"])
            return end(token, error: error.errnoForClient)
        }
        slot.pointee.writtenBytes += Int(result)
        if slot.pointee.writtenBytes < slot.pointee.stepBlocks * blockBytes { return startWrite(token) }
        fork.commit(startBlock: slot.pointee.stepBlock, blocks: slot.pointee.stepBlocks, segmentBlock: slot.pointee.place)
        slot.pointee.doneBytes += slot.pointee.stepBytes
        advance(token)
    }

    /// All of it is where readers find it.
    private func committed(_ number: UInt32) {
        let request = slots[Int(number)].request!
        if request.pointee.flags.contains(.fua) {
            release(number)
            io.flush.submit(request)
        } else {
            if fork.pendingCount >= fork.store.options.journalEntriesMax { io.flush.startIfIdle() }
            end(number, error: 0)
        }
        wakeWaiting()
    }

    private func end(_ number: UInt32, error: Int32) {
        let request = slots[Int(number)].request!
        release(number)
        request.complete(error: error)
        if error != 0 { wakeWaiting() }
    }

    private func release(_ number: UInt32) {
        let slot = slots + Int(number)
        if let bounce = slot.pointee.bounce { bounces.append(bounce) }
        if slot.pointee.isPartial { partialCount -= 1 }
        slot.pointee.request = nil
        slot.pointee.bounce = nil
        active.remove(at: active.firstIndex(of: number)!)
        free.append(number)
        if isHeld, active.isEmpty { io.writesEnded() }
    }

    /// Somebody ended: begins those whose turn has come.
    private func wakeWaiting() {
        while !isHeld && !line.isEmpty && !free.isEmpty { submit(line.removeFirst()) }
        var index = 0
        while waitingCount > 0 && index < active.count {
            let number = active[index]
            if slots[Int(number)].isWaiting && !conflicts(number, before: index) {
                slots[Int(number)].isWaiting = false
                waitingCount -= 1
                advance(number)
                // It may have ended at once and others with it.
                index = 0
            } else {
                index += 1
            }
        }
    }
}

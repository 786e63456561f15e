import BlockTap
import Glibc

/// Told when a block that it asked `BlockReads` for is there.
class BlockReadOwner {
    /// `error` is 0 or a positive errno.
    func blockRead(token: UInt32, error: Int32) { fatalError("abstract") }
    /// `readBlock` may be asked again, after it answered nil.
    func readSlotFree() { fatalError("abstract") }
}

/// Reads of one `BlockMap` through a ring, every block verified before anybody sees it. On-loop.
///
/// A request is cut into pieces, one per extent that it touches; a piece lives in a fixed slot from its submission to its
/// completion. Whole blocks go straight into the request's buffer; pieces that begin or end within a block go through a bounce
/// buffer. When slots or bounce buffers run out the request waits in line.
///
/// While a request is here its scratch holds: 0 pieces in flight (+1 while pieces are being made), 1 errno, 2 bytes turned into
/// pieces so far, 3 the request behind it in the line.
final class BlockReads: IOHandler {
    static let pieceCount = 512
    static let pieceBytesMax = 512 << 10
    static let bounceCount = 16
    static let bounceBytes = 64 << 10

    private struct Piece {
        var extent: IndexExtent
        /// Aligned; where the extent's blocks go.
        var memory: UnsafeMutableRawPointer
        var doneBytes = 0
        /// Nil for a block that `owner` asked for.
        var request: BlockRequestPointer?
        var ownerToken: UInt32 = 0
        /// -1 = none. Then `count` bytes from `skip` in it go to `target`.
        var bounce: Int32 = -1
        var skip = 0
        var count = 0
        var target: UnsafeMutableRawPointer?
        var nextFree: UInt32 = 0
    }

    private let map: BlockMap
    private let loop: EventLoop
    private var handler: HandlerID!
    private unowned(unsafe) var owner: BlockReadOwner?
    private let pieces: UnsafeMutablePointer<Piece>
    private var freePiece: UInt32 = 0
    private var freeCount = BlockReads.pieceCount
    private let bounceMemory: UnsafeMutableRawPointer
    private var freeBounces: [Int32] = []
    private var lineHead: BlockRequestPointer?
    private var lineTail: BlockRequestPointer?
    private var ownerWaits = false
    /// Nothing new is begun: somebody waits for what is in flight.
    private var drained: (() -> Void)?

    private init(map: BlockMap, loop: EventLoop, owner: BlockReadOwner?) {
        self.map = map
        self.loop = loop
        self.owner = owner
        pieces = .allocate(capacity: Self.pieceCount)
        bounceMemory = .allocate(byteCount: Self.bounceCount * Self.bounceBytes, alignment: pageBytes)
        for index in 0..<Self.pieceCount {
            (pieces + index).initialize(to: Piece(extent: IndexExtent(startBlock: 0, blockCount: 0, slot: 0, segment: 0, segmentBlock: 0, checksumIndex: 0), memory: bounceMemory, nextFree: UInt32(index + 1)))
        }
        freeBounces = (0..<Int32(Self.bounceCount)).reversed()
        super.init()
    }

    deinit {
        pieces.deallocate()
        bounceMemory.deallocate()
    }

    /// Registers with the loop; `end` undoes it.
    static func start(map: BlockMap, loop: EventLoop, owner: BlockReadOwner? = nil) -> BlockReads {
        let reads = BlockReads(map: map, loop: loop, owner: owner)
        reads.handler = loop.register(reads)
        return reads
    }

    var isIdle: Bool { freeCount == Self.pieceCount && lineHead == nil }

    /// Nothing may be in flight.
    func end() {
        precondition(isIdle, "reads are in flight")
        owner = nil
        loop.unregister(handler)
    }

    /// Completes the request when all of it has been read.
    func submit(_ request: BlockRequestPointer) {
        request.pointee.scratch = (1, 0, 0, 0)
        if lineHead != nil || drained != nil { return wait(request) }
        if makePieces(request) { pieceEnded(request) } else { wait(request) }
    }

    /// Reads one block into aligned memory for the owner. False when it is zero: nothing was read then and nobody will be told.
    /// Nil when no slot is free.
    func readBlock(_ block: UInt64, into memory: UnsafeMutableRawPointer, token: UInt32) -> Bool? {
        guard let extent = map.index.piece(at: block, end: block + 1).extent else { return false }
        guard freeCount > 0, drained == nil else {
            ownerWaits = true
            return nil
        }
        let slot = takePiece()
        pieces[Int(slot)].extent = extent
        pieces[Int(slot)].memory = memory
        pieces[Int(slot)].request = nil
        pieces[Int(slot)].ownerToken = token
        pieces[Int(slot)].bounce = -1
        pieces[Int(slot)].doneBytes = 0
        start(slot)
        return true
    }

    /// Turns what is left of a request into pieces. False when it has to wait for slots.
    private func makePieces(_ request: BlockRequestPointer) -> Bool {
        let length = Int(request.pointee.lengthBytes)
        let buffer = request.pointee.buffer!
        let endBlock = (request.pointee.offsetBytes + UInt64(length) + UInt64(blockBytes) - 1) / UInt64(blockBytes)
        while Int(request.pointee.scratch.2) < length {
            let done = Int(request.pointee.scratch.2)
            let offset = request.pointee.offsetBytes + UInt64(done)
            let block = offset / UInt64(blockBytes)
            let skip = Int(offset % UInt64(blockBytes))
            let target = buffer + done
            let left = length - done
            let (found, pieceEnd) = map.index.piece(at: block, end: endBlock)
            guard let found else {
                let count = min(Int(pieceEnd - block) * blockBytes - skip, left)
                memset(target, 0, count)
                request.pointee.scratch.2 += UInt64(count)
                continue
            }
            guard freeCount > 0 else { return false }
            let isDirect = skip == 0 && left >= blockBytes && UInt(bitPattern: target) % UInt(pageBytes) == 0
            let blocksMax = isDirect ? min(left, Self.pieceBytesMax) / blockBytes : Self.bounceBytes / blockBytes
            let extent = found.clipped(from: block, to: min(pieceEnd, block + UInt64(blocksMax)))
            let count = min(Int(extent.blockCount) * blockBytes - skip, left)
            var bounce: Int32 = -1
            if !isDirect {
                guard let free = freeBounces.popLast() else { return false }
                bounce = free
            }
            let slot = takePiece()
            let piece = pieces + Int(slot)
            piece.pointee.extent = extent
            piece.pointee.memory = isDirect ? target : bounceMemory + Int(bounce) * Self.bounceBytes
            piece.pointee.doneBytes = 0
            piece.pointee.request = request
            piece.pointee.bounce = bounce
            piece.pointee.skip = skip
            piece.pointee.count = count
            piece.pointee.target = target
            request.pointee.scratch.0 += 1
            request.pointee.scratch.2 += UInt64(count)
            start(slot)
        }
        return true
    }

    private func start(_ slot: UInt32) {
        let piece = pieces + Int(slot)
        let done = piece.pointee.doneBytes
        loop.submitRead(
            fd: map.descriptor(piece.pointee.extent), into: piece.pointee.memory + done, count: Int(piece.pointee.extent.blockCount) * blockBytes - done,
            offset: UInt64(piece.pointee.extent.segmentBlock) * UInt64(blockBytes) + UInt64(done), handler: handler, token: slot)
    }

    override func ioCompleted(token: UInt32, result: Int32) {
        let piece = pieces + Int(token)
        if result == -EAGAIN || result == -EINTR { return start(token) }
        var error: Int32 = 0
        if result < 0 {
            error = -result
            map.report.found(.io(errno: error, what: "cannot read segment \(piece.pointee.extent.segment) for block \(piece.pointee.extent.startBlock) of disk \(map.volume)"))
        } else {
            piece.pointee.doneBytes += Int(result)
            let isWhole = piece.pointee.doneBytes == Int(piece.pointee.extent.blockCount) * blockBytes
            // Less than asked for off a block boundary is the end of the file: the segment is too short.
            if !isWhole && result > 0 && Int(result) % blockBytes == 0 { return start(token) }
            let bad = isWhole ? map.firstBadBlock(piece.pointee.extent, piece.pointee.memory) : piece.pointee.doneBytes / blockBytes
            if let bad {
                _ = map.badBlock(piece.pointee.extent, bad)
                error = EIO
            }
        }
        let ended = piece.pointee
        pieces[Int(token)].nextFree = freePiece
        freePiece = token
        freeCount += 1
        if let request = ended.request {
            if ended.bounce >= 0 {
                if error == 0 { memcpy(ended.target!, ended.memory + ended.skip, ended.count) }
                freeBounces.append(ended.bounce)
            }
            if error != 0 { request.pointee.scratch.1 = UInt64(error) }
            pieceEnded(request)
        } else {
            owner!.blockRead(token: ended.ownerToken, error: error)
        }
        if drained != nil {
            if freeCount == Self.pieceCount { endDrain() }
            return
        }
        goOn()
    }

    /// Calls once nothing is in flight; what comes meanwhile waits. One at a time.
    func drain(_ body: @escaping () -> Void) {
        precondition(drained == nil)
        drained = body
        if freeCount == Self.pieceCount { endDrain() }
    }

    private func endDrain() {
        let body = drained!
        body()
        drained = nil
        goOn()
    }

    private func goOn() {
        if ownerWaits {
            ownerWaits = false
            owner?.readSlotFree()
        }
        serveLine()
    }

    @inline(__always)
    private func takePiece() -> UInt32 {
        let slot = freePiece
        freePiece = pieces[Int(slot)].nextFree
        freeCount -= 1
        return slot
    }

    @inline(__always)
    private func pieceEnded(_ request: BlockRequestPointer) {
        request.pointee.scratch.0 -= 1
        if request.pointee.scratch.0 == 0 { request.complete(error: Int32(request.pointee.scratch.1)) }
    }

    private func wait(_ request: BlockRequestPointer) {
        request.pointee.scratch.3 = 0
        if let tail = lineTail { tail.pointee.scratch.3 = UInt64(UInt(bitPattern: request)) } else { lineHead = request }
        lineTail = request
    }

    private func serveLine() {
        while let request = lineHead, freeCount > 0, makePieces(request) {
            lineHead = BlockRequestPointer(bitPattern: UInt(request.pointee.scratch.3))
            if lineHead == nil { lineTail = nil }
            pieceEnded(request)
        }
    }
}

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
/// completion. Whole blocks go straight into the request's buffer; pieces that begin or end within a block, and those of compressed
/// clusters, go through a bounce buffer. When slots or bounce buffers run out the request waits in line.
///
/// A piece has one or two parts: its data, and the pages of block checksums that are not in memory; both are read at the same time, and
/// the piece ends with the later one. Layer files that are not open are opened and read on another thread.
///
/// What a client will ask for next is read ahead (`ReadAhead`) while there are slots for more than twice of what it asks.
///
/// While a request is here its scratch holds: 0 pieces in flight (+1 while pieces are being made), 1 errno, 2 bytes turned into
/// pieces so far, 3 the request behind it in the line.
final class BlockReads: IOHandler {
    static let pieceCount = 512
    static let pieceBlocksMax = 128
    static let pieceBytesMax = pieceBlocksMax * blockBytes
    static let bounceCount = 64
    static let bounceBytes = 64 << 10
    /// Pages that the checksums of one piece can lie in.
    static let sumsBytesMax = 2 * pageBytes

    private struct Piece {
        var extent: IndexExtent
        /// Aligned; where what is stored for the extent goes.
        var memory: UnsafeMutableRawPointer
        var storedBytes = 0
        var doneBytes = 0
        var partsLeft = 0
        var error: Int32 = 0
        /// Nil for a block that `owner` asked for.
        var request: BlockRequestPointer?
        var ownerToken: UInt32 = 0
        /// -1 = none. Then `count` bytes from `skip` in the extent go to `target`.
        var bounce: Int32 = -1
        var skip = 0
        var count = 0
        var target: UnsafeMutableRawPointer?
        /// The read-ahead buffer that `memory` is in; -1 = none.
        var ahead: Int32 = -1
        /// Pages of checksums on their way, and how much of them is there.
        var sumsMemory: UnsafeMutableRawPointer?
        var sumsDoneBytes = 0
        var nextFree: UInt32 = 0
    }

    /// In a completion's token: the checksums of the piece, not its data.
    private static let sumsToken: UInt32 = 1 << 31
    /// A read-ahead buffer.
    private static let aheadToken: UInt32 = 1 << 30

    static let clusterCount = 4

    private struct Decoded {
        var segment: UInt32 = 0
        var segmentBlock: UInt32 = 0
        /// 0 = none.
        var blockCount = 0
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
    /// Of pieces whose layer does not have them in memory as a whole.
    private let sums: UnsafeMutablePointer<UInt64>
    private var freeSumsMemory: [UnsafeMutableRawPointer] = []
    /// Keeps layer files open while they are read, by piece.
    private var sumsFiles = ContiguousArray<(any StorageFile)?>(repeating: nil, count: BlockReads.pieceCount)
    /// Decompressed clusters: sequential reads come back to each several times.
    private let clusters: UnsafeMutableRawPointer
    private var decoded = [Decoded](repeating: Decoded(), count: BlockReads.clusterCount)
    private var nextDecoded = 0
    private var ahead = ReadAhead()
    private var isEnding = false
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
        sums = .allocate(capacity: Self.pieceCount * Self.pieceBlocksMax)
        clusters = .allocate(byteCount: Self.clusterCount * ClusterCodec.bytesMax, alignment: pageBytes)
        for index in 0..<Self.pieceCount {
            (pieces + index).initialize(to: Piece(extent: IndexExtent(startBlock: 0, blockCount: 0, slot: 0, segment: 0, segmentBlock: 0, checksumIndex: 0), memory: bounceMemory, nextFree: UInt32(index + 1)))
        }
        freeBounces = (0..<Int32(Self.bounceCount)).reversed()
        super.init()
    }

    deinit {
        pieces.deallocate()
        bounceMemory.deallocate()
        sums.deallocate()
        clusters.deallocate()
        ahead.deallocate()
        for memory in freeSumsMemory { memory.deallocate() }
    }

    /// Registers with the loop; `end` undoes it.
    static func start(map: BlockMap, loop: EventLoop, owner: BlockReadOwner? = nil) -> BlockReads {
        let reads = BlockReads(map: map, loop: loop, owner: owner)
        reads.handler = loop.register(reads)
        return reads
    }

    var isIdle: Bool { freeCount == Self.pieceCount && lineHead == nil }

    var readAheadCount: Int { ahead.startedCount }

    /// Nothing may be in flight.
    func end() {
        precondition(isIdle, "reads are in flight")
        owner = nil
        // What nobody waits for ends first: the loop keeps this object until then.
        if ahead.inFlight > 0 { isEnding = true } else { loop.unregister(handler) }
    }

    /// Completes the request when all of it has been read.
    func submit(_ request: BlockRequestPointer) {
        request.pointee.scratch = (1, 0, 0, 0)
        if lineHead != nil || drained != nil { return wait(request) }
        let stream = ahead.stream(offsetBytes: request.pointee.offsetBytes, lengthBytes: request.pointee.lengthBytes)
        guard makePieces(request) else { return wait(request) }
        // One of them is the request's own.
        let (length, made) = (request.pointee.lengthBytes, Int(request.pointee.scratch.0) - 1)
        if let stream, freeCount > Self.pieceCount / 2, ReadAhead.isWorthwhile(lengthBytes: length, pieceCount: made) { readAhead(stream, length) }
        pieceEnded(request)
    }

    /// Reads one block into aligned memory for the owner. False when it is zero: nothing was read then and nobody will be told.
    /// Nil when no slot is free.
    func readBlock(_ block: UInt64, into memory: UnsafeMutableRawPointer, token: UInt32) -> Bool? {
        guard let extent = map.index.piece(at: block, end: block + 1).extent else { return false }
        guard freeCount > 0, drained == nil, !extent.cluster.isCompressed || !freeBounces.isEmpty else {
            ownerWaits = true
            return nil
        }
        let slot = takePiece()
        let piece = pieces + Int(slot)
        piece.pointee.extent = extent
        piece.pointee.request = nil
        piece.pointee.ownerToken = token
        piece.pointee.bounce = extent.cluster.isCompressed ? freeBounces.removeLast() : -1
        piece.pointee.memory = extent.cluster.isCompressed ? bounce(piece.pointee.bounce) : memory
        piece.pointee.skip = 0
        piece.pointee.count = blockBytes
        piece.pointee.target = memory
        piece.pointee.ahead = -1
        begin(slot)
        return true
    }

    private func bounce(_ number: Int32) -> UnsafeMutableRawPointer { bounceMemory + Int(number) * Self.bounceBytes }

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
            let known = ahead.buffer(of: found)
            let isDirect = known == nil && !found.cluster.isCompressed && skip == 0 && left >= blockBytes && UInt(bitPattern: target) % UInt(pageBytes) == 0
            let blocksMax = known?.blockCount ?? (isDirect ? min(left, Self.pieceBytesMax) / blockBytes : Self.bounceBytes / blockBytes)
            let extent = found.clipped(from: block, to: min(pieceEnd, block + UInt64(blocksMax)))
            let count = min(Int(extent.blockCount) * blockBytes - skip, left)
            var bounce: Int32 = -1
            if !isDirect, known == nil {
                guard let free = freeBounces.popLast() else { return false }
                bounce = free
            }
            let slot = takePiece()
            let piece = pieces + Int(slot)
            piece.pointee.extent = extent
            if let known {
                ahead.use(known.buffer)
                piece.pointee.memory = ahead.memory(known.buffer) + Int(extent.segmentBlock - ahead.buffers[known.buffer].firstBlock) * blockBytes
            } else {
                piece.pointee.memory = isDirect ? target : self.bounce(bounce)
            }
            piece.pointee.ahead = Int32(known?.buffer ?? -1)
            piece.pointee.request = request
            piece.pointee.bounce = bounce
            piece.pointee.skip = skip
            piece.pointee.count = count
            piece.pointee.target = target
            request.pointee.scratch.0 += 1
            request.pointee.scratch.2 += UInt64(count)
            begin(slot)
        }
        return true
    }

    private func begin(_ slot: UInt32) {
        let piece = pieces + Int(slot)
        piece.pointee.storedBytes = piece.pointee.extent.storedBlockCount * blockBytes
        piece.pointee.doneBytes = 0
        piece.pointee.error = 0
        piece.pointee.partsLeft = 1
        let extent = piece.pointee.extent
        if map.residentSums(extent) == nil, !map.layers[Int(extent.slot)].copyCached(extent.checksumIndex, Int(extent.blockCount), into: ownSums(slot)) {
            piece.pointee.partsLeft = 2
            beginSums(slot)
        }
        if piece.pointee.ahead < 0 { return start(slot) }
        if ahead.buffers[Int(piece.pointee.ahead)].isInFlight { return ahead.buffers[Int(piece.pointee.ahead)].waiting.append(slot) }
        piece.pointee.doneBytes = piece.pointee.storedBytes
        piece.pointee.partsLeft -= 1
        if piece.pointee.partsLeft == 0 { _ = finish(slot) }
    }

    private func start(_ slot: UInt32) {
        let piece = pieces + Int(slot)
        let done = piece.pointee.doneBytes
        loop.submitRead(
            fd: map.descriptor(piece.pointee.extent), into: piece.pointee.memory + done, count: piece.pointee.storedBytes - done,
            offset: UInt64(piece.pointee.extent.segmentBlock) * UInt64(blockBytes) + UInt64(done), handler: handler, token: slot)
    }

    override func ioCompleted(token: UInt32, result: Int32) {
        if token & Self.sumsToken != 0 { return sumsRead(token & ~Self.sumsToken, result) }
        if token & Self.aheadToken != 0 { return aheadRead(Int(token & ~Self.aheadToken), result) }
        let piece = pieces + Int(token)
        if result == -EAGAIN || result == -EINTR { return start(token) }
        if result < 0 {
            piece.pointee.error = -result
            map.report.found(.io(errno: -result, what: "cannot read segment \(piece.pointee.extent.segment) for block \(piece.pointee.extent.startBlock) of disk \(map.volume)"))
        } else {
            piece.pointee.doneBytes += Int(result)
            let isWhole = piece.pointee.doneBytes == piece.pointee.storedBytes
            // Less than asked for off a block boundary is the end of the file: the segment is too short.
            if !isWhole && result > 0 && Int(result) % blockBytes == 0 { return start(token) }
            if !isWhole {
                _ = map.badBlock(piece.pointee.extent, piece.pointee.extent.cluster.isCompressed ? 0 : piece.pointee.doneBytes / blockBytes)
                piece.pointee.error = EIO
            }
        }
        partEnded(token)
    }

    // MARK: Ahead

    private func readAhead(_ stream: Int, _ lengthBytes: UInt32) {
        while let buffer = ahead.next(stream, lengthBytes: lengthBytes, in: map) { startAhead(buffer) }
    }

    private func startAhead(_ number: Int) {
        let buffer = ahead.buffers[number]
        let descriptor = map.segments.descriptor(buffer.segment)
        loop.submitRead(
            fd: descriptor, into: ahead.memory(number) + buffer.doneBytes, count: Int(buffer.blockCount) * blockBytes - buffer.doneBytes,
            offset: UInt64(buffer.firstBlock) * UInt64(blockBytes) + UInt64(buffer.doneBytes), handler: handler, token: UInt32(number) | Self.aheadToken)
    }

    private func aheadRead(_ number: Int, _ result: Int32) {
        if result == -EAGAIN || result == -EINTR { return startAhead(number) }
        if result > 0 { ahead.buffers[number].doneBytes += Int(result) }
        let isWhole = ahead.buffers[number].doneBytes == Int(ahead.buffers[number].blockCount) * blockBytes
        if !isWhole && result > 0 && Int(result) % blockBytes == 0 { return startAhead(number) }
        for slot in ahead.ended(number, isWhole: isWhole) {
            // An error is told by who asked for the block: it is read once more, to the same place.
            if isWhole {
                pieces[Int(slot)].doneBytes = pieces[Int(slot)].storedBytes
                partEnded(slot)
            } else {
                start(slot)
            }
        }
        if isEnding, ahead.inFlight == 0 { loop.unregister(handler) }
        endDrainWhenQuiet()
    }

    // MARK: Checksums that are not in memory

    private func ownSums(_ slot: UInt32) -> UnsafeMutablePointer<UInt64> { sums + Int(slot) * Self.pieceBlocksMax }

    private func beginSums(_ slot: UInt32) {
        let piece = pieces + Int(slot)
        let extent = piece.pointee.extent
        let layer = map.layers[Int(extent.slot)]
        if let file = layer.openFile, file.descriptor >= 0 {
            piece.pointee.sumsMemory = freeSumsMemory.popLast() ?? .allocate(byteCount: Self.sumsBytesMax, alignment: pageBytes)
            piece.pointee.sumsDoneBytes = 0
            sumsFiles[Int(slot)] = file
            return startSums(slot)
        }
        nonisolated(unsafe) let this = self
        let loop = loop
        nonisolated(unsafe) let target = ownSums(slot)
        layer.later {
            var failure: StoreError?
            do throws(StoreError) { try layer.copy(extent.checksumIndex, Int(extent.blockCount), into: target) } catch { failure = error }
            loop.execute { [failure] in this.sumsEnded(slot, failure) }
        }
    }

    private func startSums(_ slot: UInt32) {
        let piece = pieces + Int(slot)
        let (layer, range) = sumsPlace(piece.pointee.extent)
        let done = piece.pointee.sumsDoneBytes
        loop.submitRead(
            fd: sumsFiles[Int(slot)]!.descriptor, into: piece.pointee.sumsMemory! + done, count: range.count * pageBytes - done,
            offset: layer.pages!.offset(range.lowerBound) + UInt64(done), handler: handler, token: slot | Self.sumsToken)
    }

    private func sumsPlace(_ extent: IndexExtent) -> (LayerChecksums, Range<Int>) {
        let layer = map.layers[Int(extent.slot)]
        return (layer, layer.pageRange(extent.checksumIndex, Int(extent.blockCount)))
    }

    private func sumsRead(_ slot: UInt32, _ result: Int32) {
        if result == -EAGAIN || result == -EINTR { return startSums(slot) }
        let piece = pieces + Int(slot)
        let extent = piece.pointee.extent
        let (layer, range) = sumsPlace(extent)
        let path = sumsFiles[Int(slot)]!.path
        var failure: StoreError?
        if result < 0 {
            failure = storageError(-result, "cannot read \(path) at byte \(layer.pages!.offset(range.lowerBound))")
        } else {
            piece.pointee.sumsDoneBytes += Int(result)
            if piece.pointee.sumsDoneBytes < range.count * pageBytes {
                if result > 0 { return startSums(slot) }
                failure = .damaged(path: path, offsetBytes: layer.pages!.offset(range.lowerBound), what: "the file ends early")
            } else {
                do throws(StoreError) {
                    try layer.take(piece.pointee.sumsMemory!, range, path: path)
                    layer.copy(extent.checksumIndex, Int(extent.blockCount), from: piece.pointee.sumsMemory!, into: ownSums(slot))
                } catch { failure = error }
            }
        }
        freeSumsMemory.append(piece.pointee.sumsMemory!)
        piece.pointee.sumsMemory = nil
        sumsFiles[Int(slot)] = nil
        sumsEnded(slot, failure)
    }

    private func sumsEnded(_ slot: UInt32, _ failure: StoreError?) {
        if let failure {
            map.report.found(failure)
            pieces[Int(slot)].error = EIO
        }
        partEnded(slot)
    }

    // MARK: Ends

    private func partEnded(_ slot: UInt32) {
        pieces[Int(slot)].partsLeft -= 1
        if pieces[Int(slot)].partsLeft > 0 { return }
        guard finish(slot) else { return }
        if drained != nil { return endDrainWhenQuiet() }
        goOn()
    }

    /// Calls once nothing is in flight; what comes meanwhile waits. One at a time.
    func drain(_ body: @escaping () -> Void) {
        precondition(drained == nil)
        drained = body
        endDrainWhenQuiet()
    }

    private func endDrainWhenQuiet() {
        // Also what nobody waits for: the files that it reads may be closed next.
        guard freeCount == Self.pieceCount, ahead.inFlight == 0, let body = drained else { return }
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

    /// All parts of a piece have ended. False when it is being read once more.
    private func finish(_ slot: UInt32) -> Bool {
        if pieces[Int(slot)].error == 0, let bad = deliver(slot) {
            let number = Int(pieces[Int(slot)].ahead)
            if number >= 0, ahead.buffers[number].blockCount > 0 {
                // It may have been put right since.
                ahead.buffers[number].blockCount = 0
                pieces[Int(slot)].doneBytes = 0
                pieces[Int(slot)].partsLeft = 1
                start(slot)
                return false
            }
            _ = map.badBlock(pieces[Int(slot)].extent, bad)
            pieces[Int(slot)].error = EIO
        }
        let ended = pieces[Int(slot)]
        if ended.ahead >= 0 { ahead.buffers[Int(ended.ahead)].users -= 1 }
        pieces[Int(slot)].nextFree = freePiece
        freePiece = slot
        freeCount += 1
        if ended.bounce >= 0 { freeBounces.append(ended.bounce) }
        if let request = ended.request {
            if ended.error != 0 { request.pointee.scratch.1 = UInt64(ended.error) }
            pieceEnded(request)
        } else {
            owner!.blockRead(token: ended.ownerToken, error: ended.error)
        }
        return true
    }

    /// Verifies what was read and brings it to where it is wanted. Returns the first block of the extent that is not what it must be.
    private func deliver(_ slot: UInt32) -> Int? {
        let piece = pieces + Int(slot)
        let extent = piece.pointee.extent
        let sums = map.residentSums(extent) ?? UnsafePointer(ownSums(slot))
        var bytes = piece.pointee.memory
        if extent.cluster.isCompressed {
            let part = extent.cluster
            let needed = part.skip + Int(extent.blockCount)
            for index in 0..<Self.clusterCount where decoded[index].blockCount >= needed && decoded[index].segment == extent.segment && decoded[index].segmentBlock == extent.segmentBlock {
                bytes = clusters + index * ClusterCodec.bytesMax + part.skip * blockBytes
                if map.firstBadBlock(extent, bytes, sums) == nil {
                    memcpy(piece.pointee.target!, bytes + piece.pointee.skip, piece.pointee.count)
                    return nil
                }
                decoded[index].blockCount = 0
            }
            // All of a cluster is decompressed where it is wanted.
            let isWhole = part.skip == 0 && piece.pointee.skip == 0 && piece.pointee.count == part.blockCount * blockBytes
            // What is read in sequence will be asked for the rest of it.
            let blockCount = isWhole || piece.pointee.ahead >= 0 ? part.blockCount : needed
            var target = piece.pointee.target!
            let index = nextDecoded
            if !isWhole {
                target = clusters + index * ClusterCodec.bytesMax
                decoded[index].blockCount = 0
            }
            guard ClusterCodec.decode(piece.pointee.memory, part, neededBlocks: blockCount, into: target) else { return 0 }
            if !isWhole {
                decoded[index] = Decoded(segment: extent.segment, segmentBlock: extent.segmentBlock, blockCount: blockCount)
                nextDecoded = (nextDecoded + 1) % Self.clusterCount
            }
            bytes = target + part.skip * blockBytes
        }
        if let bad = map.firstBadBlock(extent, bytes, sums) { return bad }
        if bytes + piece.pointee.skip != piece.pointee.target! { memcpy(piece.pointee.target!, bytes + piece.pointee.skip, piece.pointee.count) }
        return nil
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

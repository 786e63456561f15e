import BlockTap
import Glibc

/// Blocks of a layer, next to each other on the volume, that are not what its checksums say.
struct BadRun: Equatable {
    enum Cause: Equatable {
        case checksum
        /// The segment ends before them.
        case missing
        /// The disk could not read them.
        case unreadable(errno: Int32)
        /// They lie in a compressed cluster that cannot be decompressed.
        case cluster
    }
    var startBlock: UInt64
    var blockCount: UInt64
    var segment: UInt32
    /// Where the first one (or its cluster) is in the segment.
    var segmentBlock: UInt32
    var cause: Cause
    /// Where the first block is in a compressed cluster.
    var cluster = ClusterPart.plain
    /// What the blocks should hash to, one each.
    var sums: [UInt64] = []
}

/// Reads all data of layers and compares every block with its checksum, in the order in which it lies in the segments as far as bounded
/// memory allows. One thread.
final class LayerDataReader {
    /// Of one read.
    static let pieceBlocks = 256
    /// Blocks whose checksums and places are in memory together.
    static let batchBlocks = 1 << 18

    private struct Piece {
        var segment: UInt32
        var segmentBlock: UInt32
        /// To be read.
        var storedBlocks: UInt32
        var startBlock: UInt64
        var blockCount: UInt32
        /// Index into the batch's checksums.
        var sum: Int
        var cluster: ClusterPart
    }

    private let open: (UInt32) throws(StoreError) -> any StorageFile
    private let memory = UnsafeMutableRawBufferPointer.allocate(byteCount: LayerDataReader.pieceBlocks * blockBytes, alignment: pageBytes)
    private let plain = UnsafeMutableRawBufferPointer.allocate(byteCount: ClusterPart.blocksMax * blockBytes, alignment: pageBytes)
    private let sums = UnsafeMutablePointer<UInt64>.allocate(capacity: LayerDataReader.batchBlocks)
    private var pieces: [Piece] = []
    private var sumCount = 0
    /// Told before each read how many bytes it has; false ends the walk.
    private let pace: (Int) -> Bool

    /// `open` gives the segment's file, its header verified.
    init(open: @escaping (UInt32) throws(StoreError) -> any StorageFile, pace: @escaping (Int) -> Bool = { _ in true }) {
        self.open = open
        self.pace = pace
    }

    deinit {
        memory.deallocate()
        plain.deallocate()
        sums.deallocate()
    }

    /// All data of the layer, or what lies in `only`. False when `pace` ended it. Throws when the layer's own file is damaged.
    func read(_ layer: LayerReader, only segments: Set<UInt32>? = nil, found: (BadRun) -> Void) throws(StoreError) -> Bool {
        var goesOn = true
        try layer.forEachExtents { extents throws(StoreError) in
            for extent in extents where !extent.isZero && goesOn && segments?.contains(extent.segment) ?? true {
                goesOn = try self.add(extent, of: layer, found: found)
            }
        }
        if goesOn { goesOn = verify(sizeBytes: layer.header.sizeBytes, found: found) }
        pieces.removeAll(keepingCapacity: true)
        sumCount = 0
        return goesOn
    }

    private func add(_ extent: StoredExtent, of layer: LayerReader, found: (BadRun) -> Void) throws(StoreError) -> Bool {
        let count = Int(extent.blockCount)
        guard count > 0, Int(extent.checksumIndex) + count <= layer.checksumCount, extent.isCompressed ? count <= ClusterPart.blocksMax : extent.storedBytes == extent.blockCount &* 4096 else {
            throw .damaged(path: LayerFile.path(layer.record.id), offsetBytes: UInt64(pageBytes), what: "the extent of block \(extent.startBlock) contradicts its layer")
        }
        var done = 0
        while done < count {
            let blocks = min(count - done, Self.pieceBlocks)
            if sumCount + blocks > Self.batchBlocks {
                guard verify(sizeBytes: layer.header.sizeBytes, found: found) else { return false }
            }
            try layer.readChecksums(Int(extent.checksumIndex) + done..<Int(extent.checksumIndex) + done + blocks, into: sums + sumCount)
            pieces.append(Piece(
                segment: extent.segment, segmentBlock: extent.segmentBlock &+ (extent.isCompressed ? 0 : UInt32(done)), storedBlocks: extent.isCompressed ? extent.segmentBlockCount : UInt32(blocks),
                startBlock: extent.startBlock + UInt64(done), blockCount: UInt32(blocks), sum: sumCount, cluster: extent.cluster))
            sumCount += blocks
            done += blocks
        }
        return true
    }

    private func verify(sizeBytes: UInt64, found: (BadRun) -> Void) -> Bool {
        defer {
            pieces.removeAll(keepingCapacity: true)
            sumCount = 0
        }
        pieces.sort { ($0.segment, $0.segmentBlock) < ($1.segment, $1.segmentBlock) }
        var first = 0
        while first < pieces.count {
            // Neighbours in the segment are read at once; parts of one cluster too.
            let start = pieces[first].segmentBlock
            var end = UInt64(start) + UInt64(pieces[first].storedBlocks)
            var next = first + 1
            while next < pieces.count, pieces[next].segment == pieces[first].segment, UInt64(pieces[next].segmentBlock) <= end,
                max(end, UInt64(pieces[next].segmentBlock) + UInt64(pieces[next].storedBlocks)) - UInt64(start) <= UInt64(Self.pieceBlocks)
            {
                end = max(end, UInt64(pieces[next].segmentBlock) + UInt64(pieces[next].storedBlocks))
                next += 1
            }
            let count = Int(end - UInt64(start))
            guard pace(count * blockBytes) else { return false }
            verify(pieces[first..<next], start: start, count: count, sizeBytes: sizeBytes, found: found)
            first = next
        }
        return true
    }

    private func verify(_ run: ArraySlice<Piece>, start: UInt32, count: Int, sizeBytes: UInt64, found: (BadRun) -> Void) {
        var readable = 0
        do throws(StoreError) {
            let file = try open(run.first!.segment)
            readable = try file.read(into: UnsafeMutableRawBufferPointer(start: memory.baseAddress!, count: count * blockBytes), at: UInt64(start) * UInt64(blockBytes)) / blockBytes
        } catch {
            // Piece by piece, then block by block, to find out what exactly cannot be read.
            if run.count > 1 {
                for piece in run { verify([piece], start: piece.segmentBlock, count: Int(piece.storedBlocks), sizeBytes: sizeBytes, found: found) }
                return
            }
            let piece = run.first!
            if piece.blockCount > 1, !piece.cluster.isCompressed, case .io = error, (try? open(piece.segment)) != nil {
                for index in 0..<piece.blockCount {
                    var block = piece
                    block.segmentBlock += index
                    block.startBlock += UInt64(index)
                    block.sum += Int(index)
                    (block.storedBlocks, block.blockCount) = (1, 1)
                    verify([block], start: block.segmentBlock, count: 1, sizeBytes: sizeBytes, found: found)
                }
                return
            }
            let cause: BadRun.Cause = if case .io(let errno, _) = error, errno != ENOENT { .unreadable(errno: errno) } else { .missing }
            found(self.run(of: piece, 0, Int(piece.blockCount), cause))
            return
        }
        for piece in run {
            let offset = Int(piece.segmentBlock - start)
            if piece.cluster.isCompressed {
                let stored = UnsafeRawBufferPointer(start: memory.baseAddress! + offset * blockBytes, count: Int(piece.storedBlocks) * blockBytes)
                guard offset + Int(piece.storedBlocks) <= readable else {
                    found(self.run(of: piece, 0, Int(piece.blockCount), .missing))
                    continue
                }
                guard ClusterAccess.unpack(stored, piece.cluster, into: plain) else {
                    found(self.run(of: piece, 0, Int(piece.blockCount), .cluster))
                    continue
                }
                compare(piece, plain.baseAddress! + piece.cluster.skip * blockBytes, available: Int(piece.blockCount), sizeBytes: sizeBytes, found: found)
            } else {
                compare(piece, memory.baseAddress! + offset * blockBytes, available: max(0, readable - offset), sizeBytes: sizeBytes, found: found)
            }
        }
    }

    private func compare(_ piece: Piece, _ bytes: UnsafeRawPointer, available: Int, sizeBytes: UInt64, found: (BadRun) -> Void) {
        var bad: (first: Int, cause: BadRun.Cause)?
        func end(_ index: Int) {
            if let run = bad { found(self.run(of: piece, run.first, index - run.first, run.cause)) }
            bad = nil
        }
        for index in 0..<Int(piece.blockCount) {
            let block = piece.startBlock + UInt64(index)
            let cause: BadRun.Cause? =
                index >= available ? .missing
                : BlockChecksum.of(bytes + index * blockBytes, count: blockLength(block, sizeBytes: sizeBytes), blockIndex: block) != sums[piece.sum + index] ? .checksum : nil
            if let bad, bad.cause == cause { continue }
            end(index)
            if let cause { bad = (index, cause) }
        }
        end(Int(piece.blockCount))
    }

    private func run(of piece: Piece, _ first: Int, _ count: Int, _ cause: BadRun.Cause) -> BadRun {
        var part = piece.cluster
        if part.isCompressed { part.skip += first }
        return BadRun(
            startBlock: piece.startBlock + UInt64(first), blockCount: UInt64(count), segment: piece.segment,
            segmentBlock: part.isCompressed ? piece.segmentBlock : piece.segmentBlock + UInt32(first), cause: cause, cluster: part,
            sums: (first..<first + count).map { sums[piece.sum + $0] })
    }
}

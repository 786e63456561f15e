import BlockTap

/// What `BlockReads` has read before it was asked for. A client that reads on and on, one request at a time, waits for the disk each time;
/// here the next half megabyte is read in long pieces while it is busy with the last. One that has several large requests under way keeps
/// the disk busy by itself, unless they fall into many pieces: each request waits for the last of its own, and meanwhile less and less is under way.
/// For such a client some megabytes are read ahead.
///
/// *Streams* are recognised by requests that begin where one ended: the third is read ahead of. *Buffers* hold what is stored in a
/// segment, as it is: a piece that lies in one is decompressed and verified like any other. Blocks of sealed layers never change, so a buffer
/// is right until it is used for something else; the open layer of a fork is not read ahead of. On-loop.
struct ReadAhead {
    static let bufferBlocks = 32
    /// For small requests, and in all.
    static let smallBufferCount = 16
    static let bufferCount = 64
    static let smallWindowBlocks: UInt64 = 128
    static let windowBlocks: UInt64 = 1024
    static let streamCount = 8
    static let smallRequestBytesMax = 128 << 10
    /// Longer ones are not looked at.
    static let requestBytesMax = 4 << 20
    /// A larger request is in many pieces when they are shorter than this on average. Less than a buffer, so that what lies in buffers is not
    /// taken for it.
    static let pieceBytesMany = 112 << 10
    /// Less that lies together is not worth it.
    static let runBlocksMin = 4

    struct Buffer {
        var segment: UInt32 = 0
        var firstBlock: UInt32 = 0
        /// 0 = holds nothing.
        var blockCount: UInt32 = 0
        var doneBytes = 0
        var isInFlight = false
        /// Pieces that lie in it; it stays what it is while there are any.
        var users = 0
        /// Those of them that wait for it.
        var waiting: [UInt32] = []
        var lastUse: UInt64 = 0
    }

    private struct Stream {
        var nextByte: UInt64 = .max
        /// Read up to here.
        var aheadBlock: UInt64 = 0
        var length = 0
        var lastUse: UInt64 = 0
    }

    private(set) var inFlight = 0
    /// Runs read so far.
    private(set) var startedCount = 0
    private(set) var memory: UnsafeMutableRawPointer?
    var buffers = [Buffer](repeating: Buffer(), count: ReadAhead.bufferCount)
    private var streams = [Stream](repeating: Stream(), count: ReadAhead.streamCount)
    private var clock: UInt64 = 0
    /// Buffers that may hold something.
    private var inUse = 0

    func deallocate() { memory?.deallocate() }

    func memory(_ buffer: Int) -> UnsafeMutableRawPointer { memory! + buffer * Self.bufferBlocks * blockBytes }

    /// A request came. The stream that it goes on with, when there is something to be read ahead of it.
    @inline(__always)
    mutating func stream(offsetBytes: UInt64, lengthBytes: UInt32) -> Int? {
        if lengthBytes > Self.requestBytesMax { return nil }
        clock &+= 1
        let end = offsetBytes + UInt64(lengthBytes)
        var oldest = 0
        for index in 0..<Self.streamCount {
            if streams[index].nextByte == offsetBytes {
                streams[index].nextByte = end
                streams[index].length += 1
                streams[index].lastUse = clock
                return streams[index].length > 2 ? index : nil
            }
            if streams[index].lastUse < streams[oldest].lastUse { oldest = index }
        }
        streams[oldest] = Stream(nextByte: end, length: 1, lastUse: clock)
        return nil
    }

    /// The buffer that all of what is stored for the first block of `extent` lies in, and how many blocks of the extent do.
    @inline(__always)
    func buffer(of extent: IndexExtent) -> (buffer: Int, blockCount: Int)? {
        if memory == nil || extent.slot == IndexExtent.openSlot { return nil }
        for index in 0..<inUse where buffers[index].blockCount > 0 && buffers[index].segment == extent.segment {
            let first = buffers[index].firstBlock
            guard extent.segmentBlock >= first, extent.segmentBlock < first + buffers[index].blockCount else { continue }
            let room = Int(first + buffers[index].blockCount - extent.segmentBlock)
            if !extent.cluster.isCompressed { return (index, min(room, Int(extent.blockCount))) }
            if room >= extent.cluster.storedBlocks { return (index, Int(extent.blockCount)) }
        }
        return nil
    }

    mutating func use(_ buffer: Int) {
        buffers[buffer].users += 1
        buffers[buffer].lastUse = clock
    }

    /// Whether to read ahead of requests like this one, which took so many pieces.
    static func isWorthwhile(lengthBytes: UInt32, pieceCount: Int) -> Bool {
        lengthBytes <= smallRequestBytesMax || pieceCount * pieceBytesMany >= Int(lengthBytes)
    }

    /// The next run to read for a stream of such requests, and the buffer for it; nil when enough is on its way.
    mutating func next(_ stream: Int, lengthBytes: UInt32, in map: BlockMap) -> Int? {
        let isSmall = lengthBytes <= Self.smallRequestBytesMax
        let volumeEnd = (map.sizeBytes + UInt64(blockBytes) - 1) / UInt64(blockBytes)
        let position = (streams[stream].nextByte + UInt64(blockBytes) - 1) / UInt64(blockBytes)
        let end = min(volumeEnd, position + (isSmall ? Self.smallWindowBlocks : Self.windowBlocks))
        var block = max(streams[stream].aheadBlock, position)
        // In steps of a buffer, not block after block behind the reader.
        while end >= block + UInt64(Self.bufferBlocks) || (end == volumeEnd && block < end) {
            var run: IndexExtent?
            var last: IndexExtent?
            var stored = 0
            let start = block
            while stored < Self.bufferBlocks {
                let (extent, pieceEnd) = map.index.piece(at: block, end: volumeEnd)
                guard let extent, extent.slot != IndexExtent.openSlot else {
                    if run == nil { block = pieceEnd }
                    break
                }
                if let last, !last.isFollowedInSegment(by: extent) { break }
                let room = Self.bufferBlocks - stored
                if extent.cluster.isCompressed, extent.cluster.storedBlocks > room { break }
                let part = extent.cluster.isCompressed ? extent : extent.clipped(from: block, to: min(pieceEnd, block + UInt64(room)))
                if run == nil { run = part }
                last = part
                stored += part.storedBlockCount
                block = part.endBlock
            }
            streams[stream].aheadBlock = block
            guard let run, stored >= Self.runBlocksMin, buffer(of: run) == nil else {
                precondition(block > start)
                continue
            }
            var free: Int?
            for index in 0..<(isSmall ? Self.smallBufferCount : Self.bufferCount) where !buffers[index].isInFlight && buffers[index].users == 0 {
                if free == nil || buffers[index].lastUse < buffers[free!].lastUse { free = index }
            }
            guard let free else {
                streams[stream].aheadBlock = start
                return nil
            }
            if memory == nil { memory = .allocate(byteCount: Self.bufferCount * Self.bufferBlocks * blockBytes, alignment: pageBytes) }
            inFlight += 1
            startedCount += 1
            inUse = max(inUse, free + 1)
            buffers[free] = Buffer(segment: run.segment, firstBlock: run.segmentBlock, blockCount: UInt32(stored), isInFlight: true, lastUse: clock)
            return free
        }
        return nil
    }

    /// A buffer's read has ended. Without success it holds nothing, and those who wait have to read for themselves.
    mutating func ended(_ buffer: Int, isWhole: Bool) -> [UInt32] {
        inFlight -= 1
        buffers[buffer].isInFlight = false
        if !isWhole { buffers[buffer].blockCount = 0 }
        var waiting: [UInt32] = []
        swap(&waiting, &buffers[buffer].waiting)
        return waiting
    }
}

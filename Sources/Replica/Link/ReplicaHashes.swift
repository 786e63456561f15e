import BlockTap

/// What the sender knows of the replica's blocks: a window of spans around the place at which the source hands out. A value; asks nobody.
struct ReplicaHashes {
    static let spanBlocks = UInt64(FrameLimits.hashedBlocksMax)
    /// Asked for and known together, as far as they are asked for ahead of need.
    static let spansMax = 16
    /// Known spans are forgotten when so many items went by since an item touched them; those that none has touched, a little later. A source
    /// hands out nearly in order: what its reads in flight can be apart is far less.
    static let itemsUntilForgotten: UInt64 = 96
    static let itemsUntilUseless: UInt64 = 1024

    struct Span: Hashable {
        var volume: Int
        var number: UInt64
    }

    private struct Known {
        /// By block of the span: place in `hashes`, or one of the two below.
        var places: [Int32]
        var hashes: [BlockHash]
        static let zero: Int32 = -1
        static let unreadable: Int32 = -2
    }

    private struct Entry {
        var known: Known?
        var lastUse: UInt64
        var wasUsed = false
    }

    private let blockCounts: [UInt64]
    private var entries: [Span: Entry] = [:]
    private var asked: [UInt64: (span: Span, blockCount: Int)] = [:]
    private var clock: UInt64 = 0
    private var lastSpan: Span?

    init(disks: [SourceDisk]) { blockCounts = disks.map(\.geometry.blockCount) }

    /// Questions that are not answered yet.
    var openQuestions: some Collection<UInt64> { asked.keys }

    /// An item with these blocks is to be compared. Returns whether all of them are known, and what has to be asked for, most urgent first.
    mutating func need(volume: Int, firstBlock: UInt64, blockCount: UInt64) -> (isKnown: Bool, missing: [Span]) {
        clock += 1
        var isKnown = true
        var missing: [Span] = []
        let last = (firstBlock + blockCount - 1) / Self.spanBlocks
        for number in firstBlock / Self.spanBlocks...last {
            let span = Span(volume: volume, number: number)
            if entries[span] == nil { missing.append(span) }
            if entries[span]?.known == nil { isKnown = false }
            entries[span]?.lastUse = clock
            entries[span]?.wasUsed = true
        }
        let now = Span(volume: volume, number: last)
        if now != lastSpan {
            lastSpan = now
            forget()
            var next = now
            while entries.count + missing.count < Self.spansMax, let span = successor(of: next) {
                if entries[span] == nil { missing.append(span) }
                // As far ahead as the window is, past what is known already.
                if span.volume == now.volume, span.number > now.number + UInt64(Self.spansMax) { break }
                if span.volume > now.volume + 1 { break }
                next = span
            }
        }
        return (isKnown, missing)
    }

    private func successor(of span: Span) -> Span? {
        if (span.number + 1) * Self.spanBlocks < blockCounts[span.volume] { return Span(volume: span.volume, number: span.number + 1) }
        var volume = span.volume + 1
        while volume < blockCounts.count, blockCounts[volume] == 0 { volume += 1 }
        return volume < blockCounts.count ? Span(volume: volume, number: 0) : nil
    }

    private mutating func forget() {
        entries = entries.filter { _, entry in
            entry.known == nil || clock - entry.lastUse <= (entry.wasUsed ? Self.itemsUntilForgotten : Self.itemsUntilUseless)
        }
    }

    /// The question for a span, which counts as asked from now on.
    mutating func ask(_ span: Span, question: UInt64) -> HashesWantedMeta {
        let first = span.number * Self.spanBlocks
        let count = Int(min(Self.spanBlocks, blockCounts[span.volume] - first))
        entries[span] = Entry(known: nil, lastUse: clock)
        asked[question] = (span, count)
        return HashesWantedMeta(question: question, volume: span.volume, blockCount: count, firstBlock: first)
    }

    /// False when this was not asked.
    mutating func put(_ answer: HashesMeta) throws(FrameError) -> Bool {
        guard let (span, blockCount) = asked.removeValue(forKey: answer.question) else { return false }
        guard answer.blockCount == blockCount else { throw .malformed(.hashes, "it is about \(answer.blockCount) blocks, asked for were \(blockCount)") }
        var places: [Int32] = []
        places.reserveCapacity(blockCount)
        var next: Int32 = 0
        for run in answer.runs {
            for _ in 0..<run.count {
                switch run.kind {
                case .zero: places.append(Known.zero)
                case .unreadable: places.append(Known.unreadable)
                case .hashed:
                    places.append(next)
                    next += 1
                }
            }
        }
        entries[span]?.known = Known(places: places, hashes: answer.hashes)
        entries[span]?.lastUse = clock
        return true
    }

    /// Whether the replica has these bytes in this block. Its span is known.
    func isEqual(volume: Int, block: UInt64, _ bytes: UnsafeRawBufferPointer, _ hasher: BlockHasher) -> Bool {
        guard let known = entries[Span(volume: volume, number: block / Self.spanBlocks)]?.known else { return false }
        switch known.places[Int(block % Self.spanBlocks)] {
        case Known.unreadable: return false
        case Known.zero: return isZero(bytes)
        case let place: return hasher.hash(bytes.baseAddress!, count: bytes.count) == known.hashes[Int(place)]
        }
    }
}

/// Blocks by number, in bitmaps that are made where something is put: 32 KiB of memory for each GiB that has any.
struct SentBlocks {
    private static let pageBlocks: UInt64 = 1 << 18
    private struct Page: Hashable {
        var volume: Int
        var number: UInt64
    }
    private var pages: [Page: ContiguousArray<UInt64>] = [:]

    var isEmpty: Bool { pages.isEmpty }

    mutating func insert(volume: Int, firstBlock: UInt64, blockCount: UInt64) {
        var block = firstBlock
        let end = firstBlock + blockCount
        while block < end {
            let page = Page(volume: volume, number: block / Self.pageBlocks)
            let stop = min(end, (page.number + 1) * Self.pageBlocks)
            while block < stop {
                let bit = Int(block % Self.pageBlocks)
                let count = min(64 - bit % 64, Int(stop - block))
                let mask: UInt64 = (count == 64 ? UInt64.max : (1 << UInt64(count)) - 1) << UInt64(bit % 64)
                pages[page, default: ContiguousArray(repeating: 0, count: Int(Self.pageBlocks / 64))][bit / 64] |= mask
                block += UInt64(count)
            }
        }
    }

    func contains(volume: Int, block: UInt64) -> Bool {
        guard let page = pages[Page(volume: volume, number: block / Self.pageBlocks)] else { return false }
        let bit = Int(block % Self.pageBlocks)
        return page[bit / 64] >> UInt64(bit % 64) & 1 == 1
    }
}

import Glibc

/// One bit per tracking block of a disk, with a second level (one bit per 4,096 blocks) so that finding the few set bits of a
/// large, mostly clean disk does not scan all of it. Memory: blocks / 8 bytes, touched only where bits were set.
///
/// Invariant: a set bit's summary bit is set; a summary bit may be set over clean words (it is cleared when a search finds so).
/// Confined to one thread.
final class BlockBitmap {
    let blockCount: UInt64
    /// Number of set bits.
    private(set) var count: UInt64 = 0

    private let words: UnsafeMutablePointer<UInt64>
    private let wordCount: Int
    private let summary: UnsafeMutablePointer<UInt64>
    private let summaryCount: Int

    private static let blocksPerWord: UInt64 = 64
    private static let wordsPerSummaryBit = 64

    init(blockCount: UInt64) {
        self.blockCount = blockCount
        wordCount = Int((blockCount + 63) / 64)
        let chunkCount = (wordCount + Self.wordsPerSummaryBit - 1) / Self.wordsPerSummaryBit
        summaryCount = (chunkCount + 63) / 64
        // calloc, so that pages of blocks never written are never resident.
        words = calloc(max(wordCount, 1), 8).bindMemory(to: UInt64.self, capacity: wordCount)
        summary = calloc(max(summaryCount, 1), 8).bindMemory(to: UInt64.self, capacity: summaryCount)
    }

    deinit {
        free(words)
        free(summary)
    }

    var isEmpty: Bool { count == 0 }

    func contains(_ block: UInt64) -> Bool {
        precondition(block < blockCount)
        return words[Int(block >> 6)] & (1 &<< (block & 63)) != 0
    }

    /// Calls `body(wordIndex, mask)` for every word that [first, first + length) touches.
    @inline(__always)
    private func forEachWord(first: UInt64, length: UInt64, _ body: (Int, UInt64) -> Void) {
        precondition(length > 0 && first < blockCount && length <= blockCount - first)
        let last = first + length - 1
        var word = Int(first >> 6)
        let lastWord = Int(last >> 6)
        var mask = ~UInt64(0) &<< (first & 63)
        let lastMask = ~UInt64(0) &>> (63 - (last & 63))
        while word < lastWord {
            body(word, mask)
            mask = ~0
            word += 1
        }
        body(lastWord, mask & lastMask)
    }

    func set(first: UInt64, length: UInt64) {
        forEachWord(first: first, length: length) { word, mask in
            let old = words[word]
            if old & mask != mask {
                words[word] = old | mask
                count += UInt64((mask & ~old).nonzeroBitCount)
                markSummary(word)
            }
        }
    }

    /// Sets the bits of a whole word, block `number` × 64 being its lowest; those past the end are ignored.
    func formUnion(word number: Int, bits: UInt64) {
        guard number < wordCount else { return }
        let left = blockCount - UInt64(number) * 64
        let bits = left < 64 ? bits & ~(~0 &<< left) : bits
        let old = words[number]
        if old | bits == old { return }
        words[number] = old | bits
        count += UInt64((bits & ~old).nonzeroBitCount)
        markSummary(number)
    }

    /// Calls `body(word number, its bits)` for every word that has some.
    func forEachSetWord(_ body: (Int, UInt64) -> Void) {
        forEachSetChunk { firstWord, chunkWords in
            for word in firstWord..<(firstWord + chunkWords) where words[word] != 0 { body(word, words[word]) }
        }
    }

    func word(_ number: Int) -> UInt64 { words[number] }

    func clear(first: UInt64, length: UInt64) {
        if count == 0 { return }
        forEachWord(first: first, length: length) { word, mask in
            let old = words[word]
            if old & mask != 0 {
                words[word] = old & ~mask
                count -= UInt64((mask & old).nonzeroBitCount)
            }
        }
    }

    func intersects(first: UInt64, length: UInt64) -> Bool {
        if count == 0 { return false }
        var found = false
        forEachWord(first: first, length: length) { word, mask in
            if words[word] & mask != 0 { found = true }
        }
        return found
    }

    @inline(__always)
    private func markSummary(_ word: Int) {
        let chunk = word / Self.wordsPerSummaryBit
        summary[chunk >> 6] |= 1 &<< UInt64(chunk & 63)
    }

    /// The first set block at or after `from`, below `limit`.
    func nextSet(from: UInt64, limit: UInt64 = .max) -> UInt64? {
        let end = min(limit, blockCount)
        if count == 0 || from >= end { return nil }
        var word = Int(from >> 6)
        var bits = words[word] & (~UInt64(0) &<< (from & 63))
        while true {
            if bits != 0 {
                let block = UInt64(word) &* 64 &+ UInt64(bits.trailingZeroBitCount)
                return block < end ? block : nil
            }
            word += 1
            if word % Self.wordsPerSummaryBit == 0 {
                guard let chunk = nextSummary(from: word / Self.wordsPerSummaryBit) else { return nil }
                word = chunk * Self.wordsPerSummaryBit
            }
            if word >= wordCount || UInt64(word) &* 64 >= end { return nil }
            bits = words[word]
        }
    }

    /// The first 4,096-block chunk at or after `from` that has a set bit.
    private func nextSummary(from: Int) -> Int? {
        var chunk = from
        while true {
            guard chunk >> 6 < summaryCount else { return nil }
            let bits = summary[chunk >> 6] & (~UInt64(0) &<< UInt64(chunk & 63))
            if bits == 0 {
                chunk = ((chunk >> 6) + 1) << 6
                continue
            }
            chunk = (chunk >> 6) << 6 + bits.trailingZeroBitCount
            let firstWord = chunk * Self.wordsPerSummaryBit
            for word in firstWord..<min(firstWord + Self.wordsPerSummaryBit, wordCount) where words[word] != 0 {
                return chunk
            }
            summary[chunk >> 6] &= ~(1 &<< UInt64(chunk & 63))
            chunk += 1
        }
    }

    /// Number of consecutive blocks from `first` (at most `limit`) whose bit equals that of `first`.
    func runLength(first: UInt64, limit: UInt64) -> UInt64 {
        let value = contains(first)
        let end = min(blockCount, first + limit)
        var block = first + 1
        while block < end {
            let word = words[Int(block >> 6)]
            let differing = (value ? ~word : word) &>> (block & 63)
            if differing != 0 {
                return min(block + UInt64(differing.trailingZeroBitCount), end) - first
            }
            block = (block | 63) + 1
        }
        return end - first
    }

    func setAll() {
        if blockCount > 0 { set(first: 0, length: blockCount) }
    }

    func clearAll() {
        forEachSetChunk { firstWord, words in
            for word in 0..<words { self.words[firstWord + word] = 0 }
        }
        for i in 0..<summaryCount { summary[i] = 0 }
        count = 0
    }

    func formUnion(_ other: BlockBitmap) {
        precondition(other.blockCount == blockCount)
        other.forEachSetChunk { firstWord, chunkWords in
            for word in firstWord..<(firstWord + chunkWords) where other.words[word] != 0 {
                count += UInt64((other.words[word] & ~words[word]).nonzeroBitCount)
                words[word] |= other.words[word]
                markSummary(word)
            }
        }
    }

    /// Becomes the blocks that are set in both; costs what `few` has, not what `many` has.
    func assignIntersection(_ few: BlockBitmap, _ many: BlockBitmap) {
        precondition(few.blockCount == blockCount && many.blockCount == blockCount)
        clearAll()
        if many.count == 0 { return }
        few.forEachSetChunk { firstWord, chunkWords in
            for word in firstWord..<(firstWord + chunkWords) {
                let both = few.words[word] & many.words[word]
                if both == 0 { continue }
                words[word] = both
                count += UInt64(both.nonzeroBitCount)
                markSummary(word)
            }
        }
    }

    private func forEachSetChunk(_ body: (Int, Int) -> Void) {
        if count == 0 { return }
        var from = 0
        while let chunk = nextSummary(from: from) {
            let firstWord = chunk * Self.wordsPerSummaryBit
            body(firstWord, min(Self.wordsPerSummaryBit, wordCount - firstWord))
            from = chunk + 1
        }
    }
}

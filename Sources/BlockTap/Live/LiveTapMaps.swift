import CLiveTap
import Glibc

/// The memory that the kernel's half of the live tap and ours share: BPF maps, pinned in a directory of a bpffs, so that they outlive the
/// process. The maps and who writes what: `clivetap_abi.h`. Confined to one thread.
///
/// The dirty state of a block, across any end of the process:
///
///     clean ── write issued (kernel) ──► issued[index] ── harvest ──► outstanding ── acknowledged ──► clean
///
/// `harvest` sets the bit in `outstanding` before it takes it from `issued`, so that a process killed in between leaves it in both.
final class LiveTapMaps {
    let state: UnsafeMutablePointer<clivetap_state>
    let disks: UnsafeMutablePointer<clivetap_disk>
    private let slots: UnsafeMutablePointer<clivetap_slot>
    private let slotCount: Int
    private let summary: UnsafeMutablePointer<UInt64>
    private let chunksFD: Int32
    /// At chunk × 3 + {0, 1: issued, 2: outstanding}.
    private var chunks: [UnsafeMutablePointer<UInt64>?]
    private var mappings: [(UnsafeMutableRawPointer, Int)] = []

    static let chunkBlocks = UInt64(1) << UInt64(CLIVETAP_CHUNK_BLOCK_BITS)
    static let chunkWords = Int(chunkBlocks / 64)
    static let chunkSummaryWords = Int(chunkBlocks / summaryBlocks / 64)
    static let summaryBlocks = UInt64(1) << UInt64(CLIVETAP_SUMMARY_BLOCK_BITS)
    private static let outstanding = 2

    static func chunkCount(blocks: UInt64) -> Int { Int((blocks + chunkBlocks - 1) / chunkBlocks) }

    /// The descriptors stay the caller's, but for `chunks`, which is closed with this object.
    init(state: Int32, disks: Int32, slots: Int32, summary: Int32, chunks: Int32) throws(SystemError) {
        func map<T>(_ fd: Int32, _ type: T.Type) throws(SystemError) -> (UnsafeMutablePointer<T>, Int) {
            let count = try Self.entries(of: fd).count
            return (try Self.mapped(fd, bytes: count * MemoryLayout<T>.stride).bindMemory(to: T.self, capacity: count), count)
        }
        chunksFD = chunks
        self.chunks = Array(repeating: nil, count: try Self.entries(of: chunks).count)
        (self.state, _) = try map(state, clivetap_state.self)
        (self.disks, _) = try map(disks, clivetap_disk.self)
        (self.slots, slotCount) = try map(slots, clivetap_slot.self)
        (self.summary, _) = try map(summary, UInt64.self)
        mappings = [
            (UnsafeMutableRawPointer(self.state), MemoryLayout<clivetap_state>.stride),
            (UnsafeMutableRawPointer(self.disks), Int(CLIVETAP_DISKS_MAX) * MemoryLayout<clivetap_disk>.stride),
            (UnsafeMutableRawPointer(self.slots), slotCount * MemoryLayout<clivetap_slot>.stride),
            (UnsafeMutableRawPointer(self.summary), try Self.entries(of: summary).count * 8),
        ]
    }

    deinit {
        for (start, bytes) in mappings { munmap(start, bytes) }
        close(chunksFD)
    }

    private static func entries(of fd: Int32) throws(SystemError) -> (count: Int, bytes: Int) {
        var count: UInt32 = 0, bytes: UInt32 = 0
        let result = clivetap_map_entries(fd, &count, &bytes)
        guard result == 0 else { throw SystemError(errno: -result, doing: "read a map of the live tap") }
        return (Int(count), Int(bytes))
    }

    /// Whether these maps have the form that this program expects (another version's may not).
    static func areOurs(state: Int32, disks: Int32, slots: Int32, summary: Int32) throws(SystemError) -> Bool {
        let forms = (try entries(of: state), try entries(of: disks), try entries(of: slots), try entries(of: summary))
        return forms.0 == (1, MemoryLayout<clivetap_state>.stride) && forms.1 == (Int(CLIVETAP_DISKS_MAX), MemoryLayout<clivetap_disk>.stride)
            && forms.2.bytes == MemoryLayout<clivetap_slot>.stride && forms.3.bytes == 8
    }

    private static func mapped(_ fd: Int32, bytes: Int) throws(SystemError) -> UnsafeMutableRawPointer {
        let start = mmap(nil, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)
        guard let start, start != MAP_FAILED else { throw SystemError(errno: errno, doing: "map \(bytes) bytes of the live tap's memory") }
        return start
    }

    // MARK: Chunks

    /// Makes the bitmaps of a chunk, if they are not there. `chunk` counts over all disks. Until then writes to it are known to 4,096 blocks.
    func ensureChunk(_ chunk: Int) throws(SystemError) {
        // `outstanding` first: it must be there when the kernel begins to use the other two.
        for part in [Self.outstanding, 0, 1] where chunks[chunk * 3 + part] == nil {
            let fd = clivetap_create_words(UInt32(Self.chunkWords))
            guard fd >= 0 else { throw SystemError(errno: -fd, doing: "make a bitmap of the live tap (\(Self.chunkWords * 8 >> 10) KiB)") }
            defer { close(fd) }
            try mapChunk(chunk * 3 + part, fd)
            let result = clivetap_put(chunksFD, UInt32(chunk * 3 + part), UInt32(fd))
            guard result == 0 else { throw SystemError(errno: -result, doing: "hand a bitmap to the live tap's program") }
        }
    }

    /// Maps what an earlier process made.
    func adoptChunks() throws(SystemError) {
        for place in chunks.indices {
            var id: UInt32 = 0
            guard clivetap_look_up(chunksFD, UInt32(place), &id) == 0 else { continue }
            let fd = clivetap_map_by_id(id)
            guard fd >= 0 else { throw SystemError(errno: -fd, doing: "open a bitmap of the live tap") }
            defer { close(fd) }
            try mapChunk(place, fd)
        }
        for chunk in 0..<chunks.count / 3 where (0..<3).contains(where: { chunks[chunk * 3 + $0] != nil }) { try ensureChunk(chunk) }
        // A process killed in the middle of a harvest may have cleared a summary bit and not yet taken the words below it.
        for chunk in 0..<chunks.count / 3 {
            for index in 0..<2 {
                guard let words = chunks[chunk * 3 + index] else { continue }
                for word in 0..<Self.chunkWords where words[word] != 0 {
                    let bit = word >> (Int(CLIVETAP_SUMMARY_BLOCK_BITS) - 6)
                    let place = section(Int(CLIVETAP_SUMMARY_ISSUED) + index) + chunk * Self.chunkSummaryWords + bit >> 6
                    var old = clivetap_load_word(summary + place)
                    while !clivetap_compare_exchange(summary + place, &old, old | 1 &<< UInt64(bit & 63)) {}
                }
            }
        }
    }

    private func mapChunk(_ place: Int, _ fd: Int32) throws(SystemError) {
        let memory = try Self.mapped(fd, bytes: Self.chunkWords * 8)
        mappings.append((memory, Self.chunkWords * 8))
        chunks[place] = memory.bindMemory(to: UInt64.self, capacity: Self.chunkWords)
    }

    private func section(_ number: Int) -> Int { number * Int(state.pointee.summary_words) }

    /// Bytes of bitmaps in the kernel's memory.
    var bitmapBytes: Int { chunks.lazy.filter { $0 != nil }.count * Self.chunkWords * 8 }

    // MARK: The shared index

    var index: Int { Int(clivetap_load_word(indexPointer) & 1) }

    /// The cut: from now on every write of every disk is marked in the other buffer.
    func flip() { clivetap_store_word(indexPointer, clivetap_load_word(indexPointer) &+ 1) }

    private var indexPointer: UnsafeMutablePointer<UInt64> {
        UnsafeMutableRawPointer(state).advanced(by: MemoryLayout<clivetap_state>.offset(of: \.index)!).assumingMemoryBound(to: UInt64.self)
    }

    // MARK: Bits

    /// Whether a write to the block may have been issued since the cut before.
    func isIssued(disk: Int, block: UInt64) -> Bool {
        let index = index
        let chunk = Int(disks[disk].chunk_base) + Int(block / Self.chunkBlocks)
        let inChunk = block % Self.chunkBlocks
        if let words = chunks[chunk * 3 + index], clivetap_load_word(words + Int(inChunk >> 6)) & (1 &<< (inChunk & 63)) != 0 { return true }
        let bit = inChunk / Self.summaryBlocks
        let coarse = section(Int(CLIVETAP_SUMMARY_COARSE) + index) + chunk * Self.chunkSummaryWords + Int(bit >> 6)
        return clivetap_load_word(summary + coarse) & (1 &<< (bit & 63)) != 0
    }

    /// Moves the bits of one buffer of one disk to `outstanding` and to `dirty`.
    func harvest(_ index: Int, disk: Int, blockCount: UInt64, into dirty: BlockBitmap) throws(SystemError) {
        let base = Int(disks[disk].chunk_base), count = Int(disks[disk].chunk_count)
        let coarse = summary + section(Int(CLIVETAP_SUMMARY_COARSE) + index) + base * Self.chunkSummaryWords
        for word in 0..<count * Self.chunkSummaryWords {
            var bits = clivetap_load_word(coarse + word)
            if bits == 0 { continue }
            try ensureChunk(base + word / Self.chunkSummaryWords)
            repeat {
                forEachBit(bits) { bit in
                    let first = UInt64(word * 64 + bit) * Self.summaryBlocks
                    guard first < blockCount else { return }
                    let length = min(Self.summaryBlocks, blockCount - first)
                    dirty.set(first: first, length: length)
                    let outstanding = chunks[(base + Int(first / Self.chunkBlocks)) * 3 + Self.outstanding]! + Int(first % Self.chunkBlocks >> 6)
                    for i in 0..<Int(length + 63) / 64 { outstanding[i] = i < Int(length) / 64 ? ~0 : outstanding[i] | ~(~0 &<< (length & 63)) }
                }
            } while !clivetap_compare_exchange(coarse + word, &bits, 0)
        }
        let fine = summary + section(Int(CLIVETAP_SUMMARY_ISSUED) + index) + base * Self.chunkSummaryWords
        for word in 0..<count * Self.chunkSummaryWords where clivetap_load_word(fine + word) != 0 {
            // Before the words: a word that is set later sets its summary bit again.
            let bits = clivetap_exchange(fine + word, 0)
            let chunk = word / Self.chunkSummaryWords
            guard let issued = chunks[(base + chunk) * 3 + index], let outstanding = chunks[(base + chunk) * 3 + Self.outstanding] else { continue }
            forEachBit(bits) { bit in
                let first = (word % Self.chunkSummaryWords * 64 + bit) * Int(Self.summaryBlocks / 64)
                for i in first..<first + Int(Self.summaryBlocks / 64) {
                    var old = clivetap_load_word(issued + i)
                    if old == 0 { continue }
                    repeat { outstanding[i] |= old } while !clivetap_compare_exchange(issued + i, &old, 0)
                    dirty.formUnion(word: chunk * Self.chunkWords + i, bits: old)
                }
            }
        }
    }

    private func forEachBit(_ bits: UInt64, _ body: (Int) -> Void) {
        var rest = bits
        while rest != 0 {
            body(rest.trailingZeroBitCount)
            rest &= rest &- 1
        }
    }

    /// What earlier processes harvested and nobody has acknowledged.
    func collectOutstanding(disk: Int, into dirty: BlockBitmap) {
        for chunk in 0..<Int(disks[disk].chunk_count) {
            guard let words = chunks[(Int(disks[disk].chunk_base) + chunk) * 3 + Self.outstanding] else { continue }
            for word in 0..<Self.chunkWords where words[word] != 0 { dirty.formUnion(word: chunk * Self.chunkWords + word, bits: words[word]) }
        }
    }

    /// The replica has these. `keep`: of whom a newer write is known.
    func acknowledge(disk: Int, _ blocks: BlockBitmap, keep: [BlockBitmap]) {
        blocks.forEachSetWord { word, bits in
            let kept = keep.reduce(0) { $0 | $1.word(word) }
            let chunk = Int(disks[disk].chunk_base) + word / Self.chunkWords
            chunks[chunk * 3 + Self.outstanding]?[word % Self.chunkWords] &= ~(bits & ~kept)
        }
    }

    /// Into `outstanding`: a block of which we alone know that it has changed. Its chunk is made if it is not there.
    func setOutstanding(disk: Int, _ blocks: BlockBitmap) throws(SystemError) {
        var failure: SystemError?
        blocks.forEachSetWord { word, bits in
            let chunk = Int(disks[disk].chunk_base) + word / Self.chunkWords
            do throws(SystemError) { try ensureChunk(chunk) } catch { failure = error }
            chunks[chunk * 3 + Self.outstanding]?[word % Self.chunkWords] |= bits
        }
        if let failure { throw failure }
    }

    // MARK: In flight

    /// The blocks of every write that was issued and is not known to have ended. `marked`: every block that has a mark of such a write, unless that is in a
    /// buffer which is still to be taken. A discard of many ranges has only what they span in its slot, which may be the whole disk: of that, the marked ones.
    func collectInFlight(disk: Int, blockCount: UInt64, marked: BlockBitmap, into blocks: BlockBitmap) {
        forEachSlot(disk) { slot in
            guard slot.sectors != 0, slot.first < blockCount, slot.last >= slot.first else { return }
            let length = min(slot.last, blockCount - 1) - slot.first + 1
            if slot.last - slot.first <= UInt64(slot.sectors) / UInt64(blockBytes / 512) + 1 { return blocks.set(first: slot.first, length: length) }
            var position = slot.first
            while position < slot.first + length, let block = marked.nextSet(from: position), block < slot.first + length {
                let run: UInt64 = marked.runLength(first: block, limit: slot.first + length - block)
                blocks.set(first: block, length: run)
                position = block + run
            }
        }
    }

    /// Of every write that was issued and is not known to have ended, as the program keeps the sum.
    func sectorsInFlight(disk: Int) -> Int64 { Int64(bitPattern: clivetap_load_word(sectorsPointer(disk))) }

    private func sectorsPointer(_ disk: Int) -> UnsafePointer<UInt64> {
        UnsafeRawPointer(disks + disk).advanced(by: MemoryLayout<clivetap_disk>.offset(of: \.slot_sectors)!).assumingMemoryBound(to: UInt64.self)
    }

    /// Hardware queues with a tag that is in use, as far as is known.
    func queuesInFlight(disk: Int) -> [Int] {
        let first = Int(disks[disk].slot_base), tags = Int(disks[disk].tag_count)
        return (0..<Int(disks[disk].queue_count)).filter { queue in
            (first + queue * tags..<first + (queue + 1) * tags).contains { slots[$0].sectors != 0 }
        }
    }

    /// A slot that was in use, as it was then.
    struct SlotInUse {
        fileprivate let place: Int
        fileprivate let event: UInt32
    }

    /// And what they have.
    func slotsInUse(disk: Int) -> (inUse: [SlotInUse], sectors: Int64) {
        var inUse: [SlotInUse] = [], sum: Int64 = 0
        let first = Int(disks[disk].slot_base)
        for place in first..<first + Int(disks[disk].queue_count * disks[disk].tag_count) {
            let sectors = slots[place].sectors
            if sectors == 0 { continue }
            inUse.append(SlotInUse(place: place, event: slots[place].event))
            sum += Int64(sectors)
        }
        return (inUse, sum)
    }

    /// Whether it has been in use by the same write since.
    func isInUse(_ slot: SlotInUse) -> Bool { slots[slot.place].sectors != 0 && slots[slot.place].event == slot.event }

    /// Whether every tag has been issued since the tap was attached: then every write issued before that has ended.
    func isEveryTagSeen(disk: Int) -> Bool {
        var result = true
        forEachSlot(disk) { if $0.event == 0 && $0.is_touched == 0 { result = false } }
        return result
    }

    private func forEachSlot(_ disk: Int, _ body: (clivetap_slot) -> Void) {
        let first = Int(disks[disk].slot_base)
        for i in first..<first + Int(disks[disk].queue_count * disks[disk].tag_count) { body(slots[i]) }
    }
}

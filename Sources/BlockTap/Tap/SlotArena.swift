import Glibc

/// Fixed page-aligned memory cut into block-sized slots; runs of slots are handed out contiguously. Holds the old content of
/// blocks that were overwritten before they were drained. Confined to one thread.
final class SlotArena {
    let slotCount: Int
    private(set) var usedCount = 0
    let base: UnsafeMutableRawPointer
    private let used: BlockBitmap
    private var hint: UInt64 = 0

    init(slotCount: Int) {
        precondition(slotCount > 0)
        self.slotCount = slotCount
        var memory: UnsafeMutableRawPointer?
        precondition(posix_memalign(&memory, blockBytes, slotCount * blockBytes) == 0, "no memory for preserved blocks")
        base = memory!
        used = BlockBitmap(blockCount: UInt64(slotCount))
    }

    deinit { free(base) }

    func memory(_ slot: Int) -> UnsafeMutableRawPointer { base + slot * blockBytes }

    /// A contiguous run of at most `wanted` slots, or nil when all are used. The run may be shorter than wanted.
    func allocate(wanted: Int) -> (slot: Int, count: Int)? {
        guard usedCount < slotCount else { return nil }
        var position = hint
        for _ in 0..<2 {
            while position < UInt64(slotCount) {
                if !used.contains(position) {
                    let run = used.runLength(first: position, limit: UInt64(wanted))
                    used.set(first: position, length: run)
                    usedCount += Int(run)
                    hint = position + run
                    return (Int(position), Int(run))
                }
                position += used.runLength(first: position, limit: UInt64(slotCount))
            }
            position = 0
        }
        return nil
    }

    func release(slot: Int, count: Int) {
        used.clear(first: UInt64(slot), length: UInt64(count))
        usedCount -= count
    }
}

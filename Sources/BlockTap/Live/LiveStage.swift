import Glibc

/// Memory for the blocks of one epoch while its rounds run: one place per block, read into as often as it collides. Confined to one thread.
final class LiveStage {
    struct Place: Hashable {
        var disk: Int
        var block: UInt64
    }

    let blockCount: Int
    private let memory: UnsafeMutableRawPointer
    private var slots: [Place: Int] = [:]

    init(blockCount: Int) {
        self.blockCount = max(1, blockCount)
        var memory: UnsafeMutableRawPointer?
        precondition(posix_memalign(&memory, blockBytes, self.blockCount * blockBytes) == 0, "no memory for the live tap's stage")
        self.memory = memory!
    }

    deinit { free(memory) }

    func clear() { slots.removeAll(keepingCapacity: slots.count < 4096) }

    /// The block's place; a new one if it has none. The caller sees to it that there are enough.
    func slot(disk: Int, block: UInt64) -> Int {
        let place = Place(disk: disk, block: block)
        if let slot = slots[place] { return slot }
        let slot = slots.count
        precondition(slot < blockCount, "more blocks than the stage has places")
        slots[place] = slot
        return slot
    }

    func memory(_ slot: Int) -> UnsafeMutableRawPointer { memory + slot * blockBytes }

    static func isZero(_ memory: UnsafeRawPointer, _ bytes: Int) -> Bool {
        bytes >= 8 && memory.load(as: UInt64.self) == 0 && memcmp(memory, memory + 8, bytes - 8) == 0
    }
}

import CLiveTap
import Glibc

/// Memory for the blocks of one epoch while its rounds run: one place per block, read into as often as it collides. Only what has been used is
/// there, and most of it is given back with the epoch. Confined to one thread.
final class LiveStage {
    struct Place: Hashable {
        var disk: Int
        var block: UInt64
    }

    let blockCount: Int
    private let memory: UnsafeMutableRawPointer
    private var slots: [Place: Int] = [:]
    /// Not given back: most epochs are not larger.
    private static let keptBlocks = (16 << 20) / blockBytes

    init(blockCount: Int) throws(SystemError) {
        self.blockCount = max(1, blockCount)
        guard let memory = clivetap_reserve(self.blockCount * blockBytes) else {
            throw SystemError(errno: ENOMEM, doing: "reserve \(self.blockCount * blockBytes >> 20) MiB for the live tap's stage")
        }
        self.memory = memory
    }

    deinit { clivetap_unreserve(memory, blockCount * blockBytes) }

    func clear() {
        if slots.count > Self.keptBlocks {
            clivetap_give_back(memory + Self.keptBlocks * blockBytes, (slots.count - Self.keptBlocks) * blockBytes)
        }
        slots.removeAll(keepingCapacity: slots.count <= Self.keptBlocks)
    }

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

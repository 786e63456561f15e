/// One I/O of a tapped disk on its way: a slot of the disk's fixed slab, named by its index in every device call.
struct TapOperation {
    enum Kind: UInt8 {
        case free
        case read, write, zero, flush  // of a client
        case drainRead  // of a closed epoch's block, into a drain buffer
        case preserveRead  // of a closed epoch's block about to be overwritten (copy-before-write)
    }

    enum Stage: UInt8 {
        /// A write held back until reads of the closed epoch's blocks have ended.
        case waiting
        case issued
    }

    var kind: Kind = .free
    var stage: Stage = .issued
    /// For `zero`: no other write touched the range while it was in flight, so that afterwards the blocks are known to be zero.
    var isExclusive = false
    /// For `zero`: the device could not punch; now writing zeroes.
    var isFallback = false
    var request: BlockRequestPointer?
    var firstBlock: UInt64 = 0
    var blockCount: UInt64 = 0
    /// Bytes already done, when the device answered short.
    var doneBytes: Int = 0
    var lengthBytes: Int = 0
    /// For `drainRead` and `preserveRead`: the epoch it belongs to; stale when that has been abandoned.
    var epoch: EpochNumber = .none
    /// For `drainRead` the drain buffer, for `preserveRead` the arena slot.
    var slot: Int = 0
    var nextFree: Int32 = -1

    @inline(__always)
    func overlaps(first: UInt64, count: UInt64) -> Bool {
        firstBlock < first &+ count && first < firstBlock &+ blockCount
    }
}

/// Fixed slab of operations with an intrusive free list.
struct TapOperationSlab: ~Copyable {
    let capacity: Int
    private(set) var freeCount: Int
    private let entries: UnsafeMutablePointer<TapOperation>
    private var firstFree: Int32

    init(capacity: Int) {
        self.capacity = capacity
        freeCount = capacity
        entries = .allocate(capacity: capacity)
        entries.initialize(repeating: TapOperation(), count: capacity)
        for i in 0..<capacity { entries[i].nextFree = i + 1 < capacity ? Int32(i + 1) : -1 }
        firstFree = 0
    }

    deinit {
        entries.deinitialize(count: capacity)
        entries.deallocate()
    }

    subscript(_ index: Int) -> UnsafeMutablePointer<TapOperation> {
        @inline(__always) get { entries + index }
    }

    mutating func take(_ kind: TapOperation.Kind) -> Int? {
        guard firstFree >= 0 else { return nil }
        let index = Int(firstFree)
        firstFree = entries[index].nextFree
        freeCount -= 1
        entries[index] = TapOperation(kind: kind)
        return index
    }

    mutating func release(_ index: Int) {
        precondition(entries[index].kind != .free, "a tap operation ended twice")
        entries[index].kind = .free
        entries[index].request = nil
        entries[index].nextFree = firstFree
        firstFree = Int32(index)
        freeCount += 1
    }
}

/// The requests in flight of one server: a fixed number of slots, each from its header's arrival until its reply is sent.
/// A slot's index is its request's token.
struct NBDSlab: ~Copyable {
    static let slotCount = 1024
    static let none: Int32 = -1

    struct Slot {
        /// The reply's header as it goes over the wire, in place until it is sent.
        var replyMagic: UInt32 = NBD.replyMagic.bigEndian
        var replyError: UInt32 = 0
        var replyCookie: UInt64 = 0
        var connection: Unmanaged<NBDConnection>?
        /// Arena chunks held; none when `chunkCount` is 0.
        var firstChunk: Int32 = 0
        var chunkCount: Int32 = 0
        /// The next slot of whatever list this one is on.
        var next: Int32 = NBDSlab.none
        /// Bytes of data after the reply's header.
        var replyBytes: UInt32 = 0
    }

    let slots: UnsafeMutablePointer<Slot>
    /// Parallel to `slots`.
    let requests: UnsafeMutablePointer<BlockRequest>
    private var firstFree: Int32 = 0

    init() {
        slots = .allocate(capacity: Self.slotCount)
        requests = .allocate(capacity: Self.slotCount)
        slots.initialize(repeating: Slot(), count: Self.slotCount)
        for index in 0..<Self.slotCount {
            slots[index].next = index + 1 < Self.slotCount ? Int32(index + 1) : Self.none
        }
        precondition(MemoryLayout<Slot>.offset(of: \.replyCookie) == 8, "the reply header is laid out as on the wire")
    }

    /// Once, before the first `take`: who is told of completions.
    func setOwner(_ owner: BlockRequestOwner) {
        for index in 0..<Self.slotCount {
            (requests + index).initialize(to: BlockRequest(owner: .passUnretained(owner), token: UInt32(index)))
        }
    }

    deinit {
        slots.deallocate()
        requests.deallocate()
    }

    mutating func take() -> Int32? {
        let index = firstFree
        guard index != Self.none else { return nil }
        firstFree = slots[Int(index)].next
        slots[Int(index)].next = Self.none
        return index
    }

    mutating func give(back index: Int32) {
        slots[Int(index)].connection = nil
        slots[Int(index)].next = firstFree
        firstFree = index
    }
}

import Glibc

/// The replies of one connection, in the order in which they became ready: those being sent (in the iovecs of one sendmsg) and those
/// that come after. During the handshake, the bytes of its answers instead.
struct NBDReplyQueue: ~Copyable {
    /// Two iovecs per reply with data; below IOV_MAX.
    static let vectorCountMax = 512

    /// Handshake bytes not yet sent.
    var control: [UInt8] = []
    private var controlInFlight: UnsafeMutableRawBufferPointer?

    private var first = NBDSlab.none
    private var last = NBDSlab.none
    private var firstInFlight = NBDSlab.none
    private(set) var isSending = false

    private let message: UnsafeMutablePointer<msghdr>
    private let vectors: UnsafeMutablePointer<iovec>
    private var vectorIndex = 0
    private var vectorCount = 0

    init() {
        message = .allocate(capacity: 1)
        message.initialize(to: msghdr())
        vectors = .allocate(capacity: Self.vectorCountMax)
        vectors.initialize(repeating: iovec(), count: Self.vectorCountMax)
    }

    deinit {
        message.deallocate()
        vectors.deallocate()
        controlInFlight?.deallocate()
    }

    var isIdle: Bool { !isSending && first == NBDSlab.none && control.isEmpty && vectorIndex == vectorCount }

    @inline(__always) mutating func append(_ index: Int32, slots: UnsafeMutablePointer<NBDSlab.Slot>) {
        if last == NBDSlab.none { first = index } else { slots[Int(last)].next = index }
        last = index
        slots[Int(index)].next = NBDSlab.none
    }

    /// What to send next, now in flight; nil when a send is in flight already or there is nothing.
    mutating func nextMessage(_ core: NBDServerCore) -> UnsafePointer<msghdr>? {
        guard !isSending else { return nil }
        if vectorIndex == vectorCount {
            vectorIndex = 0
            vectorCount = 0
            if !control.isEmpty { gatherControl() } else { gatherReplies(core.slab.slots, core) }
            if vectorCount == 0 { return nil }
        }
        isSending = true
        message.pointee.msg_iov = vectors + vectorIndex
        message.pointee.msg_iovlen = vectorCount - vectorIndex
        return UnsafePointer(message)
    }

    private mutating func gatherControl() {
        let bytes = UnsafeMutableRawBufferPointer.allocate(byteCount: control.count, alignment: 1)
        bytes.copyBytes(from: control)
        control = []
        controlInFlight = bytes
        vectors[0] = iovec(iov_base: bytes.baseAddress, iov_len: bytes.count)
        vectorCount = 1
    }

    private mutating func gatherReplies(_ slots: UnsafeMutablePointer<NBDSlab.Slot>, _ core: NBDServerCore) {
        firstInFlight = first
        var index = first
        var lastTaken = NBDSlab.none
        while index != NBDSlab.none && vectorCount + 2 <= Self.vectorCountMax {
            let slot = slots + Int(index)
            vectors[vectorCount] = iovec(iov_base: UnsafeMutableRawPointer(slot), iov_len: NBD.replyHeaderBytes)
            vectorCount += 1
            if slot.pointee.replyBytes > 0 {
                let data = core.arena.pointer(chunk: Int(slot.pointee.firstChunk))
                vectors[vectorCount] = iovec(iov_base: data, iov_len: Int(slot.pointee.replyBytes))
                vectorCount += 1
            }
            lastTaken = index
            index = slot.pointee.next
        }
        if lastTaken != NBDSlab.none { slots[Int(lastTaken)].next = NBDSlab.none }
        first = index
        if index == NBDSlab.none { last = NBDSlab.none }
    }

    /// `count` bytes have left; when the message is all out, its slots are given back.
    mutating func sent(_ count: Int, _ core: NBDServerCore) {
        isSending = false
        var rest = count
        while vectorIndex < vectorCount && rest >= vectors[vectorIndex].iov_len {
            rest -= vectors[vectorIndex].iov_len
            vectorIndex += 1
        }
        if vectorIndex < vectorCount {
            vectors[vectorIndex].iov_base += rest
            vectors[vectorIndex].iov_len -= rest
            return
        }
        releaseInFlight(core)
    }

    mutating func sendFailed(_ core: NBDServerCore) {
        isSending = false
        vectorIndex = vectorCount
        releaseInFlight(core)
    }

    /// Gives back what will not be sent any more; what is in flight is not touched.
    mutating func drop(_ core: NBDServerCore) {
        control = []
        Self.release(from: first, core)
        first = NBDSlab.none
        last = NBDSlab.none
        if !isSending { sendFailed(core) }
    }

    private mutating func releaseInFlight(_ core: NBDServerCore) {
        controlInFlight?.deallocate()
        controlInFlight = nil
        Self.release(from: firstInFlight, core)
        firstInFlight = NBDSlab.none
    }

    private static func release(from first: Int32, _ core: NBDServerCore) {
        var index = first
        while index != NBDSlab.none {
            let next = core.slab.slots[Int(index)].next
            core.giveBack(index)
            index = next
        }
    }
}

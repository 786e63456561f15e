/// Receives the completions of what was submitted in its name. Subclassed; all calls are made on the loop's thread.
open class IOHandler {
    public init() {}

    /// Something submitted with this `token` ended. `result` is what the system call would have returned (bytes for reads and
    /// writes, a descriptor for accept, …) or a negative errno. Reads and writes may be short: the handler submits the rest.
    open func ioCompleted(token: UInt32, result: Int32) { fatalError("abstract") }

    /// The completions of one batch have all been handed out; called once after `EventLoop.afterBatch` asked for it.
    /// What is submitted here still goes to the kernel together with the batch.
    open func batchEnded() {}
}

/// Names a registered handler: its place in the loop's table and the place's generation, so that a completion that
/// arrives after `unregister` reaches nobody.
public struct HandlerID: Hashable, Sendable {
    let slot: UInt16
    let generation: UInt16

    /// `user_data` = slot (16 bits) | generation (16 bits) | token (32 bits).
    @inline(__always) func userData(token: UInt32) -> UInt64 {
        UInt64(slot) &<< 48 | UInt64(generation) &<< 32 | UInt64(token)
    }
}

/// The loop's handlers by slot. Slot 0 is the loop's own. A slot's generation grows each time it is given back.
final class HandlerTable {
    static let capacity = 4096

    private struct Slot {
        var handler: Unmanaged<IOHandler>?
        var generation: UInt16 = 0
        var wantsBatchEnd = false
    }

    private let slots: UnsafeMutablePointer<Slot>
    private var used = 1
    private var free: [UInt16] = []
    /// Unregistered during a batch: released only when nobody can be inside one of their methods.
    private var retired: [Unmanaged<IOHandler>] = []
    private var batchEnders: [HandlerID] = []

    init() {
        slots = .allocate(capacity: Self.capacity)
        slots.initialize(repeating: Slot(), count: Self.capacity)
        batchEnders.reserveCapacity(Self.capacity)
    }

    deinit {
        for index in 1..<used { slots[index].handler?.release() }
        releaseRetired()
        slots.deallocate()
    }

    func add(_ handler: IOHandler) -> HandlerID {
        let slot: UInt16
        if let reused = free.popLast() {
            slot = reused
        } else {
            precondition(used < Self.capacity, "more than \(Self.capacity) handlers on one event loop")
            slot = UInt16(used)
            used += 1
        }
        slots[Int(slot)].handler = .passRetained(handler)
        return HandlerID(slot: slot, generation: slots[Int(slot)].generation)
    }

    func remove(_ id: HandlerID) {
        let slot = slots + Int(id.slot)
        guard slot.pointee.generation == id.generation, let handler = slot.pointee.handler else { return }
        retired.append(handler)
        slot.pointee = Slot(handler: nil, generation: id.generation &+ 1)
        free.append(id.slot)
    }

    @inline(__always) func dispatch(userData: UInt64, result: Int32) {
        let slot = slots + Int(truncatingIfNeeded: userData &>> 48)
        guard slot.pointee.generation == UInt16(truncatingIfNeeded: userData &>> 32),
            let handler = slot.pointee.handler
        else { return }
        handler._withUnsafeGuaranteedRef {
            $0.ioCompleted(token: UInt32(truncatingIfNeeded: userData), result: result)
        }
    }

    @inline(__always) func wantBatchEnd(_ id: HandlerID) {
        let slot = slots + Int(id.slot)
        guard slot.pointee.generation == id.generation, !slot.pointee.wantsBatchEnd else { return }
        slot.pointee.wantsBatchEnd = true
        batchEnders.append(id)
    }

    var hasBatchEnders: Bool { !batchEnders.isEmpty }

    /// The handler that asked first, no longer asking; nil when it has been unregistered since.
    func takeBatchEnder(at index: Int) -> Unmanaged<IOHandler>? {
        let id = batchEnders[index]
        let slot = slots + Int(id.slot)
        guard slot.pointee.generation == id.generation else { return nil }
        slot.pointee.wantsBatchEnd = false
        return slot.pointee.handler
    }

    var batchEnderCount: Int { batchEnders.count }
    func clearBatchEnders() { batchEnders.removeAll(keepingCapacity: true) }

    func releaseRetired() {
        for handler in retired { handler.release() }
        retired.removeAll(keepingCapacity: true)
    }
}

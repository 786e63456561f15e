import Glibc
import Synchronization

/// The border between the tap's thread and the consumer's: a bounded queue of items one way, a fixed set of buffers the other.
/// One lock per drained run (not per request of the protected machine).
package final class DrainQueue: @unchecked Sendable {
    package static let bufferBytes = 256 << 10
    private static let itemsMax = 1024

    private struct State {
        var items: [DrainItem] = []
        var head = 0
        var freeSlots: [Int] = []
        /// The tap had to stop for want of a buffer or of room.
        var starved = false
        var wakeup: (@Sendable () -> Void)?
        var count: Int { items.count - head }
    }

    private let state: Mutex<State>
    private let memory: UnsafeMutableRawPointer
    let bufferCount: Int
    /// Called (any thread) when a starved tap can go on.
    package nonisolated(unsafe) var resume: (@Sendable () -> Void)?

    init(bufferCount: Int) {
        self.bufferCount = bufferCount
        var memory: UnsafeMutableRawPointer?
        precondition(posix_memalign(&memory, blockBytes, bufferCount * Self.bufferBytes) == 0, "no memory for drain buffers")
        self.memory = memory!
        var state = State()
        state.freeSlots = Array(0..<bufferCount)
        state.items.reserveCapacity(Self.itemsMax * 2)
        self.state = Mutex(state)
    }

    deinit { free(memory) }

    package func memory(slot: Int) -> UnsafeMutableRawPointer { memory + slot * Self.bufferBytes }

    // MARK: the tap's side

    /// A free buffer, or nil: then `resume` is called when there is one.
    func takeBuffer() -> Int? {
        state.withLock { s in
            if let slot = s.freeSlots.popLast() { return slot }
            s.starved = true
            return nil
        }
    }

    /// Whether an item without a buffer may be added; if not, `resume` is called when it may.
    func hasRoom() -> Bool {
        state.withLock { s in
            if s.count < Self.itemsMax { return true }
            s.starved = true
            return false
        }
    }

    func push(_ item: DrainItem) {
        let wakeup = state.withLock { s in
            s.items.append(item)
            return s.count == 1 ? s.wakeup : nil
        }
        wakeup?()
    }

    /// Drops everything queued; its buffers become free.
    func clear() {
        state.withLock { s in
            for item in s.items[s.head...] {
                if case .data(_, let buffer) = item { s.freeSlots.append(buffer.slot) }
            }
            s.items.removeAll(keepingCapacity: true)
            s.head = 0
        }
    }

    package func freeBuffer(slot: Int) {
        let resume = state.withLock { s in
            s.freeSlots.append(slot)
            precondition(s.freeSlots.count <= bufferCount, "a drain buffer was released twice")
            if s.starved {
                s.starved = false
                return true
            }
            return false
        }
        if resume { self.resume?() }
    }

    // MARK: the consumer's side

    package func pop() -> DrainItem? {
        let (item, resume): (DrainItem?, Bool) = state.withLock { s in
            guard s.head < s.items.count else { return (nil, false) }
            let item = s.items[s.head]
            s.head += 1
            if s.head == s.items.count {
                s.items.removeAll(keepingCapacity: true)
                s.head = 0
            } else if s.head >= Self.itemsMax {
                s.items.removeFirst(s.head)
                s.head = 0
            }
            if s.starved && s.count <= Self.itemsMax / 2 && !s.freeSlots.isEmpty {
                s.starved = false
                return (item, true)
            }
            return (item, false)
        }
        if resume { self.resume?() }
        return item
    }

    package func setWakeup(_ wakeup: (@Sendable () -> Void)?) {
        let pending = state.withLock { s in
            s.wakeup = wakeup
            return s.count > 0
        }
        if pending { wakeup?() }
    }
}

import Glibc

/// What the connections of a server share: exports, slots, arena, and who waits for them. On-loop only.
///
/// A request's slot is taken when its header has been read and given back when its reply is sent; the memory of a WRITE comes back
/// as soon as the store is done with it. A connection that finds no slot or memory stops reading and joins `waiting`;
/// while anybody waits, others queue behind, so that a large request cannot starve.
final class NBDServerCore: BlockRequestOwner, @unchecked Sendable {
    let loop: EventLoop
    let exports: [NBDExport]
    let log: @Sendable (String) -> Void
    private(set) var slab = NBDSlab()
    private(set) var arena: NBDArena
    private let listener: NBDListener
    private var connections: [ObjectIdentifier: NBDConnection] = [:]
    private var waiting: [NBDConnection] = []
    private var stopContinuations: [() -> Void] = []
    private var isStopping = false
    private var isStopped = false
    private var isPinned = false
    /// The loop's handlers point here without owning it: it stays until it has been stopped.
    private var whileStarted: NBDServerCore?

    init(
        loop: EventLoop, exports: [NBDExport], listener fd: Int32, address: NBDListenAddress,
        log: @escaping @Sendable (String) -> Void
    ) throws(SystemError) {
        self.loop = loop
        self.exports = exports
        self.log = log
        arena = try NBDArena()
        listener = NBDListener(fd: fd, address: address)
        super.init()
        slab.setOwner(self)
        listener.core = self
    }

    func start() {
        guard !isStopping else { return }
        loop.addFixedBuffer(pinned)
        isPinned = true
        whileStarted = self
        listener.start(on: loop)
    }

    private var pinned: UnsafeMutableRawBufferPointer { .init(start: arena.base, count: NBDArena.pinnedBytes) }

    // MARK: Connections

    static let connectionCountMax = 128
    var connectionCount: Int { connections.count }

    func accepted(_ fd: Int32) {
        guard !isStopping else {
            close(fd)
            return
        }
        guard connections.count < Self.connectionCountMax else {
            log("NBD client refused: \(connections.count) connections are open, which is the limit")
            close(fd)
            return
        }
        let connection = NBDConnection(fd: fd, core: self)
        connections[ObjectIdentifier(connection)] = connection
        connection.start()
    }

    func ended(_ connection: NBDConnection) {
        waiting.removeAll { $0 === connection }
        connections[ObjectIdentifier(connection)] = nil
        finishStopping()
    }

    // MARK: Slots and memory

    /// A slot with `bytes` of memory (none for 0), or nil: then `connection` is waiting and `resume` is called later.
    @inline(__always) func take(bytes: Int, for connection: NBDConnection) -> Int32? {
        if !waiting.isEmpty && waiting[0] !== connection {
            wait(connection)
            return nil
        }
        guard let index = slab.take() else {
            wait(connection)
            return nil
        }
        let slot = slab.slots + Int(index)
        if bytes > 0 {
            let count = NBDArena.chunks(for: bytes)
            guard let chunk = arena.take(count) else {
                slab.give(back: index)
                wait(connection)
                return nil
            }
            slot.pointee.firstChunk = Int32(chunk)
            slot.pointee.chunkCount = Int32(count)
        }
        slot.pointee.connection = .passUnretained(connection)
        if !waiting.isEmpty { waiting.removeFirst() }
        return index
    }

    private func wait(_ connection: NBDConnection) {
        if waiting.isEmpty { listener.startStallTimer() }
        if !waiting.contains(where: { $0 === connection }) { waiting.append(connection) }
    }

    @inline(__always) func giveBackMemory(of index: Int32) {
        let slot = slab.slots + Int(index)
        guard slot.pointee.chunkCount > 0 else { return }
        arena.give(back: Int(slot.pointee.firstChunk), count: Int(slot.pointee.chunkCount))
        slot.pointee.chunkCount = 0
        if !waiting.isEmpty { listener.resumeWaitingAfterBatch() }
    }

    @inline(__always) func giveBack(_ index: Int32) {
        giveBackMemory(of: index)
        slab.give(back: index)
        if !waiting.isEmpty { listener.resumeWaitingAfterBatch() }
    }

    func resumeWaiting() {
        while let first = waiting.first {
            first.resume()
            if waiting.first === first { return }
        }
    }

    /// Some have waited for long: cut off those who sit on memory without taking replies or sending payload.
    func cutOffStalled() -> Bool {
        for connection in Array(connections.values) { connection.closeIfStalled() }
        return !waiting.isEmpty
    }

    func forgetWaiting(_ connection: NBDConnection) {
        waiting.removeAll { $0 === connection }
        if !waiting.isEmpty { listener.resumeWaitingAfterBatch() }
    }

    override func requestCompleted(_ request: BlockRequestPointer, error: Int32) {
        let index = Int32(request.pointee.token)
        slab.slots[Int(index)].connection!._withUnsafeGuaranteedRef { $0.requestCompleted(index, error: error) }
    }

    // MARK: Stopping

    func stop(_ done: @escaping () -> Void) {
        if isStopped { return done() }
        stopContinuations.append(done)
        guard !isStopping else { return }
        isStopping = true
        listener.stop()
        for connection in Array(connections.values) { connection.drain() }
        if !connections.isEmpty { listener.startStopTimer() }
        finishStopping()
    }

    func cutOffAll() {
        for connection in Array(connections.values) { connection.close(because: "it did not take its replies while the server stopped") }
    }

    func finishStopping() {
        guard isStopping, !isStopped, connections.isEmpty, listener.isClosed else { return }
        isStopped = true
        if isPinned { loop.removeFixedBuffer(pinned) }
        listener.unregister()
        for done in stopContinuations { done() }
        stopContinuations = []
        whileStarted = nil
    }
}

import BlockTap
import Glibc

/// A volume of a fork as a writable `BlockStore`: the disk of a recovery machine.
///
/// FLUSH and FUA are answered when data and journal are on stable storage. TRIM and WRITE_ZEROES leave tombstones. Requests smaller than a
/// block, or not aligned to one, read and rewrite the block; those that meet in a block are carried out one after the other.
public final class ForkStore: BlockStore {
    public let geometry: BlockGeometry
    public var isReadOnly: Bool { false }
    public var supportsTrim: Bool { true }
    private let fork: ForkVolume
    private let loop: EventLoop
    private var io: ForkIO?

    public init(fork: ForkVolume, loop: EventLoop) {
        self.fork = fork
        self.loop = loop
        geometry = fork.geometry
    }

    /// What has been written is flushed and the fork closed in the background; `close` to know when.
    deinit {
        guard let io else { return }
        nonisolated(unsafe) let last = io
        loop.execute { last.retire {} }
    }

    /// Flushes, and gives the fork free for the next opener. Nothing may be in flight, nothing may be submitted afterwards.
    public func close() async throws(StoreError) {
        nonisolated(unsafe) let this = self
        let failure: StoreError? = await withUnsafeContinuation { continuation in
            let accepted = loop.execute {
                guard let io = this.io else { return continuation.resume(returning: nil) }
                this.io = nil
                io.retire { continuation.resume(returning: io.flush.lastError) }
            }
            precondition(accepted, "a fork's event loop was shut down before the fork was closed")
        }
        if let failure { throw failure }
        try fork.close()
    }

    public func submit(_ request: BlockRequestPointer) {
        if io == nil { io = .start(fork: fork, loop: loop) }
        switch request.pointee.operation {
        case .read: io!.reads.submit(request)
        case .flush: io!.flush.submit(request)
        case .write, .trim, .writeZeroes: io!.writes.submit(request)
        }
    }
}

/// What serves one fork on its loop. Keeps itself until its last I/O has ended.
final class ForkIO {
    let fork: ForkVolume
    private(set) var reads: BlockReads!
    private(set) var writes: ForkWrites!
    private(set) var flush: ForkFlush!
    private var retired: (() -> Void)?

    private init(fork: ForkVolume) { self.fork = fork }

    static func start(fork: ForkVolume, loop: EventLoop) -> ForkIO {
        let io = ForkIO(fork: fork)
        io.flush = .start(fork: fork, loop: loop, io: io)
        io.writes = .start(fork: fork, loop: loop, io: io)
        io.reads = .start(map: fork.map, loop: loop, owner: io.writes.readOwner)
        return io
    }

    /// On-loop. Flushes what is left, then leaves the loop and tells.
    func retire(_ done: @escaping () -> Void) {
        precondition(reads.isIdle && writes.isIdle, "a fork was closed while requests were in flight")
        retired = done
        flush.flushThen { [self] in
            reads.end()
            writes.end()
            flush.end()
            retired = nil
            done()
        }
    }
}

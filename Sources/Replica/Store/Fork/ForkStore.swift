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
    private let io: ForkIO

    public init(fork: ForkVolume, loop: EventLoop) {
        self.fork = fork
        self.loop = loop
        geometry = fork.geometry
        io = ForkIO(fork: fork, loop: loop)
        fork.gate.wait()
        fork.io = io
        fork.gate.signal()
    }

    /// What has been written is flushed and the fork closed in the background; `close` to know when.
    deinit {
        if io.isRetired { return }
        nonisolated(unsafe) let last = io
        loop.execute { last.retire {} }
    }

    /// Flushes, and gives the fork free for the next opener. Nothing may be in flight, nothing may be submitted afterwards.
    public func close() async throws(StoreError) {
        nonisolated(unsafe) let io = io
        let failure: StoreError? = await withUnsafeContinuation { continuation in
            let accepted = loop.execute { io.retire { continuation.resume(returning: io.lastError) } }
            precondition(accepted, "a fork's event loop was shut down before the fork was closed")
        }
        if let failure { throw failure }
        try fork.close()
    }

    public func submit(_ request: BlockRequestPointer) {
        io.start()
        switch request.pointee.operation {
        case .read: io.reads.submit(request)
        case .flush: io.flush.submit(request)
        case .write, .trim, .writeZeroes: io.writes.submit(request)
        }
    }
}

/// What serves one fork on its loop. Keeps itself until its last I/O has ended.
final class ForkIO {
    let fork: ForkVolume
    let loop: EventLoop
    private(set) var reads: BlockReads!
    private(set) var writes: ForkWrites!
    private(set) var flush: ForkFlush!
    private var isStarted = false
    private(set) var isRetired = false
    /// A seal waits for the disk to be quiet.
    private var becomesQuiet: ((Bool) -> Void)?

    init(fork: ForkVolume, loop: EventLoop) {
        self.fork = fork
        self.loop = loop
    }

    var lastError: StoreError? { isStarted ? flush.lastError : nil }

    /// On-loop, like all that follows.
    func start() {
        if isStarted { return }
        precondition(!isRetired, "a request for a fork that was closed")
        isStarted = true
        flush = .start(fork: fork, loop: loop, io: self)
        writes = .start(fork: fork, loop: loop, io: self)
        reads = .start(map: fork.map, loop: loop, owner: writes.readOwner)
    }

    /// Flushes what is left, then leaves the loop and tells.
    func retire(_ done: @escaping () -> Void) {
        if isRetired { return done() }
        guard isStarted else { return retired(done) }
        precondition(reads.isIdle && writes.isIdle, "a fork was closed while requests were in flight")
        flush.flushThen { [self] in
            reads.end()
            writes.end()
            flush.end()
            retired(done)
        }
    }

    private func retired(_ done: () -> Void) {
        isRetired = true
        fork.gate.wait()
        fork.io = nil
        fork.gate.signal()
        done()
    }

    // MARK: Seals

    /// Holds new writes and flushes and calls when none is in flight, nor a read that began before: the disk stays as it is until `goOn`.
    /// Calls with false when the disk is not served here any more.
    func quiet(_ done: @escaping (Bool) -> Void) {
        if isRetired { return done(false) }
        start()
        becomesQuiet = done
        writes.hold()
    }

    /// The last write was answered, or goes on to the flush next: continues when that has been done.
    func writesEnded() {
        nonisolated(unsafe) let this = self
        loop.execute {
            guard let done = this.becomesQuiet else { return }
            // Closed meanwhile: nobody holds anything here any more. From here on closing waits, since it flushes first.
            if this.isRetired {
                this.becomesQuiet = nil
                return done(false)
            }
            this.flush.hold {
                this.reads.drain {
                    this.becomesQuiet = nil
                    done(true)
                }
            }
        }
    }

    private static let turnBatch = 4096

    /// Turns to what was sealed, a part at a time so that reads are served in between, and goes on.
    func goOn(_ seal: OpenLayerSeal?, _ done: @escaping () -> Void) {
        guard let seal, seal.layer != nil else {
            fork.goOn(seal)
            return resume(done)
        }
        let extents = fork.beginTurn(seal)
        turn(extents[...], seal, done)
    }

    private func turn(_ extents: ArraySlice<StoredExtent>, _ seal: OpenLayerSeal, _ done: @escaping () -> Void) {
        fork.turn(extents.prefix(Self.turnBatch))
        let left = extents.dropFirst(Self.turnBatch)
        nonisolated(unsafe) let (this, next, seal, done) = (self, left, seal, done)
        if !left.isEmpty {
            loop.execute { this.turn(next, seal, done) }
            return
        }
        reads.drain {
            this.fork.endTurn(seal)
            this.resume(done)
        }
    }

    private func resume(_ done: () -> Void) {
        flush.goOn()
        writes.goOn()
        done()
    }
}

import BlockTap
import CXXHash
import Logging
import NIOCore
import NIOPosix
import Synchronization

/// The Sender's state machine, confined to one event loop. This file: the connection's life. `SenderDrain.swift`: epochs.
///
///     stopped → connecting → greeting → streaming
///        ↑                       ╲ lost / refused ╱
///        ╰── stop, fenced ── recovering (source.abandonAll) → waiting (back-off) → connecting
///
/// Invariants
/// - Nothing is asked of the source in any state but `streaming`; `recovering` waits for a cut that is under way, then for
///   `abandonAll`, so that no item of an older connection can appear in a newer one.
/// - No drain buffer is held across turns of the loop: it is copied into the batch and released at once. But for one, while what it is to be
///   compared with is on its way (`SenderResync.swift`).
/// - Plain bytes sent + batched − credited ≤ the receiver's window.
final class SenderLoop: FrameStream, @unchecked Sendable {
    enum Link {
        case stopped
        case connecting(attempt: Int)
        case greeting(FrameHandler)
        case streaming(FrameHandler)
        case recovering
        case waiting(Scheduled<Void>)
    }

    static let fuzzyBytesMax: UInt64 = 256 * 1024 * 1024
    static let unacknowledgedMax = 2

    let source: any EpochSource
    private(set) var order: ReplicationOrder
    let base: ReplicationBase
    let timing: LinkTiming
    let eventLoop: any NIOCore.EventLoop
    let logger: Logger
    /// nil: the other side connects, and this one is for a single connection (`adopt`).
    private let endpoint: LinkEndpoint?
    let published = Mutex(AgentStatus())
    let isWakePending = Atomic(false)
    /// The largest run the source hands out.
    let drainBytes: Int

    // Connection
    var link = Link.stopped
    private var attempt = 0
    private var retries = 0
    private var isStopping = false
    private var isFinal = false
    private var wasConnected = false
    private var stopPromises: [EventLoopPromise<Void>] = []
    private var ticker: RepeatedTask?
    private var isReadingStatistics = false

    // Figures
    var phase = ReplicationPhase.idle
    private var reason: String?
    var isReadErrorTold = false
    /// The phase that the next loss leads to.
    private var verdict = ReplicationPhase.interrupted
    private var statistics = SourceStatistics()
    private var rateSamples: [(time: NIODeadline, bytes: UInt64)] = []

    // The stream (SenderDrain.swift); meaningful while `streaming`.
    var draining: Cut?
    var sealed: [Cut] = []
    var isCutInFlight = false
    var isCutRequested = false
    /// Of the next cut that can have it.
    var wantedConsistency = CutConsistency.crash
    var needsFuzzyCut = false
    /// `draining` is part of a full sync.
    var isFullSyncCut = false
    var nextCut: NIODeadline = .now()
    var cutTimer: Scheduled<Void>?
    var pumpTimer: Scheduled<Void>?
    var isPumping = false
    var isOutOfCredit = false
    var windowBytes: UInt64 = 0
    var sentPlainBytes: UInt64 = 0
    var creditedBytes: UInt64 = 0
    /// nil until the source's figures are from within the full sync.
    private var fullSyncShownBytes: UInt64?
    var batch: ExtentBatch
    var compression: Compression
    var throttle: Throttle
    var epochDataBytes: UInt64 = 0
    var epochZeroBytes: UInt64 = 0
    /// Of the draining epoch, what the replica has already.
    var epochEqualBytes: UInt64 = 0
    var epochDigest: UInt64 = 0
    var lastProgress: NIODeadline = .now()
    var peerReceivedBytes: UInt64 = 0
    var isPeerWorking = false
    /// A question of the appliance is being answered; one at a time.
    var isAnswering = false
    /// When the next one may be.
    var nextAnswer: NIODeadline = .now()

    // Resync (SenderResync.swift)
    var resync = Resync.off
    /// While `resync` is open.
    var pass: ResyncPass?
    /// The appliance can say what the replica has.
    var isPeerHashing = false
    var canCompare: Bool { isPeerHashing && peerEpoch != .none }
    /// The newest epoch that the replica is known to hold.
    var peerEpoch = EpochNumber.none
    /// Handed out, and what it is to be compared with is not here yet.
    var heldItem: DrainItem?
    var questionCount: UInt64 = 0
    /// Of a resync that has ended; they will still be answered.
    var orphanedQuestions: Set<UInt64> = []
    var compareThrottle: Throttle

    init(
        source: any EpochSource, endpoint: LinkEndpoint?, order: ReplicationOrder, logger: Logger, base: ReplicationBase,
        timing: LinkTiming, eventLoop: any NIOCore.EventLoop
    ) {
        self.source = source
        self.endpoint = endpoint
        self.order = order
        self.base = base
        self.timing = timing
        self.eventLoop = eventLoop
        var logger = logger
        logger[metadataKey: "group"] = "\(order.group)"
        self.logger = logger
        drainBytes = type(of: source).drainBufferBytes
        precondition(drainBytes > 0 && drainBytes <= FrameLimits.payloadBytesMax, "a drain buffer must fit into a frame")
        batch = ExtentBatch(allocator: ByteBufferAllocator())
        compression = Compression(allocator: ByteBufferAllocator(), choice: order.compression ?? .auto)
        throttle = Throttle(bytesPerSecond: order.currentBytesPerSecond)
        compareThrottle = Throttle(bytesPerSecond: timing.compareBytesPerSecond)
    }

    // MARK: Start and stop

    func start() {
        guard case .stopped = link, !isStopping else { return }
        isFinal = false
        retries = 0
        prepare()
        connect()
    }

    /// A connection that the other side has opened, and greeted on: this side's WELCOME is on its way. `isToCompare`: what a full sync hands out may be there.
    func adopt(_ handler: FrameHandler, windowBytes: UInt64, position: Welcome.Position, isToCompare: Bool) {
        guard case .stopped = link, !isStopping else { return }
        prepare()
        link = .greeting(handler)
        do { try welcomed(Welcome(windowBytes: windowBytes, position: position, hashes: isToCompare), handler) } catch { handler.close("\(error)") }
    }

    /// The connection of `adopt` has ended, or is about to; the future succeeds when the source is not used any more.
    func ended(_ reason: String) -> EventLoopFuture<Void> {
        lost(reason)
        let promise = eventLoop.makePromise(of: Void.self)
        stop(promise)
        return promise.futureResult
    }

    private func prepare() {
        source.setWakeup { [self] in
            guard !isWakePending.exchange(true, ordering: .acquiringAndReleasing) else { return }
            eventLoop.execute { [self] in
                isWakePending.store(false, ordering: .sequentiallyConsistent)
                pump()
            }
        }
        if ticker == nil {
            ticker = eventLoop.scheduleRepeatedTask(initialDelay: .zero, delay: .milliseconds(250)) { [self] _ in tick() }
        }
    }

    func stop(_ promise: EventLoopPromise<Void>) {
        stopPromises.append(promise)
        guard !isStopping else { return }
        isStopping = true
        switch link {
        case .stopped:
            stopped()
        case .waiting(let timer):
            timer.cancel()
            stopped()
        case .recovering:
            break
        case .connecting:
            lost("stopped")
        case .greeting(let handler), .streaming(let handler):
            handler.close("stopped")
        }
    }

    /// An order of the same stream: what has begun goes on.
    func adopt(_ order: ReplicationOrder) {
        guard order.isSameStream(as: self.order) else { return }
        self.order = order
        compression.choice = order.compression ?? .auto
        nextCut = min(nextCut, .now() + .milliseconds(Int64(order.epochMilliseconds)))
        setThrottle()
        scheduleCut()
    }

    /// Windows begin and end while it goes on.
    private func setThrottle() {
        let now = order.currentBytesPerSecond
        guard now != throttle.bytesPerSecond else { return }
        throttle.set(bytesPerSecond: now)
        logger.info("\(now == 0 ? "no throttle" : "at most \(now) bytes per second") from now on")
        // What waits has been told how long at the rate of before.
        pump()
    }

    private func stopped() {
        link = .stopped
        source.setWakeup(nil)
        if isStopping {
            setPhase(phase == .fenced ? .fenced : .idle, phase == .fenced ? reason : nil)
            ticker?.cancel()
            ticker = nil
            isStopping = false
        }
        for promise in stopPromises { promise.succeed() }
        stopPromises = []
    }

    // MARK: Connecting

    private func connect() {
        guard let endpoint else { return stopped() }
        attempt += 1
        let attempt = attempt
        link = .connecting(attempt: attempt)
        if reason == nil { setPhase(.connecting, nil) }
        LinkConnector.connect(endpoint, stream: self, timing: timing, eventLoop: eventLoop).whenComplete { [self] result in
            guard case .connecting(attempt) = link else {
                if case .success(let handler) = result { handler.discard() }
                return
            }
            switch result {
            case .success(let handler): link = .greeting(handler)
            case .failure(let error): lost("\(error)")
            }
        }
    }

    func opened(_ handler: FrameHandler) {
        let hello = DataHello(
            group: order.group, generation: order.generation, instance: source.instance, disks: source.disks, answersWanted: true)
        handler.send(.hello) { $0.putJSON(Hello(data: hello)) }
    }

    private func welcomed(_ welcome: Welcome, _ handler: FrameHandler) throws(FrameError) {
        guard welcome.windowBytes >= 4 * UInt64(drainBytes) else {
            throw .malformed(.welcome, "a window of \(welcome.windowBytes) bytes is too small")
        }
        handler.greeted()
        link = .streaming(handler)
        wasConnected = true
        resetStream(windowBytes: welcome.windowBytes)
        isPeerHashing = welcome.hashes == true
        peerEpoch = welcome.position?.epoch ?? .none
        if base.canContinue(group: order.group, instance: source.instance, position: welcome.position) {
            logger.info("replication goes on from \(welcome.position!.epoch)")
        } else {
            let what = canCompare ? "resync" : "full sync"
            logger.info("the replica holds \(welcome.position.map { "\($0.epoch) of another history" } ?? "nothing"): \(what)")
            base.beginFullSync(group: order.group, instance: source.instance)
            source.beginFullSync()
        }
        setPhase(!base.read { $0.known!.isFullSyncing } ? .replicating : canCompare ? .resync : .fullSync, nil)
        scheduleCut()
    }

    // MARK: FrameStream

    var isWorking: Bool { false }
    func writable() { pump() }

    func received(_ frame: FrameView) throws {
        var reader = MetaReader(frame)
        switch (frame.header.type, link) {
        case (.refused, .greeting(let handler)), (.refused, .streaming(let handler)):
            let refusal = try frame.json(Refusal.self)
            // These need a hand; trying again meanwhile does no harm.
            let needsHand: [Refusal.Code] = [.notAuthorized, .unknownGroup, .volumeMismatch, .version]
            verdict = needsHand.contains { $0.rawValue == refusal.code } ? .failed : .interrupted
            // Two agents of one server would drive each other out as fast as they can connect.
            if refusal.code == Refusal.Code.superseded.rawValue { retries = max(retries, 5) }
            handler.close(refusal.reason)
        case (.fenced, .greeting(let handler)), (.fenced, .streaming(let handler)):
            let current = Generation(try NumberMeta(&reader).value)
            isFinal = true
            verdict = .fenced
            handler.close("replication ended under \(current); this source has \(order.generation)")
        case (.welcome, .greeting(let handler)):
            try welcomed(frame.json(Welcome.self), handler)
        case (.ack, .streaming):
            try acknowledged(EpochNumber(NumberMeta(&reader).value))
            retries = 0
        case (.credit, .streaming):
            try credited(NumberMeta(&reader).value)
        case (.blocksWanted, .streaming(let handler)):
            try answer(BlocksWantedMeta(&reader), handler)
        case (.resyncReady, .streaming):
            try resyncReady(ResyncReadyMeta(&reader))
        case (.hashes, .streaming):
            try hashed(HashesMeta(&reader))
        case (.alive, .streaming):
            let alive = try AliveMeta(&reader)
            isPeerWorking = alive.isWorking
            if alive.receivedBytes > peerReceivedBytes {
                peerReceivedBytes = alive.receivedBytes
                lastProgress = .now()
            }
        default:
            throw FrameError.unexpected(frame.header.type, "not part of a data stream from the appliance")
        }
    }

    func closed(_ reason: String) { lost(reason) }

    // MARK: Loss

    private func lost(_ why: String) {
        switch link {
        case .connecting, .greeting, .streaming: break
        case .stopped, .recovering, .waiting: return
        }
        link = .recovering
        if !isStopping {
            logger.warning("replication \(isFinal ? "has ended" : "is interrupted"): \(why)")
            setPhase(verdict, why)
            verdict = .interrupted
        }
        resetStream(windowBytes: 0)
        if !isCutInFlight { recover() }
    }

    /// Gives everything unacknowledged back to the source. Called once per loss, with no cut under way.
    func recover() {
        Task { [self] in
            await source.abandonAll()
            eventLoop.execute { [self] in recovered() }
        }
    }

    private func recovered() {
        if isStopping || isFinal || endpoint == nil || (wasConnected && !order.automaticRestart) { return stopped() }
        let delay = LinkConnector.backOff(retries: retries, timing)
        retries += 1
        link = .waiting(eventLoop.scheduleTask(in: delay) { [self] in connect() })
    }

    // MARK: Figures

    /// A full sync is under way, by copying or by comparing.
    var isCopying: Bool { phase == .fullSync || phase == .resync }

    func setPhase(_ phase: ReplicationPhase, _ reason: String?) {
        self.phase = phase
        self.reason = reason
        publish()
    }

    private func tick() {
        if case .streaming(let handler) = link { checkProgress(handler) }
        setThrottle()
        rateSamples.append((.now(), base.read { $0.sentBytes }))
        if rateSamples.count > 12 { rateSamples.removeFirst() }
        publish()
        guard !isReadingStatistics else { return }
        isReadingStatistics = true
        Task { [self] in
            let statistics = await source.statistics
            eventLoop.execute { [self] in
                isReadingStatistics = false
                self.statistics = statistics
                if isCopying, fullSyncShownBytes == nil { fullSyncShownBytes = 0 }
                publish()
            }
        }
    }

    /// Data that is on its way must arrive, and what has arrived must become durable.
    private func checkProgress(_ handler: FrameHandler) {
        // The replica's disk is what hashes wait for.
        let waitsForHashes = heldItem != nil || resync == .opening
        let isInFlight = handler.sentBytes > peerReceivedBytes || !sealed.isEmpty || isOutOfCredit || waitsForHashes
        let limit = isPeerWorking || waitsForHashes ? timing.sealing : timing.silence
        if !isInFlight {
            lastProgress = .now()
        } else if NIODeadline.now() - lastProgress > limit {
            handler.close("stalled: data has been under way for \(limit.inWords) without any progress")
        }
    }

    /// What has been sent of a fuzzy epoch counts already: an epoch is far longer than a progress bar's step. Never goes back while a
    /// full sync runs: the source's figures are a moment older than ours, and may be from before the full sync or the epoch.
    private func fullSyncDoneBytes(of total: UInt64) -> UInt64 {
        guard isCopying else {
            fullSyncShownBytes = nil
            return total - min(total, statistics.unsyncedBytes)
        }
        guard let shown = fullSyncShownBytes else { return 0 }
        let fuzzy = sealed.reduce(0) { $0 + ($1.kind == .fuzzy ? $1.blockCount * UInt64(blockBytes) : 0) }
        let open = draining.map { $0.kind == .fuzzy ? $0.blockCount * UInt64(blockBytes) : 0 } ?? 0
        guard statistics.unsyncedBytes >= fuzzy + open else { return shown }
        let sentBytes = fuzzy + (open > 0 ? epochDataBytes + epochZeroBytes + epochEqualBytes : 0)
        let done = max(shown, total - min(total, statistics.unsyncedBytes - min(statistics.unsyncedBytes, sentBytes)))
        fullSyncShownBytes = done
        return done
    }

    private func publish() {
        var status = AgentStatus()
        status.phase = phase
        status.reason = reason
        status.fullSyncTotalBytes = source.disks.reduce(0) { $0 + $1.geometry.sizeBytes }
        status.fullSyncDoneBytes = fullSyncDoneBytes(of: status.fullSyncTotalBytes)
        status.source = statistics
        status.throttleBytesPerSecond = throttle.bytesPerSecond
        base.read { state in
            status.sentBytes = state.sentBytes
            status.lastAcknowledgedEpoch = state.lastAcknowledged
            status.lastRecoveryPointNanoseconds = state.lastRecoveryPointNanoseconds
            status.resyncComparedBytes = state.resyncComparedBytes
            status.resyncEqualBytes = state.resyncEqualBytes
            status.unprovenEpochs = state.unprovenEpochs
            status.proofs = state.proofs
        }
        if let first = rateSamples.first, let last = rateSamples.last, last.time > first.time {
            status.sentBytesPerSecond = UInt64(
                Double(last.bytes - first.bytes) * 1e9 / Double((last.time - first.time).nanoseconds))
        }
        published.withLock { $0 = status }
    }
}

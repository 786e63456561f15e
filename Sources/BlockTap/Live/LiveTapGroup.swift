import CLiveTap
import Glibc

/// The disks of one protected server, followed by the live tap: one consistency group, with a thread of its own.
///
/// `LiveEpochEngine` is the algorithm; this is its face to other threads. What the kernel's half knows stays in the kernel when this goes
/// or the process is killed: the next group on the same `pinDirectory` goes on from there, under the same `instance`.
public final class LiveTapGroup: EpochSource, @unchecked Sendable {
    public let instance: String
    public let disks: [SourceDisk]
    /// Whether what an earlier process knew was taken over, so that the replica can go on from where it is.
    public var wasAdopted: Bool { resumption != nil }
    public let resumption: SourceResumption?
    public static var drainBufferBytes: Int { DrainQueue.bufferBytes }

    private let loop: EventLoop
    private let engine: EpochEngineBox

    /// On the loop's thread only.
    private final class EpochEngineBox: @unchecked Sendable {
        let engine: LiveEpochEngine
        /// The loop's thread only.
        var isPumping = false
        init(_ engine: LiveEpochEngine) { self.engine = engine }
    }

    /// Whether this build and this kernel can.
    public static var isAvailable: Bool { LiveTapAttachment.isAvailable && access("/sys/kernel/btf/vmlinux", R_OK) == 0 }

    /// `pinDirectory`: on a bpffs, one per group; its parent must exist. Without `mayAttach` it throws unless these disks have been followed there until now.
    public init(
        disks: [(name: String, path: String)], pinDirectory: String, configuration: LiveTapConfiguration = LiveTapConfiguration(), mayAttach: Bool = true,
        log: (@Sendable (String) -> Void)? = nil
    ) async throws {
        let loop = try EventLoop(name: "live-tap", entries: 64)
        do {
            let engine = try await loop.run { () -> Result<EpochEngineBox, any Error> in
                Result {
                    let followed = try disks.map { try LiveDisk(name: $0.name, path: $0.path) }
                    let attachment = try LiveTapAttachment(directory: pinDirectory, disks: followed, mayAttach: mayAttach)
                    return EpochEngineBox(try LiveEpochEngine(attachment: attachment, disks: followed, configuration: configuration))
                }
            }.get()
            self.engine = engine
        } catch {
            loop.shutdown()
            throw error
        }
        self.loop = loop
        let engine = self.engine
        (instance, self.disks, resumption) = await loop.run {
            let engine = engine.engine
            engine.onEvent = log
            return (engine.instance(), engine.disks.map { SourceDisk(name: $0.disk.name, geometry: $0.disk.geometry) }, engine.resumption)
        }
        // (set once, before anybody can starve it)
        engine.engine.queue.resume = { [weak loop, weak engine] in
            if let loop, let engine { Self.pump(loop, engine) }
        }
    }

    deinit { loop.shutdown() }

    /// Makes sure that `path` is a bpffs (as `/sys/fs/bpf` is on most systems): mounts one there if it is not.
    public static func bpffs(at path: String) throws(SystemError) {
        if clivetap_is_bpffs(path) { return }
        let result = clivetap_mount_bpffs(path)
        guard result == 0 else { throw SystemError(errno: -result, doing: "mount a bpffs on \(path)") }
    }

    /// From its return on no epoch freezes anything, for as long as the pause is there.
    public func pauseFreezes() async -> LiveFreezePause {
        let engine = engine
        let pause = LiveFreezePause(engine.engine.freezePauses)
        // A cut that has frozen something is over when the thread is free.
        await loop.runUnlessShutDown {}
        return pause
    }

    /// Holds the disks still, until it is ended. Blocks for as long as it takes to write out what file systems have in memory.
    public func hold(_ pause: LiveFreezePause, limitMilliseconds: Int = LiveHold.limitMilliseconds) throws(SystemError) -> LiveHold {
        try LiveHold(disks: engine.engine.disks.map(\.disk), limitMilliseconds: limitMilliseconds, pause: pause)
    }

    /// Thaws what another process has held for good, and has ended.
    public func endLeftOverHold() throws(SystemError) { try LiveHold.endLeftOver(disks: engine.engine.disks.map(\.disk)) }

    /// Detaches the kernel's half of a group that no process has open: nothing is tracked any more.
    public static func detach(pinDirectory: String) { LiveTapAttachment.remove(directory: pinDirectory) }

    /// Ends the thread; what the kernel's half knows stays.
    public func close() { loop.shutdown() }

    /// Without `self`: whoever lets go of that last must not be the loop's thread. One at a time: it goes on by itself until there is nothing to do.
    private static func pump(_ loop: EventLoop, _ engine: EpochEngineBox) {
        loop.execute {
            if engine.isPumping { return }
            engine.isPumping = true
            turn(loop, engine)
        }
    }

    private static func turn(_ loop: EventLoop, _ engine: EpochEngineBox) {
        if engine.engine.pump() { loop.execute { turn(loop, engine) } } else { engine.isPumping = false }
    }

    public func beginFullSync() {
        let engine = engine
        loop.execute { engine.engine.beginFullSync() }
    }

    public var needsFuzzyCut: Bool {
        get async {
            let engine = engine
            return await loop.runUnlessShutDown { engine.engine.needsFuzzyCut } ?? false
        }
    }

    public func cut(fuzzyBytesMax: UInt64, consistency: CutConsistency) async throws -> Cut {
        let engine = engine
        let result = await loop.runUnlessShutDown { Result { try engine.engine.cut(fuzzyBytesMax: fuzzyBytesMax, consistency: consistency) } }
        guard let result else { throw EpochError.closed }
        let cut = try result.get()
        Self.pump(loop, engine)
        return cut
    }

    public func nextItem() -> DrainItem? { engine.engine.queue.pop() }
    public func setWakeup(_ wakeup: (@Sendable () -> Void)?) { engine.engine.queue.setWakeup(wakeup) }
    public func release(_ buffer: DrainBuffer) { engine.engine.queue.freeBuffer(slot: buffer.slot) }

    public func hurry() {
        let engine = engine
        loop.execute { engine.engine.hurry() }
    }

    public func acknowledge(_ epoch: EpochNumber) {
        let engine = engine
        loop.execute { engine.engine.acknowledge(epoch) }
    }

    public func abandonAll() async {
        let engine = engine
        await loop.runUnlessShutDown { engine.engine.abandonAll() }
    }

    public var statistics: SourceStatistics {
        get async {
            let engine = engine
            return await loop.runUnlessShutDown { engine.engine.statistics } ?? SourceStatistics()
        }
    }

    public var liveStatistics: LiveTapStatistics {
        get async {
            let engine = engine
            return await loop.runUnlessShutDown { engine.engine.liveStatistics } ?? LiveTapStatistics()
        }
    }

    /// Disks that have another size than when the tap was attached. Writes past the old end are known but not followed: attach again (a new group on
    /// the same `pinDirectory` starts afresh then, and a full sync is due).
    public var resizes: [LiveTapResize] {
        get async {
            let engine = engine
            return await loop.runUnlessShutDown { engine.engine.resizes } ?? []
        }
    }

    /// Words when a disk has got more hardware queues than when the tap was attached: nothing is proven until it is attached again.
    public var changedQueues: String? {
        get async {
            let engine = engine
            return await loop.runUnlessShutDown { engine.engine.changedQueues } ?? nil
        }
    }

    /// How often the kernel skipped a copy of a program that would have interrupted itself.
    public var recursionMisses: [String: UInt64] {
        get async {
            let engine = engine
            return await loop.runUnlessShutDown { engine.engine.recursionMisses } ?? [:]
        }
    }

    /// For tests: of the thread's I/O at present, as class << 13 | level.
    package var ioPriority: Int32 {
        get async { await loop.run { clivetap_io_priority(0) } }
    }

    /// For tests: whether reads of many blocks would not give way now.
    package var isUrgent: Bool {
        get async {
            let engine = engine
            return await loop.run { engine.engine.isUrgent() }
        }
    }

    /// For tests: what the algorithm does wrong on purpose, which events the kernel's half drops, in bursts of `burst` out of `period`
    /// nanoseconds, and what is done inside a freeze.
    package func inject(
        _ faults: LiveTapFaults, issues: (period: UInt64, burst: UInt64) = (0, 0), completions: (period: UInt64, burst: UInt64) = (0, 0),
        whileFrozen: (@Sendable () -> Void)? = nil
    ) async {
        let engine = engine
        await loop.run {
            engine.engine.faults = faults
            var drops = LiveTapDrops()
            drops.issues = issues
            drops.completions = completions
            engine.engine.drop(drops)
            engine.engine.whileFrozen = whileFrozen
        }
    }
}

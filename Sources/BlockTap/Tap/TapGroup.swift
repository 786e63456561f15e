/// The taps of one protected server's disks: one consistency group, on one event loop.
///
/// `EpochEngine` is the algorithm and knows no threads; this is its face to the other ones. Live while the loop is.
public final class TapGroup: EpochSource, @unchecked Sendable {
    public let instance: String
    public let disks: [SourceDisk]
    public static var drainBufferBytes: Int { DrainQueue.bufferBytes }

    private let loop: EventLoop
    private let engine: EpochEngine
    /// Holds the devices open (and exclusively ours) as long as the group lives.
    private let devices: [BlockDevice]

    /// `instance`: see `EpochSource.instance`; must differ from that of every earlier group on these disks.
    public init(
        loop: EventLoop, disks: [(name: String, device: BlockDevice)], instance: String, configuration: TapConfiguration = TapConfiguration()
    ) async {
        self.loop = loop
        self.instance = instance
        self.disks = disks.map { SourceDisk(name: $0.name, geometry: $0.device.geometry) }
        devices = disks.map(\.device)
        let engine = EpochEngine(configuration: configuration)
        self.engine = engine
        nonisolated(unsafe) let unsafeEngine = engine
        await loop.run {
            for (name, device) in disks {
                _ = unsafeEngine.addDisk(name: name, geometry: device.geometry, io: RingDiskIO(device: device, loop: loop, keepAlive: unsafeEngine))
            }
        }
        engine.queue.resume = { [weak loop] in
            _ = loop?.execute { unsafeEngine.pump() }
        }
    }

    /// The store to serve to the protected machine; use on the loop's thread only.
    public func disk(_ index: Int) -> TappedDisk { engine.disks[index] }

    public func beginFullSync() {
        loop.execute { self.engine.beginFullSync() }
    }

    public var needsFuzzyCut: Bool {
        get async { await loop.runUnlessShutDown { self.engine.needsFuzzyCut } ?? false }
    }

    public func cut(fuzzyBytesMax: UInt64) async throws -> Cut {
        let result = await loop.runUnlessShutDown { Result { () throws(EpochError) in try self.engine.cut(fuzzyBytesMax: fuzzyBytesMax) } }
        guard let result else { throw EpochError.closed }
        return try result.get()
    }

    public func nextItem() -> DrainItem? { engine.queue.pop() }
    public func setWakeup(_ wakeup: (@Sendable () -> Void)?) { engine.queue.setWakeup(wakeup) }
    public func release(_ buffer: DrainBuffer) { engine.queue.freeBuffer(slot: buffer.slot) }

    public func acknowledge(_ epoch: EpochNumber) {
        loop.execute { self.engine.acknowledge(epoch) }
    }

    public func abandonAll() async {
        await loop.runUnlessShutDown { self.engine.abandonAll() }
    }

    public var statistics: SourceStatistics {
        get async { await loop.runUnlessShutDown { self.engine.statistics } ?? SourceStatistics() }
    }
}

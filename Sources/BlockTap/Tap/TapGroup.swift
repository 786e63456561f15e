import Dispatch
import Glibc

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

    /// Writes that come from now on wait, unanswered; reads and flushes do not. Returns when the writes of before are done: a cut after that has every
    /// write that was ever answered, and nothing changes on the disks until `releaseWrites` by the same `id`. A later holder takes it over.
    public func holdWrites(_ id: String) async {
        await loop.runUnlessShutDown { self.engine.holdWrites(id) }
        while await loop.runUnlessShutDown({ self.engine.holdsWrites && !self.engine.isQuiet }) ?? false { try? await Task.sleep(for: .milliseconds(2)) }
    }

    /// Those that wait are done, in their order. Nothing when somebody else holds them.
    public func releaseWrites(_ id: String) async {
        await loop.runUnlessShutDown { self.engine.releaseWrites(id) }
    }

    /// Those that wait, and all that come, are answered with `error` (an errno). For good.
    public func refuseHeldWrites(_ id: String, error: Int32) async {
        await loop.runUnlessShutDown { self.engine.refuseHeldWrites(id, error: error) }
    }

    public func beginFullSync() {
        loop.execute { self.engine.beginFullSync() }
    }

    public var needsFuzzyCut: Bool {
        get async { await loop.runUnlessShutDown { self.engine.needsFuzzyCut } ?? false }
    }

    public func cut(fuzzyBytesMax: UInt64, consistency: CutConsistency) async throws -> Cut {
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

    public func read(disk: Int, offsetBytes: UInt64, lengthBytes: Int) async -> [UInt8]? {
        guard devices.indices.contains(disk), lengthBytes > 0, lengthBytes <= 1 << 20 else { return nil }
        let device = devices[disk]
        guard offsetBytes < device.geometry.sizeBytes, UInt64(lengthBytes) <= device.geometry.sizeBytes - offsetBytes else { return nil }
        // On a thread of its own: a disk that hangs must not stop the tap, nor a thread of Swift's pool.
        return await withCheckedContinuation { continuation in
            DispatchQueue.global(qos: .utility).async { continuation.resume(returning: Self.read(device, offsetBytes, lengthBytes)) }
        }
    }

    private static func read(_ device: BlockDevice, _ offset: UInt64, _ length: Int) -> [UInt8]? {
        // The device bypasses the page cache: whole pages, into aligned memory.
        let start = offset / 4096 * 4096
        let end = min((offset + UInt64(length) + 4095) / 4096 * 4096, device.geometry.sizeBytes)
        let memory = UnsafeMutableRawBufferPointer.allocate(byteCount: Int(end - start), alignment: 4096)
        defer { memory.deallocate() }
        var done = 0
        while done < memory.count {
            let count = pread(device.fd, memory.baseAddress! + done, memory.count - done, off_t(start) + off_t(done))
            if count < 0, errno == EINTR { continue }
            if count <= 0 { return nil }
            done += count
        }
        let skip = Int(offset - start)
        return Array(memory[skip..<skip + length])
    }

    public var statistics: SourceStatistics {
        get async { await loop.runUnlessShutDown { self.engine.statistics } ?? SourceStatistics() }
    }
}

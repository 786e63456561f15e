import ArgumentParser
import BlockTap
import Foundation
import Glibc

@testable import Replica

/// A store with a chain of layers, and a plain file that holds the same as its newest recovery point.
struct MakeChain: ParsableCommand {
    static let configuration = CommandConfiguration(abstract: "Makes a store with a chain of layers, and a raw file that equals it.")
    @Option(help: "Where to make the store.") var directory: String
    @Option(help: "The raw file.") var raw: String
    @Option(help: "A file to list the writes of each layer in: layer, offset, length.") var writes: String
    @Option(help: "Size of the disk.") var mib = 1024
    @Option(help: "Layers in all; the lowest covers the whole disk.") var layers = 100
    @Option(help: "Data of each further layer.") var layerMib = 8
    @Option(help: "Size of each write of these.") var extentKib = 64

    func run() throws {
        let store = try ReplicaStore.open(directory: directory, logger: quiet)
        let size = mib << 20
        try store.createGroup(benchGroup, volumes: [VolumeSpec(name: "vda", geometry: BlockGeometry(sizeBytes: UInt64(size), logicalBlockBytes: 512))])
        let file = Glibc.open(raw, O_RDWR | O_CREAT | O_TRUNC, 0o600)
        guard file >= 0 else { throw Failure("cannot make \(raw): \(errorText(errno))") }
        defer { Glibc.close(file) }
        let data = UnsafeRawBufferPointer(randomMemory(64 << 20, seed: 3))
        var random = BenchRandom(seed: 4)
        var list = ""
        let feeder = Feeder(store)
        func put(_ layer: Int, _ offset: Int, _ count: Int) throws {
            let from = random.below((data.count - count) / blockBytes) * blockBytes
            let bytes = UnsafeRawBufferPointer(rebasing: data[from..<from + count])
            try feeder.append(bytes, at: UInt64(offset))
            guard pwrite(file, bytes.baseAddress!, count, off_t(offset)) == count else { throw Failure("cannot write \(raw): \(errorText(errno))") }
            if layer > 0 { list += "\(layer) \(offset) \(count)\n" }
        }
        for layer in 0..<layers {
            try feeder.begin()
            if layer == 0 {
                for offset in stride(from: 0, to: size, by: 1 << 20) { try put(layer, offset, 1 << 20) }
            } else {
                let extent = extentKib << 10
                for _ in 0..<(layerMib << 20) / extent { try put(layer, random.below(size / extent) * extent, extent) }
            }
            try feeder.seal()
        }
        try feeder.wait()
        guard fsync(file) == 0 else { throw Failure("cannot sync \(raw): \(errorText(errno))") }
        store.close()
        try list.write(toFile: writes, atomically: false, encoding: .utf8)
    }
}

/// Keeps a number of reads under way for some time.
final class ReadLoad<Target: BlockStore & SendableMetatype>: BlockRequestOwner {
    private let target: Target
    private let loop: EventLoop
    private let blockCount: UInt64
    private let place: (inout BenchRandom) -> UInt64
    private let isSequential: Bool
    private let length: Int
    private let requests: UnsafeMutablePointer<BlockRequest>
    private let memory: UnsafeMutableRawBufferPointer
    private var idle: [Int]
    private let depth: Int
    private var next: UInt64 = 0
    private var random = BenchRandom(seed: 5)
    private var isPumping = false
    private var isOver = false
    private var done: UInt64 = 0
    private var error: Int32 = 0
    private let ended = DispatchSemaphore(value: 0)

    /// `place` gives the offset of a random read in units of `length`.
    init(_ target: Target, loop: EventLoop, isSequential: Bool, length: Int, depth: Int, place: ((inout BenchRandom) -> UInt64)? = nil) {
        self.target = target
        self.loop = loop
        self.isSequential = isSequential
        self.length = length
        self.depth = depth
        let count = target.geometry.sizeBytes / UInt64(length)
        blockCount = count
        self.place = place ?? { $0.next() % count }
        requests = .allocate(capacity: depth)
        memory = .allocate(byteCount: depth * length, alignment: 4096)
        idle = Array(0..<depth)
        super.init()
        for slot in 0..<depth { (requests + slot).initialize(to: BlockRequest(owner: .passUnretained(self), token: UInt32(slot))) }
    }

    deinit {
        requests.deallocate()
        memory.deallocate()
    }

    override func requestCompleted(_ request: BlockRequestPointer, error: Int32) {
        if error != 0 { self.error = error }
        done += 1
        idle.append(Int(request.pointee.token))
        pump()
    }

    private func pump() {
        if isPumping { return }
        isPumping = true
        defer { isPumping = false }
        while !isOver, error == 0, let slot = idle.popLast() {
            let request = requests + slot
            request.pointee.operation = .read
            if isSequential {
                request.pointee.offsetBytes = next % blockCount * UInt64(length)
                next += 1
            } else {
                request.pointee.offsetBytes = place(&random) * UInt64(length)
            }
            request.pointee.lengthBytes = UInt32(length)
            request.pointee.buffer = memory.baseAddress! + slot * length
            target.submit(request)
        }
        if idle.count == depth { ended.signal() }
    }

    /// Reads per second.
    func run(seconds: Double) throws -> Double {
        nonisolated(unsafe) let this = self
        let clock = ContinuousClock()
        loop.execute { this.loop.addFixedBuffer(this.memory) }
        func count() -> UInt64 {
            let answered = DispatchSemaphore(value: 0)
            nonisolated(unsafe) var count: UInt64 = 0
            loop.execute {
                count = this.done
                answered.signal()
            }
            answered.wait()
            return count
        }
        loop.execute { this.pump() }
        usleep(300_000)
        let (before, started) = (count(), clock.now)
        usleep(UInt32(seconds * 1e6))
        let (after, stopped) = (count(), clock.now)
        loop.execute {
            this.isOver = true
            if this.idle.count == this.depth { this.ended.signal() }
        }
        ended.wait()
        loop.execute { this.loop.removeFixedBuffer(this.memory) }
        if error != 0 { throw Failure("a read failed: \(errorText(error))") }
        let time = started.duration(to: stopped)
        return Double(after - before) / (Double(time.components.seconds) + Double(time.components.attoseconds) / 1e18)
    }
}

struct LoadOptions: ParsableArguments {
    @Flag(help: "In order instead of anywhere.") var sequential = false
    @Option(help: "Bytes of a read.") var bytes = 4096
    @Option(help: "Reads under way.") var depth = 32
    @Option(help: "How long.") var seconds = 6.0

    func measure<Target: BlockStore & SendableMetatype>(_ target: Target, _ loop: EventLoop) throws {
        let load = ReadLoad(target, loop: loop, isSequential: sequential, length: bytes, depth: depth)
        let rate = try load.run(seconds: seconds)
        say("reads_per_second", rate)
        say("mib_per_second", rate * Double(bytes) / 1048576)
    }
}

struct Read: ParsableCommand {
    static let configuration = CommandConfiguration(abstract: "Reads of the newest recovery point.")
    @Option(help: "The store.") var directory: String
    @OptionGroup var load: LoadOptions

    func run() throws {
        let store = try ReplicaStore.open(directory: directory, logger: quiet)
        let loop = try EventLoop(name: "bench")
        do {
            let target = RecoveryPointStore(reader: try store.openRecoveryPoint(benchGroup, store.newestPoint(), volume: 0), loop: loop)
            try load.measure(target, loop)
        }
        loop.shutdown()
        store.close()
    }
}

struct ReadFile: ParsableCommand {
    static let configuration = CommandConfiguration(abstract: "The same reads of a plain file, through the same ring.")
    @Option(help: "The file.") var file: String
    @OptionGroup var load: LoadOptions

    func run() throws {
        let loop = try EventLoop(name: "bench")
        do {
            let target = DeviceStore(device: try BlockDevice.open(path: file, access: .readOnly, exclusive: false), loop: loop)
            try load.measure(target, loop)
        }
        loop.shutdown()
    }
}

struct Serve: ParsableCommand {
    static let configuration = CommandConfiguration(abstract: "Serves the newest recovery point, or a new fork of it, over NBD until SIGTERM.")
    @Option(help: "The store.") var directory: String
    @Option(help: "The unix socket.") var socket: String
    @Flag(help: "A fork, which may be written to.") var fork = false

    func run() throws {
        // Before any thread: they inherit it.
        var signals = sigset_t()
        sigemptyset(&signals)
        sigaddset(&signals, SIGTERM)
        pthread_sigmask(SIG_BLOCK, &signals, nil)
        let store = try ReplicaStore.open(directory: directory, logger: quiet)
        let loop = try EventLoop(name: "bench")
        let point = try store.newestPoint()
        if fork {
            let id = ForkID("bench")
            if store.forks().contains(where: { $0.id == id }) { try store.dropFork(id) }
            try store.fork(id, of: benchGroup, at: point, purpose: "benchmark")
            let volume = try store.openFork(id, volume: 0)
            try serve([(name: "disk", store: ForkStore(fork: volume, loop: loop))], loop, &signals)
            try volume.close()
            try store.dropFork(id)
        } else {
            try serve([(name: "disk", store: RecoveryPointStore(reader: try store.openRecoveryPoint(benchGroup, point, volume: 0), loop: loop))], loop, &signals)
        }
        loop.shutdown()
        store.close()
    }

    private func serve<Target: BlockStore & SendableMetatype>(_ exports: [(name: String, store: Target)], _ loop: EventLoop, _ signals: inout sigset_t) throws {
        let server = try NBDServer(loop: loop, exports: exports, listen: .unix(path: socket))
        var signal: Int32 = 0
        sigwait(&signals, &signal)
        let stopped = DispatchSemaphore(value: 0)
        Task.detached {
            await server.stop()
            await loop.run {}
            stopped.signal()
        }
        stopped.wait()
    }
}

import ArgumentParser
import BlockTap
import Foundation
import Logging

@testable import Replica

/// Loads for the store's rows of `tools/bench`; not part of the product. Each command measures one thing and prints `RESULT name figure`.
@main
struct StoreBench: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "store-bench", abstract: "Measures the store.",
        subcommands: [Apply.self, Seal.self, MakeChain.self, Read.self, ReadFile.self, Serve.self, MakeSynthetic.self, ForkOpen.self, Large.self, MakeServers.self])
}

let benchGroup = GroupID("bench")
let quiet = Logger(label: "store-bench") { label in
    var handler = StreamLogHandler.standardError(label: label)
    handler.logLevel = .warning
    return handler
}

struct Failure: Error, CustomStringConvertible {
    let description: String
    init(_ description: String) { self.description = description }
}

func say(_ name: String, _ figure: Double) { print("RESULT \(name) \(String(format: "%.6f", figure))") }

func seconds(_ body: () throws -> Void) rethrows -> Double {
    let clock = ContinuousClock()
    let time = try clock.measure(body)
    return Double(time.components.seconds) + Double(time.components.attoseconds) / 1e18
}

/// xorshift64*: quick, and its output does not compress.
struct BenchRandom: RandomNumberGenerator {
    private var state: UInt64
    init(seed: UInt64) { state = seed &* 0x9E37_79B9_7F4A_7C15 | 1 }
    mutating func next() -> UInt64 {
        state ^= state >> 12
        state ^= state << 25
        state ^= state >> 27
        return state &* 0x2545_F491_4F6C_DD1D
    }
    mutating func below(_ bound: Int) -> Int { Int(next() % UInt64(bound)) }
}

/// Aligned memory full of random bytes, for the life of the process.
func randomMemory(_ byteCount: Int, seed: UInt64) -> UnsafeMutableRawBufferPointer {
    let memory = UnsafeMutableRawBufferPointer.allocate(byteCount: byteCount, alignment: 4096)
    var random = BenchRandom(seed: seed)
    for word in 0..<byteCount / 8 { memory.storeBytes(of: random.next(), toByteOffset: word * 8, as: UInt64.self) }
    return memory
}

/// A figure in kibibytes from `/proc/self/status`: `VmRSS`, `VmHWM`.
func memoryKibibytes(_ name: String) throws -> Double {
    let status = try String(contentsOfFile: "/proc/self/status", encoding: .utf8)
    guard let line = status.split(separator: "\n").first(where: { $0.hasPrefix(name + ":") }), let figure = line.split(whereSeparator: { $0 == " " || $0 == "\t" }).dropFirst().first else {
        throw Failure("the kernel does not tell \(name)")
    }
    return Double(figure)!
}

extension ReplicaStore {
    func newestPoint() throws -> RecoveryPointID {
        guard let point = recoveryPoints(benchGroup).last else { throw Failure("the store has no recovery point") }
        return point.id
    }
}

/// Puts epochs into a store as the link's receiver does: the checksums are made on the way, as that verifies them, and one epoch may be
/// filled while the one before is being sealed.
final class Feeder: @unchecked Sendable {
    let store: ReplicaStore
    private var number: UInt64
    private var parent: DurablePosition?
    private let sums = UnsafeMutableBufferPointer<UInt64>.allocate(capacity: 4096)
    private let answered = DispatchSemaphore(value: 0)
    private var failure: StoreError?
    private var isSealing = false
    private(set) var writer: EpochWriter!

    init(_ store: ReplicaStore) {
        self.store = store
        parent = store.group(benchGroup)!.lastDurable
        number = parent?.epoch.rawValue ?? 0
    }

    func begin(_ kind: EpochKind = .exact) throws {
        number += 1
        writer = try store.beginEpoch(
            benchGroup, generation: store.group(benchGroup)!.generation,
            cut: Cut(epoch: EpochNumber(number), kind: kind, timeNanoseconds: number, blockCount: 0), instance: "bench", after: parent)
    }

    func append(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws {
        let count = bytes.count / blockBytes
        precondition(count <= sums.count)
        for block in 0..<count {
            sums[block] = BlockChecksum.of(bytes.baseAddress! + block * blockBytes, count: blockBytes, blockIndex: offset / UInt64(blockBytes) + UInt64(block))
        }
        try writer.append(volume: 0, offsetBytes: offset, bytes: bytes, checksums: UnsafeBufferPointer(rebasing: sums[..<count]))
    }

    deinit { sums.deallocate() }

    /// Asks for the seal once the one before has been answered.
    func seal() throws {
        try wait()
        parent = writer.positionWhenSealed
        isSealing = true
        writer.seal(consistency: .crash) { [self] result in
            if case .failure(let error) = result { failure = error }
            answered.signal()
        }
    }

    func wait() throws {
        if isSealing { answered.wait() }
        isSealing = false
        if let failure { throw failure }
    }
}

struct Seal: ParsableCommand {
    static let configuration = CommandConfiguration(abstract: "Milliseconds to seal an epoch of random blocks, and to write and sync the same bytes.")
    @Option(help: "Where to make the store.") var directory: String
    @Option(help: "Blocks of an epoch.") var blocks = 1000
    @Option(help: "Epochs.") var epochs = 100
    @Option(help: "Size of the disk.") var diskGib = 16

    func run() throws {
        let store = try ReplicaStore.open(directory: directory, logger: quiet)
        try store.createGroup(benchGroup, volumes: [VolumeSpec(name: "vda", geometry: BlockGeometry(sizeBytes: UInt64(diskGib) << 30, logicalBlockBytes: 512))])
        let data = UnsafeRawBufferPointer(randomMemory(blocks * blockBytes, seed: 1))
        var random = BenchRandom(seed: 2)
        let feeder = Feeder(store)
        let bare = try store.storage.open("bare", .create, direct: true)
        // As the store does with its segments.
        guard bare.preallocate(offsetBytes: 0, lengthBytes: UInt64(data.count * epochs)) else { throw Failure("no space for \(data.count * epochs) bytes") }
        try bare.dataSync()
        var (ours, theirs): ([Double], [Double]) = ([], [])
        for epoch in 0..<epochs {
            ours.append(try seconds {
                try feeder.begin()
                for block in 0..<blocks {
                    try feeder.append(UnsafeRawBufferPointer(rebasing: data[block * blockBytes..<(block + 1) * blockBytes]), at: UInt64(random.below((diskGib << 30) / blockBytes) * blockBytes))
                }
                try feeder.seal()
                try feeder.wait()
            })
            theirs.append(try seconds {
                try bare.write(data, at: UInt64(epoch * data.count))
                try bare.dataSync()
            })
        }
        try store.storage.remove("bare")
        store.close()
        say("seal_ms", ours.sorted()[epochs / 2] * 1e3)
        say("bare_ms", theirs.sorted()[epochs / 2] * 1e3)
    }
}

struct Apply: ParsableCommand {
    static let configuration = CommandConfiguration(abstract: "MiB/s that a new store makes durable.")
    @Option(help: "Where to make the store.") var directory: String
    @Option(help: "Data in all.") var mib = 1024
    @Option(help: "Size of an extent.") var extentKib = 64
    @Option(help: "Data of an epoch.") var sealMib = 64
    @Option(help: "Size of the disk.") var diskGib = 16

    func run() throws {
        let store = try ReplicaStore.open(directory: directory, logger: quiet)
        try store.createGroup(benchGroup, volumes: [VolumeSpec(name: "vda", geometry: BlockGeometry(sizeBytes: UInt64(diskGib) << 30, logicalBlockBytes: 512))])
        let data = UnsafeRawBufferPointer(randomMemory(64 << 20, seed: 1))
        let extent = extentKib << 10
        let places = (diskGib << 30) / extent
        var random = BenchRandom(seed: 2)
        let feeder = Feeder(store)
        let time = try seconds {
            for _ in 0..<mib / sealMib {
                try feeder.begin()
                for _ in 0..<(sealMib << 20) / extent {
                    let from = random.below((data.count - extent) / blockBytes) * blockBytes
                    try feeder.append(UnsafeRawBufferPointer(rebasing: data[from..<from + extent]), at: UInt64(random.below(places) * extent))
                }
                try feeder.seal()
            }
            try feeder.wait()
        }
        store.close()
        say("mib_per_second", Double(mib) / time)
    }
}

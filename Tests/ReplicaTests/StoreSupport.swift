import BlockTap
import Foundation
import Glibc
import Logging
import Testing

@testable import Replica

/// SplitMix64: a run is reproduced by its seed.
struct SeededRandom: RandomNumberGenerator {
    private var state: UInt64
    init(seed: UInt64) { state = seed }
    mutating func next() -> UInt64 {
        state &+= 0x9E37_79B9_7F4A_7C15
        var z = state
        z = (z ^ (z >> 30)) &* 0xBF58_476D_1CE4_E5B9
        z = (z ^ (z >> 27)) &* 0x94D0_49BB_1331_11EB
        return z ^ (z >> 31)
    }
    mutating func below(_ bound: Int) -> Int { Int.random(in: 0..<bound, using: &self) }
}

/// A directory that goes when the test ends.
final class TemporaryDirectory {
    let path: String
    init() {
        var template = Array((NSTemporaryDirectory() + "/store-test-XXXXXX").utf8CString)
        path = String(cString: mkdtemp(&template)!)
    }
    deinit { try? FileManager.default.removeItem(atPath: path) }

    func copy() throws -> TemporaryDirectory {
        let other = TemporaryDirectory()
        for name in try FileManager.default.contentsOfDirectory(atPath: path) {
            try FileManager.default.copyItem(atPath: path + "/" + name, toPath: other.path + "/" + name)
        }
        return other
    }

    /// Regular files with contents, relative, sorted.
    func files() throws -> [String] {
        try FileManager.default.subpathsOfDirectory(atPath: path).filter { name in
            var isDirectory: ObjCBool = false
            return FileManager.default.fileExists(atPath: path + "/" + name, isDirectory: &isDirectory) && !isDirectory.boolValue
        }.sorted()
    }
}

let quiet = Logger(label: "test") { _ in SwiftLogNoOpLogHandler() }
let webGroup = GroupID("web-1")

/// Small sizes, so that segments and buffers are crossed all the time.
var smallOptions: StoreOptions {
    var options = StoreOptions()
    options.segmentBytes = 256 << 10
    options.preallocationBytes = 64 << 10
    options.writeBufferBytes = 32 << 10
    options.writeBufferCount = 4
    options.writeBytesMin = 8 << 10
    return options
}

func openStore(_ directory: TemporaryDirectory, _ options: StoreOptions = smallOptions) throws -> ReplicaStore {
    try ReplicaStore(storage: FileStorage(directory: directory.path), options: options, logger: quiet)
}

func spec(_ name: String, bytes: UInt64) -> VolumeSpec {
    VolumeSpec(name: name, geometry: BlockGeometry(sizeBytes: bytes, logicalBlockBytes: 512))
}

func sums(_ bytes: [UInt8], offset: UInt64) -> [UInt64] {
    bytes.withUnsafeBytes { raw in
        stride(from: 0, to: raw.count, by: blockBytes).map {
            BlockChecksum.of(raw.baseAddress! + $0, count: min(blockBytes, raw.count - $0), blockIndex: (offset + UInt64($0)) / UInt64(blockBytes))
        }
    }
}

extension EpochWriter {
    func append(volume: Int, offsetBytes: UInt64, _ bytes: [UInt8]) throws {
        let checksums = sums(bytes, offset: offsetBytes)
        try bytes.withUnsafeBytes { bytes in
            try checksums.withUnsafeBufferPointer { try append(volume: volume, offsetBytes: offsetBytes, bytes: bytes, checksums: $0) }
        }
    }

    func seal(_ consistency: Consistency = .crash) throws -> RecoveryPoint? {
        let done = Replica.Semaphore()
        nonisolated(unsafe) var result: Result<RecoveryPoint?, StoreError>!
        seal(consistency: consistency) {
            result = $0
            done.signal()
        }
        done.wait()
        return try result.get()
    }
}

extension ReplicaStore {
    /// On top of the epoch whose seal has been asked for last, or of the last durable one.
    func begin(_ epoch: UInt64, _ kind: EpochKind = .exact, instance: String = "a", group id: GroupID = webGroup) throws -> EpochWriter {
        try begin(epoch, kind, instance: instance, group: id, after: shared.withLock { $0.receivers[id] }?.sealing?.positionWhenSealed ?? group(id)!.lastDurable)
    }

    func begin(_ epoch: UInt64, _ kind: EpochKind = .exact, instance: String = "a", group id: GroupID = webGroup, after parent: DurablePosition?) throws -> EpochWriter {
        try beginEpoch(
            id, generation: self.group(id)!.generation, cut: Cut(epoch: EpochNumber(epoch), kind: kind, timeNanoseconds: epoch * 1_000_000_000, blockCount: 0), instance: instance, after: parent)
    }

    func image(_ point: RecoveryPointID, volume: Int, group id: GroupID = webGroup) throws -> [UInt8] {
        let reader = try openRecoveryPoint(id, point, volume: volume)
        var bytes = [UInt8](repeating: 0xEE, count: Int(reader.geometry.sizeBytes))
        try bytes.withUnsafeMutableBytes { try reader.read(offsetBytes: 0, into: $0) }
        return bytes
    }
}

extension ForkVolume {
    func image() throws -> [UInt8] {
        var bytes = [UInt8](repeating: 0xEE, count: Int(geometry.sizeBytes))
        try bytes.withUnsafeMutableBytes { try read(offsetBytes: 0, into: $0) }
        return bytes
    }
}

/// Random bytes that differ from block to block.
func noise(_ count: Int, _ random: inout SeededRandom) -> [UInt8] {
    var word = random.next()
    return [UInt8](unsafeUninitializedCapacity: count) { buffer, length in
        for index in 0..<count {
            if index % 8 == 0 { word = word &* 6_364_136_223_846_793_005 &+ 1_442_695_040_888_963_407 }
            buffer[index] = UInt8(truncatingIfNeeded: word >> UInt64(index % 8 * 8))
        }
        length = count
    }
}

import BlockTap
import Glibc

@testable import Replica

/// What the store must hold, as plain arrays: every block's *version*, from which its bytes follow. Epochs and writes to forks follow from
/// the seed and their numbers, so that whoever knows how many there were knows all of them.
///
/// Version 0 is zeroes. A block's first 8 bytes are its version: what is read says what it claims to be.
enum Scene {
    static let group = GroupID("torture")
    static let instance = "torture"
    static let disks = [
        VolumeSpec(name: "vda", geometry: BlockGeometry(sizeBytes: 1024 * 4096, logicalBlockBytes: 512)),
        VolumeSpec(name: "vdb", geometry: BlockGeometry(sizeBytes: 300 * 4096 + 512, logicalBlockBytes: 512)),
    ]
    static let blockCounts = disks.map { Int($0.geometry.blockCount) }
    static let empty = blockCounts.map { [UInt64](repeating: 0, count: $0) }

    static func length(_ volume: Int, block: Int) -> Int { min(blockBytes, Int(disks[volume].geometry.sizeBytes) - block * blockBytes) }
    static func kind(_ epoch: UInt64) -> EpochKind { epoch % 4 == 0 ? .fuzzy : .exact }
}

/// Per volume and block.
typealias DiskState = [[UInt64]]

struct Random: RandomNumberGenerator {
    private var state: UInt64
    init(_ parts: UInt64...) {
        state = 0x9E37_79B9_7F4A_7C15
        for part in parts { state = (state ^ part) &* 0xD129_0D3B_53A7_1A45 ^ (state >> 29) }
        state |= 1
        for _ in 0..<4 { _ = next() }
    }
    mutating func next() -> UInt64 {
        state ^= state >> 12
        state ^= state << 25
        state ^= state >> 27
        return state &* 0x2545_F491_4F6C_DD1D
    }
    mutating func below(_ bound: Int) -> Int { Int(next() >> 8) % bound }
}

/// One write of whole blocks (the last one of a disk as long as it is).
struct Write {
    var volume: Int
    var start: Int
    var count: Int
    var version: UInt64

    var end: Int { start + count }
    var offsetBytes: UInt64 { UInt64(start * blockBytes) }
    var byteCount: Int { (count - 1) * blockBytes + Scene.length(volume, block: end - 1) }

    func apply(to state: inout DiskState) { for block in start..<end { state[volume][block] = version } }

    /// The bytes that it writes.
    func withBytes<R>(_ body: (UnsafeRawBufferPointer) throws -> R) rethrows -> R {
        let memory = UnsafeMutableRawBufferPointer.allocate(byteCount: count * blockBytes, alignment: pageBytes)
        defer { memory.deallocate() }
        for block in start..<end { Content.fill(version, volume, block, memory.baseAddress! + (block - start) * blockBytes) }
        return try body(UnsafeRawBufferPointer(rebasing: memory[..<byteCount]))
    }

    private static func place(_ volume: Int, _ random: inout Random, countMax: Int) -> (start: Int, count: Int) {
        let blocks = Scene.blockCounts[volume]
        // Half of it goes to a tenth of the disk.
        let start = random.below(2) == 0 ? random.below(blocks) : random.below(blocks / 10)
        return (start, min(1 + random.below(countMax), blocks - start))
    }

    /// All of an epoch.
    static func epoch(_ seed: UInt64, _ epoch: UInt64) -> [Write] {
        var random = Random(seed, epoch, 1)
        return (0..<1 + random.below(24)).map { _ in
            let volume = random.below(3) == 0 ? 1 : 0
            let (start, count) = place(volume, &random, countMax: 40)
            return Write(volume: volume, start: start, count: count, version: random.below(12) == 0 ? 0 : epoch << 8 | 1)
        }
    }

    /// The one with this number on a disk of a fork.
    static func fork(_ seed: UInt64, _ fork: UInt64, _ volume: Int, _ number: UInt64) -> Write {
        var random = Random(seed, fork, UInt64(volume) << 32 | number, 2)
        let (start, count) = place(volume, &random, countMax: 12)
        return Write(volume: volume, start: start, count: count, version: random.below(12) == 0 ? 0 : fork << 40 | number << 8 | 2)
    }
}

enum Content {
    static func fill(_ version: UInt64, _ volume: Int, _ block: Int, _ target: UnsafeMutableRawPointer) {
        if version == 0 {
            memset(target, 0, blockBytes)
            return
        }
        target.storeBytes(of: version, as: UInt64.self)
        var random = Random(version, UInt64(volume), UInt64(block))
        // A third of it compresses well.
        let period = (version >> 8) % 3 == 0 ? 64 : 1
        var word: UInt64 = 0
        for index in 1..<blockBytes / 8 {
            if index % period == 1 || period == 1 { word = random.next() }
            target.storeBytes(of: word, toByteOffset: index * 8, as: UInt64.self)
        }
    }
}

/// Not what anybody wrote.
struct WrongData: Error, CustomStringConvertible { let description: String }

/// The versions of a whole disk; throws `WrongData` when a block is none that was ever written.
func versions(volume: Int, _ read: (UInt64, UnsafeMutableRawBufferPointer) throws -> Void) throws -> [UInt64] {
    let batch = 128
    let memory = UnsafeMutableRawBufferPointer.allocate(byteCount: batch * blockBytes, alignment: pageBytes)
    let expected = UnsafeMutableRawPointer.allocate(byteCount: blockBytes, alignment: pageBytes)
    defer {
        memory.deallocate()
        expected.deallocate()
    }
    let blockCount = Scene.blockCounts[volume]
    var all: [UInt64] = []
    all.reserveCapacity(blockCount)
    for start in stride(from: 0, to: blockCount, by: batch) {
        let end = min(blockCount, start + batch)
        let byteCount = (end - start - 1) * blockBytes + Scene.length(volume, block: end - 1)
        try read(UInt64(start * blockBytes), UnsafeMutableRawBufferPointer(rebasing: memory[..<byteCount]))
        for block in start..<end {
            let bytes = memory.baseAddress! + (block - start) * blockBytes
            let version = bytes.load(as: UInt64.self)
            Content.fill(version, volume, block, expected)
            if memcmp(bytes, expected, Scene.length(volume, block: block)) != 0 {
                throw WrongData(description: "block \(block) of \(Scene.disks[volume].name) is nothing that was ever written there (it begins with \(String(version, radix: 16)))")
            }
            all.append(version)
        }
    }
    return all
}

/// Where two states differ, in words.
func difference(_ have: [UInt64], _ want: [UInt64]) -> String? {
    let places = have.indices.filter { have[$0] != want[$0] }
    guard let first = places.first else { return nil }
    return "block \(first) has version \(String(have[first], radix: 16)), not \(String(want[first], radix: 16)); \(places.count) blocks differ"
}

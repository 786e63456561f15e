import ArgumentParser
import BlockTap
import Foundation

@testable import Replica

/// A store with as many extents as wanted and next to no data: segments are holes, so every block is zero, and its checksum in the
/// layer says so. Layers are interleaved, one block here and one there: the worst case for whoever merges them.
struct MakeSynthetic: ParsableCommand {
    static let configuration = CommandConfiguration(abstract: "Makes a store of many extents in sparse segments.")
    @Option(help: "Where to make the store.") var directory: String
    @Option(help: "Size of the disk.") var diskGib = 10240
    @Option(help: "Extents in all.") var extents = 50_000_000
    @Option(help: "Layers that they are spread over.") var layers = 25

    func run() throws {
        let store = try ReplicaStore.open(directory: directory, logger: quiet)
        let spec = VolumeSpec(name: "vda", geometry: BlockGeometry(sizeBytes: UInt64(diskGib) << 30, logicalBlockBytes: 512))
        try store.createGroup(benchGroup, volumes: [spec])
        let each = extents / layers
        let stride = spec.geometry.blockCount / UInt64(extents)
        guard stride >= 2 else { throw Failure("\(extents) extents that do not touch do not fit on \(diskGib) GiB") }
        let zeroes = [UInt8](repeating: 0, count: blockBytes)
        for layer in 0..<layers {
            let time = try seconds {
                try store.thread.perform { () throws(StoreError) in
                    let segment = UInt32(store.shared.withLock { $0.newFile() })
                    let file = try SegmentFile.create(store.storage, store: store.uuid, id: segment)
                    try file.file.truncate(to: UInt64(1 + each) * UInt64(blockBytes))
                    try file.file.dataSync()
                    var stored: [StoredExtent] = []
                    var sums: [UInt64] = []
                    stored.reserveCapacity(each)
                    sums.reserveCapacity(each)
                    for index in 0..<each {
                        let block = (UInt64(index) * UInt64(layers) + UInt64(layer)) * stride
                        stored.append(StoredExtent(IndexExtent(startBlock: block, blockCount: 1, slot: 0, segment: segment, segmentBlock: UInt32(1 + index), checksumIndex: UInt32(index))))
                        sums.append(zeroes.withUnsafeBytes { BlockChecksum.of($0.baseAddress!, count: blockBytes, blockIndex: block) })
                    }
                    let isLast = layer == layers - 1
                    let cut = Cut(epoch: EpochNumber(UInt64(layer) + 1), kind: isLast ? .exact : .fuzzy, timeNanoseconds: 0, blockCount: 0)
                    let parent = store.read { $0.groups[benchGroup]!.volumes[0].top }
                    let identity = LayerIdentity(
                        id: store.shared.withLock { $0.newFile() }, parent: parent, volumeIndex: 0, sizeBytes: spec.geometry.sizeBytes, cut: cut, consistency: .crash)
                    let written = try sums.withUnsafeBufferPointer { sums throws(StoreError) in
                        try LayerFile.write(store.storage, store: store.uuid, identity: identity, extents: stored, sums: sums)
                    }
                    try store.storage.syncDirectory("segments")
                    try store.storage.syncDirectory("layers")
                    let point = isLast
                        ? RecoveryPoint(
                            id: RecoveryPointID("rp-\(store.read { $0.nextPoint })"), group: benchGroup, epoch: cut.epoch, instance: "bench", cutTimeNanoseconds: 0,
                            consistency: .crash, receivedTimeNanoseconds: 0, dataBytes: 0) : nil
                    try store.change(.epochSealed(
                        benchGroup, DurablePosition(instance: "bench", epoch: cut.epoch, kind: cut.kind), volumes: [0], layers: [written.record(parent: parent)], point: point))
                }
            }
            FileHandle.standardError.write(Data("layer \(layer + 1) of \(layers): \(String(format: "%.1f", time)) s\n".utf8))
        }
        store.close()
    }
}

struct ForkOpen: ParsableCommand {
    static let configuration = CommandConfiguration(abstract: "Time to fork and open: cold, and with the index in the cache; memory of an open point.")
    @Option(help: "The store.") var directory: String

    func run() throws {
        // Cold: nothing is left of what was merged before.
        for name in try FileManager.default.contentsOfDirectory(atPath: directory + "/indexes") { try FileManager.default.removeItem(atPath: "\(directory)/indexes/\(name)") }
        let store = try ReplicaStore.open(directory: directory, logger: quiet)
        let point = try store.newestPoint()
        func forkAndOpen(_ name: String) throws -> (seconds: Double, extents: Int) {
            var extents = 0
            let time = try seconds {
                try store.fork(ForkID(name), of: benchGroup, at: point, purpose: "benchmark")
                let volume = try store.openFork(ForkID(name), volume: 0)
                extents = volume.map.index.count
                try volume.close()
            }
            try store.dropFork(ForkID(name))
            return (time, extents)
        }
        let before = try memoryKibibytes("VmRSS")
        let cold = try forkAndOpen("cold")
        let after = try memoryKibibytes("VmRSS")
        let cached = try (0..<5).map { try forkAndOpen("cached-\($0)").seconds }.sorted()[2]
        say("cold_seconds_per_million", cold.seconds * 1e6 / Double(cold.extents))
        say("cached_ms", cached * 1e3)
        say("bytes_per_extent", (after - before) * 1024 / Double(cold.extents))
        store.close()
    }
}

struct Large: ParsableCommand {
    static let configuration = CommandConfiguration(abstract: "Opens, reads, seals and compacts a synthetic store; its memory.")
    @Option(help: "The store.") var directory: String
    @Option(help: "How long to read.") var seconds = 5.0

    func run() throws {
        var opened: ReplicaStore!
        say("store_open_s", try measure { opened = try ReplicaStore.open(directory: directory, logger: quiet) })
        let store = opened!
        let loop = try EventLoop(name: "bench")
        var extents = 0
        do {
            var reader: VolumeReader!
            say("point_open_s", try measure { reader = try store.openRecoveryPoint(benchGroup, store.newestPoint(), volume: 0) })
            extents = reader.extentCount
            let index = reader.map.index
            let count = index.count
            let stride = reader.geometry.blockCount / UInt64(count)
            let target = RecoveryPointStore(reader: reader, loop: loop)
            say("reads_per_second", try ReadLoad(target, loop: loop, isSequential: false, length: blockBytes, depth: 32, place: { $0.next() % UInt64(count) * stride }).run(seconds: seconds))
        }
        say("rss_after_reads_mib", try memoryKibibytes("VmRSS") / 1024)
        let data = UnsafeRawBufferPointer(randomMemory(4 << 20, seed: 6))
        var random = BenchRandom(seed: 7)
        let feeder = Feeder(store)
        let places = store.group(benchGroup)!.volumes[0].geometry.blockCount
        try feeder.begin()
        for block in 0..<1000 {
            try feeder.append(UnsafeRawBufferPointer(rebasing: data[block * blockBytes..<(block + 1) * blockBytes]), at: random.next() % places * UInt64(blockBytes))
        }
        say("seal_ms", try measure {
            try feeder.seal()
            try feeder.wait()
        } * 1e3)
        say("compact_s", try measure {
            try store.thread.perform { () throws(StoreError) in
                let point = store.read { $0.groups[benchGroup]!.points[0].volumes[0].top }
                let run = store.read { $0.chain(point) }
                let merged = try LayerMerge.write(store.storage, store: store.uuid, id: store.shared.withLock { $0.newFile() }, layers: run)
                try store.storage.syncDirectory("layers")
                try store.change(.layersMerged(replaced: run.map(\.id), by: merged))
            }
        })
        loop.shutdown()
        store.close()
        say("extents", Double(extents))
        say("peak_mib", try memoryKibibytes("VmHWM") / 1024)
    }

    private func measure(_ body: () throws -> Void) rethrows -> Double { try store_bench.seconds(body) }
}

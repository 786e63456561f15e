import ArgumentParser
import BlockTap
import Foundation

@testable import Replica

/// A store of many servers with many recovery points each, all real records, every point with a layer of its own: what the lists of the API are made from. The
/// layers' data is holes; nothing is synced on the way, and the MANIFEST is written once.
struct MakeServers: ParsableCommand {
    static let configuration = CommandConfiguration(abstract: "Makes a store of many groups with many recovery points.")
    @Option(help: "Where to make the store.") var directory: String
    @Option(help: "A file with the groups' names, one a line.") var groups: String
    @Option(help: "Recovery points of each.") var points = 1000

    func run() throws {
        let store = try ReplicaStore.open(directory: directory, logger: quiet)
        let spec = VolumeSpec(name: "vda", geometry: BlockGeometry(sizeBytes: 1 << 30, logicalBlockBytes: 512))
        for name in try String(contentsOfFile: groups, encoding: .utf8).split(separator: "\n") {
            try store.createGroup(GroupID(String(name)), volumes: [spec])
            try fill(store, GroupID(String(name)), spec)
        }
        try store.storage.syncDirectory("segments")
        try store.storage.syncDirectory("layers")
        try store.thread.perform { () throws(StoreError) in
            store.manifest.beginRewrite()
            try store.manifest.finishRewrite(try Manifest.prepareRewrite(store.storage, state: store.read { $0 }))
        }
        store.close()
    }

    /// A point every ten seconds until now.
    private func fill(_ store: ReplicaStore, _ group: GroupID, _ spec: VolumeSpec) throws {
        let zeroes = [UInt8](repeating: 0, count: blockBytes), now = UInt64(Date().timeIntervalSince1970)
        try store.thread.perform { () throws(StoreError) in
            let segment = UInt32(store.shared.withLock { $0.newFile() })
            let file = try SegmentFile.create(store.storage, store: store.uuid, id: segment)
            try file.file.truncate(to: UInt64(1 + points) * UInt64(blockBytes))
            for index in 0..<points {
                let block = UInt64(index) * 7 % spec.geometry.blockCount
                let extent = StoredExtent(IndexExtent(startBlock: block, blockCount: 1, slot: 0, segment: segment, segmentBlock: UInt32(1 + index), checksumIndex: 0))
                let sums = [zeroes.withUnsafeBytes { BlockChecksum.of($0.baseAddress!, count: blockBytes, blockIndex: block) }]
                let time = (now - UInt64(points - 1 - index) * 10) * 1_000_000_000
                let cut = Cut(epoch: EpochNumber(UInt64(index) + 1), kind: .exact, timeNanoseconds: time, blockCount: 1)
                let parent = store.read { $0.groups[group]!.volumes[0].top }
                let identity = LayerIdentity(
                    id: store.shared.withLock { $0.newFile() }, parent: parent, volumeIndex: 0, sizeBytes: spec.geometry.sizeBytes, cut: cut, consistency: .crash)
                let written = try sums.withUnsafeBufferPointer { sums throws(StoreError) in
                    try LayerFile.write(store.storage, store: store.uuid, identity: identity, extents: [extent], sums: sums, isSynced: false)
                }
                let point = RecoveryPoint(
                    id: RecoveryPointID("rp-\(store.read { $0.nextPoint })"), group: group, epoch: cut.epoch, instance: "bench", cutTimeNanoseconds: time, consistency: .crash,
                    receivedTimeNanoseconds: time, dataBytes: UInt64(blockBytes))
                let record = ManifestRecord.epochSealed(
                    group, DurablePosition(instance: "bench", epoch: cut.epoch, kind: cut.kind), volumes: [0], layers: [written.record(parent: parent)], point: point)
                store.shared.withLock {
                    $0.state.apply(record)
                    $0.figures.changed(by: record)
                }
            }
        }
    }
}

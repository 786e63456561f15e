import BlockTap

/// What exists in a store, as its MANIFEST tells it. A pure value: replaying the records gives it, and every change goes through
/// `apply` both when it happens and when it is replayed.
///
/// Layers form trees through `parent`. A volume, a recovery point and a fork each name the layer on top of their chain;
/// a layer is live while one of them (or an open reader) reaches it.
struct StoreState: Codable, Sendable {
    var uuid: StoreUUID
    /// Next free number for layers, segments and journals alike; never used twice while a record names it.
    var nextFile: UInt64 = 1
    var nextPoint: UInt64 = 1
    var groups: [GroupID: GroupRecord] = [:]
    var forks: [ForkID: ForkRecord] = [:]
    var layers: [UInt64: LayerRecord] = [:]

    init(uuid: StoreUUID) { self.uuid = uuid }
}

struct GroupRecord: Codable, Sendable {
    var volumes: [VolumeRecord]
    var generation = Generation(1)
    var lastDurable: DurablePosition?
    /// Oldest first.
    var points: [PointRecord] = []
    /// Of the layers of all volumes, recovery points' included.
    var layerCount = 0
    var storedBytes: UInt64 = 0
}

struct VolumeRecord: Codable, Sendable {
    var spec: VolumeSpec
    /// Newest layer; 0 = none yet.
    var top: UInt64 = 0
}

struct LayerRecord: Codable, Sendable {
    var id: UInt64
    var parent: UInt64
    var fileBytes: UInt64
    var digest: UInt64
    var extentCount: Int
    /// Bytes of data in segments.
    var dataBytes: UInt64
    var segments: [SegmentUse]
}

/// A layer's data in `segment` ends before `endBlock`.
struct SegmentUse: Codable, Sendable {
    var segment: UInt32
    var endBlock: UInt32
}

struct PointRecord: Codable, Sendable {
    var point: RecoveryPoint
    /// Per volume: name and shape at the cut, and its newest layer.
    var volumes: [VolumeRecord]
}

struct ForkRecord: Codable, Sendable {
    var id: ForkID
    var group: GroupID
    var point: RecoveryPointID
    var purpose: String
    var createdTimeNanoseconds: UInt64
    var volumes: [ForkVolumeRecord]
}

struct ForkVolumeRecord: Codable, Sendable {
    var spec: VolumeSpec
    /// The layer that the fork starts at; 0 = an empty volume.
    var parent: UInt64
    /// Files of the open layer.
    var segment: UInt32
    var journal: UInt64
}

/// One entry of the MANIFEST.
enum ManifestRecord: Codable, Sendable {
    /// Everything so far; the first record, and alone after a rewrite.
    case snapshot(StoreState)
    case groupCreated(GroupID, volumes: [VolumeSpec])
    case groupDeleted(GroupID)
    case generationRaised(GroupID, Generation)
    /// All disks of one cut. `layers[n]` belongs to volume `volumes[n]`.
    case epochSealed(GroupID, DurablePosition, volumes: [Int], layers: [LayerRecord], point: RecoveryPoint?)
    case forked(ForkRecord)
    case forkDropped(ForkID)
}

extension StoreState {
    /// What is wrong with applying `record`, in words; nil when it fits.
    func conflict(_ record: ManifestRecord) -> String? {
        switch record {
        case .snapshot, .groupCreated: return nil
        case .groupDeleted(let id), .generationRaised(let id, _):
            return groups[id] == nil ? "group \(id) does not exist" : nil
        case .epochSealed(let id, _, let volumes, let added, _):
            guard let group = groups[id] else { return "group \(id) does not exist" }
            guard volumes.count == added.count else { return "an epoch with \(volumes.count) volumes and \(added.count) layers" }
            for (volume, layer) in zip(volumes, added) {
                guard group.volumes.indices.contains(volume), group.volumes[volume].top == layer.parent else {
                    return "layer \(layer.id) does not go on volume \(volume) of group \(id)"
                }
            }
            return nil
        case .forked(let fork):
            guard forks[fork.id] == nil else { return "fork \(fork.id) exists" }
            for volume in fork.volumes where volume.parent != 0 && layers[volume.parent] == nil {
                return "fork \(fork.id) starts at layer \(volume.parent), which does not exist"
            }
            return nil
        case .forkDropped(let id):
            return forks[id] == nil ? "fork \(id) does not exist" : nil
        }
    }

    /// Only after `conflict` found nothing.
    mutating func apply(_ record: ManifestRecord) {
        switch record {
        case .snapshot(let state):
            self = state
        case .groupCreated(let id, let volumes):
            var old = groups[id] ?? GroupRecord(volumes: [])
            for (index, spec) in volumes.enumerated() {
                if index < old.volumes.count { old.volumes[index].spec = spec } else { old.volumes.append(VolumeRecord(spec: spec)) }
            }
            groups[id] = old
        case .groupDeleted(let id):
            groups[id] = nil
            dropUnreachableLayers()
        case .generationRaised(let id, let generation):
            groups[id]!.generation = generation
        case .epochSealed(let id, let position, let volumes, let added, let point):
            for (volume, layer) in zip(volumes, added) {
                layers[layer.id] = layer
                groups[id]!.volumes[volume].top = layer.id
                groups[id]!.layerCount += 1
                groups[id]!.storedBytes += layer.dataBytes
                nextFile = max(nextFile, layer.id + 1)
                for use in layer.segments { nextFile = max(nextFile, UInt64(use.segment) + 1) }
            }
            groups[id]!.lastDurable = position
            if let point {
                let tops = groups[id]!.volumes
                groups[id]!.points.append(PointRecord(point: point, volumes: tops))
                nextPoint += 1
            }
        case .forked(let fork):
            for volume in fork.volumes { nextFile = max(nextFile, volume.journal + 1, UInt64(volume.segment) + 1) }
            forks[fork.id] = fork
        case .forkDropped(let id):
            forks[id] = nil
            dropUnreachableLayers()
        }
    }

    /// The chain below and including `top`, oldest first.
    func chain(_ top: UInt64) -> [LayerRecord] {
        var chain: [LayerRecord] = []
        var id = top
        while id != 0, let layer = layers[id] {
            chain.append(layer)
            id = layer.parent
        }
        return chain.reversed()
    }

    private mutating func dropUnreachableLayers() {
        var live: Set<UInt64> = []
        for group in groups.values {
            for volume in group.volumes { mark(volume.top, &live) }
            for point in group.points { for volume in point.volumes { mark(volume.top, &live) } }
        }
        for fork in forks.values { for volume in fork.volumes { mark(volume.parent, &live) } }
        if live.count < layers.count { layers = layers.filter { live.contains($0.key) } }
    }

    func mark(_ top: UInt64, _ live: inout Set<UInt64>) {
        var id = top
        while id != 0, live.insert(id).inserted { id = layers[id]?.parent ?? 0 }
    }
}

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
}

struct VolumeRecord: Codable, Sendable {
    var spec: VolumeSpec
    /// Newest layer; 0 = none yet.
    var top: UInt64 = 0
}

struct LayerRecord: Codable, Sendable {
    var id: UInt64
    var parent: UInt64
    /// Size of the volume at the cut.
    var sizeBytes: UInt64
    var fileBytes: UInt64
    var digest: UInt64
    var extentCount: Int
    /// Bytes of data in segments.
    var dataBytes: UInt64
    /// Bytes of the volume that it says are zero.
    var zeroBytes: UInt64
    var segments: [SegmentUse]
}

/// A layer's data in `segment` needs so many blocks of it and ends before `endBlock`.
struct SegmentUse: Codable, Sendable {
    var segment: UInt32
    var endBlock: UInt32
    var blocks: UInt32
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
    /// The fork that it was made of, as that was at the time; nil = made of a recovery point.
    var parentFork: ForkID?
}

struct ForkVolumeRecord: Codable, Sendable {
    var spec: VolumeSpec
    /// The layer below the open one: where the fork started, or its own newest sealed layer; 0 = an empty volume.
    var parent: UInt64
    /// Files of the open layer.
    var segment: UInt32
    var journal: UInt64
}

/// What a person said about a recovery point.
struct PointMarks: Codable, Sendable, Equatable {
    var note: String?
    /// Name under which it is held: never expired, not dropped before it is released.
    var hold: String?
    /// Asked for by a person, not by the clock.
    var isOnDemand = false
}

/// A fork's open layer became `layer` (nil: nothing was in it); the open one is in new files.
struct ForkSeal: Codable, Sendable {
    var volume: Int
    var layer: LayerRecord?
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
    case pointsDropped(GroupID, [RecoveryPointID])
    case pointMarked(GroupID, RecoveryPointID, PointMarks)
    /// A run of neighbours, oldest first, became one layer that says the same as all of them; only the newest was named by anything.
    case layersMerged(replaced: [UInt64], by: LayerRecord)
    case forkSealed(ForkID, [ForkSeal])
    /// The group is what the fork was when its open layer was last sealed; its points are gone, but for held ones.
    case forkCommitted(ForkID)
    /// The fork's disk stands on one layer that says what the lowest layers of its chain (all that it had then, oldest first) said, and not on them.
    case forkHydrated(ForkID, volume: Int, replaced: [UInt64], by: LayerRecord)
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
        case .pointsDropped(let id, let points):
            guard let group = groups[id] else { return "group \(id) does not exist" }
            let wanted = Set(points)
            let found = group.points.filter { wanted.contains($0.point.id) }
            if let held = found.first(where: { $0.point.hold != nil })?.point { return "point \(held.id) of group \(id) is held as \(held.hold!)" }
            if found.count < wanted.count, let unknown = wanted.subtracting(found.map(\.point.id)).first { return "group \(id) has no point \(unknown)" }
            return nil
        case .pointMarked(let id, let point, _):
            guard let group = groups[id] else { return "group \(id) does not exist" }
            return group.points.contains { $0.point.id == point } ? nil : "group \(id) has no point \(point)"
        case .layersMerged(let replaced, let layer):
            return mergeConflict(replaced, layer)
        case .forkSealed(let id, let seals):
            guard let fork = forks[id] else { return "fork \(id) does not exist" }
            for seal in seals {
                guard fork.volumes.indices.contains(seal.volume) else { return "fork \(id) has no disk number \(seal.volume)" }
                if let layer = seal.layer, layer.parent != fork.volumes[seal.volume].parent { return "layer \(layer.id) does not go on disk \(seal.volume) of fork \(id)" }
            }
            return nil
        case .forkCommitted(let id):
            guard let fork = forks[id] else { return "fork \(id) does not exist" }
            guard let group = groups[fork.group] else { return "group \(fork.group) does not exist" }
            guard group.volumes.count >= fork.volumes.count else { return "group \(fork.group) has fewer disks than fork \(id)" }
            // Of a group that was deleted and came back: what lies behind the end of its disk would show again when that grows.
            for (disk, own) in zip(group.volumes, fork.volumes) where disk.spec.name != own.spec.name || disk.spec.geometry.sizeBytes < own.spec.geometry.sizeBytes {
                return "disk \(disk.spec.name) of group \(fork.group) cannot become disk \(own.spec.name) of fork \(id)"
            }
            return nil
        case .forkHydrated(let id, let volume, let replaced, let layer):
            return hydrationConflict(id, volume, replaced, layer)
        }
    }

    private func mergeConflict(_ replaced: [UInt64], _ layer: LayerRecord) -> String? {
        guard let first = replaced.first, let last = replaced.last else { return "a merge of no layers" }
        var below = layer.parent
        for id in replaced {
            guard let old = layers[id] else { return "layer \(id) does not exist" }
            guard old.parent == below else { return "layer \(id) does not follow layer \(below)" }
            below = id
        }
        guard layers[layer.id] == nil else { return "layer \(layer.id) exists" }
        let inside = Set(replaced.dropLast())
        guard !inside.isEmpty else { return nil }
        for id in tops where inside.contains(id) { return "layer \(id), between \(first) and \(last), is named" }
        for (id, other) in layers where inside.contains(other.parent) && other.id != last && !inside.contains(id) { return "layer \(id) goes on layer \(other.parent)" }
        return nil
    }

    /// Every layer that something other than a layer names; some more than once.
    var tops: [UInt64] {
        var all: [UInt64] = []
        for group in groups.values {
            all += group.volumes.lazy.map(\.top)
            for point in group.points { all += point.volumes.lazy.map(\.top) }
        }
        for fork in forks.values { all += fork.volumes.lazy.map(\.parent) }
        return all
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
                add(layer)
                groups[id]!.volumes[volume].top = layer.id
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
        case .pointsDropped(let id, let points):
            let gone = Set(points)
            groups[id]!.points.removeAll { gone.contains($0.point.id) }
            dropUnreachableLayers()
        case .pointMarked(let id, let point, let marks):
            let index = groups[id]!.points.firstIndex { $0.point.id == point }!
            groups[id]!.points[index].point.note = marks.note
            groups[id]!.points[index].point.hold = marks.hold
            groups[id]!.points[index].point.isOnDemand = marks.isOnDemand
        case .layersMerged(let replaced, let layer):
            merge(replaced, into: layer)
        case .forkSealed(let id, let seals):
            for seal in seals {
                if let layer = seal.layer {
                    add(layer)
                    forks[id]!.volumes[seal.volume].parent = layer.id
                }
                forks[id]!.volumes[seal.volume].segment = seal.segment
                forks[id]!.volumes[seal.volume].journal = seal.journal
                nextFile = max(nextFile, seal.journal + 1, UInt64(seal.segment) + 1)
            }
        case .forkCommitted(let id):
            let fork = forks[id]!
            for (index, volume) in fork.volumes.enumerated() { groups[fork.group]!.volumes[index].top = volume.parent }
            groups[fork.group]!.points.removeAll { $0.point.hold == nil }
            groups[fork.group]!.lastDurable = nil
            groups[fork.group]!.generation = groups[fork.group]!.generation.next
            dropUnreachableLayers()
        case .forkHydrated(let id, let volume, let replaced, let layer):
            hydrate(id, volume, replaced, by: layer)
        }
    }

    mutating func add(_ layer: LayerRecord) {
        layers[layer.id] = layer
        nextFile = max(nextFile, layer.id + 1)
        for use in layer.segments { nextFile = max(nextFile, UInt64(use.segment) + 1) }
    }

    private mutating func merge(_ replaced: [UInt64], into layer: LayerRecord) {
        let old = replaced.last!
        for id in replaced { layers[id] = nil }
        add(layer)
        for (id, other) in layers where other.parent == old { layers[id]!.parent = layer.id }
        for (id, group) in groups {
            for (index, volume) in group.volumes.enumerated() where volume.top == old { groups[id]!.volumes[index].top = layer.id }
            for (number, point) in group.points.enumerated() {
                for (index, volume) in point.volumes.enumerated() where volume.top == old { groups[id]!.points[number].volumes[index].top = layer.id }
            }
        }
        for (id, fork) in forks {
            for (index, volume) in fork.volumes.enumerated() where volume.parent == old { forks[id]!.volumes[index].parent = layer.id }
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

    mutating func dropUnreachableLayers() {
        var live: Set<UInt64> = []
        for top in tops { mark(top, &live) }
        if live.count < layers.count { layers = layers.filter { live.contains($0.key) } }
    }

    func mark(_ top: UInt64, _ live: inout Set<UInt64>) {
        var id = top
        while id != 0, live.insert(id).inserted { id = layers[id]?.parent ?? 0 }
    }
}

import Glibc

@testable import Replica

/// Contents of a disk: a stamp per sector, 0 = zeroes. Each write has its own stamp, so that nothing can be mistaken for anything else.
typealias Image = [UInt32]

let sectorBytes = 512
let sectorsPerBlock = 4096 / sectorBytes

/// Word `index` of a sector with this stamp. The first word tells the stamp; of two stamps out of five the rest cannot be compressed.
private func word(_ stamp: UInt64, _ index: Int) -> UInt64 {
    if stamp == 0 { return 0 }
    let plain = stamp << 32 | UInt64(index)
    if index == 0 || stamp % 5 > 1 { return plain }
    let mixed = (plain ^ (plain >> 29)) &* 0xBF58_476D_1CE4_E5B9
    return (mixed ^ (mixed >> 32)) &* 0x94D0_49BB_1331_11EB
}

func fill(_ bytes: UnsafeMutableRawPointer, _ stamps: some Collection<UInt32>) {
    let words = bytes.assumingMemoryBound(to: UInt64.self)
    var next = 0
    for stamp in stamps {
        for index in 0..<64 { words[next + index] = word(UInt64(stamp), index) }
        next += 64
    }
}

/// The stamps of what was read; `UInt32.max` for a sector that no write made.
func stamps(_ bytes: UnsafeRawBufferPointer) -> Image {
    let words = bytes.bindMemory(to: UInt64.self)
    return (0..<bytes.count / sectorBytes).map { sector in
        let stamp = words[sector * 64] >> 32
        for index in 0..<64 where words[sector * 64 + index] != word(stamp, index) { return .max }
        return UInt32(stamp)
    }
}

/// What a store must hold: plain values, of which a copy is a moment.
struct SimulationState {
    struct Point {
        var id: RecoveryPointID?
        var epoch: UInt64
        var images: [Image]
        var note: String?
        var hold: String?
        var isOnDemand = false

        var words: String { "\(epoch)\(note.map { " " + $0 } ?? "")\(hold.map { " held as " + $0 } ?? "")\(isOnDemand ? " on demand" : "")" }
    }

    struct Group {
        var images: [Image]
        var points: [Point] = []
        var generation: UInt64 = 1
        var lastEpoch: UInt64 = 0
        /// The fork that it was committed from, as long as nothing has come since.
        var committed: String?
    }

    struct Fork {
        var group: String
        var point: RecoveryPointID
        var parent: String?
        var volumes: [ForkDisk]
        /// After a lie a write failed, and what it did cannot be read.
        var isUnclear = false

        /// The writes of the disks that were looked at last are all there.
        mutating func settle() { for index in volumes.indices { volumes[index].settle(volumes[index].writes.count) } }
    }

    /// Writes since the last completed flush may be lost, from some one on.
    struct ForkDisk {
        var flushed: Image
        var writes: [(range: Range<Int>, stamp: UInt32)] = []

        var image: Image { after(writes.count) }

        func after(_ count: Int) -> Image {
            var image = flushed
            for write in writes[..<count] { for sector in write.range { image[sector] = write.stamp } }
            return image
        }

        mutating func settle(_ count: Int) {
            flushed = after(count)
            writes = []
        }
    }

    var groups: [String: Group] = [:]
    /// Marks of a fork are forks that are called after it (`MACHINE-…`).
    var forks: [String: Fork] = [:]
    /// Forks that are somebody's disk.
    var machines: [String] { forks.keys.filter { !$0.contains("-") }.sorted() }

    /// What an observer sees without reading a block.
    var summary: String {
        var text = ""
        for (name, group) in groups.sorted(by: { $0.key < $1.key }) {
            text += "\(name): \(group.images.map(\.count)) generation \(group.generation) epoch \(group.lastEpoch) points \(group.points.map(\.words)); "
        }
        for (name, fork) in forks.sorted(by: { $0.key < $1.key }) { text += "\(name): fork of \(fork.group) at \(fork.point) by \(fork.parent ?? "-"); " }
        return text
    }

    static func summary(of store: ReplicaStore) -> String {
        var text = ""
        for group in store.groups() {
            let sizes = group.volumes.map { Int($0.geometry.sizeBytes) / sectorBytes }
            let points = store.recoveryPoints(group.id).map { Point(epoch: $0.epoch.rawValue, images: [], note: $0.note, hold: $0.hold, isOnDemand: $0.isOnDemand).words }
            text += "\(group.id): \(sizes) generation \(group.generation.rawValue) epoch \(group.lastDurable?.epoch.rawValue ?? 0) points \(points); "
        }
        for fork in store.forks() { text += "\(fork.id): fork of \(fork.group) at \(fork.recoveryPoint) by \(fork.parentFork?.rawValue ?? "-"); " }
        return text
    }
}

/// A change that was asked for and answered with an error, or not at all: it may have happened.
enum PossibleChange {
    case create(String, sizes: [Int])
    case delete(String)
    case raise(String)
    case seal(String, epoch: UInt64, isExact: Bool, images: [Image])
    case fork(String, SimulationState.Fork)
    case drop(String)
    case dropPoints(String, [RecoveryPointID])
    case mark(String, RecoveryPointID, note: String?, hold: String?, isOnDemand: Bool)
    /// The group becomes these disks.
    case commit(fork: String, [Image])

    func apply(to state: inout SimulationState) {
        switch self {
        case .create(let name, let sizes):
            var group = state.groups[name] ?? SimulationState.Group(images: [])
            for (index, size) in sizes.enumerated() {
                if index < group.images.count {
                    group.images[index] += Image(repeating: 0, count: size - group.images[index].count)
                } else {
                    group.images.append(Image(repeating: 0, count: size))
                }
            }
            group.committed = nil
            state.groups[name] = group
        case .delete(let name): state.groups[name] = nil
        case .raise(let name): state.groups[name]?.generation += 1
        case .seal(let name, let epoch, let isExact, let images):
            guard state.groups[name] != nil else { return }
            state.groups[name]!.images = images
            state.groups[name]!.lastEpoch = epoch
            state.groups[name]!.committed = nil
            if isExact { state.groups[name]!.points.append(.init(id: nil, epoch: epoch, images: images)) }
        case .fork(let name, let fork): state.forks[name] = fork
        case .drop(let name):
            state.forks[name] = nil
            // Another one may be called so later.
            for group in state.groups.keys where state.groups[group]!.committed == name { state.groups[group]!.committed = nil }
        case .dropPoints(let name, let ids): state.groups[name]?.points.removeAll { $0.id.map(ids.contains) ?? false }
        case .mark(let name, let id, let note, let hold, let isOnDemand):
            guard let index = state.groups[name]?.points.firstIndex(where: { $0.id == id }) else { return }
            state.groups[name]!.points[index].note = note
            state.groups[name]!.points[index].hold = hold
            state.groups[name]!.points[index].isOnDemand = isOnDemand
        case .commit(let name, let images):
            guard let group = state.forks[name]?.group, state.groups[group] != nil else { return }
            for (index, image) in images.enumerated() {
                let size = state.groups[group]!.images[index].count
                state.groups[group]!.images[index] = Array((image + Image(repeating: 0, count: max(0, size - image.count)))[..<size])
            }
            state.groups[group]!.points.removeAll { $0.hold == nil }
            state.groups[group]!.generation += 1
            state.groups[group]!.lastEpoch = 0
            state.groups[group]!.committed = name
        }
    }
}

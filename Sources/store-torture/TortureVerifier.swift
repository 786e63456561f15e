import BlockTap
import Foundation

@testable import Replica

/// Opens a store whose process was killed: what was acknowledged is there, exactly, what was dropped is not, and no file is left that nothing
/// names. Notes in the log what the kill left open (which of two states it is), so that the next one goes on from there.
final class TortureVerifier {
    private let directory: String
    private let log: TortureLog
    private(set) var problems: [String] = []

    init(directory: String, log: TortureLog) {
        self.directory = directory
        self.log = log
    }

    private func problem(_ text: String) { problems.append(text) }

    func run() throws {
        let store = try ReplicaStore(storage: FileStorage(directory: directory), options: tortureOptions(), logger: tortureLogger)
        lookForLeaks(store, "after opening")
        if let group = store.group(Scene.group) {
            settle(store, group)
            let points = checkPoints(store)
            let forks = checkForks(store)
            print("verified \(points) points and \(forks) forks, epoch \(group.lastDurable?.epoch.rawValue ?? log.history.baseEpoch), \(log.history.commits.count) commits")
        } else if log.history.acknowledged > 0 {
            problem("the group is gone")
        }
        let state = store.read { $0 }
        store.close()
        lookForLeaks(state, "after closing")
    }

    // MARK: Files

    private func lookForLeaks(_ store: ReplicaStore, _ when: String) { lookForLeaks(store.read { $0 }, when) }

    private func lookForLeaks(_ state: StoreState, _ when: String) {
        let layers = Set(state.layers.keys)
        var segments = Set(state.layers.values.flatMap { $0.segments.map { UInt64($0.segment) } })
        var journals: Set<UInt64> = []
        for fork in state.forks.values {
            for volume in fork.volumes {
                segments.insert(UInt64(volume.segment))
                journals.insert(volume.journal)
            }
        }
        func look(_ name: String, _ suffix: String, _ named: Set<UInt64>, all: Bool) {
            let have = Set((try? FileManager.default.contentsOfDirectory(atPath: "\(directory)/\(name)")) ?? [])
            let want = Set(named.map { "\(fileNumber($0)).\(suffix)" })
            for file in have.subtracting(want).sorted() { problem("\(when): nothing names \(name)/\(file)") }
            if all { for file in want.subtracting(have).sorted() { problem("\(when): \(name)/\(file) is not there") } }
        }
        look("layers", "layer", layers, all: true)
        look("segments", "seg", segments, all: true)
        look("journals", "journal", journals, all: true)
        look("indexes", "index", layers, all: false)
        let root = Set((try? FileManager.default.contentsOfDirectory(atPath: directory)) ?? [])
        for file in root.subtracting(["LOCK", "RESERVE", "MANIFEST", "layers", "segments", "journals", "indexes"]).sorted() { problem("\(when): nothing names \(file)") }
    }

    // MARK: What a kill left open

    private func settle(_ store: ReplicaStore, _ group: GroupInfo) {
        if let commit = log.history.committing {
            switch group.generation.rawValue {
            case commit.generation: log.say("not-committed", [])
            case commit.generation + 1: log.say("committed", [])
            default: problem("the generation is \(group.generation)")
            }
        }
        let history = log.history
        let points = Dictionary(store.recoveryPoints(Scene.group).map { ($0.epoch.rawValue, $0) }, uniquingKeysWith: { a, _ in a })
        for epoch in history.unsureHeld.sorted() { log.say(points[epoch]?.hold != nil ? "held" : "released", [epoch]) }
        let unsure = history.dropping.subtracting(history.dropped)
        let kept = unsure.filter { points[$0] != nil }
        if !kept.isEmpty, kept.count < unsure.count { problem("of the points \(unsure.sorted()), dropped together, \(kept.sorted()) are there") }
        if !kept.isEmpty { log.say("kept", kept.sorted()) }
        if kept.isEmpty, !unsure.isEmpty { log.say("dropped", unsure.sorted()) }
    }

    // MARK: Points

    private func checkPoints(_ store: ReplicaStore) -> Int {
        let history = log.history
        let group = store.group(Scene.group)!
        let last = group.lastDurable?.epoch.rawValue ?? history.baseEpoch
        if last < history.acknowledged { problem("epoch \(history.acknowledged) was acknowledged, the last one is \(last)") }
        let points = store.recoveryPoints(Scene.group)
        let have = Set(points.map(\.epoch.rawValue))
        if have.count < points.count { problem("two points of one epoch") }
        for epoch in 1...max(1, history.acknowledged) where epoch <= history.acknowledged && Scene.kind(epoch) == .exact && !history.dropped.contains(epoch) && !have.contains(epoch) {
            if epoch > history.baseEpoch || history.survivors.contains(epoch) { problem("the point of epoch \(epoch) was acknowledged and is gone") }
        }
        let states = history.states(have)
        for point in points {
            let epoch = point.epoch.rawValue
            if history.dropped.contains(epoch) { problem("the point of epoch \(epoch) was dropped and is there") }
            if epoch <= history.baseEpoch, !history.survivors.contains(epoch) { problem("the point of epoch \(epoch) was not held when a fork was committed, and is there") }
            if epoch > last { problem("the point of epoch \(epoch) is newer than the last epoch, \(last)") }
            if (point.hold != nil) != history.held.contains(epoch) { problem("the point of epoch \(epoch) is \(point.hold == nil ? "not " : "")held") }
            for volume in 0..<2 {
                check("point of epoch \(epoch), disk \(volume)", states[epoch]![volume]) {
                    let reader = try store.openRecoveryPoint(Scene.group, point.id, volume: volume)
                    return try versions(volume: volume) { try reader.read(offsetBytes: $0, into: $1) }
                }
            }
        }
        // As the group is now, point or not: through a layer chain that is read as one of a point would be.
        let newest = history.newest(last)
        for volume in 0..<2 {
            check("newest state, disk \(volume)", newest[volume]) {
                let chain = store.read { state in state.chain(state.groups[Scene.group]!.volumes[volume].top) }
                let (snapshot, table) = try store.open(Scene.group, volume, chain: chain)
                let map = BlockMap(spec: Scene.disks[volume], snapshot: snapshot, segments: table, report: BadBlockReport(store: store, context: "newest"))
                return try versions(volume: volume) { try map.read(offsetBytes: $0, into: $1) }
            }
        }
        return points.count
    }

    private func check(_ name: String, _ want: [UInt64], _ read: () throws -> [UInt64]) {
        do {
            if let text = difference(try read(), want) { problem("\(name): \(text)") }
        } catch { problem("\(name): \(error)") }
    }

    // MARK: Forks

    /// More of their writes may be there than was promised; then all of the ones before are, too.
    private func checkForks(_ store: ReplicaStore) -> Int {
        let history = log.history
        let there = Set(store.forks().map { UInt64($0.id.rawValue.dropFirst(2))! })
        for (id, fork) in history.forks {
            if fork.isDropped, there.contains(id) { problem("fork \(id) was dropped and is there") }
            if fork.isMade, !fork.isDropping, !there.contains(id) { problem("fork \(id) is gone") }
            if !fork.isDropped, !there.contains(id) { log.say("fork-dropped", [id]) }
        }
        let origins = history.states([])
        for id in there.sorted() {
            guard let fork = history.forks[id] else {
                problem("nobody made fork \(id)")
                continue
            }
            log.say("forked", [id])
            var found = fork.durable
            let base = history.state(ofFork: id, fork.durable, origins)
            for volume in 0..<2 {
                do {
                    let open = try store.openFork(ForkID("f-\(id)"), volume: volume)
                    let have = try versions(volume: volume) { try open.read(offsetBytes: $0, into: $1) }
                    var want = base
                    var text = difference(have, want[volume])
                    let first = text
                    while text != nil, found[volume] < fork.durable[volume] + 100_000 {
                        found[volume] += 1
                        Write.fork(history.seed, id, volume, found[volume]).apply(to: &want)
                        if have == want[volume] { text = nil }
                    }
                    if text != nil { problem("fork \(id), disk \(volume) after \(fork.durable[volume]) writes: \(first!)") }
                    try open.close()
                } catch { problem("fork \(id), disk \(volume): \(error)") }
            }
            if problems.isEmpty { log.say("at", [id] + found) }
        }
        return there.count
    }
}

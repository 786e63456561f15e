import BlockTap
import Foundation

@testable import Replica

/// What is done to forks; on one thread.
final class TortureForks: @unchecked Sendable {
    private struct OpenFork {
        /// Writes so far, per disk.
        var writes: [UInt64]
        var volumes: [ForkVolume?] = [nil, nil]
    }

    private let store: ReplicaStore
    private let log: TortureLog
    private let slot: Stages.Slot
    private let seed: UInt64
    /// Calls with the last epoch while no other comes.
    private let committing: ((UInt64) throws -> Void) throws -> Void
    private var random: Random
    private var forks: [UInt64: OpenFork] = [:]
    private var next: UInt64

    init(_ store: ReplicaStore, _ log: TortureLog, _ slot: Stages.Slot, seed: UInt64, run: UInt64, committing: @escaping ((UInt64) throws -> Void) throws -> Void) {
        (self.store, self.log, self.slot, self.seed, self.committing) = (store, log, slot, seed, committing)
        random = Random(seed, run, 6)
        let history = log.history
        next = (history.forks.keys.max() ?? 0) + 1
        for info in store.forks() {
            let id = UInt64(info.id.rawValue.dropFirst(2))!
            forks[id] = OpenFork(writes: history.forks[id]!.durable)
        }
    }

    func step() throws {
        if forks.count < 3 { try fork() }
        guard let id = forks.keys.sorted().randomElement(using: &random) else { return }
        let number = random.below(2)
        switch random.below(100) {
        case 0..<60: try write(id, number)
        case 60..<70: try seal(id)
        case 70..<76: try forkFork(id)
        case 76..<84: try close(id, number)
        case 84..<88: try read(id, number)
        // Done by upkeep, on its own thread, while everything goes on.
        case 88, 89: try store.beginHydration(name(id))
        case 90..<98: if forks.count > 1 { try drop(id) }
        default: try commit(id)
        }
        slot.set("")
        sched_yield()
    }

    private func name(_ id: UInt64) -> ForkID { ForkID("f-\(id)") }

    private func volume(_ id: UInt64, _ number: Int) throws -> ForkVolume {
        if let open = forks[id]!.volumes[number] { return open }
        let opened = try store.openFork(name(id), volume: number)
        forks[id]!.volumes[number] = opened
        return opened
    }

    private func flushed(_ id: UInt64, _ number: Int) { log.say("flushed", [id, UInt64(number), forks[id]!.writes[number]]) }

    private func newName() -> UInt64 {
        next += 1
        return next - 1
    }

    private func fork() throws {
        guard let point = store.recoveryPoints(Scene.group).randomElement(using: &random) else { return }
        slot.set("forking")
        let id = newName()
        log.say("forking", [id, point.epoch.rawValue])
        do { try store.fork(name(id), of: Scene.group, at: point.id, purpose: "torture") } catch {
            guard case .unknownRecoveryPoint = error else { throw error }
            log.say("fork-dropped", [id])
            return
        }
        log.say("forked", [id])
        forks[id] = OpenFork(writes: [0, 0])
    }

    private func write(_ id: UInt64, _ number: Int) throws {
        slot.set("writing to a fork")
        let open = try volume(id, number)
        for _ in 0..<1 + random.below(30) {
            let write = Write.fork(seed, id, number, forks[id]!.writes[number] + 1)
            if write.version == 0 {
                try open.zero(offsetBytes: write.offsetBytes, lengthBytes: UInt64(write.byteCount))
            } else {
                try write.withBytes { try open.write(offsetBytes: write.offsetBytes, $0) }
            }
            forks[id]!.writes[number] += 1
        }
        if random.below(2) == 0 {
            slot.set("flushing a fork")
            try open.flush()
            flushed(id, number)
        }
    }

    private func seal(_ id: UInt64) throws {
        slot.set("sealing a fork")
        try store.sealFork(name(id))
        for number in 0..<2 { flushed(id, number) }
    }

    private func forkFork(_ id: UInt64) throws {
        slot.set("forking a fork")
        let child = newName()
        log.say("forking-fork", [child, id] + forks[id]!.writes)
        try store.fork(name(child), ofFork: name(id), purpose: "torture")
        log.say("forked", [child])
        forks[child] = OpenFork(writes: [0, 0])
        for number in 0..<2 { flushed(id, number) }
    }

    private func close(_ id: UInt64, _ number: Int) throws {
        guard let open = forks[id]!.volumes[number] else { return }
        slot.set("closing a fork")
        try open.close()
        forks[id]!.volumes[number] = nil
        flushed(id, number)
    }

    private func read(_ id: UInt64, _ number: Int) throws {
        slot.set("reading a fork")
        let open = try volume(id, number)
        let history = log.history
        let want = history.state(ofFork: id, forks[id]!.writes, history.states([]))[number]
        let have = try versions(volume: number) { try open.read(offsetBytes: $0, into: $1) }
        if let text = difference(have, want) { wrong("fork \(id), disk \(number): \(text)") }
    }

    private func drop(_ id: UInt64) throws {
        for number in 0..<2 { try close(id, number) }
        slot.set("dropping a fork")
        log.say("fork-dropping", [id])
        try store.dropFork(name(id))
        log.say("fork-dropped", [id])
        forks[id] = nil
    }

    private func commit(_ id: UInt64) throws {
        try committing { epoch in
            slot.set("committing a fork")
            log.say("committing", [id, epoch] + forks[id]!.writes + [store.group(Scene.group)!.generation.rawValue])
            try store.commitFork(name(id))
            log.say("committed", [])
        }
        for number in 0..<2 { flushed(id, number) }
    }
}

import Foundation
import Glibc

@testable import Replica

/// What was promised, on another file system, written (and synced) before an operation begins and after it was acknowledged. One line each,
/// a word and numbers. Readers of the log know what must be there, and what may be.
final class TortureLog: @unchecked Sendable {
    private let descriptor: Int32
    private let lock = NSLock()
    private var known: History

    var history: History { lock.withLock { known } }

    init(_ path: String, seed: UInt64) throws {
        descriptor = open(path, O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0o600)
        guard descriptor >= 0 else { throw WrongData(description: "cannot open \(path): \(errorText(errno))") }
        let text = try String(contentsOfFile: path, encoding: .utf8)
        known = History(seed: seed)
        for line in text.split(separator: "\n") { known.take(line.split(separator: " ").map(String.init)) }
    }

    deinit { close(descriptor) }

    func say(_ word: String, _ numbers: [UInt64]) {
        let words = [word] + numbers.map(String.init)
        let line = Array((words.joined(separator: " ") + "\n").utf8)
        lock.withLock {
            precondition(line.withUnsafeBytes { Glibc.write(descriptor, $0.baseAddress!, $0.count) } == line.count && fdatasync(descriptor) == 0, "the log cannot be written")
            known.take(words)
        }
    }
}

struct History {
    enum Origin {
        case epoch(UInt64)
        case fork(UInt64, [UInt64])
    }
    struct Fork {
        var origin: Origin
        /// Made for certain.
        var isMade = false
        var isDropping = false
        var isDropped = false
        /// Writes per disk that were promised to be durable.
        var durable: [UInt64] = [0, 0]
    }
    struct Commit {
        var fork: UInt64
        /// The last epoch before it.
        var epoch: UInt64
        var writes: [UInt64]
        var generation: UInt64
    }

    let seed: UInt64
    /// The last that was acknowledged; all before it were.
    var acknowledged: UInt64 = 0
    var dropping: Set<UInt64> = []
    var dropped: Set<UInt64> = []
    /// Points by their epoch.
    var held: Set<UInt64> = []
    /// Being held or released: either may be true.
    var unsureHeld: Set<UInt64> = []
    /// That were held at the last commit.
    var survivors: Set<UInt64> = []
    var forks: [UInt64: Fork] = [:]
    var commits: [Commit] = []
    var committing: Commit?

    init(seed: UInt64) { self.seed = seed }

    mutating func take(_ words: [String]) {
        let n = words.dropFirst().map { UInt64($0)! }
        switch words[0] {
        case "acked": acknowledged = n[0]
        case "dropping": dropping.formUnion(n)
        case "dropped": dropped.formUnion(n)
        case "kept": dropping.subtract(n)
        case "holding", "releasing": unsureHeld.insert(n[0])
        case "held":
            held.insert(n[0])
            unsureHeld.remove(n[0])
        case "released":
            held.remove(n[0])
            unsureHeld.remove(n[0])
        case "forking": forks[n[0]] = Fork(origin: .epoch(n[1]))
        case "forking-fork": forks[n[0]] = Fork(origin: .fork(n[1], [n[2], n[3]]))
        case "forked": forks[n[0]]!.isMade = true
        case "fork-dropping": forks[n[0]]!.isDropping = true
        case "fork-dropped": forks[n[0]]!.isDropped = true
        // What a verifier found there, or a flush made durable.
        case "at": forks[n[0]]!.durable = [n[1], n[2]]
        case "flushed": forks[n[0]]!.durable[Int(n[1])] = n[2]
        case "committing": committing = Commit(fork: n[0], epoch: n[1], writes: [n[2], n[3]], generation: n[4])
        case "committed":
            commits.append(committing!)
            // Whatever becomes of them afterwards: the others are gone.
            survivors = held
            committing = nil
        case "not-committed": committing = nil
        default: preconditionFailure("the log has a line that begins with \(words[0])")
        }
    }

    /// Only held points are older.
    var baseEpoch: UInt64 { commits.last?.epoch ?? 0 }

    func apply(_ fork: UInt64, _ writes: [UInt64], to state: inout DiskState) {
        for volume in 0..<2 {
            for number in 0..<writes[volume] { Write.fork(seed, fork, volume, number + 1).apply(to: &state) }
        }
    }

    /// The group's disks at epochs, and with them what forks start from.
    func states(_ epochs: Set<UInt64>) -> [UInt64: DiskState] {
        var wanted = epochs
        for fork in forks.values { if case .epoch(let epoch) = fork.origin { wanted.insert(epoch) } }
        guard let last = wanted.max() else { return [:] }
        var all: [UInt64: DiskState] = [:]
        var state = Scene.empty
        var next = 0
        for epoch in 0...last {
            if epoch > 0 { for write in Write.epoch(seed, epoch) { write.apply(to: &state) } }
            if wanted.contains(epoch) { all[epoch] = state }
            while next < commits.count, commits[next].epoch == epoch {
                state = self.state(ofFork: commits[next].fork, commits[next].writes, all)
                next += 1
            }
        }
        return all
    }

    /// A fork after so many writes; `epochs` as `states` gave them.
    func state(ofFork id: UInt64, _ writes: [UInt64], _ epochs: [UInt64: DiskState]) -> DiskState {
        var state: DiskState
        switch forks[id]!.origin {
        case .epoch(let epoch): state = epochs[epoch]!
        case .fork(let parent, let parentWrites): state = self.state(ofFork: parent, parentWrites, epochs)
        }
        apply(id, writes, to: &state)
        return state
    }

    /// The group's disks after the last epoch before `limit`, when nothing came since the last commit: that fork.
    func newest(_ epoch: UInt64) -> DiskState {
        let all = states([epoch])
        if let commit = commits.last, commit.epoch == epoch { return state(ofFork: commit.fork, commit.writes, all) }
        return all[epoch]!
    }
}

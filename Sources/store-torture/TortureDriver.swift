import BlockTap
import Foundation
import Glibc

@testable import Replica

/// Does everything at once to a store until it is killed: epochs, points dropped and held, forks of forks written, sealed and committed, a
/// point exported over and over, scrubbing, upkeep. Reads on the way are compared with the model. Ends the process when something is wrong.
final class TortureDriver: @unchecked Sendable {
    private let store: ReplicaStore
    let log: TortureLog
    private let stages: Stages
    private let target: String
    private let seed: UInt64
    /// Held by whoever changes what the group is as a whole.
    private let whole = NSLock()
    private var epoch: UInt64
    private let started = UInt64(getpid())

    init(directory: String, log: TortureLog, stages: Stages, target: String, seed: UInt64) throws {
        self.log = log
        self.stages = stages
        self.target = target
        self.seed = seed
        let opening = stages.slot()
        opening.set("opening")
        store = try ReplicaStore(storage: FileStorage(directory: directory), options: tortureOptions(), logger: tortureLogger)
        try store.createGroup(Scene.group, volumes: Scene.disks)
        opening.set("")
        let history = log.history
        epoch = max(store.group(Scene.group)!.lastDurable?.epoch.rawValue ?? 0, history.baseEpoch)
    }

    func run() -> Never {
        var random = Random(seed, started, 3)
        // Now and then the store's own thread, otherwise one that says what it does.
        let ownThread = random.below(4) == 0
        if ownThread { store.startUpkeep(everySeconds: 0.01, bytesPerSecond: 0) } else { begin("upkeep") { try self.upkeep() } }
        store.startScrub(bytesPerSecond: 64 << 20, pauseSeconds: 0) { finding in
            switch finding {
            case .bad, .badFile: wrong("scrub: \(finding)")
            default: break
            }
        }
        begin("epochs") { try self.receive() }
        begin("points") { try self.dropPoints() }
        let forks = TortureForks(store, log, stages.slot(), seed: seed, run: started, committing: { [self] body in try whole.withLock { try body(epoch) } })
        begin("forks") { try forks.step() }
        begin("export") { try self.exportPoints() }
        while true { pause() }
    }

    private func begin(_ name: String, _ body: @escaping @Sendable () throws -> Void) {
        Thread.detachNewThread {
            do { while true { try body() } } catch { wrong("\(name): \(error)") }
        }
    }

    // MARK: Epochs

    private func receive() throws {
        let slot = stages.slot()
        var random = Random(seed, started, 4)
        while true {
            try whole.withLock {
                // Each is filled while the one before is being sealed.
                var waits: [DispatchSemaphore] = []
                nonisolated(unsafe) var failure: StoreError?
                var parent = store.group(Scene.group)!.lastDurable
                for _ in 0..<1 + random.below(5) {
                    epoch += 1
                    let number = epoch
                    slot.set("applying an epoch")
                    let writer = try store.beginEpoch(
                        Scene.group, generation: store.group(Scene.group)!.generation,
                        cut: Cut(epoch: EpochNumber(number), kind: Scene.kind(number), timeNanoseconds: number, blockCount: 0), instance: Scene.instance, after: parent)
                    for write in Write.epoch(seed, number) { try append(write, writer) }
                    parent = writer.positionWhenSealed
                    waits.last?.wait()
                    if let failure { throw failure }
                    let done = DispatchSemaphore(value: 0)
                    waits.append(done)
                    slot.set("sealing an epoch")
                    writer.seal(consistency: .crash) { [log] result in
                        switch result {
                        case .success: log.say("acked", [number])
                        case .failure(let error): failure = error
                        }
                        done.signal()
                    }
                }
                waits.last?.wait()
                if let failure { throw failure }
                slot.set("")
            }
            sched_yield()
        }
    }

    private func append(_ write: Write, _ writer: EpochWriter) throws {
        if write.version == 0 { return try writer.zero(volume: write.volume, offsetBytes: write.offsetBytes, lengthBytes: UInt64(write.byteCount)) }
        try write.withBytes { bytes in
            let sums = (0..<write.count).map { index in
                BlockChecksum.of(bytes.baseAddress! + index * blockBytes, count: Scene.length(write.volume, block: write.start + index), blockIndex: UInt64(write.start + index))
            }
            try sums.withUnsafeBufferPointer { try writer.append(volume: write.volume, offsetBytes: write.offsetBytes, bytes: bytes, checksums: $0) }
        }
    }

    // MARK: Points

    private func dropPoints() throws {
        let slot = stages.slot()
        var random = Random(seed, started, 5)
        while true {
            try whole.withLock {
                let points = store.recoveryPoints(Scene.group)
                slot.set("dropping and holding points")
                let free = points.dropLast().filter { $0.hold == nil }
                if free.count > 8 {
                    let gone = free.filter { _ in random.below(3) > 0 }
                    log.say("dropping", gone.map(\.epoch.rawValue))
                    try store.dropRecoveryPoints(Scene.group, gone.map(\.id))
                    log.say("dropped", gone.map(\.epoch.rawValue))
                }
                let left = store.recoveryPoints(Scene.group)
                let held = left.filter { $0.hold != nil }
                if held.count < 3, let point = left.randomElement(using: &random), point.hold == nil {
                    log.say("holding", [point.epoch.rawValue])
                    try store.holdRecoveryPoint(Scene.group, point.id, name: "kept")
                    log.say("held", [point.epoch.rawValue])
                } else if random.below(8) == 0, let point = held.randomElement(using: &random) {
                    log.say("releasing", [point.epoch.rawValue])
                    try store.releaseRecoveryPoint(Scene.group, point.id)
                    log.say("released", [point.epoch.rawValue])
                }
                slot.set("")
            }
            pause()
        }
    }

    // MARK: Export

    /// Written beside the store, as a sparse file, and compared.
    private func exportPoints() throws {
        let slot = stages.slot()
        var random = Random(seed, started, 7)
        while true {
            guard let point = store.recoveryPoints(Scene.group).randomElement(using: &random) else {
                pause()
                continue
            }
            let volume = random.below(2)
            slot.set("opening a point")
            let reader: VolumeReader
            do { reader = try store.openRecoveryPoint(Scene.group, point.id, volume: volume) } catch {
                if case .unknownRecoveryPoint = error { continue }
                throw error
            }
            slot.set("exporting a point")
            let history = log.history
            let want = history.states([point.epoch.rawValue])[point.epoch.rawValue]![volume]
            let file = open(target, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0o600)
            guard file >= 0, ftruncate(file, off_t(reader.geometry.sizeBytes)) == 0 else { throw WrongData(description: "cannot make \(target)") }
            defer { close(file) }
            var offset: UInt64 = 0
            while let run = reader.nextData(from: offset, bytesMax: 256 << 10) {
                let memory = UnsafeMutableRawBufferPointer.allocate(byteCount: run.count, alignment: pageBytes)
                defer { memory.deallocate() }
                try reader.read(offsetBytes: run.lowerBound, into: memory)
                guard pwrite(file, memory.baseAddress!, memory.count, off_t(run.lowerBound)) == memory.count else { throw WrongData(description: "cannot write \(target): \(errorText(errno))") }
                offset = run.upperBound
            }
            let have = try versions(volume: volume) { offset, memory in
                guard pread(file, memory.baseAddress!, memory.count, off_t(offset)) == memory.count else { throw WrongData(description: "cannot read \(target)") }
            }
            if let text = difference(have, want) { wrong("point of epoch \(point.epoch.rawValue), disk \(volume): \(text)") }
            slot.set("")
        }
    }

    // MARK: Upkeep

    private func upkeep() throws {
        let slot = stages.slot()
        let disk = StagedStorage(store.storage, slot)
        while true {
            disk.begin()
            let action = try store.upkeepStep(disk)
            slot.set("")
            if action == nil { pause() }
        }
    }

    private func pause() { usleep(5000) }
}

/// Ends the process: whoever waits for it sees that it was not killed.
func wrong(_ what: String) -> Never {
    FileHandle.standardError.write(Data("WRONG \(what)\n".utf8))
    _exit(3)
}

func tortureOptions() -> StoreOptions {
    var options = StoreOptions()
    options.segmentBytes = 2 << 20
    options.preallocationBytes = 512 << 10
    options.manifestRewriteBytes = 64 << 10
    options.garbageBytesMin = 64 << 10
    options.reclaimBytesMin = 16 << 10
    options.forkJournalBytesMax = 64 << 10
    options.forkDeadBytesMax = 1 << 20
    options.indexFileCostMin = 1
    options.journalEntriesMax = 64
    return options
}

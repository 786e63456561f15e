import BlockTap
import CLiveTap
import Glibc

/// The live tap's proof in one process, for kernels that cannot run the tests (guests): dependent writes to the disks of one group, every proven
/// point checked exactly, and in the end the replica compared with the disks. What is on the disks is lost. It goes on for `--seconds`, and on a slow
/// machine longer, until there is enough to judge by (ten times as long at most).
///
/// Standard output: `violation: …` lines, then one line `live-tap-check kernel=… … verdict=ok` (or what is wrong). Status 0 only with `verdict=ok`.
struct Check {
    static let usage = """
        usage: live-tap-holder check --disk DEVICE [--disk DEVICE...] [--seconds N] [--chains N] [--pause MICROSECONDS] [--discards PERCENT]
                   [--load COMMAND] [--expect resync] [--pins DIRECTORY] [--drop completions|issues|both] [--fault forget-in-flight|skip-collision-check|single-buffer|unshared-cut|skip-reconciliation]
        """

    private enum Drop: String { case completions, issues, both }

    private static let provenMin = 20
    private static let faults: [String: LiveTapFaults] = [
        "forget-in-flight": .forgetInFlightAtCut, "skip-collision-check": .skipCollisionCheck, "single-buffer": .singleBuffer,
        "unshared-cut": .unsharedCut, "skip-reconciliation": .skipReconciliation,
    ]

    private var disks: [String] = []
    private var seconds = 60
    private var chains = 32
    private var pauseMicroseconds: UInt32 = 0
    private var discardPercent = 0
    /// For the shell, and until it ends: instead of the chains, and what it writes is only compared in the end. It leaves nothing mounted.
    private var load: String?
    /// The load writes what cannot be followed: that must be noticed.
    private var expectsResync = false
    private var pins = "/sys/fs/bpf/live-tap-check-\(getpid())"
    private var drop: Drop?
    private var fault: LiveTapFaults?

    static func main(_ arguments: [String]) async {
        guard let check = Check(arguments) else {
            print(usage)
            exit(2)
        }
        var status: Int32 = 1
        do {
            status = try await check.run() ? 0 : 1
        } catch {
            print("live-tap-check: \(error)")
        }
        exit(status)
    }

    private init?(_ arguments: [String]) {
        var rest = arguments[...]
        while let option = rest.popFirst() {
            guard let value = rest.popFirst() else { return nil }
            switch option {
            case "--disk": disks.append(value)
            case "--seconds": seconds = Int(value) ?? 0
            case "--chains": chains = Int(value) ?? 0
            case "--pause":
                guard let pause = UInt32(value) else { return nil }
                pauseMicroseconds = pause
            case "--discards":
                guard let percent = Int(value), (0...50).contains(percent) else { return nil }
                discardPercent = percent
            case "--load":
                load = value
                chains = 0
            case "--expect":
                guard value == "resync" else { return nil }
                expectsResync = true
            case "--pins": pins = value
            case "--drop":
                guard let drop = Drop(rawValue: value) else { return nil }
                self.drop = drop
            case "--fault":
                guard let fault = Self.faults[value] else { return nil }
                self.fault = fault
            default: return nil
            }
        }
        guard !disks.isEmpty, seconds > 0, (1...1024).contains(chains) || load != nil else { return nil }
    }

    // MARK: Run

    private func run() async throws -> Bool {
        if pins.hasPrefix("/sys/fs/bpf/") { try LiveTapGroup.bpffs(at: "/sys/fs/bpf") }
        let bytes = try disks.map { Int(try BlockDevice.open(path: $0, access: .readOnly, exclusive: false).geometry.sizeBytes) }.min()! & ~0xF_FFFF
        let writers = try DependentChains(paths: disks, bytesPerDisk: bytes, chains: chains, pauseMicroseconds: pauseMicroseconds, discardPercent: discardPercent)
        if load == nil { try writers.wipe(bytesPerDisk: bytes) }
        defer { LiveTapGroup.detach(pinDirectory: pins) }
        let replica = try await LiveTapReplica(disks: disks, pins: pins)
        defer { replica.close() }
        let account = try KernelAccount(disks: disks, pins: pins)
        let started = ContinuousClock.now
        let end = started + .seconds(seconds), limit = started + .seconds(seconds * 10)
        try writers.start()
        defer { writers.stop() }
        try await replica.fullSync()
        var child = try load.map { try Shell($0) }

        var proven = 0, unproven = 0, turn = 0
        var violations: [String] = []
        func isGoingOn() -> Bool {
            if child?.hasEnded == false { return true }
            let now = ContinuousClock.now
            // A deliberate mistake is to be caught.
            let isEnough = fault == nil && proven >= Self.provenMin && (drop == nil || turn > 20)
            return child == nil && now < end || now < limit && !isEnough
        }
        /// Carries one epoch, after every chain has had a chance to write, and checks it if it is a point. Whether it is.
        func point() async throws -> Bool {
            if load != nil { try await Task.sleep(for: .milliseconds(20)) }
            let goal = writers.writeCount + UInt64(chains)
            while writers.writeCount < goal, writers.isWriting, ContinuousClock.now < limit { try await Task.sleep(for: .milliseconds(1)) }
            let floor = writers.acknowledged
            guard try await replica.carry() == .exact else {
                unproven += 1
                return false
            }
            proven += 1
            violations += writers.violations(in: replica.images, floor: floor)
            return true
        }
        while isGoingOn(), violations.isEmpty, writers.problem == nil {
            // The first point is without a fault. Issues are dropped in turns, so that what that did to the replica has to be made good.
            if proven > 0 {
                if turn % 20 == 0 { await inject(replica.group) }
                if turn % 20 == 10, drop == .issues || drop == .both { await replica.group.inject([]) }
                turn += 1
            }
            _ = try await point()
        }
        await replica.group.inject([])
        writers.stop()
        var isEqual = false
        if violations.isEmpty {
            for _ in 0..<100 where try await point() { break }
            isEqual = try writers.areDisks(replica.images, bytesPerDisk: bytes)
        }
        let figures = await replica.group.liveStatistics
        let misses = await replica.group.recursionMisses
        let seen = account.difference()

        for words in violations.prefix(5) { print("violation: \(words)") }
        var problems: [String] = []
        if !violations.isEmpty { problems.append("\(violations.count) violations") }
        if violations.isEmpty, !isEqual { problems.append("the replica is not the disks") }
        if proven < Self.provenMin { problems.append("\(proven) proven points") }
        if let problem = writers.problem { problems.append(problem) }
        if let status = child?.status, status != 0 { problems.append("the load ended with status \(status)") }
        switch drop {
        case nil where expectsResync: if figures.resyncCount == 0 { problems.append("no resync") }
        case nil where figures.resyncCount > 0: problems.append("resync: \(figures.resyncReason ?? "")")
        case .completions where figures.resyncCount > 0: problems.append("resync: \(figures.resyncReason ?? "")")
        case .completions where figures.droppedCompletionCount == 0: problems.append("no completion was dropped")
        case .issues where figures.droppedIssueCount == 0, .both where figures.droppedIssueCount == 0: problems.append("no issue was dropped")
        case .issues where figures.resyncCount == 0, .both where figures.resyncCount == 0: problems.append("no resync, though issues were dropped")
        default: break
        }
        let names = disks.map { String($0.split(separator: "/").last!) }.joined(separator: ",")
        func sum(_ program: String) -> UInt64 { misses.reduce(0) { $0 + ($1.key.hasPrefix(program) ? $1.value : 0) } }
        print(
            """
            live-tap-check kernel=\(Self.kernelRelease) disks=\(names) seconds=\((ContinuousClock.now - started).components.seconds) chains=\(chains) \
            writes=\(writers.writeCount) discards=\(seen.discards)+\(seen.mergedDiscards) proven=\(proven) unproven=\(unproven) rounds=\(figures.roundCount) rounds-max=\(figures.roundsMax) \
            collisions=\(figures.collisionCount) skipped-issues=\(seen.skippedIssues) skipped-completions=\(seen.skippedCompletions) \
            unseen-completions=\(figures.unseenCompletionCount) unmatched=\(figures.unmatchedCount) requeued=\(seen.requeued) partial=\(seen.partial) \
            recursion-misses=issue:\(sum("issue")),complete:\(sum("complete")),requeue:\(sum("requeue")) \
            dropped=issues:\(figures.droppedIssueCount),completions:\(figures.droppedCompletionCount) open=\(figures.openReconciliationCount) \
            resyncs=\(figures.resyncCount) violations=\(violations.count) verdict=\(problems.isEmpty ? "ok" : problems.joined(separator: "; "))
            """)
        return problems.isEmpty
    }

    private func inject(_ group: LiveTapGroup) async {
        switch drop {
        case nil: await group.inject(fault ?? [])
        case .completions: await group.inject(fault ?? [], completions: (period: 20_000_000, burst: 3_000_000))
        case .issues: await group.inject(fault ?? [], issues: (period: 50_000_000, burst: 1_000_000), completions: (period: 30_000_000, burst: 1_000_000))
        // Many completions, so that much is in slots that has ended, and few issues: the one must not make up for the other.
        case .both: await group.inject(fault ?? [], issues: (period: 61_000_000, burst: 300_000), completions: (period: 20_000_000, burst: 10_000_000))
        }
    }

    private static var kernelRelease: String {
        var names = utsname()
        uname(&names)
        return withUnsafeBytes(of: &names.release) { String(decoding: $0.prefix { $0 != 0 }, as: UTF8.self) }
    }
}

/// A live tap and a replica of its disks in memory.
final class LiveTapReplica {
    let group: LiveTapGroup
    let images: [UnsafeMutableRawPointer]
    private var signal: AsyncStream<Void>.Iterator

    init(disks: [String], pins: String) async throws {
        group = try await LiveTapGroup(disks: disks.map { (name: String($0.split(separator: "/").last!), path: $0) }, pinDirectory: pins) { print($0) }
        images = group.disks.map {
            let image = UnsafeMutableRawPointer.allocate(byteCount: Int($0.geometry.sizeBytes), alignment: blockBytes)
            memset(image, 0xA5, Int($0.geometry.sizeBytes))
            return image
        }
        let (stream, continuation) = AsyncStream<Void>.makeStream(bufferingPolicy: .bufferingNewest(1))
        signal = stream.makeAsyncIterator()
        group.setWakeup { continuation.yield() }
    }

    deinit { for image in images { image.deallocate() } }

    func close() {
        group.setWakeup(nil)
        group.close()
    }

    /// Cuts, applies the epoch to the images and acknowledges it.
    func carry() async throws -> EpochKind {
        let cut = try await group.cut(fuzzyBytesMax: 64 << 20)
        while true {
            guard let item = group.nextItem() else {
                _ = await signal.next()
                continue
            }
            switch item {
            case .data(_, let buffer):
                (images[buffer.disk] + Int(buffer.offsetBytes)).copyMemory(from: buffer.memory, byteCount: buffer.lengthBytes)
                group.release(buffer)
            case .zero(_, let disk, let offset, let length): memset(images[disk] + Int(offset), 0, Int(length))
            case .end(let epoch):
                group.acknowledge(epoch)
                return cut.kind
            case .abandoned(_, let reason): throw SystemError(errno: EIO, what: "epoch \(cut.epoch.rawValue) was abandoned: \(reason.rawValue)")
            }
        }
    }

    func fullSync() async throws {
        group.beginFullSync()
        while await group.needsFuzzyCut { _ = try await carry() }
    }
}

/// A command line on its way, with an empty environment.
struct Shell {
    private let pid: pid_t
    /// As the shell has it: above 128 it was a signal.
    private(set) var status: Int32?

    init(_ command: String) throws(SystemError) {
        var pid = pid_t()
        var arguments: [UnsafeMutablePointer<CChar>?] = [strdup("/bin/sh"), strdup("-c"), strdup(command), nil]
        defer { for argument in arguments { free(argument) } }
        let result = posix_spawn(&pid, "/bin/sh", nil, nil, &arguments, nil)
        guard result == 0 else { throw SystemError(errno: result, doing: "start /bin/sh") }
        self.pid = pid
    }

    var hasEnded: Bool {
        mutating get {
            var raw: Int32 = 0
            if status == nil, waitpid(pid, &raw, WNOHANG) == pid { status = raw & 0x7F == 0 ? raw >> 8 : 128 + raw & 0x7F }
            return status != nil
        }
    }
}

/// What the programs counted against what the kernel did, from one quiet moment to another.
final class KernelAccount {
    struct Counts {
        var requests: Int64 = 0
        var discards: Int64 = 0
        /// Discards that became a further range of another request.
        var mergedDiscards: Int64 = 0
        var issued: Int64 = 0
        var completed: Int64 = 0
        var requeued: Int64 = 0
        var partial: Int64 = 0
        /// Against the programs' counters. The kernel counts empty flushes as writes: sectors tell whether, requests how many.
        var issueSectors: Int64 = 0
        var completionSectors: Int64 = 0
        var skippedIssues: Int64 { issueSectors == 0 ? 0 : requests - (issued - requeued) }
        var skippedCompletions: Int64 { completionSectors == 0 ? 0 : requests - completed }
    }

    private let statistics: [String]
    private let counters: UnsafePointer<clivetap_disk>
    private var start = Counts()

    /// `pins`: of an attached tap of these disks.
    init(disks: [String], pins: String) throws(SystemError) {
        statistics = disks.map { "/sys/class/block/\($0.split(separator: "/").last!)/stat" }
        let fd = clivetap_get("\(pins)/map-disks")
        guard fd >= 0 else { throw SystemError(errno: -fd, doing: "open the live tap's counters in \(pins)") }
        defer { close(fd) }
        let memory = mmap(nil, Int(CLIVETAP_DISKS_MAX) * MemoryLayout<clivetap_disk>.stride, PROT_READ, MAP_SHARED, fd, 0)
        guard let memory, memory != MAP_FAILED else { throw SystemError(errno: errno, doing: "map the live tap's counters") }
        counters = UnsafePointer(memory.bindMemory(to: clivetap_disk.self, capacity: Int(CLIVETAP_DISKS_MAX)))
        start = try now()
    }

    private func now() throws(SystemError) -> Counts {
        var counts = Counts()
        for (index, path) in statistics.enumerated() {
            // Fields: Documentation/block/stat.rst; writes and discards completed.
            let fd = open(path, O_RDONLY | O_CLOEXEC)
            guard fd >= 0 else { throw SystemError(errno: errno, doing: "read \(path)") }
            defer { close(fd) }
            var bytes = [UInt8](repeating: 0, count: 512)
            let count = read(fd, &bytes, bytes.count)
            let fields = String(decoding: bytes.prefix(max(0, count)), as: UTF8.self).split(whereSeparator: \.isWhitespace).map { Int64($0) ?? 0 }
            guard fields.count > 6 else { throw SystemError(errno: EINVAL, what: "cannot read \(path): it has \(fields.count) fields") }
            counts.discards += fields.count > 11 ? fields[11] : 0
            counts.mergedDiscards += fields.count > 12 ? fields[12] : 0
            counts.requests += fields[4] + (fields.count > 11 ? fields[11] : 0)
            let disk = counters[index]
            let sectors = fields[6] + (fields.count > 13 ? fields[13] : 0)
            counts.issueSectors += sectors - Int64(disk.issued_sectors) + Int64(disk.requeued_sectors)
            counts.completionSectors += sectors - Int64(disk.completed_sectors) - Int64(disk.unmatched_sectors)
            counts.issued += Int64(disk.issued)
            counts.completed += Int64(disk.completed + disk.unmatched)
            counts.requeued += Int64(disk.requeued)
            counts.partial += Int64(disk.partial)
        }
        return counts
    }

    /// Since this object was made.
    func difference() -> Counts {
        guard let end = try? now() else { return Counts() }
        return Counts(
            requests: end.requests - start.requests, discards: end.discards - start.discards, mergedDiscards: end.mergedDiscards - start.mergedDiscards, issued: end.issued - start.issued, completed: end.completed - start.completed,
            requeued: end.requeued - start.requeued, partial: end.partial - start.partial,
            issueSectors: end.issueSectors - start.issueSectors, completionSectors: end.completionSectors - start.completionSectors)
    }
}

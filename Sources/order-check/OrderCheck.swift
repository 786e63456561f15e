import ArgumentParser
import BlockTap
import Foundation
import Logging
import Replica
import Synchronization

/// Dependent, stamped writes go through the tap while recovery points are taken; every recovery point is read from the store and checked
/// exactly: a write is there only if all before it are. The last one has every write, and without a file system it is what the disks
/// hold, byte by byte. With --kill, agent and appliance are killed meanwhile. Points are checked offline, so in a run that is longer than the
/// policy keeps all of them the appliance is killed for that every few minutes.
@main
struct OrderCheck: AsyncParsableCommand {
    static let configuration = CommandConfiguration(commandName: "order-check", abstract: "Proves that recovery points are crash-consistent.")

    @Option(help: "Which tap follows the writes: nbd or live.") var tap = TestBed.Tap.nbd
    @Option(help: "What is on the disks of the live tap: none, ext4 or xfs.") var fs = TestBed.FileSystem.none
    @Option(help: "How long the writers run.") var seconds = 20
    @Option(help: "Disks in the consistency group.") var disks = 2
    @Option(help: "Size of each disk in MiB.") var size = 8
    @Option(help: "Dependent chains.") var chains = 4
    @Option(help: "Milliseconds between cuts.") var epochMs = 50
    @Option(help: "Pause after each write of a chain, in microseconds.") var pauseUs: UInt32 = 0
    @Option(help: "SIGKILL agent, appliance or both about this often, in seconds; 0 = never.") var kill = 0
    @Option(help: "Fewer recovery points than this is a failure.") var pointsMin = 20
    @Option(help: "Killing the agent less often is a failure.") var agentKillsMin = 0
    @Option(help: "The live tap's program drops issues or completions on purpose, in bursts (needs --tap live).") var drop: TestBed.Drop?
    @Option(help: "The afterimage executable (default: beside this one).") var afterimage: String?
    @Flag(help: "Keep the run's directory.") var keep = false

    func validate() throws {
        guard tap == .live || fs == .none else { throw ValidationError("--fs is for --tap live: the nbd tap has no file system on this side") }
        guard drop == nil || tap == .live else { throw ValidationError("--drop is for --tap live: the nbd tap has no program in the kernel") }
        guard disks > 0, chains > 0, size > 0 else { throw ValidationError("--disks, --chains and --size must be positive") }
    }

    func run() async throws {
        let binary = afterimage ?? URL(fileURLWithPath: CommandLine.arguments[0]).deletingLastPathComponent().appendingPathComponent("afterimage").path
        Interruption.watch()
        let bed = try TestBed(binary: binary, tap: tap, fileSystem: fs, drop: drop)
        defer { if !keep { bed.tearDown() } }
        do {
            let tally = Mutex(Tally())
            try write(bed, tally)
            let (passed, failed) = tally.withLock { ($0.judged.count - $0.failed, $0.failed) }
            print("\(passed) passed, \(failed) failed")
            if failed > 0 { throw ExitCode.failure }
        } catch let error as TestBed.Failure {
            print("order-check: \(error)")
            print("0 passed, 1 failed")
            throw ExitCode.failure
        }
    }

    private func write(_ bed: TestBed, _ tally: borrowing Mutex<Tally>) throws {
        try bed.makeDisks(count: disks, megabytes: size)
        try bed.startAppliance()
        try waitUntil("the appliance answers") { try bed.afterimage(["status"]) }
        try bed.startAgent()
        try bed.afterimage(["site-pair", "create", "pair", "--type", "zone-to-zone", "--primary", "here", "--secondary", "there"])
        let added = try bed.afterimage(["server", "add", "server", "--pair", "pair", "--json"])
        try bed.afterimage(["agent", "enroll", "--token", try token(in: added), "--state", bed.path("agent")])
        let diskBlocks = Array(repeating: (size << 20) / blockBytes, count: disks)
        let chains = (0..<self.chains).map { DependentChain(number: $0, chainCount: self.chains, diskBlocks: diskBlocks, pauseMicroseconds: pauseUs) }
        if tap == .nbd {
            try waitUntil("the tap listens") {
                guard (0..<disks).allSatisfy({ FileManager.default.fileExists(atPath: bed.socket($0)) }) else { throw TestBed.Failure(description: "no socket yet") }
            }
        }
        let threads = chains.map { chain in
            let thread = Thread { chain.run(connect: bed.target) }
            thread.start()
            return thread
        }
        try waitUntil("replication starts") { try bed.afterimage(["replication", "start", "server", "--epoch-ms", "\(epochMs)", "--wait"]) }
        let end = Date().addingTimeInterval(Double(seconds))
        var kills = 0, agentKills = 0
        var look = Date().addingTimeInterval(Self.secondsBetweenLooks)
        while Date() < end {
            let pause = kill > 0 ? Double(kill) * Double.random(in: 0.5..<1.5) : end.timeIntervalSinceNow
            try sleep(until: min(Date().addingTimeInterval(pause), end, look))
            if Date() >= look, end.timeIntervalSinceNow > 30 {
                bed.kill("appliance")
                try check(bed, chains, tally)
                try bed.startAppliance()
                look = Date().addingTimeInterval(Self.secondsBetweenLooks)
            } else if kill > 0 && Date() < end {
                kills += 1
                if try killSomething(bed, kills) { agentKills += 1 }
            }
        }
        chains.forEach { $0.stop() }
        while threads.contains(where: { !$0.isFinished }) { usleep(10_000) }
        print("\(chains.reduce(0) { $0 + $1.acknowledged }) writes acknowledged in \(seconds) s by \(self.chains) chains on \(disks) disks, \(kills) kills, \(agentKills) of them of the agent")
        // Holds every write that was acknowledged.
        try waitUntil("there is a last recovery point") { try bed.afterimage(["recovery-point", "create", "server", "--wait"]) }
        if drop == .issues {
            let seen = try resyncCount(bed)
            print("the kernel's account told of missed writes \(seen) times since the agent last began")
            if seen == 0, kill == 0 { tally.withLock { $0.fail("issues were dropped, and nobody noticed") } }
        }
        bed.stop("agent")
        bed.stop("appliance")
        try check(bed, chains, tally, isLast: true)
        try tally.withLock { tally in
            print("\(tally.judged.count) recovery points checked; newest write seen: \(tally.newestSeen)")
            if !tally.hasLast { throw TestBed.Failure(description: "the last recovery point is gone") }
            if tally.judged.count < pointsMin { tally.fail("fewer than \(pointsMin) recovery points") }
            if agentKills < agentKillsMin { tally.fail("the agent was killed fewer than \(agentKillsMin) times") }
        }
    }

    /// A policy keeps every point for ten minutes if nothing else is said.
    private static let secondsBetweenLooks = 240.0

    private func resyncCount(_ bed: TestBed) throws -> Int {
        let view = try JSONSerialization.jsonObject(with: Data(try bed.afterimage(["server", "show", "server", "--json"]).utf8))
        let live = ((view as? [String: Any])?["agent"] as? [String: Any])?["live"] as? [String: Any]
        guard let count = live?["resyncCount"] as? Int else { throw TestBed.Failure(description: "the server's view has no resyncCount") }
        return count
    }

    private func sleep(until end: Date) throws {
        while case let left = end.timeIntervalSinceNow, left > 0 {
            if Interruption.happened { throw TestBed.Failure(description: "ended by a signal before anything was judged") }
            Thread.sleep(forTimeInterval: min(left, 0.2))
        }
    }

    /// Whether the agent was among it.
    private func killSomething(_ bed: TestBed, _ kills: Int) throws -> Bool {
        let agent = kills % 3 != 1
        let appliance = kills % 3 != 2
        if agent { bed.kill("agent") }
        if appliance { bed.kill("appliance") }
        if appliance { try bed.startAppliance() }
        if agent { try bed.startAgent() }
        return agent
    }

    /// Reads every recovery point of the store that was not looked at before, offline, and lets every chain judge it.
    private func check(_ bed: TestBed, _ chains: [DependentChain], _ tally: borrowing Mutex<Tally>, isLast: Bool = false) throws {
        var logger = Logger(label: "store")
        logger.logLevel = .warning
        let store = try ReplicaStore.open(directory: bed.path("store"), logger: logger)
        defer { store.close() }
        guard let group = store.groups().first else { throw TestBed.Failure(description: "the store has no group") }
        let judged = tally.withLock { $0.judged }
        let points = store.recoveryPoints(group.id).filter { !judged.contains($0.id) }
        let verdicts = Mutex<[(RecoveryPointID, Result<(newest: UInt64, violations: [String]), any Error>)]>([])
        // Once: whoever holds a log has the next write copy it. All that these points can have was written by now.
        let logs = chains.map(\.writes)
        let models = tally.withLock { $0.models } ?? chains.map { DependentChain.Model($0) }
        let newestModels = Mutex(models)
        // Several at a time, each from an older point to a newer one.
        let parts = ProcessInfo.processInfo.activeProcessorCount
        DispatchQueue.concurrentPerform(iterations: parts) { part in
            var models = models
            defer { if part == parts - 1 { newestModels.withLock { $0 = models } } }
            for point in points[points.count * part / parts..<points.count * (part + 1) / parts] where !Interruption.happened {
                let verdict = Result { try self.judge(point, of: group.id, in: store, chains, logs, &models, bed) }
                verdicts.withLock { $0.append((point.id, verdict)) }
            }
        }
        let (found, newest) = (verdicts.withLock { $0 }, newestModels.withLock { $0 })
        tally.withLock { tally in
            for (point, verdict) in found { tally.count(point, verdict) }
            if found.count == points.count { tally.models = newest }
            if isLast { tally.hasLast = points.contains(where: \.isOnDemand) }
            if found.count < points.count { tally.fail("ended by a signal: \(points.count - found.count) were not judged") }
        }
    }

    private struct Tally {
        var judged: Set<RecoveryPointID> = []
        var failed = 0
        var newestSeen: UInt64 = 0
        var hasLast = false
        /// As of the newest point that was judged.
        var models: [DependentChain.Model]?

        mutating func count(_ point: RecoveryPointID, _ verdict: Result<(newest: UInt64, violations: [String]), any Error>) {
            judged.insert(point)
            switch verdict {
            case .success(let (newest, violations)):
                newestSeen = max(newestSeen, newest)
                violations.forEach { print("recovery point \(point), \($0)") }
                if !violations.isEmpty { failed += 1 }
            case .failure(let error):
                print("recovery point \(point) cannot be read: \(error)")
                failed += 1
            }
        }

        mutating func fail(_ words: String) {
            print(words)
            failed += 1
        }
    }

    /// Reads one recovery point whole and lets every chain judge it. The last one, made on demand when nobody wrote any more, must hold all that was
    /// acknowledged.
    private func judge(
        _ point: RecoveryPoint, of group: GroupID, in store: ReplicaStore, _ chains: [DependentChain], _ logs: [[DependentChain.Write]],
        _ models: inout [DependentChain.Model], _ bed: TestBed
    ) throws -> (newest: UInt64, violations: [String]) {
        let bytes = size << 20
        let images = (0..<disks).map { _ in UnsafeMutableRawBufferPointer.allocate(byteCount: bytes, alignment: blockBytes) }
        defer { images.forEach { $0.deallocate() } }
        for disk in 0..<disks {
            let reader = try store.openRecoveryPoint(group, point.id, volume: disk)
            if fs == .none { try reader.read(offsetBytes: 0, into: images[disk]) } else {
                try readFile(reader, image: bed.path("\(point.id).\(disk).img"), bed, into: images[disk])
            }
        }
        var newestSeen: UInt64 = 0
        var violations: [String] = []
        for (number, chain) in chains.enumerated() {
            let verdict = chain.check(&models[number], logs[number]) { disk, block in
                let at = images[disk].baseAddress! + block * blockBytes
                return (at.load(as: UInt64.self), at.load(fromByteOffset: 8, as: UInt64.self))
            }
            switch verdict {
            case .exact(let newest):
                newestSeen = max(newestSeen, newest)
                if point.isOnDemand, newest < chain.acknowledged {
                    violations.append("chain \(chain.number): lost: write \(chain.acknowledged) was acknowledged, \(newest) is the newest here")
                }
            case .violation(let words): violations.append("chain \(chain.number): \(words)")
            }
        }
        if point.isOnDemand, fs == .none {
            for disk in 0..<disks {
                if let block = try bed.firstDifference(disk: disk, from: UnsafeRawBufferPointer(images[disk])) { violations.append("disk \(disk), block \(block): the disk holds something else") }
            }
        }
        return (newestSeen, violations)
    }

    /// The chains' file in the file system that a recovery point holds: mounted, as after a power cut, and checked.
    private func readFile(_ reader: VolumeReader, image: String, _ bed: TestBed, into file: UnsafeMutableRawBufferPointer) throws {
        defer { try? FileManager.default.removeItem(atPath: image) }
        let fd = open(image, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0o600)
        guard fd >= 0 else { throw TestBed.Failure(description: "cannot make \(image)") }
        defer { close(fd) }
        let total = (size + fs.megabytes) << 20
        guard ftruncate(fd, off_t(total)) == 0 else { throw TestBed.Failure(description: "cannot size \(image)") }
        let piece = UnsafeMutableRawBufferPointer.allocate(byteCount: 1 << 20, alignment: blockBytes)
        defer { piece.deallocate() }
        for offset in stride(from: 0, to: total, by: piece.count) {
            try reader.read(offsetBytes: UInt64(offset), into: piece)
            for block in stride(from: 0, to: piece.count, by: blockBytes) {
                let part = UnsafeRawBufferPointer(rebasing: piece[block..<block + blockBytes])
                if part.first == 0, memcmp(part.baseAddress!, part.baseAddress! + 1, part.count - 1) == 0 { continue }
                guard pwrite(fd, part.baseAddress!, part.count, off_t(offset + block)) == part.count else {
                    throw TestBed.Failure(description: "cannot write \(image)")
                }
            }
        }
        try bed.withMounted(image) { directory in
            let handle = open(directory + "/chains", O_RDONLY | O_CLOEXEC)
            defer { close(handle) }
            var done = 0
            while done < file.count {
                let count = pread(handle, file.baseAddress! + done, file.count - done, off_t(done))
                guard count > 0 else { throw TestBed.Failure(description: "\(directory)/chains is not whole") }
                done += count
            }
        }
    }

    private func token(in json: String) throws -> String {
        guard let range = json.firstRange(of: /"token"\s*:\s*"([^"]+)"/), let match = json[range].firstMatch(of: /:\s*"([^"]+)"/) else {
            throw TestBed.Failure(description: "no token in \(json)")
        }
        return String(match.1)
    }

    /// Tries until `attempt` succeeds; its last error when it does not within a minute.
    private func waitUntil(_ what: String, _ attempt: () throws -> Void) throws {
        let deadline = Date().addingTimeInterval(60)
        while true {
            do {
                return try attempt()
            } catch {
                if Interruption.happened { throw TestBed.Failure(description: "ended by a signal before anything was judged") }
                if Date() > deadline { throw TestBed.Failure(description: "waited 60 s in vain until \(what): \(error)") }
                usleep(100_000)
            }
        }
    }
}

/// SIGINT or SIGTERM: what is judged already is told, and nothing is left behind. (A handler, not an ignored signal: the processes that are
/// started must not inherit it.)
private enum Interruption {
    private static let flag = Atomic(false)
    static var happened: Bool { flag.load(ordering: .relaxed) }

    static func watch() {
        for number in [SIGINT, SIGTERM] { signal(number) { _ in Interruption.flag.store(true, ordering: .relaxed) } }
    }
}

extension TestBed.Tap: ExpressibleByArgument {}
extension TestBed.FileSystem: ExpressibleByArgument {}
extension TestBed.Drop: ExpressibleByArgument {}

import BlockTap
import Logging

@testable import Replica

/// The store differed from its model.
public struct SimulationFailure: Error, CustomStringConvertible {
    public var seed: UInt64
    public var what: String
    public var description: String { "seed \(seed): \(what)" }
}

/// One line per message.
private struct SimulationLog: LogHandler {
    let write: (String) -> Void
    var metadata = Logger.Metadata()
    var logLevel = Logger.Level.debug

    init(write: @escaping (String) -> Void) { self.write = write }

    subscript(metadataKey key: String) -> Logger.Metadata.Value? {
        get { metadata[key] }
        set { metadata[key] = newValue }
    }

    func log(level: Logger.Level, message: Logger.Message, metadata: Logger.Metadata?, source: String, file: String, function: String, line: UInt) {
        let details = (metadata ?? [:]).sorted { $0.key < $1.key }.map { " \($0.key)=\($0.value)" }.joined()
        write("\(message)\(details)")
    }
}

/// What the store takes for the time.
final class SimulatedClock: @unchecked Sendable {
    var nanoseconds: UInt64 = 1_700_000_000_000_000_000
}

/// One run: a store on simulated files does what its users do, while files fail and the power goes; after every crash it must hold what it
/// acknowledged, and nothing that nobody asked for. At the end everything heals, and all must go on.
public final class Simulation {
    public struct Result: Sendable {
        public var trace: UInt64 = 0
        public var stepCount = 0
        public var operationCount = 0
        public var crashCount = 0
        public var pointCount = 0
        /// Errors that faults caused.
        public var refusedCount = 0
        public var forkSealCount = 0
        public var forkForkCount = 0
        public var commitCount = 0
        /// Marks of forks that were made, and times that what lies between two was looked at; groups that were turned back to what a committed fork was made of.
        public var markCount = 0
        public var markCheckCount = 0
        public var turnBackCount = 0
        public var upkeep = UpkeepCounts()
        /// What open forks did of themselves.
        public var forkTaskCount = 0
        public var indexesMade = 0
        public var indexesOpened = 0
        public var indexRotCount = 0
        public var repairCount = 0
        public var repairRefusedCount = 0
        /// Times that the disk was full to the last page.
        public var refusedForSpace = 0

        public init() {}

        public static func += (left: inout Result, right: Result) {
            left.trace ^= right.trace
            left.stepCount += right.stepCount
            left.operationCount += right.operationCount
            left.crashCount += right.crashCount
            left.pointCount += right.pointCount
            left.refusedCount += right.refusedCount
            left.forkSealCount += right.forkSealCount
            left.forkForkCount += right.forkForkCount
            left.commitCount += right.commitCount
            left.markCount += right.markCount
            left.markCheckCount += right.markCheckCount
            left.turnBackCount += right.turnBackCount
            left.upkeep += right.upkeep
            left.forkTaskCount += right.forkTaskCount
            left.indexesMade += right.indexesMade
            left.indexesOpened += right.indexesOpened
            left.indexRotCount += right.indexRotCount
            left.repairCount += right.repairCount
            left.repairRefusedCount += right.repairRefusedCount
            left.refusedForSpace += right.refusedForSpace
        }

        public var words: String {
            "\(stepCount) steps with \(operationCount) operations on files, \(crashCount) crashes, \(refusedCount) refusals; at the end \(pointCount) recovery points; forks sealed \(forkSealCount), of forks \(forkForkCount), committed \(commitCount), marked \(markCount) and looked at \(markCheckCount), turned back \(turnBackCount), of themselves \(forkTaskCount); \(upkeep); indexes written \(indexesMade), opened \(indexesOpened), rotten \(indexRotCount); repairs \(repairCount), refused \(repairRefusedCount); full \(refusedForSpace)"
        }
    }

    /// What goes wrong in a run.
    enum Weather: Int, CaseIterable {
        /// Nothing but crashes.
        case crashes
        /// ENOSPC, without crashes: nothing may need a restart.
        case full
        /// EIO, ENOSPC and crashes.
        case faults
        /// Flipped bits, lost and misdirected writes: right data or an error.
        case lies
    }

    let seed: UInt64
    let steps: Int
    let weather: Weather
    var random: SimulationRandom
    let storage: SimulatedStorage
    let clock = SimulatedClock()
    let logger: Logger
    var options = StoreOptions()
    var store: ReplicaStore!

    var state = SimulationState()
    var possible: [PossibleChange] = []
    var incoming: [String: Incoming] = [:]
    var sealing: [Incoming] = []
    var openForks: [String: ForkVolume] = [:]
    var readers: [(reader: VolumeReader, image: Image, what: String)] = []
    var policies: [String: RecoveryPointPolicy?] = [:]
    var isTightening = false
    var rot: Rot?
    /// Most writes go to one part of a disk, so that segments keep a few blocks for long.
    let isSkewed: Bool
    /// Of the lies only those happen that scrubbing finds and repair puts right.
    let isMending: Bool
    /// By checksum, what blocks held that were received.
    var received: [UInt64: [UInt32]] = [:]
    /// Something that open forks need is under way.
    var isForkBusy = false
    /// Blocks of zeroes come as data, too.
    let hasZeroData: Bool
    var nextStamp: UInt32 = 1
    var nextEpoch: UInt64 = 1
    /// Since the store was opened, or since space came back.
    var errorsAllowed = false
    var step = 0
    var result = Result()

    /// An epoch that a group receives or seals.
    final class Incoming: @unchecked Sendable {
        let group: String
        let writer: EpochWriter
        let epoch: UInt64
        let isExact: Bool
        var images: [Image]
        let base: Incoming?
        var mustFail = false
        var outcome: Swift.Result<RecoveryPoint?, StoreError>?
        var hasFailed = false

        init(group: String, writer: EpochWriter, epoch: UInt64, isExact: Bool, images: [Image], base: Incoming?) {
            self.group = group
            self.writer = writer
            self.epoch = epoch
            self.isExact = isExact
            self.images = images
            self.base = base
        }
    }

    init(seed: UInt64, steps: Int, deliberateFault: DeliberateFault? = nil, weather: Weather? = nil, log: ((String) -> Void)? = nil) {
        self.seed = seed
        self.steps = steps
        random = SimulationRandom(seed: seed)
        logger = Logger(label: "simulation") { _ -> any LogHandler in if let log { SimulationLog(write: log) } else { SwiftLogNoOpLogHandler() } }
        storage = SimulatedStorage(seed: seed &+ 0x5707_A6E0)
        let kind = random.below(8)
        if log != nil { storage.onStep = { [logger] what, path in if what != "read" && what != "look at" { logger.debug("  \(what) \(path)") } } }
        self.weather = weather ?? [.crashes, .crashes, .crashes, .faults, .faults, .faults, .full, .lies][kind]
        options.segmentBytes = 4096 * UInt64([8, 24, 64, 64, 200, 400][random.below(6)])
        options.preallocationBytes = 64 << 10
        options.writeBufferBytes = 4096 * [1, 3, 8][random.below(3)]
        // Many: nobody writes them out while an epoch is appended to.
        options.writeBufferCount = 4096
        options.writeBytesMin = 4096 * [1, 2, 100][random.below(3)]
        options.manifestRewriteBytes = UInt64([2 << 10, 16 << 10, 4 << 20][random.below(3)])
        options.garbageBytesMin = 4096 * UInt64([0, 8, 64][random.below(3)])
        options.reclaimBytesMin = 4096 * UInt64([0, 1, 4][random.below(3)])
        options.lowSpaceBytes = 0
        storage.canPunch = !random.oneIn(4)
        hasZeroData = random.oneIn(2)
        isSkewed = !random.oneIn(3)
        isMending = random.oneIn(2)
        options.journalEntriesMax = [3, 10, 4096][random.below(3)]
        options.forkJournalBytesMax = [2 << 10, 16 << 10, 64 << 20][random.below(3)]
        options.forkDeadBytesMax = 4096 * UInt64([0, 16, 65_536][random.below(3)])
        options.compression = [.none, .lz4, .zstd][random.below(3)]
        options.residentChecksumCountMax = [0, 8, 64 << 10][random.below(3)]
        options.checksumCacheBytes = [4096, 256 << 10][random.below(2)]
        options.layerFilesOpenMax = [1, 3, 128][random.below(3)]
        // A layer counts as 200 extents.
        options.indexFileCostMin = [1, 500, 2500, 100_000][random.below(4)]
        options.rebaseExtentsMax = [0, 6, 200_000][random.below(3)]
        options.isStepped = true
        options.newUUID = { StoreUUID(high: seed | 1 << 63, low: 1) }
        options.now = { [clock] in clock.nanoseconds }
        options.deliberateFault = deliberateFault
    }

    /// `log` is given what is done, and what the store says to that.
    /// `faultNamed`: a mistake that the store is to make. Throws `SimulationFailure` when anything is not as it should be.
    public static func run(seed: UInt64, steps: Int, faultNamed name: String? = nil, log: ((String) -> Void)? = nil) throws -> Result {
        let fault = try name.map { name in
            guard let fault = DeliberateFault.allCases.first(where: { "\($0)" == name }) else {
                throw SimulationFailure(seed: seed, what: "there is no fault \"\(name)\", but: \(DeliberateFault.allCases.map { "\($0)" }.joined(separator: ", "))")
            }
            return fault
        }
        return try Simulation(seed: seed, steps: steps, deliberateFault: fault, log: log).run()
    }

    static func run(seed: UInt64, steps: Int, deliberateFault: DeliberateFault?) throws -> Result {
        try Simulation(seed: seed, steps: steps, deliberateFault: deliberateFault).run()
    }

    func run() throws -> Result {
        do {
            try open()
            while step < steps {
                step += 1
                try act()
            }
            try heal()
            result.trace = storage.trace
            result.stepCount = step
            result.operationCount = storage.operationCount
            result.indexesMade = storage.indexesMade
            result.indexesOpened = storage.indexesOpened
            result.refusedForSpace = storage.refusedForSpace
            discard()
            return result
        } catch {
            discard()
            throw error
        }
    }

    /// Leaves nothing that keeps the store alive.
    private func discard() {
        dropHandles()
        store?.close()
        store = nil
    }

    func failure(_ what: String) -> SimulationFailure { SimulationFailure(seed: seed, what: "step \(step) (\(weather)): \(what)") }

    func expect(_ holds: Bool, _ what: @autoclosure () -> String) throws { if !holds { throw failure(what()) } }

    /// Looks at things without faults, and without leaving a trace.
    func calmly<T, E: Error>(_ body: () throws(E) -> T) throws(E) -> T {
        storage.isCalm = true
        defer { storage.isCalm = false }
        return try body()
    }

    /// Does what may be refused while errors are allowed; the change may have happened then.
    @discardableResult
    func attempt<T>(_ what: String, _ change: PossibleChange? = nil, _ body: () throws(StoreError) -> T) throws -> T? {
        logger.debug("\(step): \(what)")
        do throws(StoreError) { return try body() } catch {
            try refused(what, error, change)
            return nil
        }
    }

    func refused(_ what: String, _ error: StoreError, _ change: PossibleChange?) throws {
        logger.debug("\(what) refused: \(error)")
        try expect(errorsAllowed || storage.isDown || storage.liesTold > 0, "\(what): \(error)")
        if case .full = error {} else if let change { possible.append(change) }
        result.refusedCount += 1
    }

    // MARK: Opening and crashing

    /// Opens until it works; faults may be in the way, but only faults.
    func open() throws {
        while true {
            do throws(StoreError) {
                store = try ReplicaStore(storage: storage, options: options, logger: logger)
                break
            } catch {
                if storage.isDown {
                    storage.restart(powerLost: random.oneIn(2))
                    result.crashCount += 1
                    continue
                }
                if weather == .lies, storage.liesTold > 0 {
                    store = nil
                    return
                }
                try expect(errorsAllowed, "cannot open: \(error)")
                storage.faults = .init()
                storage.capacityPages = nil
                errorsAllowed = false
            }
        }
        errorsAllowed = storage.faults.ioErrorOneIn > 0 || storage.faults.fullOneIn > 0 || storage.faults.isFull || storage.capacityPages != nil
        if !storage.isDown { try adopt() }
    }

    /// What the store holds is what was acknowledged, or that and one of the changes that may have happened.
    private func adopt() throws {
        let seen = calmly { SimulationState.summary(of: store) }
        var candidates = [state]
        for change in possible {
            var candidate = state
            change.apply(to: &candidate)
            candidates.append(candidate)
        }
        guard let match = candidates.first(where: { $0.summary == seen }) else {
            throw failure("after opening there is \(seen) not \(candidates.map(\.summary).joined(separator: " or "))")
        }
        state = match
        possible = []
        for name in state.groups.keys.sorted() {
            let points = store.recoveryPoints(GroupID(name))
            for index in points.indices {
                let known = state.groups[name]!.points[index].id
                try expect(known == nil || known == points[index].id, "point \(known!) of \(name) is \(points[index].id) now")
                state.groups[name]!.points[index].id = points[index].id
            }
        }
        setPolicies()
        try checkPoints(all: random.oneIn(3))
    }

    /// The process ends: closed, killed, or with the machine.
    enum End { case close, kill, powerLoss }

    func end(_ end: End) throws {
        logger.debug("\(step): end: \(end)")
        if end == .close, !storage.isDown {
            for key in openForks.keys.sorted() { try closeFork(key) }
            readers = []
            for name in incoming.keys.sorted() { incoming[name] = nil }
            store.close()
            try collect()
        } else {
            // Whatever it still does after its end does not count.
            storage.goDown()
            result.crashCount += 1
            store.close()
            try collect()
            dropHandles()
            storage.restart(powerLost: end == .powerLoss)
        }
        dropHandles()
        store = nil
        try open()
    }

    private func dropHandles() {
        openForks = [:]
        readers = []
        incoming = [:]
        sealing = []
    }

    /// After a step in which the power went off.
    func restartIfDown() throws {
        if storage.isDown { try end(random.oneIn(2) ? .powerLoss : .kill) }
    }

    /// No more faults: the store is opened once more, and everything must work.
    private func heal() throws {
        storage.faults = .init()
        storage.capacityPages = nil
        storage.operationsUntilDown = nil
        if weather == .lies {
            if store != nil { try repair() }
            return try endLies()
        }
        if weather == .full {
            try drain()
            incoming = [:]
            errorsAllowed = false
            try checkPoints(all: true)
        } else {
            try end(storage.isDown ? .powerLoss : [End.close, .kill, .powerLoss][random.below(3)])
        }
        errorsAllowed = false
        for _ in 0..<30 {
            step += 1
            try actHealthily()
        }
        try drain()
        incoming = [:]
        if random.oneIn(2) {
            try rest()
            try checkPoints(all: true)
            try checkForks()
        }
        for key in openForks.keys.sorted() { try closeFork(key) }
        try rest()
        try checkPoints(all: true)
        try scrubAll()
        let scrubbed = store.statistics().scrub
        try expect(scrubbed.badBlockCount == 0 && scrubbed.badFileCount == 0, "in the end there is damage: \(store.badExtents())")
        if random.oneIn(3) {
            while !state.forks.isEmpty { try dropFork() }
            try rest()
            try checkPoints(all: true)
        }
        try end(.close)
        try checkPoints(all: true)
        for name in state.machines {
            for volume in state.forks[name]!.volumes.indices { try openFork(name, volume) }
        }
        result.pointCount = state.groups.values.reduce(0) { $0 + $1.points.count }
        try end(.close)
    }
}

extension Simulation.Incoming {
    var change: PossibleChange { .seal(group, epoch: epoch, isExact: isExact, images: images) }
}

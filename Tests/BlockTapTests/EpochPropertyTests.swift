import BlockTap
import Glibc
import Testing

/// The epoch algorithm against a model: random writes, zeroings, cuts, drains, abandons and acknowledgements on a simulated device
/// whose writes land sector by sector, at any moment between their start and their completion; which answers short, interrupted or
/// with errors; and a link whose loss takes back what was not acknowledged.
@Suite struct EpochPropertyTests {
    @Test(arguments: 0..<UInt64(400))
    func everyExactEpochIsTheDiskAtItsCut(seed: UInt64) {
        #expect(EpochSimulation(seed: seed).run() == nil)
    }

    /// A test that cannot fail proves nothing: each deliberate fault must be found by some seed.
    @Test(arguments: [TapFaults.skipCopyBeforeWrite, .forgetInFlightAtCut, .markAfterWrite])
    func deliberateFaultsAreCaught(fault: TapFaults) {
        #expect((0..<UInt64(60)).contains { EpochSimulation(seed: $0, faults: fault).run() != nil })
    }

    /// Writes into discarded space while nobody takes what the tap hands out: memory stays bounded, and the epoch exact.
    @Test func overwrittenZeroesDoNotPileUp() throws {
        let engine = EpochEngine(configuration: TapConfiguration(drainBufferCount: 2))
        let device = SimulatedDisk(sectorCount: 8192 * sectorsPerBlock)
        let disk = engine.addDisk(name: "disk", geometry: BlockGeometry(sizeBytes: 8192 * UInt64(blockBytes), logicalBlockBytes: 512), io: device)
        let client = SimulatedClient()
        var rng = SplitMix(seed: 1)
        func request(_ operation: BlockOperation, block: Int, count: Int = 1) {
            let request = client.slots + client.free.popLast()!
            request.pointee.operation = operation
            request.pointee.offsetBytes = UInt64(block * blockBytes)
            request.pointee.lengthBytes = UInt32(count * blockBytes)
            request.pointee.buffer = client.memory
            disk.submit(request)
            while client.free.count < SimulatedClient.depth { device.step(&rng) }
        }
        for sector in 0..<(SimulatedClient.sectorsMax) { (client.memory + sector * sectorBytes).storeBytes(of: 7, as: UInt64.self) }
        for block in 0..<4 { request(.write, block: block * 2) }
        request(.trim, block: 100, count: 8000)
        let cut = try engine.cut(fuzzyBytesMax: 0)
        // Both buffers are taken: the drain waits in front of the zeroes.
        for block in 0..<4000 { request(.write, block: 100 + block * 2) }
        var itemCount = 0
        while engine.queue.pop() != nil { itemCount += 1 }
        #expect(itemCount <= 1100)
        engine.abandonAll()
        #expect(cut.kind == .exact)
    }
}

struct SplitMix: RandomNumberGenerator {
    var state: UInt64
    init(seed: UInt64) { state = seed &* 0x9E37_79B9_7F4A_7C15 &+ 1 }
    mutating func next() -> UInt64 {
        state &+= 0x9E37_79B9_7F4A_7C15
        var z = state
        z = (z ^ (z >> 30)) &* 0xBF58_476D_1CE4_E5B9
        z = (z ^ (z >> 27)) &* 0x94D0_49BB_1331_11EB
        return z ^ (z >> 31)
    }
    mutating func below(_ bound: Int) -> Int { Int(next() % UInt64(bound)) }
    mutating func chance(_ percent: Int) -> Bool { below(100) < percent }
}

let sectorBytes = 512
let sectorsPerBlock = blockBytes / sectorBytes

/// A device of stamped sectors (one stamp per 512 bytes). An operation in flight lands per sector, in any order, before it completes.
final class SimulatedDisk: DiskIO {
    var content: [UInt64]
    /// Chance in percent that a completion is an error, short, or interrupted.
    var errorPercent = 0
    var shortPercent = 0
    var interruptPercent = 0
    /// Holes cannot be punched; zeroes are written.
    var refusesPunch = false

    struct InFlight {
        enum Kind { case read, write, zero, flush }
        var token: UInt32
        var kind: Kind
        var isPunch = false
        var memory: UnsafeMutableRawPointer?
        var first: Int
        var stamp: [UInt64] = []
        var landed: [Bool]
        var isChange: Bool { kind == .write || kind == .zero }
    }
    var inFlight: [InFlight] = []

    init(sectorCount: Int) {
        content = Array(repeating: 0, count: sectorCount)
        super.init()
    }

    private func add(_ kind: InFlight.Kind, _ offset: UInt64, _ count: Int, _ token: UInt32, isPunch: Bool = false, memory: UnsafeMutableRawPointer? = nil, stamp: (Int) -> UInt64 = { _ in 0 }) {
        precondition(offset % UInt64(sectorBytes) == 0 && count % sectorBytes == 0 && count > 0)
        precondition(Int(offset) + count <= content.count * sectorBytes)
        let sectors = count / sectorBytes
        inFlight.append(
            .init(
                token: token, kind: kind, isPunch: isPunch, memory: memory, first: Int(offset) / sectorBytes, stamp: (0..<sectors).map(stamp),
                landed: Array(repeating: false, count: sectors)))
    }

    override func read(into buffer: UnsafeMutableRawPointer, count: Int, offset: UInt64, token: UInt32) {
        add(.read, offset, count, token, memory: buffer)
    }

    override func write(from buffer: UnsafeRawPointer, count: Int, offset: UInt64, dsync: Bool, token: UInt32) {
        add(.write, offset, count, token) { buffer.load(fromByteOffset: $0 * sectorBytes, as: UInt64.self) }
    }

    override func zero(offset: UInt64, length: UInt64, allocate: Bool, token: UInt32) {
        add(.zero, offset, Int(length), token, isPunch: !allocate)
    }

    override func flush(token: UInt32) {
        inFlight.append(.init(token: token, kind: .flush, first: 0, landed: []))
    }

    /// Moves one operation on: lands a part of it, or completes it.
    func step(_ rng: inout SplitMix) {
        guard !inFlight.isEmpty else { return }
        let i = rng.below(inFlight.count)
        let op = inFlight[i]
        if op.isPunch && refusesPunch { return complete(i, -EOPNOTSUPP) }
        if rng.chance(interruptPercent) && !op.landed.contains(true) { return complete(i, rng.chance(50) ? -EINTR : -EAGAIN) }
        if rng.chance(errorPercent) { return complete(i, -EIO) }
        let open = op.landed.indices.filter { !op.landed[$0] }
        if let sector = open.randomElement(using: &rng) {
            if (op.kind == .read || op.kind == .write) && rng.chance(shortPercent), let part = op.landed.firstIndex(of: false), part > 0 {
                return complete(i, Int32(part * sectorBytes))
            }
            land(i, sector)
            if open.count > 1 && rng.chance(60) { open.forEach { if !inFlight[i].landed[$0] { land(i, $0) } } }
            return
        }
        complete(i, op.kind == .read || op.kind == .write ? Int32(op.landed.count * sectorBytes) : 0)
    }

    private func complete(_ i: Int, _ result: Int32) {
        let op = inFlight.remove(at: i)
        completed(token: op.token, result: result)
    }

    private func land(_ i: Int, _ sector: Int) {
        let op = inFlight[i]
        inFlight[i].landed[sector] = true
        if op.isChange {
            content[op.first + sector] = op.stamp[sector]
        } else {
            (op.memory! + sector * sectorBytes).storeBytes(of: content[op.first + sector], as: UInt64.self)
        }
    }

    /// What each sector may hold after a crash now.
    var allowed: [Set<UInt64>] {
        var sets = content.map { Set([$0]) }
        for op in inFlight where op.isChange {
            for s in op.landed.indices { sets[op.first + s].insert(op.stamp[s]) }
        }
        return sets
    }
}

/// Issues requests as a block server would.
final class SimulatedClient: BlockRequestOwner {
    static let depth = 12
    static let sectorsMax = 64
    var slots: UnsafeMutablePointer<BlockRequest>
    var free: [Int] = Array(0..<depth)
    let memory: UnsafeMutableRawPointer
    /// Errors that no device may cause.
    var surprise: Int32?

    override init() {
        slots = .allocate(capacity: Self.depth)
        memory = .allocate(byteCount: Self.depth * Self.sectorsMax * sectorBytes, alignment: blockBytes)
        super.init()
        for i in 0..<Self.depth { (slots + i).initialize(to: BlockRequest(owner: .passUnretained(self), token: UInt32(i))) }
    }

    deinit {
        slots.deallocate()
        memory.deallocate()
    }

    override func requestCompleted(_ request: BlockRequestPointer, error: Int32) {
        if error != 0 && error != EIO { surprise = error }
        free.append(Int(request.pointee.token))
    }
}

/// What the other threads would have been told.
private final class Signals: @unchecked Sendable {
    var isConsumerAwake = false
    var isTapResumed = false
}

struct EpochSimulation {
    let seed: UInt64
    var faults: TapFaults = []
    var stepCount = 3000

    /// Nil, or the first difference found.
    func run() -> String? {
        var rng = SplitMix(seed: seed)
        let blockCount = 8 + rng.below(56)
        // Some disks end within a block.
        let sectorCount = blockCount * sectorsPerBlock - (rng.chance(50) ? rng.below(sectorsPerBlock) : 0)
        let preservedBlocks = rng.chance(30) ? 4 : 64  // small: epochs are abandoned over budget
        let engine = EpochEngine(
            configuration: TapConfiguration(
                preservedBytesMax: preservedBlocks * blockBytes, drainDepth: 1 + rng.below(4), drainBufferCount: 2 + rng.below(4), requestsMax: 1 + rng.below(20)))
        engine.faults = faults
        let signals = Signals()
        engine.queue.resume = { signals.isTapResumed = true }
        engine.queue.setWakeup { signals.isConsumerAwake = true }
        let diskCount = 1 + rng.below(2)
        let devices = (0..<diskCount).map { _ in SimulatedDisk(sectorCount: sectorCount) }
        let hasTrouble = rng.chance(50)
        for (i, device) in devices.enumerated() {
            for s in 0..<sectorCount where rng.chance(50) { device.content[s] = UInt64(1_000_000 + s) }
            if hasTrouble {
                device.errorPercent = rng.chance(50) ? 1 : 0
                device.shortPercent = rng.below(20)
                device.interruptPercent = rng.below(5)
                device.refusesPunch = rng.chance(30)
            }
            _ = engine.addDisk(name: "disk\(i)", geometry: BlockGeometry(sizeBytes: UInt64(sectorCount * sectorBytes), logicalBlockBytes: UInt32(sectorBytes)), io: device)
        }
        let isUnaligned = rng.chance(70)
        let lossPercent = rng.chance(50) ? 2 : 20
        let clients = devices.map { _ in SimulatedClient() }
        var stamp: UInt64 = 2_000_000
        var replica = Array(repeating: Array(repeating: UInt64(999), count: sectorCount), count: diskCount)
        var staged: [(disk: Int, sector: Int, stamp: UInt64)] = []
        var held: [DrainBuffer] = []
        /// Of every exact cut not yet consumed: what each sector may hold.
        var allowedAt: [EpochNumber: [[Set<UInt64>]]] = [:]
        /// Handed out whole and not acknowledged, each with the replica before it.
        var drained: [(epoch: EpochNumber, before: [[UInt64]])] = []
        var lateAcknowledgements: [EpochNumber] = []
        var consumerSleeps = 0
        var hadExact = false
        let writing = stepCount * 4 / 5
        engine.beginFullSync()

        /// What the loop would do for `resume`.
        func resumeTap() {
            if signals.isTapResumed {
                signals.isTapResumed = false
                engine.pump()
            }
        }

        func consume() -> String? {
            guard signals.isConsumerAwake else { return nil }
            guard let item = engine.queue.pop() else {
                signals.isConsumerAwake = false
                return nil
            }
            switch item {
            case .data(_, let buffer):
                for s in 0..<(buffer.lengthBytes / sectorBytes) {
                    staged.append((buffer.disk, Int(buffer.offsetBytes) / sectorBytes + s, (buffer.memory + s * sectorBytes).load(as: UInt64.self)))
                }
                held.append(buffer)
            case .zero(_, let disk, let offset, let length):
                for s in 0..<(Int(length) / sectorBytes) { staged.append((disk, Int(offset) / sectorBytes + s, 0)) }
            case .abandoned:
                staged.removeAll()
            case .end(let epoch):
                drained.append((epoch, replica))
                for s in staged { replica[s.disk][s.sector] = s.stamp }
                staged.removeAll()
                if let allowed = allowedAt.removeValue(forKey: epoch) {
                    hadExact = true
                    for d in 0..<diskCount {
                        for s in 0..<sectorCount where !allowed[d][s].contains(replica[d][s]) {
                            return "seed \(seed): \(epoch) disk \(d) sector \(s) is \(replica[d][s]), allowed \(allowed[d][s].sorted())"
                        }
                    }
                }
            }
            return nil
        }

        func submit(_ d: Int) {
            guard let slot = clients[d].free.popLast() else { return }
            let unit = isUnaligned && rng.chance(60) ? 1 : sectorsPerBlock
            let count = min((1 + rng.below(unit == 1 ? 20 : 8)) * unit, sectorCount)
            let request = clients[d].slots + slot
            request.pointee.lengthBytes = UInt32(count * sectorBytes)
            request.pointee.offsetBytes = UInt64(rng.below((sectorCount - count) / unit + 1) * unit * sectorBytes)
            request.pointee.flags = rng.chance(20) ? .fua : []
            let kind = rng.below(11)
            request.pointee.operation = kind < 7 ? .write : kind < 8 ? .writeZeroes : kind < 9 ? .trim : kind < 10 ? .flush : .read
            request.pointee.buffer = clients[d].memory + slot * SimulatedClient.sectorsMax * sectorBytes
            for s in 0..<count {
                stamp += 1
                (request.pointee.buffer! + s * sectorBytes).storeBytes(of: stamp, as: UInt64.self)
            }
            engine.disks[d].submit(request)
        }

        for step in 0..<stepCount {
            resumeTap()
            consumerSleeps -= 1
            switch rng.below(100) {
            case 0..<30 where step < writing:
                submit(rng.below(diskCount))
            case 0..<65:
                devices[rng.below(diskCount)].step(&rng)
            case 65..<80 where consumerSleeps <= 0:
                if let message = consume() { return message }
            case 80..<90 where consumerSleeps <= 0:
                if let i = held.indices.randomElement(using: &rng) { engine.queue.freeBuffer(slot: held.remove(at: i).slot) }
            case 90..<95:
                let allowed = devices.map(\.allowed)
                if let cut = try? engine.cut(fuzzyBytesMax: UInt64((1 + rng.below(40)) * blockBytes)) {
                    if cut.kind == .exact { allowedAt[cut.epoch] = allowed }
                }
            case 95..<98:
                // An acknowledgement may cover several epochs.
                if !drained.isEmpty {
                    let count = 1 + rng.below(drained.count)
                    engine.acknowledge(drained[count - 1].epoch)
                    drained.removeFirst(count)
                }
                if rng.chance(10), let late = lateAcknowledgements.popLast() { engine.acknowledge(late) }
            default:
                if rng.chance(lossPercent) {
                    // The link is lost. What was staged is gone, and of what was not acknowledged the replica has made the first few durable.
                    staged.removeAll()
                    if !drained.isEmpty, rng.chance(60) { replica = drained[rng.below(drained.count)].before }
                    lateAcknowledgements += drained.map(\.epoch)
                    drained.removeAll()
                    engine.abandonAll()
                } else if rng.chance(10) {
                    consumerSleeps = rng.below(200)
                }
            }
        }
        // Liveness: with everything at rest a last exact epoch must make the replica equal to the disks.
        for device in devices {
            device.errorPercent = 0
            device.interruptPercent = 0
        }
        var rounds = 0
        var finals = 0
        while finals < 2 || engine.statistics.behindBytes > 0 || engine.needsFuzzyCut || !drained.isEmpty {
            rounds += 1
            if rounds > 20_000 { return "seed \(seed): no progress: \(engine.statistics)" }
            while devices.contains(where: { !$0.inFlight.isEmpty }) { devices.forEach { $0.step(&rng) } }
            for buffer in held { engine.queue.freeBuffer(slot: buffer.slot) }
            held.removeAll()
            resumeTap()
            if let message = consume() { return message }
            if let newest = drained.last {
                engine.acknowledge(newest.epoch)
                drained.removeAll()
            }
            let atCut = devices.map(\.allowed)
            if let cut = try? engine.cut(fuzzyBytesMax: .max) {
                if cut.kind == .exact {
                    allowedAt[cut.epoch] = atCut
                    finals += 1
                }
            }
        }
        if !hadExact { return "seed \(seed): no exact epoch was ever completed" }
        for d in 0..<diskCount where replica[d] != devices[d].content { return "seed \(seed): at rest the replica of disk \(d) differs" }
        if clients.contains(where: { $0.free.count != SimulatedClient.depth }) { return "seed \(seed): a request was never answered" }
        for client in clients { if let error = client.surprise { return "seed \(seed): a client was answered with error \(error)" } }
        return nil
    }
}

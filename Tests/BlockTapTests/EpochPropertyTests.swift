import BlockTap
import Glibc
import Testing

/// The epoch algorithm against a model: random writes, zeroings, cuts, drains, abandons and acknowledgements on a simulated device
/// whose writes land block by block, at any moment between their start and their completion.
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

/// A device of stamped blocks (one stamp per block). An operation in flight lands per block, in any order, before it completes.
final class SimulatedDisk: DiskIO {
    var content: [UInt64]
    struct InFlight {
        var token: UInt32
        var isWrite: Bool
        var isFlush = false
        var memory: UnsafeMutableRawPointer?
        var first: Int
        var count: Int
        var stamp: [UInt64]
        var landed: [Bool]
        var isComplete: Bool { landed.allSatisfy { $0 } }
    }
    var inFlight: [InFlight] = []

    init(blockCount: Int) {
        content = Array(repeating: 0, count: blockCount)
        super.init()
    }

    override func read(into buffer: UnsafeMutableRawPointer, count: Int, offset: UInt64, token: UInt32) {
        let blocks = count / blockBytes
        inFlight.append(
            .init(token: token, isWrite: false, memory: buffer, first: Int(offset) / blockBytes, count: blocks, stamp: [], landed: Array(repeating: false, count: blocks)))
    }

    override func write(from buffer: UnsafeRawPointer, count: Int, offset: UInt64, dsync: Bool, token: UInt32) {
        let blocks = count / blockBytes
        let stamps = (0..<blocks).map { buffer.load(fromByteOffset: $0 * blockBytes, as: UInt64.self) }
        inFlight.append(
            .init(token: token, isWrite: true, first: Int(offset) / blockBytes, count: blocks, stamp: stamps, landed: Array(repeating: false, count: blocks)))
    }

    override func zero(offset: UInt64, length: UInt64, allocate: Bool, token: UInt32) {
        let blocks = Int(length) / blockBytes
        inFlight.append(
            .init(token: token, isWrite: true, first: Int(offset) / blockBytes, count: blocks, stamp: Array(repeating: 0, count: blocks), landed: Array(repeating: false, count: blocks)))
    }

    override func flush(token: UInt32) {
        inFlight.append(.init(token: token, isWrite: false, isFlush: true, first: 0, count: 0, stamp: [], landed: []))
    }

    /// Moves one operation on: lands one block, or completes it.
    func step(_ rng: inout SplitMix) {
        guard !inFlight.isEmpty else { return }
        let i = rng.below(inFlight.count)
        let open = inFlight[i].landed.indices.filter { !inFlight[i].landed[$0] }
        if let block = open.randomElement(using: &rng) {
            land(i, block)
            if open.count > 1 && rng.chance(60) { open.forEach { if !inFlight[i].landed[$0] { land(i, $0) } } }
            return
        }
        let op = inFlight.remove(at: i)
        completed(token: op.token, result: Int32(op.count * blockBytes))
    }

    private func land(_ i: Int, _ block: Int) {
        let op = inFlight[i]
        inFlight[i].landed[block] = true
        if op.isWrite {
            content[op.first + block] = op.stamp[block]
        } else {
            (op.memory! + block * blockBytes).storeBytes(of: content[op.first + block], as: UInt64.self)
        }
    }
}

/// Issues requests as a block server would.
final class SimulatedClient: BlockRequestOwner {
    static let depth = 12
    static let blocksMax = 8
    var slots: UnsafeMutablePointer<BlockRequest>
    var free: [Int] = Array(0..<depth)
    let memory: UnsafeMutableRawPointer

    override init() {
        slots = .allocate(capacity: Self.depth)
        memory = .allocate(byteCount: Self.depth * Self.blocksMax * blockBytes, alignment: blockBytes)
        super.init()
        for i in 0..<Self.depth { (slots + i).initialize(to: BlockRequest(owner: .passUnretained(self), token: UInt32(i))) }
    }

    deinit {
        slots.deallocate()
        memory.deallocate()
    }

    override func requestCompleted(_ request: BlockRequestPointer, error: Int32) {
        precondition(error == 0)
        free.append(Int(request.pointee.token))
    }
}

struct EpochSimulation {
    let seed: UInt64
    var faults: TapFaults = []
    var stepCount = 3000

    /// Nil, or the first difference found.
    func run() -> String? {
        var rng = SplitMix(seed: seed)
        let blockCount = 8 + rng.below(56)
        let preservedBlocks = rng.chance(30) ? 4 : 64  // small: epochs are abandoned over budget
        let engine = EpochEngine(
            configuration: TapConfiguration(
                preservedBytesMax: preservedBlocks * blockBytes, drainDepth: 1 + rng.below(4), drainBufferCount: 2 + rng.below(4), requestsMax: 6 + rng.below(20)))
        engine.faults = faults
        let diskCount = 1 + rng.below(2)
        let devices = (0..<diskCount).map { _ in SimulatedDisk(blockCount: blockCount) }
        for (i, device) in devices.enumerated() {
            for b in 0..<blockCount where rng.chance(50) { device.content[b] = UInt64(1_000_000 + b) }
            _ = engine.addDisk(name: "disk\(i)", geometry: BlockGeometry(sizeBytes: UInt64(blockCount * blockBytes), logicalBlockBytes: 512), io: device)
        }
        let clients = devices.map { _ in SimulatedClient() }
        var stamp: UInt64 = 1
        var replica = Array(repeating: Array(repeating: UInt64(999), count: blockCount), count: diskCount)
        var staged: [(disk: Int, block: Int, stamp: UInt64)] = []
        var held: [DrainBuffer] = []
        /// Of every exact cut not yet consumed: what each block may hold.
        var allowedAt: [EpochNumber: [[Set<UInt64>]]] = [:]
        var drained: [EpochNumber] = []
        var hadExact = false
        let writing = stepCount * 4 / 5
        engine.beginFullSync()

        func consume() -> String? {
            guard let item = engine.queue.pop() else { return nil }
            switch item {
            case .data(_, let buffer):
                for b in 0..<(buffer.lengthBytes / blockBytes) {
                    staged.append((buffer.disk, Int(buffer.offsetBytes) / blockBytes + b, (buffer.memory + b * blockBytes).load(as: UInt64.self)))
                }
                held.append(buffer)
            case .zero(_, let disk, let offset, let length):
                for b in 0..<(Int(length) / blockBytes) { staged.append((disk, Int(offset) / blockBytes + b, 0)) }
            case .abandoned:
                staged.removeAll()
            case .end(let epoch):
                for s in staged { replica[s.disk][s.block] = s.stamp }
                staged.removeAll()
                drained.append(epoch)
                if let allowed = allowedAt.removeValue(forKey: epoch) {
                    hadExact = true
                    for d in 0..<diskCount {
                        for b in 0..<blockCount where !allowed[d][b].contains(replica[d][b]) {
                            return "seed \(seed): \(epoch) disk \(d) block \(b) is \(replica[d][b]), allowed \(allowed[d][b].sorted())"
                        }
                    }
                }
            }
            return nil
        }

        for step in 0..<stepCount {
            let isWriting = step < writing
            switch rng.below(100) {
            case 0..<30 where isWriting:
                let d = rng.below(diskCount)
                guard let slot = clients[d].free.popLast() else { continue }
                let count = min(1 + rng.below(SimulatedClient.blocksMax), blockCount)
                let request = clients[d].slots + slot
                request.pointee.lengthBytes = UInt32(count * blockBytes)
                request.pointee.offsetBytes = UInt64(rng.below(blockCount - count + 1) * blockBytes)
                let kind = rng.below(10)
                request.pointee.operation = kind < 7 ? .write : kind < 8 ? .writeZeroes : kind < 9 ? .trim : .flush
                request.pointee.buffer = clients[d].memory + slot * SimulatedClient.blocksMax * blockBytes
                for b in 0..<count {
                    stamp += 1
                    (request.pointee.buffer! + b * blockBytes).storeBytes(of: stamp, as: UInt64.self)
                }
                engine.disks[d].submit(request)
            case 0..<65:
                devices[rng.below(diskCount)].step(&rng)
            case 65..<80:
                if let message = consume() { return message }
            case 80..<90:
                if let i = held.indices.randomElement(using: &rng) {
                    engine.queue.freeBuffer(slot: held.remove(at: i).slot)
                    engine.pump()
                }
            case 90..<95:
                let cutAllowed = devices.map { device in
                    var sets = device.content.map { Set([$0]) }
                    for op in device.inFlight where op.isWrite {
                        for b in 0..<op.count { sets[op.first + b].insert(op.stamp[b]) }
                    }
                    return sets
                }
                if let cut = try? engine.cut(fuzzyBytesMax: UInt64((1 + rng.below(40)) * blockBytes)) {
                    if cut.kind == .exact { allowedAt[cut.epoch] = cutAllowed }
                }
            case 95..<98:
                if let epoch = drained.first {
                    drained.removeFirst()
                    engine.acknowledge(epoch)
                }
            default:
                if rng.chance(20) {
                    // The link is lost. What the replica had applied stays applied; what was staged is gone.
                    staged.removeAll()
                    drained.removeAll()
                    engine.abandonAll()
                }
            }
        }
        // Liveness: with everything at rest a last exact epoch must make the replica equal to the disks.
        var rounds = 0
        var finals = 0
        while finals < 2 || engine.statistics.behindBytes > 0 || engine.needsFuzzyCut || !drained.isEmpty {
            rounds += 1
            if rounds > 20_000 { return "seed \(seed): no progress: \(engine.statistics)" }
            while devices.contains(where: { !$0.inFlight.isEmpty }) { devices.forEach { $0.step(&rng) } }
            for buffer in held { engine.queue.freeBuffer(slot: buffer.slot) }
            held.removeAll()
            engine.pump()
            if let message = consume() { return message }
            while let epoch = drained.first {
                drained.removeFirst()
                engine.acknowledge(epoch)
            }
            let atCut = devices.map { $0.content.map { Set([$0]) } }
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
        return nil
    }
}

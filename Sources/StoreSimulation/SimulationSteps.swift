import BlockTap

@testable import Replica

extension Simulation {
    /// One step of the safety phase: something that users do, or something that goes wrong.
    func act() throws {
        if store == nil { return }
        switch random.below(100) {
        case 0..<4 where weather == .crashes || weather == .faults:
            try end([.close, .kill, .powerLoss][random.below(3)])
        case 4..<8 where weather == .crashes || weather == .faults:
            if storage.operationsUntilDown == nil { storage.operationsUntilDown = 1 + random.below([4, 20, 80][random.below(3)]) }
        case 0..<3 where weather == .full || weather == .lies:
            if weather == .lies { try lie() } else { try end(.close) }
        case 8..<12 where weather == .faults || weather == .full:
            storage.faults = .init()
            if weather == .faults, random.oneIn(2) { storage.faults.ioErrorOneIn = [8, 30, 100][random.below(3)] }
            if random.oneIn(2) { storage.faults.fullOneIn = [5, 20, 60][random.below(3)] }
            if random.oneIn(4) { storage.faults.isFull = true }
            if weather == .full, random.oneIn(3) {
                storage.capacityPages = storage.usedPages + random.below(300)
                errorsAllowed = true
            }
            if storage.faults.ioErrorOneIn > 0 || storage.faults.fullOneIn > 0 || storage.faults.isFull { errorsAllowed = true }
        case 12..<16 where weather == .full:
            // Space again: no restart, and nothing may be refused any more.
            storage.faults = .init()
            storage.capacityPages = nil
            try drain()
            incoming = [:]
            errorsAllowed = false
        case 16, 17: rotIndex()
        default:
            try use()
        }
        if store != nil { try restartIfDown() }
    }

    func actHealthily() throws { try use() }

    private func use() throws {
        if random.oneIn(8) { passTime() }
        if random.oneIn(4) { try forkUpkeep() }
        switch random.below(100) {
        case 0..<20: try upkeep()
        case 20 where !state.groups.isEmpty: choosePolicy(anyGroup())
        case 21: try scrub()
        default: try useAny()
        }
    }

    /// What may be done also while upkeep is in the middle of something, or a recovery point is being opened.
    func meanwhile() throws {
        if !isForkBusy { return try useAny() }
        guard !state.groups.isEmpty else { return }
        // Others than the fork itself.
        let name = anyGroup()
        switch random.below(8) {
        case 0...3: try upkeep(isAlone: true)
        case 4: try begin(name)
        case 5: try seal(name)
        case 6: try dropPoints(name)
        default: try readPoint(name)
        }
    }

    private func anyGroup() -> String { state.groups.keys.sorted()[random.below(state.groups.count)] }

    private func useAny() throws {
        if state.groups.count < 2, random.oneIn(state.groups.isEmpty ? 1 : 10) { return try createGroup() }
        let name = anyGroup()
        switch random.below(125) {
        case 0..<20: try begin(name)
        case 20..<35: try append(name)
        case 35..<52: try seal(name)
        case 52..<55: try abandon(name)
        case 55..<62:
            _ = store.thread.runQueued(1 + random.below(4))
            try collect()
        case 62..<65: try drain()
        case 65..<69: try readPoint(name)
        case 69..<72: try fork(name)
        case 72..<74: try dropFork()
        case 74..<92: try useFork()
        case 92..<94: try dropPoints(name)
        case 94..<96: try markPoint(name)
        case 96..<99: try sealFork()
        case 99: try forkFork()
        case 109, 110: try dropPoints(name)
        case 100 where random.oneIn(2): try commitFork()
        case 101: try grow(name)
        case 102: try raise(name)
        case 107 where random.oneIn(2): try hydrateFork()
        case 103 where random.oneIn(3): try delete(name)
        case 104, 105: try checkReaders()
        case 115...117: try markFork()
        case 118: try markBirth()
        case 119, 120: try checkMarks()
        case 121: try dropAnyMark()
        case 122 where random.oneIn(2): try commitFork()
        case 122...124: try turnBack()
        case 106...108: try forkUpkeep()
        default: readers.removeAll { _ in random.oneIn(2) }
        }
    }

    func newStamp() -> UInt32 {
        defer { nextStamp += 1 }
        return nextStamp
    }

    // MARK: Groups

    private func specs(_ sizes: [Int]) -> [VolumeSpec] {
        sizes.enumerated().map { VolumeSpec(name: "vd\($0.offset)", geometry: BlockGeometry(sizeBytes: UInt64($0.element * sectorBytes), logicalBlockBytes: 512)) }
    }

    func change(_ what: String, _ change: PossibleChange, _ body: () throws(StoreError) -> Void) throws {
        try drain()
        guard try attempt(what, change, body) != nil else { return }
        change.apply(to: &state)
        // A MANIFEST that takes a record had no doubts about those before.
        if store.manifest.failure == nil { possible = [] }
    }

    private func createGroup() throws {
        let name = ["alpha", "beta"].first { state.groups[$0] == nil }!
        let unit = random.oneIn(2) ? sectorsPerBlock : 1
        let sizes = (0...random.below(3)).map { _ in (16 + random.below(300)) / unit * unit }
        try change("create \(name)", .create(name, sizes: sizes)) { () throws(StoreError) in try store.createGroup(GroupID(name), volumes: specs(sizes)) }
    }

    private func grow(_ name: String) throws {
        guard incoming[name] == nil else { return }
        var sizes = state.groups[name]!.images.map(\.count)
        if sizes.count < 3, random.oneIn(3) { sizes.append(24) } else { sizes[random.below(sizes.count)] += random.below(5) * (random.oneIn(3) ? 7 : sectorsPerBlock) }
        try change("grow \(name)", .create(name, sizes: sizes)) { () throws(StoreError) in try store.createGroup(GroupID(name), volumes: specs(sizes)) }
    }

    private func raise(_ name: String) throws {
        incoming[name]?.mustFail = true
        try change("raise \(name)", .raise(name)) { () throws(StoreError) in _ = try store.raiseGeneration(GroupID(name)) }
        // A raise that failed fences nobody, unless it happened.
        if state.groups[name]!.generation != store.group(GroupID(name))!.generation.rawValue { throw failure("\(name) is at another generation than the model") }
        incoming[name] = nil
    }

    private func delete(_ name: String) throws {
        try drain()
        if state.groups[name]!.points.contains(where: { $0.hold != nil }) {
            return try mustRefuse("deletion of a group with a held point") { () throws(StoreError) in try store.deleteGroup(GroupID(name)) }
        }
        incoming[name] = nil
        try change("delete \(name)", .delete(name)) { () throws(StoreError) in try store.deleteGroup(GroupID(name)) }
        if state.groups[name] == nil { policies[name] = nil }
    }

    // MARK: Epochs

    private func begin(_ name: String) throws {
        // An epoch whose seal failed is nothing to go on top of.
        try collect()
        let group = state.groups[name]!
        let base = sealing.last { $0.group == name }
        let cut = Cut(epoch: EpochNumber(nextEpoch), kind: random.oneIn(4) ? .fuzzy : .exact, timeNanoseconds: nextEpoch, blockCount: 0)
        let writer = try attempt("begin an epoch") { () throws(StoreError) in
            try store.beginEpoch(GroupID(name), generation: Generation(group.generation), cut: cut, instance: "a", after: base?.writer.positionWhenSealed ?? store.group(GroupID(name))?.lastDurable)
        }
        guard let writer else { return }
        incoming[name] = Incoming(group: name, writer: writer, epoch: nextEpoch, isExact: cut.kind == .exact, images: base?.images ?? group.images, base: base)
        nextEpoch += 1
        if random.oneIn(2) { try append(name) }
    }

    private func append(_ name: String) throws {
        guard let epoch = incoming[name] else { return }
        for _ in 0...random.below(6) {
            let volume = random.below(epoch.images.count)
            let size = epoch.images[volume].count
            let blocks = (size + sectorsPerBlock - 1) / sectorsPerBlock
            let start = random.below(isSkewed && !random.oneIn(8) ? max(1, blocks / 4) : blocks)
            let count = min(blocks - start, 1 + random.below(random.oneIn(5) ? 30 : 3))
            let range = start * sectorsPerBlock..<min(size, (start + count) * sectorsPerBlock)
            // Often two kinds of data in one extent, sometimes zeroes that nobody calls so.
            let first = newStamp()
            let second = random.oneIn(2) ? first : hasZeroData && random.oneIn(4) ? 0 : newStamp()
            let turn = range.lowerBound + random.below(range.count)
            let image = random.oneIn(5) ? Image(repeating: 0, count: range.count) : range.map { $0 < turn ? first : second }
            let isZero = image.allSatisfy { $0 == 0 } && !(hasZeroData && random.oneIn(4))
            let done: Void? = try attempt("append") { () throws(StoreError) in
                if isZero { return try epoch.writer.zero(volume: volume, offsetBytes: UInt64(range.lowerBound * sectorBytes), lengthBytes: UInt64(range.count * sectorBytes)) }
                let bytes = UnsafeMutableRawBufferPointer.allocate(byteCount: range.count * sectorBytes, alignment: 8)
                defer { bytes.deallocate() }
                fill(bytes.baseAddress!, image)
                let sums = (0..<count).map { block in
                    BlockChecksum.of(bytes.baseAddress! + block * blockBytes, count: min(blockBytes, bytes.count - block * blockBytes), blockIndex: UInt64(start + block))
                }
                for block in 0..<count { remember(sums[block], image[block * sectorsPerBlock..<min(image.count, (block + 1) * sectorsPerBlock)]) }
                try sums.withUnsafeBufferPointer { sums throws(StoreError) in
                    try epoch.writer.append(volume: volume, offsetBytes: UInt64(range.lowerBound * sectorBytes), bytes: UnsafeRawBufferPointer(bytes), checksums: sums)
                }
            }
            if done == nil {
                incoming[name] = nil
                return
            }
            for (sector, stamp) in zip(range, image) { epoch.images[volume][sector] = stamp }
        }
    }

    func seal(_ name: String) throws {
        guard let epoch = incoming[name] else { return }
        incoming[name] = nil
        sealing.append(epoch)
        epoch.writer.seal(consistency: .crash) { epoch.outcome = $0 }
        if random.oneIn(2) { try drain() }
    }

    private func abandon(_ name: String) throws {
        guard let epoch = incoming[name] else { return }
        incoming[name] = nil
        epoch.writer.abandon()
    }

    func drain() throws {
        store.thread.runQueued()
        try collect()
        try expect(sealing.isEmpty, "an epoch was never answered")
    }

    /// Takes note of seals that have been answered, in their order.
    func collect() throws {
        while let epoch = sealing.first, let outcome = epoch.outcome {
            sealing.removeFirst()
            switch outcome {
            case .success(let point):
                try expect(epoch.base.map { !$0.hasFailed } ?? true, "epoch \(epoch.epoch) was sealed although the one before failed")
                try expect((point != nil) == epoch.isExact, "an epoch has no point, or one too many")
                epoch.change.apply(to: &state)
                if let point { state.groups[epoch.group]!.points[state.groups[epoch.group]!.points.count - 1].id = point.id }
            case .failure(let error):
                epoch.hasFailed = true
                try refused("seal of epoch \(epoch.epoch) of \(epoch.group)", error, epoch.change)
            }
        }
    }

    // MARK: Reading

    private func readPoint(_ name: String) throws {
        try collect()
        let points = state.groups[name]!.points
        guard let point = points.isEmpty ? nil : points[random.below(points.count)] else { return }
        let volume = random.below(point.images.count)
        let opened = try pausing(random.oneIn(2)) {
            try attempt("open point \(point.id!)") { () throws(StoreError) in try store.openRecoveryPoint(GroupID(name), point.id!, volume: volume) }
        }
        guard let opened else { return }
        try check(opened, point.images[volume], "point \(point.id!) of \(name), disk \(volume)")
        if random.oneIn(2) { readers.append((opened, point.images[volume], "held point \(point.id!) of \(name), disk \(volume)")) }
    }

    /// All recovery points, or a few of them; and what is held open.
    func checkPoints(all: Bool) throws {
        for (name, group) in state.groups.sorted(by: { $0.key < $1.key }) {
            for point in group.points where all || random.oneIn(4) {
                for volume in point.images.indices {
                    let what = "point \(point.id!) of \(name), disk \(volume)"
                    let reader: VolumeReader
                    do throws(StoreError) {
                        reader = try calmly { () throws(StoreError) in try store.openRecoveryPoint(GroupID(name), point.id!, volume: volume) }
                    } catch {
                        if storage.liesTold > 0 { continue }
                        throw failure("\(what): \(error)")
                    }
                    try check(reader, point.images[volume], what)
                }
            }
        }
        try checkReaders()
    }

    /// What is held open never changes, whatever became of its point.
    func checkReaders() throws { for held in readers { try check(held.reader, held.image, held.what) } }

    private func check(_ reader: VolumeReader, _ image: Image, _ what: String) throws {
        try expect(Int(reader.geometry.sizeBytes) == image.count * sectorBytes, "\(what) has another size")
        try compare(what, image) { bytes throws(StoreError) in try reader.read(offsetBytes: 0, into: bytes) }
    }

    /// Right data, or after a lie an error. Returns what was read.
    private func compare(_ what: String, _ image: Image, _ read: (UnsafeMutableRawBufferPointer) throws(StoreError) -> Void) throws {
        guard let seen = try look(what, image.count, read) else { return }
        if let sector = seen.indices.first(where: { seen[$0] != image[$0] }) {
            throw failure("\(what): sector \(sector) has stamp \(seen[sector]), not \(image[sector])")
        }
    }

    func look(_ what: String, _ sectorCount: Int, _ read: (UnsafeMutableRawBufferPointer) throws(StoreError) -> Void) throws -> Image? {
        let bytes = UnsafeMutableRawBufferPointer.allocate(byteCount: sectorCount * sectorBytes, alignment: 8)
        defer { bytes.deallocate() }
        do throws(StoreError) { try calmly { () throws(StoreError) in try read(bytes) } } catch {
            if storage.isDown || storage.liesTold > 0 { return nil }
            throw failure("\(what): \(error)")
        }
        return stamps(UnsafeRawBufferPointer(bytes))
    }

    // MARK: Lies

    private func lie() throws {
        if rot != nil, random.oneIn(2) { return try repair() }
        guard storage.liesTold == 0, storage.lie == nil else { return }
        switch isMending ? 2 + random.below(3) : random.below(5) {
        case 0, 1: storage.lie = (1 + random.below(20), random.oneIn(2) ? .lost : .misdirected)
        case 2, 3: rotAnything()
        default: if step > steps / 2 { try endLies() }
        }
    }

    /// Closes and opens again: right data or a named error.
    func endLies() throws {
        guard store != nil else { return }
        storage.lie = nil
        errorsAllowed = errorsAllowed || storage.liesTold > 0
        try end(.close)
        guard store != nil else { return }
        try checkPoints(all: true)
        for name in state.machines {
            for volume in state.forks[name]!.volumes.indices { try openFork(name, volume) }
        }
    }
}

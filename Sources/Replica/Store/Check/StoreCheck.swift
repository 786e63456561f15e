import BlockTap
import Glibc

/// A whole store verified without changing anything: MANIFEST, layer files, the data of every live layer against its checksums, segments,
/// journals of forks, and files that nothing names. Memory is bounded: a layer is looked at in pieces, and of bad blocks only so many
/// runs are kept per layer.
public struct StoreCheck {
    public struct Report: Codable, Sendable {
        public var directory: String
        public var store: String
        public var readsData: Bool
        /// What is wrong with which file.
        public var damages: [Damage] = []
        /// Blocks that are not what their checksums say, with what they touch.
        public var badExtents: [BadExtent] = []
        /// Every volume at every recovery point, as it is now, and in every fork.
        public var views: [View] = []
        /// No record leads to these; the next start of the store removes them.
        public var unnamedFiles: [String] = []
        /// Worth knowing, no damage.
        public var notes: [String] = []
        public var layerCount = 0
        public var segmentCount = 0
        public var forkCount = 0
        public var checkedBytes: UInt64 = 0

        public var isClean: Bool { damages.isEmpty && badExtents.isEmpty && views.allSatisfy { $0.state != .unreadable } }
    }

    public struct Damage: Codable, Sendable, Hashable {
        /// Relative to the store.
        public var file: String
        public var offsetBytes: UInt64
        public var what: String
    }

    public struct View: Codable, Sendable, Hashable {
        public enum State: String, Codable, Sendable {
            /// Every block is what its checksum says.
            case exact
            /// Nothing is wrong with its files; data was not read.
            case indexed
            case unreadable
        }
        /// "recovery point", "newest" or "fork".
        public var kind: String
        /// Of the recovery point or fork; empty for the newest state.
        public var name: String
        public var group: GroupID
        public var volume: Int
        public var disk: String
        public var state: State
        /// In words, for `unreadable`; the first few.
        public var problems: [String] = []
        /// Blocks in it that cannot be read.
        public var badBlockCount: UInt64 = 0
    }

    /// `done` of `total` bytes have been looked at.
    public typealias Progress = (_ doneBytes: UInt64, _ totalBytes: UInt64) -> Void

    /// Kept per layer; one with more is as good as unreadable.
    static let badRunsMax = 4096
    static let damagesMax = 10_000

    /// Takes the store's lock. Throws `.busy` when a process has the store, `.damaged` or `.io` when there is no store to check.
    public static func run(directory: String, readsData: Bool, progress: @escaping Progress = { _, _ in }) throws(StoreError) -> Report {
        var status = stat()
        guard stat(directory, &status) == 0 else { throw storageError(errno, "cannot look at \(directory)") }
        guard status.st_mode & S_IFMT == S_IFDIR else { throw .io(errno: ENOTDIR, what: "cannot open the store \(directory)") }
        guard access(directory + "/" + Manifest.path, F_OK) == 0 else { throw .invalid("\(directory) is no store: it has no \(Manifest.path)") }
        // Not through the storage: a lock file that is not there is not made.
        let descriptor = open(directory + "/LOCK", O_RDONLY | O_CLOEXEC)
        if descriptor < 0, errno != ENOENT { throw storageError(errno, "cannot open \(directory)/LOCK") }
        defer { if descriptor >= 0 { close(descriptor) } }
        if descriptor >= 0, case let code = lockFile(descriptor), code != 0 {
            if code == EWOULDBLOCK { throw .busy("the store \(directory) is in use by another process: stop it first") }
            throw storageError(code, "cannot lock \(directory)/LOCK")
        }
        return try run(FileStorage(directory: directory), readsData: readsData, progress: progress)
    }

    /// On any storage; the caller sees to it that nobody changes it.
    static func run(_ storage: any Storage, readsData: Bool, progress: @escaping Progress = { _, _ in }) throws(StoreError) -> Report {
        var check = StoreCheck(storage: storage, readsData: readsData, progress: progress)
        try check.run()
        return check.report
    }

    private let storage: any Storage
    private let progress: Progress
    private var report: Report
    private var state = StoreState(uuid: StoreUUID(high: 0, low: 0))
    private var bad: [UInt64: BlockRuns] = [:]
    private var causes: [UInt64: [String]] = [:]
    /// Layers that cannot be read at all, and why.
    private var broken: [UInt64: String] = [:]
    private var segmentSizes: [UInt32: UInt64] = [:]
    private var brokenSegments: [UInt32: String] = [:]
    private var totalBytes: UInt64 = 0

    private init(storage: any Storage, readsData: Bool, progress: @escaping Progress) {
        self.storage = storage
        self.progress = progress
        report = Report(directory: storage.location, store: "", readsData: readsData)
    }

    private mutating func damage(_ file: String, _ offset: UInt64, _ what: String) {
        guard report.damages.count < Self.damagesMax else { return }
        report.damages.append(Damage(file: file, offsetBytes: offset, what: what))
    }

    /// What an error says of a file.
    private mutating func damage(_ file: String, _ error: StoreError) {
        if case .damaged(_, let offset, let what) = error { damage(file, offset, what) } else { damage(file, 0, "\(error)") }
    }

    private mutating func run() throws(StoreError) {
        try readManifest()
        totalBytes = state.layers.values.reduce(0) { $0 + $1.fileBytes + (report.readsData ? $1.dataBytes : 0) }
        checkSegments()
        for id in state.layers.keys.sorted() { checkLayer(state.layers[id]!) }
        for fork in state.forks.values.sorted(by: { $0.id.rawValue < $1.id.rawValue }) {
            for volume in fork.volumes.indices { checkFork(fork, volume) }
        }
        judgeViews()
        checkIndexes()
        listUnnamed()
        progress(totalBytes, totalBytes)
    }

    // MARK: MANIFEST

    private mutating func readManifest() throws(StoreError) {
        let file = try storage.open(Manifest.path, .read, direct: false)
        let bytes = try readWhole(file, size: try file.size())
        defer { bytes.deallocate() }
        let header = try FileHeader.verify(UnsafeRawBufferPointer(bytes), path: file.path, kind: .manifest, id: 0, store: nil)
        state = StoreState(uuid: header.store)
        report.store = header.store.text
        let scan = LogScan(bytes)
        for (offset, what) in scan.damages { damage(Manifest.path, offset, what) }
        if case .torn(let range)? = scan.parts.last { report.notes.append("\(Manifest.path): the last \(range.count) bytes are an unfinished record, which the next start cuts off") }
        let read = ManifestReplay.replay(scan.soundFrames, store: header.store)
        state = read.state
        for (offset, what) in read.problems { damage(Manifest.path, offset, what) }
        if try storage.exists(Manifest.newPath) { report.notes.append("\(Manifest.newPath): a rewriting that was not finished; the next start removes it") }
        report.layerCount = state.layers.count
        report.forkCount = state.forks.count
        for view in state.views where view.top != 0 && state.layers[view.top] == nil { damage(Manifest.path, 0, "\(view.words) is at layer \(view.top), which does not exist") }
        for layer in state.layers.values.sorted(by: { $0.id < $1.id }) where layer.parent != 0 && state.layers[layer.parent] == nil {
            damage(Manifest.path, 0, "layer \(layer.id) goes on layer \(layer.parent), which does not exist")
        }
    }

    // MARK: Segments

    private mutating func checkSegments() {
        var ends: [UInt32: UInt32] = [:]
        for layer in state.layers.values { for use in layer.segments { ends[use.segment] = max(ends[use.segment] ?? 0, use.endBlock) } }
        for fork in state.forks.values { for volume in fork.volumes where ends[volume.segment] == nil { ends[volume.segment] = 1 } }
        report.segmentCount = ends.count
        for (id, end) in ends.sorted(by: { $0.key < $1.key }) {
            let path = SegmentFile.path(id)
            do throws(StoreError) {
                let segment = try SegmentFile.open(storage, store: state.uuid, id: id, writable: false)
                let size = try segment.file.size()
                segmentSizes[id] = size
                if size < UInt64(end) * UInt64(blockBytes) { damage(path, size, "the segment has \(size) bytes, its layers need \(UInt64(end) * UInt64(blockBytes))") }
            } catch {
                damage(path, error)
                brokenSegments[id] = "segment \(id) cannot be used: \(error)"
            }
        }
    }

    // MARK: Layers

    private mutating func checkLayer(_ record: LayerRecord) {
        let path = LayerFile.path(record.id)
        defer {
            report.checkedBytes += record.fileBytes
            progress(report.checkedBytes, totalBytes)
        }
        for use in record.segments {
            if let why = brokenSegments[use.segment] { broken[record.id] = why }
        }
        do throws(StoreError) {
            let reader = try LayerReader(storage, store: state.uuid, record: record)
            try checkIndex(reader)
            if report.readsData, broken[record.id] == nil { try checkData(reader) }
        } catch {
            damage(path, error)
            broken[record.id] = "\(error)"
        }
    }

    /// Order, places and sums of a layer file, without the data.
    private mutating func checkIndex(_ layer: LayerReader) throws(StoreError) {
        let record = layer.record
        guard layer.extentCount == record.extentCount else {
            throw .damaged(path: LayerFile.path(record.id), offsetBytes: 80, what: "it has \(layer.extentCount) extents, the MANIFEST says \(record.extentCount)")
        }
        var end: UInt64 = 0
        var wrong: String?
        var runs = BlockRuns()
        let uses = Dictionary(record.segments.map { ($0.segment, $0) }, uniquingKeysWith: { a, _ in a })
        let sizes = segmentSizes
        try layer.forEachExtents { extents in
            for extent in extents {
                if extent.startBlock < end || extent.blockCount == 0 { wrong = wrong ?? "the extent of block \(extent.startBlock) is out of order" }
                end = extent.endBlock
                if extent.isZero { continue }
                if Int(extent.checksumIndex) + Int(extent.blockCount) > layer.checksumCount { wrong = wrong ?? "the extent of block \(extent.startBlock) has no checksums" }
                let last = UInt64(extent.segmentBlock) + UInt64(extent.segmentBlockCount)
                guard let use = uses[extent.segment], last <= UInt64(use.endBlock), extent.segmentBlock > 0 else {
                    wrong = wrong ?? "the extent of block \(extent.startBlock) lies where the MANIFEST knows of nothing (segment \(extent.segment))"
                    continue
                }
                // Found without reading data, too.
                if let size = sizes[extent.segment], last * UInt64(blockBytes) > size {
                    let whole = size / UInt64(blockBytes)
                    let kept = extent.isCompressed || whole <= UInt64(extent.segmentBlock) ? 0 : whole - UInt64(extent.segmentBlock)
                    runs.add(extent.startBlock + kept, extent.endBlock, layer: record.id)
                }
            }
        }
        if let wrong { throw .damaged(path: LayerFile.path(record.id), offsetBytes: UInt64(pageBytes), what: wrong) }
        try layer.checkChecksumPages()
        for run in runs.runs { note(BadRun(startBlock: run.start, blockCount: run.count, segment: 0, segmentBlock: 0, cause: .missing), record.id) }
    }

    private mutating func checkData(_ layer: LayerReader) throws(StoreError) {
        let (storage, uuid) = (self.storage, state.uuid)
        var files: [UInt32: any StorageFile] = [:]
        var done = report.checkedBytes
        let (total, progress) = (totalBytes, self.progress)
        let data = LayerDataReader { id throws(StoreError) in
            if let file = files[id] { return file }
            // No store has so many segments in one layer that this matters, but descriptors are few.
            if files.count >= 64 { files.removeAll() }
            let file = try SegmentFile.open(storage, store: uuid, id: id, writable: false).file
            files[id] = file
            return file
        } pace: { count in
            done += UInt64(count)
            progress(done, total)
            return true
        }
        var found: [BadRun] = []
        var lost: UInt64 = 0
        _ = try data.read(layer) { run in
            if found.count < Self.badRunsMax { found.append(run) } else { lost += run.blockCount }
        }
        report.checkedBytes = done
        for run in found { note(run, layer.record.id) }
        if lost > 0 {
            broken[layer.record.id] = "more than \(Self.badRunsMax) runs of blocks of layer \(layer.record.id) are bad"
            damage(LayerFile.path(layer.record.id), 0, "\(lost) more bad blocks than are listed")
        }
    }

    private mutating func note(_ run: BadRun, _ layer: UInt64) {
        bad[layer, default: BlockRuns()].add(run.startBlock, run.startBlock + run.blockCount, layer: layer)
    }

    // MARK: Forks

    /// Blocks of forks' open layers that are bad, by fork and volume; and what their open layers cover.
    private var forkBad: [String: BlockRuns] = [:]
    private var forkCover: [String: BlockRuns] = [:]
    private var forkBroken: [String: String] = [:]

    private mutating func checkFork(_ fork: ForkRecord, _ volume: Int) {
        let record = fork.volumes[volume]
        let path = ForkJournal.path(record.journal)
        let key = "\(fork.id)/\(volume)"
        if let why = brokenSegments[record.segment] { forkBroken[key] = why }
        do throws(StoreError) {
            let file = try storage.open(path, .read, direct: false)
            let bytes = try readWhole(file, size: try file.size())
            defer { bytes.deallocate() }
            _ = try FileHeader.verify(UnsafeRawBufferPointer(bytes), path: file.path, kind: .journal, id: record.journal, store: state.uuid)
            let scan = LogScan(bytes)
            for (offset, what) in scan.damages {
                damage(path, offset, what)
                forkBroken[key] = "\(path) is damaged at byte \(offset): \(what)"
            }
            if case .torn(let range)? = scan.parts.last { report.notes.append("\(path): the last \(range.count) bytes are an unfinished flush, which opening the fork cuts off") }
            // By block: where the open layer has it, with its checksum.
            var index = ExtentIndex()
            var sums: [UInt32: UInt64] = [:]
            var cover = BlockRuns()
            for frame in scan.soundFrames {
                guard frame.type == ForkJournal.frameType, let batch = ForkJournal.parse(frame.payload) else {
                    throw .damaged(path: file.path, offsetBytes: frame.offsetBytes, what: "a journal frame contradicts itself")
                }
                // What no marker follows was never promised: opening the fork looks at its data itself.
                if !frame.isSynced {
                    report.notes.append("\(path): \(batch.entries.count) writes at its end were never promised")
                    continue
                }
                for entry in batch.entries {
                    cover.add(entry.startBlock, entry.endBlock, layer: 0)
                    if entry.isZero {
                        index.erase(from: entry.startBlock, to: entry.endBlock)
                        continue
                    }
                    for block in 0..<entry.blockCount { sums[entry.segmentBlock + block] = batch.sums[Int(entry.checksumIndex + block)] }
                    index.apply(IndexExtent(
                        startBlock: entry.startBlock, blockCount: entry.blockCount, slot: IndexExtent.openSlot, segment: record.segment, segmentBlock: entry.segmentBlock,
                        checksumIndex: entry.segmentBlock))
                }
            }
            forkCover[key] = cover
            guard report.readsData, forkBroken[key] == nil else { return }
            let segment = try SegmentFile.open(storage, store: state.uuid, id: record.segment, writable: false)
            let memory = UnsafeMutableRawBufferPointer.allocate(byteCount: LayerDataReader.pieceBlocks * blockBytes, alignment: pageBytes)
            defer { memory.deallocate() }
            var runs = BlockRuns()
            for extent in index.extents {
                var done: UInt32 = 0
                while done < extent.blockCount {
                    let blocks = min(extent.blockCount - done, UInt32(LayerDataReader.pieceBlocks))
                    let count = Int(blocks) * blockBytes
                    let read = (try? segment.file.read(into: UnsafeMutableRawBufferPointer(rebasing: memory[..<count]), at: UInt64(extent.segmentBlock + done) * UInt64(blockBytes))) ?? 0
                    for offset in 0..<blocks {
                        let block = extent.startBlock + UInt64(done + offset)
                        let start = Int(offset) * blockBytes
                        let length = blockLength(block, sizeBytes: record.spec.geometry.sizeBytes)
                        if start + blockBytes > read || BlockChecksum.of(memory.baseAddress! + start, count: length, blockIndex: block) != sums[extent.segmentBlock + done + offset] {
                            runs.add(block, block + 1, layer: 0)
                        }
                    }
                    report.checkedBytes += UInt64(count)
                    done += blocks
                }
            }
            forkBad[key] = runs
        } catch {
            damage(path, error)
            forkBroken[key] = "\(error)"
        }
    }

    // MARK: What it means

    private mutating func judgeViews() {
        let views = state.views
        let tops = Set(views.map(\.top))
        var reached: [UInt64: (BlockRuns, [UInt64])] = [:]
        let (storage, uuid) = (self.storage, state.uuid)
        state.reach(bad: bad, broken: Set(broken.keys), extents: { record, body throws(StoreError) in
            try LayerReader(storage, store: uuid, record: record).forEachExtents { for extent in $0 { body(extent) } }
        }, visit: { layer, runs, broken in
            if tops.contains(layer) { reached[layer] = (runs, broken) }
        })

        var seen: [BlockRuns] = []
        for view in views {
            var (runs, brokenLayers) = reached[view.top] ?? (BlockRuns(), [])
            var problems = brokenLayers.prefix(3).map { broken[$0] ?? "layer \($0) cannot be read" }
            if view.top != 0, state.layers[view.top] == nil { problems.append("layer \(view.top) does not exist") }
            if case .fork(let id) = view.kind {
                let key = "\(id)/\(view.volume)"
                if let why = forkBroken[key] { problems.append(why) }
                for run in forkCover[key]?.runs ?? [] { runs.subtract(run.start, run.end) }
                if let own = forkBad[key] { runs.add(own) }
            }
            for run in runs.runs.prefix(3) {
                let blocks = run.count == 1 ? "block \(run.start)" : "blocks \(run.start) to \(run.end - 1)"
                problems.append("\(blocks) of disk \(view.spec.name)" + (run.layer == 0 ? ", written by the fork" : ""))
            }
            if runs.runs.count > 3 { problems.append("and \(runs.runs.count - 3) more runs of blocks") }
            let isBad = !problems.isEmpty
            report.views.append(View(
                kind: view.kindWords, name: view.name, group: view.group, volume: view.volume, disk: view.spec.name,
                state: isBad ? .unreadable : report.readsData ? .exact : .indexed, problems: problems, badBlockCount: runs.blockCount))
            seen.append(runs)
        }
        report.badExtents = state.badExtents(bad, views: views, seen: seen)
        for (key, runs) in forkBad.sorted(by: { $0.key < $1.key }) where !runs.isEmpty {
            guard let view = views.first(where: { if case .fork(let id) = $0.kind { "\(id)/\($0.volume)" == key } else { false } }), case .fork(let id) = view.kind else { continue }
            for run in runs.runs {
                report.badExtents.append(BadExtent(group: view.group, volume: view.volume, disk: view.spec.name, block: run.start, count: run.count, layers: [], recoveryPoints: [], forks: [id]))
            }
        }
    }

    /// Merged indexes are only copies, written without a sync: a kill leaves half of one, and no recovery point is the worse for it.
    private mutating func checkIndexes() {
        for name in (try? storage.list("indexes")) ?? [] {
            let top = UInt64(name.dropLast(".index".count))
            guard name.hasSuffix(".index"), let top, state.layers[top] != nil else { continue }
            do throws(StoreError) {
                try IndexFile.verify(storage.open("indexes/" + name, .read, direct: false), top: top, store: state.uuid) { _ in } extents: { _ in }
            } catch {
                let what = if case .damaged(_, let offset, let what) = error { "byte \(offset): \(what)" } else { "\(error)" }
                report.notes.append("indexes/\(name) is of no use, and is removed when it is needed (\(what))")
            }
        }
    }

    private mutating func listUnnamed() {
        var segments = Set(state.forks.values.flatMap { $0.volumes.map(\.segment) })
        for layer in state.layers.values { for use in layer.segments { segments.insert(use.segment) } }
        let journals = Set(state.forks.values.flatMap { $0.volumes.map(\.journal) })
        let named: [(String, String, Set<UInt64>)] = [
            ("layers", ".layer", Set(state.layers.keys)), ("segments", ".seg", Set(segments.map { UInt64($0) })), ("journals", ".journal", journals),
            ("indexes", ".index", Set(state.layers.keys)),
        ]
        for (directory, suffix, numbers) in named {
            guard let names = try? storage.list(directory) else { continue }
            for name in names {
                if name.hasSuffix(suffix), let number = UInt64(name.dropLast(suffix.count)), numbers.contains(number) { continue }
                report.unnamedFiles.append(directory + "/" + name)
            }
        }
    }
}

extension StoreView {
    var kindWords: String {
        switch kind {
        case .newest: "newest"
        case .point: "recovery point"
        case .fork: "fork"
        }
    }
    var name: String {
        switch kind {
        case .newest: ""
        case .point(let id): id.rawValue
        case .fork(let id): id.rawValue
        }
    }
    var words: String {
        switch kind {
        case .newest: "disk \(spec.name) of group \(group)"
        case .point(let id): "disk \(spec.name) of recovery point \(id) of group \(group)"
        case .fork(let id): "disk \(spec.name) of fork \(id)"
        }
    }
}

extension StoreUUID {
    /// As it is usually written.
    var text: String {
        let digits = hex(high) + hex(low)
        var parts: [Substring] = []
        var rest = digits[...]
        for count in [8, 4, 4, 4, 12] {
            parts.append(rest.prefix(count))
            rest = rest.dropFirst(count)
        }
        return parts.joined(separator: "-")
    }

    private func hex(_ word: UInt64) -> String {
        let digits = String(word, radix: 16)
        return String(repeating: "0", count: 16 - digits.count) + digits
    }
}

extension LayerReader {
    /// Reads and verifies all pages of checksums.
    func checkChecksumPages() throws(StoreError) {
        let step = Self.batchBytes / 8
        let sums = UnsafeMutablePointer<UInt64>.allocate(capacity: step)
        defer { sums.deallocate() }
        var next = 0
        while next < checksumCount {
            let count = min(step, checksumCount - next)
            try readChecksums(next..<next + count, into: sums)
            next += count
        }
    }
}

import BlockTap
import CXXHash
import Foundation
import Glibc

/// Any file of a store, or the store itself, in words. Reads only, takes no lock, and goes on behind damage where it can.
public struct StoreInspect {
    public enum Value: Codable, Sendable, Hashable {
        case number(UInt64)
        case text(String)

        public init(from decoder: any Decoder) throws {
            let container = try decoder.singleValueContainer()
            if let number = try? container.decode(UInt64.self) { self = .number(number) } else { self = .text(try container.decode(String.self)) }
        }

        public func encode(to encoder: any Encoder) throws {
            var container = encoder.singleValueContainer()
            switch self {
            case .number(let number): try container.encode(number)
            case .text(let text): try container.encode(text)
            }
        }
    }

    /// One thing that was found.
    public struct Item: Codable, Sendable, Hashable {
        /// "file", "record", "extent", "damage" and so on.
        public var kind: String
        /// Where in the file; none for what is not in one place.
        public var offsetBytes: UInt64?
        public var text: String
        public var values: [String: Value] = [:]
        public var isDamage: Bool { kind == "damage" }
    }

    /// Tells `emit` of everything, in the order of the file; with `all` every extent and journal entry too. Returns the number of damages.
    /// Throws only when there is nothing to be read at `path`.
    public static func run(path: String, all: Bool, emit: @escaping (Item) -> Void) throws(StoreError) -> Int {
        var status = stat()
        guard stat(path, &status) == 0 else { throw storageError(errno, "cannot look at \(path)") }
        var inspect = StoreInspect(path: path, all: all, emit: emit)
        if status.st_mode & S_IFMT == S_IFDIR {
            try inspect.overview()
        } else {
            guard status.st_mode & S_IFMT == S_IFREG else { throw .invalid("\(path) is neither a file nor a directory") }
            try inspect.file()
        }
        return inspect.damageCount
    }

    private let path: String
    private let all: Bool
    private let emit: (Item) -> Void
    private var damageCount = 0

    private init(path: String, all: Bool, emit: @escaping (Item) -> Void) {
        self.path = path
        self.all = all
        self.emit = emit
    }

    private func say(_ kind: String, at offset: UInt64? = nil, _ text: String, _ values: [String: Value] = [:]) {
        emit(Item(kind: kind, offsetBytes: offset, text: text, values: values))
    }

    private mutating func damage(at offset: UInt64, _ what: String) {
        damageCount += 1
        say("damage", at: offset, what)
    }

    private mutating func damage(_ error: StoreError) {
        if case .damaged(_, let offset, let what) = error { damage(at: offset, what) } else { damage(at: 0, "\(error)") }
    }

    // MARK: The store around a file

    /// The state of the store in `directory` as far as its MANIFEST can be read.
    private static func state(in directory: String) -> StoreState? {
        guard let storage = try? ReadOnlyFiles(directory), let file = try? storage.open(Manifest.path), let size = try? file.size(), let bytes = try? readWhole(file, size: size) else { return nil }
        defer { bytes.deallocate() }
        guard let header = try? FileHeader.verify(UnsafeRawBufferPointer(bytes), path: file.path, kind: .manifest, id: 0, store: nil) else { return nil }
        return ManifestReplay.replay(LogScan(bytes).soundFrames, store: header.store).state
    }

    /// Of the store that a file in one of its directories belongs to.
    private var surroundings: StoreState? {
        let directory = (path as NSString).deletingLastPathComponent
        let store = directory.isEmpty ? ".." : directory + "/.."
        return Self.state(in: store)
    }

    // MARK: One file

    private mutating func file() throws(StoreError) {
        let file = try ReadOnlyFiles.file(path)
        let size = try file.size()
        let name = (path as NSString).lastPathComponent
        if name == "LOCK" { return say("file", "LOCK: \(size) bytes; locked by the process that has the store") }
        if name == "RESERVE" { return say("file", "RESERVE: \(size) bytes that are given up when the disk is full") }
        let head = UnsafeMutableRawBufferPointer.allocate(byteCount: FileHeader.byteCount, alignment: 8)
        defer { head.deallocate() }
        memset(head.baseAddress!, 0, head.count)
        let count = try file.read(into: head, at: 0)
        let header = head.loadUnaligned(as: FileHeader.self)
        // A damaged magic is made up for by the name.
        let byName: FileKind? =
            name.hasPrefix("MANIFEST") ? .manifest : name.hasSuffix(".seg") ? .segment : name.hasSuffix(".layer") ? .layer : name.hasSuffix(".journal") ? .journal
            : name.hasSuffix(".index") ? .index : nil
        let kind: FileKind
        if let found = FileKind(rawValue: header.magic) {
            kind = found
        } else if let byName {
            kind = byName
        } else {
            say("file", "\(path): \(size) bytes; no file of a store that this program knows", ["sizeBytes": .number(size)])
            damage(at: 0, "it does not begin like any file of a store")
            return
        }
        say("file", "\(kind) file of \(sizeInWords(size)), format version \(header.version), number \(header.id), of store \(header.store.text)", [
            "type": .text("\(kind)"), "sizeBytes": .number(size), "version": .number(UInt64(header.version)), "number": .number(header.id), "store": .text(header.store.text),
        ])
        do throws(StoreError) {
            let number = name.split(separator: ".").first.flatMap { UInt64($0) }
            _ = try FileHeader.verify(UnsafeRawBufferPointer(rebasing: head[..<count]), path: path, kind: byName ?? kind, id: kind == .manifest ? 0 : number, store: nil)
        } catch {
            damage(error)
            switch error {
            case .versionTooNew, .versionTooOld: return
            default: break
            }
        }
        switch kind {
        case .manifest: try manifest(file, size)
        case .segment: try segment(file, size, header)
        case .layer: try layer(file, size, header)
        case .journal: try journal(file, size, header)
        case .index: try index(file)
        }
    }

    // MARK: MANIFEST

    private mutating func manifest(_ file: any StorageFile, _ size: UInt64) throws(StoreError) {
        guard size >= UInt64(FramedLog.headerBytes) else { return }
        let bytes = try readWhole(file, size: size)
        defer { bytes.deallocate() }
        var state = StoreState(uuid: StoreUUID(high: 0, low: 0))
        var isFirst = true
        var count: UInt64 = 0
        for part in LogScan(bytes).parts {
            switch part {
            case .marker(let offset):
                if all { say("marker", at: offset, "all before this was synced") }
            case .damage(let range, let what): damage(at: range.lowerBound, what)
            case .torn(let range): say("torn", at: range.lowerBound, "an unfinished record of \(range.count) bytes, which the next start cuts off", ["bytes": .number(UInt64(range.count))])
            case .frame(let frame):
                count += 1
                let text: String
                if let record = try? ManifestReplay.decode(frame) { text = record.words(before: state) } else { text = "a record of \(frame.payload.count) bytes" }
                say("record", at: frame.offsetBytes, "\(frame.sequence): \(text)", [
                    "sequence": .number(frame.sequence), "record": .text(String(decoding: frame.payload, as: UTF8.self)),
                ])
                if let problem = ManifestReplay.apply(frame, to: &state, isFirst: isFirst) { damage(at: frame.offsetBytes, problem) }
                isFirst = false
            }
        }
        say("summary", "\(count) records: \(state.groups.count) groups, \(state.groups.values.reduce(0) { $0 + $1.points.count }) recovery points, \(state.forks.count) forks, \(state.layers.count) layers", [
            "records": .number(count), "groups": .number(UInt64(state.groups.count)), "layers": .number(UInt64(state.layers.count)), "forks": .number(UInt64(state.forks.count)),
        ])
    }

    // MARK: Segment

    private mutating func segment(_ file: any StorageFile, _ size: UInt64, _ header: FileHeader) throws(StoreError) {
        let allocated = (try? file.allocatedBytes()) ?? 0
        say("space", "\(size / UInt64(blockBytes)) blocks, \(sizeInWords(allocated)) of disk space", ["blocks": .number(size / UInt64(blockBytes)), "allocatedBytes": .number(allocated)])
        if size % UInt64(blockBytes) != 0 { damage(at: size, "the file ends within a block") }
        guard let state = surroundings else { return say("note", "the store around it cannot be read, so nothing tells what lies in it") }
        if state.uuid != header.store { damage(at: 16, "the file belongs to another store than the MANIFEST beside it (\(state.uuid.text))") }
        var isNamed = false
        for layer in state.layers.values.sorted(by: { $0.id < $1.id }) {
            for use in layer.segments where UInt64(use.segment) == header.id {
                isNamed = true
                say("use", "layer \(layer.id): \(use.blocks) blocks, the last before block \(use.endBlock)", ["layer": .number(layer.id), "blocks": .number(UInt64(use.blocks)), "endBlock": .number(UInt64(use.endBlock))])
                if UInt64(use.endBlock) * UInt64(blockBytes) > size { damage(at: size, "the file ends before the data of layer \(layer.id)") }
            }
        }
        for fork in state.forks.values.sorted(by: { $0.id.rawValue < $1.id.rawValue }) {
            for volume in fork.volumes where UInt64(volume.segment) == header.id {
                isNamed = true
                say("use", "what fork \(fork.id) writes to disk \(volume.spec.name)", ["fork": .text(fork.id.rawValue)])
            }
        }
        if !isNamed { say("note", "no layer and no fork uses it: the store removes it unless it is receiving into it") }
    }

    // MARK: Layer

    private mutating func layer(_ file: any StorageFile, _ size: UInt64, _ fileHeader: FileHeader) throws(StoreError) {
        let state = surroundings
        let record = state?.layers[fileHeader.id]
        if let state {
            if state.uuid != fileHeader.store { damage(at: 16, "the file belongs to another store than the MANIFEST beside it (\(state.uuid.text))") }
            if let record {
                if record.fileBytes != size { damage(at: min(size, record.fileBytes), "the file has \(size) bytes, the MANIFEST says \(record.fileBytes)") }
            } else {
                say("note", "the MANIFEST does not name it: the store removes it")
            }
        }
        guard size >= UInt64(pageBytes + 32) else { return damage(at: size, "the file ends early") }
        let page = UnsafeMutableRawBufferPointer.allocate(byteCount: pageBytes, alignment: pageBytes)
        defer { page.deallocate() }
        guard try file.read(into: page, at: 0) == pageBytes else { return damage(at: 0, "the file ends early") }
        let header = page.loadUnaligned(fromByteOffset: 64, as: LayerHeader.self)
        let isSound = header.checksum == XXH3_64bits(page.baseAddress!, 184)
        say("header", at: 64, "layer on \(header.parent == 0 ? "nothing" : "layer \(header.parent)"), disk number \(header.volumeIndex), \(sizeInWords(header.sizeBytes)), epoch \(header.epoch) (\(header.kind == 1 ? "exact" : "fuzzy"), consistency \(Consistency(formatValue: header.consistency))), cut at \(timeInWords(header.cutTimeNanoseconds)); \(header.extentCount) extents, \(header.checksumCount) checksums", [
            "parent": .number(header.parent), "volume": .number(UInt64(header.volumeIndex)), "sizeBytes": .number(header.sizeBytes), "epoch": .number(header.epoch), "cutTimeNanoseconds": .number(header.cutTimeNanoseconds),
            "extents": .number(header.extentCount), "checksums": .number(header.checksumCount),
        ])
        if !isSound { damage(at: 64, "the layer header does not match its checksum") }
        if let record, record.parent != header.parent { say("note", "it goes on layer \(record.parent) now: layers below were merged") }

        // Without offsets that make sense nothing behind the header can be found.
        guard header.extentsOffset == UInt64(pageBytes), header.checksumsOffset >= header.extentsOffset, header.fencesOffset >= header.checksumsOffset, header.fencesOffset <= size - 32,
            header.checksumsOffset % UInt64(pageBytes) == 0, header.fencesOffset % UInt64(pageBytes) == 0
        else { return damage(at: 96, "the places of its parts contradict the file") }
        let extentPages = Int(header.checksumsOffset - header.extentsOffset) / pageBytes
        let checksumPages = Int(header.fencesOffset - header.checksumsOffset) / pageBytes
        let tail = UnsafeMutableRawBufferPointer.allocate(byteCount: Int(size - header.fencesOffset), alignment: pageBytes)
        defer { tail.deallocate() }
        guard try file.read(into: tail, at: header.fencesOffset) == tail.count else { return damage(at: header.fencesOffset, "the file ends early") }
        let fenceBytes = tail.count - 32
        let trailer = tail.loadUnaligned(fromByteOffset: fenceBytes, as: LayerTrailer.self)
        if trailer.magic != LayerTrailer.magicNow || trailer.checksum != XXH3_64bits(tail.baseAddress! + fenceBytes, 24) { damage(at: size - 32, "the trailer does not match its checksum") }
        if let record, record.digest != trailer.checksum { damage(at: size - 32, "the trailer does not match the MANIFEST") }
        if trailer.headerChecksum != header.checksum { damage(at: size - 24, "the trailer is of another header") }
        if trailer.fencesChecksum != XXH3_64bits(tail.baseAddress!, fenceBytes) { damage(at: header.fencesOffset, "the fences do not match their checksum") }
        guard fenceBytes == extentPages * 16 + checksumPages * 8 else { return damage(at: header.fencesOffset, "the fences are not as many as the pages") }
        say("fences", at: header.fencesOffset, "\(extentPages) pages of extents, \(checksumPages) pages of checksums", ["extentPages": .number(UInt64(extentPages)), "checksumPages": .number(UInt64(checksumPages))])

        try extents(file, header, tail, extentPages, page)
        for index in 0..<checksumPages {
            let offset = header.checksumsOffset + UInt64(index * pageBytes)
            guard try file.read(into: page, at: offset) == pageBytes else { return damage(at: offset, "the file ends early") }
            let sum = tail.loadUnaligned(fromByteOffset: extentPages * 16 + index * 8, as: UInt64.self)
            if sum != XXH3_64bits(page.baseAddress!, pageBytes) { damage(at: offset, "a page of block checksums does not match its own checksum") }
        }
    }

    private mutating func extents(_ file: any StorageFile, _ header: LayerHeader, _ tail: UnsafeMutableRawBufferPointer, _ pages: Int, _ page: UnsafeMutableRawBufferPointer) throws(StoreError) {
        var left = header.extentCount
        var figures = (data: UInt64(0), zero: UInt64(0), clusters: UInt64(0), stored: UInt64(0))
        var segments: Set<UInt32> = []
        for index in 0..<pages {
            let offset = header.extentsOffset + UInt64(index * pageBytes)
            guard try file.read(into: page, at: offset) == pageBytes else { return damage(at: offset, "the file ends early") }
            let fence = tail.loadUnaligned(fromByteOffset: index * 16, as: LayerFence.self)
            if fence.checksum != XXH3_64bits(page.baseAddress!, pageBytes) {
                damage(at: offset, "a page of extents does not match its checksum; it begins at block \(fence.firstBlock)")
                left -= min(left, UInt64(pageBytes / MemoryLayout<StoredExtent>.size))
                continue
            }
            for number in 0..<Int(min(left, UInt64(pageBytes / MemoryLayout<StoredExtent>.size))) {
                let extent = page.loadUnaligned(fromByteOffset: number * MemoryLayout<StoredExtent>.size, as: StoredExtent.self)
                if extent.isZero {
                    figures.zero += UInt64(extent.blockCount)
                } else {
                    figures.data += UInt64(extent.blockCount)
                    figures.stored += UInt64(extent.segmentBlockCount)
                    if extent.isCompressed { figures.clusters += 1 }
                    segments.insert(extent.segment)
                }
                if all { say("extent", at: offset + UInt64(number * MemoryLayout<StoredExtent>.size), extent.words, extent.values) }
            }
            left -= min(left, UInt64(pageBytes / MemoryLayout<StoredExtent>.size))
        }
        if left > 0 { damage(at: 80, "\(left) extents more than its pages hold") }
        let compressed = figures.clusters > 0 ? " (\(figures.clusters) extents compressed)" : ""
        say("extents", at: header.extentsOffset, "\(figures.data) blocks of data\(compressed), \(figures.zero) blocks of zeroes; data in segments \(segments.sorted().map(String.init).joined(separator: ", "))", [
            "dataBlocks": .number(figures.data), "zeroBlocks": .number(figures.zero), "compressedExtents": .number(figures.clusters), "segments": .text(segments.sorted().map(String.init).joined(separator: " ")),
        ])
    }

    // MARK: Index

    private mutating func index(_ file: any StorageFile) throws(StoreError) {
        var contents = IndexFile.Contents(top: 0, layers: [], extentCount: 0)
        do throws(StoreError) {
            try IndexFile.verify(file, top: nil, store: nil) { contents = $0 } extents: { _ in }
            say("index", at: 64, "the merged index of the layers up to \(contents.top): \(contents.extentCount) extents of \(contents.layers.count) layers; only a copy, made again when it is lost", [
                "top": .number(contents.top), "extents": .number(UInt64(contents.extentCount)), "layers": .number(UInt64(contents.layers.count)),
            ])
            if all { for (slot, layer) in contents.layers.enumerated() { say("slot", "extents of slot \(slot) are of layer \(layer.id)", ["slot": .number(UInt64(slot)), "layer": .number(layer.id)]) } }
        } catch { damage(error) }
    }

    // MARK: Journal

    private mutating func journal(_ file: any StorageFile, _ size: UInt64, _ header: FileHeader) throws(StoreError) {
        guard size >= UInt64(FramedLog.headerBytes) else { return }
        if let state = surroundings {
            var owner: String?
            for fork in state.forks.values { for volume in fork.volumes where volume.journal == header.id { owner = "of disk \(volume.spec.name) of fork \(fork.id), whose data is in segment \(volume.segment)" } }
            say("use", owner ?? "no fork uses it: the store removes it")
        }
        let bytes = try readWhole(file, size: size)
        defer { bytes.deallocate() }
        var flushes: UInt64 = 0, writes: UInt64 = 0
        for part in LogScan(bytes).parts {
            switch part {
            case .marker(let offset):
                if all { say("marker", at: offset, "all before this was synced") }
            case .damage(let range, let what): damage(at: range.lowerBound, what)
            case .torn(let range): say("torn", at: range.lowerBound, "an unfinished flush of \(range.count) bytes, which opening the fork cuts off", ["bytes": .number(UInt64(range.count))])
            case .frame(let frame):
                guard frame.type == ForkJournal.frameType, let batch = ForkJournal.parse(frame.payload) else {
                    damage(at: frame.offsetBytes, "a journal frame contradicts itself")
                    continue
                }
                flushes += 1
                writes += UInt64(batch.entries.count)
                let zero = batch.entries.reduce(0) { $0 + ($1.isZero ? UInt64($1.blockCount) : 0) }
                say("flush", at: frame.offsetBytes, "\(frame.sequence): \(batch.entries.count) writes, \(batch.sums.count) blocks of data, \(zero) of zeroes\(frame.isSynced ? "" : "; nothing proves that it was synced")", [
                    "sequence": .number(frame.sequence), "writes": .number(UInt64(batch.entries.count)), "dataBlocks": .number(UInt64(batch.sums.count)), "zeroBlocks": .number(zero),
                ])
                if all { for entry in batch.entries { say("extent", entry.words, entry.values) } }
            }
        }
        say("summary", "\(flushes) flushes with \(writes) writes", ["flushes": .number(flushes), "writes": .number(writes)])
    }

    // MARK: The store

    private mutating func overview() throws(StoreError) {
        let manifestPath = path + "/" + Manifest.path
        guard access(manifestPath, F_OK) == 0 else { throw .invalid("\(path) is no store: it has no \(Manifest.path)") }
        let file = try ReadOnlyFiles.file(manifestPath)
        let bytes = try readWhole(file, size: try file.size())
        defer { bytes.deallocate() }
        let header: FileHeader
        do throws(StoreError) { header = try FileHeader.verify(UnsafeRawBufferPointer(bytes), path: manifestPath, kind: .manifest, id: 0, store: nil) } catch {
            return damage(error)
        }
        let scan = LogScan(bytes)
        for (offset, what) in scan.damages { damage(at: offset, "\(Manifest.path): \(what)") }
        let (state, problems) = ManifestReplay.replay(scan.soundFrames, store: header.store)
        for (offset, what) in problems { damage(at: offset, "\(Manifest.path): \(what)") }
        say("store", "store \(header.store.text), format version \(header.version): \(state.layers.count) layers", ["store": .text(header.store.text), "version": .number(UInt64(header.version)), "layers": .number(UInt64(state.layers.count))])
        for (id, group) in state.groups.sorted(by: { $0.key.rawValue < $1.key.rawValue }) {
            let held = group.points.filter { $0.point.hold != nil }.count
            let last = group.lastDurable.map { ", last durable \($0.epoch) of \($0.instance)" } ?? ""
            say("group", "group \(id), \(group.generation)\(last): \(group.points.count) recovery points\(held > 0 ? ", \(held) of them held" : "")", ["group": .text(id.rawValue), "recoveryPoints": .number(UInt64(group.points.count)), "held": .number(UInt64(held))])
            for volume in group.volumes {
                let chain = state.chain(volume.top)
                let data = chain.reduce(0) { $0 + $1.dataBytes }
                say("volume", "  disk \(volume.spec.name), \(sizeInWords(volume.spec.geometry.sizeBytes)): \(chain.count) layers up to \(volume.top) with \(chain.reduce(0) { $0 + $1.extentCount }) extents and \(sizeInWords(data)) of data", [
                    "disk": .text(volume.spec.name), "sizeBytes": .number(volume.spec.geometry.sizeBytes), "layers": .number(UInt64(chain.count)), "dataBytes": .number(data), "top": .number(volume.top),
                ])
            }
            for point in group.points {
                let marks = (point.point.hold.map { ", held as \($0)" } ?? "") + (point.point.isOnDemand ? ", on demand" : "") + (point.point.note.map { ": \($0)" } ?? "")
                say("recovery point", "  \(point.point.id) of \(timeInWords(point.point.cutTimeNanoseconds)), \(point.point.consistency) consistent, \(point.point.epoch), layers \(point.volumes.map { String($0.top) }.joined(separator: ", "))\(marks)", [
                    "recoveryPoint": .text(point.point.id.rawValue), "cutTimeNanoseconds": .number(point.point.cutTimeNanoseconds), "epoch": .number(point.point.epoch.rawValue),
                ])
            }
        }
        for fork in state.forks.values.sorted(by: { $0.id.rawValue < $1.id.rawValue }) {
            say("fork", "fork \(fork.id) of group \(fork.group) at \(fork.point)\(fork.parentFork.map { ", made of fork \($0)" } ?? "") (\(fork.purpose)), since \(timeInWords(fork.createdTimeNanoseconds))", ["fork": .text(fork.id.rawValue), "group": .text(fork.group.rawValue)])
            for volume in fork.volumes { say("volume", "  disk \(volume.spec.name): on layer \(volume.parent), data in segment \(volume.segment), journal \(volume.journal)", ["parent": .number(volume.parent), "segment": .number(UInt64(volume.segment)), "journal": .number(volume.journal)]) }
        }
        if let storage = try? ReadOnlyFiles(path) {
            for directory in ["segments", "layers", "journals", "indexes"] {
                guard let names = try? storage.list(directory) else {
                    damage(at: 0, "the directory \(directory) cannot be listed")
                    continue
                }
                var size: UInt64 = 0, allocated: UInt64 = 0
                for name in names {
                    guard let file = try? storage.open(directory + "/" + name) else { continue }
                    size += (try? file.size()) ?? 0
                    allocated += (try? file.allocatedBytes()) ?? 0
                }
                say("directory", "\(directory): \(names.count) files, \(sizeInWords(size)), \(sizeInWords(allocated)) of disk space", ["files": .number(UInt64(names.count)), "sizeBytes": .number(size), "allocatedBytes": .number(allocated)])
            }
        }
        say("hint", "what is in a file: afterimage store inspect \(path)/\(Manifest.path) (or any other); whether all is well: afterimage store check \(path)")
    }
}

/// Files of a directory that is not changed, nor locked.
private struct ReadOnlyFiles {
    private let storage: FileStorage
    init(_ directory: String) throws(StoreError) {
        // `FileStorage` makes a directory that is missing.
        guard access(directory, F_OK) == 0 else { throw storageError(errno, "cannot look at \(directory)") }
        storage = try FileStorage(directory: directory)
    }
    func open(_ path: String) throws(StoreError) -> any StorageFile { try storage.open(path, .read, direct: false) }
    func list(_ directory: String) throws(StoreError) -> [String] { try storage.list(directory) }

    static func file(_ path: String) throws(StoreError) -> any StorageFile {
        let directory = (path as NSString).deletingLastPathComponent
        return try ReadOnlyFiles(directory.isEmpty ? "." : directory).open((path as NSString).lastPathComponent)
    }
}

/// UTC, to the millisecond.
private func timeInWords(_ nanoseconds: UInt64) -> String {
    let whole = nanoseconds / 1_000_000_000
    guard whole < UInt64(Int32.max) * 64 else { return "\(nanoseconds) ns" }
    var seconds = time_t(whole)
    var parts = tm()
    gmtime_r(&seconds, &parts)
    func two(_ number: Int32) -> String { number < 10 ? "0\(number)" : "\(number)" }
    let milliseconds = String(1000 + nanoseconds / 1_000_000 % 1000).dropFirst()
    return "\(parts.tm_year + 1900)-\(two(parts.tm_mon + 1))-\(two(parts.tm_mday)) \(two(parts.tm_hour)):\(two(parts.tm_min)):\(two(parts.tm_sec)).\(milliseconds) UTC"
}

extension StoredExtent {
    fileprivate var words: String {
        let blocks = blockCount == 1 ? "block \(startBlock)" : "blocks \(startBlock) to \(endBlock - 1)"
        if isZero { return "\(blocks): zero" }
        if isCompressed { return "\(blocks): segment \(segment), from block \(clusterSkip) of the cluster of \(clusterBlocks) in \(segmentBlockCount) at block \(segmentBlock), checksums from \(checksumIndex)" }
        return "\(blocks): segment \(segment) at block \(segmentBlock), checksums from \(checksumIndex)"
    }

    fileprivate var values: [String: StoreInspect.Value] {
        [
            "block": .number(startBlock), "count": .number(UInt64(blockCount)), "segment": .number(UInt64(segment)), "segmentBlock": .number(UInt64(segmentBlock)),
            "checksumIndex": .number(UInt64(checksumIndex)), "encoding": .text(isZero ? "zero" : isCompressed ? "cluster" : "plain"),
        ]
    }
}

extension ManifestRecord {
    /// For people; `state` is the one before it.
    fileprivate func words(before state: StoreState) -> String {
        switch self {
        case .snapshot(let state):
            "snapshot: \(state.groups.count) groups, \(state.groups.values.reduce(0) { $0 + $1.points.count }) recovery points, \(state.forks.count) forks, \(state.layers.count) layers; next file \(state.nextFile)"
        case .groupCreated(let id, let volumes):
            "group \(id) has the disks \(volumes.map { "\($0.name) (\(sizeInWords($0.geometry.sizeBytes)))" }.joined(separator: ", "))"
        case .groupDeleted(let id): "group \(id) is deleted"
        case .generationRaised(let id, let generation): "group \(id) is at \(generation)"
        case .epochSealed(let id, let position, let volumes, let layers, let point):
            "\(position.epoch) of group \(id) (\(position.kind == .exact ? "exact" : "fuzzy"), instance \(position.instance)) sealed: "
                + (layers.isEmpty ? "nothing changed" : zip(volumes, layers).map { "disk number \($0) gets layer \($1.id) on \($1.parent) (\($1.extentCount) extents, \(sizeInWords($1.dataBytes)))" }.joined(separator: ", "))
                + (point.map { "; recovery point \($0.id)" } ?? "")
        case .forked(let fork):
            "fork \(fork.id) of group \(fork.group) at \(fork.point)\(fork.parentFork.map { ", made of fork \($0)" } ?? "") (\(fork.purpose)): "
                + fork.volumes.map { "disk \($0.spec.name) on layer \($0.parent), segment \($0.segment), journal \($0.journal)" }.joined(separator: ", ")
        case .forkDropped(let id): "fork \(id) is dropped"
        case .pointsDropped(let id, let points): "group \(id) loses the recovery points \(points.map(\.rawValue).joined(separator: ", "))"
        case .pointMarked(let id, let point, let marks):
            "recovery point \(point) of group \(id): \(marks.hold.map { "held as \($0)" } ?? "not held")\(marks.isOnDemand ? ", on demand" : "")\(marks.note.map { ", \"\($0)\"" } ?? "")"
        case .layersMerged(let replaced, let layer):
            "layers \(replaced.map(String.init).joined(separator: ", ")) became layer \(layer.id) on \(layer.parent) (\(layer.extentCount) extents, \(sizeInWords(layer.dataBytes)))"
        case .forkSealed(let id, let seals):
            "fork \(id) sealed: " + seals.map { seal in "disk number \(seal.volume) \(seal.layer.map { "gets layer \($0.id) on \($0.parent)" } ?? "had nothing new"), goes on in segment \(seal.segment), journal \(seal.journal)" }.joined(separator: ", ")
        case .forkCommitted(let id): "fork \(id) is committed: the group's disks are the fork's"
        case .forkHydrated(let id, let volume, let replaced, let layer):
            "fork \(id): disk number \(volume) stands on layer \(layer.id) (\(layer.extentCount) extents, \(sizeInWords(layer.dataBytes))) in place of \(replaced.map(String.init).joined(separator: ", "))"
        }
    }
}

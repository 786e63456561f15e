import BlockTap
import CXXHash
import Glibc

/// A merged index on disk, `indexes/NNNNNNNN.index`, numbered as its top layer: what opening a chain of many layers starts from. Only a
/// copy of what the layers say: never synced, verified as it is read, and removed when it is damaged or of no more use.
enum IndexFile {
    /// One chunk of an index.
    static let pageBytes = ExtentIndex.chunkExtentsMax * MemoryLayout<IndexExtent>.size
    private static let batchPages = 170
    private static let extentsOffset = 4096

    static func path(_ top: UInt64) -> String { "indexes/\(fileNumber(top)).index" }

    /// At byte 64 (64 bytes, little-endian).
    private struct Header {
        var extentCount: UInt64
        var layerCount: UInt64
        var fileBytes: UInt64
        /// Where the layers and after them the checksums of the pages are.
        var tableOffset: UInt64
        /// XXH3-64 of the table.
        var tableChecksum: UInt64
        var reserved: (UInt64, UInt64) = (0, 0)
        /// XXH3-64 of the file's bytes 0..<120.
        var checksum: UInt64 = 0
    }

    /// Per slot.
    private struct Layer {
        var id: UInt64
        var digest: UInt64
    }

    static func byteCount(_ snapshot: IndexSnapshot) -> UInt64 {
        UInt64(snapshot.index.count * MemoryLayout<IndexExtent>.size + snapshot.layers.count * MemoryLayout<Layer>.size + (64 << 10))
    }

    /// `digests`: of the layers in the snapshot. Nothing is synced; the header goes in last.
    static func write(_ storage: any Storage, store: StoreUUID, _ snapshot: IndexSnapshot, digests: [UInt64: UInt64]) throws(StoreError) {
        let file = try storage.open(path(snapshot.top), .create, direct: false)
        // Only slots that something is of, numbered anew.
        let used = snapshot.index.usedSlots(below: snapshot.layers.count)
        var numbers = ContiguousArray<UInt32>(repeating: 0, count: snapshot.layers.count)
        var layers: [Layer] = []
        for slot in snapshot.layers.indices where used.contains(UInt32(slot)) {
            let id = snapshot.layers[slot].layer
            guard let digest = digests[id] else { throw .invalid("layer \(id) is not there any more") }
            numbers[slot] = UInt32(layers.count)
            layers.append(Layer(id: id, digest: digest))
        }
        let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: batchPages * pageBytes, alignment: 4096)
        defer { buffer.deallocate() }
        let capacity = batchPages * ExtentIndex.chunkExtentsMax
        let extents = buffer.bindMemory(to: IndexExtent.self)
        var sums: [UInt64] = []
        var offset = UInt64(extentsOffset)
        var count = 0
        func flush() throws(StoreError) {
            let bytes = count * MemoryLayout<IndexExtent>.size
            let whole = roundUp(bytes, to: pageBytes)
            memset(buffer.baseAddress! + bytes, 0, whole - bytes)
            for page in stride(from: 0, to: whole, by: pageBytes) { sums.append(cxxhash_64(buffer.baseAddress! + page, pageBytes)) }
            try file.write(UnsafeRawBufferPointer(rebasing: buffer[..<whole]), at: offset)
            offset += UInt64(whole)
            count = 0
        }
        for number in 0..<snapshot.index.chunkCount {
            for extent in snapshot.index.chunk(number) {
                extents[count] = extent
                extents[count].slot = numbers[Int(extent.slot)]
                count += 1
                if count == capacity { try flush() }
            }
        }
        if count > 0 { try flush() }

        let layerBytes = layers.count * MemoryLayout<Layer>.size
        let table = UnsafeMutableRawBufferPointer.allocate(byteCount: layerBytes + sums.count * 8, alignment: 16)
        defer { table.deallocate() }
        layers.withUnsafeBytes { if $0.count > 0 { memcpyBytes(table.baseAddress!, $0.baseAddress!, $0.count) } }
        sums.withUnsafeBytes { if $0.count > 0 { memcpyBytes(table.baseAddress! + layerBytes, $0.baseAddress!, $0.count) } }
        if table.count > 0 { try file.write(UnsafeRawBufferPointer(table), at: offset) }
        var header = Header(
            extentCount: UInt64(snapshot.index.count), layerCount: UInt64(layers.count), fileBytes: offset + UInt64(table.count), tableOffset: offset,
            tableChecksum: cxxhash_64(table.baseAddress!, table.count))
        memset(buffer.baseAddress!, 0, extentsOffset)
        buffer.storeBytes(of: FileHeader(kind: .index, id: snapshot.top, store: store), as: FileHeader.self)
        buffer.storeBytes(of: header, toByteOffset: 64, as: Header.self)
        header.checksum = cxxhash_64(buffer.baseAddress!, 120)
        buffer.storeBytes(of: header, toByteOffset: 64, as: Header.self)
        try file.write(UnsafeRawBufferPointer(rebasing: buffer[..<extentsOffset]), at: 0)
    }

    /// What an index file says it was merged from.
    struct Contents {
        var top: UInt64
        /// By slot: the layer's number and its digest.
        var layers: [(id: UInt64, digest: UInt64)]
        var extentCount: Int
    }

    /// Of the chain's top layer. Throws `.damaged` when the file is not whole, or names layers that the chain does not have.
    static func read(
        _ storage: any Storage, store: StoreUUID, chain: [LayerRecord], isChecked: Bool = true, checksums: (LayerRecord) throws(StoreError) -> LayerChecksums
    ) throws(StoreError) -> IndexSnapshot {
        let file = try storage.open(path(chain.last!.id), .read, direct: false)
        let records = Dictionary(uniqueKeysWithValues: chain.map { ($0.id, $0) })
        var layers: ContiguousArray<LayerChecksums> = []
        var index = ExtentIndex()
        try verify(file, top: chain.last!.id, store: store, isChecked: isChecked) { contents throws(StoreError) in
            layers.reserveCapacity(contents.layers.count)
            for layer in contents.layers {
                guard let record = records[layer.id], record.digest == layer.digest || !isChecked else {
                    throw .damaged(path: file.path, offsetBytes: 0, what: "layer \(layer.id) is not of the chain any more")
                }
                layers.append(try checksums(record))
            }
            index.reserve(chunks: contents.extentCount / ExtentIndex.chunkExtentsMax + 1)
        } extents: { extents in
            // Unchecked (a deliberate fault), what would be read outside of memory is left out.
            if !isChecked, extents.contains(where: { Int($0.checksumIndex) + Int($0.blockCount) > layers[Int($0.slot)].count }) { return }
            index.append(extents)
        }
        return IndexSnapshot(top: chain.last!.id, index: index, layers: layers)
    }

    /// Reads a whole file, of any top layer or store when none is given. `begin` comes first, then the extents in order, a page at a time;
    /// what they were told is worth nothing after an error. Throws `.damaged`.
    static func verify(
        _ file: any StorageFile, top: UInt64?, store: StoreUUID?, isChecked: Bool = true, begin: (Contents) throws(StoreError) -> Void, extents body: (UnsafeBufferPointer<IndexExtent>) -> Void
    ) throws(StoreError) {
        func damaged(_ offset: UInt64, _ what: String) -> StoreError { .damaged(path: file.path, offsetBytes: offset, what: what) }
        let size = try file.size()
        let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: batchPages * pageBytes, alignment: 4096)
        defer { buffer.deallocate() }
        guard try file.read(into: UnsafeMutableRawBufferPointer(rebasing: buffer[..<extentsOffset]), at: 0) == extentsOffset else { throw damaged(0, "the file ends early") }
        let fileHeader = try FileHeader.verify(UnsafeRawBufferPointer(rebasing: buffer[..<FileHeader.byteCount]), path: file.path, kind: .index, id: top, store: store)
        let header = buffer.load(fromByteOffset: 64, as: Header.self)
        guard header.checksum == cxxhash_64(buffer.baseAddress!, 120) else { throw damaged(64, "the index header does not match its checksum") }
        // What lies between the header and the first page is zero, so that no bit of the file is without meaning.
        guard buffer[128..<extentsOffset].allSatisfy({ $0 == 0 }) else { throw damaged(128, "it should be zero behind the header") }
        let extentCount = Int(header.extentCount)
        let pageCount = (extentCount + ExtentIndex.chunkExtentsMax - 1) / ExtentIndex.chunkExtentsMax
        let layerBytes = Int(header.layerCount) * MemoryLayout<Layer>.size
        guard header.fileBytes == size, header.tableOffset == UInt64(extentsOffset + pageCount * pageBytes), size - header.tableOffset == UInt64(layerBytes + pageCount * 8)
        else { throw damaged(64, "the index header contradicts the file") }
        let table = UnsafeMutableRawBufferPointer.allocate(byteCount: layerBytes + pageCount * 8, alignment: 16)
        defer { table.deallocate() }
        guard try file.read(into: table, at: header.tableOffset) == table.count, cxxhash_64(table.baseAddress!, table.count) == header.tableChecksum else {
            throw damaged(header.tableOffset, "the table does not match its checksum")
        }
        let layerCount = Int(header.layerCount)
        try begin(Contents(top: fileHeader.id, layers: (0..<layerCount).map { slot in
            let layer = table.loadUnaligned(fromByteOffset: slot * MemoryLayout<Layer>.size, as: Layer.self)
            return (layer.id, layer.digest)
        }, extentCount: extentCount))

        var page = 0
        var end: UInt64 = 0
        while page < pageCount {
            let pages = min(batchPages, pageCount - page)
            let offset = UInt64(extentsOffset + page * pageBytes)
            guard try file.read(into: UnsafeMutableRawBufferPointer(rebasing: buffer[..<(pages * pageBytes)]), at: offset) == pages * pageBytes else { throw damaged(offset, "the file ends early") }
            for number in 0..<pages {
                let start = buffer.baseAddress! + number * pageBytes
                guard !isChecked || cxxhash_64(start, pageBytes) == table.loadUnaligned(fromByteOffset: layerBytes + (page + number) * 8, as: UInt64.self) else {
                    throw damaged(offset + UInt64(number * pageBytes), "a page of extents does not match its checksum")
                }
                let count = min(ExtentIndex.chunkExtentsMax, extentCount - (page + number) * ExtentIndex.chunkExtentsMax)
                let extents = UnsafeBufferPointer(start: UnsafePointer(start.assumingMemoryBound(to: IndexExtent.self)), count: count)
                for extent in extents {
                    guard extent.startBlock >= end, extent.blockCount > 0, extent.slot < layerCount else { throw damaged(offset + UInt64(number * pageBytes), "an extent contradicts the file") }
                    end = extent.endBlock
                }
                body(extents)
            }
            page += pages
        }
    }
}

extension ReplicaStore {
    /// More are not kept: the oldest goes.
    static let indexFilesMax = 16

    /// When the store closes: so that the next one opens the newest recovery points quickly.
    func writeLastIndexFiles() {
        for snapshot in indexes.unwritten(costMin: options.indexFileCostMin, extentsMax: 8 << 20) { writeIndexFile(snapshot) }
    }

    /// In the background. A failure only makes the next opening slower.
    func writeIndexFile(_ snapshot: IndexSnapshot) {
        background.enqueue { [weak self] in
            guard let self, !self.indexes.hasFile(snapshot.top) else { return }
            let digests = self.read { state in
                snapshot.layers.reduce(into: [UInt64: UInt64]()) { $0[$1.layer] = state.layers[$1.layer]?.digest }
            }
            // Space is for epochs first.
            guard self.isLayer(snapshot.top), IndexFile.byteCount(snapshot) * 8 <= self.storage.space().freeBytes else { return }
            do throws(StoreError) {
                try IndexFile.write(self.storage, store: self.uuid, snapshot, digests: digests)
                self.indexes.add(file: snapshot.top, layers: Set(digests.keys))
            } catch {
                self.removeIndexFile(snapshot.top)
                self.logger.debug("cannot keep a merged index", metadata: ["layer": "\(snapshot.top)", "error": "\(error)"])
            }
            // Its layer may have gone while it was written, when nobody looked for it.
            if !self.isLayer(snapshot.top) { self.removeIndexFile(snapshot.top) }
            while self.indexes.files.count > Self.indexFilesMax { self.removeIndexFile(self.indexes.files.min()!) }
        }
    }

    private func isLayer(_ id: UInt64) -> Bool { read { $0.layers[id] != nil } }

    /// nil when there is none that is good; then the file is removed.
    func readIndexFile(_ chain: [LayerRecord]) -> IndexSnapshot? {
        do throws(StoreError) {
            let snapshot = try IndexFile.read(storage, store: uuid, chain: chain, isChecked: options.deliberateFault != .indexFilesNotChecked) { record throws(StoreError) in
                try self.checksums.checksums(of: LayerReader(self.storage, store: self.uuid, record: record))
            }
            indexes.add(file: snapshot.top, layers: Set(snapshot.layers.map(\.layer)))
            return snapshot
        } catch {
            logger.debug("a merged index is of no use", metadata: ["layer": "\(chain.last!.id)", "error": "\(error)"])
            removeIndexFile(chain.last!.id)
            return nil
        }
    }

    /// Files that name layers which are gone: their top layers may live for long.
    func forgetIndexFiles(_ tops: [UInt64]) {
        if tops.isEmpty { return }
        background.enqueue { [weak self] in
            // Unless one was written anew meanwhile, on this thread too.
            for top in tops where !(self?.indexes.hasFile(top) ?? true) { self?.removeIndexFile(top) }
        }
    }

    private func removeIndexFile(_ top: UInt64) {
        indexes.remove(file: top)
        try? storage.remove(IndexFile.path(top))
    }

    /// At open.
    func findIndexFiles() throws(StoreError) {
        for name in try storage.list("indexes") {
            if name.hasSuffix(".index"), let top = UInt64(name.dropLast(6)) { indexes.add(file: top, layers: []) }
        }
    }
}

import CXXHash
import Glibc
import Synchronization

/// The checksums of a layer's blocks, while anybody reads through the layer. Those of a small layer are in memory; of a large one, pages
/// of its file are, as far as `ChecksumCache` has room. Immutable and thread-safe.
final class LayerChecksums: @unchecked Sendable {
    static let perPage = pageBytes / 8

    let layer: UInt64
    /// Size of the volume at the layer's cut: tells how much of a last block was hashed.
    let sizeBytes: UInt64
    let count: Int
    /// Of the layer file, as in the MANIFEST; 0 = not known.
    let digest: UInt64
    /// All of them; nil = in pages.
    let resident: UnsafeMutablePointer<UInt64>?
    let pages: ChecksumPages?
    private let cache: ChecksumCache?

    /// In memory, whatever it takes.
    init(layer: UInt64, sizeBytes: UInt64, copying sums: UnsafeBufferPointer<UInt64>, digest: UInt64 = 0, cache: ChecksumCache? = nil) {
        self.layer = layer
        self.sizeBytes = sizeBytes
        self.digest = digest
        self.cache = cache
        count = sums.count
        pages = nil
        resident = .allocate(capacity: max(1, sums.count))
        if count > 0 { resident!.update(from: sums.baseAddress!, count: count) }
    }

    init(layer: UInt64, sizeBytes: UInt64, count: Int, digest: UInt64, pages: ChecksumPages, cache: ChecksumCache) {
        self.layer = layer
        self.sizeBytes = sizeBytes
        self.digest = digest
        self.count = count
        self.pages = pages
        self.cache = cache
        resident = nil
    }

    deinit {
        resident?.deallocate()
        cache?.ended(layer, ObjectIdentifier(self), isPaged: resident == nil, bytes: resident == nil ? 0 : count * 8)
    }

    /// Copies `count` checksums from `first` on when they are in memory.
    func copyCached(_ first: UInt32, _ count: Int, into sums: UnsafeMutablePointer<UInt64>) -> Bool {
        if let resident {
            sums.update(from: resident + Int(first), count: count)
            return true
        }
        var done = 0
        while done < count {
            let at = Int(first) + done
            let part = min(count - done, Self.perPage - at % Self.perPage)
            guard cache!.copy(pages!, at / Self.perPage, from: at % Self.perPage, part, into: sums + done) else { return false }
            done += part
        }
        return true
    }

    /// Copies `count` checksums from `first` on, reading what is missing.
    func copy(_ first: UInt32, _ count: Int, into sums: UnsafeMutablePointer<UInt64>) throws(StoreError) {
        if copyCached(first, count, into: sums) { return }
        let range = pageRange(first, count)
        let memory = UnsafeMutableRawPointer.allocate(byteCount: range.count * pageBytes, alignment: pageBytes)
        defer { memory.deallocate() }
        let file = try cache!.file(layer)
        guard try file.read(into: UnsafeMutableRawBufferPointer(start: memory, count: range.count * pageBytes), at: pages!.offset(range.lowerBound)) == range.count * pageBytes else {
            throw .damaged(path: file.path, offsetBytes: pages!.offset(range.lowerBound), what: "the file ends early")
        }
        try take(memory, range, path: file.path)
        copy(first, count, from: memory, into: sums)
    }

    // MARK: For those who read the pages themselves

    func pageRange(_ first: UInt32, _ count: Int) -> Range<Int> {
        Int(first) / Self.perPage..<(Int(first) + count + Self.perPage - 1) / Self.perPage
    }

    /// The layer's file when it is open, so that nobody waits.
    var openFile: (any StorageFile)? { cache!.openFile(layer) }

    /// Elsewhere than on an event loop.
    func later(_ body: @escaping @Sendable () -> Void) { cache!.later(body) }

    /// Verifies pages that were read and keeps them for others.
    func take(_ memory: UnsafeRawPointer, _ range: Range<Int>, path: String) throws(StoreError) {
        for page in range {
            let bytes = memory + (page - range.lowerBound) * pageBytes
            guard cxxhash_64(bytes, pageBytes) == pages!.sums[page] else {
                throw .damaged(path: path, offsetBytes: pages!.offset(page), what: "a page of block checksums does not match its checksum")
            }
            cache!.put(pages!, page, bytes)
        }
    }

    /// Out of the pages of `pageRange`.
    func copy(_ first: UInt32, _ count: Int, from memory: UnsafeRawPointer, into sums: UnsafeMutablePointer<UInt64>) {
        memcpyBytes(UnsafeMutableRawPointer(sums), memory + Int(first) % Self.perPage * 8, count * 8)
    }
}

/// Where the pages of a layer's checksums are and what they must hash to.
struct ChecksumPages {
    /// Tells its pages from those of any other in the cache.
    let serial: UInt64
    let sectionOffset: UInt64
    let sums: [UInt64]

    func offset(_ page: Int) -> UInt64 { sectionOffset + UInt64(page * pageBytes) }
}

/// Block checksums in memory, of all layers that anybody reads: half of the budget for small layers as a whole, half for pages of the others.
/// Also the layer files that are open for it, a bounded number. Thread-safe.
final class ChecksumCache: @unchecked Sendable {
    static let shardCount = 8
    /// One page: not worth looking at the budget.
    static let smallCountMax = LayerChecksums.perPage

    private let storage: any Storage
    private let store: StoreUUID
    private let residentCountMax: Int
    private let residentBytesMax: Int
    private let filesMax: Int
    private let shards: [Shard]
    private let state = Mutex(State())
    /// Opens and reads files for event loops.
    private let helper = Mutex<StoreThread?>(nil)
    /// A layer in pages is no longer in use: its file may go. Any thread; must not wait.
    let unused: @Sendable () -> Void

    private struct Entry {
        weak var checksums: LayerChecksums?
        /// Asked under the lock, where no reference must end.
        let identity: ObjectIdentifier
    }

    private struct State {
        var layers: [UInt64: Entry] = [:]
        var pagedLayers: [UInt64: Int] = [:]
        var residentBytes = 0
        var nextSerial: UInt64 = 1
        var files: [UInt64: (file: any StorageFile, used: UInt64)] = [:]
        var clock: UInt64 = 0
    }

    init(storage: any Storage, store: StoreUUID, options: StoreOptions, unused: @escaping @Sendable () -> Void) {
        self.storage = storage
        self.store = store
        self.unused = unused
        residentCountMax = options.residentChecksumCountMax
        residentBytesMax = options.checksumCacheBytes / 2
        filesMax = options.layerFilesOpenMax
        let slots = max(1, options.checksumCacheBytes / 2 / pageBytes / Self.shardCount)
        shards = (0..<Self.shardCount).map { _ in Shard(slotCount: slots) }
    }

    /// Of a layer whose header and fences `reader` has verified.
    func checksums(of reader: LayerReader) throws(StoreError) -> LayerChecksums {
        if let known = known(reader.record.id, digest: reader.record.digest) { return known }
        let made: LayerChecksums
        if reserve(reader.checksumCount) {
            let sums = UnsafeMutableBufferPointer<UInt64>.allocate(capacity: max(1, reader.checksumCount))
            defer { sums.deallocate() }
            do throws(StoreError) { try reader.readChecksums(0..<reader.checksumCount, into: sums.baseAddress!) } catch {
                release(reader.checksumCount * 8)
                throw error
            }
            made = LayerChecksums(
                layer: reader.record.id, sizeBytes: reader.header.sizeBytes, copying: UnsafeBufferPointer(start: sums.baseAddress!, count: reader.checksumCount),
                digest: reader.record.digest, cache: self)
        } else {
            made = paged(reader.record.id, reader.record.digest, reader.header.sizeBytes, reader.checksumCount, reader.header.checksumsOffset, reader.checksumPages)
        }
        register(made)
        return made
    }

    /// Of a layer file that was just written: nothing needs to be read.
    func written(layer: UInt64, digest: UInt64, sizeBytes: UInt64, sums: UnsafeBufferPointer<UInt64>, sectionOffset: UInt64, pageSums: [UInt64]) -> LayerChecksums {
        let made: LayerChecksums
        if reserve(sums.count) {
            made = LayerChecksums(layer: layer, sizeBytes: sizeBytes, copying: sums, digest: digest, cache: self)
        } else {
            made = paged(layer, digest, sizeBytes, sums.count, sectionOffset, pageSums)
        }
        register(made)
        return made
    }

    /// What is known of a layer, so that nothing of it is read twice.
    func known(_ layer: UInt64, digest: UInt64) -> LayerChecksums? {
        guard let known = state.withLock({ $0.layers[layer]?.checksums }), known.digest == digest else { return nil }
        return known
    }

    /// Layers whose files somebody will want to read.
    var layersInUse: Set<UInt64> { state.withLock { Set($0.pagedLayers.keys) } }

    /// Files closed, the helper gone. Nobody reads any more.
    func close() {
        helper.withLock { helper in
            defer { helper = nil }
            return helper
        }?.stop()
        let files = state.withLock { state in
            defer { state.files = [:] }
            return state.files
        }
        withExtendedLifetime(files) {}
    }

    private func paged(_ layer: UInt64, _ digest: UInt64, _ sizeBytes: UInt64, _ count: Int, _ offset: UInt64, _ sums: [UInt64]) -> LayerChecksums {
        let serial = state.withLock { state in
            state.pagedLayers[layer, default: 0] += 1
            state.nextSerial += 1
            return state.nextSerial
        }
        return LayerChecksums(layer: layer, sizeBytes: sizeBytes, count: count, digest: digest, pages: ChecksumPages(serial: serial, sectionOffset: offset, sums: sums), cache: self)
    }

    private func register(_ made: LayerChecksums) {
        state.withLock { $0.layers[made.layer] = Entry(checksums: made, identity: ObjectIdentifier(made)) }
    }

    private func reserve(_ count: Int) -> Bool {
        state.withLock { state in
            guard count <= Self.smallCountMax && count <= residentCountMax || count <= residentCountMax && state.residentBytes + count * 8 <= residentBytesMax else { return false }
            state.residentBytes += count * 8
            return true
        }
    }

    private func release(_ bytes: Int) { state.withLock { $0.residentBytes -= bytes } }

    fileprivate func ended(_ layer: UInt64, _ identity: ObjectIdentifier, isPaged: Bool, bytes: Int) {
        let closed = state.withLock { state -> (any StorageFile)? in
            state.residentBytes -= bytes
            // Another may have taken its place meanwhile.
            if state.layers[layer]?.identity == identity { state.layers[layer] = nil }
            guard isPaged else { return nil }
            state.pagedLayers[layer]! -= 1
            guard state.pagedLayers[layer] == 0 else { return nil }
            state.pagedLayers[layer] = nil
            return state.files.removeValue(forKey: layer)?.file
        }
        withExtendedLifetime(closed) {}
        if isPaged { unused() }
    }

    // MARK: Pages

    private func shard(_ pages: ChecksumPages, _ page: Int) -> Shard { shards[(page ^ Int(truncatingIfNeeded: pages.serial)) & (Self.shardCount - 1)] }
    private func key(_ pages: ChecksumPages, _ page: Int) -> UInt64 { pages.serial << 24 | UInt64(page) }

    fileprivate func copy(_ pages: ChecksumPages, _ page: Int, from: Int, _ count: Int, into sums: UnsafeMutablePointer<UInt64>) -> Bool {
        shard(pages, page).copy(key(pages, page), from: from, count, into: sums)
    }

    fileprivate func put(_ pages: ChecksumPages, _ page: Int, _ bytes: UnsafeRawPointer) { shard(pages, page).put(key(pages, page), bytes) }

    // MARK: Files

    fileprivate func openFile(_ layer: UInt64) -> (any StorageFile)? {
        state.withLock { state in
            state.clock += 1
            guard let file = state.files[layer]?.file else { return nil }
            state.files[layer]!.used = state.clock
            return file
        }
    }

    fileprivate func file(_ layer: UInt64) throws(StoreError) -> any StorageFile {
        if let file = openFile(layer) { return file }
        let file = try storage.open(LayerFile.path(layer), .read, direct: false)
        // Closed outside of the lock.
        let closed = state.withLock { state -> (any StorageFile)? in
            state.clock += 1
            var oldest: UInt64?
            if state.files[layer] == nil, state.files.count >= filesMax { oldest = state.files.min { $0.value.used < $1.value.used }?.key }
            if state.pagedLayers[layer] != nil { state.files[layer] = (file, state.clock) }
            return oldest.flatMap { state.files.removeValue(forKey: $0)?.file }
        }
        withExtendedLifetime(closed) {}
        return file
    }

    fileprivate func later(_ body: @escaping @Sendable () -> Void) {
        helper.withLock { helper in
            if helper == nil { helper = StoreThread() }
            helper!.enqueue(body)
        }
    }

    /// A fixed number of pages; the one that was not used for longest (as a clock hand sees it) makes way.
    private final class Shard: @unchecked Sendable {
        private struct State {
            var slots: [UInt64: Int] = [:]
            var keys: [UInt64] = []
            var isUsed: [Bool] = []
            var hand = 0
        }

        private let slotCount: Int
        private let state = Mutex(State())
        /// Touched under the lock; made when first needed.
        private var memory: UnsafeMutableRawPointer?

        init(slotCount: Int) { self.slotCount = slotCount }
        deinit { memory?.deallocate() }

        func copy(_ key: UInt64, from: Int, _ count: Int, into sums: UnsafeMutablePointer<UInt64>) -> Bool {
            state.withLock { state in
                guard let slot = state.slots[key] else { return false }
                state.isUsed[slot] = true
                memcpyBytes(UnsafeMutableRawPointer(sums), memory! + slot * pageBytes + from * 8, count * 8)
                return true
            }
        }

        func put(_ key: UInt64, _ bytes: UnsafeRawPointer) {
            state.withLock { state in
                if state.slots[key] != nil { return }
                if memory == nil { memory = .allocate(byteCount: slotCount * pageBytes, alignment: pageBytes) }
                var slot = state.keys.count
                if slot < slotCount {
                    state.keys.append(key)
                    state.isUsed.append(false)
                } else {
                    while state.isUsed[state.hand] {
                        state.isUsed[state.hand] = false
                        state.hand = (state.hand + 1) % slotCount
                    }
                    slot = state.hand
                    state.hand = (state.hand + 1) % slotCount
                    state.slots[state.keys[slot]] = nil
                    state.keys[slot] = key
                }
                state.slots[key] = slot
                memcpyBytes(memory! + slot * pageBytes, bytes, pageBytes)
            }
        }
    }
}

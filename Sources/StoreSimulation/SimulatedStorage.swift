import Glibc

@testable import Replica

/// SplitMix64: a run is reproduced by its seed.
public struct SimulationRandom: RandomNumberGenerator {
    private var state: UInt64
    public init(seed: UInt64) { state = seed }
    public mutating func next() -> UInt64 {
        state &+= 0x9E37_79B9_7F4A_7C15
        var z = state
        z = (z ^ (z >> 30)) &* 0xBF58_476D_1CE4_E5B9
        z = (z ^ (z >> 27)) &* 0x94D0_49BB_1331_11EB
        return z ^ (z >> 31)
    }
    mutating func below(_ bound: Int) -> Int { Int(next() % UInt64(bound)) }
    /// True once in `n` times.
    mutating func oneIn(_ n: Int) -> Bool { below(n) == 0 }
}

/// A file system in memory whose every change is volatile until the file or the directory is synced. One thread.
///
/// - A *kill* keeps what the system's cache holds. A *power loss* keeps what was synced, and of the rest an arbitrary subset:
///   writes sector by sector, punched holes page by page, truncations, and names (per name in their order; a rename whole or not at all).
/// - A sync that fails may have written some of it; pages of a buffered file that it did not write are clean afterwards, so that the
///   next sync succeeds without them, although the cache still shows them (as on Linux).
/// - Pages occupy space from when they are written or reserved until they are punched, cut off or their file is removed; there may be
///   a limit to it.
/// - Lies: a write that never happens, or happens elsewhere; bits that flip at rest. Nothing tells.
final class SimulatedStorage: Storage, @unchecked Sendable {
    static let sectorBytes = 512
    static let pageBytes = 4096

    struct Faults {
        /// One in so many operations fails; 0 = none.
        var ioErrorOneIn = 0
        var fullOneIn = 0
        var isFull = false
    }

    enum Lie { case lost, misdirected }

    let location = "simulated"
    var faults = Faults()
    /// Nil: there is no limit.
    var capacityPages: Int?
    private(set) var usedPages = 0
    /// Whether the file system can give back the space of a part of a file.
    var canPunch = true
    var onStep: ((String, String) -> Void)?
    /// Called before an operation that nobody counts on to be the next one: others may do something now.
    var onPause: (() -> Void)?
    /// While set no fault happens and nothing counts: for looking.
    var isCalm = false
    /// The power fails at the n-th operation from now.
    var operationsUntilDown: Int?
    private(set) var isDown = false
    /// The n-th write of data or records from now is a lie.
    var lie: (writesLeft: Int, kind: Lie)?
    private(set) var liesTold = 0
    private(set) var faultCount = 0
    /// Times that the capacity was reached.
    private(set) var refusedForSpace = 0
    /// Times that a file in `indexes` was made, and opened to be read.
    private(set) var indexesMade = 0
    private(set) var indexesOpened = 0
    /// Everything that happened, folded: two runs of one seed agree on it.
    private(set) var trace: UInt64 = 0
    private(set) var operationCount = 0

    fileprivate var boot = 0
    fileprivate var random: SimulationRandom
    private var isLocked = false
    private let root = SimulatedDirectory()

    init(seed: UInt64) { random = SimulationRandom(seed: seed) }

    // MARK: Faults

    /// Counts an operation. Throws when the power is off or goes off, or a fault is due; `changes` says whether ENOSPC can be.
    fileprivate func step(_ what: String, _ path: String, takesSpace: Bool = false, newPages: Int = 0, reads: Bool = false, boot of: Int? = nil) throws(StoreError) {
        if !isCalm { onStep?(what, path) }
        if !isCalm { onPause?() }
        if isDown || (of != nil && of != boot) { throw .io(errno: EIO, what: "cannot \(what) \(path): the power is off") }
        if isCalm { return }
        operationCount += 1
        for byte in what.utf8 { trace = (trace ^ UInt64(byte)) &* 0x100_0000_01B3 }
        for byte in path.utf8 { trace = (trace ^ UInt64(byte)) &* 0x100_0000_01B3 }
        if !reads, let left = operationsUntilDown {
            operationsUntilDown = left - 1
            if left <= 1 {
                isDown = true
                throw .io(errno: EIO, what: "cannot \(what) \(path): the power went off")
            }
        }
        if faults.ioErrorOneIn > 0, random.oneIn(faults.ioErrorOneIn) {
            faultCount += 1
            throw .io(errno: EIO, what: "cannot \(what) \(path)")
        }
        if takesSpace, faults.isFull || (faults.fullOneIn > 0 && random.oneIn(faults.fullOneIn)) {
            faultCount += 1
            throw .full(what: "no space for \(path)")
        }
        if newPages > 0, let capacityPages, usedPages + newPages > capacityPages {
            refusedForSpace += 1
            throw .full(what: "no space left for \(path)")
        }
    }

    func use(_ pages: Int) { usedPages += pages }

    fileprivate func fold(_ value: Int) { if !isCalm { trace = (trace ^ UInt64(truncatingIfNeeded: value)) &* 0x100_0000_01B3 } }

    /// Whether the next write of `path` is one that does not do what it says.
    fileprivate func lieNow(_ path: String) -> Lie? {
        guard !isCalm, let due = lie else { return nil }
        lie!.writesLeft -= 1
        if due.writesLeft > 1 { return nil }
        lie = nil
        // What is in `indexes` nobody may rely on.
        if due.kind != .lost || !Self.isCopy(path) { liesTold += 1 }
        onStep?("\(due.kind) write of", path)
        return due.kind
    }

    private static func isCopy(_ path: String) -> Bool { path.hasPrefix("indexes/") }

    /// What lied is right again: nothing is excused by it any more.
    func forgive() { liesTold = 0 }

    /// The page that a misdirected write hits instead: of another data file, or elsewhere in the same.
    fileprivate func misdirect(_ bytes: UnsafeRawBufferPointer) {
        let files = allFiles().filter { ($0.path.hasPrefix("segments/") || $0.path.hasPrefix("layers/")) && $0.inode.live.bytes.count >= Self.pageBytes }
        guard !files.isEmpty else { return }
        let inode = files[random.below(files.count)].inode
        let page = random.below(inode.live.bytes.count / Self.pageBytes)
        let count = min(bytes.count, inode.live.bytes.count - page * Self.pageBytes)
        inode.write(UnsafeRawBufferPointer(rebasing: bytes[..<count]), at: page * Self.pageBytes)
    }

    /// A bit of a page at rest flips, in a file of these. Returns its place; nil when there is none.
    func rot(_ isWanted: (String) -> Bool) -> (path: String, page: Int)? {
        let files = allFiles().filter { isWanted($0.path) && $0.path != ReplicaStore.reservePath && $0.inode.pageCount > 0 }
        guard !files.isEmpty else { return nil }
        let (path, inode) = files[random.below(files.count)]
        guard let bit = inode.flip(&random) else { return nil }
        if !Self.isCopy(path) { liesTold += 1 }
        onStep?("bit \(bit) flips in", path)
        return (path, bit / 8 / Self.pageBytes)
    }

    /// Whether the store has put some space aside.
    var hasReserve: Bool { files.contains { $0.path == ReplicaStore.reservePath && $0.pages > 0 } }

    /// Paths and the pages that each occupies.
    var files: [(path: String, pages: Int)] { allFiles().map { ($0.path, $0.inode.pageCount) } }

    private func allFiles() -> [(path: String, inode: SimulatedInode)] {
        var found: [(String, SimulatedInode)] = []
        func walk(_ directory: SimulatedDirectory, _ prefix: String) {
            for name in directory.live.keys.sorted() {
                switch directory.live[name]! {
                case .file(let inode): found.append((prefix + name, inode))
                case .directory(let inner): walk(inner, prefix + name + "/")
                }
            }
        }
        walk(root, "")
        return found
    }

    // MARK: Crashes

    /// From here on everything fails.
    func goDown() { isDown = true }

    /// The process is gone, or the machine was off: handles from before are dead.
    func restart(powerLost: Bool) {
        boot += 1
        isDown = false
        isLocked = false
        operationsUntilDown = nil
        if powerLost {
            // Out of 8: sometimes nothing unsynced survives, sometimes all of it.
            let chance = [0, 0, 1, 4, 4, 7, 8, 8][random.below(8)]
            root.losePower(chance, &random)
            usedPages = 0
            for (_, inode) in allFiles() { inode.link(to: self) }
        }
    }

    // MARK: Storage

    func lock() throws(StoreError) {
        try step("lock", "LOCK", reads: true)
        precondition(!isLocked, "the simulation opened a store twice")
        isLocked = true
    }

    func unlock() { isLocked = false }

    func createDirectory(_ path: String) throws(StoreError) {
        if case .directory = root.live[path] { return }
        try step("create directory", path, takesSpace: true)
        root.set([(path, .directory(SimulatedDirectory()))])
    }

    func open(_ path: String, _ mode: StorageOpenMode, direct: Bool) throws(StoreError) -> any StorageFile {
        let (directory, name) = try find(path)
        if mode == .create {
            try step("create", path, takesSpace: true)
            if Self.isCopy(path) { indexesMade += 1 }
            if case .file(let inode) = directory.live[name] {
                inode.resize(0)
                return SimulatedFile(path: path, inode: inode, storage: self, isDirect: direct)
            }
            let inode = SimulatedInode()
            inode.link(to: self)
            directory.set([(name, .file(inode))])
            return SimulatedFile(path: path, inode: inode, storage: self, isDirect: direct)
        }
        try step("open", path, reads: true)
        if Self.isCopy(path) { indexesOpened += 1 }
        guard case .file(let inode) = directory.live[name] else { throw .io(errno: ENOENT, what: "cannot open \(path)") }
        return SimulatedFile(path: path, inode: inode, storage: self, isDirect: direct)
    }

    func exists(_ path: String) throws(StoreError) -> Bool {
        try step("look at", path, reads: true)
        let (directory, name) = try find(path)
        return directory.live[name] != nil
    }

    func remove(_ path: String) throws(StoreError) {
        let (directory, name) = try find(path)
        if directory.live[name] == nil { return }
        try step("remove", path)
        if case .file(let inode) = directory.live[name] { inode.unlink() }
        directory.set([(name, nil)])
    }

    func rename(_ from: String, to: String) throws(StoreError) {
        try step("rename", from)
        let (directory, name) = try find(from)
        let (other, newName) = try find(to)
        precondition(directory === other, "the store renames within a directory only")
        guard let entry = directory.live[name] else { throw .io(errno: ENOENT, what: "cannot rename \(from)") }
        if case .file(let old) = directory.live[newName] { old.unlink() }
        directory.set([(name, nil), (newName, entry)])
    }

    func list(_ directory: String) throws(StoreError) -> [String] {
        try step("list", directory, reads: true)
        guard case .directory(let found) = root.live[directory] else { throw .io(errno: ENOENT, what: "cannot list \(directory)") }
        return found.live.keys.sorted()
    }

    func syncDirectory(_ path: String) throws(StoreError) {
        try step("sync", path)
        if path.isEmpty { return root.sync() }
        guard case .directory(let found) = root.live[path] else { throw .io(errno: ENOENT, what: "cannot sync \(path)") }
        found.sync()
    }

    func space() -> (freeBytes: UInt64, capacityBytes: UInt64) {
        guard let capacityPages else { return (faults.isFull ? 0 : 1 << 30, 1 << 31) }
        return (faults.isFull ? 0 : UInt64(max(0, capacityPages - usedPages) * Self.pageBytes), UInt64(capacityPages * Self.pageBytes))
    }

    private func find(_ path: String) throws(StoreError) -> (SimulatedDirectory, String) {
        guard let slash = path.firstIndex(of: "/") else { return (root, path) }
        guard case .directory(let directory) = root.live[String(path[..<slash])] else { throw .io(errno: ENOENT, what: "cannot find \(path)") }
        return (directory, String(path[path.index(after: slash)...]))
    }
}

private final class SimulatedFile: StorageFile, @unchecked Sendable {
    let path: String
    var descriptor: Int32 { -1 }
    private let inode: SimulatedInode
    private let storage: SimulatedStorage
    private let isDirect: Bool
    private let boot: Int

    init(path: String, inode: SimulatedInode, storage: SimulatedStorage, isDirect: Bool) {
        self.path = path
        self.inode = inode
        self.storage = storage
        self.isDirect = isDirect
        boot = storage.boot
    }

    func size() throws(StoreError) -> UInt64 {
        try storage.step("look at", path, reads: true, boot: boot)
        return UInt64(inode.live.bytes.count)
    }

    func read(into buffer: UnsafeMutableRawBufferPointer, at offsetBytes: UInt64) throws(StoreError) -> Int {
        try storage.step("read", path, reads: true, boot: boot)
        let offset = Int(offsetBytes)
        if offset >= inode.live.bytes.count { return 0 }
        let count = min(buffer.count, inode.live.bytes.count - offset)
        inode.live.bytes.withUnsafeBytes { memcpyBytes(buffer.baseAddress!, $0.baseAddress! + offset, count) }
        return count
    }

    func write(_ buffer: UnsafeRawBufferPointer, at offsetBytes: UInt64) throws(StoreError) {
        let wasDown = storage.isDown
        let missing = inode.missing(Int(offsetBytes), buffer.count)
        do { try storage.step("write", path, takesSpace: Int(offsetBytes) + buffer.count > inode.live.bytes.count, newPages: missing, boot: boot) } catch {
            // What fails may have begun.
            if storage.boot == boot, !wasDown, storage.random.oneIn(2) {
                let sectors = storage.random.below(buffer.count / SimulatedStorage.sectorBytes + 1)
                inode.write(UnsafeRawBufferPointer(rebasing: buffer[..<(sectors * SimulatedStorage.sectorBytes)]), at: Int(offsetBytes))
            }
            throw error
        }
        storage.fold(Int(offsetBytes))
        storage.fold(buffer.count)
        switch storage.lieNow(path) {
        case .lost: return
        case .misdirected: return storage.misdirect(buffer)
        case nil: inode.write(buffer, at: Int(offsetBytes))
        }
    }

    func dataSync() throws(StoreError) {
        do { try storage.step("sync", path, boot: boot) } catch {
            if storage.boot == boot, !storage.isDown { inode.failSync(isDirect: isDirect, &storage.random) }
            throw error
        }
        inode.sync()
    }

    func truncate(to sizeBytes: UInt64) throws(StoreError) {
        try storage.step("truncate", path, boot: boot)
        inode.resize(Int(sizeBytes))
    }

    func preallocate(offsetBytes: UInt64, lengthBytes: UInt64) -> Bool {
        let missing = inode.missing(Int(offsetBytes), Int(lengthBytes))
        guard (try? storage.step("reserve", path, takesSpace: true, newPages: missing, boot: boot)) != nil else { return false }
        let end = Int(offsetBytes + lengthBytes)
        if end > inode.live.bytes.count { inode.resize(end) }
        inode.occupy(pagesTouched(Int(offsetBytes), Int(lengthBytes)))
        return true
    }

    func punch(offsetBytes: UInt64, lengthBytes: UInt64) throws(StoreError) -> Bool {
        try storage.step("punch", path, boot: boot)
        if !storage.canPunch { return false }
        // Whole pages only: a file system zeroes the rest, and nobody here may rely on that.
        let page = SimulatedStorage.pageBytes
        precondition(Int(offsetBytes) % page == 0 && Int(lengthBytes) % page == 0, "a hole is not made of whole pages")
        let first = Int(offsetBytes) / page
        storage.fold(first)
        inode.punch(first..<first + Int(lengthBytes) / page)
        return true
    }

    func allocatedBytes() throws(StoreError) -> UInt64 {
        try storage.step("look at", path, reads: true, boot: boot)
        return UInt64(inode.pageCount * SimulatedStorage.pageBytes)
    }
}

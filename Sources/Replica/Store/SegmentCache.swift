import Glibc
import Synchronization

/// Segments open for reading, shared by all readers.
final class SegmentCache: Sendable {
    private let storage: any Storage
    private let store: StoreUUID
    private let files = Mutex<[UInt32: SegmentFile]>([:])

    init(storage: any Storage, store: StoreUUID) {
        self.storage = storage
        self.store = store
        Self.allowManyFiles
    }

    /// A reader has every segment of its volume open, one per GiB: more than the 1024 files that a process may have open by default.
    private static let allowManyFiles: Void = {
        var limit = rlimit()
        guard getrlimit(__rlimit_resource_t(RLIMIT_NOFILE.rawValue), &limit) == 0, limit.rlim_cur < limit.rlim_max else { return }
        limit.rlim_cur = limit.rlim_max
        _ = setrlimit(__rlimit_resource_t(RLIMIT_NOFILE.rawValue), &limit)
    }()

    /// Opens and verifies each at its first use.
    func open(_ ids: Set<UInt32>) throws(StoreError) -> SegmentTable {
        var opened: [SegmentFile] = []
        for id in ids.sorted() {
            if let file = files.withLock({ $0[id] }) {
                opened.append(file)
                continue
            }
            let file = try SegmentFile.open(storage, store: store, id: id, writable: false)
            files.withLock { $0[id] = file }
            opened.append(file)
        }
        return SegmentTable(opened)
    }

    func keep(_ ids: Set<UInt64>) {
        files.withLock { $0 = $0.filter { ids.contains(UInt64($0.key)) } }
    }

    func removeAll() { files.withLock { $0 = [:] } }
}

/// The segments of one reader: descriptor by segment number without hashing, and what keeps the descriptors open.
struct SegmentTable: Sendable {
    private var descriptors: ContiguousArray<Int32> = []
    private var first: UInt32 = 0
    private var files: [UInt32: SegmentFile] = [:]

    /// A file that both have stays the one it was: reads may be on their way to its descriptor.
    mutating func add(_ other: SegmentTable) { self = SegmentTable(Array(files.merging(other.files) { mine, _ in mine }.values)) }

    init(_ opened: [SegmentFile]) {
        guard let low = opened.map(\.id).min(), let high = opened.map(\.id).max() else { return }
        first = low
        descriptors = ContiguousArray(repeating: -1, count: Int(high - low) + 1)
        for file in opened {
            descriptors[Int(file.id - low)] = file.file.descriptor
            files[file.id] = file
        }
    }

    /// For the ring.
    @inline(__always)
    func descriptor(_ segment: UInt32) -> Int32 {
        let index = Int(segment) - Int(first)
        return descriptors.indices.contains(index) ? descriptors[index] : -1
    }

    func file(_ segment: UInt32) -> SegmentFile? { files[segment] }
}

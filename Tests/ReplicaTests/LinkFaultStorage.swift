import Synchronization

@testable import Replica

/// The real files, with a full file system or a slow disk in front of them when a test asks for it.
final class FaultStorage: Storage {
    struct Faults {
        var isFull = false
        /// Writes of data wait here while this is set.
        var gate: Gate?
    }

    /// Closed until `open` is called; then open for good.
    final class Gate: Sendable {
        private let semaphore = Replica.Semaphore()
        func wait() {
            semaphore.wait()
            semaphore.signal()
        }
        func open() { semaphore.signal() }
    }

    let faults = Mutex(Faults())
    private let real: FileStorage
    init(directory: String) throws { real = try FileStorage(directory: directory) }

    private func check(_ what: String) throws(StoreError) {
        if faults.withLock({ $0.isFull }) { throw .full(what: "no space left for \(what)") }
    }

    var location: String { real.location }
    func lock() throws(StoreError) { try real.lock() }
    func unlock() { real.unlock() }
    func createDirectory(_ path: String) throws(StoreError) { try real.createDirectory(path) }
    func open(_ path: String, _ mode: StorageOpenMode, direct: Bool) throws(StoreError) -> any StorageFile {
        if mode == .create { try check(path) }
        return File(try real.open(path, mode, direct: direct), storage: self)
    }
    func exists(_ path: String) throws(StoreError) -> Bool { try real.exists(path) }
    func remove(_ path: String) throws(StoreError) { try real.remove(path) }
    func rename(_ from: String, to: String) throws(StoreError) { try real.rename(from, to: to) }
    func list(_ directory: String) throws(StoreError) -> [String] { try real.list(directory) }
    func syncDirectory(_ path: String) throws(StoreError) { try real.syncDirectory(path) }
    func space() -> (freeBytes: UInt64, capacityBytes: UInt64) { real.space() }

    private final class File: StorageFile {
        private let real: any StorageFile
        private let storage: FaultStorage
        init(_ real: any StorageFile, storage: FaultStorage) {
            self.real = real
            self.storage = storage
        }
        var path: String { real.path }
        var descriptor: Int32 { real.descriptor }
        func size() throws(StoreError) -> UInt64 { try real.size() }
        func read(into buffer: UnsafeMutableRawBufferPointer, at offsetBytes: UInt64) throws(StoreError) -> Int {
            try real.read(into: buffer, at: offsetBytes)
        }
        func write(_ buffer: UnsafeRawBufferPointer, at offsetBytes: UInt64) throws(StoreError) {
            try storage.check(path)
            if path.hasSuffix(".seg") { storage.faults.withLock { $0.gate }?.wait() }
            try real.write(buffer, at: offsetBytes)
        }
        func dataSync() throws(StoreError) { try real.dataSync() }
        func truncate(to sizeBytes: UInt64) throws(StoreError) { try real.truncate(to: sizeBytes) }
        func punch(offsetBytes: UInt64, lengthBytes: UInt64) throws(StoreError) -> Bool { try real.punch(offsetBytes: offsetBytes, lengthBytes: lengthBytes) }
        func allocatedBytes() throws(StoreError) -> UInt64 { try real.allocatedBytes() }
        func preallocate(offsetBytes: UInt64, lengthBytes: UInt64) -> Bool {
            !storage.faults.withLock { $0.isFull } && real.preallocate(offsetBytes: offsetBytes, lengthBytes: lengthBytes)
        }
    }
}

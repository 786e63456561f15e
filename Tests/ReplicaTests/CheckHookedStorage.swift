import Synchronization

@testable import Replica

/// Storage that tells of what is about to be done, and fails it when it is told to.
final class HookedStorage: Storage, @unchecked Sendable {
    enum Step: Equatable {
        case create(String)
        case read(String, offset: UInt64)
        case write(String, offset: UInt64)
        case sync(String)
        case syncDirectory(String)
        case rename
        case truncate(String)
        case punch(String)

        /// Changes what is on the disk, or makes a change durable.
        var isChange: Bool { if case .read = self { false } else { true } }
    }

    private let real: any Storage
    private let hook = Mutex<(@Sendable (Step) throws(StoreError) -> Void)?>(nil)

    init(_ real: any Storage) { self.real = real }

    func onStep(_ body: (@Sendable (Step) throws(StoreError) -> Void)?) { hook.withLock { $0 = body } }
    fileprivate func step(_ step: Step) throws(StoreError) { try hook.withLock { $0 }?(step) }

    private final class File: StorageFile, @unchecked Sendable {
        let real: any StorageFile
        let storage: HookedStorage
        let name: String
        init(_ real: any StorageFile, _ storage: HookedStorage, _ name: String) { (self.real, self.storage, self.name) = (real, storage, name) }
        var path: String { real.path }
        var descriptor: Int32 { real.descriptor }
        func size() throws(StoreError) -> UInt64 { try real.size() }
        func read(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(StoreError) -> Int {
            try storage.step(.read(name, offset: offset))
            return try real.read(into: buffer, at: offset)
        }
        func write(_ buffer: UnsafeRawBufferPointer, at offset: UInt64) throws(StoreError) {
            try storage.step(.write(name, offset: offset))
            try real.write(buffer, at: offset)
        }
        func dataSync() throws(StoreError) {
            try storage.step(.sync(name))
            try real.dataSync()
        }
        func truncate(to size: UInt64) throws(StoreError) {
            try storage.step(.truncate(name))
            try real.truncate(to: size)
        }
        func punch(offsetBytes: UInt64, lengthBytes: UInt64) throws(StoreError) -> Bool {
            try storage.step(.punch(name))
            return try real.punch(offsetBytes: offsetBytes, lengthBytes: lengthBytes)
        }
        func allocatedBytes() throws(StoreError) -> UInt64 { try real.allocatedBytes() }
        func preallocate(offsetBytes: UInt64, lengthBytes: UInt64) -> Bool { real.preallocate(offsetBytes: offsetBytes, lengthBytes: lengthBytes) }
    }

    var location: String { real.location }
    func lock() throws(StoreError) { try real.lock() }
    func unlock() { real.unlock() }
    func createDirectory(_ path: String) throws(StoreError) { try real.createDirectory(path) }
    func open(_ path: String, _ mode: StorageOpenMode, direct: Bool) throws(StoreError) -> any StorageFile {
        if mode == .create { try step(.create(path)) }
        return File(try real.open(path, mode, direct: direct), self, path)
    }
    func exists(_ path: String) throws(StoreError) -> Bool { try real.exists(path) }
    func remove(_ path: String) throws(StoreError) { try real.remove(path) }
    func rename(_ from: String, to: String) throws(StoreError) {
        try step(.rename)
        try real.rename(from, to: to)
    }
    func list(_ directory: String) throws(StoreError) -> [String] { try real.list(directory) }
    func syncDirectory(_ path: String) throws(StoreError) {
        try step(.syncDirectory(path))
        try real.syncDirectory(path)
    }
    func space() -> (freeBytes: UInt64, capacityBytes: UInt64) { real.space() }
}

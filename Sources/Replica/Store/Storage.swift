/// Where a store's files live. The real form is `FileStorage`; the store calls nothing else, so that a simulated one can stand in.
/// Paths are relative to the store ("layers/00000001.layer"). All calls are synchronous and thread-safe, and throw `StoreError`
/// (`.full` for a lack of space, `.io` for the rest).
public protocol Storage: AnyObject, Sendable {
    /// For messages: where the store is.
    var location: String { get }
    /// Takes the whole store for this process until `unlock`; throws `.busy` when another has it.
    func lock() throws(StoreError)
    func unlock()
    func createDirectory(_ path: String) throws(StoreError)
    /// `create` makes the file or empties an existing one. `direct` bypasses the page cache where the file system can.
    func open(_ path: String, _ mode: StorageOpenMode, direct: Bool) throws(StoreError) -> any StorageFile
    func exists(_ path: String) throws(StoreError) -> Bool
    /// No error when it is not there.
    func remove(_ path: String) throws(StoreError)
    func rename(_ from: String, to: String) throws(StoreError)
    func list(_ directory: String) throws(StoreError) -> [String]
    /// Makes created, renamed and removed names of the directory durable.
    func syncDirectory(_ path: String) throws(StoreError)
    /// For the writes of one store, which closes it.
    func makeWriteQueue() -> any StorageWriteQueue
    /// Bytes of the file system: (free for us, in all).
    func space() -> (freeBytes: UInt64, capacityBytes: UInt64)
}

extension Storage {
    /// One write at a time, on the thread that asks for it: simulated files stay deterministic, and failing ones fail where they are told to.
    public func makeWriteQueue() -> any StorageWriteQueue { OneByOneWrites() }
}

public enum StorageOpenMode: Sendable {
    case read, readWrite, create
}

/// One open file. Closed when released.
public protocol StorageFile: AnyObject, Sendable {
    var path: String { get }
    /// For the ring; -1 when there is none (a simulated file).
    var descriptor: Int32 { get }
    func size() throws(StoreError) -> UInt64
    /// Reads all of `buffer`; returns fewer bytes only at the end of the file.
    func read(into buffer: UnsafeMutableRawBufferPointer, at offsetBytes: UInt64) throws(StoreError) -> Int
    /// Writes all of `buffer`.
    func write(_ buffer: UnsafeRawBufferPointer, at offsetBytes: UInt64) throws(StoreError)
    func dataSync() throws(StoreError)
    func truncate(to sizeBytes: UInt64) throws(StoreError)
    /// Reserves space and extends the file to cover it; best effort, false when the file system cannot or is full.
    func preallocate(offsetBytes: UInt64, lengthBytes: UInt64) -> Bool
    /// Gives the space of whole blocks back; they read as zeroes then. False when the file system cannot.
    func punch(offsetBytes: UInt64, lengthBytes: UInt64) throws(StoreError) -> Bool
    /// Bytes of disk space that the file occupies.
    func allocatedBytes() throws(StoreError) -> UInt64
}

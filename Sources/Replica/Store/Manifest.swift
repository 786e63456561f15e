import Foundation

/// The MANIFEST: the store's one truth. Records are JSON in the frames of a `FramedLog` (type 1).
final class Manifest {
    static let path = "MANIFEST"
    static let newPath = "MANIFEST.new"
    static let recordType: UInt32 = 1

    private let storage: any Storage
    private let log: FramedLog
    /// Set once the file may differ from what was said: nothing is appended any more.
    private(set) var failure: StoreError?

    private init(storage: any Storage, log: FramedLog) {
        self.storage = storage
        self.log = log
    }

    /// Opens the store's MANIFEST, or makes the one of a new store. When it holds more than `rewriteBytes` it is replaced by one
    /// that says the same in a single record.
    static func open(_ storage: any Storage, rewriteBytes: UInt64, newUUID: () -> StoreUUID) throws(StoreError) -> (Manifest, StoreState, tornBytes: UInt64) {
        try storage.remove(newPath)
        guard try storage.exists(path) else {
            // Making a new one here would let start-up remove all data as garbage.
            for directory in ["segments", "layers", "journals"] where try !storage.list(directory).isEmpty {
                throw .damaged(path: storage.location + "/" + path, offsetBytes: 0, what: "it is missing, but \(directory) has files: restore it, or empty the directory for a new store")
            }
            let state = StoreState(uuid: newUUID())
            return (try create(storage, state: state), state, 0)
        }
        let file = try storage.open(path, .readWrite, direct: false)
        let head = UnsafeMutableRawBufferPointer.allocate(byteCount: FileHeader.byteCount, alignment: 8)
        defer { head.deallocate() }
        let count = try file.read(into: head, at: 0)
        let header = try FileHeader.verify(UnsafeRawBufferPointer(rebasing: head[..<count]), path: file.path, kind: .manifest, id: 0, store: nil)
        let (log, frames) = try FramedLog.open(file, expecting: .manifest, id: 0, store: header.store)
        var state = StoreState(uuid: header.store)
        let decoder = JSONDecoder()
        for (index, frame) in frames.enumerated() {
            guard frame.type == recordType else {
                throw .damaged(path: file.path, offsetBytes: frame.offsetBytes, what: "a record of unknown type \(frame.type)")
            }
            let record: ManifestRecord
            do { record = try decoder.decode(ManifestRecord.self, from: Data(frame.payload)) } catch {
                throw .damaged(path: file.path, offsetBytes: frame.offsetBytes, what: "a record cannot be understood: \(error)")
            }
            var conflict = state.conflict(record)
            if index == 0, case .snapshot = record {} else if index == 0 { conflict = "the first record is no snapshot" }
            if let conflict { throw .damaged(path: file.path, offsetBytes: frame.offsetBytes, what: "a record contradicts those before it: \(conflict)") }
            state.apply(record)
        }
        guard !frames.isEmpty else { throw .damaged(path: file.path, offsetBytes: UInt64(FramedLog.headerBytes), what: "there is no record") }
        // What a kill left unsynced becomes as durable as it now counts.
        try file.dataSync()
        try? log.markSynced()
        if log.endBytes > rewriteBytes, frames.count > 1 {
            do throws(StoreError) { return (try create(storage, state: state), state, log.tornBytes) } catch {
                // A full disk is no reason not to open: the long one still stands.
                guard case .full = error else { throw error }
                try storage.remove(newPath)
            }
        }
        return (Manifest(storage: storage, log: log), state, log.tornBytes)
    }

    /// Publishes a MANIFEST that holds `state`: written aside, synced, renamed over.
    private static func create(_ storage: any Storage, state: StoreState) throws(StoreError) -> Manifest {
        let file = try storage.open(newPath, .create, direct: false)
        let log = try FramedLog.create(file, header: FileHeader(kind: .manifest, id: 0, store: state.uuid))
        try log.append(type: recordType, payload: encode(.snapshot(state)))
        try storage.rename(newPath, to: path)
        try storage.syncDirectory("")
        return Manifest(storage: storage, log: log)
    }

    private static func encode(_ record: ManifestRecord) -> [UInt8] {
        do { return [UInt8](try JSONEncoder().encode(record)) } catch { preconditionFailure("a MANIFEST record cannot be encoded: \(error)") }
    }

    /// Durable on return. On `.full` the MANIFEST is as before; on any other error it takes no more records.
    func append(_ record: ManifestRecord) throws(StoreError) {
        if let failure { throw failure }
        do throws(StoreError) { try log.append(type: Self.recordType, payload: Self.encode(record)) } catch {
            if case .full = error { throw error }
            failure = error
            throw error
        }
    }
}

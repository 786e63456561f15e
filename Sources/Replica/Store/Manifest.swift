import Foundation

/// The MANIFEST: the store's one truth. Records are JSON in the frames of a `FramedLog` (type 1).
final class Manifest {
    static let path = "MANIFEST"
    static let newPath = "MANIFEST.new"
    static let recordType: UInt32 = 1

    private let storage: any Storage
    private var log: FramedLog
    /// Length of the record that it begins with.
    private var snapshotBytes: UInt64
    /// Records since the state was copied for a new MANIFEST; nil = none is being written.
    private var tail: [[UInt8]]?
    /// Set once the file may differ from what was said: nothing is appended any more.
    private(set) var failure: StoreError?

    private init(storage: any Storage, log: FramedLog, snapshotBytes: UInt64) {
        self.storage = storage
        self.log = log
        self.snapshotBytes = snapshotBytes
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
        return (Manifest(storage: storage, log: log, snapshotBytes: UInt64(frames[0].payload.count)), state, log.tornBytes)
    }

    /// Publishes a MANIFEST that holds `state`: written aside, synced, renamed over.
    private static func create(_ storage: any Storage, state: StoreState) throws(StoreError) -> Manifest {
        let (log, snapshotBytes) = try write(storage, state: state)
        try storage.rename(newPath, to: path)
        try storage.syncDirectory("")
        return Manifest(storage: storage, log: log, snapshotBytes: snapshotBytes)
    }

    private static func write(_ storage: any Storage, state: StoreState) throws(StoreError) -> (FramedLog, snapshotBytes: UInt64) {
        let file = try storage.open(newPath, .create, direct: false)
        let log = try FramedLog.create(file, header: FileHeader(kind: .manifest, id: 0, store: state.uuid))
        let snapshot = encode(.snapshot(state))
        try log.append(type: recordType, payload: snapshot)
        return (log, UInt64(snapshot.count))
    }

    // MARK: Rewriting while records go on

    func isLong(_ rewriteBytes: UInt64) -> Bool { failure == nil && log.endBytes > max(rewriteBytes, 4 * snapshotBytes) }

    /// From here on records are also kept for the new one.
    func beginRewrite() { tail = [] }
    func giveUpRewrite() {
        tail = nil
        if failure == nil { try? storage.remove(Self.newPath) }
    }

    /// What takes time, on any thread: the new file with `state` as it was when the rewrite began. Not named `MANIFEST` yet.
    static func prepareRewrite(_ storage: any Storage, state: StoreState) throws(StoreError) -> (FramedLog, snapshotBytes: UInt64) {
        try write(storage, state: state)
    }

    /// Adds what was recorded meanwhile and takes the old one's place. Until it is named the old one stands.
    func finishRewrite(_ rewritten: (log: FramedLog, snapshotBytes: UInt64)) throws(StoreError) {
        if let failure { throw failure }
        for record in tail ?? [] { try rewritten.log.append(type: Self.recordType, payload: record) }
        do throws(StoreError) {
            try storage.rename(Self.newPath, to: Self.path)
            // Both say the same up to here; what is recorded next must not go into one that a crash takes back.
            try storage.syncDirectory("")
        } catch {
            failure = error
            throw error
        }
        tail = nil
        (log, snapshotBytes) = rewritten
    }

    private static func encode(_ record: ManifestRecord) -> [UInt8] {
        do { return [UInt8](try JSONEncoder().encode(record)) } catch { preconditionFailure("a MANIFEST record cannot be encoded: \(error)") }
    }

    /// Durable on return. On `.full` the MANIFEST is as before; on any other error it takes no more records.
    func append(_ record: ManifestRecord) throws(StoreError) {
        if let failure { throw failure }
        let payload = Self.encode(record)
        do throws(StoreError) { try log.append(type: Self.recordType, payload: payload) } catch {
            if case .full = error { throw error }
            failure = error
            throw error
        }
        tail?.append(payload)
    }
}

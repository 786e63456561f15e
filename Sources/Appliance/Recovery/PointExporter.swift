import Foundation
import Glibc
import Replica

/// Recovery points served read-only over NBD until they are unexported.
actor PointExporter {
    private let store: ReplicaStore
    private let runtimeDirectory: String
    private var serving: [String: ServedDisks] = [:]
    /// Being opened: whoever asks for the same waits for it.
    private var starting: [String: Task<Void, any Error>] = [:]

    init(store: ReplicaStore, runtimeDirectory: String) {
        self.store = store
        self.runtimeDirectory = runtimeDirectory
    }

    /// Serves, or goes on serving, the record's point.
    func begin(_ record: PointExportRecord, serverName: String) async throws -> PointExport {
        if let underway = starting[record.id] {
            try await underway.value
        } else if serving[record.id] == nil {
            let path = socketPath(record.id)
            let opening = Task {
                serving[record.id] = try await blocking { [store] in try ServedDisks.point(GroupID(record.server), record.point, store: store, socketPath: path) }
            }
            starting[record.id] = opening
            defer { starting[record.id] = nil }
            try await opening.value
        }
        return view(record, serverName: serverName)
    }

    func end(_ id: String) async throws {
        try? await starting[id]?.value
        await serving.removeValue(forKey: id)?.stop()
        // Of a process that was killed, and whose point could not be served again.
        unlink(socketPath(id))
    }

    func stop() async {
        for opening in starting.values { try? await opening.value }
        let all = serving
        serving.removeAll()
        for disks in all.values { await disks.stop() }
    }

    func view(_ record: PointExportRecord, serverName: String) -> PointExport {
        let path = socketPath(record.id)
        let names = (try? store.volumes(of: record.point, in: GroupID(record.server)).map(\.name)) ?? []
        return PointExport(
            server: serverName, recoveryPoint: record.point, socketPath: path,
            uris: names.map { "nbd+unix:///\($0)?socket=\(path)" }, created: record.created)
    }

    /// Of a socket for a point that is served while something is done with it.
    nonisolated func path(_ id: String) -> String { "\(runtimeDirectory)/\(id).sock" }
    private func socketPath(_ id: String) -> String { path(id) }
}

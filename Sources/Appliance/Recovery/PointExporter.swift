import Foundation
import Glibc
import Replica

/// Recovery points served read-only over NBD until they are unexported.
actor PointExporter {
    private let store: ReplicaStore
    private let runtimeDirectory: String
    private var serving: [String: ServedDisks] = [:]

    init(store: ReplicaStore, runtimeDirectory: String) {
        self.store = store
        self.runtimeDirectory = runtimeDirectory
    }

    /// Serves, or goes on serving, the record's point.
    func begin(_ record: PointExportRecord, serverName: String) async throws -> PointExport {
        if serving[record.id] == nil {
            let group = GroupID(record.server)
            let path = socketPath(record.id)
            let disks = try await blocking { [store] in
                try ServedDisks.point(group, record.point, store: store, socketPath: path)
            }
            if serving[record.id] == nil { serving[record.id] = disks } else { await disks.stop() }
        }
        return view(record, serverName: serverName)
    }

    func end(_ id: String) async throws {
        await serving.removeValue(forKey: id)?.stop()
        // Of a process that was killed, and whose point could not be served again.
        unlink(socketPath(id))
    }

    func stop() async {
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

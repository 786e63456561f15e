import BlockTap
import Foundation
import Replica

/// Disks of a fork or of a recovery point behind one NBD server on a unix socket, one export per disk, on an event loop of their own.
final class ServedDisks: Sendable {
    private let loop: EventLoop
    private let stopServer: @Sendable () async -> Void

    private init(loop: EventLoop, stopServer: @escaping @Sendable () async -> Void) {
        self.loop = loop
        self.stopServer = stopServer
    }

    /// Writable: every disk of a fork.
    static func fork(_ fork: ForkID, names: [String], store: ReplicaStore, socketPath: String) throws -> ServedDisks {
        let loop = try EventLoop(name: "nbd-\(fork)")
        do {
            let exports = try names.enumerated().map { index, name in
                (name: name, store: ForkStore(fork: try store.openFork(fork, volume: index), loop: loop))
            }
            let server = try NBDServer(loop: loop, exports: exports, listen: .unix(path: socketPath))
            return ServedDisks(loop: loop) { await server.stop() }
        } catch {
            loop.shutdown()
            throw error
        }
    }

    /// Read-only: every disk of a recovery point.
    static func point(_ group: GroupID, _ point: RecoveryPointID, names: [String], store: ReplicaStore, socketPath: String) throws -> ServedDisks {
        let loop = try EventLoop(name: "nbd-\(point)")
        do {
            let exports = try names.enumerated().map { index, name in
                (name: name, store: RecoveryPointStore(reader: try store.openRecoveryPoint(group, point, volume: index), loop: loop))
            }
            let server = try NBDServer(loop: loop, exports: exports, listen: .unix(path: socketPath))
            return ServedDisks(loop: loop) { await server.stop() }
        } catch {
            loop.shutdown()
            throw error
        }
    }

    /// Ends after the requests in flight have ended.
    func stop() async {
        await stopServer()
        let loop = loop
        try? await blocking { loop.shutdown() }
    }
}

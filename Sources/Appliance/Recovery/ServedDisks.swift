import BlockTap
import Foundation
import Replica
import Synchronization

/// Disks of a fork or of a recovery point behind one NBD server on a unix socket, one export per disk, on an event loop of their own.
final class ServedDisks: Sendable {
    private struct Parts: Sendable {
        var stop: @Sendable () async -> Void
        /// Of a fork; closed so that the next opener finds them free.
        var volumes: [ForkVolume]
    }
    private let loop: EventLoop
    private let parts: Mutex<Parts?>

    private init(loop: EventLoop, parts: Parts) {
        self.loop = loop
        self.parts = Mutex(parts)
    }

    /// Writable: every disk of a fork. Opens indexes: not for a thread that runs async code.
    static func fork(_ fork: ForkID, names: [String], store: ReplicaStore, socketPath: String) throws -> ServedDisks {
        try serve("nbd-\(fork)") { loop in
            var volumes: [ForkVolume] = []
            let exports = try names.enumerated().map { index, name in
                let volume = try store.openFork(fork, volume: index)
                volumes.append(volume)
                return (name: name, store: ForkStore(fork: volume, loop: loop))
            }
            let server = try NBDServer(loop: loop, exports: exports, listen: .unix(path: socketPath))
            return Parts(stop: { await server.stop() }, volumes: volumes)
        }
    }

    /// Read-only: every disk of a recovery point. As `fork`, not for a thread that runs async code.
    static func point(_ group: GroupID, _ point: RecoveryPointID, store: ReplicaStore, socketPath: String) throws -> ServedDisks {
        let readers = try store.volumes(of: point, in: group).indices.map { try store.openRecoveryPoint(group, point, volume: $0) }
        return try Self.readers(readers, name: "\(point)", socketPath: socketPath)
    }

    /// Read-only: disks that are open already.
    static func readers(_ readers: [VolumeReader], name: String, socketPath: String) throws -> ServedDisks {
        try serve("nbd-\(name)") { loop in
            let exports = readers.map { (name: $0.name, store: RecoveryPointStore(reader: $0, loop: loop)) }
            let server = try NBDServer(loop: loop, exports: exports, listen: .unix(path: socketPath))
            return Parts(stop: { await server.stop() }, volumes: [])
        }
    }

    private static func serve(_ name: String, _ open: (EventLoop) throws -> Parts) throws -> ServedDisks {
        let loop = try EventLoop(name: name)
        do { return ServedDisks(loop: loop, parts: try open(loop)) } catch {
            loop.shutdown()
            throw error
        }
    }

    /// Ends after the requests in flight have ended. Repeating it is harmless.
    func stop() async {
        guard let volumes = await stopServer() else { return }
        // The stores went with the server and left their last words on the loop.
        await loop.run {}
        let loop = loop
        try? await blocking {
            for volume in volumes { try? volume.close() }
            loop.shutdown()
        }
    }

    private func stopServer() async -> [ForkVolume]? {
        let taken = parts.withLock { parts in
            defer { parts = nil }
            return parts
        }
        guard let taken else { return nil }
        await taken.stop()
        return taken.volumes
    }
}

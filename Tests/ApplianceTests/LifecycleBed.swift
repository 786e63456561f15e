import Foundation
import GRDB
import Logging
import Replica
import Testing

@testable import Appliance

/// A lifecycle over a real catalogue and store, without agents and machines; ended and begun again over the same files.
final class LifecycleBed: @unchecked Sendable {
    let directory: TemporaryDirectory
    private(set) var catalogue: Catalogue
    private(set) var store: ReplicaStore
    private(set) var lifecycle: Lifecycle
    private static let logger = Logger(label: "test") { _ in SwiftLogNoOpLogHandler() }

    init() throws {
        directory = try TemporaryDirectory()
        (catalogue, store, lifecycle) = try Self.open(directory.path)
    }

    private static func open(_ path: String) throws -> (Catalogue, ReplicaStore, Lifecycle) {
        let catalogue = try Catalogue(path: path + "/c.sqlite")
        let store = try ReplicaStore.open(directory: path + "/store", logger: logger)
        // It answers --version, and is no machine.
        let qemu = path + "/qemu"
        try "#!/bin/sh\necho 'QEMU emulator version 10.0.0'\n".write(toFile: qemu, atomically: true, encoding: .utf8)
        chmod(qemu, 0o755)
        let machines = RecoveryHost(store: store, qemu: QEMUConfiguration(executable: qemu), runtimeDirectory: path, stateDirectory: path, logger: logger)
        let ca = path + "/ca"
        let lifecycle = Lifecycle(
            catalogue: catalogue, store: store, machines: machines, exports: PointExporter(store: store, runtimeDirectory: path),
            mounts: PointMounter(store: store, runtimeDirectory: path, logger: logger),
            authority: try FileManager.default.fileExists(atPath: ca) ? CertificateAuthority.loadOrCreate(directory: ca) : CertificateAuthority.create(directory: ca),
            settings: LifecycleSettings(apiURL: "https://127.0.0.1:1", linkHost: "127.0.0.1", linkPort: 2, storeDirectory: path), logger: logger)
        return (catalogue, store, lifecycle)
    }

    /// All work ends where it is, as its rows have it; the next lifecycle goes on from these.
    func restart() async throws {
        try await end()
        (catalogue, store, lifecycle) = try Self.open(directory.path)
        try await lifecycle.resume()
    }

    func end() async throws {
        await lifecycle.stop()
        store.close()
        try catalogue.close()
    }

    /// A script of the test's; its path.
    func script(_ name: String, _ lines: String) throws -> String {
        let path = directory.path + "/" + name
        try "#!/bin/sh\n\(lines)\n".write(toFile: path, atomically: true, encoding: .utf8)
        chmod(path, 0o755)
        return path
    }

    func lines(_ name: String) -> [String] {
        ((try? String(contentsOfFile: directory.path + "/" + name, encoding: .utf8)) ?? "").split(separator: "\n").map(String.init)
    }
}

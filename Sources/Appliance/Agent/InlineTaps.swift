import BlockTap
import Dispatch
import Foundation
import Logging
import Replica

/// The agent's disks, each served through its NBD tap, on one event loop.
final class InlineTaps: AgentTap {
    let source: any EpochSource
    /// The bitmaps start empty with every process: what the replica has was tracked by an earlier instance, if at all.
    let base = ReplicationBase()
    let hello: AgentHello
    private let loop: EventLoop
    private let group: TapGroup
    private let servers: [NBDServer<TappedDisk>]

    init(configuration: AgentConfiguration, state: AgentState, logger: Logger) async throws {
        let disks = try configuration.disks.map { disk in
            (name: disk.name, device: try BlockDevice.open(path: disk.devicePath, access: .readWrite, exclusive: true, patienceMilliseconds: 5000))
        }
        try state.rememberSizes(
            disks.map { (name: $0.name, path: $0.device.path, bytes: $0.device.geometry.sizeBytes) }, acceptsSmaller: configuration.acceptsSmallerDisks)
        try FileManager.default.createDirectory(atPath: configuration.socketDirectory, withIntermediateDirectories: true, attributes: [.posixPermissions: 0o700])

        let instance = UUID().uuidString.lowercased()
        loop = try EventLoop(name: "tap")
        group = await TapGroup(loop: loop, disks: disks, instance: instance, configuration: configuration.tap)
        source = try await configuration.scripted(group, state, logger: logger)
        // Off the tap's thread: whoever reads the log may be slow, and writes of the protected machine must not wait for that.
        let logQueue = DispatchQueue(label: "tap-log")
        var servers: [NBDServer<TappedDisk>] = []
        var reports: [DiskReport] = []
        for (index, disk) in disks.enumerated() {
            let path = configuration.socketDirectory + "/\(disk.name).sock"
            let name = disk.name
            servers.append(
                try NBDServer(loop: loop, exports: [(name: name, store: group.disk(index))], listen: .unix(path: path)) { line in
                    logQueue.async { logger.warning("tap of \(name): \(line)") }
                })
            reports.append(DiskReport(name: disk.name, devicePath: disk.device.path, geometry: disk.device.geometry, tap: AgentConfiguration.TapKind.nbd.rawValue, socketPath: path))
            logger.info("disk \(disk.name): \(disk.device.path), \(disk.device.geometry.sizeBytes >> 20) MiB, served on \(path)")
        }
        self.servers = servers
        hello = configuration.hello(instance: instance, disks: reports)
    }

    let canHoldWrites = true
    func holdWrites(_ id: String) async -> [String] {
        await group.holdWrites(id)
        return []
    }
    func releaseWrites(_ id: String) async { await group.releaseWrites(id) }
    func refuseHeldWrites(_ id: String) async { await group.refuseHeldWrites(id, error: ESHUTDOWN) }

    func stop() async {
        for server in servers { await server.stop() }
        loop.shutdown()
    }
}

import BlockTap
import Dispatch
import Foundation
import Logging
import Replica

/// The agent's disks, each served through its NBD tap; one consistency group on one event loop.
final class AgentTaps: Sendable {
    let group: TapGroup
    let hello: AgentHello
    private let loop: EventLoop
    private let servers: [NBDServer<TappedDisk>]

    init(configuration: AgentConfiguration, state: AgentState, logger: Logger) async throws {
        guard !configuration.disks.isEmpty else { throw AgentError("no disk to serve: give at least one --disk NAME=DEVICE") }
        var disks: [(name: String, device: BlockDevice)] = []
        for disk in configuration.disks {
            guard !disk.name.isEmpty, disk.name.allSatisfy({ $0.isASCII && ($0.isLetter || $0.isNumber || $0 == "-" || $0 == "_") }) else {
                throw AgentError("\"\(disk.name)\" is no name for a disk: use letters, digits, - and _")
            }
            guard !disks.contains(where: { $0.name == disk.name }) else { throw AgentError("two disks are named \(disk.name)") }
            disks.append((disk.name, try BlockDevice.open(path: disk.devicePath, access: .readWrite, exclusive: true, patienceMilliseconds: 5000)))
        }
        try state.rememberSizes(disks, acceptsSmaller: configuration.acceptsSmallerDisks)
        try FileManager.default.createDirectory(atPath: configuration.socketDirectory, withIntermediateDirectories: true, attributes: [.posixPermissions: 0o700])

        // The bitmaps start empty with every process: what the replica has was tracked by an earlier instance, if at all.
        let instance = UUID().uuidString.lowercased()
        loop = try EventLoop(name: "tap")
        let group = await TapGroup(loop: loop, disks: disks, instance: instance, configuration: configuration.tap)
        self.group = group
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
            reports.append(DiskReport(name: disk.name, devicePath: disk.device.path, geometry: disk.device.geometry, tap: "nbd", socketPath: path))
            logger.info("disk \(disk.name): \(disk.device.path), \(disk.device.geometry.sizeBytes >> 20) MiB, served on \(path)")
        }
        self.servers = servers
        var kernel = utsname()
        uname(&kernel)
        hello = AgentHello(
            agentVersion: afterimageVersion, hostName: ProcessInfo.processInfo.hostName,
            kernel: withUnsafeBytes(of: kernel.release) { String(decoding: $0.prefix { $0 != 0 }, as: UTF8.self) }, instance: instance, disks: reports)
    }

    func stop() async {
        for server in servers { await server.stop() }
        loop.shutdown()
    }
}

import Appliance
import ArgumentParser
import Foundation

/// Settings of the machine that a drill or a failover starts.
struct MachineOptions: ParsableArguments {
    @Option(help: "CPUs; default: as recorded at Start Replication.") var cpus: Int?
    @Option(name: .customLong("memory"), help: "Memory in MiB; default: as recorded at Start Replication.") var memoryMiB: Int?
    @Flag(help: "Start it even if this host has not that much memory.") var allowOvercommit = false
    @Option(help: "bios, uefi or auto: as the source's, or what the boot disk is made for; default: auto.") var firmware: FirmwareChoice?
    @Option(help: "virtio, sata or auto: virtio unless the source is known to lack its drivers; default: auto.") var diskBus: DiskBus?
    @Option(help: "writeback, writethrough (every write is durable when it is answered) or unsafe (flushes are ignored); default: writeback.") var diskCache: DiskCache?
    @Option(help: "Network cards: virtio, e1000e or auto, as for disks; default: auto.") var nic: NetworkModel?

    @Option(help: "Recovery network: isolated, user, bridge or none, or a network's name; default: the server's, then the site pair's.") var network: NetworkChoice?
    @Option(help: ArgumentHelp("With network bridge: a bridge of this host that is there already.", valueName: "name")) var bridge: String?
    @Option(help: ArgumentHelp("With network bridge: an own one with this network; the address is this host's in it.", valueName: "10.80.0.1/24"))
    var bridgeSubnet: IPv4Interface?
    @Flag(inversion: .prefixedNo, help: "Give out addresses of --bridge-subnet.") var dhcp = true
    @Option(
        help: ArgumentHelp(
            "With network user: a port of this host, of 127.0.0.1 or of the address given, that leads to the machine; repeat it.", valueName: "[address:]hostport:port"))
    var forward: [PortForward] = []
    @Option(name: .customLong("ip"), help: ArgumentHelp("The machine's IP address: keep (the source's), dhcp, or one to be set; default: dhcp.", valueName: "keep|dhcp|a.b.c.d/length"))
    var address: String?
    @Option(help: "Gateway of that address.") var gateway: String?

    @Option(help: "What makes the machine ready: none (QEMU runs it), serial:REGEX (a line of its serial console), agent (its guest agent answers), tcp:PORT, or script:/PATH (a program of the appliance's host ends with 0). Repeat it: all must pass.")
    var bootCheck: [String] = []
    @Option(help: ArgumentHelp("Time limit of the boot checks in seconds; default 120.", valueName: "seconds")) var bootTimeout: Int?

    @Option(name: .customLong("script"), help: ArgumentHelp("Execute script after failover: this shell script, run in the machine by its guest agent.", valueName: "file")) var guestScript: String?
    @Option(name: .customLong("host-script"), help: ArgumentHelp("As --script, but a program of the appliance's host. Administrators only.", valueName: "/path")) var hostScript: String?
    @Option(help: ArgumentHelp("Time limit of that script; default 300.", valueName: "seconds")) var scriptTimeout: Int?
    @Option(help: "When a failed-over machine ends by itself: report or restart; default: report.") var onEnd: MachineEnd?

    func validate() throws {
        guard bridge == nil || bridgeSubnet == nil else { throw ValidationError("--bridge is one that is there already, --bridge-subnet makes one: give one of them") }
        guard guestScript == nil || hostScript == nil else { throw ValidationError("--script runs in the machine, --host-script on the appliance's host: give one of them") }
        guard hostScript.map({ $0.hasPrefix("/") }) ?? true else { throw ValidationError("--host-script is an absolute path on the appliance's host") }
    }

    func request(point: String?) throws -> Appliance.StartMachine {
        var request = Appliance.StartMachine()
        request.recoveryPoint = point
        request.cpus = cpus
        request.memoryMiB = memoryMiB
        request.allowOvercommit = allowOvercommit ? true : nil
        request.firmware = firmware
        request.diskBus = diskBus
        request.diskCache = diskCache
        request.networkModel = nic
        request.network = network?.mode
        request.networkName = network?.name
        request.bridge = bridge.map { BridgeSettings(name: $0) } ?? bridgeSubnet.map { BridgeSettings(subnet: $0, dhcp: dhcp) }
        request.forwards = forward.isEmpty ? nil : forward
        request.address = address
        request.gateway = gateway
        request.bootChecks = bootCheck.isEmpty ? nil : bootCheck
        request.bootSecondsMax = bootTimeout
        request.guestScript = try guestScript.map(text)
        request.hostScript = hostScript
        request.scriptSecondsMax = scriptTimeout
        request.onEnd = onEnd
        return request
    }

    private func text(_ path: String) throws -> String {
        guard let data = FileManager.default.contents(atPath: path) else {
            Terminal.error("cannot read the script \(path): \(String(cString: strerror(errno)))")
            throw Exit.usage
        }
        return String(decoding: data, as: UTF8.self)
    }
}

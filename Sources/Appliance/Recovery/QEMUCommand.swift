import Foundation

public enum Accelerator: String, Sendable, Codable { case kvm, tcg }

/// `--accel`: what the operator says about this host.
public enum AcceleratorChoice: String, Sendable, Codable, CaseIterable { case auto, kvm, tcg }

/// Where QEMU is, as the operator set it up.
public struct QEMUConfiguration: Sendable {
    public var executable: String
    /// Extra `-L` directories (QEMU's own firmware files), searched in order.
    public var dataDirectories: [String]
    /// Where OVMF is, before the usual places are searched.
    public var firmwareDirectories: [String]
    public var accelerator: AcceleratorChoice
    /// Machines that boot at once; the others wait for their turn.
    public var bootsAtOnce: Int
    public init(
        executable: String = "/usr/bin/qemu-system-x86_64", dataDirectories: [String] = [], firmwareDirectories: [String] = [], accelerator: AcceleratorChoice = .auto,
        bootsAtOnce: Int? = nil
    ) {
        self.executable = executable
        self.dataDirectories = dataDirectories
        self.firmwareDirectories = firmwareDirectories
        self.accelerator = accelerator
        self.bootsAtOnce = bootsAtOnce ?? max(2, ProcessInfo.processInfo.activeProcessorCount / 2)
    }
}

/// The command line of a recovery instance's QEMU, without the executable.
public struct QEMUCommand: Sendable {
    public var name: String
    /// Nothing in it is `auto` any more.
    public var machine: MachineSettings
    public var accelerator: Accelerator
    public var dataDirectories: [String]
    public var nbdSocketPath: String
    public var exports: [String]
    public var qmpSocketPath: String
    public var consolePath: String
    public var vncSocketPath: String
    public var agentSocketPath: String
    /// UEFI; nil: a BIOS.
    var firmware: FirmwareFiles?
    /// Of the network `bridge`: one tap device for each card.
    public var taps: [String] = []

    /// How long a guest's request waits for its disk while the appliance is being restarted.
    static let reconnectSeconds = 600
    /// Of an AHCI controller.
    private static let sataPorts = 6

    public var arguments: [String] {
        var words = ["-name", name, "-nodefaults", "-no-user-config", "-display", "none", "-msg", "timestamp=on"]
        for directory in dataDirectories { words += ["-L", directory] }
        words += ["-machine", firmware != nil || isSATA ? "q35" : "pc"]
        switch accelerator {
        case .kvm: words += ["-accel", "kvm", "-cpu", "max"]
        // Without rdrand a guest may wait seconds for randomness.
        case .tcg: words += ["-accel", "tcg,thread=multi", "-cpu", "qemu64,+rdrand"]
        }
        words += ["-smp", "\(machine.cpus)", "-m", "\(machine.memoryMiB)", "-rtc", "base=utc"]
        if let firmware {
            words += ["-drive", "if=pflash,unit=0,format=raw,readonly=on,file=\(Self.escaped(firmware.code))"]
            words += ["-drive", "if=pflash,unit=1,format=raw,file=\(Self.escaped(firmware.variables))"]
        }
        words += ["-qmp", "unix:\(Self.escaped(qmpSocketPath)),server=on,wait=off"]
        words += ["-chardev", "file,id=console,path=\(Self.escaped(consolePath))", "-serial", "chardev:console"]
        words += ["-device", "VGA", "-vnc", "unix:\(Self.escaped(vncSocketPath))"]
        words += ["-device", "virtio-serial-pci", "-chardev", "socket,id=agent,path=\(Self.escaped(agentSocketPath)),server=on,wait=off"]
        words += ["-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"]
        // Where the machine's kernel tells that it panics.
        words += ["-device", "pvpanic"]
        return words + disks + network
    }

    private var isSATA: Bool { machine.diskBus == .sata }

    private var disks: [String] {
        var words: [String] = []
        let writeCache = machine.diskCache == .writethrough ? ",write-cache=off" : ""
        for (index, export) in exports.enumerated() {
            words += ["-blockdev", blockNode(index: index, export: export)]
            let common = "drive=disk\(index),serial=\(Self.serial(export)),bootindex=\(index + 1)" + writeCache
            let (controller, port) = index.quotientAndRemainder(dividingBy: Self.sataPorts)
            if isSATA, port == 0 { words += ["-device", "ich9-ahci,id=sata\(controller)"] }
            words += ["-device", isSATA ? "ide-hd,bus=sata\(controller).\(port)," + common : "virtio-blk-pci," + common]
        }
        return words
    }

    private var network: [String] {
        guard machine.network != .none else { return [] }
        var words: [String] = []
        var macs: [String?] = [nil]
        if let cards = machine.cards { macs = cards }
        for (index, mac) in macs.enumerated() {
            let id = "net\(index)"
            let addresses = index == (machine.address?.card ?? 0) ? userAddresses : ""
            switch machine.network {
            case .none: break
            case .isolated: words += ["-netdev", "user,id=\(id),restrict=on" + addresses]
            case .user:
                let forwards = index > 0 ? "" : machine.forwards.map { ",hostfwd=tcp:\($0.hostAddress):\($0.hostPort)-:\($0.guestPort)" }.joined()
                words += ["-netdev", "user,id=\(id)" + addresses + forwards]
            case .bridge: words += ["-netdev", "tap,id=\(id),ifname=\(taps[index]),script=no,downscript=no"]
            }
            let model = machine.networkModel == .e1000e ? "e1000e" : "virtio-net-pci"
            // No network boot, no ROM file to look for.
            words += ["-device", "\(model),netdev=\(id)" + (mac.map { ",mac=\($0)" } ?? "") + ",romfile="]
        }
        return words
    }

    /// The network that QEMU itself plays is laid around the machine's address: it is right for a system that has it built in, and what DHCP gives.
    private var userAddresses: String {
        guard let address = machine.address, machine.network != .bridge else { return "" }
        let interface = address.interface
        let free = (interface.network &+ 1..<interface.broadcast).lazy.filter { $0 != interface.address }
        let host = address.gateway ?? free.first { _ in true } ?? interface.network &+ 1
        let names = free.first { $0 != host } ?? interface.network &+ 2
        let text = IPv4Interface.text
        return ",net=\(text(interface.network))/\(interface.prefixLength),host=\(text(host)),dns=\(text(names)),dhcpstart=\(interface.addressText)"
    }

    private struct NBDNode: Encodable {
        struct Server: Encodable {
            var type = "unix"
            var path: String
        }
        struct Cache: Encodable {
            var noFlush = true
            enum CodingKeys: String, CodingKey { case noFlush = "no-flush" }
        }
        var driver = "nbd"
        var nodeName: String
        var server: Server
        var export: String
        var reconnectDelay = QEMUCommand.reconnectSeconds
        var discard = "unmap"
        var cache: Cache?
        enum CodingKeys: String, CodingKey {
            case driver, server, export, discard, cache
            case nodeName = "node-name"
            case reconnectDelay = "reconnect-delay"
        }
    }

    private func blockNode(index: Int, export: String) -> String {
        let node = NBDNode(nodeName: "disk\(index)", server: .init(path: nbdSocketPath), export: export, cache: machine.diskCache == .unsafe ? .init() : nil)
        let encoder = JSONEncoder()
        encoder.outputFormatting = [.sortedKeys, .withoutEscapingSlashes]
        guard let data = try? encoder.encode(node) else { preconditionFailure("strings and numbers always encode") }
        return String(decoding: data, as: UTF8.self)
    }

    /// In QEMU's option lists a comma in a value is written twice.
    private static func escaped(_ value: String) -> String { value.replacingOccurrences(of: ",", with: ",,") }

    /// virtio-blk serials hold 20 bytes.
    private static func serial(_ export: String) -> String { String(export.prefix(20)) }
}

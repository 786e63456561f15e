import Foundation

public enum Accelerator: String, Sendable, Codable { case kvm, tcg }

/// `--accel`: what the operator says about this host.
public enum AcceleratorChoice: String, Sendable, Codable, CaseIterable { case auto, kvm, tcg }

/// Where QEMU is, as the operator set it up.
public struct QEMUConfiguration: Sendable {
    public var executable: String
    /// Extra `-L` directories (firmware), searched in order.
    public var dataDirectories: [String]
    public var accelerator: AcceleratorChoice
    public init(executable: String = "/usr/bin/qemu-system-x86_64", dataDirectories: [String] = [], accelerator: AcceleratorChoice = .auto) {
        self.executable = executable
        self.dataDirectories = dataDirectories
        self.accelerator = accelerator
    }
}

/// The command line of a recovery instance's QEMU, without the executable.
public struct QEMUCommand: Sendable {
    public var name: String
    public var machine: MachineSettings
    public var accelerator: Accelerator
    public var dataDirectories: [String]
    public var nbdSocketPath: String
    public var exports: [String]
    public var qmpSocketPath: String
    public var consolePath: String

    /// How long a guest's request waits for its disk while the appliance is being restarted.
    static let reconnectSeconds = 600

    public var arguments: [String] {
        var words = ["-name", name, "-nodefaults", "-no-user-config", "-display", "none", "-msg", "timestamp=on"]
        for directory in dataDirectories { words += ["-L", directory] }
        words += ["-machine", "pc"]
        switch accelerator {
        case .kvm: words += ["-accel", "kvm", "-cpu", "max"]
        // Without rdrand a guest may wait seconds for randomness.
        case .tcg: words += ["-accel", "tcg,thread=multi", "-cpu", "qemu64,+rdrand"]
        }
        words += ["-smp", "\(machine.cpus)", "-m", "\(machine.memoryMiB)", "-rtc", "base=utc"]
        words += ["-qmp", "unix:\(Self.escaped(qmpSocketPath)),server=on,wait=off"]
        words += ["-chardev", "file,id=console,path=\(Self.escaped(consolePath))", "-serial", "chardev:console"]
        for (index, export) in exports.enumerated() {
            words += ["-blockdev", blockNode(index: index, export: export)]
            words += ["-device", "virtio-blk-pci,drive=disk\(index),serial=\(Self.serial(export)),bootindex=\(index + 1)"]
        }
        let card = ["-device", "virtio-net-pci,netdev=net0,romfile="]  // no network boot, no ROM file to look for
        switch machine.network {
        case .none, .bridge: break
        case .isolated: words += ["-netdev", "user,id=net0,restrict=on"] + card
        case .user:
            let forwards = machine.forwards.map { ",hostfwd=tcp:127.0.0.1:\($0.hostPort)-:\($0.guestPort)" }.joined()
            words += ["-netdev", "user,id=net0" + forwards] + card
        }
        return words
    }

    private struct NBDNode: Encodable {
        struct Server: Encodable {
            var type = "unix"
            var path: String
        }
        var driver = "nbd"
        var nodeName: String
        var server: Server
        var export: String
        var reconnectDelay = QEMUCommand.reconnectSeconds
        var discard = "unmap"
        enum CodingKeys: String, CodingKey {
            case driver, server, export, discard
            case nodeName = "node-name"
            case reconnectDelay = "reconnect-delay"
        }
    }

    private func blockNode(index: Int, export: String) -> String {
        let node = NBDNode(nodeName: "disk\(index)", server: .init(path: nbdSocketPath), export: export)
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

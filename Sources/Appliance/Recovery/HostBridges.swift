import Crypto
import Foundation
import Glibc
import Logging
import Replica

/// The host's side of the recovery network `bridge`: tap devices for machines' cards, on a bridge that is there already or on one of the appliance's own,
/// with a dnsmasq that gives out its addresses.
///
/// All names follow from the appliance and the machine, or the network, and each interface says in its alias whose it is (`afterimage OWNER MACHINE`). So
/// everything may be repeated after a crash at any point in it, and what nobody needs any more is found at the next start. Interfaces outlive the
/// appliance as its machines do. A bridge goes with the last tap on it.
struct HostBridges: Sendable {
    /// Of this appliance among those of the host.
    private let owner: String
    /// Of dnsmasq: leases, reservations, its words; one directory for each bridge.
    private let directory: String
    private let logger: Logger
    /// A bridge must not go while another machine is being put on it.
    private let one = Gate(limit: 1)
    private static let interfaces = "/sys/class/net"

    init(stateDirectory: String, logger: Logger) {
        owner = Self.hash(stateDirectory)
        directory = stateDirectory + "/bridges"
        self.logger = logger
    }

    /// Why this host cannot have machines on this bridge.
    func check(_ settings: BridgeSettings) throws(ApplianceError) {
        try settings.check()
        _ = try HostProgram.find("ip", package: "iproute2")
        guard Self.isPrivileged else {
            throw .refused("The recovery network bridge needs the right to set up network interfaces: run the appliance as root, or with CAP_NET_ADMIN; or use the network isolated or user.")
        }
        guard access("/dev/net/tun", R_OK | W_OK) == 0 else { throw .refused("The recovery network bridge needs /dev/net/tun, and there is no usable one on this host (modprobe tun).") }
        if let name = settings.name {
            guard Self.exists("\(name)/bridge") else {
                throw .refused("There is no bridge \(name) on this host (ip link show type bridge lists them): make it, or let the appliance make an own one (--bridge-subnet).")
            }
        }
        guard let subnet = settings.subnet else { return }
        if settings.dhcp != false { _ = try HostProgram.find("dnsmasq", package: "dnsmasq-base") }
        let bridge = bridgeName(subnet)
        for (name, other) in Self.hostInterfaces() where name != bridge && (other.contains(subnet.network) || subnet.contains(other.address)) {
            throw .refused("The recovery network \(subnet) overlaps \(other) of this host's \(name): choose another subnet.")
        }
    }

    // MARK: A machine's taps

    /// Taps for all its cards, on their bridge; their names.
    func prepare(_ instance: InstanceRecord, log: @Sendable (String) async -> Void) async throws -> [String] {
        guard let settings = instance.settings.bridge else { throw ApplianceError.failed("machine \(instance.id) has no bridge to be on") }
        try check(settings)
        return try await alone {
            let ip = try HostProgram.find("ip", package: "iproute2")
            let bridge: String
            if let subnet = settings.subnet {
                bridge = try await ownBridge(subnet, ip, log: log)
                if settings.dhcp != false { try await serveAddresses(subnet, on: bridge, for: instance) }
            } else {
                bridge = settings.name ?? ""
            }
            var taps: [String] = []
            for card in 0..<(instance.settings.cards?.count ?? 1) {
                let tap = tapName(instance.id, card)
                if !Self.exists(tap) { try await ip.run(["tuntap", "add", "dev", tap, "mode", "tap"], doing: "make the tap device \(tap)") }
                try await ip.run(["link", "set", "dev", tap, "alias", "afterimage \(owner) \(instance.id)"], doing: "name \(tap)'s owner")
                try await ip.run(["link", "set", "dev", tap, "master", bridge, "up"], doing: "put \(tap) on the bridge \(bridge)")
                taps.append(tap)
            }
            return taps
        }
    }

    /// A machine's taps go, and its own bridge with the last of them.
    func release(_ instance: InstanceRecord) async throws {
        guard let settings = instance.settings.bridge else { return }
        try await alone {
            let ip = try HostProgram.find("ip", package: "iproute2")
            for card in 0..<(instance.settings.cards?.count ?? 1) {
                let tap = tapName(instance.id, card)
                if Self.exists(tap) { try await ip.run(["link", "delete", "dev", tap], doing: "remove the tap device \(tap)") }
            }
            guard let subnet = settings.subnet else { return }
            let bridge = bridgeName(subnet)
            try? FileManager.default.removeItem(atPath: "\(hostsDirectory(bridge))/\(instance.id)")
            try await removeIfUnused(bridge, ip)
        }
    }

    /// Interfaces of this appliance that no machine of `known` needs: what a crash left.
    func releaseUnknown(_ known: Set<String>) async {
        do {
            try await alone {
                let names = ((try? FileManager.default.contentsOfDirectory(atPath: Self.interfaces)) ?? []).sorted()
                let owned = names.compactMap { name -> (name: String, machine: String?)? in
                    let words = (Self.text("\(name)/ifalias") ?? "").split(separator: " ").map(String.init)
                    guard words.count >= 2, words[0] == "afterimage", words[1] == owner else { return nil }
                    return (name, words.count > 2 ? words[2] : nil)
                }
                if owned.isEmpty { return }
                let ip = try HostProgram.find("ip", package: "iproute2")
                for (name, machine) in owned {
                    if let machine, !known.contains(machine) {
                        try await ip.run(["link", "delete", "dev", name], doing: "remove the tap device \(name)")
                        logger.info("the tap device \(name) was left by machine \(machine), which is gone: removed")
                    }
                }
                for (name, machine) in owned where machine == nil { try await removeIfUnused(name, ip) }
            }
        } catch {
            logger.error("cannot remove network interfaces that nobody needs: \(error)")
        }
    }

    /// The address that dnsmasq has given to a card.
    func leasedAddress(_ instance: InstanceRecord) -> String? {
        guard let subnet = instance.settings.bridge?.subnet, let mac = instance.settings.cards?.first else { return nil }
        // dnsmasq(8): time, MAC, address, name, client id.
        let leases = FileManager.default.contents(atPath: leasesPath(bridgeName(subnet))).map { String(decoding: $0, as: UTF8.self) } ?? ""
        let lines = leases.split(separator: "\n").map { $0.split(separator: " ").map(String.init) }
        return lines.last { $0.count >= 3 && $0[1].lowercased() == mac.lowercased() }?[2]
    }

    // MARK: Own bridges

    private func ownBridge(_ subnet: IPv4Interface, _ ip: HostProgram, log: @Sendable (String) async -> Void) async throws -> String {
        let bridge = bridgeName(subnet)
        if !Self.exists(bridge) {
            try await ip.run(["link", "add", "name", bridge, "type", "bridge", "forward_delay", "0"], doing: "make the bridge \(bridge)")
            await log("the bridge \(bridge) is made for the recovery network \(subnet)")
        }
        try await ip.run(["link", "set", "dev", bridge, "alias", "afterimage \(owner)"], doing: "name the bridge's owner")
        try await ip.run(["address", "replace", subnet.description, "dev", bridge], doing: "give the bridge \(bridge) the address \(subnet)")
        try await ip.run(["link", "set", "dev", bridge, "up"], doing: "bring the bridge \(bridge) up")
        return bridge
    }

    private func serveAddresses(_ subnet: IPv4Interface, on bridge: String, for instance: InstanceRecord) async throws {
        try FileManager.default.createDirectory(atPath: hostsDirectory(bridge), withIntermediateDirectories: true, attributes: [.posixPermissions: 0o700])
        // A machine whose address is known gets it; dnsmasq sees new files in this directory by itself.
        if let address = instance.settings.address, let mac = instance.settings.cards?[safe: address.card] {
            try Data("\(mac),\(address.interface.addressText)\n".utf8).write(to: URL(fileURLWithPath: "\(hostsDirectory(bridge))/\(instance.id)"))
        }
        if QEMUProcess.find(naming: "dnsmasq", "--interface=\(bridge)") != nil { return }
        let dnsmasq = try HostProgram.find("dnsmasq", package: "dnsmasq-base")
        let log = "\(directory)/\(bridge)/dnsmasq.log"
        let process = try QEMUProcess.spawn(
            executable: dnsmasq.path,
            arguments: [
                "--keep-in-foreground", "--conf-file=/dev/null", "--user=root", "--group=root", "--pid-file=", "--port=0", "--interface=\(bridge)", "--bind-interfaces",
                "--except-interface=lo", "--dhcp-authoritative", "--no-ping", "--dhcp-leasefile=\(leasesPath(bridge))", "--dhcp-hostsdir=\(hostsDirectory(bridge))",
                "--dhcp-range=\(IPv4Interface.text(subnet.network + 1)),\(IPv4Interface.text(subnet.broadcast - 1)),\(IPv4Interface.text(subnet.mask)),12h", "--log-facility=-",
            ], logPath: log)
        // It listens, or it ends at once and says why.
        if await process.waitForEnd(seconds: 0.3) {
            let said = FileManager.default.contents(atPath: log).map { String(decoding: $0.suffix(500), as: UTF8.self) } ?? ""
            throw ApplianceError.failed("dnsmasq does not run on the bridge \(bridge): \(said.trimmingCharacters(in: .whitespacesAndNewlines))")
        }
    }

    private func removeIfUnused(_ bridge: String, _ ip: HostProgram) async throws {
        let ports = (try? FileManager.default.contentsOfDirectory(atPath: "\(Self.interfaces)/\(bridge)/brif")) ?? []
        guard ports.isEmpty else { return }
        await QEMUProcess.find(naming: "dnsmasq", "--interface=\(bridge)")?.terminate()
        if Self.exists(bridge) { try await ip.run(["link", "delete", "dev", bridge], doing: "remove the bridge \(bridge)") }
        try? FileManager.default.removeItem(atPath: "\(directory)/\(bridge)")
    }

    // MARK: Names

    /// An interface's name has at most 15 bytes.
    private func tapName(_ instance: String, _ card: Int) -> String { "aft\(Self.hash(owner + instance))\(card)" }
    func bridgeName(_ subnet: IPv4Interface) -> String { "afb\(Self.hash(owner + subnet.description))" }
    private func hostsDirectory(_ bridge: String) -> String { "\(directory)/\(bridge)/hosts" }
    private func leasesPath(_ bridge: String) -> String { "\(directory)/\(bridge)/leases" }
    private static func hash(_ text: String) -> String { SHA256.hash(data: Data(text.utf8)).prefix(4).map { String($0 >> 4, radix: 16) + String($0 & 15, radix: 16) }.joined() }

    // MARK: The host

    private func alone<T: Sendable>(_ body: () async throws -> T) async throws -> T {
        try await one.enter()
        do {
            let value = try await body()
            await one.leave()
            return value
        } catch {
            await one.leave()
            throw error
        }
    }

    private static func exists(_ name: String) -> Bool { access("\(interfaces)/\(name)", F_OK) == 0 }
    private static func text(_ path: String) -> String? {
        FileManager.default.contents(atPath: "\(interfaces)/\(path)").map { String(decoding: $0, as: UTF8.self).trimmingCharacters(in: .whitespacesAndNewlines) }
    }

    /// linux/capability.h: CAP_NET_ADMIN is 12.
    private static var isPrivileged: Bool {
        guard let data = FileManager.default.contents(atPath: "/proc/self/status"),
            let line = String(decoding: data, as: UTF8.self).split(separator: "\n").first(where: { $0.hasPrefix("CapEff:") }),
            let set = line.split(whereSeparator: \.isWhitespace).last.flatMap({ UInt64($0, radix: 16) })
        else { return false }
        return set & 1 << 12 != 0
    }

    /// IPv4 addresses of the host, with their networks.
    static func hostInterfaces() -> [(name: String, interface: IPv4Interface)] {
        var first: UnsafeMutablePointer<ifaddrs>?
        guard getifaddrs(&first) == 0 else { return [] }
        defer { freeifaddrs(first) }
        var found: [(String, IPv4Interface)] = []
        var next = first
        while let entry = next {
            next = entry.pointee.ifa_next
            guard let address = entry.pointee.ifa_addr, let mask = entry.pointee.ifa_netmask, Int32(address.pointee.sa_family) == AF_INET else { continue }
            func number(_ pointer: UnsafeMutablePointer<sockaddr>) -> UInt32 {
                pointer.withMemoryRebound(to: sockaddr_in.self, capacity: 1) { UInt32(bigEndian: $0.pointee.sin_addr.s_addr) }
            }
            guard let interface = IPv4Interface("\(IPv4Interface.text(number(address)))/\(max(1, number(mask).nonzeroBitCount))") else { continue }
            found.append((String(cString: entry.pointee.ifa_name), interface))
        }
        return found
    }
}

extension Array {
    fileprivate subscript(safe index: Int) -> Element? { indices.contains(index) ? self[index] : nil }
}

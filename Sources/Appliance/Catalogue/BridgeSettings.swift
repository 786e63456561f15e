/// An IPv4 address with the prefix length of its network, as people write it: 10.80.0.1/24.
public struct IPv4Interface: Sendable, Codable, Hashable, CustomStringConvertible {
    /// Most significant byte first.
    public var address: UInt32
    public var prefixLength: Int

    public init?(_ text: String) {
        let parts = text.split(separator: "/", omittingEmptySubsequences: false)
        guard parts.count == 2, let address = Self.address(String(parts[0])), let length = Int(parts[1]), (1...32).contains(length) else { return nil }
        self.address = address
        prefixLength = length
    }

    public init(from decoder: any Decoder) throws {
        let container = try decoder.singleValueContainer()
        let text = try container.decode(String.self)
        guard let read = IPv4Interface(text) else {
            throw DecodingError.dataCorruptedError(in: container, debugDescription: "\(text) is not an IPv4 address with its prefix length (10.80.0.1/24)")
        }
        self = read
    }

    public func encode(to encoder: any Encoder) throws {
        var container = encoder.singleValueContainer()
        try container.encode(description)
    }

    public var description: String { "\(addressText)/\(prefixLength)" }
    public var addressText: String { Self.text(address) }
    var mask: UInt32 { prefixLength == 0 ? 0 : ~UInt32(0) << UInt32(32 - prefixLength) }
    var network: UInt32 { address & mask }
    var broadcast: UInt32 { network | ~mask }
    func contains(_ other: UInt32) -> Bool { other & mask == network }
    /// Whether a host may have it: not the network's own address, nor its broadcast address.
    func isHost(_ other: UInt32) -> Bool { contains(other) && (prefixLength > 30 || (other != network && other != broadcast)) }

    static func text(_ address: UInt32) -> String { (0..<4).map { "\(address >> UInt32(24 - 8 * $0) & 255)" }.joined(separator: ".") }

    /// Dotted, four decimal numbers.
    static func address(_ text: String) -> UInt32? {
        let parts = text.split(separator: ".", omittingEmptySubsequences: false)
        guard parts.count == 4 else { return nil }
        var address: UInt32 = 0
        for part in parts {
            guard part.allSatisfy({ $0.isASCII && $0.isNumber }), let byte = UInt8(part) else { return nil }
            address = address << 8 | UInt32(byte)
        }
        return address
    }
}

/// What the recovery network `bridge` is: a bridge of the appliance's host that is there already, or one of its own.
public struct BridgeSettings: Sendable, Codable, Hashable {
    /// A bridge that somebody else set up, and keeps.
    public var name: String?
    /// Of a bridge that is made for these machines and goes with the last of them: its network, with the address that the host has in it.
    public var subnet: IPv4Interface?
    /// Whether addresses of `subnet` are given out; nil: yes.
    public var dhcp: Bool?

    init() {}
    public init(name: String) { self.name = name }
    public init(subnet: IPv4Interface, dhcp: Bool = true) {
        self.subnet = subnet
        self.dhcp = dhcp
    }

    /// Of what cannot be: a name that no network interface has, a network without room.
    func check() throws(ApplianceError) {
        switch (name, subnet) {
        case (nil, nil): throw .invalid("the recovery network bridge is either a bridge of this host (its name) or an own one (its subnet, as 10.80.0.1/24): say which")
        case (.some, .some): throw .invalid("a bridge of this host has its own addresses: give its name or a subnet, not both")
        case (let name?, nil):
            // linux/if.h: IFNAMSIZ with its end; net/core/dev.c, dev_valid_name.
            guard (1...15).contains(name.utf8.count), name != ".", name != "..", !name.contains(where: { $0 == "/" || $0 == ":" || $0 == "," || $0.isWhitespace }) else {
                throw .invalid("\(name) is not a network interface's name")
            }
        case (nil, let subnet?):
            guard (8...29).contains(subnet.prefixLength) else { throw .invalid("a recovery network has a prefix length of 8 to 29, not \(subnet.prefixLength)") }
            guard subnet.isHost(subnet.address) else {
                throw .invalid("\(subnet) has the address of the network itself: write the one that this host is to have in it, as \(IPv4Interface.text(subnet.network + 1))/\(subnet.prefixLength)")
            }
        }
    }
}

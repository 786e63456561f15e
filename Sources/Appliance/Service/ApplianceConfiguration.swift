import Foundation
import Replica

/// What `afterimage appliance` is started with.
public struct ApplianceConfiguration: Sendable {
    /// Catalogue, CA, machines' files. Mode 0700.
    public var stateDirectory: String
    public var storeDirectory: String
    /// Sockets of machines and exports: a short path, since a unix socket's has at most 107 bytes.
    public var runtimeDirectory: String
    public var listen: ListenAddress
    public var link: ListenAddress
    /// Host name or address by which agents reach this appliance; nil: the addresses listened on.
    public var advertisedHost: String?
    public var qemu: QEMUConfiguration
    public var upkeep: UpkeepConfiguration
    /// After a failover the machine's disks become independent of recovery points, in the background.
    public var hydrates = true
    /// How often is looked for what is wrong.
    public var alertsEverySeconds = 5.0
    /// How often is looked for drills that are due.
    public var drillSchedulesEverySeconds = 5.0

    public init(
        stateDirectory: String, storeDirectory: String, runtimeDirectory: String = "/run/afterimage",
        listen: ListenAddress = ListenAddress(host: "127.0.0.1", port: 8443), link: ListenAddress = ListenAddress(host: "127.0.0.1", port: 8444),
        advertisedHost: String? = nil, qemu: QEMUConfiguration = QEMUConfiguration(), upkeep: UpkeepConfiguration = UpkeepConfiguration()
    ) {
        self.upkeep = upkeep
        self.stateDirectory = stateDirectory
        self.storeDirectory = storeDirectory
        self.runtimeDirectory = runtimeDirectory
        self.listen = listen
        self.link = link
        self.advertisedHost = advertisedHost
        self.qemu = qemu
    }

    /// Names and addresses for the server certificate.
    var certificateHosts: [String] {
        var hosts: [String] = []
        for host in [advertisedHost, listen.host, link.host, "127.0.0.1", "::1", "localhost"].compactMap({ $0 })
        where !hosts.contains(host) && host != "0.0.0.0" && host != "::" {
            hosts.append(host)
        }
        return hosts
    }
}

/// What the store does by itself.
public struct UpkeepConfiguration: Sendable, Hashable {
    /// A look for work at least this often; a policy's finest tier is that much late at most.
    public var everySeconds: Double
    /// Reads and writes of merging and moving data; 0 = no limit.
    public var bytesPerSecond: UInt64
    /// Recovery points may go before their time when space is low and nothing else helps: see `ReplicaStore.setTightening`.
    public var tightensWhenLow: Bool
    public var scrub: ScrubConfiguration
    public init(
        everySeconds: Double = 10, bytesPerSecond: UInt64 = 64 << 20, tightensWhenLow: Bool = false, scrub: ScrubConfiguration = ScrubConfiguration()
    ) {
        self.everySeconds = everySeconds
        self.bytesPerSecond = bytesPerSecond
        self.tightensWhenLow = tightensWhenLow
        self.scrub = scrub
    }
}

/// How everything in the store is read again and again, so that damage is found while it can still be repaired. At 8 MiB/s a TiB takes
/// a day and a half.
public struct ScrubConfiguration: Sendable, Hashable {
    /// 0 = never.
    public var bytesPerSecond: UInt64
    /// From the end of one pass to the beginning of the next.
    public var pauseSeconds: Double
    public init(bytesPerSecond: UInt64 = 8 << 20, pauseSeconds: Double = 86_400) {
        self.bytesPerSecond = bytesPerSecond
        self.pauseSeconds = pauseSeconds
    }
}

/// HOST:PORT, IPv6 in brackets; port 0 takes a free one.
public struct ListenAddress: Sendable, Hashable, CustomStringConvertible {
    public var host: String
    public var port: Int
    public init(host: String, port: Int) {
        self.host = host
        self.port = port
    }

    public init?(_ text: String) {
        guard let colon = text.lastIndex(of: ":"), let port = Int(text[text.index(after: colon)...]), (0...65535).contains(port) else { return nil }
        var host = String(text[..<colon])
        if host.hasPrefix("["), host.hasSuffix("]") {
            host = String(host.dropFirst().dropLast())
        } else if host.contains(":") {
            return nil
        }
        guard !host.isEmpty else { return nil }
        self.init(host: host, port: port)
    }

    public var description: String { host.contains(":") ? "[\(host)]:\(port)" : "\(host):\(port)" }
    var isEverywhere: Bool { host == "0.0.0.0" || host == "::" }
}

/// What a client needs to reach an appliance: STATE/client.json, mode 0600.
public struct ClientProfile: Sendable, Codable, Hashable {
    public var url: String
    /// PEM of the appliance's CA: the only one that is trusted.
    public var caFile: String
    public var token: String
    public init(url: String, caFile: String, token: String) {
        self.url = url
        self.caFile = caFile
        self.token = token
    }

    public static let defaultPath = "/var/lib/afterimage/appliance/client.json"

    /// Replaces the file; only its owner can read it.
    public func write(to path: String) throws {
        try KeyFile.write(String(decoding: try APIJSON.encoder(pretty: true).encode(self), as: UTF8.self) + "\n", to: path, mode: 0o600)
    }

    public static func load(path: String) throws(ApplianceError) -> ClientProfile {
        guard let data = FileManager.default.contents(atPath: path) else {
            throw .failed("cannot read the profile \(path) (it is written by the appliance as STATE/client.json; give --profile FILE or AFTERIMAGE_PROFILE)")
        }
        do { return try JSONDecoder().decode(ClientProfile.self, from: data) } catch {
            throw .failed("\(path) is not a profile: \(error)")
        }
    }
}

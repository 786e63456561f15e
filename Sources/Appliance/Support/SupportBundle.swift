import Foundation
import GRDB
import Glibc

/// What somebody who helps needs to see, in one .tar.gz: no secrets, no data of protected disks, and never more than it is sent for.
struct SupportBundle: Sendable {
    /// Of one file.
    static let fileBytesMax = 8 << 20
    /// Of the tail of a machine's console or QEMU's log.
    static let tailBytesMax = 256 << 10
    /// Of all files together; what comes after is left out, and said.
    static let totalBytesMax = 64 << 20

    let lifecycle: Lifecycle
    let catalogue: Catalogue
    var log = RecentLog.shared

    private static let readMe = """
        A support bundle of an Afterimage appliance.

        In it: status and store figures; the catalogue, without hashes, tokens, secrets, passwords, where alerts are delivered and what
        recovery plans' scripts are given; the newest tasks with their logs (also what scripts wrote); the audit log; the ends of recovery
        machines' consoles and of QEMU's logs; the newest lines of the appliance's log; facts of the host and its kernel.
        Names of servers, hosts, disks, networks and addresses are in it, and whatever machines write to their consoles: look before you
        hand it on.

        """

    /// Hands out the bundle piece by piece.
    func write(to give: ([UInt8]) async throws -> Void) async throws {
        let tar = try TarStream(), secrets = try await catalogue.read { db in try SupportSecrets(db) }
        var total = 0, left: [String] = []
        func add(_ name: String, _ text: String) async throws {
            var bytes = Array(secrets.removed(from: text).utf8)
            if bytes.count > Self.fileBytesMax { bytes = Array("(only the end)\n".utf8) + bytes.suffix(Self.fileBytesMax) }
            guard total + bytes.count <= Self.totalBytesMax else {
                left.append(name)
                return
            }
            total += bytes.count
            try tar.add("afterimage-support/" + name, bytes)
            let piece = tar.take()
            if !piece.isEmpty { try await give(piece) }
        }
        try await add("README", Self.readMe)
        try await add("version", afterimageVersion + "\n" + APIJSON.text(Date()) + "\n")
        let encoder = APIJSON.encoder(pretty: true)
        try await add("status.json", Self.text(try encoder.encode(try await lifecycle.status())))
        try await add("store.json", Self.text(try encoder.encode(await lifecycle.storeReport())))
        for (name, text) in try await catalogue.read({ db in try SupportCatalogue.files(db) }) { try await add(name, text) }
        try await add("tasks", try await catalogue.read { db in try SupportCatalogue.tasks(db) })
        try await add("appliance.log", log.all.joined(separator: "\n") + "\n")
        for (name, path) in await lifecycle.machines.logs() { try await add("machines/\(name)", Self.tail(path)) }
        for (name, path) in Self.hostFiles { try await add("host/\(name)", Self.tail(path)) }
        try await add("host/uname", Self.kernel())
        if !left.isEmpty { try await add("left-out", "too much for one bundle:\n" + left.joined(separator: "\n") + "\n") }
        try tar.end()
        try await give(tar.take())
    }

    private static func text(_ data: Data) -> String { String(decoding: data, as: UTF8.self) + "\n" }

    private static let hostFiles = [
        ("os-release", "/etc/os-release"), ("version", "/proc/version"), ("memory", "/proc/meminfo"), ("processors", "/proc/cpuinfo"), ("load", "/proc/loadavg"), ("uptime", "/proc/uptime"),
        ("mounts", "/proc/self/mounts"), ("partitions", "/proc/partitions"), ("limits", "/proc/self/limits"), ("process", "/proc/self/status"), ("memory-pressure", "/proc/pressure/memory"),
        ("io-pressure", "/proc/pressure/io"), ("interfaces", "/proc/net/dev"),
    ]

    private static func kernel() -> String {
        var name = utsname()
        guard uname(&name) == 0 else { return "unknown\n" }
        func text<T>(_ field: T) -> String { withUnsafeBytes(of: field) { String(decoding: $0.prefix { $0 != 0 }, as: UTF8.self) } }
        return [text(name.sysname), text(name.release), text(name.version), text(name.machine)].joined(separator: " ") + "\n"
    }

    /// The end of a file. Those of /proc have no size, and are read from their beginning.
    private static func tail(_ path: String) -> String {
        let fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK)
        guard fd >= 0 else { return "cannot read \(path): \(String(cString: strerror(errno)))\n" }
        defer { close(fd) }
        let size = Int(lseek(fd, 0, SEEK_END))
        lseek(fd, off_t(max(0, size - tailBytesMax)), SEEK_SET)
        var bytes: [UInt8] = [], chunk = [UInt8](repeating: 0, count: 64 << 10)
        while bytes.count < tailBytesMax {
            let count = read(fd, &chunk, chunk.count)
            guard count > 0 else { break }
            bytes += chunk[..<count]
        }
        return String(decoding: bytes, as: UTF8.self)
    }
}

import BlockTap
import Foundation
import Replica

/// The agent's state directory: the lock that makes it the only agent there, its enrolment, and the sizes of the disks it
/// has protected.
///
///     STATE/lock                    held while the agent runs
///     STATE/disks.json              name → size in bytes when last protected
///     STATE/added-disks.json        disks that the appliance has had added to those of the command line
///     STATE/tap-name                what the live tap's pins are called after
///     STATE/script-pending          see `scriptPendingFile`
///     STATE/held                    see `mayBeHeld`
///     STATE/configuration.json      see `ConfigurationCopy`
///     STATE/tracked.json            whose replica the live tap's bitmaps are relative to
///     STATE/enrolment/{key.pem,cert.pem,ca.pem,link.json}
final class AgentState: @unchecked Sendable {
    let directory: URL
    private let lockFD: Int32

    struct Link: Codable, Sendable {
        var host: String
        var port: Int
        var serverName: String
    }

    init(directory path: String) throws {
        directory = URL(fileURLWithPath: path, isDirectory: true)
        try FileManager.default.createDirectory(at: directory, withIntermediateDirectories: true, attributes: [.posixPermissions: 0o700])
        let lockPath = directory.appendingPathComponent("lock").path
        lockFD = open(lockPath, O_RDWR | O_CREAT | O_CLOEXEC, 0o600)
        guard lockFD >= 0 else { throw AgentError("cannot open \(lockPath): \(String(cString: strerror(errno)))") }
        guard lockFile(lockFD) == 0 else {
            close(lockFD)
            throw AgentError("another agent is running with the state directory \(path): stop it first, or give this one a directory of its own (--state)")
        }
    }

    deinit { close(lockFD) }

    // MARK: disks

    private var disksFile: URL { directory.appendingPathComponent("disks.json") }

    /// Refuses a disk that shrank since it was last protected, then remembers the sizes.
    func rememberSizes(_ disks: [(name: String, path: String, bytes: UInt64)], acceptsSmaller: Bool) throws {
        var sizes: [String: UInt64] = [:]
        if let data = try? Data(contentsOf: disksFile) { sizes = try JSONDecoder().decode([String: UInt64].self, from: data) }
        for (name, path, bytes) in disks {
            if let before = sizes[name], bytes < before, !acceptsSmaller {
                throw AgentError(
                    "disk \(name) (\(path)) has \(bytes) bytes now and had \(before) when it was last protected: "
                        + "is it the right device? (--accept-smaller-disks if it is; its replica cannot follow, so the server is then added anew)")
            }
            sizes[name] = bytes
        }
        let encoder = JSONEncoder()
        encoder.outputFormatting = [.sortedKeys]
        try KeyFile.write(String(decoding: try encoder.encode(sizes), as: UTF8.self), to: disksFile.path, mode: 0o600)
    }

    private var addedDisksFile: URL { directory.appendingPathComponent("added-disks.json") }

    func addedDisks() throws -> [AddedDisk] {
        guard let data = FileManager.default.contents(atPath: addedDisksFile.path) else { return [] }
        return try JSONDecoder().decode([AddedDisk].self, from: data)
    }

    /// One with the same name takes the other's place.
    func addDisks(_ disks: [AddedDisk]) throws {
        let all = try addedDisks().filter { old in !disks.contains { $0.name == old.name } } + disks
        let encoder = JSONEncoder()
        encoder.outputFormatting = [.sortedKeys]
        try KeyFile.write(String(decoding: try encoder.encode(all), as: UTF8.self), to: addedDisksFile.path, mode: 0o600)
    }

    /// There while the pre-script may have stopped applications and the post-script has not run.
    var scriptPendingFile: String { directory.appendingPathComponent("script-pending").path }

    /// There while file systems may be frozen that the end of this process does not thaw.
    private var heldFile: String { directory.appendingPathComponent("held").path }

    var mayBeHeld: Bool { access(heldFile, F_OK) == 0 }

    func setHeld(_ isHeld: Bool) throws {
        if isHeld { try KeyFile.write("", to: heldFile, mode: 0o600) } else { unlink(heldFile) }
    }

    static func configurationFile(_ state: String) -> String { URL(fileURLWithPath: state, isDirectory: true).appendingPathComponent("configuration.json").path }

    /// The appliance's, in case that it loses its own.
    func keepConfiguration(_ text: String) throws { try KeyFile.write(text, to: Self.configurationFile(directory.path), mode: 0o600) }

    // MARK: live tap

    /// Whether the agent with this state directory has ever followed disks.
    static func hasTap(_ directory: String) -> Bool { access(URL(fileURLWithPath: directory, isDirectory: true).appendingPathComponent("tap-name").path, F_OK) == 0 }

    /// Made once.
    func tapName() throws -> String {
        let file = directory.appendingPathComponent("tap-name")
        if let name = try? String(contentsOf: file, encoding: .utf8), !name.isEmpty { return name }
        let name = String(UInt64.random(in: .min ... .max), radix: 16)
        try KeyFile.write(name, to: file.path, mode: 0o600)
        return name
    }

    struct Tracked: Codable {
        var group: String
        var instance: String
    }

    private var trackedFile: URL { directory.appendingPathComponent("tracked.json") }

    func tracked() throws -> Tracked? {
        guard let data = try? Data(contentsOf: trackedFile) else { return nil }
        return try JSONDecoder().decode(Tracked.self, from: data)
    }

    func track(_ tracked: Tracked?) throws {
        guard let tracked else {
            try? FileManager.default.removeItem(at: trackedFile)
            return
        }
        try KeyFile.write(String(decoding: try JSONEncoder().encode(tracked), as: UTF8.self), to: trackedFile.path, mode: 0o600)
    }

    // MARK: enrolment

    static func enrolmentDirectory(_ state: String) -> URL { URL(fileURLWithPath: state, isDirectory: true).appendingPathComponent("enrolment", isDirectory: true) }

    /// Nil until `afterimage agent enroll` has been run.
    func enrolment() throws -> (endpoint: LinkEndpoint, serverName: String)? { try Self.enrolment(directory.path) }

    static func enrolment(_ state: String) throws -> (endpoint: LinkEndpoint, serverName: String)? {
        let base = enrolmentDirectory(state)
        let linkFile = base.appendingPathComponent("link.json")
        guard let data = try? Data(contentsOf: linkFile) else { return nil }
        let link = try JSONDecoder().decode(Link.self, from: data)
        let identity = try TLSIdentity(certificateFile: base.appendingPathComponent("cert.pem").path, keyFile: base.appendingPathComponent("key.pem").path)
        let ca = try String(contentsOf: base.appendingPathComponent("ca.pem"), encoding: .utf8)
        return (LinkEndpoint(host: link.host, port: link.port, identity: identity, caCertificatePEM: ca), link.serverName)
    }
}

/// The copy that an agent keeps of its appliance's configuration, for people. Throws when there is none.
public enum AgentConfigurationCopy {
    public static func text(stateDirectory: String) throws -> String {
        let file = AgentState.configurationFile(stateDirectory)
        guard let data = FileManager.default.contents(atPath: file) else {
            throw AgentError("there is no \(file): the appliance sends it when the agent connects")
        }
        return String(decoding: data, as: UTF8.self)
    }
}

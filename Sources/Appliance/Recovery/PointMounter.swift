import BlockTap
import Foundation
import Glibc
import Logging
import Replica

/// File systems of recovery points, mounted read-only on the appliance's host: file-level restore.
///
///     recovery point → NBD (unix socket, this process) → nbdfuse (a file) → loop device, read-only → mount
///
/// No kernel module is needed beyond FUSE and loop. Whatever is made has the mount's id in its path below the runtime directory, so that
/// `clear` finds and undoes all of it without having made it: after a failure, and at the start after a crash.
actor PointMounter {
    struct Mounted: Sendable {
        var fileSystem: String
        var partition: Int?
        /// nil when the file system was clean.
        var warning: String?
    }

    private let store: ReplicaStore
    private let runtimeDirectory: String
    private let logger: Logger
    private var serving: [String: ServedDisks] = [:]
    private static let readySeconds = 15.0

    init(store: ReplicaStore, runtimeDirectory: String, logger: Logger) {
        self.store = store
        self.runtimeDirectory = runtimeDirectory
        self.logger = logger
    }

    /// Below which everything of a mount lies; its FUSE mount point.
    private nonisolated func fuseDirectory(_ id: String) -> String { "\(runtimeDirectory)/\(id)" }
    private nonisolated func socketPath(_ id: String) -> String { "\(runtimeDirectory)/\(id).sock" }
    private nonisolated func logPath(_ id: String) -> String { "\(runtimeDirectory)/\(id).log" }
    private nonisolated func image(_ id: String) -> String { "\(fuseDirectory(id))/nbd" }

    /// Throws, with the package to install, when this host lacks a program.
    nonisolated func checkPrograms() throws(ApplianceError) {
        for (name, package) in [("nbdfuse", "libnbd-bin"), ("losetup", "mount"), ("mount", "mount"), ("umount", "mount"), ("sfdisk", "fdisk"), ("blkid", "util-linux")] {
            _ = try HostProgram.find(name, package: package)
        }
        guard access("/dev/fuse", R_OK | W_OK) == 0 else {
            throw .failed("this needs FUSE on the appliance's host: there is no usable /dev/fuse (modprobe fuse, and run the appliance as root)")
        }
    }

    /// Brings the whole chain up, or undoes what there is of it.
    func mount(_ record: PointMountRecord, volume: Int) async throws -> Mounted {
        do { return try await bringUp(record, volume) } catch {
            let why = error
            do { try await clear(record, isForced: true) } catch {
                logger.error("cannot undo a mount that failed: \(error)", metadata: ["mount": "\(record.id)"])
            }
            throw why
        }
    }

    private func bringUp(_ record: PointMountRecord, _ volume: Int) async throws -> Mounted {
        let id = record.id
        let group = GroupID(record.server)
        let socket = socketPath(id)
        serving[id] = try await blocking { [store] in
            try ServedDisks.point(group, record.point, store: store, socketPath: socket)
        }
        try FileManager.default.createDirectory(atPath: fuseDirectory(id), withIntermediateDirectories: true, attributes: [.posixPermissions: 0o700])
        let nbdfuse = try HostProgram.find("nbdfuse", package: "libnbd-bin")
        let process = try QEMUProcess.spawn(
            executable: nbdfuse.path, arguments: ["-r", fuseDirectory(id), "nbd+unix:///\(record.disk)?socket=\(socket)"], logPath: logPath(id))
        try await waitForImage(id, process)

        let choice = try await chooseFileSystem(record)
        let losetup = try HostProgram.find("losetup", package: "mount")
        var arguments = ["--find", "--show", "--read-only", "--offset", "\(choice.offsetBytes)"]
        if choice.partition != nil { arguments += ["--sizelimit", "\(choice.sizeBytes)"] }
        let loop = try await losetup.run(arguments + [image(id)], doing: "attach a loop device to the recovery point")
            .trimmingCharacters(in: .whitespacesAndNewlines)
        let warning = try await mountLoop(loop, choice.type, record)
        return Mounted(fileSystem: choice.type, partition: choice.partition, warning: warning)
    }

    private func waitForImage(_ id: String, _ process: QEMUProcess) async throws {
        let deadline = ContinuousClock.now + .seconds(Self.readySeconds)
        while access(image(id), R_OK) != 0 {
            guard process.isAlive, ContinuousClock.now < deadline else {
                let said = (try? String(contentsOfFile: logPath(id), encoding: .utf8))?.trimmingCharacters(in: .whitespacesAndNewlines) ?? ""
                await process.terminate()
                throw ApplianceError.failed("nbdfuse does not serve the recovery point: \(said.isEmpty ? "it said nothing" : said)")
            }
            try await Task.sleep(for: .milliseconds(20))
        }
    }

    /// A mount that fails for want of a journal's replay is tried again without: the loop device is read-only, so nothing can be replayed.
    private func mountLoop(_ loop: String, _ type: String, _ record: PointMountRecord) async throws -> String? {
        let mount = try HostProgram.find("mount", package: "mount")
        // Whatever lies in a replica must not become a program or a device of this host.
        let common = "ro,nosuid,nodev" + (type == "xfs" ? ",nouuid" : "")
        func attempt(_ options: String) async throws -> HostProgram.Outcome {
            try await mount.outcome(["-t", type, "-o", options, loop, record.directory])
        }
        let clean = try await attempt(common)
        if clean.isSuccess { return nil }
        let withoutReplay: String? =
            switch type {
            case "ext3", "ext4": "noload"
            case "xfs": "norecovery"
            case "btrfs": "rescue=nologreplay"
            default: nil
            }
        if let withoutReplay {
            let dirty = try await attempt("\(common),\(withoutReplay)")
            if dirty.isSuccess {
                return "the \(type) file system was in use at the cut, and its journal is not replayed (\(withoutReplay)): what was changed in the last seconds before the cut may be missing or half there; a drill from this point replays it"
            }
        }
        throw ApplianceError.failed("cannot mount the \(type) file system of disk \(record.disk): \(clean.complaint)")
    }

    // MARK: Which file system

    private struct Choice {
        var partition: Int?
        var offsetBytes: UInt64
        var sizeBytes: UInt64
        var type: String
    }

    private struct PartitionTable: Decodable {
        struct Body: Decodable {
            struct Partition: Decodable {
                var node: String
                var start: UInt64
                var size: UInt64
                var name: String?
            }
            var sectorsize: UInt64?
            var partitions: [Partition]?
        }
        var partitiontable: Body
    }

    private func chooseFileSystem(_ record: PointMountRecord) async throws -> Choice {
        let id = record.id
        let size = try FileManager.default.attributesOfItem(atPath: image(id))[.size] as? UInt64 ?? 0
        let whole = try await fileSystem(id, offset: 0, size: size)
        // A partition table is no file system, but a file system may hold what looks like one.
        if record.partition == nil, let whole { return try mountable(Choice(partition: nil, offsetBytes: 0, sizeBytes: size, type: whole), record) }
        let sfdisk = try HostProgram.find("sfdisk", package: "fdisk")
        let answer = try await sfdisk.outcome(["--json", image(id)])
        guard answer.isSuccess, let table = try? JSONDecoder().decode(PartitionTable.self, from: Data(answer.output.utf8)).partitiontable,
            let partitions = table.partitions, !partitions.isEmpty
        else { throw ApplianceError.refused("Disk \(record.disk) has no partitions\(whole == nil ? " and no file system that is known here" : "").") }
        let unit = table.sectorsize ?? 512
        var found: [(number: Int, choice: Choice?, words: String)] = []
        for partition in partitions {
            // sfdisk names them FILE1, FILE2, or FILEp1 when the file's name ends with a digit.
            let digits = String(partition.node.reversed().prefix { $0.isNumber }.reversed())
            guard let number = Int(digits), partition.start <= size / unit, partition.size <= size / unit - partition.start else { continue }
            let type = try await fileSystem(id, offset: partition.start * unit, size: partition.size * unit)
            let choice = type.map { Choice(partition: number, offsetBytes: partition.start * unit, sizeBytes: partition.size * unit, type: $0) }
            found.append((number, choice, "\(number) (\(type ?? "no file system"), \(partition.size * unit >> 20) MiB\(partition.name.map { ", " + $0 } ?? ""))"))
        }
        let list = found.map(\.words).joined(separator: ", ")
        if let wanted = record.partition {
            guard let entry = found.first(where: { $0.number == wanted }) else {
                throw ApplianceError.refused("Disk \(record.disk) has no partition \(wanted); it has: \(list).")
            }
            guard let choice = entry.choice else { throw ApplianceError.refused("Partition \(wanted) of disk \(record.disk) holds no file system that is known here.") }
            return try mountable(choice, record)
        }
        let candidates = found.compactMap(\.choice).filter { Self.refusal($0.type) == nil }
        guard candidates.count == 1 else { throw ApplianceError.refused("Name the partition of disk \(record.disk) with --partition: \(list).") }
        return candidates[0]
    }

    private func mountable(_ choice: Choice, _ record: PointMountRecord) throws -> Choice {
        if let why = Self.refusal(choice.type) { throw ApplianceError.refused("Disk \(record.disk)\(choice.partition.map { ", partition \($0)" } ?? "") \(why).") }
        return choice
    }

    private static func refusal(_ type: String) -> String? {
        switch type {
        case "LVM2_member": "belongs to LVM, whose volumes the appliance does not assemble: docs/file-level-restore.md says how to reach them over NBD"
        case "crypto_LUKS": "is encrypted (LUKS): docs/file-level-restore.md says how to reach it over NBD"
        case "linux_raid_member": "is a part of a RAID: docs/file-level-restore.md says how to reach it over NBD"
        case "swap": "is swap space: it holds no files"
        default: nil
        }
    }

    /// blkid's name of what lies there, by looking at it; nil when it knows none.
    private func fileSystem(_ id: String, offset: UInt64, size: UInt64) async throws -> String? {
        let blkid = try HostProgram.find("blkid", package: "util-linux")
        let answer = try await blkid.outcome(["--probe", "--output", "export", "--offset", "\(offset)", "--size", "\(size)", image(id)])
        guard answer.isSuccess else { return nil }
        return answer.output.split(whereSeparator: \.isNewline).first { $0.hasPrefix("TYPE=") }.map { String($0.dropFirst("TYPE=".count)) }
    }

    // MARK: Down again

    /// Undoes whatever there is of a mount, made by this process or by one before it. Throws, with everything left as it is, when
    /// files in it are open; with `isForced` those lose their file system instead.
    func clear(_ record: PointMountRecord, isForced: Bool) async throws {
        let id = record.id
        let umount = try HostProgram.find("umount", package: "mount")
        let loops = Self.loopDevices(on: fuseDirectory(id))
        for mount in Self.mounts() where loops.contains(mount.source) {
            let outcome = try await umount.outcome([mount.point])
            if outcome.isSuccess { continue }
            if !isForced, outcome.complaint.contains("busy") {
                throw ApplianceError.refused("\(mount.point) is in use: close what is open there first (lsof +D \(mount.point) shows what).")
            }
            guard isForced else { throw ApplianceError.refused("cannot unmount \(mount.point): \(outcome.complaint)") }
            logger.warning("\(mount.point) is in use and is taken away: \(outcome.complaint)")
            try await umount.run(["--lazy", mount.point], doing: "unmount \(mount.point)")
        }
        let losetup = try HostProgram.find("losetup", package: "mount")
        for loop in Self.loopDevices(on: fuseDirectory(id)) { try await losetup.run(["--detach", loop], doing: "detach \(loop)") }
        // nbdfuse ends with its mount.
        if Self.mounts().contains(where: { $0.point == fuseDirectory(id) }) {
            let outcome = try await umount.outcome([fuseDirectory(id)])
            if !outcome.isSuccess { try await umount.run(["--lazy", fuseDirectory(id)], doing: "unmount \(fuseDirectory(id))") }
        }
        if let process = QEMUProcess.find(naming: "nbdfuse", fuseDirectory(id)), !(await process.waitForEnd(seconds: 2)) { await process.terminate() }
        await serving.removeValue(forKey: id)?.stop()
        rmdir(fuseDirectory(id))
        unlink(logPath(id))
        unlink(socketPath(id))
    }

    /// Loop devices whose file lies below `directory`.
    private static func loopDevices(on directory: String) -> [String] {
        let names = (try? FileManager.default.contentsOfDirectory(atPath: "/sys/block")) ?? []
        return names.filter { name in
            guard name.hasPrefix("loop"), let file = try? String(contentsOfFile: "/sys/block/\(name)/loop/backing_file", encoding: .utf8) else { return false }
            return file.hasPrefix(directory + "/")
        }.map { "/dev/\($0)" }
    }

    /// proc(5): mountinfo; the newest first, so that what lies on top goes first.
    private static func mounts() -> [(source: String, point: String)] {
        guard let text = try? String(contentsOfFile: "/proc/self/mountinfo", encoding: .utf8) else { return [] }
        return text.split(separator: "\n").reversed().compactMap { line in
            let fields = line.split(separator: " ")
            guard fields.count > 6, let dash = fields.firstIndex(of: "-"), dash + 2 < fields.count else { return nil }
            return (unescaped(fields[dash + 2]), unescaped(fields[4]))
        }
    }

    /// Undoes `\040` and the like.
    private static func unescaped(_ field: Substring) -> String {
        String(field).replacing(/\\([0-7]{3})/) { match in UInt8(match.1, radix: 8).map { String(UnicodeScalar($0)) } ?? String(match.0) }
    }
}

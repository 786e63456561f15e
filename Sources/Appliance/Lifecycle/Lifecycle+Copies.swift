import BlockTap
import Foundation
import GRDB
import Glibc
import Replica

/// Export of a recovery point into a file or onto a device of the appliance's host.
///
/// A file is made under `PATH.afterimage-partial` and gets its name when it has been read back and compared; a task that is cancelled
/// or fails removes it, and one that was cut off with its appliance begins anew. A device has no second name: it holds
/// something usable only when the task says so.
extension Lifecycle {
    static let partialSuffix = ".afterimage-partial"

    public func copyPoint(_ name: String, point: String, _ request: CopyPoint, who: String) async throws -> TaskRecord {
        let found = try await server(name)
        let chosen = try self.point(of: found, named: point)
        let order = try await copyOrder(found, chosen, request)
        let task = try await catalogue.write { db in
            var record = try db.server(found.id)
            try db.refuseWhileWritten(order.path)
            try db.apply(
                .exportRecoveryPoint, to: &record, who: who, hasRecoveryPoint: true,
                detail: "recovery point \(chosen.id), disk \(order.disk), \(order.format.rawValue) \(order.path)")
            return try TaskBoard.plan(.exportRecoveryPoint, server: record, parameters: TaskParameters(copy: order), who: who, in: db)
        }
        await start(task)
        return task
    }

    private func copyOrder(_ server: ServerRecord, _ point: RecoveryPoint, _ request: CopyPoint) async throws -> PointCopyOrder {
        let volume = try volume(of: server, at: point.id, named: request.disk)
        return try await copyOrder(of: volume, point: point.id, request)
    }

    /// Refuses a target that must not be touched.
    func copyOrder(of volume: (index: Int, spec: VolumeSpec), point: RecoveryPointID, _ request: CopyPoint) async throws -> PointCopyOrder {
        let path = request.path
        guard path.hasPrefix("/"), !path.hasSuffix("/"), !path.utf8.contains(0) else {
            throw ApplianceError.invalid("name the target by its absolute path on the appliance's host, not \(path)")
        }
        if request.format == .qcow2 { _ = try HostProgram.find("qemu-img", package: "qemu-utils") }
        let sizeBytes = volume.spec.geometry.sizeBytes
        let isConfirmed = request.confirm == path
        let ownDirectories = [settings.storeDirectory]
        try await blocking {
            if request.format == .device {
                try Lifecycle.checkDevice(path, sizeBytes: sizeBytes, isConfirmed: isConfirmed)
            } else {
                try Lifecycle.checkFile(path, notBelow: ownDirectories)
            }
        }
        return PointCopyOrder(point: point, disk: volume.spec.name, volume: volume.index, format: request.format, path: path)
    }

    /// nil: the only disk.
    func volume(of server: ServerRecord, at point: RecoveryPointID, named name: String?) throws -> (index: Int, spec: VolumeSpec) {
        try Self.volume(try store.volumes(of: point, in: server.group), of: server, named: name)
    }

    static func volume(_ volumes: [VolumeSpec], of server: ServerRecord, named name: String?) throws -> (index: Int, spec: VolumeSpec) {
        let names = volumes.map(\.name).joined(separator: ", ")
        guard let name else {
            guard volumes.count == 1 else { throw ApplianceError.invalid("server \(server.name) has \(volumes.count) disks (\(names)): name one with --disk") }
            return (0, volumes[0])
        }
        guard let index = volumes.firstIndex(where: { $0.name == name }) else {
            throw ApplianceError.notFound("Server \(server.name) has no disk \(name); it has: \(names).")
        }
        return (index, volumes[index])
    }

    private static func checkFile(_ path: String, notBelow directories: [String]) throws {
        let parent = (path as NSString).deletingLastPathComponent
        var isDirectory: ObjCBool = false
        guard FileManager.default.fileExists(atPath: parent, isDirectory: &isDirectory), isDirectory.boolValue else {
            throw ApplianceError.refused("There is no directory \(parent) on the appliance's host.")
        }
        var facts = stat()
        guard lstat(path, &facts) != 0 else {
            throw ApplianceError.refused("There is \(path) on the appliance's host already: nothing is overwritten; choose another name, or remove it.")
        }
        let resolved = URL(fileURLWithPath: parent).resolvingSymlinksInPath().path + "/"
        for directory in directories where resolved.hasPrefix(URL(fileURLWithPath: directory).resolvingSymlinksInPath().path + "/") {
            throw ApplianceError.refused("\(path) lies inside the store (\(directory)): choose a place outside it.")
        }
    }

    private static func checkDevice(_ path: String, sizeBytes: UInt64, isConfirmed: Bool) throws {
        let device = try openDevice(path)
        guard device.geometry.sizeBytes >= sizeBytes else {
            throw ApplianceError.refused("\(path) is too small: it has \(device.geometry.sizeBytes) bytes, the disk has \(sizeBytes).")
        }
        let isEmpty = try DiskCopy.looksEmpty(device)
        guard isEmpty || isConfirmed else {
            throw ApplianceError.refused("\(path) is not empty, and everything on it would be overwritten: confirm it by naming it (--yes \(path)).")
        }
    }

    private static func openDevice(_ path: String) throws -> BlockDevice {
        let device: BlockDevice
        do { device = try BlockDevice.open(path: path, access: .readWrite, exclusive: true) } catch { throw ApplianceError.refused("\(error).") }
        guard device.isBlockDevice else { throw ApplianceError.invalid("\(path) is a file, not a block device: use --to raw") }
        return device
    }

    // MARK: Work

    func performCopy(_ task: TaskRecord) async throws -> TaskResult {
        guard let order = task.parameters.copy, let server = task.server else { throw ApplianceError.failed("task \(task.id ?? 0) does not say what to export") }
        let group = GroupID(server)
        await tasks.log(task, "disk \(order.disk) of recovery point \(order.point) to \(order.path) on the appliance's host (\(Lifecycle.hostName))")
        if let warning = damageWarning(order.point, of: group) { await tasks.log(task, warning) }
        let reader = try await blocking { [store] in try store.openRecoveryPoint(group, order.point, volume: order.volume) }
        let written = try await copy(task, order, reader)
        var result = TaskResult()
        result.recoveryPoint = order.point
        result.path = order.path
        result.writtenBytes = written
        result.message = "\(order.path) on the appliance's host holds disk \(order.disk); everything was read back and is equal"
        let outcome = result
        let isWanted: Bool
        do {
            isWanted = try await catalogue.write { db in
                guard try TaskRecord.fetchOne(db, key: task.id)?.status == .running else { return false }
                try TaskBoard.finish(task, result: outcome, in: db)
                return true
            }
        } catch {
            if order.format != .device { unlink(order.path) }
            throw error
        }
        // Cancelled after its last step: nobody is told of the file, and it goes.
        if !isWanted, order.format != .device { unlink(order.path) }
        return outcome
    }

    /// Writes the order's target, syncs it, reads it back and compares. Returns how many bytes were written. `last`, when that is done: ends
    /// what still writes to the disk and gives its last state; what differs follows, and is compared too. Not for qcow2.
    func copy(_ task: TaskRecord, _ order: PointCopyOrder, _ reader: VolumeReader, last: (() async throws -> VolumeReader)? = nil) async throws -> UInt64 {
        switch order.format {
        case .raw: return try await copyRaw(task, order, reader, last)
        case .qcow2: return try await copyQcow2(task, order, reader)
        case .device:
            let written = try await copying(task, reader) { copy in try copy.writeDevice(Lifecycle.openDevice(order.path)) }
            guard let last else { return written }
            return written + (try await copying(task, last()) { copy in try copy.update(Lifecycle.openDevice(order.path), since: reader) })
        }
    }

    private func copyRaw(_ task: TaskRecord, _ order: PointCopyOrder, _ reader: VolumeReader, _ last: (() async throws -> VolumeReader)?) async throws -> UInt64 {
        let (path, partial) = (order.path, order.path + Lifecycle.partialSuffix)
        // Cut off between the last two steps of an earlier run: it has its name, and its task does not know.
        if Lifecycle.isPublished(partial, as: path) { return try await copying(task, reader) { copy in try copy.verifyFile(path) } }
        do {
            var written = try await copying(task, reader) { copy in
                unlink(partial)
                try copy.writeFile(partial)
            }
            if let last { written += try await copying(task, last()) { copy in try copy.update(partial, since: reader) } }
            try await noteCompared(task, partial)
            try await blocking { try Lifecycle.publish(partial, as: path) }
            return written
        } catch {
            unlink(partial)
            throw error
        }
    }

    /// Runs a copy on a thread of its own and reports how far it is.
    private func copying(_ task: TaskRecord, _ reader: VolumeReader, _ body: @escaping @Sendable (DiskCopy) throws -> Void) async throws -> UInt64 {
        let (copies, continuation) = AsyncStream.makeStream(of: DiskCopy.self)
        let reporter = Task { [tasks] in
            for await copy in copies {
                var meter = RateMeter()
                while !Task.isCancelled {
                    let now = copy.progress
                    meter.note(now.doneBytes)
                    let rate = meter.bytesPerSecond
                    await tasks.report(task, TaskProgress(
                        step: now.step, doneBytes: now.doneBytes, totalBytes: now.totalBytes, bytesPerSecond: rate,
                        secondsLeft: rate > 0 ? Double(now.totalBytes - min(now.totalBytes, now.doneBytes)) / Double(rate) : nil))
                    try? await Task.sleep(for: .milliseconds(250))
                }
            }
        }
        defer { reporter.cancel() }
        return try await onThread("copy-\(task.id ?? 0)") { isCancelled in
            let copy = DiskCopy(reader: reader, isCancelled: isCancelled)
            continuation.yield(copy)
            continuation.finish()
            try body(copy)
            return copy.progress.writtenBytes
        }
    }

    /// qemu-img writes, from an NBD export; another run of it compares.
    private func copyQcow2(_ task: TaskRecord, _ order: PointCopyOrder, _ reader: VolumeReader) async throws -> UInt64 {
        let qemuImg = try HostProgram.find("qemu-img", package: "qemu-utils")
        let (path, partial) = (order.path, order.path + Lifecycle.partialSuffix)
        let socket = exports.path("copy-\(task.id ?? 0)")
        let disks = try await blocking { try ServedDisks.readers([reader], name: "copy-\(task.id ?? 0)", socketPath: socket) }
        let source = "nbd+unix:///\(order.disk)?socket=\(socket)"
        do {
            let isThere = Lifecycle.isPublished(partial, as: path)
            let target = isThere ? path : partial
            if !isThere {
                unlink(partial)
                try await reporting(task, "writing", target, of: reader) {
                    try await qemuImg.run(["convert", "-f", "raw", "-O", "qcow2", "-t", "writeback", source, partial], doing: "make \(partial)")
                }
                guard chmod(partial, 0o600) == 0 else { throw ApplianceError.failed("cannot set the mode of \(partial): \(SystemError.text(of: errno))") }
            }
            try await blocking { try Lifecycle.settle(target) }
            await tasks.report(task, TaskProgress(step: "reading back"))
            try await qemuImg.run(["compare", "-f", "raw", "-F", "qcow2", source, target], doing: "find \(target) equal to the disk in the store")
            let writtenBytes = Lifecycle.allocatedBytes(target)
            if !isThere { try await noteCompared(task, partial) }
            if !isThere { try await blocking { try Lifecycle.publish(partial, as: path) } }
            await disks.stop()
            return writtenBytes
        } catch {
            unlink(partial)
            await disks.stop()
            throw error
        }
    }

    /// Reports what a program has written while it runs, as far as its file's size tells.
    private func reporting(_ task: TaskRecord, _ step: String, _ path: String, of reader: VolumeReader, _ body: () async throws -> Void) async throws {
        var total: UInt64 = 0
        var next: UInt64 = 0
        while let run = reader.nextData(from: next, bytesMax: .max) {
            total += run.upperBound - run.lowerBound
            next = run.upperBound
        }
        let totalBytes = total
        let reporter = Task { [tasks] in
            while !Task.isCancelled {
                await tasks.report(task, TaskProgress(step: step, doneBytes: min(totalBytes, Lifecycle.allocatedBytes(path)), totalBytes: totalBytes))
                try? await Task.sleep(for: .milliseconds(250))
            }
        }
        defer { reporter.cancel() }
        try await body()
    }

    // MARK: After a restart

    /// What copies have left that were cancelled, or had failed, in the moment in which the appliance was killed.
    func removeUnfinishedCopies() async {
        do {
            let paths = try await catalogue.read { db in
                let copies = try TaskRecord.filter([Trigger.exportRecoveryPoint, .promoteMachine].contains(Column("operation"))).order(Column("id").desc).limit(200).fetchAll(db)
                let written = copies.filter { $0.status == .running }.compactMap { $0.parameters.copy?.path }
                return copies.filter { $0.status == .failed && $0.parameters.copy?.format != .device }.compactMap { $0.parameters.copy?.path }.filter { !written.contains($0) }
            }
            for path in paths { unlink(path + Self.partialSuffix) }
        } catch { logger.error("cannot look for files of unfinished copies: \(error)") }
    }

    // MARK: Files

    static let hostName: String = ProcessInfo.processInfo.hostName

    /// Whether an earlier run of the task got as far as the file's name.
    private static func isPublished(_ partial: String, as path: String) -> Bool {
        var named = stat(), other = stat()
        guard lstat(path, &named) == 0 else { return false }
        guard lstat(partial, &other) == 0 else { return true }
        guard named.st_ino == other.st_ino, named.st_dev == other.st_dev else { return false }
        unlink(partial)
        return true
    }

    /// Before a machine's file gets its name: whoever comes after a kill cannot compare it again, since the machine has gone on.
    private func noteCompared(_ task: TaskRecord, _ path: String) async throws {
        if task.operation == .promoteMachine { try await store(task, comparedInode: Lifecycle.inode(path)) }
    }

    /// Before a file is written anew: it may get the number of one that has gone.
    func forgetCompared(_ task: TaskRecord) async throws { try await store(task, comparedInode: nil) }

    private func store(_ task: TaskRecord, comparedInode inode: UInt64?) async throws {
        guard let id = task.id else { return }
        try await catalogue.write { db in
            guard var stored = try TaskRecord.fetchOne(db, key: id) else { return }
            stored.parameters.copy?.comparedInode = inode
            try stored.update(db)
        }
    }

    /// Nil: there is no such file.
    static func inode(_ path: String) -> UInt64? {
        var facts = stat()
        return lstat(path, &facts) == 0 ? UInt64(facts.st_ino) : nil
    }

    private static func exists(_ path: String) -> Bool {
        var facts = stat()
        return lstat(path, &facts) == 0
    }

    static func allocatedBytes(_ path: String) -> UInt64 {
        var facts = stat()
        return stat(path, &facts) == 0 ? UInt64(facts.st_blocks) * 512 : 0
    }

    /// On disk, and out of the page cache.
    private static func settle(_ path: String) throws {
        let fd = open(path, O_RDONLY | O_CLOEXEC)
        guard fd >= 0, fsync(fd) == 0 else { throw ApplianceError.failed("cannot make \(path) durable: \(SystemError.text(of: errno))") }
        posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED)
        close(fd)
    }

    /// Gives a finished file its name, unless somebody has taken that meanwhile, and makes the name durable.
    static func publish(_ partial: String, as path: String) throws {
        if Glibc.link(partial, path) == 0 {
            unlink(partial)
        } else {
            // A file system without hard links.
            let mayRename = errno == EPERM || errno == EOPNOTSUPP || errno == ENOSYS
            guard mayRename, !exists(path), rename(partial, path) == 0 else {
                throw ApplianceError.failed("cannot give \(partial) its name \(path): \(SystemError.text(of: errno))")
            }
        }
        let directory = open((path as NSString).deletingLastPathComponent, O_RDONLY | O_DIRECTORY | O_CLOEXEC)
        guard directory >= 0, fsync(directory) == 0 else { throw ApplianceError.failed("cannot make the name \(path) durable: \(SystemError.text(of: errno))") }
        close(directory)
    }
}

extension Database {
    /// One task at a time writes to a target.
    func refuseWhileWritten(_ path: String) throws {
        let copies = [Trigger.exportRecoveryPoint, .promoteMachine]
        for running in try TaskRecord.filter(Column("status") == TaskStatus.running && copies.contains(Column("operation"))).fetchAll(self)
        where running.parameters.copy?.path == path {
            throw ApplianceError.refused("Task \(running.id ?? 0) writes to \(path): wait for it, or end it (afterimage task cancel \(running.id ?? 0)).")
        }
    }
}

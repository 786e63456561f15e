import Appliance
import ArgumentParser
import Foundation
import Replica

struct RecoveryPointCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "recovery-point", abstract: "Moments that a server can be brought back to.",
        subcommands: [List.self, Create.self, Hold.self, Release.self, Delete.self, Export.self, Unexport.self, Exports.self, Mount.self, Unmount.self, Mounts.self])

    static func path(_ server: String, _ point: String? = nil, _ rest: String = "") -> String {
        "/v1/servers/\(APIClient.segment(server))/recovery-points" + (point.map { "/\(APIClient.segment($0))" } ?? "") + rest
    }

    struct List: ClientCommand {
        static let configuration = CommandConfiguration(abstract: "List a server's recovery points, oldest first.")
        @OptionGroup var global: GlobalOptions
        @Argument(help: "The server's name.") var name: String
        @Option(help: "Only the newest so many.") var limit: Int?
        private static let pageMax = 500

        func validate() throws {
            if let limit, limit < 1 { throw ValidationError("--limit must be at least 1") }
        }

        func run(_ client: APIClient) async throws {
            let points = try await all(client)
            try show(points) {
                points.isEmpty
                    ? ["no recovery points yet"]
                    : Terminal.table(["ID", "CUT", "CONSISTENCY", "PROVEN BY", "DATA", "NOTE"], points.map(RecoveryPointCommand.row))
            }
        }

        /// Page by page, from the newest back.
        private func all(_ client: APIClient) async throws -> [RecoveryPointView] {
            var points: [RecoveryPointView] = []
            while true {
                let wanted = min(Self.pageMax, (limit ?? .max) - points.count)
                let cursor = points.first.map { "&before=\(APIClient.segment($0.point.id.rawValue))" } ?? ""
                let page: [RecoveryPointView]
                do { page = try await client.get(RecoveryPointCommand.path(name) + "?limit=\(wanted)" + cursor) } catch APIClient.Failure.problem(let problem)
                    where problem.status == 404 && !points.isEmpty
                {
                    // The oldest point seen has expired meanwhile, and with it all that were before it.
                    return points
                }
                points = page + points
                if page.count < wanted || points.count == limit { return points }
            }
        }
    }

    struct Create: ClientCommand {
        static let configuration = CommandConfiguration(
            abstract: "Make a recovery point now; with --wait until it is durable.",
            discussion: "Its cut is made after the request. It stays for as long as the policy's longest tier.")
        @OptionGroup var global: GlobalOptions
        @OptionGroup var waiting: WaitOption
        @Argument(help: "The server's name.") var name: String
        @Option(help: "Why it was made.") var note: String?
        @Option(help: "crash, filesystem (its file systems are frozen for a moment) or application (and its agent's scripts are run).") var consistency: Consistency = .crash

        func run(_ client: APIClient) async throws {
            let task: TaskView = try await client.post(RecoveryPointCommand.path(name), CreatePoint(note: note, consistency: consistency == .crash ? nil : consistency))
            try await TaskFollower(client: client, json: global.json).finish(task, wait: waiting.wait)
        }
    }

    struct Hold: ClientCommand {
        static let configuration = CommandConfiguration(abstract: "Hold a recovery point: it neither expires nor can be deleted until it is released.")
        @OptionGroup var global: GlobalOptions
        @Argument(help: "The server's name.") var name: String
        @Argument(help: "A recovery point's ID, or latest.") var point: String
        @Option(name: .customLong("name"), help: "What it is held as.") var holdName: String

        func run(_ client: APIClient) async throws {
            let point: RecoveryPoint = try await client.post(RecoveryPointCommand.path(name, point, "/hold"), HoldPoint(name: holdName))
            try show(point) { ["recovery point \(point.id) is held as \"\(point.hold ?? holdName)\""] }
        }
    }

    struct Release: ClientCommand {
        static let configuration = CommandConfiguration(abstract: "Release a held recovery point; asks for the name that it is held as.")
        @OptionGroup var global: GlobalOptions
        @OptionGroup var confirmation: ConfirmOption
        @Argument(help: "The server's name.") var name: String
        @Argument(help: "The recovery point's ID.") var point: String

        func run(_ client: APIClient) async throws {
            let answer = confirmation.answer("releasing \(point): type the name that it is held as")
            let point: RecoveryPoint = try await client.delete(RecoveryPointCommand.path(name, point, "/hold"), Confirmation(confirm: answer))
            try show(point) { ["recovery point \(point.id) is released; the policy decides now how long it stays"] }
        }
    }

    struct Delete: ClientCommand {
        static let configuration = CommandConfiguration(abstract: "Delete a recovery point for good; asks for its ID.")
        @OptionGroup var global: GlobalOptions
        @OptionGroup var confirmation: ConfirmOption
        @Argument(help: "The server's name.") var name: String
        @Argument(help: "The recovery point's ID.") var point: String

        func run(_ client: APIClient) async throws {
            let answer = confirmation.answer("deleting \(point) for good: type its ID")
            try await client.deleteNoContent(RecoveryPointCommand.path(name, point), Confirmation(confirm: answer))
            say("recovery point \(point) of \(name) is deleted")
        }
    }

    static func row(_ view: RecoveryPointView) -> [String] {
        let point = view.point
        var notes: [String] = []
        if view.isUnreadable { notes.append("DAMAGED: a layer of it cannot be read") }
        if let count = view.damagedBlockCount { notes.append("DAMAGED: \(Words.count(count, "block"))") }
        if let hold = point.hold { notes.append("held as \"\(hold)\"") }
        if point.isOnDemand { notes.append("on demand" + (point.note.map { ": \($0)" } ?? "")) } else if let note = point.note { notes.append(note) }
        return [
            point.id.rawValue, Words.time(nanoseconds: point.cutTimeNanoseconds), point.consistency.rawValue, view.proof.map(Words.proof) ?? "-",
            Words.bytes(point.dataBytes),
            notes.isEmpty ? "-" : notes.joined(separator: "; "),
        ]
    }

    struct Export: ClientCommand {
        static let configuration = CommandConfiguration(
            abstract: "Serve a recovery point's disks read-only over NBD, or write one into a file or onto a device.",
            discussion: """
                Without --to: served over NBD until unexported. With --to raw, qcow2 or device: written to --output, a path on the \
                appliance's host, synced, read back and compared before the task says done. A file gets its name only then; until then it is \
                called NAME.afterimage-partial. Nothing is overwritten, but a device that is confirmed with --yes.
                """)
        @OptionGroup var global: GlobalOptions
        @OptionGroup var waiting: WaitOption
        @Argument(help: "The server's name.") var name: String
        @Argument(help: "A recovery point's ID, or latest.") var position: String?
        @Option(help: "The same, as an option.") var point: String?
        @Option(help: "nbd, raw (a sparse file), qcow2, or device.") var to: Target = .nbd
        @Option(help: ArgumentHelp("Absolute path on the appliance's host.", valueName: "path")) var output: String?
        @Option(help: "The disk; needed when the server has several.") var disk: String?
        @Option(help: ArgumentHelp("The device again: what is on it goes.", valueName: "device")) var yes: String?

        enum Target: String, ExpressibleByArgument, CaseIterable { case nbd, raw, qcow2, device }

        func validate() throws {
            if position != nil, point != nil { throw ValidationError("name the recovery point once") }
            guard to == .nbd else {
                guard let output else { throw ValidationError("--to \(to.rawValue) needs --output PATH") }
                guard output.hasPrefix("/") else { throw ValidationError("--output \(output): the path is one of the appliance's host, so write it from / on") }
                return
            }
            if output != nil || disk != nil { throw ValidationError("--output and --disk need --to raw, qcow2 or device") }
        }

        var request: CopyPoint? {
            guard let format = PointCopyFormat(rawValue: to.rawValue), let output else { return nil }
            return CopyPoint(format: format, path: output, disk: disk, confirm: yes)
        }

        func run(_ client: APIClient) async throws {
            let path = RecoveryPointCommand.path(name, position ?? point ?? "latest")
            guard let request else {
                let export: PointExport = try await client.post(path + "/export")
                try show(export) { ["recovery point \(export.recoveryPoint) of \(export.server):"] + export.uris.map { "  \($0)" } }
                return
            }
            let task: TaskView = try await client.post(path + "/copy", request)
            try await TaskFollower(client: client, json: global.json).finish(task, wait: waiting.wait)
        }
    }

    struct Unexport: ClientCommand {
        static let configuration = CommandConfiguration(abstract: "End an export over NBD.")
        @OptionGroup var global: GlobalOptions
        @Argument(help: "The server's name.") var name: String
        @Option(help: "The recovery point's ID.") var point: String

        func run(_ client: APIClient) async throws {
            try await client.deleteNoContent(RecoveryPointCommand.path(name, point, "/export"))
            say("recovery point \(point) of \(name) is no longer exported")
        }
    }

    struct Exports: ClientCommand {
        static let configuration = CommandConfiguration(abstract: "List the recovery points that are exported over NBD.")
        @OptionGroup var global: GlobalOptions

        func run(_ client: APIClient) async throws {
            let exports: [PointExport] = try await client.get("/v1/exports")
            try show(exports) {
                exports.isEmpty
                    ? ["no recovery point is exported"]
                    : Terminal.table(["SERVER", "RECOVERY POINT", "SOCKET"], exports.map { [$0.server, $0.recoveryPoint.rawValue, $0.socketPath] })
            }
        }
    }

    struct Mount: ClientCommand {
        static let configuration = CommandConfiguration(
            abstract: "Mount a file system of a recovery point read-only on the appliance's host.",
            discussion: "It stays until it is unmounted or the appliance ends. See docs/file-level-restore.md.")
        @OptionGroup var global: GlobalOptions
        @Argument(help: "The server's name.") var name: String
        @Argument(help: "A recovery point's ID, or latest.") var point: String
        @Argument(help: "An empty directory of the appliance's host, from / on.") var directory: String
        @Option(help: "The disk; needed when the server has several.") var disk: String?
        @Option(help: "Number of the partition; needed when several hold a file system.") var partition: Int?

        func validate() throws {
            guard directory.hasPrefix("/") else { throw ValidationError("\(directory): the directory is one of the appliance's host, so write it from / on") }
        }

        func run(_ client: APIClient) async throws {
            let mounted: PointMountView = try await client.post(
                RecoveryPointCommand.path(name, point, "/mount"), MountPoint(directory: directory, disk: disk, partition: partition))
            try show(mounted) { RecoveryPointCommand.words(mounted) }
        }
    }

    static func words(_ mounted: PointMountView) -> [String] {
        let place = "disk \(mounted.disk)" + (mounted.partition.map { ", partition \($0)" } ?? "")
        return ["recovery point \(mounted.recoveryPoint) of \(mounted.server), \(place) (\(mounted.fileSystem ?? "?")): \(mounted.directory), read-only"]
            + (mounted.warning.map { ["  note: \($0)"] } ?? [])
    }

    struct Unmount: ClientCommand {
        static let configuration = CommandConfiguration(abstract: "Unmount a recovery point; refused while files in it are open.")
        @OptionGroup var global: GlobalOptions
        @Argument(help: "The directory that it is mounted on.") var directory: String

        func run(_ client: APIClient) async throws {
            let mounts: [PointMountView] = try await client.get("/v1/mounts")
            let wanted = absolute(directory)
            let resolved = URL(fileURLWithPath: wanted).resolvingSymlinksInPath().path
            guard let mounted = mounts.first(where: { $0.directory == wanted || $0.directory == resolved }) else {
                Terminal.error("no recovery point is mounted on \(wanted) (afterimage recovery-point mounts)")
                throw Exit.notFound
            }
            try await client.deleteNoContent("/v1/mounts/\(APIClient.segment(mounted.id))")
            say("\(mounted.directory) is unmounted")
        }
    }

    struct Mounts: ClientCommand {
        static let configuration = CommandConfiguration(abstract: "List the mounted recovery points.")
        @OptionGroup var global: GlobalOptions

        func run(_ client: APIClient) async throws {
            let mounts: [PointMountView] = try await client.get("/v1/mounts")
            try show(mounts) { mounts.isEmpty ? ["no recovery point is mounted"] : mounts.flatMap(RecoveryPointCommand.words) }
        }
    }
}

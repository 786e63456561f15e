import Appliance
import ArgumentParser
import Foundation

/// The disks of recovery machines.
extension MachineCommand {
    static func path(_ server: String, _ rest: String) -> String { "/v1/servers/\(APIClient.segment(server))/machine/\(rest)" }

    struct Hydrate: ClientCommand {
        static let configuration = CommandConfiguration(
            abstract: "Make a machine's disks independent of recovery points, while it runs.",
            discussion: """
                Afterwards the machine keeps what its disks show and nothing else: what recovery points alone show goes with them, by Commit Failover \
                or before. No data is copied. After a failover it is done by itself (afterimage appliance --no-hydrate turns that off). Paced as \
                --upkeep-rate says; afterimage task cancel ends it.
                """)
        @OptionGroup var global: GlobalOptions
        @OptionGroup var waiting: WaitOption
        @Argument(help: "The server's name.") var name: String
        @Flag(help: "The drill's machine, also when the server is failed over.") var drill = false

        func run(_ client: APIClient) async throws {
            let task: TaskView = try await client.post(MachineCommand.path(name, "hydration"), HydrateMachine(kind: drill ? .drill : nil))
            try await TaskFollower(client: client, json: global.json).finish(task, wait: waiting.wait)
        }
    }

    struct Promote: ClientCommand {
        static let configuration = CommandConfiguration(
            abstract: "Write a failed-over machine's disk into a file or onto a device, to run it without this product.",
            discussion: """
                Of a machine that runs, the disk is copied as it is at one moment, and the machine runs on; with --stop it is shut down first, and \
                the copy has all that it ever wrote. The rest is as for afterimage recovery-point export: synced, read back and compared before \
                the task says done; NAME.afterimage-partial until then; nothing is overwritten, but a device that is confirmed with --yes.
                """)
        @OptionGroup var global: GlobalOptions
        @OptionGroup var waiting: WaitOption
        @Argument(help: "The server's name.") var name: String
        @Option(help: "raw (a sparse file), qcow2, or device.") var to: PointCopyFormat
        @Option(help: ArgumentHelp("Absolute path on the appliance's host.", valueName: "path")) var output: String
        @Option(help: "The disk; needed when the machine has several.") var disk: String?
        @Option(help: ArgumentHelp("The device again: what is on it goes.", valueName: "device")) var yes: String?
        @Flag(help: "Shut the machine down first.") var stop = false
        @Option(help: ArgumentHelp("With --stop: its power is taken when it has not shut itself down by then; default 60.", valueName: "seconds")) var stopTimeout: Int?

        func validate() throws {
            guard output.hasPrefix("/") else { throw ValidationError("--output \(output): the path is one of the appliance's host, so write it from / on") }
            if stopTimeout != nil, !stop { throw ValidationError("--stop-timeout needs --stop") }
        }

        var request: PromoteMachine {
            PromoteMachine(copy: CopyPoint(format: to, path: output, disk: disk, confirm: yes), stop: stop ? true : nil, stopSecondsMax: stopTimeout)
        }

        func run(_ client: APIClient) async throws {
            let task: TaskView = try await client.post(MachineCommand.path(name, "copy"), request)
            try await TaskFollower(client: client, json: global.json).finish(task, wait: waiting.wait)
        }
    }

    /// In `server show`.
    static func words(_ hydration: HydrationView) -> String {
        var words = hydration.isIndependent ? "independent of recovery points" : "shares layers with recovery points"
        if let done = hydration.doneBytes, let total = hydration.totalBytes {
            words += total == 0 ? "; hydration waits for upkeep" : "; hydration at \(Words.bytes(done)) of \(Words.bytes(total)) of index"
        }
        return words + (hydration.problem.map { "; \($0)" } ?? "")
    }
}

extension PointCopyFormat: ExpressibleByArgument {}

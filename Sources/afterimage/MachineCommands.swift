import Appliance
import ArgumentParser
import Foundation

struct MachineCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "machine", abstract: "Recovery machines that run, or have stopped.", subcommands: [Console.self, VNC.self, Stop.self, Hydrate.self, Promote.self])

    struct Console: ClientCommand {
        static let configuration = CommandConfiguration(
            abstract: "Say where a machine's serial console is kept, and show its end.",
            discussion: "The console is a file on the appliance's host; where this command runs elsewhere, or without the right to read it, only its name is shown.")
        @OptionGroup var global: GlobalOptions
        @OptionGroup var choice: MachineChoice
        @Option(help: "Lines to show.") var lines: Int = 40

        func run(_ client: APIClient) async throws {
            let machine = try await choice.machine(client)
            try show(machine) {
                let text = FileManager.default.contents(atPath: machine.consolePath).map { String(decoding: $0.suffix(1 << 20), as: UTF8.self) }
                let end = (text ?? "").split(omittingEmptySubsequences: false, whereSeparator: \.isNewline).suffix(max(1, lines)).map(String.init)
                return ["\(machine.id): \(machine.consolePath)", "follow it on the appliance's host: tail -f \(machine.consolePath)"] + (text == nil ? [] : [""] + end)
            }
        }
    }

    struct VNC: ClientCommand {
        static let configuration = CommandConfiguration(commandName: "vnc", abstract: "Say how a machine's screen is reached.")
        @OptionGroup var global: GlobalOptions
        @OptionGroup var choice: MachineChoice

        func run(_ client: APIClient) async throws {
            let machine = try await choice.machine(client)
            try show(machine) {
                [
                    "\(machine.id): \(machine.vncSocketPath)", "on the appliance's host: vncviewer \(machine.vncSocketPath)",
                    "from elsewhere:          ssh -N -L 5900:\(machine.vncSocketPath) root@HOST, then vncviewer localhost:5900",
                ]
            }
        }
    }

    struct Stop: ClientCommand {
        static let configuration = CommandConfiguration(
            abstract: "Shut a failed-over machine down, by its guest agent or its power button.",
            discussion: "Its disks stay as it left them: afterimage failover start-machine goes on from there. A drill's machine goes by afterimage drill clear --graceful.")
        @OptionGroup var global: GlobalOptions
        @OptionGroup var waiting: WaitOption
        @Argument(help: "The server's name.") var name: String

        func run(_ client: APIClient) async throws {
            let task: TaskView = try await client.delete("/v1/servers/\(APIClient.segment(name))/failover/machine")
            try await TaskFollower(client: client, json: global.json).finish(task, wait: waiting.wait)
        }
    }
}

/// Which of a server's machines is meant.
struct MachineChoice: ParsableArguments {
    @Argument(help: "The server's name.") var name: String
    @Flag(help: "Of its drill, when it is failed over, too.") var drill = false

    func machine(_ client: APIClient) async throws -> InstanceView {
        let server: ServerView = try await client.get("/v1/servers/\(APIClient.segment(name))")
        let machines = server.instances.filter { !drill || $0.kind == .drill }
        guard let machine = machines.last(where: { $0.kind == .failover }) ?? machines.last else {
            Terminal.error("\(name) has no \(drill ? "drill's machine" : "recovery machine") now")
            throw Exit.notFound
        }
        return machine
    }
}

import Appliance
import ArgumentParser
import BlockTap
import Foundation
import Logging
import ServiceLifecycle

struct AgentCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "agent", abstract: "The agent on a protected server.", subcommands: [Run.self, Enroll.self, Detach.self])

    struct Run: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Follow disks and replicate them when the appliance asks.",
            discussion: """
                The live tap (default) follows whole disks where they are, mounted and busy: without a kernel module, a reboot or a pause. It \
                goes on in the kernel when the agent ends; the next agent takes over, and afterimage agent detach ends it. The nbd tap \
                serves a disk, or a disk image, over NBD on a unix socket, for a virtual machine or nbd-client: whatever is written goes \
                through it, so the agent must run before whoever uses the disk. Both begin at once, enrolled or not, connected or not.
                """)
        @Option(help: "live or nbd.") var tap: AgentConfiguration.TapKind = .live
        @Option(help: "State directory: enrolment, disks' sizes.") var state: String = "/var/lib/afterimage/agent"
        @Option(help: "Directory for the nbd taps' sockets (NAME.sock).") var socketDir: String = "/run/afterimage-agent"
        @Option(help: ArgumentHelp("A disk to protect; repeat it, the boot disk first.", valueName: "name=device")) var disk: [String]
        @Flag(help: "Accept that a disk is smaller than when it was last protected; its replica is then made anew.") var acceptSmallerDisks = false
        @Option(help: "nbd tap: memory in MiB for old content of blocks that are overwritten before they were sent.") var preservedMib: Int = 64
        @Option(help: "trace, debug, info, notice, warning or error.") var logLevel: Logger.Level = .info

        func agentConfiguration() throws -> AgentConfiguration {
            let disks = try disk.map { text in
                guard let equals = text.firstIndex(of: "="), equals != text.startIndex, text.index(after: equals) != text.endIndex else {
                    throw ValidationError("--disk \(text): write NAME=DEVICE, for example vda=/dev/sda")
                }
                return AgentConfiguration.Disk(name: String(text[..<equals]), devicePath: absolute(String(text[text.index(after: equals)...])))
            }
            return AgentConfiguration(
                stateDirectory: absolute(state), tapKind: tap, socketDirectory: absolute(socketDir), disks: disks, acceptsSmallerDisks: acceptSmallerDisks,
                tap: TapConfiguration(preservedBytesMax: preservedMib << 20))
        }

        func validate() throws {
            guard (1...65536).contains(preservedMib) else { throw ValidationError("--preserved-mib must be between 1 and 65536") }
            _ = try agentConfiguration()
        }

        func run() async throws {
            let configuration = try agentConfiguration()
            try await runDaemon("agent", logLevel: logLevel) { AgentService(configuration: configuration, logger: $0) }
        }
    }

    struct Detach: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "End the live tap of an agent that does not run.",
            discussion: "Nothing of it is left in the kernel. What is written from then on is unknown: a later agent compares or copies everything again.")
        @Option(help: "The agent's state directory.") var state: String = "/var/lib/afterimage/agent"

        func run() async throws {
            do {
                try AgentDetachment.detach(stateDirectory: absolute(state))
                print("no disk is followed by the live tap of \(absolute(state)) any more")
            } catch {
                Terminal.error("\(error)")
                throw Exit.failed
            }
        }
    }

    struct Enroll: AsyncParsableCommand {
        static let configuration = CommandConfiguration(abstract: "Enrol this server with the token that afterimage server add printed.")
        @Option(help: "The one-time token.") var token: String
        @Option(help: "The agent's state directory.") var state: String = "/var/lib/afterimage/agent"

        func run() async throws {
            do {
                let outcome = try await AgentEnrolment.enroll(token: token, stateDirectory: absolute(state))
                print("enrolled as \(outcome.serverName); the agent replicates to \(outcome.linkHost):\(outcome.linkPort) when the appliance asks")
            } catch {
                Terminal.error("\(error)")
                throw Exit.failed
            }
        }
    }
}

extension AgentConfiguration.TapKind: ExpressibleByArgument {}

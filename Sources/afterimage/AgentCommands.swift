import Appliance
import ArgumentParser
import BlockTap
import Foundation
import Logging
import ServiceLifecycle

struct AgentCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "agent", abstract: "The agent on a protected server.", subcommands: [Run.self, Rescue.self, Disks.self, Enroll.self, Detach.self, Configuration.self])

    /// Of `--disk`.
    static func disks(_ words: [String]) throws -> [AgentConfiguration.Disk] {
        try words.map { text in
            guard let equals = text.firstIndex(of: "="), equals != text.startIndex, text.index(after: equals) != text.endIndex else {
                throw ValidationError("--disk \(text): write NAME=DEVICE, for example vda=/dev/sda")
            }
            return AgentConfiguration.Disk(name: String(text[..<equals]), devicePath: absolute(String(text[text.index(after: equals)...])))
        }
    }

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
        @Flag(help: "Accept that a disk is smaller than when it was last protected. Its replica cannot follow: the server is Abnormal, and is added anew.") var acceptSmallerDisks = false
        @Option(help: "nbd tap: memory in MiB for old content of blocks that are overwritten before they were sent.") var preservedMib: Int = 64
        @Option(help: ArgumentHelp("live tap: read at most so many bytes per second for what can wait: 50MiB; 0 for no limit.", valueName: "bytes")) var readLimit = ByteCount(bytes: 0)
        @Option(help: ArgumentHelp("live tap: at most so many reads in flight (default: 32, and up to 128 while rounds do not shrink).", valueName: "reads")) var readDepth: Int?
        @Option(help: "live tap: normal, low or idle: how its reads stand beside everybody else's, where the disk's scheduler knows priorities.") var readPriority: LiveReadPriority = .low
        @Option(help: ArgumentHelp("live tap: its reads take what time others leave the disks, and this share of it all (a tenth of it where that would not be enough); 100: what they need.", valueName: "percent")) var readShare: Int = 50
        @Option(help: ArgumentHelp("live tap: once the newest recovery point is older, they take what they need, for a while; 0: always.", valueName: "seconds")) var patience: Int = 60
        @Option(help: "live tap: memory in MiB for the blocks of an epoch while it is proven.") var stageMib: Int = 256
        @Flag(inversion: .prefixedNo, help: "live tap: the disks' file systems may be frozen for a moment (at most --freeze-ms).") var freeze = true
        @Option(help: "live tap: how long a freeze may last, milliseconds.") var freezeMs: Int = 500
        @Flag(help: "live tap: also copy what mounted file systems have free.") var copyFreeSpace = false
        @Option(help: ArgumentHelp("Run before a cut that is to be application-consistent: a program that puts what applications hold into their files.", valueName: "path")) var preScript: String?
        @Option(help: ArgumentHelp("Run after it, whatever happened.", valueName: "path")) var postScript: String?
        @Option(help: "How long a script may take, seconds; then it is killed.") var scriptSeconds: Int = 60
        @Option(help: ArgumentHelp("live tap: another device to report to the appliance when it turns up; disks are reported by themselves, loop devices are not.", valueName: "device")) var watchDevice: [String] = []
        @Option(help: ArgumentHelp("live tap: a deliberate fault, for tests: its program does not see issues or completions, now and then.", visibility: .private)) var dropEvents: DroppedEvents?
        @Option(help: "trace, debug, info, notice, warning or error.") var logLevel: Logger.Level = .info

        enum DroppedEvents: String, ExpressibleByArgument { case issues, completions }

        func agentConfiguration() throws -> AgentConfiguration {
            let disks = try AgentCommand.disks(disk)
            var following = LiveTapConfiguration()
            following.readBytesPerSecondMax = readLimit.bytes
            if let readDepth {
                following.readDepth = readDepth
                following.readDepthMax = readDepth
            }
            following.readPriority = readPriority
            following.readShare = Double(readShare) / 100
            following.patienceSeconds = patience
            following.stagingBytesMax = stageMib << 20
            following.freezes = freeze
            following.freezeMilliseconds = freezeMs
            following.skipsFreeSpace = !copyFreeSpace
            // Issues so seldom that some points are proven in between: every missed one has everything compared.
            switch dropEvents {
            case .issues: following.drops.issues = (period: 4_000_000_000, burst: 1_000_000)
            case .completions: following.drops.completions = (period: 20_000_000, burst: 3_000_000)
            case nil: break
            }
            var configuration = AgentConfiguration(
                stateDirectory: absolute(state), tapKind: tap, socketDirectory: absolute(socketDir), disks: disks, acceptsSmallerDisks: acceptSmallerDisks,
                tap: TapConfiguration(preservedBytesMax: preservedMib << 20), live: following)
            configuration.preScript = try script(preScript, "--pre-script")
            configuration.postScript = try script(postScript, "--post-script")
            configuration.scriptSeconds = scriptSeconds
            configuration.watchedDevices = watchDevice.map(absolute)
            return configuration
        }

        private func script(_ path: String?, _ option: String) throws -> String? {
            guard let path = path.map(absolute) else { return nil }
            guard FileManager.default.isExecutableFile(atPath: path) else { throw ValidationError("\(option) \(path): there is no such program") }
            return path
        }

        func validate() throws {
            guard (1...65536).contains(preservedMib) else { throw ValidationError("--preserved-mib must be between 1 and 65536") }
            guard (8...65536).contains(stageMib) else { throw ValidationError("--stage-mib must be between 8 and 65536") }
            guard (1...1024).contains(readDepth ?? 1) else { throw ValidationError("--read-depth must be between 1 and 1024") }
            guard (1...100).contains(readShare) else { throw ValidationError("--read-share must be between 1 and 100") }
            guard (0...86_400).contains(patience) else { throw ValidationError("--patience must be between 0 and 86400") }
            guard (10...10000).contains(freezeMs) else { throw ValidationError("--freeze-ms must be between 10 and 10000") }
            guard (1...3600).contains(scriptSeconds) else { throw ValidationError("--script-seconds must be between 1 and 3600") }
            _ = try agentConfiguration()
        }

        func run() async throws {
            let configuration = try agentConfiguration()
            try await runDaemon("agent", logLevel: logLevel) { AgentService(configuration: configuration, logger: $0) }
        }
    }

    struct Disks: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "List this host's block devices: which of them the live tap can follow, and why not.")
        @Flag(help: "Print JSON.") var json = false

        func run() async throws {
            let devices = LiveTapInspection.devices()
            if json {
                print(String(decoding: try APIJSON.encoder().encode(devices), as: UTF8.self))
                return
            }
            let rows = devices.map { device in
                let use = device.mountPoints + (device.isSwap ? ["swap"] : [])
                let verdict = device.refusal.map { refusal in
                    device.follow.isEmpty || device.follow == [device.path] ? "no: \(refusal)" : "by \(device.follow.joined(separator: ", ")): \(refusal)"
                }
                return [device.path, device.kind.rawValue, Words.bytes(device.sizeBytes), use.isEmpty ? "-" : use.joined(separator: " "), verdict ?? "yes"]
            }
            for line in Terminal.table(["DEVICE", "KIND", "SIZE", "MOUNTED ON", "LIVE TAP"], rows) { print(line) }
        }
    }

    struct Configuration: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Print what the appliance knows of this server's pair, as it was last sent here.",
            discussion: "Should the appliance lose its catalogue: afterimage catalogue import FILE.")
        @Option(help: "The agent's state directory.") var state: String = "/var/lib/afterimage/agent"

        func run() async throws {
            do { print(try AgentConfigurationCopy.text(stateDirectory: absolute(state))) } catch {
                Terminal.error("\(error)")
                throw Exit.failed
            }
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
extension LiveReadPriority: ExpressibleByArgument {}

import Appliance
import ArgumentParser
import Foundation
import Logging

struct ApplianceCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "appliance", abstract: "Run the appliance of the secondary site.",
        discussion: """
            Keeps its catalogue and CA under --state and the replicas under --store. At its first start it makes an administrator's \
            access token and writes STATE/client.json (mode 0600), the profile that the other commands use. SIGTERM ends it \
            gracefully; recovery machines go on without it and find their disks again at its next start.
            """)
    @Option(help: "State directory: catalogue, CA, client.json, machines' consoles.") var state: String = "/var/lib/afterimage/appliance"
    @Option(help: "Store directory: the replicas. Default: STATE/store.") var store: String?
    @Option(help: "Directory for sockets; a short path.") var runtimeDir: String = "/run/afterimage"
    @Option(help: "Where the API listens, HOST:PORT.") var listen: ListenAddress = ListenAddress(host: "127.0.0.1", port: 8443)
    @Option(help: "Where agents' links are taken, HOST:PORT.") var link: ListenAddress = ListenAddress(host: "127.0.0.1", port: 8444)
    @Option(help: "Host name or address by which agents reach this appliance. Default: as listened on.") var advertise: String?
    @Option(help: "QEMU for recovery machines.") var qemu: String = "/usr/bin/qemu-system-x86_64"
    @Option(help: "A directory with QEMU's firmware files (its -L); repeat it.") var qemuData: [String] = []
    @Option(help: "A directory with OVMF, UEFI for machines, before the usual places; repeat it.") var ovmf: [String] = []
    @Option(help: "So many machines boot at once, the others wait; default: half of the processors, at least 2.") var bootsAtOnce: Int?
    @Option(help: "auto, kvm or tcg. auto takes TCG: that /dev/kvm opens does not prove that guests run under it.") var accel: AcceleratorChoice = .auto
    @Option(help: "Merging layers and giving space back reads and writes at most so much per second: 64MiB; 0 for no limit.")
    var upkeepRate: ByteCount = ByteCount(bytes: 64 << 20)
    @Flag(
        inversion: .prefixedNo,
        help: "When the store is nearly full and nothing else helps, drop recovery points before their time, the oldest first; never the newest or held ones.")
    var tightenWhenLow = false
    @Flag(inversion: .prefixedNo, help: "After a failover make the machine's disks independent of recovery points, in the background (see afterimage machine hydrate).")
    var hydrate = true
    @Option(help: "Everything in the store is read again and again, to find damage, at this rate: 8MiB; 0 for never.")
    var scrubRate: ByteCount = ByteCount(bytes: 8 << 20)
    @Option(help: "Rest between two such passes: 90s, 10m, 24h, 7d.") var scrubPause: TimeSpan = TimeSpan(seconds: 86_400)
    @Option(help: "trace, debug, info, notice, warning or error.") var logLevel: Logger.Level = .info

    func validate() throws {
        guard bootsAtOnce.map({ $0 > 0 }) ?? true else { throw ValidationError("--boots-at-once must be more than 0") }
        guard scrubPause.seconds > 0 else { throw ValidationError("--scrub-pause must be more than 0s (--scrub-rate 0 turns scrubbing off)") }
    }

    var applianceConfiguration: ApplianceConfiguration {
        let state = absolute(self.state)
        var configuration = ApplianceConfiguration(
            stateDirectory: state, storeDirectory: store.map(absolute) ?? state + "/store", runtimeDirectory: absolute(runtimeDir), listen: listen,
            link: link, advertisedHost: advertise,
            qemu: QEMUConfiguration(executable: absolute(qemu), dataDirectories: qemuData.map(absolute), firmwareDirectories: ovmf.map(absolute), accelerator: accel, bootsAtOnce: bootsAtOnce),
            upkeep: UpkeepConfiguration(
                bytesPerSecond: upkeepRate.bytes, tightensWhenLow: tightenWhenLow,
                scrub: ScrubConfiguration(bytesPerSecond: scrubRate.bytes, pauseSeconds: Double(scrubPause.seconds))))
        configuration.hydrates = hydrate
        return configuration
    }

    func run() async throws {
        bootstrapLogging(logLevel)
        do {
            try await ApplianceService(configuration: applianceConfiguration, logger: Logger(label: "appliance")).runUntilSignal()
        } catch {
            Terminal.error("the appliance cannot go on: \(error)")
            throw Exit.failed
        }
    }
}

extension Logger.Level: @retroactive ExpressibleByArgument {}

func absolute(_ path: String) -> String {
    path.hasPrefix("/") ? path : FileManager.default.currentDirectoryPath + "/" + path
}

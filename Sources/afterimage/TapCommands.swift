import Appliance
import ArgumentParser
import Foundation
import Logging

struct TapCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "tap", abstract: "A tap by itself, replicating nowhere.", subcommands: [Serve.self])

    struct Serve: AsyncParsableCommand {
        static let configuration = CommandConfiguration(abstract: "Serve one disk over NBD until interrupted.")
        @Option(help: "Block device or image file.") var disk: String
        @Option(help: "Unix socket to listen on.") var socket: String
        @Flag(help: "Serve the device itself, without a tap.") var noTracking = false
        @Option(help: "Close an epoch this often, in milliseconds, and throw it away (0: never).") var cutEvery = 0
        @Option(help: "trace, debug, info, notice, warning or error.") var logLevel: Logger.Level = .info

        func validate() throws {
            guard cutEvery >= 0 else { throw ValidationError("--cut-every must not be negative") }
            guard !(noTracking && cutEvery > 0) else { throw ValidationError("--no-tracking has no epochs to cut") }
        }

        func run() async throws {
            let tracking: TapServer.Tracking = noTracking ? .none : cutEvery == 0 ? .marksOnly : .cuts(everyMilliseconds: cutEvery)
            try await runDaemon("tap", logLevel: logLevel) {
                TapServer(devicePath: absolute(disk), socketPath: absolute(socket), tracking: tracking, logger: $0)
            }
        }
    }
}

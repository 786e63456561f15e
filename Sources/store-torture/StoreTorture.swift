import ArgumentParser
import BlockTap
import Foundation
import Logging

@testable import Replica

/// A store that is killed while it does everything at once; not part of the product. `tools/tests/store-sigkill.sh` kills it.
@main
struct StoreTorture: ParsableCommand {
    static let configuration = CommandConfiguration(commandName: "store-torture", abstract: "Works on a store until it is killed, and verifies what is left.", subcommands: [Run.self, Verify.self])

    struct Places: ParsableArguments {
        @Option(help: "The store.") var directory: String
        @Option(help: "What was acknowledged; on another file system.") var log: String
        @Option(help: "What was under way, for `verify` to tell.") var stages: String
        @Option(help: "What is written follows from it.") var seed: UInt64 = 1
    }

    struct Run: ParsableCommand {
        static let configuration = CommandConfiguration(abstract: "Works until it is killed. Exit code 3 when something is wrong.")
        @OptionGroup var places: Places
        @Option(help: "File to export to.") var target: String

        func run() throws {
            let stages = try Stages(places.stages)
            try TortureDriver(directory: places.directory, log: TortureLog(places.log, seed: places.seed), stages: stages, target: target, seed: places.seed).run()
        }
    }

    struct Verify: ParsableCommand {
        static let configuration = CommandConfiguration(abstract: "Opens the store and compares it with what was acknowledged.")
        @OptionGroup var places: Places

        func run() throws {
            for stage in Stages.read(places.stages) { print("during \(stage)") }
            let verifier = try TortureVerifier(directory: places.directory, log: TortureLog(places.log, seed: places.seed))
            try verifier.run()
            for problem in verifier.problems { print("WRONG \(problem)") }
            if !verifier.problems.isEmpty { throw ExitCode(1) }
        }
    }
}

let tortureLogger = Logger(label: "store-torture") { label in
    var handler = StreamLogHandler.standardError(label: label)
    handler.logLevel = .warning
    return handler
}

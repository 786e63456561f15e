import ArgumentParser
import Foundation
import Glibc
import Synchronization

/// The lifecycle against a model of its state table; not part of the product. `tools/lifecycle-model` runs it.
@main
struct LifecycleModel: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "lifecycle-model", abstract: "Random operations on real appliances, agents and machines that are killed, against a model of the state table.",
        discussion: """
            One seed is one sequence: two or three servers are protected, two to four operators ask for anything at once, and appliance, agents and machines are \
            killed. Which of them is first is up to the machine, so a seed that failed may have to be run several times. Then everything is healed, must converge, \
            and is taken back to nothing. One line for each sequence that fails, then "N passed, N failed".
            """)
    @Option(help: "Sequences to run.") var sequences = 25
    @Option(help: "The first one's seed; those after it follow. Default: a random one, which is printed.") var seed: UInt64?
    @Option(help: "Sequences at once.") var jobs = 2
    @Option(help: "Operations that are asked for in a sequence.") var operations = 30
    @Option(help: "The program to run.") var program: String?
    @Option(help: "QEMU.") var qemu = "/usr/bin/qemu-system-x86_64"
    @Option(help: "Where everything is made and, of a sequence that fails, left.") var directory: String?
    @Flag(help: "Also say what was done, and why tasks failed.") var verbose = false

    func validate() throws {
        guard sequences > 0, jobs > 0, operations > 0 else { throw ValidationError("--sequences, --jobs and --operations are at least 1") }
    }

    func run() async throws {
        let program = program ?? URL(fileURLWithPath: CommandLine.arguments[0]).deletingLastPathComponent().appendingPathComponent("afterimage").path
        for file in [program, qemu] where access(file, X_OK) != 0 { throw ValidationError("there is no program \(file)") }
        let root = try makeRoot()
        let first = seed ?? UInt64.random(in: 0..<1_000_000_000)
        print("seeds \(first) to \(first + UInt64(sequences) - 1)")
        let interruption = Self.cleanUpAtSignals(root)
        let tally = try await withThrowingTaskGroup(of: (UInt64, RandomSequence.Outcome).self) { group in
            var tally = Tally()
            for index in 0..<sequences {
                if index >= jobs, let (seed, outcome) = try await group.next() { tally.add(seed, outcome, in: root) }
                let seed = first + UInt64(index)
                let sequence = RandomSequence(seed: seed, program: program, qemu: qemu, directory: "\(root)/\(seed)", operationCount: operations)
                group.addTask { (seed, try await sequence.run()) }
            }
            while let (seed, outcome) = try await group.next() { tally.add(seed, outcome, in: root) }
            return tally
        }
        withExtendedLifetime(interruption) {}
        if tally.failed == 0 { try? FileManager.default.removeItem(atPath: root) }
        print(tally.summary(verbose: verbose))
        if tally.failed > 0 { throw ExitCode(1) }
    }

    /// A short path: sockets lie below it.
    private func makeRoot() throws -> String {
        if let directory {
            try FileManager.default.createDirectory(atPath: directory, withIntermediateDirectories: true)
            return URL(fileURLWithPath: directory).path
        }
        var template = Array("\(ProcessInfo.processInfo.environment["TMPDIR"] ?? "/tmp")/model.XXXXXX".utf8CString)
        guard let path = mkdtemp(&template) else { throw Trouble("cannot make a directory in the temporary directory") }
        return String(cString: path)
    }

    /// Nobody's processes outlive an interrupted run.
    private static func cleanUpAtSignals(_ root: String) -> [any DispatchSourceSignal] {
        [SIGINT, SIGTERM].map { number in
            signal(number, SIG_IGN)
            let source = DispatchSource.makeSignalSource(signal: number)
            source.setEventHandler {
                Daemon.startNone()
                // What they start in their last moment is found in the next round.
                for _ in 0..<100 where killAll(below: root) { usleep(20_000) }
                try? FileManager.default.removeItem(atPath: root)
                _exit(128 + number)
            }
            source.resume()
            return source
        }
    }

    /// Returns whether there were any.
    private static func killAll(below root: String) -> Bool {
        var isFound = false
        for entry in (try? FileManager.default.contentsOfDirectory(atPath: "/proc")) ?? [] {
            guard let pid = pid_t(entry), pid != getpid(), let words = FileManager.default.contents(atPath: "/proc/\(pid)/cmdline") else { continue }
            guard String(decoding: words, as: UTF8.self).contains(root + "/") else { continue }
            kill(pid, SIGKILL)
            isFound = true
        }
        return isFound
    }
}

/// Of all sequences.
struct Tally {
    private(set) var passed = 0, failed = 0
    private var counts: [String: Int] = [:], failures: [String: Int] = [:]
    private var places: Set<Place> = []

    mutating func add(_ seed: UInt64, _ outcome: RandomSequence.Outcome, in root: String) {
        counts.merge(outcome.counts) { $0 + $1 }
        failures.merge(outcome.failures) { $0 + $1 }
        places.formUnion(outcome.places)
        let directory = "\(root)/\(seed)"
        guard outcome.violations.isEmpty else {
            failed += 1
            print("seed \(seed) failed (its logs are in \(directory)):")
            for violation in outcome.violations.prefix(8) { print("    \(violation)") }
            fflush(nil)
            return
        }
        passed += 1
        try? FileManager.default.removeItem(atPath: directory)
    }

    func summary(verbose: Bool) -> String {
        let words = counts.sorted { $0.key < $1.key }.map { "\($0.value) \($0.key)" }.joined(separator: ", ")
        var lines = ["\(words); servers were in \(places.count) combinations of states"]
        if verbose {
            lines += places.map { "    \($0)" }.sorted()
            lines += failures.sorted { $0.value > $1.value }.map { "    \($0.value) × \($0.key)" }
        }
        return (lines + ["\(passed) passed, \(failed) failed"]).joined(separator: "\n")
    }
}

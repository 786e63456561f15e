import ArgumentParser
import Foundation
import StoreSimulation

/// Runs the store on simulated files that fail, lie and lose power, against a plain model. A seed gives the same run every time.
@main
struct Simulate: ParsableCommand {
    static let configuration = CommandConfiguration(commandName: "simulate", abstract: "Attacks the store in simulation; prints one line per failing seed.")

    @Option(help: "The first seed.") var seed: UInt64?
    @Option(help: "How many seeds, one after the other.") var seeds: Int?
    @Option(help: "Steps of each seed.") var steps = 400
    @Option(help: "Begin no further seed after so many minutes.") var minutes: Double?
    @Flag(help: "Say at the end how often each of the things happened that a run is to be about.") var counts = false
    @Flag(help: "Name each seed on stderr before it runs, for one that ends the process.") var verbose = false
    @Option(help: ArgumentHelp("A mistake for the store to make, to see how soon it is found out.", visibility: .hidden)) var fault: String?
    @Flag(help: "Tell on stderr what is done, and what the store says to that.") var log = false

    func validate() throws {
        guard steps > 0, seeds.map({ $0 > 0 }) ?? true, minutes.map({ $0 > 0 }) ?? true else { throw ValidationError("--seeds, --steps and --minutes must be positive") }
    }

    func run() throws {
        let count = seeds ?? (minutes != nil ? Int.max : seed != nil ? 1 : 1000)
        let deadline = minutes.map { Date().addingTimeInterval($0 * 60) }
        var (passed, failed) = (0, 0)
        var total = Simulation.Result()
        let began = Date()
        for number in 0..<count {
            if let deadline, Date() >= deadline { break }
            let seed = (self.seed ?? 1) &+ UInt64(number)
            if verbose { FileHandle.standardError.write(Data("seed \(seed)\n".utf8)) }
            do {
                total += try Simulation.run(seed: seed, steps: steps, faultNamed: fault, log: log ? { FileHandle.standardError.write(Data(($0 + "\n").utf8)) } : nil)
                passed += 1
            } catch {
                say("\(error)")
                failed += 1
            }
        }
        if counts { say("\(total.words), in \(Int(Date().timeIntervalSince(began))) s") }
        say("\(passed) passed, \(failed) failed")
        if failed > 0 { throw ExitCode.failure }
    }

    /// At once, also into a pipe.
    private func say(_ line: String) { FileHandle.standardOutput.write(Data((line + "\n").utf8)) }
}

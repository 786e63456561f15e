import ArgumentParser
import Testing

@testable import afterimage

/// As `CommandLineTests`, of recovery plans.
@Suite("Command line of plans")
struct CommandLinePlanTests {
    @Test("every command of a plan parses", arguments: [
        "plan create /x/p.json", "plan edit - --json", "plan list", "plan show p --json", "plan runs p --limit 3", "plan run p --as drill --wait",
        "plan run p --as failover --graceful --without a --without b --yes p", "plan run p --as failover --preview", "plan continue p", "plan resume p --skip --wait", "plan stop p",
        "plan clear p --wait", "plan delete p --yes p",
    ])
    func parses(words: String) throws { _ = try Afterimage.parseAsRoot(words.split(separator: " ").map(String.init)) }

    @Test("wrong usage is exit code 64", arguments: ["plan create", "plan run p", "plan run p --as rehearsal", "plan continue"])
    func refuses(words: String) throws {
        let error = #expect(throws: (any Error).self) { _ = try Afterimage.parseAsRoot(words.split(separator: " ").map(String.init)) }
        #expect(Afterimage.exitCode(for: try #require(error)).rawValue == 64)
    }
}

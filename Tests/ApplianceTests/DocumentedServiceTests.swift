import ArgumentParser
import Foundation
import Logging
import Testing

@testable import Appliance
@testable import afterimage

/// docs/documented-service.md names commands, routes, files and tests: all of them exist.
@Suite("The documented service")
struct DocumentedServiceTests {
    private static let repository = URL(fileURLWithPath: #filePath).deletingLastPathComponent().deletingLastPathComponent().deletingLastPathComponent()
    private static func text(_ path: String) throws -> String { try String(contentsOf: repository.appendingPathComponent(path), encoding: .utf8) }

    private static func commands(_ command: any ParsableCommand.Type, _ path: [String]) -> [String] {
        let words = path + [command._commandName]
        return [words.joined(separator: " ")] + command.configuration.subcommands.flatMap { commands($0, words) }
    }

    @Test("every command, route, file and test that its table names exists")
    func table() async throws {
        let bed = try LifecycleBed()
        let api = API(lifecycle: bed.lifecycle, catalogue: bed.catalogue, logger: Logger(label: "test") { _ in SwiftLogNoOpLogHandler() })
        let routes = Set(api.routes.map { "\($0.method.rawValue) \($0.path)" })
        let commands = Set(Self.commands(Afterimage.self, []))
        var counts = (commands: 0, routes: 0, files: 0, tests: 0)
        for line in try Self.text("docs/documented-service.md").split(separator: "\n") {
            for match in line.matches(of: /`([^`]+)`/) {
                let word = String(match.1)
                if word.hasPrefix("afterimage ") {
                    #expect(commands.contains(word), "there is no command \(word)")
                    counts.commands += 1
                } else if word.wholeMatch(of: /(GET|POST|PUT|DELETE) .*/) != nil {
                    #expect(routes.contains(word), "there is no route \(word)")
                    counts.routes += 1
                } else if word.wholeMatch(of: /[A-Za-z]+\/.*/) != nil && !word.hasSuffix("/") {
                    let path = ["Tests/", "tools/", "docs/"].contains { word.hasPrefix($0) } ? word : "Sources/\(word)"
                    #expect(FileManager.default.fileExists(atPath: Self.repository.appendingPathComponent(path).path), "there is no file \(path)")
                    counts.files += 1
                }
            }
            for match in line.matches(of: /`((?:Tests|tools)\/[^`]+)` "([^"]+)"/) {
                let content = try Self.text(String(match.1))
                #expect(content.contains(match.2), "\(match.1) has no test \(match.2)")
                counts.tests += 1
            }
        }
        #expect(counts.commands > 30 && counts.routes > 20 && counts.files > 60 && counts.tests > 40, "\(counts)")
        try await bed.end()
    }

    @Test("every state of the table is named")
    func states() throws {
        let text = try Self.text("docs/documented-service.md")
        for state in ServerState.allCases where state.phase != .reverse && state.phase != .failback { #expect(text.contains("*\(state.rawValue)*"), "\(state.rawValue)") }
    }
}

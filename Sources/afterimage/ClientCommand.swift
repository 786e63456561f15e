import Appliance
import ArgumentParser
import Foundation

enum ClientProfilePath { static let standard = ClientProfile.defaultPath }
enum ProgramVersion { static let text = afterimageVersion }

/// The exit codes of every operator's command; documented in `afterimage --help` and docs/lifecycle.md.
enum Exit {
    static let failed = ExitCode(1)
    static let refused = ExitCode(3)
    static let notFound = ExitCode(4)
    static let unreachable = ExitCode(5)
    static let forbidden = ExitCode(6)
    static let usage = ExitCode(64)
}

struct GlobalOptions: ParsableArguments {
    @Option(help: ArgumentHelp("The appliance's client profile.", valueName: "file"))
    var profile: String?

    @Flag(help: "Print JSON, as the API gives it.")
    var json = false

    func load() throws -> ClientProfile {
        try ClientProfile.load(path: profile ?? ProcessInfo.processInfo.environment["AFTERIMAGE_PROFILE"] ?? ClientProfile.defaultPath)
    }
}

/// A command that asks the appliance's API; `run` turns its errors into words and exit codes.
protocol ClientCommand: AsyncParsableCommand {
    var global: GlobalOptions { get }
    func run(_ client: APIClient) async throws
}

extension ClientCommand {
    func run() async throws {
        let profile: ClientProfile
        do { profile = try global.load() } catch {
            Terminal.error("\(error)")
            throw Exit.unreachable
        }
        do { try await APIClient.with(profile) { client in try await run(client) } } catch let failure as APIClient.Failure {
            switch failure {
            case .problem(let problem):
                if global.json { Terminal.error(json: problem) } else { Terminal.error(problem.detail) }
                throw switch problem.status {
                case 401, 403: Exit.forbidden
                case 404: Exit.notFound
                case 409, 412: Exit.refused
                case 400, 422: Exit.usage
                default: Exit.failed
                }
            case .unreachable(let why):
                Terminal.error(why)
                throw Exit.unreachable
            case .local(let why):
                Terminal.error(why)
                throw Exit.failed
            }
        }
    }

    /// Of what leaves nothing to show.
    func say(_ line: String) { if !global.json { print(line) } }

    /// JSON when that was asked for, else the lines.
    func show(_ value: some Encodable, _ lines: () -> [String]) throws {
        if global.json { try Terminal.print(json: value) } else { for line in lines() { print(line) } }
    }
}

/// What is written where.
enum Terminal {
    static var isInteractive: Bool { isatty(STDOUT_FILENO) == 1 }

    static func print(json value: some Encodable) throws {
        Swift.print(String(decoding: try APIJSON.encoder(pretty: true).encode(value), as: UTF8.self))
    }

    static func error(_ text: String) { FileHandle.standardError.write(Data("afterimage: \(text)\n".utf8)) }

    static func error(json value: some Encodable) {
        guard let data = try? APIJSON.encoder(pretty: true).encode(value) else { return }
        FileHandle.standardError.write(data + Data("\n".utf8))
    }

    static var columns: Int {
        var size = winsize()
        return ioctl(STDOUT_FILENO, UInt(TIOCGWINSZ), &size) == 0 && size.ws_col > 0 ? Int(size.ws_col) : 100
    }

    /// Less than this is no column for sentences: they go below their row.
    private static let sentenceColumns = 28

    /// Columns are not cut below this.
    private static let columnMin = 8
    /// A last column up to this stays on the line.
    private static let shortColumn = 12

    /// Rows under headings, columns as wide as they need. The last one runs free, or is wrapped on a terminal; where the others are too wide for one, the widest are cut.
    static func table(_ headings: [String], _ rows: [[String]], columns: Int? = Terminal.isInteractive ? Terminal.columns : nil) -> [String] {
        let all = [headings] + rows
        var widths = headings.indices.map { column in all.map { $0[column].count }.max() ?? 0 }
        if let columns {
            let last = widths[widths.count - 1], room = columns - (last <= shortColumn ? last : headings[headings.count - 1].count)
            while widths.dropLast().reduce(0, { $0 + $1 + 2 }) > room, let widest = widths.dropLast().indices.max(by: { widths[$0] < widths[$1] }), widths[widest] > columnMin { widths[widest] -= 1 }
        }
        let indent = widths.dropLast().reduce(0) { $0 + $1 + 2 }
        return all.flatMap { row in
            let first = zip(row, widths).dropLast().map { fitted($0, $1) + "  " }.joined()
            let room = columns.map { $0 - indent } ?? 0
            let last = row[row.count - 1]
            guard let columns, last.count > room else { return [first + last] }
            if room < sentenceColumns, columns > sentenceColumns + 4 { return [String(first.reversed().drop { $0 == " " }.reversed())] + wrapped(last, columns - 4).map { "    " + $0 } }
            let parts = room >= sentenceColumns ? wrapped(last, room) : [last]
            return parts.enumerated().map { ($0 == 0 ? first : String(repeating: " ", count: indent)) + $1 }
        }
    }

    private static func fitted(_ text: String, _ width: Int) -> String {
        text.count > width ? text.prefix(width - 1) + "…" : text.padding(toLength: width, withPad: " ", startingAt: 0)
    }

    /// At spaces; a word that is longer than the room stays whole.
    static func wrapped(_ text: String, _ room: Int) -> [String] {
        var lines = [""]
        for word in text.split(separator: " ", omittingEmptySubsequences: false) {
            if lines[lines.count - 1].isEmpty {
                lines[lines.count - 1] = String(word)
            } else if lines[lines.count - 1].count + 1 + word.count <= room {
                lines[lines.count - 1] += " " + word
            } else {
                lines.append(String(word))
            }
        }
        return lines
    }

    /// `  label         text`, wrapped below its text on a terminal.
    static func field(_ label: String, _ text: String) -> [String] {
        let first = "  " + label.padding(toLength: max(14, label.count + 1), withPad: " ", startingAt: 0)
        let parts = isInteractive && columns - first.count >= 12 ? wrapped(text, columns - first.count) : [text]
        return parts.enumerated().map { ($0 == 0 ? first : String(repeating: " ", count: first.count)) + $1 }
    }
}

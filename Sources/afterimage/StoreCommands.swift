import ArgumentParser
import Foundation
import Replica

/// Exit codes of `store`; documented in docs/store-format.md.
private enum StoreExit {
    static let damaged = ExitCode(1)
    static let impossible = ExitCode(3)
}

struct StoreCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "store", abstract: "Look at a store's files, without an appliance.", subcommands: [Inspect.self, Check.self])

    struct Inspect: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Print a file of a store, or an overview of a store, in words.",
            discussion: "Changes nothing and needs no lock. Goes on behind damage where it can. Exit codes: 0 all is well; 1 damage was found; 3 there is nothing to read; 64 wrong usage.")
        @Argument(help: "Directory of a store, or any file in it.") var path: String
        @Flag(help: "Every extent of a layer and every write of a journal, too.") var all = false
        @Flag(help: "Print JSON: an array with one object per line.") var json = false

        func run() async throws {
            var isFirst = true
            let encoder = JSONEncoder()
            encoder.outputFormatting = [.sortedKeys, .withoutEscapingSlashes]
            let damages: Int
            do {
                damages = try StoreInspect.run(path: path, all: all) { item in
                    if json {
                        let object = (try? encoder.encode(item)).map { String(decoding: $0, as: UTF8.self) } ?? "{}"
                        print(isFirst ? "[\(object)" : ",\n\(object)", terminator: "")
                        isFirst = false
                    } else {
                        print(Self.line(item))
                    }
                }
            } catch {
                StoreWords.error("\(error)")
                throw StoreExit.impossible
            }
            if json { print(isFirst ? "[]" : "]") }
            if damages > 0 { throw StoreExit.damaged }
        }

        static func line(_ item: StoreInspect.Item) -> String {
            let place = item.offsetBytes.map { String($0) } ?? ""
            let padding = String(repeating: " ", count: max(0, 12 - place.count))
            return "\(padding)\(place)  \(item.isDamage ? "DAMAGE: " : "")\(item.text)"
        }
    }

    struct Check: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Verify a whole store that nobody has open, and say which recovery points are exact.",
            discussion: "Changes nothing. Exit codes: 0 everything is as it was written; 1 damage was found; 3 the store cannot be checked (in use, or no store); 64 wrong usage.")
        @Argument(help: "Directory of the store.") var directory: String
        @Flag(help: "Leave the data out: MANIFEST, layers, journals and lengths only.") var noData = false
        @Flag(help: "Print JSON.") var json = false

        func run() async throws {
            let bar = StoreBar(isShown: !json && isatty(STDERR_FILENO) != 0)
            let report: StoreCheck.Report
            do {
                report = try StoreCheck.run(directory: directory, readsData: !noData) { bar.show($0, of: $1) }
            } catch {
                bar.clear()
                StoreWords.error("\(error)")
                throw if case .damaged = error { StoreExit.damaged } else { StoreExit.impossible }
            }
            bar.clear()
            if json {
                let encoder = JSONEncoder()
                encoder.outputFormatting = [.sortedKeys, .prettyPrinted, .withoutEscapingSlashes]
                print(String(decoding: try encoder.encode(report), as: UTF8.self))
            } else {
                for line in StoreWords.lines(report) { print(line) }
            }
            if !report.isClean { throw StoreExit.damaged }
        }
    }
}

/// What a check found, as people read it.
enum StoreWords {
    static func error(_ text: String) { FileHandle.standardError.write(Data("error: \(text)\n".utf8)) }

    static func lines(_ report: StoreCheck.Report) -> [String] {
        var lines = ["store \(report.directory) (\(report.store)): \(report.layerCount) layers, \(report.segmentCount) segments, \(report.forkCount) forks; \(Words.bytes(report.checkedBytes)) checked"]
        for damage in report.damages { lines.append("DAMAGE \(damage.file) at byte \(damage.offsetBytes): \(damage.what)") }
        for view in report.views { lines.append(line(view)) }
        for extent in report.badExtents { lines.append(line(extent)) }
        for note in report.notes { lines.append("note: \(note)") }
        if !report.unnamedFiles.isEmpty {
            lines.append("note: \(report.unnamedFiles.count) files that nothing names; the next start removes them: \(report.unnamedFiles.prefix(5).joined(separator: ", "))\(report.unnamedFiles.count > 5 ? ", …" : "")")
        }
        let points = report.views.filter { $0.kind == "recovery point" }
        let broken = points.filter { $0.state == .unreadable }
        if report.isClean {
            lines.append(report.readsData ? "everything is as it was written" : "no damage was found; data was not read")
        } else {
            lines.append("damage was found: \(broken.count) of \(points.count) disks at recovery points are touched")
        }
        return lines
    }

    static func line(_ view: StoreCheck.View) -> String {
        let what: String =
            switch view.kind {
            case "recovery point": "recovery point \(view.name) of \(view.group), disk \(view.disk)"
            case "fork": "fork \(view.name) of \(view.group), disk \(view.disk)"
            default: "newest state of \(view.group), disk \(view.disk)"
            }
        return switch view.state {
        case .exact: "\(what): exact"
        case .indexed: "\(what): its files are sound"
        case .unreadable: "\(what): unreadable: \(view.problems.joined(separator: "; "))"
        }
    }

    static func line(_ extent: BadExtent) -> String {
        let blocks = extent.count == 1 ? "block \(extent.block)" : "blocks \(extent.block) to \(extent.block + extent.count - 1)"
        let points = extent.recoveryPoints.map(\.rawValue) + extent.forks.map { "fork \($0)" }
        let shown = points.prefix(8).joined(separator: ", ") + (points.count > 8 ? " and \(points.count - 8) more" : "")
        let layers = extent.layers.isEmpty ? "" : " (layer \(extent.layers.map(String.init).joined(separator: ", ")))"
        return "BAD \(blocks) of disk \(extent.disk) of \(extent.group)\(layers): " + (points.isEmpty ? "no recovery point shows them" : "touches \(shown)")
    }
}

/// A bar on the terminal while a store is read.
private final class StoreBar {
    private let isShown: Bool
    private var lastTenths: UInt64?
    private let start = ContinuousClock.now

    init(isShown: Bool) { self.isShown = isShown }

    func show(_ done: UInt64, of total: UInt64) {
        guard isShown, total > 0 else { return }
        let tenths = min(1000, done &* 1000 / total)
        guard tenths != lastTenths else { return }
        lastTenths = tenths
        let filled = Int(tenths) * 30 / 1000
        let elapsed = ContinuousClock.now - start
        let seconds = Double(elapsed.components.seconds) + Double(elapsed.components.attoseconds) / 1e18
        let rate = seconds > 0.2 ? "  \(Words.bytes(UInt64(Double(done) / seconds)))/s" : ""
        let text = "[\(String(repeating: "#", count: filled))\(String(repeating: ".", count: 30 - filled))] \(tenths / 10) %  \(Words.bytes(done)) of \(Words.bytes(total))\(rate)"
        FileHandle.standardError.write(Data("\r\u{1B}[K\(text)".utf8))
    }

    func clear() {
        guard isShown, lastTenths != nil else { return }
        FileHandle.standardError.write(Data("\r\u{1B}[K".utf8))
    }
}

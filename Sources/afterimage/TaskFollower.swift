import Appliance
import ArgumentParser
import Foundation

struct WaitOption: ParsableArguments {
    @Flag(help: "Wait until the task has ended; show its progress. Exit code 1 when it failed. The task does not end when you interrupt this.")
    var wait = false
}

/// The second step of what cannot be taken back.
struct ConfirmOption: ParsableArguments {
    @Option(help: ArgumentHelp("The confirmation, for scripts; else it is asked for on the terminal.", valueName: "name")) var yes: String?

    /// What was typed; nil when nobody could be asked: then the appliance says what it wants.
    func answer(_ question: String) -> String? {
        if let yes { return yes }
        guard isatty(STDIN_FILENO) == 1 else { return nil }
        FileHandle.standardError.write(Data("\(question): ".utf8))
        return readLine()
    }

    /// Shows what will happen; goes on only when `server`'s name was typed or given.
    func agree(to preview: OperationPreview, quietly: Bool) throws {
        if !quietly { for line in preview.words { print("  \(line)") } }
        guard preview.needsConfirmation else { return }
        guard answer("\(preview.operation.rawValue): type the server's name") == preview.server else {
            Terminal.error("\(preview.operation.rawValue) of \(preview.server) is confirmed by its name (--yes \(preview.server)): nothing was done.")
            throw Exit.refused
        }
    }
}

/// Shows a task until it ends: its log as plain lines, on a terminal with a bar below them.
struct TaskFollower {
    let client: APIClient
    let json: Bool
    private static let pollMilliseconds = 100

    /// Prints the task's outcome; throws exit code 1 when it failed.
    func finish(_ task: TaskView, wait: Bool) async throws {
        var task = task
        if wait && task.status == .running { task = try await follow(task) }
        if json {
            try Terminal.print(json: task)
        } else if task.status == .running {
            print("task \(task.id) is running: afterimage task show \(task.id)")
        } else {
            for line in Self.outcome(task) { print(line) }
        }
        if task.status == .failed {
            if !json { Terminal.error(task.error ?? "the task failed") }
            throw Exit.failed
        }
    }

    private func follow(_ first: TaskView) async throws -> TaskView {
        var shown = 0
        let bar = ProgressBar(isShown: !json && Terminal.isInteractive)
        while true {
            let task: TaskView = try await client.get("/v1/tasks/\(first.id)")
            if !json {
                // A task's last line is its outcome, which is shown in full below.
                let lines = (task.log ?? []).dropLast(task.status == .running ? 0 : 1)
                if lines.count > shown {
                    bar.clear()
                    for line in lines.dropFirst(shown) { print("  \(Words.time(line.time))  \(line.line)") }
                    fflush(nil)
                    shown = lines.count
                }
            }
            if task.status != .running {
                bar.clear()
                return task
            }
            if let progress = task.progress { bar.show(progress) }
            try await Task.sleep(for: .milliseconds(Self.pollMilliseconds))
        }
    }

    static func outcome(_ task: TaskView) -> [String] {
        let name = task.server.map { "\(task.operation.rawValue) of \($0)" } ?? task.operation.rawValue
        var lines = ["\(name): \(task.status.rawValue)"]
        guard let result = task.result else { return lines }
        if let message = result.message { lines.append("  \(message)") }
        if let point = result.recoveryPoint {
            lines.append("  recovery point  \(point)" + (result.cutTimeNanoseconds.map { ", cut \(Words.time(nanoseconds: $0))" } ?? ""))
        }
        if let path = result.path { lines.append("  written to      \(path)" + (result.writtenBytes.map { ", \(Words.bytes($0))" } ?? "")) }
        if let generation = result.generation { lines.append("  generation      \(generation)") }
        if let rto = result.rtoSeconds { lines.append("  RTO             \(String(format: "%.2f", rto)) s") }
        if let line = result.bootLine { lines.append("  boot check      \(line)") }
        if let accelerator = result.accelerator { lines.append("  accelerator     \(accelerator)") }
        if let instance = result.instance { lines.append("  machine         \(instance)") }
        return lines
    }
}

/// One line at the bottom of a terminal, rewritten in place.
final class ProgressBar {
    private let isShown: Bool
    private var isDrawn = false
    init(isShown: Bool) { self.isShown = isShown }

    func show(_ progress: TaskProgress) {
        guard isShown else { return }
        print("\r\u{1b}[K" + Self.line(progress, columns: Terminal.columns), terminator: "")
        fflush(nil)
        isDrawn = true
    }

    func clear() {
        guard isDrawn else { return }
        print("\r\u{1b}[K", terminator: "")
        fflush(nil)
        isDrawn = false
    }

    /// `Initial Full Sync [#####.....]  50 %  1.0 MiB of 2.0 MiB  10.0 MiB/s  0.1 s left`
    static func line(_ progress: TaskProgress, columns: Int) -> String {
        guard let done = progress.doneBytes, let total = progress.totalBytes, total > 0 else { return progress.step + " ..." }
        let share = min(1, Double(done) / Double(total))
        var tail = String(format: " %3.0f %%", share * 100) + "  \(Words.bytes(done)) of \(Words.bytes(total))"
        if let rate = progress.bytesPerSecond, rate > 0 { tail += "  \(Words.bytes(rate))/s" }
        if let left = progress.secondsLeft { tail += "  \(Words.seconds(left)) left" }
        let width = min(40, columns - progress.step.count - tail.count - 5)
        guard width >= 5 else { return String((progress.step + tail).prefix(max(1, columns - 1))) }
        let full = Int(share * Double(width))
        return "\(progress.step) [" + String(repeating: "#", count: full) + String(repeating: ".", count: width - full) + "]" + tail
    }
}

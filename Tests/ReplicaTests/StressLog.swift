import Logging
import Synchronization

/// Counts what upkeep did and keeps what went wrong.
final class StressLog: Sendable {
    private let state = Mutex((did: [String: Int](), lines: [String]()))
    var lines: [String] { state.withLock { $0.lines } }
    func count(_ action: String) -> Int { state.withLock { $0.did[action] ?? 0 } }
    var logger: Logger { Logger(label: "test") { _ in Handler(log: self) } }

    private struct Handler: LogHandler {
        let log: StressLog
        var metadata: Logger.Metadata = [:]
        var logLevel = Logger.Level.debug
        subscript(metadataKey key: String) -> Logger.Metadata.Value? {
            get { metadata[key] }
            set { metadata[key] = newValue }
        }
        func log(event: LogEvent) {
            log.state.withLock { state in
                if let did = event.metadata?["did"] { state.did[String("\(did)".prefix { $0 != "(" }), default: 0] += 1 }
                if event.level >= .warning, state.lines.count < 1000 { state.lines.append("\(event.level) \(event.message) \(event.metadata ?? [:])") }
            }
        }
    }
}

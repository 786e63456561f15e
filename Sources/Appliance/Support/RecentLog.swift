import Foundation
import Logging
import Synchronization

/// The newest lines of this process's log, for a support bundle.
public final class RecentLog: Sendable {
    public static let shared = RecentLog()
    static let lineCountMax = 5000
    static let lineBytesMax = 2000
    private let lines = Mutex<(ring: [String], next: Int)>(([], 0))

    public init() {}

    func note(_ line: String) {
        let short = line.utf8.count > Self.lineBytesMax ? String(decoding: line.utf8.prefix(Self.lineBytesMax), as: UTF8.self) + " …" : line
        lines.withLock { state in
            if state.ring.count < Self.lineCountMax { state.ring.append(short) } else { state.ring[state.next] = short }
            state.next = (state.next + 1) % Self.lineCountMax
        }
    }

    /// Oldest first.
    var all: [String] { lines.withLock { $0.ring.count < Self.lineCountMax ? $0.ring : Array($0.ring[$0.next...] + $0.ring[..<$0.next]) } }

    /// A handler that keeps lines here; beside one that writes them.
    public func handler(label: String) -> any LogHandler { Handler(log: self, label: label) }

    private struct Handler: LogHandler {
        let log: RecentLog
        let label: String
        var metadata = Logger.Metadata()
        var metadataProvider: Logger.MetadataProvider?
        var logLevel = Logger.Level.info

        subscript(metadataKey key: String) -> Logger.Metadata.Value? {
            get { metadata[key] }
            set { metadata[key] = newValue }
        }

        func log(event: LogEvent) {
            let all = metadata.merging(event.metadata ?? [:]) { $1 }
            let words = all.sorted { $0.key < $1.key }.map { " \($0.key)=\($0.value)" }.joined()
            log.note("\(APIJSON.text(Date())) \(event.level) \(label):\(words) \(event.message)")
        }
    }
}

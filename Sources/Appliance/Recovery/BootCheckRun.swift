import Foundation

/// Follows a serial console's log until a line matches.
struct SerialFollower {
    private let path: String
    private let regex: Regex<AnyRegexOutput>
    private var offset: UInt64 = 0
    private var partial = Data()
    /// The last lines seen, for the error of a check that fails.
    private(set) var tail: [String] = []
    private static let tailLinesMax = 15
    /// A console without line ends must not grow without bound.
    private static let partialBytesMax = 64 << 10

    init(path: String, pattern: String) throws {
        self.path = path
        regex = try Regex(pattern)
    }

    /// Reads what is new; the first matching line, or nil.
    mutating func poll() throws -> String? {
        guard let file = FileHandle(forReadingAtPath: path) else { return nil }
        defer { try? file.close() }
        try file.seek(toOffset: offset)
        guard let data = try file.readToEnd(), !data.isEmpty else { return nil }
        offset += UInt64(data.count)
        partial.append(data)
        while let end = partial.firstIndex(of: UInt8(ascii: "\n")) {
            let line = SerialFollower.plain(partial[partial.startIndex..<end])
            partial = Data(partial[partial.index(after: end)...])
            if let match = take(line) { return match }
        }
        if partial.count > Self.partialBytesMax { partial = partial.suffix(Self.partialBytesMax) }
        // A prompt ("login: ") has no line end.
        let line = SerialFollower.plain(partial)
        return try regex.firstMatch(in: line) == nil ? nil : line
    }

    private mutating func take(_ line: String) -> String? {
        if !line.isEmpty {
            tail.append(line)
            if tail.count > Self.tailLinesMax { tail.removeFirst() }
        }
        return (try? regex.firstMatch(in: line)) == nil ? nil : line
    }

    /// Without carriage returns and terminal control sequences.
    static func plain(_ bytes: Data) -> String {
        let text = String(decoding: bytes, as: UTF8.self).replacing("\r", with: "")
        return text.replacing(/\u{1b}(\[[0-9;?]*[A-Za-z]|c)/, with: "").trimmingCharacters(in: .whitespaces)
    }
}

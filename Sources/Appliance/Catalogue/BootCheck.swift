/// What decides that a recovery machine is ready.
public enum BootCheck: Sendable, Codable, Hashable {
    /// QEMU runs the machine (QMP says `running`).
    case running
    /// A line of the serial console matches the regular expression.
    case serial(String)
    /// Its guest agent answers.
    case agent
    /// Something in the machine takes a connection to this TCP port.
    case tcp(UInt16)
    /// A program of the appliance's host, given the machine's facts, ends with exit code 0.
    case script(String)
    /// All of them, one after the other.
    case all([BootCheck])

    static let usage = "none, serial:REGEX, agent, tcp:PORT or script:/PATH"

    /// One of `usage`.
    public init(text: String) throws(ApplianceError) {
        func rest(_ kind: String) -> String? { text.hasPrefix(kind + ":") && text.count > kind.count + 1 ? String(text.dropFirst(kind.count + 1)) : nil }
        if text == "none" {
            self = .running
        } else if text == "agent" {
            self = .agent
        } else if let pattern = rest("serial") {
            do { _ = try Regex(pattern) } catch {
                throw .invalid("cannot use the boot check \(text): not a regular expression (\(error))")
            }
            self = .serial(pattern)
        } else if let port = rest("tcp").flatMap({ UInt16($0) }), port > 0 {
            self = .tcp(port)
        } else if let path = rest("script"), path.hasPrefix("/") {
            self = .script(path)
        } else {
            throw .invalid("cannot use the boot check \(text): write \(Self.usage)")
        }
    }

    /// Several must all pass.
    public init(texts: [String]) throws(ApplianceError) {
        var checks: [BootCheck] = []
        for text in texts { checks.append(try BootCheck(text: text)) }
        checks.removeAll { $0 == .running }
        self = checks.isEmpty ? .running : checks.count == 1 ? checks[0] : .all(checks)
    }

    public var text: String {
        switch self {
        case .running: "none"
        case .serial(let pattern): "serial:" + pattern
        case .agent: "agent"
        case .tcp(let port): "tcp:\(port)"
        case .script(let path): "script:" + path
        case .all(let checks): checks.map(\.text).joined(separator: " and ")
        }
    }

    /// One by one; empty when QEMU's word is enough.
    var parts: [BootCheck] {
        switch self {
        case .running: []
        case .all(let checks): checks.flatMap(\.parts)
        default: [self]
        }
    }

    /// Programs of the appliance's host that it runs.
    var hostPrograms: [String] { parts.compactMap { if case .script(let path) = $0 { path } else { nil } } }
}

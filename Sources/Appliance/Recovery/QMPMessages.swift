/// Messages of the QEMU Machine Protocol (QEMU: docs/interop/qmp-spec.rst): JSON, one message a line.

public enum JSONValue: Sendable, Codable, Hashable {
    case null, bool(Bool), number(Double), string(String), array([JSONValue]), object([String: JSONValue])

    public init(from decoder: any Decoder) throws {
        let container = try decoder.singleValueContainer()
        if container.decodeNil() {
            self = .null
        } else if let v = try? container.decode(Bool.self) {
            self = .bool(v)
        } else if let v = try? container.decode(Double.self) {
            self = .number(v)
        } else if let v = try? container.decode(String.self) {
            self = .string(v)
        } else if let v = try? container.decode([JSONValue].self) {
            self = .array(v)
        } else {
            self = .object(try container.decode([String: JSONValue].self))
        }
    }

    public func encode(to encoder: any Encoder) throws {
        var container = encoder.singleValueContainer()
        switch self {
        case .null: try container.encodeNil()
        case .bool(let v): try container.encode(v)
        case .number(let v): try container.encode(v)
        case .string(let v): try container.encode(v)
        case .array(let v): try container.encode(v)
        case .object(let v): try container.encode(v)
        }
    }

    public subscript(_ key: String) -> JSONValue? {
        if case .object(let fields) = self { fields[key] } else { nil }
    }
    public var string: String? { if case .string(let s) = self { s } else { nil } }
    public var number: Double? { if case .number(let n) = self { n } else { nil } }
}

struct QMPRequest: Encodable {
    var execute: String
    var arguments: [String: JSONValue]?
    var id: Int
}

/// Any message from QEMU: the greeting has `QMP`, an answer `return` or `error` with the request's `id`, an event `event`.
struct QMPIncoming: Decodable {
    struct Failure: Decodable {
        var desc: String
    }
    var QMP: JSONValue?
    var `return`: JSONValue?
    var error: Failure?
    var id: Int?
    var event: String?
    var data: JSONValue?
}

public struct QMPEvent: Sendable, Hashable {
    public var name: String
    public var data: JSONValue?
}

public enum QMPError: Error, Sendable, CustomStringConvertible {
    case cannotConnect(path: String, why: String)
    case closed(path: String)
    case timeout(path: String, command: String)
    case refused(command: String, why: String)
    case garbage(path: String, why: String)

    public var description: String {
        switch self {
        case .cannotConnect(let path, let why): "cannot talk to QEMU on \(path): \(why)"
        case .closed(let path): "QEMU closed its control socket \(path): the machine has ended"
        case .timeout(let path, let command): "QEMU did not answer \(command) on \(path) in time"
        case .refused(let command, let why): "QEMU refused \(command): \(why)"
        case .garbage(let path, let why): "QEMU sent something that is not QMP on \(path): \(why)"
        }
    }
}

import Appliance

/// What the API answers, as far as the model looks at it. States are text here: one that nobody knows must not fail to decode.
struct ServerAnswer: Decodable, Sendable {
    struct Instance: Decodable, Sendable {
        var id: String
        var kind: String
        var step: String
    }
    struct Settings: Decodable, Sendable { var isPaused: Bool? }
    var id: String
    var name: String
    var state: String
    var drill: String?
    var reason: String?
    var settings: Settings?
    var instances: [Instance]
    var place: Place { Place(main: state, drill: drill) }
}

struct TaskAnswer: Decodable, Sendable {
    struct Result: Decodable, Sendable { var path: String? }
    var id: Int64
    var server: String?
    var operation: String
    var status: String
    var error: String?
    var result: Result?
    var who: String
}

struct EventAnswer: Decodable, Sendable {
    var id: Int64
    var who: String
    var what: String
    var server: String?
    var before: String?
    var after: String?
    var detail: String?
}

struct PointAnswer: Decodable, Sendable {
    var id: String
    var hold: String?
}

struct EnrolmentAnswer: Decodable, Sendable {
    var server: String
    var token: String
}

struct StatusAnswer: Decodable, Sendable {
    struct Store: Decodable, Sendable {
        var forkCount: Int
        var markCount: Int
        var layerCount: Int
    }
    var servers: [ServerAnswer]
    var store: Store
}

struct ExportAnswer: Decodable, Sendable {
    var server: String
    var recoveryPoint: String
}

struct Ignored: Decodable, Sendable {}

/// A request's body.
enum JSON: Encodable, Sendable, ExpressibleByStringLiteral, ExpressibleByIntegerLiteral, ExpressibleByBooleanLiteral, ExpressibleByDictionaryLiteral, ExpressibleByArrayLiteral {
    case string(String), number(Int), bool(Bool), object([String: JSON]), array([JSON])
    init(stringLiteral value: String) { self = .string(value) }
    init(integerLiteral value: Int) { self = .number(value) }
    init(booleanLiteral value: Bool) { self = .bool(value) }
    init(dictionaryLiteral elements: (String, JSON)...) { self = .object(Dictionary(elements) { $1 }) }
    init(arrayLiteral elements: JSON...) { self = .array(elements) }

    func encode(to encoder: any Encoder) throws {
        var container = encoder.singleValueContainer()
        switch self {
        case .string(let value): try container.encode(value)
        case .number(let value): try container.encode(value)
        case .bool(let value): try container.encode(value)
        case .object(let value): try container.encode(value)
        case .array(let value): try container.encode(value)
        }
    }
}

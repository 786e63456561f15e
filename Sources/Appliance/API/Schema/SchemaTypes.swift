import Foundation

/// A type whose JSON is said by itself.
protocol SchemaDescribed: Decodable {
    static var schema: JSONValue { get }
    /// Any value of it.
    static var sample: Self { get }
}

/// An enumeration with values: an object whose only key is the case's name.
protocol SchemaCases: Decodable {
    static var schemaCases: [String] { get }
}

/// Keys that are not fields but somebody's names.
protocol SchemaMap {
    static var empty: Self { get }
    static func valueSchema(_ book: SchemaBook) throws -> JSONValue
}

extension Dictionary: SchemaMap where Key == String, Value: Decodable {
    static var empty: Self { [:] }
    static func valueSchema(_ book: SchemaBook) throws -> JSONValue { try book.schema(of: Value.self) }
}

extension Bool: SchemaDescribed {
    static var schema: JSONValue { ["type": "boolean"] }
    static var sample: Bool { false }
}
extension String: SchemaDescribed {
    static var schema: JSONValue { ["type": "string"] }
    static var sample: String { "" }
}
extension Double: SchemaDescribed {
    static var schema: JSONValue { ["type": "number"] }
    static var sample: Double { 0 }
}
extension Date: SchemaDescribed {
    static var schema: JSONValue { ["type": "string", "format": "date-time"] }
    static var sample: Date { Date(timeIntervalSince1970: 0) }
}
extension IPv4Interface: SchemaDescribed {
    static var schema: JSONValue { ["type": "string", "pattern": "^[0-9]{1,3}(\\.[0-9]{1,3}){3}/[0-9]{1,2}$"] }
    static var sample: IPv4Interface { IPv4Interface("10.80.0.1/24")! }
}
extension JSONValue: SchemaDescribed {
    static var schema: JSONValue { [:] }
    static var sample: JSONValue { .null }
}

extension SchemaDescribed where Self: FixedWidthInteger {
    static var schema: JSONValue {
        var schema: [String: JSONValue] = ["type": "integer"]
        // Larger limits are not numbers of JSON that everybody reads alike.
        if Self.bitWidth < 64 {
            schema["minimum"] = .number(Double(Self.min))
            schema["maximum"] = .number(Double(Self.max))
        } else if !Self.isSigned {
            schema["minimum"] = 0
        }
        return .object(schema)
    }
    static var sample: Self { 0 }
}
extension Int: SchemaDescribed {}
extension Int32: SchemaDescribed {}
extension Int64: SchemaDescribed {}
extension UInt8: SchemaDescribed {}
extension UInt16: SchemaDescribed {}
extension UInt32: SchemaDescribed {}
extension UInt64: SchemaDescribed {}

/// Holds itself.
extension BootCheck: SchemaDescribed {
    static var schema: JSONValue {
        func choice(_ name: String, _ value: JSONValue?) -> JSONValue {
            let inner: JSONValue = value.map { ["type": "object", "properties": ["_0": $0], "required": ["_0"]] } ?? ["type": "object"]
            return ["type": "object", "properties": .object([name: inner]), "required": .array([.string(name)])]
        }
        return ["oneOf": [
            choice("running", nil), choice("serial", String.schema), choice("agent", nil), choice("tcp", UInt16.schema), choice("script", String.schema),
            choice("all", ["type": "array", "items": ["type": "object"]]),
        ]]
    }
    static var sample: BootCheck { .running }
}
extension MachineScript.Place: SchemaCases {
    static let schemaCases = ["guest", "host"]
}

extension JSONValue: ExpressibleByStringLiteral, ExpressibleByIntegerLiteral, ExpressibleByBooleanLiteral, ExpressibleByArrayLiteral, ExpressibleByDictionaryLiteral {
    public init(stringLiteral value: String) { self = .string(value) }
    public init(integerLiteral value: Int) { self = .number(Double(value)) }
    public init(booleanLiteral value: Bool) { self = .bool(value) }
    public init(arrayLiteral elements: JSONValue...) { self = .array(elements) }
    public init(dictionaryLiteral elements: (String, JSONValue)...) { self = .object(Dictionary(uniqueKeysWithValues: elements)) }
}

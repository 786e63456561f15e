/// The JSON that the API's types become, as JSON Schema 2020-12 says it.
///
/// Nothing is written a second time: a type is decoded from a decoder that answers every question with a sample and notes what it was asked, by which key and
/// whether it might be missing. What cannot be learned so is said by `SchemaDescribed` (scalars, dates) and `SchemaCases` (enumerations with values); an
/// enumeration of strings or numbers has to be `CaseIterable`. A type that defies this throws, which a test sees for all routes.
final class SchemaBook {
    /// By name; what `#/components/schemas/NAME` refers to.
    private(set) var components: [String: JSONValue] = [:]
    private var active: Set<ObjectIdentifier> = []

    struct Unknown: Error, CustomStringConvertible {
        var description: String
    }

    static func reference(_ name: String) -> JSONValue { ["$ref": .string("#/components/schemas/\(name)")] }

    /// Objects become components, everything else stands where it is used.
    func schema<T: Decodable>(of type: T.Type) throws -> JSONValue { try probe(type).schema }

    fileprivate func probe<T: Decodable>(_ type: T.Type) throws -> (value: T, schema: JSONValue) {
        if let described = type as? any SchemaDescribed.Type, let sample = described.sample as? T { return (sample, described.schema) }
        if let keyed = type as? any SchemaMap.Type {
            return (keyed.empty as! T, ["type": "object", "additionalProperties": try keyed.valueSchema(self)])
        }
        if let cases = type as? any (CaseIterable & RawRepresentable).Type, let found = Self.enumeration(cases), let first = found.first as? T {
            return (first, found.schema)
        }
        guard active.insert(ObjectIdentifier(type)).inserted else { throw Unknown(description: "\(type) holds itself: let it be SchemaDescribed") }
        defer { active.remove(ObjectIdentifier(type)) }
        if let cases = type as? any SchemaCases.Type { return try probe(type, cases: cases.schemaCases) }
        let notes = SchemaNotes()
        let value: T
        do { value = try T(from: SchemaProbe(book: self, notes: notes)) } catch let error as Unknown { throw error } catch {
            throw Unknown(description: "\(type) takes no sample (\(error)): let it be SchemaDescribed, or CaseIterable")
        }
        if let element = notes.element { return (value, ["type": "array", "items": element]) }
        if let scalar = notes.scalar { return (value, scalar) }
        return (value, keep(type, notes.object))
    }

    /// An object with one key, the case's name.
    private func probe<T: Decodable>(_ type: T.Type, cases: [String]) throws -> (value: T, schema: JSONValue) {
        var choices: [JSONValue] = []
        var last: T?
        for name in cases {
            let notes = SchemaNotes(onlyKey: name)
            last = try T(from: SchemaProbe(book: self, notes: notes))
            choices.append(notes.object)
        }
        guard let last else { throw Unknown(description: "\(type) has no cases") }
        return (last, keep(type, ["oneOf": .array(choices)]))
    }

    private func keep(_ type: Any.Type, _ schema: JSONValue) -> JSONValue {
        let name = String(reflecting: type).split(separator: ".").dropFirst().joined(separator: ".")
        components[name] = schema
        return Self.reference(name)
    }

    private static func enumeration<E: CaseIterable & RawRepresentable>(_ type: E.Type) -> (first: Any, schema: JSONValue)? {
        let values = E.allCases.compactMap { value -> JSONValue? in
            if let text = value.rawValue as? String { return .string(text) }
            return (value.rawValue as? any BinaryInteger).map { .number(Double($0)) }
        }
        guard let first = E.allCases.first, values.count == E.allCases.count else { return nil }
        let isText = if case .string = values[0] { true } else { false }
        return (first, ["type": isText ? "string" : "integer", "enum": .array(values)])
    }
}

/// What a decoder was asked for.
final class SchemaNotes {
    private(set) var properties: [String: JSONValue] = [:]
    private(set) var required: Set<String> = []
    private(set) var optional: Set<String> = []
    var scalar: JSONValue?
    var element: JSONValue?
    /// Of an enumeration with values.
    let onlyKey: String?

    /// Of an object inside of another: told its schema as far as it is known.
    var onEveryNote: ((JSONValue) -> Void)?

    init(onlyKey: String? = nil) { self.onlyKey = onlyKey }

    func isMissingPossible(_ key: any CodingKey) { optional.insert(key.stringValue) }

    func note(_ key: any CodingKey, _ schema: JSONValue) {
        let name = key.stringValue
        if optional.contains(name) {
            properties[name] = schema.orNull
        } else {
            properties[name] = schema
            required.insert(name)
        }
        onEveryNote?(object)
    }

    var object: JSONValue {
        var schema: [String: JSONValue] = ["type": "object", "properties": .object(properties)]
        if !required.isEmpty { schema["required"] = .array(required.sorted().map { .string($0) }) }
        return .object(schema)
    }
}

extension JSONValue {
    /// The schema of what may be left out; null is the same.
    fileprivate var orNull: JSONValue {
        guard case .object(var fields) = self else { return self }
        guard case .string(let type) = fields["type"] else { return ["anyOf": [self, ["type": "null"]]] }
        fields["type"] = [.string(type), "null"]
        if case .array(let values) = fields["enum"] { fields["enum"] = .array(values + [.null]) }
        return .object(fields)
    }
}

private struct SchemaProbe: Decoder {
    let book: SchemaBook
    let notes: SchemaNotes
    var codingPath: [any CodingKey] { [] }
    var userInfo: [CodingUserInfoKey: Any] { [:] }

    func container<Key: CodingKey>(keyedBy type: Key.Type) -> KeyedDecodingContainer<Key> { KeyedDecodingContainer(SchemaKeyed(book: book, notes: notes)) }
    func unkeyedContainer() -> any UnkeyedDecodingContainer { SchemaList(book: book, notes: notes) }
    func singleValueContainer() -> any SingleValueDecodingContainer { SchemaSingle(book: book, notes: notes) }
}

private struct SchemaKeyed<Key: CodingKey>: KeyedDecodingContainerProtocol {
    let book: SchemaBook
    let notes: SchemaNotes
    var codingPath: [any CodingKey] { [] }
    var allKeys: [Key] { notes.onlyKey.flatMap { Key(stringValue: $0) }.map { [$0] } ?? [] }

    func contains(_ key: Key) -> Bool { true }
    /// Asked by `decodeIfPresent`, before it decodes.
    func decodeNil(forKey key: Key) -> Bool {
        notes.isMissingPossible(key)
        return false
    }
    func decode<T: Decodable>(_ type: T.Type, forKey key: Key) throws -> T {
        let found = try book.probe(type)
        notes.note(key, found.schema)
        return found.value
    }
    func nestedContainer<Nested: CodingKey>(keyedBy type: Nested.Type, forKey key: Key) -> KeyedDecodingContainer<Nested> {
        let inner = SchemaNotes()
        inner.onEveryNote = { [notes] in notes.note(key, $0) }
        notes.note(key, inner.object)
        return KeyedDecodingContainer(SchemaKeyed<Nested>(book: book, notes: inner))
    }
    func nestedUnkeyedContainer(forKey key: Key) throws -> any UnkeyedDecodingContainer { throw SchemaBook.Unknown(description: "\(key) is a list decoded by hand") }
    func superDecoder() throws -> any Decoder { throw SchemaBook.Unknown(description: "classes have no schema") }
    func superDecoder(forKey key: Key) throws -> any Decoder { throw SchemaBook.Unknown(description: "classes have no schema") }
}

/// Has one element.
private struct SchemaList: UnkeyedDecodingContainer {
    let book: SchemaBook
    let notes: SchemaNotes
    var codingPath: [any CodingKey] { [] }
    var count: Int? { 1 }
    var isAtEnd: Bool { currentIndex > 0 }
    var currentIndex = 0

    init(book: SchemaBook, notes: SchemaNotes) {
        self.book = book
        self.notes = notes
    }

    func decodeNil() -> Bool { false }
    mutating func decode<T: Decodable>(_ type: T.Type) throws -> T {
        let found = try book.probe(type)
        notes.element = found.schema
        currentIndex += 1
        return found.value
    }
    func nestedContainer<Nested: CodingKey>(keyedBy type: Nested.Type) throws -> KeyedDecodingContainer<Nested> { throw SchemaBook.Unknown(description: "a list is decoded by hand") }
    func nestedUnkeyedContainer() throws -> any UnkeyedDecodingContainer { throw SchemaBook.Unknown(description: "a list is decoded by hand") }
    func superDecoder() throws -> any Decoder { throw SchemaBook.Unknown(description: "classes have no schema") }
}

private struct SchemaSingle: SingleValueDecodingContainer {
    let book: SchemaBook
    let notes: SchemaNotes
    var codingPath: [any CodingKey] { [] }

    func decodeNil() -> Bool { false }
    func decode<T: Decodable>(_ type: T.Type) throws -> T {
        let found = try book.probe(type)
        notes.scalar = found.schema
        return found.value
    }
}

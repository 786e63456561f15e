import Foundation
import HTTPTypes
import Hummingbird
import NIOCore

/// What a route takes and gives: held against every request, and rendered into the API's document.
///
///     .gives(SitePairRecord.self, .created).takes(CreateSitePair.self)
///     .starts.takes(StartMachine.self)
///     .gives([TaskView].self).asks(.server, .limit)
struct APIShape: Sendable {
    struct Answer: Sendable {
        var status: HTTPResponse.Status
        var type: (any Codable.Type)?
        var contentType = "application/json"
        var headers: [APIHeader] = []
    }

    struct Body: Sendable {
        var type: any Codable.Type
        /// Fields that this version does not know are let through: what sends them may be newer.
        var isOpen: Bool
    }

    var query: [APIParameter] = []
    /// Of the request, beside those of all.
    var headers: [APIHeader] = []
    var body: Body?
    var answers: [Answer]

    static func gives(_ type: any Codable.Type, _ status: HTTPResponse.Status = .ok) -> APIShape { APIShape(answers: [Answer(status: status, type: type)]) }
    static let nothing = APIShape(answers: [Answer(status: .noContent)])
    /// A task, which may have ended already.
    static let starts = APIShape(answers: [Answer(status: .accepted, type: TaskView.self), Answer(status: .ok, type: TaskView.self)])

    /// An answer that goes on (`EventStream`).
    static let streams: APIShape = {
        var shape = APIShape(answers: [Answer(status: .ok, type: String.self, contentType: "text/event-stream")])
        shape.headers = [APIHeader(name: "Last-Event-ID", summary: "the id of what was told last: goes on after it; else what comes from now on")]
        return shape
    }()

    func takes(_ type: any Codable.Type, open: Bool = false) -> APIShape {
        var shape = self
        shape.body = Body(type: type, isOpen: open)
        return shape
    }

    /// A list that grows: page by page (`Page`).
    var pages: APIShape {
        var shape = asks(.limit)
        shape.answers[0].headers.append(APIHeader(name: "Link", summary: "rel=\"next\": the next page; not there: that was all"))
        return shape
    }

    /// Says an ETag.
    var tagged: APIShape {
        var shape = self
        shape.answers[0].headers.append(APIHeader(name: "ETag", summary: "for If-Match"))
        return shape
    }

    /// Heeds one.
    var matches: APIShape {
        var shape = self
        shape.headers.append(APIHeader(name: "If-Match", summary: "only if it is still as it was with this ETag"))
        return shape
    }

    func asks(_ parameters: APIParameter...) -> APIShape {
        var shape = self
        shape.query += parameters
        return shape
    }
}

struct APIHeader: Sendable {
    var name: String
    var summary: String
}

/// A parameter of a query. All may be left out.
struct APIParameter: Sendable {
    enum Kind: Sendable { case text, flag, number(ClosedRange<Int>) }
    var name: String
    var kind: Kind
    var summary: String

    static let limit = APIParameter(name: "limit", kind: .number(1...1000), summary: "at most so many")
    static let after = APIParameter(name: "after", kind: .text, summary: "those after this name")
    static let beforeNumber = APIParameter(name: "before", kind: .number(1...(1 << 53)), summary: "those before this number")
    static let before = APIParameter(name: "before", kind: .text, summary: "those before this recovery point")
    static let point = APIParameter(name: "point", kind: .text, summary: "a recovery point's ID; the newest if not said")
    static let graceful = APIParameter(name: "graceful", kind: .flag, summary: "of a graceful failover")
    static let kind = APIParameter(name: "kind", kind: .text, summary: "drill or failover; drill if not said")
    static let without = APIParameter(name: "without", kind: .text, summary: "servers that are left out, with commas between them")
    static let forced = APIParameter(name: "forced", kind: .flag, summary: "without asking the machine to shut down")
    static let all = APIParameter(name: "all", kind: .flag, summary: "also those that are over")
    static let server = APIParameter(name: "server", kind: .text, summary: "only this server's")

    func check(_ value: Substring) throws(ApplianceError) {
        switch kind {
        case .text: break
        case .flag: guard value == "true" || value == "false" else { throw .invalid("\(name) is true or false, not \(value)") }
        case .number(let range):
            guard let number = Int(value), range.contains(number) else { throw .invalid("\(name) is \(range.lowerBound) to \(range.upperBound), not \(value)") }
        }
    }

    var schema: JSONValue {
        switch kind {
        case .text: ["type": "string"]
        case .flag: ["type": "boolean"]
        case .number(let range): ["type": "integer", "minimum": .number(Double(range.lowerBound)), "maximum": .number(Double(range.upperBound))]
        }
    }
}

/// Refuses what does not have the route's shape, in words, before the route sees it.
struct APIShapeCheck: Sendable {
    static let bodyBytesMax = 1 << 20
    private let shape: APIShape
    private let bodyBytesMax: Int
    private let closed: ClosedSchema?

    /// Those that anyone may ask read little for anyone.
    init(_ shape: APIShape, isOpen: Bool) {
        self.shape = shape
        bodyBytesMax = isOpen ? Self.bodyBytesMax >> 4 : Self.bodyBytesMax
        closed = shape.body.flatMap { $0.isOpen ? nil : try? ClosedSchema($0.type) }
    }

    /// The request with its body read.
    func check(_ request: Request) async throws -> Request {
        for (name, value) in request.uri.queryParameters {
            guard let parameter = shape.query.first(where: { $0.name == name }) else {
                let known = shape.query.map(\.name).joined(separator: ", ")
                throw ApplianceError.invalid("there is no parameter \(name) here" + (known.isEmpty ? "" : "; there are \(known)"))
            }
            try parameter.check(value)
        }
        guard shape.body != nil else { return request }
        var request = request
        let buffer: ByteBuffer
        do { buffer = try await request.collectBody(upTo: bodyBytesMax) } catch where (error as? HTTPError)?.status == .contentTooLarge || error is NIOTooManyBytesError {
            throw HTTPError(.contentTooLarge, message: "The request's body is larger than \(Amount.bytes(UInt64(bodyBytesMax))).")
        }
        guard buffer.readableBytes > 0 else { return request }
        // Said wrongly is refused; not said at all is taken for what it must be.
        if let type = request.headers[.contentType], type.prefix(while: { $0 != ";" }).trimmingCharacters(in: .whitespaces).lowercased() != "application/json" {
            throw HTTPError(.unsupportedMediaType, message: "The request's body is \(type): this takes application/json.")
        }
        if let closed, let value = try? JSONDecoder().decode(JSONValue.self, from: Data(buffer: buffer)), let unknown = closed.unknownField(in: value) {
            throw ApplianceError.invalid("cannot understand the request's body: there is no field \(unknown)")
        }
        return request
    }
}

/// The schema of a body, to look for fields that it does not have: a setting that is misspelt must not be taken for one that is left out.
struct ClosedSchema: Sendable {
    private let root: JSONValue
    private let components: [String: JSONValue]

    init(_ type: any Codable.Type) throws {
        let book = SchemaBook()
        root = try book.schema(of: type)
        components = book.components
    }

    /// Its path.
    func unknownField(in value: JSONValue) -> String? { Self.unknown(value, root, components, "") }

    private static func unknown(_ value: JSONValue, _ schema: JSONValue, _ components: [String: JSONValue], _ path: String) -> String? {
        if let name = schema["$ref"]?.string?.split(separator: "/").last { return components[String(name)].flatMap { unknown(value, $0, components, path) } }
        switch value {
        case .array(let elements): return schema["items"].flatMap { items in elements.lazy.compactMap { unknown($0, items, components, path) }.first }
        case .object(let fields):
            for choices in [schema["anyOf"], schema["oneOf"]] {
                guard case .array(let choices) = choices else { continue }
                let findings = choices.map { unknown(value, $0, components, path) }
                return findings.contains(nil) ? nil : findings.first ?? nil
            }
            guard case .object(let known) = schema["properties"] else { return nil }
            for (name, field) in fields.sorted(by: { $0.key < $1.key }) {
                guard let schema = known[name] else { return path + name }
                if let found = unknown(field, schema, components, path + name + ".") { return found }
            }
            return nil
        default: return nil
        }
    }
}

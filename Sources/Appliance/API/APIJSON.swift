import Foundation
import HTTPTypes
import Synchronization

/// JSON as the API speaks it: dates in ISO 8601, UTC, with milliseconds.
public enum APIJSON {
    public static func encoder(pretty: Bool = false) -> JSONEncoder {
        let encoder = JSONEncoder()
        encoder.outputFormatting = pretty ? [.sortedKeys, .withoutEscapingSlashes, .prettyPrinted] : [.sortedKeys, .withoutEscapingSlashes]
        encoder.dateEncodingStrategy = .custom { date, encoder in
            var container = encoder.singleValueContainer()
            try container.encode(text(date))
        }
        return encoder
    }

    public static func decoder() -> JSONDecoder {
        let decoder = JSONDecoder()
        decoder.dateDecodingStrategy = .custom { decoder in
            let container = try decoder.singleValueContainer(), text = try container.decode(String.self)
            for fraction in [true, false] {
                if let date = try? Date(text, strategy: Date.ISO8601FormatStyle(includingFractionalSeconds: fraction)) { return date }
            }
            throw DecodingError.dataCorruptedError(in: container, debugDescription: "\(text) is not a time like 2026-01-31T12:00:00Z")
        }
        return decoder
    }

    public static func text(_ date: Date) -> String {
        date.formatted(Date.ISO8601FormatStyle(includingFractionalSeconds: true))
    }
}

/// An error as the API tells it: application/problem+json (RFC 9457).
public struct Problem: Sendable, Codable, Hashable {
    /// One of `Kind`'s values, as a relative URI reference.
    public var type: String
    public var title: String
    public var status: Int
    /// A full sentence for the operator.
    public var detail: String

    public enum Kind: String, Sendable, CaseIterable {
        case invalid = "problem:invalid"
        case notFound = "problem:not-found"
        case refused = "problem:refused"
        case changed = "problem:changed"
        case unauthorized = "problem:unauthorized"
        case forbidden = "problem:forbidden"
        case tooMany = "problem:too-many"
        case failed = "problem:failed"

        public var status: Int {
            switch self {
            case .invalid: 422
            case .notFound: 404
            case .refused: 409
            case .changed: 412
            case .unauthorized: 401
            case .forbidden: 403
            case .tooMany: 429
            case .failed: 500
            }
        }

        var title: String {
            switch self {
            case .invalid: "The request makes no sense"
            case .notFound: "There is no such thing"
            case .refused: "Not possible in this state"
            case .changed: "Changed meanwhile"
            case .unauthorized: "Not let in"
            case .forbidden: "Not with this role"
            case .tooMany: "Too often"
            case .failed: "The appliance has failed"
            }
        }
    }

    public init(_ kind: Kind, _ detail: String) {
        type = kind.rawValue
        title = kind.title
        status = kind.status
        self.detail = detail
    }

    /// What HTTP has a status of its own for.
    init(_ kind: Kind, _ detail: String, status: HTTPResponse.Status) {
        self.init(kind, detail)
        self.status = status.code
        if status.code != kind.status { title = status.reasonPhrase }
    }

    public init(_ error: ApplianceError) {
        switch error {
        case .invalid(let s): self.init(.invalid, s)
        case .notFound(let s): self.init(.notFound, s)
        case .refused(let s): self.init(.refused, s)
        case .changed(let s): self.init(.changed, s)
        case .unauthorized(let s): self.init(.unauthorized, s)
        case .forbidden(let s): self.init(.forbidden, s)
        case .tooMany: self.init(.tooMany, error.description)
        case .failed(let s), .catalogue(let s): self.init(.failed, s)
        }
    }
}

/// A value that is made when it is first wanted.
final class OnceMade<Value: Sendable>: Sendable {
    private let made = Mutex<Value?>(nil)

    func value(_ make: () throws -> Value) throws -> Value {
        try made.withLock { made in
            if let value = made { return value }
            let value = try make()
            made = value
            return value
        }
    }
}

import Foundation
import HTTPTypes
import Hummingbird
import Logging
import NIOCore

/// What a request carries through the router.
struct APIContext: RequestContext {
    var coreContext: CoreRequestContextStorage
    /// Who asks, as the audit log names it.
    var who = "nobody"
    /// Where the request comes from; nil without a network.
    let remoteAddress: SocketAddress?
    init(source: ApplicationRequestContextSource) {
        coreContext = .init(source: source)
        remoteAddress = source.channel.remoteAddress
    }
}

/// One route of the API. The list of them is the API: the router, the documentation and the authentication test are made from it.
struct APIRoute: Sendable {
    enum Access: Sendable, Hashable {
        /// Anyone who reaches the port.
        case open
        /// A bearer token of this role, or one that includes it.
        case role(Role)
    }
    var method: HTTPRequest.Method
    /// With `{name}` for parameters.
    var path: String
    var access: Access
    var summary: String
    var handler: @Sendable (Request, APIContext) async throws -> Response
}

/// Answers errors as problem+json, whatever threw them.
struct ProblemMiddleware: RouterMiddleware {
    typealias Context = APIContext
    let logger: Logger

    func handle(_ request: Request, context: APIContext, next: (Request, APIContext) async throws -> Response) async throws -> Response {
        do { return try await next(request, context) } catch {
            let problem: Problem
            switch error {
            case let error as ApplianceError: problem = Problem(error)
            case let error as HTTPError:
                let detail = error.body ?? "\(request.method) \(request.uri.path): \(error.status.reasonPhrase)"
                var plain = Problem(error.status == .notFound ? .notFound : .invalid, detail)
                plain.status = error.status.code
                problem = plain
            default: problem = Problem(.failed, "\(error)")
            }
            if problem.status >= 500 { logger.error("\(request.method) \(request.uri.path): \(problem.detail)") }
            var response = try APIResponse.json(problem, status: .init(code: problem.status), contentType: "application/problem+json")
            if case ApplianceError.tooMany(_, let seconds) = error { response.headers[.retryAfter] = "\(seconds)" }
            return response
        }
    }
}

enum APIResponse {
    static func json(_ value: some Encodable, status: HTTPResponse.Status = .ok, contentType: String = "application/json") throws -> Response {
        var body = ByteBuffer(data: try APIJSON.encoder().encode(value))
        body.writeString("\n")
        return Response(status: status, headers: [.contentType: contentType, .cacheControl: "no-store"], body: .init(byteBuffer: body))
    }
}

extension Request {
    /// An empty body is an empty object, since most settings have defaults.
    func decoded<T: Decodable>(_ type: T.Type) async throws -> T {
        var request = self
        let buffer = try await request.collectBody(upTo: 1 << 20)
        let data = buffer.readableBytes == 0 ? Data("{}".utf8) : Data(buffer: buffer)
        do { return try APIJSON.decoder().decode(type, from: data) } catch let error as DecodingError {
            throw ApplianceError.invalid("cannot understand the request's body: \(error.words)")
        }
    }
}

extension DecodingError {
    /// What is wrong, and where.
    var words: String {
        switch self {
        case .keyNotFound(let key, _): "\(key.stringValue) is missing"
        case .typeMismatch(_, let c), .valueNotFound(_, let c), .dataCorrupted(let c):
            (c.codingPath.isEmpty ? "" : c.codingPath.map(\.stringValue).joined(separator: ".") + ": ") + c.debugDescription
        @unknown default: "\(self)"
        }
    }
}

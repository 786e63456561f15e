import Foundation
import HTTPTypes
import Hummingbird
import Logging
import NIOCore
import Replica

/// What a request carries through the router.
struct APIContext: RequestContext {
    var coreContext: CoreRequestContextStorage
    /// Who asks, as the audit log names it.
    var who = "nobody"
    var role = Role.viewer
    /// Where the request comes from; nil without a network.
    let remoteAddress: SocketAddress?
    let channel: any Channel
    init(source: ApplicationRequestContextSource) {
        coreContext = .init(source: source)
        channel = source.channel
        remoteAddress = source.channel.remoteAddress
    }
}

/// One route of the API. The list of them is the API: the router, its document, the documentation and the authentication test are made from it.
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
    /// nil fails a test.
    var shape: APIShape?
    var handler: @Sendable (Request, APIContext) async throws -> Response
}

/// Answers errors as problem+json, whatever threw them.
struct ProblemMiddleware: RouterMiddleware {
    typealias Context = APIContext
    let paths: APIPaths
    let logger: Logger

    func handle(_ request: Request, context: APIContext, next: (Request, APIContext) async throws -> Response) async throws -> Response {
        do { return try await next(request, context) } catch {
            let problem: Problem
            var allowed: String?
            switch error {
            case let error as ApplianceError: problem = Problem(error)
            case let error as StoreError: problem = Problem(error)
            case let error as HTTPError where error.status == .notFound && paths.methods(at: request.uri.path) != nil:
                allowed = paths.methods(at: request.uri.path)
                problem = Problem(.invalid, "\(request.uri.path) takes \(allowed ?? ""), not \(request.method.rawValue).", status: .methodNotAllowed)
            case let error as HTTPError:
                let detail = error.body ?? "\(request.method) \(request.uri.path): \(error.status.reasonPhrase)"
                problem = Problem(error.status == .notFound ? .notFound : .invalid, detail, status: error.status)
            default: problem = Problem(.failed, "\(error)")
            }
            if problem.status >= 500 { logger.error("\(request.method) \(request.uri.path): \(problem.detail)") }
            var response = try APIResponse.json(problem, status: .init(code: problem.status), contentType: "application/problem+json")
            if let allowed { response.headers[.allow] = allowed }
            if problem.status == 401 { response.headers[.wwwAuthenticate] = "Bearer" }
            if case ApplianceError.tooMany(_, let seconds) = error { response.headers[.retryAfter] = "\(seconds)" }
            return response
        }
    }
}

/// Which methods a path takes.
struct APIPaths: Sendable {
    private let known: [(parts: [Substring], method: HTTPRequest.Method)]

    init(_ routes: [APIRoute]) {
        var known = routes.map { (parts: $0.path.split(separator: "/"), method: $0.method) }
        known += known.filter { $0.method == .get }.map { ($0.parts, .head) }
        self.known = known
    }

    /// As `Allow` has them; nil when there is no such path.
    func methods(at path: String) -> String? {
        let parts = path.split(separator: "/")
        let methods = known.filter { $0.parts.count == parts.count && zip($0.parts, parts).allSatisfy { $0.hasPrefix("{") || $0 == $1 } }.map(\.method.rawValue)
        return methods.isEmpty ? nil : methods.sorted().joined(separator: ", ")
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
        let buffer = try await request.collectBody(upTo: APIShapeCheck.bodyBytesMax)
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

import AsyncHTTPClient
import Foundation
import NIOCore
import NIOSSL

/// The API's client: what the CLI is made of. Trusts the profile's CA and nothing else.
public struct APIClient: Sendable {
    public enum Failure: Error, Sendable, CustomStringConvertible {
        /// The appliance said no.
        case problem(Problem)
        case unreachable(String)
        /// On this host.
        case local(String)

        public var description: String {
            switch self {
            case .problem(let problem): problem.detail
            case .unreachable(let why), .local(let why): why
            }
        }
    }

    private let profile: ClientProfile
    private let client: HTTPClient

    /// Makes a client for the time of `body`.
    public static func with<T>(_ profile: ClientProfile, _ body: (APIClient) async throws -> T) async throws -> T {
        guard let pem = FileManager.default.contents(atPath: profile.caFile) else {
            throw Failure.unreachable("cannot read \(profile.caFile), the certificate of the appliance's CA")
        }
        var tls = TLSConfiguration.makeClientConfiguration()
        do { tls.trustRoots = .certificates(try NIOSSLCertificate.fromPEMBytes(Array(pem))) } catch {
            throw Failure.unreachable("\(profile.caFile) is not a certificate: \(error)")
        }
        var configuration = HTTPClient.Configuration(tlsConfiguration: tls)
        configuration.timeout.connect = .seconds(5)
        let client = HTTPClient(eventLoopGroupProvider: .singleton, configuration: configuration)
        do {
            let result = try await body(APIClient(profile: profile, client: client))
            try? await client.shutdown()
            return result
        } catch {
            try? await client.shutdown()
            throw error
        }
    }

    private init(profile: ClientProfile, client: HTTPClient) {
        self.profile = profile
        self.client = client
    }

    public func get<Answer: Decodable>(_ path: String, _ type: Answer.Type = Answer.self) async throws -> Answer {
        try decode(try await send("GET", path, body: nil))
    }

    public func post<Answer: Decodable>(_ path: String, _ body: (any Encodable & Sendable)? = nil, _ type: Answer.Type = Answer.self) async throws -> Answer {
        try decode(try await send("POST", path, body: body))
    }

    public func delete<Answer: Decodable>(_ path: String, _ body: (any Encodable & Sendable)? = nil, _ type: Answer.Type = Answer.self) async throws -> Answer {
        try decode(try await send("DELETE", path, body: body))
    }

    public func put<Answer: Decodable>(_ path: String, _ body: (any Encodable & Sendable)? = nil, _ type: Answer.Type = Answer.self) async throws -> Answer {
        try decode(try await send("PUT", path, body: body))
    }

    public func deleteNoContent(_ path: String, _ body: (any Encodable & Sendable)? = nil) async throws { _ = try await send("DELETE", path, body: body) }

    public func postNoContent(_ path: String, _ body: (any Encodable & Sendable)? = nil) async throws { _ = try await send("POST", path, body: body) }

    /// A path segment.
    public static func segment(_ text: String) -> String {
        text.addingPercentEncoding(withAllowedCharacters: .alphanumerics.union(CharacterSet(charactersIn: "-_."))) ?? text
    }

    private func decode<Answer: Decodable>(_ data: Data) throws -> Answer {
        do { return try APIJSON.decoder().decode(Answer.self, from: data) } catch {
            throw Failure.unreachable("cannot understand the answer of \(profile.url): \(error)")
        }
    }

    /// An answer that is taken piece by piece.
    func stream(_ path: String, _ take: (ByteBuffer) async throws -> Void) async throws {
        var request = HTTPClientRequest(url: profile.url + path)
        request.headers.add(name: "Authorization", value: "Bearer \(profile.token)")
        let response: HTTPClientResponse
        do { response = try await client.execute(request, timeout: .seconds(600)) } catch { throw Failure.unreachable("cannot reach the appliance at \(profile.url): \(error)") }
        guard (200..<300).contains(Int(response.status.code)) else {
            let data = Data(buffer: try await response.body.collect(upTo: 1 << 20))
            if let problem = try? APIJSON.decoder().decode(Problem.self, from: data) { throw Failure.problem(problem) }
            throw Failure.unreachable("the appliance at \(profile.url) answered \(response.status)")
        }
        do { for try await buffer in response.body { try await take(buffer) } } catch let error as Failure { throw error } catch {
            throw Failure.unreachable("the answer of \(profile.url) ended too early: \(error)")
        }
    }

    private func send(_ method: String, _ path: String, body: (any Encodable & Sendable)?) async throws -> Data {
        var request = HTTPClientRequest(url: profile.url + path)
        request.method = .RAW(value: method)
        request.headers.add(name: "Authorization", value: "Bearer \(profile.token)")
        if let body {
            request.headers.add(name: "Content-Type", value: "application/json")
            request.body = .bytes(ByteBuffer(data: try APIJSON.encoder().encode(body)))
        }
        let response: HTTPClientResponse
        let data: Data
        do {
            response = try await client.execute(request, timeout: .seconds(60))
            data = Data(buffer: try await response.body.collect(upTo: 256 << 20))
        } catch {
            if Task.isCancelled { throw CancellationError() }
            if let error = error as? HTTPClientError, error == .remoteConnectionClosed {
                throw Failure.unreachable("the appliance at \(profile.url) went away before it answered; when it is back, afterimage task list says what became of it")
            }
            throw Failure.unreachable("cannot reach the appliance at \(profile.url): \(error)")
        }
        guard (200..<300).contains(Int(response.status.code)) else {
            if let problem = try? APIJSON.decoder().decode(Problem.self, from: data) { throw Failure.problem(problem) }
            throw Failure.unreachable("the appliance at \(profile.url) answered \(response.status)")
        }
        return data
    }
}

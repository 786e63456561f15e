import AsyncHTTPClient
import Foundation
import NIOCore
import NIOSSL
import Replica

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
        // With TLS, on a host that starts ten machines at the moment.
        configuration.timeout.connect = .seconds(20)
        // A stream says something more often than that.
        configuration.timeout.read = .seconds(60)
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

    /// An answer that is no JSON.
    public func data(_ path: String) async throws -> Data { try await send("GET", path, body: nil) }

    public func post<Answer: Decodable>(_ path: String, _ body: (any Encodable & Sendable)? = nil, _ type: Answer.Type = Answer.self) async throws -> Answer {
        try decode(try await send("POST", path, body: body))
    }

    public func delete<Answer: Decodable>(_ path: String, _ body: (any Encodable & Sendable)? = nil, _ type: Answer.Type = Answer.self) async throws -> Answer {
        try decode(try await send("DELETE", path, body: body))
    }

    public func put<Answer: Decodable>(_ path: String, _ body: (any Encodable & Sendable)? = nil, _ type: Answer.Type = Answer.self) async throws -> Answer {
        try decode(try await send("PUT", path, body: body))
    }

    /// Changes what `path` names, as it is now, into what `body` makes of it; refused (412) when somebody else changes it in between.
    public func change<Before: Decodable, Answer: Decodable>(
        _ path: String, _ body: (Before) throws -> any Encodable & Sendable, _ type: Answer.Type = Answer.self
    ) async throws -> Answer {
        let (data, tag) = try await exchange("GET", path, body: nil)
        guard let tag else { throw Failure.unreachable("the appliance at \(profile.url) gives no ETag for \(path)") }
        return try decode(try await exchange("PUT", path, body: try body(try decode(data)), ifMatch: tag).data)
    }

    public func deleteNoContent(_ path: String, _ body: (any Encodable & Sendable)? = nil) async throws { _ = try await send("DELETE", path, body: body) }

    public func putNoContent(_ path: String, _ body: (any Encodable & Sendable)? = nil) async throws { _ = try await send("PUT", path, body: body) }

    public func postNoContent(_ path: String, _ body: (any Encodable & Sendable)? = nil) async throws { _ = try await send("POST", path, body: body) }

    public struct StreamMessage: Sendable {
        public var kind: String
        public var data: Data
    }

    /// What happens at the appliance from now on, until the caller's task ends; the line may fail meanwhile, and nothing is missed. `onLost` is told why it failed.
    /// Throws when the appliance says no.
    public func follow(_ onMessage: (StreamMessage) -> Void, onLost: (String) -> Void) async throws {
        // A message counts when its empty line is there.
        var last: String?, id: String?, kind = "", data = ""
        while true {
            var request = HTTPClientRequest(url: profile.url + "/v1/stream")
            request.headers.add(name: "Authorization", value: "Bearer \(profile.token)")
            if let last { request.headers.add(name: "Last-Event-ID", value: last) }
            do {
                let response = try await client.execute(request, deadline: .distantFuture)
                guard response.status == .ok else { throw try await failure(response) }
                // A piece may end inside of a character.
                var rest = ByteBuffer()
                for try await buffer in response.body {
                    rest.writeImmutableBuffer(buffer)
                    while let length = rest.readableBytesView.firstIndex(of: UInt8(ascii: "\n")).map({ $0 - rest.readerIndex }), let line = rest.readString(length: length) {
                        rest.moveReaderIndex(forwardBy: 1)
                        switch line.prefix(while: { $0 != ":" }) {
                        case "id": id = String(line.dropFirst("id: ".count))
                        case "event": kind = String(line.dropFirst("event: ".count))
                        case "data": data += line.dropFirst("data: ".count)
                        case "" where line.isEmpty:
                            last = id ?? last
                            if !data.isEmpty { onMessage(StreamMessage(kind: kind, data: Data(data.utf8))) }
                            (id, kind, data) = (nil, "", "")
                        default: break
                        }
                    }
                    rest.discardReadBytes()
                }
                onLost("the appliance at \(profile.url) has ended the stream")
            } catch let failure as Failure {
                throw failure
            } catch {
                if Task.isCancelled { throw CancellationError() }
                // Before the first answer nothing says that there is an appliance.
                if last == nil { throw Failure.unreachable("cannot reach the appliance at \(profile.url): \(error)") }
                onLost("the line to the appliance at \(profile.url) has failed: \(error)")
            }
            (id, kind, data) = (nil, "", "")
            try await Task.sleep(for: .seconds(2))
        }
    }

    private func failure(_ response: HTTPClientResponse) async throws -> Failure {
        let data = Data(buffer: try await response.body.collect(upTo: 1 << 20))
        if let problem = try? APIJSON.decoder().decode(Problem.self, from: data) { return .problem(problem) }
        return .unreachable("the appliance at \(profile.url) answered \(response.status)")
    }

    /// The CA that an appliance says is its own: to be compared with a fingerprint before it is trusted.
    public static func authority(of url: String) async throws -> (certificate: String, fingerprint: String) {
        var tls = TLSConfiguration.makeClientConfiguration()
        tls.certificateVerification = .none
        var configuration = HTTPClient.Configuration(tlsConfiguration: tls)
        configuration.timeout.connect = .seconds(20)
        let client = HTTPClient(eventLoopGroupProvider: .singleton, configuration: configuration)
        do {
            let response = try await client.execute(HTTPClientRequest(url: url + "/v1/ca"), timeout: .seconds(20))
            let answer = try APIJSON.decoder().decode(CACertificate.self, from: Data(buffer: try await response.body.collect(upTo: 1 << 20)))
            let fingerprint = try certificateFingerprint(pem: answer.certificate)
            try await client.shutdown()
            return (answer.certificate, fingerprint)
        } catch {
            try? await client.shutdown()
            throw Failure.unreachable("cannot have the CA's certificate of an appliance at \(url): \(error)")
        }
    }

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

    private func send(_ method: String, _ path: String, body: (any Encodable & Sendable)?) async throws -> Data { try await exchange(method, path, body: body).data }

    private func exchange(_ method: String, _ path: String, body: (any Encodable & Sendable)?, ifMatch: String? = nil) async throws -> (data: Data, tag: String?) {
        var request = HTTPClientRequest(url: profile.url + path)
        request.method = .RAW(value: method)
        request.headers.add(name: "Authorization", value: "Bearer \(profile.token)")
        if let ifMatch { request.headers.add(name: "If-Match", value: ifMatch) }
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
        return (data, response.headers.first(name: "ETag"))
    }
}

import AsyncHTTPClient
import Foundation
import NIOCore
import NIOSSL
import Replica

/// `afterimage agent enroll`: turns a one-time token into this agent's client certificate.
///
/// The token names the appliance's URL and the fingerprint of its CA. The CA certificate is fetched first, from a server that is not
/// trusted yet, and only used when its fingerprint is the token's; everything secret then goes over TLS verified by that CA.
public enum AgentEnrolment {
    public struct Outcome: Sendable {
        public var server: ServerID
        public var serverName: String
        public var linkHost: String
        public var linkPort: Int
    }

    public static func enroll(token: String, stateDirectory: String) async throws -> Outcome {
        let token = try EnrolmentToken(text: token)
        let ca = try await fetchCA(token)
        let agent = try AgentIdentity.makeKeyAndCSR(name: token.serverName)
        var configuration = TLSConfiguration.makeClientConfiguration()
        configuration.trustRoots = .certificates(try NIOSSLCertificate.fromPEMBytes(Array(ca.utf8)))
        let response: EnrolAnswer = try await exchange(
            token, "POST", "/v1/enrol", body: try JSONEncoder().encode(EnrolRequest(secret: token.secret, csr: agent.csrPEM)), configuration)
        guard try certificateFingerprint(pem: response.ca) == token.caFingerprint else {
            throw AgentError("the appliance at \(token.url) answered with another CA certificate than it showed before: not enrolled")
        }

        let directory = AgentState.enrolmentDirectory(stateDirectory)
        try FileManager.default.createDirectory(at: directory, withIntermediateDirectories: true, attributes: [.posixPermissions: 0o700])
        // link.json last: the running agent takes its presence as the sign that the rest is there.
        let file = { (name: String) in directory.appendingPathComponent(name).path }
        try KeyFile.write(agent.keyPEM, to: file("key.pem"), mode: 0o600)
        try KeyFile.write(response.certificate, to: file("cert.pem"), mode: 0o644)
        try KeyFile.write(response.ca, to: file("ca.pem"), mode: 0o644)
        let link = AgentState.Link(host: response.linkHost, port: response.linkPort, serverName: response.serverName)
        try KeyFile.write(String(decoding: try JSONEncoder().encode(link), as: UTF8.self), to: file("link.json"), mode: 0o644)
        return Outcome(server: response.server, serverName: response.serverName, linkHost: response.linkHost, linkPort: response.linkPort)
    }

    private static func fetchCA(_ token: EnrolmentToken) async throws -> String {
        var unverified = TLSConfiguration.makeClientConfiguration()
        unverified.certificateVerification = .none
        let answer: CAResponse = try await exchange(token, "GET", "/v1/ca", body: nil, unverified)
        guard try certificateFingerprint(pem: answer.certificate) == token.caFingerprint else {
            throw AgentError("the server at \(token.url) is not the appliance that made this token (its CA has another fingerprint): not enrolled")
        }
        return answer.certificate
    }

    private static func exchange<Answer: Decodable>(
        _ token: EnrolmentToken, _ method: String, _ path: String, body: Data?, _ tls: TLSConfiguration
    ) async throws -> Answer {
        let client = HTTPClient(eventLoopGroupProvider: .singleton, configuration: .init(tlsConfiguration: tls))
        do {
            var request = HTTPClientRequest(url: token.url + path)
            request.method = .init(rawValue: method)
            if let body {
                request.headers.add(name: "content-type", value: "application/json")
                request.body = .bytes(ByteBuffer(bytes: body))
            }
            let response = try await client.execute(request, timeout: .seconds(20))
            let bytes = try await response.body.collect(upTo: 1 << 20)
            guard response.status == .ok || response.status == .created else {
                let problem = try? JSONDecoder().decode(ProblemDocument.self, from: Data(bytes.readableBytesView))
                throw AgentError("the appliance at \(token.url) refused: \(problem?.detail ?? problem?.title ?? "HTTP \(response.status.code)")")
            }
            let answer = try JSONDecoder().decode(Answer.self, from: Data(bytes.readableBytesView))
            try await client.shutdown()
            return answer
        } catch {
            try? await client.shutdown()
            if error is AgentError { throw error }
            throw AgentError("cannot reach the appliance at \(token.url): \(error)")
        }
    }

    private struct CAResponse: Decodable { var certificate: String }
    private struct ProblemDocument: Decodable {
        var title: String?
        var detail: String?
    }
}

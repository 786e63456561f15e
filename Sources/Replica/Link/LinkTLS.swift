import Glibc
import NIOCore
import NIOPosix
import NIOSSL

/// TLS 1.3 between parties whose certificates come from the same CA, and nothing else.
enum LinkTLS {
    static func serverContext(identity: TLSIdentity, caCertificatePEM: String) throws(PKIError) -> NIOSSLContext {
        do {
            var configuration = TLSConfiguration.makeServerConfiguration(
                certificateChain: try chain(identity), privateKey: .privateKey(try key(identity)))
            configuration.minimumTLSVersion = .tlsv13
            configuration.trustRoots = .certificates(try NIOSSLCertificate.fromPEMBytes(Array(caCertificatePEM.utf8)))
            // On a server this also makes the client's certificate mandatory; who it is, is read from the SAN afterwards.
            configuration.certificateVerification = .noHostnameVerification
            return try NIOSSLContext(configuration: configuration)
        } catch {
            throw wrapped(error, "cannot set up TLS for the link's listener")
        }
    }

    static func clientContext(_ endpoint: LinkEndpoint) throws(PKIError) -> NIOSSLContext {
        do {
            var configuration = TLSConfiguration.makeClientConfiguration()
            configuration.minimumTLSVersion = .tlsv13
            configuration.certificateChain = try chain(endpoint.identity)
            configuration.privateKey = .privateKey(try key(endpoint.identity))
            configuration.trustRoots = .certificates(try NIOSSLCertificate.fromPEMBytes(Array(endpoint.caCertificatePEM.utf8)))
            configuration.certificateVerification = .fullVerification
            return try NIOSSLContext(configuration: configuration)
        } catch {
            throw wrapped(error, "cannot set up TLS to \(endpoint.host) port \(endpoint.port)")
        }
    }

    /// Host names are checked by name; for an IP address NIOSSL checks the address that was connected to.
    static func clientHandler(_ context: NIOSSLContext, host: String) throws -> NIOSSLClientHandler {
        try NIOSSLClientHandler(context: context, serverHostname: addressBytes(host) == nil ? host : nil)
    }

    private static func chain(_ identity: TLSIdentity) throws -> [NIOSSLCertificateSource] {
        try NIOSSLCertificate.fromPEMBytes(Array(identity.certificatePEM.utf8)).map { .certificate($0) }
    }

    private static func key(_ identity: TLSIdentity) throws -> NIOSSLPrivateKey {
        try NIOSSLPrivateKey(bytes: Array(identity.keyPEM.utf8), format: .pem)
    }

    /// BoringSSL's reason codes in words that an operator can act on.
    static func describe(_ error: any Error) -> String {
        switch error {
        case let error as NIOConnectionError:
            guard let first = error.connectionErrors.first else { return "the name \(error.host) has no address" }
            return describe(first.error)
        case let error as IOError: return String(cString: strerror(error.errnoCode))
        case ChannelError.connectTimeout(let limit): return "no answer within \(limit.inWords)"
        default: break
        }
        let text = String(describing: error)
        let known: [(String, String)] = [
            ("PEER_DID_NOT_RETURN_A_CERTIFICATE", "it showed no certificate"),
            ("CERTIFICATE_VERIFY_FAILED", "its certificate is not from this CA, or not valid now"),
            ("CERTIFICATE_REQUIRED", "the other side wants a certificate"),
            ("UNKNOWN_CA", "the other side does not know the CA of our certificate"),
            ("BAD_CERTIFICATE", "the other side does not accept our certificate"),
            ("CERTIFICATE_EXPIRED", "the other side says that our certificate has expired"),
            ("UNSUPPORTED_PROTOCOL", "it does not offer TLS 1.3"),
            ("PROTOCOL_VERSION", "it does not speak TLS 1.3"),
            ("HTTP_REQUEST", "it speaks plain HTTP, not TLS"),
            ("WRONG_VERSION_NUMBER", "it does not speak TLS"),
            ("uncleanShutdown", "the connection was cut"),
        ]
        for (code, words) in known where text.contains(code) { return words }
        return text
    }
}

extension TimeAmount {
    /// "15 s", "400 ms".
    var inWords: String {
        nanoseconds % 1_000_000_000 == 0 ? "\(nanoseconds / 1_000_000_000) s" : "\(nanoseconds / 1_000_000) ms"
    }
}

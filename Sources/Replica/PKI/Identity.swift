import Crypto
import Foundation
import SwiftASN1
import X509

/// A certificate chain with its private key, as TLS wants it.
public struct TLSIdentity: Sendable, Hashable {
    public var certificatePEM: String
    public var keyPEM: String

    public init(certificatePEM: String, keyPEM: String) {
        self.certificatePEM = certificatePEM
        self.keyPEM = keyPEM
    }

    /// Reads both PEM files.
    public init(certificateFile: String, keyFile: String) throws(PKIError) {
        self.init(certificatePEM: try KeyFile.read(certificateFile), keyPEM: try KeyFile.read(keyFile))
    }
}

/// The agent's half of an enrolment: its private key never leaves the machine.
public struct AgentIdentity: Sendable, Hashable {
    public var keyPEM: String
    public var csrPEM: String

    /// A fresh P-256 key and a request for its certificate. `name` is for people; the identity is given by the CA.
    public static func makeKeyAndCSR(name: String) throws(PKIError) -> AgentIdentity {
        let key = P256.Signing.PrivateKey()
        do {
            let csr = try CertificateSigningRequest(
                version: .v1, subject: try DistinguishedName { CommonName(name) }, privateKey: Certificate.PrivateKey(key),
                attributes: CertificateSigningRequest.Attributes(), signatureAlgorithm: .ecdsaWithSHA256)
            return AgentIdentity(keyPEM: key.pemRepresentation + "\n", csrPEM: try csr.serializeAsPEM().pemString + "\n")
        } catch {
            throw wrapped(error, "cannot make a key and a certificate request")
        }
    }
}

/// Who a verified client certificate says it is.
struct ServerIdentity: Hashable, Sendable {
    var server: ServerID
    var certificateSerial: String

    static let prefix = "afterimage://server/"
    static func uri(_ server: ServerID) -> String { prefix + server.rawValue }

    /// The chain was checked by TLS already; here only the name is read. Exactly one SAN URI of ours is accepted.
    init(certificateDER: [UInt8]) throws(PKIError) {
        do {
            let certificate = try Certificate(derEncoded: certificateDER)
            let names = try certificate.extensions.subjectAlternativeNames ?? SubjectAlternativeNames()
            let servers = names.compactMap { name -> String? in
                guard case .uniformResourceIdentifier(let uri) = name, uri.hasPrefix(Self.prefix) else { return nil }
                return String(uri.dropFirst(Self.prefix.count))
            }
            guard servers.count == 1, let id = servers.first, !id.isEmpty else {
                throw PKIError("the certificate names no server (no SAN URI \(Self.prefix)<id>)")
            }
            server = ServerID(id)
            certificateSerial = hex(certificate.serialNumber.bytes)
        } catch {
            throw wrapped(error, "cannot read the peer's certificate")
        }
    }
}

/// SHA-256 of a certificate's DER, 64 lower-case hex digits: what an enrolment token carries for the CA.
public func certificateFingerprint(pem: String) throws(PKIError) -> String {
    do {
        return hex(SHA256.hash(data: try PEMDocument(pemString: pem).derBytes))
    } catch {
        throw wrapped(error, "cannot read the certificate")
    }
}

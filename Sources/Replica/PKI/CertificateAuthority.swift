import Crypto
import Foundation
import Glibc
import SwiftASN1
import X509

/// The appliance's own CA: one P-256 key in the state directory, a self-signed certificate, and what it signs.
///
/// A client certificate names its server in a SAN URI `afterimage://server/<id>`; the common name is for people only.
/// Server certificates carry only the serverAuth usage and client certificates only clientAuth, so that a stolen agent
/// certificate cannot pose as the appliance.
public struct CertificateAuthority: Sendable {
    /// PEM of the CA's certificate, what agents and API clients pin.
    public let certificatePEM: String
    /// SHA-256 of the certificate's DER, 64 lower-case hex digits.
    public let fingerprint: String
    private let key: P256.Signing.PrivateKey
    private let certificate: Certificate

    /// Certificates start a day in the past: the two sites' clocks need not agree.
    static let backdateSeconds: TimeInterval = 24 * 3600
    static let authoritySeconds: TimeInterval = 10 * 365 * 24 * 3600
    /// The appliance issues its own certificate anew at every start.
    public static let serverSeconds: TimeInterval = 397 * 24 * 3600
    public static let clientSeconds: TimeInterval = 730 * 24 * 3600

    static func certificatePath(_ directory: String) -> String { directory + "/ca.pem" }
    static func keyPath(_ directory: String) -> String { directory + "/ca-key.pem" }

    /// Makes a CA in `directory` (created 0700 if missing): `ca.pem`, and `ca-key.pem` with mode 0600.
    /// Throws when there is one already: replacing it would cut off every enrolled server.
    public static func create(directory: String, name: String = "Afterimage CA") throws(PKIError) -> CertificateAuthority {
        if mkdir(directory, 0o700) != 0 && errno != EEXIST {
            throw PKIError("cannot create \(directory): \(String(cString: strerror(errno)))")
        }
        if KeyFile.exists(certificatePath(directory)) {
            throw PKIError("there is a certificate authority in \(directory) already: remove it first if every server is to enrol again")
        }
        let key = P256.Signing.PrivateKey()
        do {
            let signer = Certificate.PrivateKey(key)
            let subject = try DistinguishedName { CommonName(name) }
            let now = Date()
            let certificate = try Certificate(
                version: .v3, serialNumber: .init(), publicKey: signer.publicKey,
                notValidBefore: now - backdateSeconds, notValidAfter: now + authoritySeconds,
                issuer: subject, subject: subject, signatureAlgorithm: .ecdsaWithSHA256,
                extensions: Certificate.Extensions {
                    Critical(BasicConstraints.isCertificateAuthority(maxPathLength: 0))
                    Critical(KeyUsage(keyCertSign: true, cRLSign: true))
                    SubjectKeyIdentifier(hash: signer.publicKey)
                },
                issuerPrivateKey: signer)
            // The key first: a certificate without its key would look like a CA that is there.
            try KeyFile.write(key.pemRepresentation + "\n", to: keyPath(directory), mode: 0o600)
            try KeyFile.write(try certificate.serializeAsPEM().pemString + "\n", to: certificatePath(directory), mode: 0o644)
        } catch {
            throw wrapped(error, "cannot make a certificate authority in \(directory)")
        }
        return try load(directory: directory)
    }

    /// Loads the CA of `directory`; refuses a key that others may read or that does not fit the certificate.
    public static func load(directory: String) throws(PKIError) -> CertificateAuthority {
        let certificatePEM = try KeyFile.read(certificatePath(directory))
        var status = stat()
        guard stat(keyPath(directory), &status) == 0 else {
            throw PKIError("cannot read \(keyPath(directory)): \(String(cString: strerror(errno)))")
        }
        guard status.st_mode & 0o077 == 0 else {
            throw PKIError("\(keyPath(directory)) can be read by others: chmod 0600 it, and make a new authority if it may have leaked")
        }
        let keyPEM = try KeyFile.read(keyPath(directory))
        do {
            let certificate = try Certificate(pemEncoded: certificatePEM)
            let key = try P256.Signing.PrivateKey(pemRepresentation: keyPEM)
            guard Certificate.PublicKey(key.publicKey) == certificate.publicKey else {
                throw PKIError("\(keyPath(directory)) is not the key of \(certificatePath(directory))")
            }
            return try CertificateAuthority(certificate: certificate, key: key)
        } catch {
            throw wrapped(error, "cannot load the certificate authority in \(directory)")
        }
    }

    /// Loads the CA of `directory`, or makes it when there is none yet.
    public static func loadOrCreate(directory: String) throws(PKIError) -> CertificateAuthority {
        KeyFile.exists(certificatePath(directory)) ? try load(directory: directory) : try create(directory: directory)
    }

    private init(certificate: Certificate, key: P256.Signing.PrivateKey) throws {
        let pem = try certificate.serializeAsPEM()
        self.certificate = certificate
        self.key = key
        certificatePEM = pem.pemString + "\n"
        fingerprint = hex(SHA256.hash(data: pem.derBytes))
    }

    /// A certificate and key for this appliance's own listeners, valid for these host names and IP addresses.
    public func issueServer(hosts: [String], validitySeconds: TimeInterval = serverSeconds) throws(PKIError) -> TLSIdentity {
        guard let first = hosts.first else { throw PKIError("a server certificate needs at least one host name or address") }
        let key = P256.Signing.PrivateKey()
        do {
            let names: [GeneralName] = hosts.map { host in
                addressBytes(host).map { .ipAddress(ASN1OctetString(contentBytes: $0[...])) } ?? .dnsName(host)
            }
            let issued = try sign(
                Certificate.PublicKey(key.publicKey), commonName: first, names: names, usage: .serverAuth,
                validitySeconds: validitySeconds)
            return TLSIdentity(certificatePEM: issued.certificatePEM, keyPEM: key.pemRepresentation + "\n")
        } catch {
            throw wrapped(error, "cannot issue a certificate for \(hosts.joined(separator: ", "))")
        }
    }

    /// Signs an agent's CSR. Only its public key is taken, after proof that the agent holds the private key; the identity is
    /// the one given here, whatever the CSR asks for.
    public func issueClient(
        csrPEM: String, server: ServerID, validitySeconds: TimeInterval = clientSeconds
    ) throws(PKIError) -> IssuedCertificate {
        do {
            let csr = try CertificateSigningRequest(pemEncoded: csrPEM)
            guard csr.publicKey.isValidSignature(csr.signature, for: csr) else {
                throw PKIError("the signature of the certificate request does not fit its key")
            }
            guard P256.Signing.PublicKey(csr.publicKey) != nil else {
                throw PKIError("the certificate request's key is not P-256")
            }
            return try sign(
                csr.publicKey, commonName: server.rawValue, names: [.uniformResourceIdentifier(ServerIdentity.uri(server))],
                usage: .clientAuth, validitySeconds: validitySeconds)
        } catch {
            throw wrapped(error, "cannot issue a certificate for server \(server)")
        }
    }

    private func sign(
        _ publicKey: Certificate.PublicKey, commonName: String, names: [GeneralName], usage: ExtendedKeyUsage.Usage,
        validitySeconds: TimeInterval
    ) throws -> IssuedCertificate {
        let now = Date()
        let serial = Certificate.SerialNumber()
        let notAfter = min(now + validitySeconds, certificate.notValidAfter)
        let signed = try Certificate(
            version: .v3, serialNumber: serial, publicKey: publicKey,
            notValidBefore: min(now - Self.backdateSeconds, notAfter), notValidAfter: notAfter,
            issuer: certificate.subject, subject: try DistinguishedName { CommonName(commonName) },
            signatureAlgorithm: .ecdsaWithSHA256,
            extensions: Certificate.Extensions {
                Critical(BasicConstraints.notCertificateAuthority)
                Critical(KeyUsage(digitalSignature: true))
                try ExtendedKeyUsage([usage])
                SubjectAlternativeNames(names)
            },
            issuerPrivateKey: Certificate.PrivateKey(key))
        return IssuedCertificate(
            certificatePEM: try signed.serializeAsPEM().pemString + "\n", serial: hex(serial.bytes), notAfter: notAfter)
    }
}

/// A certificate as handed to an enrolled server.
public struct IssuedCertificate: Sendable, Hashable {
    public var certificatePEM: String
    /// Lower-case hex; what `LinkServerDelegate.authorize` is asked with.
    public var serial: String
    public var notAfter: Date
}

func hex(_ bytes: some Sequence<UInt8>) -> String {
    let digits = Array("0123456789abcdef".utf8)
    return String(decoding: bytes.flatMap { [digits[Int($0 >> 4)], digits[Int($0 & 15)]] }, as: UTF8.self)
}

/// Network-order bytes of an IPv4 or IPv6 address in text form; nil for a host name.
func addressBytes(_ text: String) -> [UInt8]? {
    var four = in_addr()
    if inet_pton(AF_INET, text, &four) == 1 { return withUnsafeBytes(of: &four) { Array($0) } }
    var six = in6_addr()
    if inet_pton(AF_INET6, text, &six) == 1 { return withUnsafeBytes(of: &six) { Array($0) } }
    return nil
}

func wrapped(_ error: any Error, _ what: String) -> PKIError {
    (error as? PKIError) ?? PKIError("\(what): \(error)")
}

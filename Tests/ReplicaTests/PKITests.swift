import Foundation
import Testing
import X509

@testable import Replica

@Suite struct PKITests {
    private let directory = TemporaryDirectory()

    @Test func authorityIsMadeOnceAndLoadedAfter() throws {
        let path = directory.path + "/ca"
        let made = try CertificateAuthority.loadOrCreate(directory: path)
        let loaded = try CertificateAuthority.loadOrCreate(directory: path)
        #expect(made.certificatePEM == loaded.certificatePEM)
        #expect(made.fingerprint == loaded.fingerprint)
        #expect(made.fingerprint.count == 64)
        #expect(try certificateFingerprint(pem: made.certificatePEM) == made.fingerprint)
        var status = stat()
        #expect(stat(path + "/ca-key.pem", &status) == 0)
        #expect(status.st_mode & 0o777 == 0o600)
        #expect(throws: PKIError.self) { try CertificateAuthority.create(directory: path) }
    }

    @Test func readableKeyIsRefused() throws {
        let path = directory.path + "/ca"
        _ = try CertificateAuthority.create(directory: path)
        chmod(path + "/ca-key.pem", 0o644)
        let error = #expect(throws: PKIError.self) { try CertificateAuthority.load(directory: path) }
        #expect(error?.description.contains("chmod 0600") == true)
    }

    @Test func foreignKeyIsRefused() throws {
        _ = try CertificateAuthority.create(directory: directory.path + "/a")
        _ = try CertificateAuthority.create(directory: directory.path + "/b")
        try FileManager.default.removeItem(atPath: directory.path + "/a/ca-key.pem")
        try FileManager.default.copyItem(atPath: directory.path + "/b/ca-key.pem", toPath: directory.path + "/a/ca-key.pem")
        let error = #expect(throws: PKIError.self) { try CertificateAuthority.load(directory: directory.path + "/a") }
        #expect(error?.description.contains("is not the key of") == true)
    }

    @Test func clientCertificateNamesTheServerGivenAndNothingElse() throws {
        let authority = try CertificateAuthority.create(directory: directory.path + "/ca")
        let agent = try AgentIdentity.makeKeyAndCSR(name: "somebody-else")
        let issued = try authority.issueClient(csrPEM: agent.csrPEM, server: ServerID("web-1"))
        let certificate = try Certificate(pemEncoded: issued.certificatePEM)
        let identity = try ServerIdentity(certificateDER: certificate.serializeAsPEM().derBytes)
        #expect(identity.server == ServerID("web-1"))
        #expect(identity.certificateSerial == issued.serial)
        #expect(issued.notAfter > Date() + 300 * 24 * 3600)
        #expect(try certificate.extensions.extendedKeyUsage?.contains(.clientAuth) == true)
        #expect(try certificate.extensions.extendedKeyUsage?.contains(.serverAuth) == false)
        #expect(try Certificate(pemEncoded: authority.certificatePEM).publicKey.isValidSignature(certificate.signature, for: certificate))
    }

    @Test func tamperedRequestIsRefused() throws {
        let authority = try CertificateAuthority.create(directory: directory.path + "/ca")
        let agent = try AgentIdentity.makeKeyAndCSR(name: "web-1")
        var lines = agent.csrPEM.split(separator: "\n").map(String.init)
        // Inside the public key.
        lines[2] = String(lines[2].dropFirst(20).prefix(1) == "A" ? "B" : "A") + lines[2].dropFirst()
        #expect(throws: PKIError.self) { try authority.issueClient(csrPEM: lines.joined(separator: "\n"), server: ServerID("web-1")) }
        #expect(throws: PKIError.self) { try authority.issueClient(csrPEM: "nonsense", server: ServerID("web-1")) }
    }

    @Test func serverCertificateCoversNamesAndAddresses() throws {
        let authority = try CertificateAuthority.create(directory: directory.path + "/ca")
        let identity = try authority.issueServer(hosts: ["replica.example", "192.0.2.7", "2001:db8::1"])
        let names = try #require(try Certificate(pemEncoded: identity.certificatePEM).extensions.subjectAlternativeNames)
        #expect(names.count == 3)
        #expect(names.contains(.dnsName("replica.example")))
        #expect(throws: PKIError.self) { try authority.issueServer(hosts: []) }
        #expect(throws: PKIError.self) { try ServerIdentity(certificateDER: Certificate(pemEncoded: identity.certificatePEM).serializeAsPEM().derBytes) }
    }
}

import BlockTap
import Foundation
import NIOCore
import NIOSSL
import Testing

@testable import Replica

/// What must not get in, and that its refusal hurts nobody else.
@Suite(.timeLimit(.minutes(10))) struct LinkRefusalTests {
    /// A replication that runs during `body` and must get on after it.
    private func undisturbed(_ body: (TestAppliance) async throws -> Void) async throws {
        let appliance = try TestAppliance()
        try await appliance.start()
        let source = ModelSource(sizes: [1 << 20], seed: 1)
        let sender = try appliance.sender(source)
        sender.start()
        await source.untilAcknowledged(exact: 2)
        try await body(appliance)
        source.writeRandomly(count: 20)
        await source.untilAcknowledged(exact: source.acknowledgedExactCount + 3)
        #expect(sender.status.phase == .replicating)
        await sender.stop()
        _ = try appliance.checkRecoveryPoints(source)
        await appliance.stop()
    }

    @Test(arguments: ["GET / HTTP/1.1\r\n\r\n", "AILK garbage that is no TLS at all ..........................", "\0\0\0\0\0\0\0\0"])
    func plainTCPClient(bytes: String) async throws {
        try await undisturbed { appliance in
            let peer = try await RawPeer.connect(port: appliance.port, nil)
            peer.send(bytes: Array(bytes.utf8))
            await peer.untilClosed()
            try await eventually("a line in the log") { appliance.log.text.contains("refused a connection: it ") }
        }
    }

    @Test func clientWithoutCertificate() async throws {
        try await undisturbed { appliance in
            var configuration = TLSConfiguration.makeClientConfiguration()
            configuration.certificateVerification = .none
            let peer = try await RawPeer.connect(port: appliance.port, configuration)
            await peer.untilClosed()
            try await eventually("a line in the log") { appliance.log.text.contains("it showed no certificate") }
        }
    }

    @Test func clientOfAForeignAuthority() async throws {
        try await undisturbed { appliance in
            let foreign = try CertificateAuthority.create(directory: appliance.directory.path + "/foreign")
            let peer = try await RawPeer.connect(appliance.endpoint(authority: foreign))
            await peer.untilClosed()
            try await eventually("a line in the log") { appliance.log.text.contains("its certificate is not from this CA") }
        }
    }

    @Test func serverCertificateIsNoClientCertificate() async throws {
        try await undisturbed { appliance in
            let identity = try appliance.authority.issueServer(hosts: ["web-1"])
            let endpoint = LinkEndpoint(
                host: "127.0.0.1", port: appliance.port, identity: identity, caCertificatePEM: appliance.authority.certificatePEM)
            let peer = try await RawPeer.connect(endpoint)
            await peer.untilClosed()
            try await eventually("a line in the log") { appliance.log.text.contains("refused a connection") }
        }
    }

    @Test func oldTLSVersion() async throws {
        try await undisturbed { appliance in
            var configuration = TLSConfiguration.makeClientConfiguration()
            configuration.certificateVerification = .none
            configuration.maximumTLSVersion = .tlsv12
            let peer = try await RawPeer.connect(port: appliance.port, configuration)
            await peer.untilClosed()
            try await eventually("a line in the log") { appliance.log.text.contains("it does not offer TLS 1.3") }
        }
    }

    @Test func garbageInsideTLS() async throws {
        try await undisturbed { appliance in
            let peer = try await RawPeer.connect(appliance.endpoint(server: ServerID("other")))
            peer.send(bytes: Array("this is not a frame, whatever it is, and it goes on and on".utf8))
            await peer.untilClosed()
            #expect(appliance.log.text.contains("garbage instead of a frame"))
        }
    }

    @Test func otherProtocolVersionIsToldSo() async throws {
        try await undisturbed { appliance in
            let peer = try await RawPeer.connect(appliance.endpoint(server: ServerID("other")))
            peer.send(.hello, version: 9) { $0.putJSON(Hello()) }
            let refusal = try #require(await peer.refusal())
            #expect(refusal.code == "version")
            #expect(refusal.reason.contains("version 9"))
        }
    }

    @Test func wrongFrameOrder() async throws {
        try await undisturbed { appliance in
            let peer = try await RawPeer.connect(appliance.endpoint(server: ServerID("other")))
            peer.send(.epochBegin) { EpochBeginMeta(cut: Cut(epoch: EpochNumber(1), kind: .exact, timeNanoseconds: 1, blockCount: 0)).write(&$0) }
            #expect(await peer.refusal()?.code == "protocolError")
        }
    }

    @Test func removedServerIsRefusedAndMayComeBack() async throws {
        let appliance = try TestAppliance()
        try await appliance.start()
        appliance.policy.withLock { $0.removed = [ServerID("web-1")] }
        let source = ModelSource(sizes: [1 << 20], seed: 2)
        let sender = try appliance.sender(source)
        sender.start()
        try await eventually("phase failed") { sender.status.phase == .failed }
        #expect(sender.status.reason?.contains("web-1 is not (any more) a protected server") == true)
        #expect(appliance.store.group(TestAppliance.group) == nil)
        appliance.policy.withLock { $0.removed = [] }
        await source.untilAcknowledged(exact: 2)
        // Removed while it runs.
        appliance.policy.withLock { $0.removed = [ServerID("web-1")] }
        await appliance.server.disconnect(ServerID("web-1"))
        try await eventually("phase failed") { sender.status.phase == .failed }
        await sender.stop()
        await appliance.stop()
    }

    @Test func foreignGroupIsRefused() async throws {
        let appliance = try TestAppliance()
        try await appliance.start()
        appliance.policy.withLock { $0.replicates = false }
        let source = ModelSource(sizes: [1 << 20], seed: 2)
        let sender = try appliance.sender(source)
        sender.start()
        try await eventually("phase failed") { sender.status.phase == .failed }
        #expect(sender.status.reason?.contains("group web-1 is not replicated from server web-1") == true)
        await sender.stop()
        await appliance.stop()
    }

    @Test func olderGenerationIsFenced() async throws {
        let appliance = try TestAppliance()
        try await appliance.start()
        let source = ModelSource(sizes: [1 << 20], seed: 2)
        let sender = try appliance.sender(source)
        sender.start()
        await source.untilAcknowledged(exact: 3)
        // While it runs: the next epoch is not taken.
        #expect(try appliance.store.raiseGeneration(TestAppliance.group) == Generation(2))
        try await eventually("phase fenced") { sender.status.phase == .fenced }
        #expect(sender.status.reason == "replication ended under generation 2; this source has generation 1")
        let points = appliance.store.recoveryPoints(TestAppliance.group).count
        await sender.stop()
        #expect(sender.status.phase == .fenced)
        // In the greeting.
        let again = try appliance.sender(source)
        again.start()
        try await eventually("phase fenced") { again.status.phase == .fenced }
        await again.stop()
        #expect(appliance.store.recoveryPoints(TestAppliance.group).count == points)
        _ = try appliance.checkRecoveryPoints(source)
        await appliance.stop()
    }

    @Test func shrunkDiskIsRefused() async throws {
        let appliance = try TestAppliance()
        try await appliance.start()
        let source = ModelSource(sizes: [2 << 20], seed: 2)
        let sender = try appliance.sender(source)
        sender.start()
        await source.untilAcknowledged(exact: 1)
        await sender.stop()
        let smaller = try appliance.sender(ModelSource(sizes: [1 << 20], seed: 2))
        smaller.start()
        try await eventually("phase failed") { smaller.status.phase == .failed }
        #expect(smaller.status.reason?.contains("disk disk-0 is 1 MiB now, was 2 MiB") == true)
        await smaller.stop()
        await appliance.stop()
    }

    @Test func agentRefusesAnApplianceOfAnotherAuthority() async throws {
        let appliance = try TestAppliance()
        try await appliance.start()
        let foreign = try CertificateAuthority.create(directory: appliance.directory.path + "/foreign")
        var endpoint = try appliance.endpoint()
        endpoint.caCertificatePEM = foreign.certificatePEM
        let source = ModelSource(sizes: [1 << 20], seed: 2)
        let sender = try appliance.sender(source, endpoint: endpoint)
        sender.start()
        try await eventually("phase interrupted") { sender.status.phase == .interrupted }
        #expect(sender.status.reason?.contains("not from this CA") == true)
        await sender.stop()
        await appliance.stop()
    }

    @Test func nobodyListens() async throws {
        let appliance = try TestAppliance()
        try await appliance.start()
        await appliance.stop()
        let sender = try appliance.sender(ModelSource(sizes: [1 << 20], seed: 2))
        sender.start()
        try await eventually("phase interrupted") { sender.status.phase == .interrupted }
        #expect(sender.status.reason?.contains("cannot reach the appliance at 127.0.0.1 port \(appliance.port)") == true)
        #expect(sender.status.reason?.hasSuffix("Connection refused") == true)
        await sender.stop()
    }
}

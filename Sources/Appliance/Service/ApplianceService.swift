import Foundation
import GRDB
import Hummingbird
import HummingbirdTLS
import Logging
import NIOCore
import NIOSSL
import Replica
import ServiceLifecycle

/// The appliance: store, link, lifecycle and API in one process. Ends gracefully on SIGTERM; machines go on without it.
public struct ApplianceService: Service {
    private let configuration: ApplianceConfiguration
    private let logger: Logger
    private let onReady: @Sendable (ClientProfile) async -> Void

    /// `onReady` is called once the API and the link listen and STATE/client.json is written.
    public init(configuration: ApplianceConfiguration, logger: Logger, onReady: @escaping @Sendable (ClientProfile) async -> Void = { _ in }) {
        self.configuration = configuration
        self.logger = logger
        self.onReady = onReady
    }

    /// Runs until SIGTERM or SIGINT.
    public func runUntilSignal() async throws {
        let group = ServiceGroup(
            configuration: .init(
                services: [.init(service: self, successTerminationBehavior: .gracefullyShutdownGroup)],
                gracefulShutdownSignals: [.sigterm, .sigint], logger: logger))
        try await group.run()
    }

    public func run() async throws {
        try FaultPoint.arm(stateDirectory: configuration.stateDirectory, logger: logger)
        for directory in [configuration.stateDirectory, configuration.runtimeDirectory, configuration.storeDirectory] {
            try makeDirectory(directory)
        }
        let lock = try StateLock(directory: configuration.stateDirectory)
        defer { withExtendedLifetime(lock) {} }
        let catalogue = try Catalogue(path: configuration.stateDirectory + "/catalogue.sqlite")
        let (storeDirectory, storeLogger) = (configuration.storeDirectory, logger)
        let store = try await blocking { try ReplicaStore.open(directory: storeDirectory, logger: storeLogger) }
        do {
            try await serve(catalogue: catalogue, store: store)
        } catch {
            try? await blocking { store.close() }
            try? catalogue.close()
            throw error
        }
        try await blocking { store.close() }
        try catalogue.close()
        logger.info("the appliance has stopped")
    }

    private func serve(catalogue: Catalogue, store: ReplicaStore) async throws {
        let authority = try CertificateAuthority.loadOrCreate(directory: configuration.stateDirectory + "/ca")
        let identity = try authority.issueServer(hosts: configuration.certificateHosts)
        let machines = RecoveryHost(
            store: store, qemu: configuration.qemu, runtimeDirectory: configuration.runtimeDirectory, stateDirectory: configuration.stateDirectory,
            logger: logger)
        let exports = PointExporter(store: store, runtimeDirectory: configuration.runtimeDirectory)
        let mounts = PointMounter(store: store, runtimeDirectory: configuration.runtimeDirectory, logger: logger)
        let lifecycle = Lifecycle(
            catalogue: catalogue, store: store, machines: machines, exports: exports, mounts: mounts, authority: authority,
            settings: settings(apiPort: configuration.listen.port, linkPort: configuration.link.port), logger: logger)
        await machines.setOnEnded { [weak lifecycle] id, why in await lifecycle?.machineEnded(id, why) }
        let link = LinkServer(
            store: store, identity: identity, caCertificatePEM: authority.certificatePEM, host: configuration.link.host,
            port: configuration.link.port, delegate: lifecycle, logger: logger)
        await lifecycle.connect(link: link)
        do {
            try await lifecycle.resume()
            try await lifecycle.startUpkeep(configuration.upkeep)
            await lifecycle.startConfigurationCopies()
            await lifecycle.startAlerts(AlertDesk(catalogue: catalogue, logger: logger), everySeconds: configuration.alertsEverySeconds)
            try await lifecycle.renewIdentity()
            let linkPort = try await link.start()
            await lifecycle.startDrillSchedules(everySeconds: configuration.drillSchedulesEverySeconds)
            try await serveAPI(catalogue: catalogue, lifecycle: lifecycle, authority: authority, identity: identity, linkPort: linkPort)
        } catch {
            await lifecycle.stop()
            await link.stop()
            throw error
        }
        await lifecycle.stop()
        await link.stop()
    }

    private func serveAPI(catalogue: Catalogue, lifecycle: Lifecycle, authority: CertificateAuthority, identity: TLSIdentity, linkPort: Int) async throws {
        var tls = TLSConfiguration.makeServerConfiguration(
            certificateChain: try NIOSSLCertificate.fromPEMBytes(Array(identity.certificatePEM.utf8)).map { .certificate($0) },
            privateKey: .privateKey(try NIOSSLPrivateKey(bytes: Array(identity.keyPEM.utf8), format: .pem)))
        tls.minimumTLSVersion = .tlsv12
        let token = try await AccessTokens(catalogue: catalogue).administrator(profilePath: profilePath)
        let passwordPath = self.configuration.stateDirectory + "/administrator-password"
        let api = API(lifecycle: lifecycle, catalogue: catalogue, administratorPasswordPath: passwordPath, logger: logger)
        if try await api.users.begin() {
            logger.notice("the user \(Users.administrator) has its first password in \(passwordPath), until it is changed (afterimage user set-password \(Users.administrator))")
        }
        let configuration = configuration
        var quiet = logger
        quiet.logLevel = max(logger.logLevel, .warning)
        let application = Application(
            router: api.router(), server: try .tls(.http1(), tlsConfiguration: tls),
            configuration: .init(address: .hostname(configuration.listen.host, port: configuration.listen.port), serverName: "afterimage"),
            onServerRunning: { channel in
                let port = channel.localAddress?.port ?? configuration.listen.port
                let settings = settings(apiPort: port, linkPort: linkPort)
                await lifecycle.setSettings(settings)
                let local = configuration.listen.isEverywhere ? "127.0.0.1" : configuration.listen.host
                let profile = ClientProfile(
                    url: "https://\(ListenAddress(host: local, port: port))", caFile: configuration.stateDirectory + "/ca/ca.pem", token: token)
                do { try profile.write(to: profilePath) } catch { logger.error("cannot write \(profilePath): \(error)") }
                logger.info("the API listens on \(profile.url); the fingerprint of its CA is \(lifecycle.authority.fingerprint)")
                await onReady(profile)
            }, logger: quiet)
        do { try await application.run() } catch let error as IOError where error.errnoCode == EADDRINUSE || error.errnoCode == EADDRNOTAVAIL || error.errnoCode == EACCES {
            throw ApplianceError.failed("cannot listen on \(configuration.listen) for the API: \(String(cString: strerror(error.errnoCode))) (choose another with --listen)")
        }
    }

    private func settings(apiPort: Int, linkPort: Int) -> LifecycleSettings {
        let apiHost = configuration.advertisedHost ?? (configuration.listen.isEverywhere ? "127.0.0.1" : configuration.listen.host)
        let linkHost = configuration.advertisedHost ?? (configuration.link.isEverywhere ? "127.0.0.1" : configuration.link.host)
        return LifecycleSettings(
            apiURL: "https://\(ListenAddress(host: apiHost, port: apiPort))", linkHost: linkHost, linkPort: linkPort,
            storeDirectory: configuration.storeDirectory, stateDirectory: configuration.stateDirectory, hydrates: configuration.hydrates, certificateHosts: configuration.certificateHosts)
    }

    private var profilePath: String { configuration.stateDirectory + "/client.json" }

    private func makeDirectory(_ path: String) throws {
        guard path.hasPrefix("/") else { throw ApplianceError.invalid("\(path) must be an absolute path") }
        do {
            try FileManager.default.createDirectory(atPath: path, withIntermediateDirectories: true, attributes: [.posixPermissions: 0o700])
        } catch {
            throw ApplianceError.failed("cannot create the directory \(path): \(error.localizedDescription)")
        }
    }
}

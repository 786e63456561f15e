import Appliance
import Logging
import ServiceLifecycle

/// Logs go to standard error; the newest lines are kept for a support bundle.
func bootstrapLogging(_ level: Logger.Level) {
    LoggingSystem.bootstrap { label in
        var written = StreamLogHandler.standardError(label: label), kept = RecentLog.shared.handler(label: label)
        written.logLevel = level
        kept.logLevel = level
        return MultiplexLogHandler([written, kept])
    }
}

/// Runs one service until it ends or a signal asks it to.
func runDaemon(_ name: String, logLevel: Logger.Level, _ make: (Logger) -> any Service) async throws {
    bootstrapLogging(logLevel)
    let logger = Logger(label: name)
    do {
        let group = ServiceGroup(
            configuration: .init(
                services: [.init(service: make(logger), successTerminationBehavior: .gracefullyShutdownGroup)],
                gracefulShutdownSignals: [.sigterm, .sigint], logger: logger))
        try await group.run()
    } catch {
        Terminal.error("the \(name) cannot go on: \(error)")
        throw Exit.failed
    }
}

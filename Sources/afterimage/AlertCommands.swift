import Appliance
import ArgumentParser
import Foundation

struct AlertCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(commandName: "alert", abstract: "What somebody ought to know.", subcommands: [List.self])

    struct List: ClientCommand {
        static let configuration = CommandConfiguration(abstract: "List the alerts that are raised, newest first.")
        @OptionGroup var global: GlobalOptions
        @Flag(help: "Also those that are over.") var all = false
        @Option(help: "At most so many.") var limit: Int = 50

        func run(_ client: APIClient) async throws {
            let alerts: [AlertRecord] = try await client.get("/v1/alerts?limit=\(limit)\(all ? "&all=true" : "")")
            try show(alerts) {
                alerts.isEmpty
                    ? [all ? "no alert was ever raised" : "no alert is raised"]
                    : Terminal.table(
                        ["RAISED", "OVER", "SEVERITY", "KIND", "ALERT"],
                        alerts.map { [Words.timeToSecond($0.raised), $0.cleared.map(Words.timeToSecond) ?? "-", $0.severity.rawValue, $0.kind.rawValue, $0.text] })
            }
        }
    }
}

struct AlertChannelCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "alert-channel", abstract: "Where alerts are delivered.", subcommands: [Create.self, List.self, Test.self, Delete.self])

    struct Create: ClientCommand {
        static let configuration = CommandConfiguration(
            abstract: "Deliver alerts to a webhook or by mail.",
            discussion: """
                Give --webhook, or --mail-server, --mail-from and --mail-to. Every alert is told when it is raised and when it is over, in order, again and \
                again until it arrives or a day has gone. Try the channel with afterimage alert-channel test NAME.

                A webhook gets a POST with JSON: news (raised, cleared or test), text, alert, appliance, version, and delivery, a number that stays the same when \
                the message is sent again. With a secret, X-Afterimage-Signature is sha256= and the body's HMAC-SHA256 in hexadecimal. An answer of 200 to 299 \
                is an arrival.
                """)
        @OptionGroup var global: GlobalOptions
        @Argument(help: "Name of the channel.") var name: String
        @Option(help: ArgumentHelp("Where to POST.", valueName: "url")) var webhook: String?
        @Option(help: ArgumentHelp("The file with the webhook's secret (its first line).", valueName: "file")) var secretFile: String?
        @Option(help: ArgumentHelp("The file with the CA certificate of the webhook's server, PEM. Default: what the appliance's host trusts.", valueName: "file")) var caFile: String?
        @Option(help: ArgumentHelp("smtp://HOST[:PORT], with STARTTLS, or smtps://HOST[:PORT].", valueName: "url")) var mailServer: String?
        @Option(help: ArgumentHelp("The sender.", valueName: "address")) var mailFrom: String?
        @Option(help: ArgumentHelp("A recipient; repeat it.", valueName: "address")) var mailTo: [String] = []
        @Option(help: ArgumentHelp("The user at the mail server.", valueName: "name")) var mailUser: String?
        @Option(help: ArgumentHelp("The file with its password (its first line).", valueName: "file")) var mailPasswordFile: String?
        @Flag(help: "Send mail even when the server offers no TLS.") var mailAllowPlain = false
        @Option(help: "Only alerts of this severity and above: warning or critical.") var severity: AlertSeverity = .warning

        func validate() throws { _ = try request(read: { _ in "" }) }

        private func request(read: (String) throws -> String) throws -> CreateAlertChannel {
            let isMail = mailServer != nil || mailFrom != nil || !mailTo.isEmpty
            guard isMail != (webhook != nil) else { throw ValidationError("give --webhook, or --mail-server with --mail-from and --mail-to") }
            if let webhook {
                guard mailUser == nil, mailPasswordFile == nil, !mailAllowPlain else { throw ValidationError("the --mail- options are not for a webhook") }
                let hook = AlertTarget.Webhook(url: webhook, secret: try secretFile.map { try Self.line(try read($0)) }, caCertificate: try caFile.map(read))
                return CreateAlertChannel(name: name, webhook: hook, severity: severity)
            }
            guard let mailServer, let mailFrom, !mailTo.isEmpty else { throw ValidationError("mail needs --mail-server, --mail-from and --mail-to") }
            guard secretFile == nil, caFile == nil else { throw ValidationError("--secret-file and --ca-file are for a webhook") }
            let mail = AlertTarget.Mail(
                server: mailServer, from: mailFrom, to: mailTo, user: mailUser, password: try mailPasswordFile.map { try Self.line(try read($0)) },
                allowsPlain: mailAllowPlain ? true : nil)
            return CreateAlertChannel(name: name, mail: mail, severity: severity)
        }

        private static func line(_ text: String) throws -> String { String(text.split(whereSeparator: \.isNewline).first ?? "") }

        func run(_ client: APIClient) async throws {
            let request = try request { file in
                do { return try String(contentsOfFile: file, encoding: .utf8) } catch {
                    Terminal.error("cannot read \(file)")
                    throw Exit.failed
                }
            }
            let channel: AlertChannelView = try await client.post("/v1/alert-channels", request)
            try show(channel) {
                ["alerts (\(channel.severity.rawValue) and above) go to \(channel.target); try it: afterimage alert-channel test \(channel.name)"]
            }
        }
    }

    struct List: ClientCommand {
        static let configuration = CommandConfiguration(abstract: "List where alerts are delivered.")
        @OptionGroup var global: GlobalOptions

        func run(_ client: APIClient) async throws {
            let channels: [AlertChannelView] = try await client.get("/v1/alert-channels")
            try show(channels) {
                channels.isEmpty
                    ? ["no channel: nobody is told of alerts (afterimage alert-channel create)"]
                    : Terminal.table(
                        ["NAME", "SEVERITY", "LAST DELIVERED", "WAITING", "TO"],
                        channels.map {
                            [$0.name, $0.severity.rawValue, $0.lastDelivered.map(Words.timeToSecond) ?? "never", "\($0.waitingCount)", $0.target + ($0.error.map { ": \($0)" } ?? "")]
                        })
            }
        }
    }

    struct Test: ClientCommand {
        static let configuration = CommandConfiguration(abstract: "Send a test message now, and say what became of it.")
        @OptionGroup var global: GlobalOptions
        @Argument(help: "Name of the channel.") var name: String

        func run(_ client: APIClient) async throws {
            let result: AlertTestResult = try await client.post("/v1/alert-channels/\(APIClient.segment(name))/test")
            if result.delivered || global.json { try show(result) { [result.detail] } } else { Terminal.error(result.detail) }
            if !result.delivered { throw Exit.failed }
        }
    }

    struct Delete: ClientCommand {
        static let configuration = CommandConfiguration(abstract: "Delete a channel, and what it has not delivered yet.")
        @OptionGroup var global: GlobalOptions
        @Argument(help: "Name of the channel.") var name: String

        func run(_ client: APIClient) async throws {
            try await client.deleteNoContent("/v1/alert-channels/\(APIClient.segment(name))")
            say("channel \(name) is deleted")
        }
    }
}

extension AlertSeverity: ExpressibleByArgument {}

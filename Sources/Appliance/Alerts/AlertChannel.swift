import Foundation
import GRDB

/// Where alerts are delivered.
public enum AlertTarget: Sendable, Codable, Hashable {
    case webhook(Webhook)
    case mail(Mail)

    /// A POST of JSON.
    public struct Webhook: Sendable, Codable, Hashable {
        /// http or https.
        public var url: String
        /// The body is signed with it: `X-Afterimage-Signature: sha256=` and the HMAC-SHA256, hexadecimal.
        public var secret: String?
        /// PEM; nil: those that the appliance's host trusts.
        public var caCertificate: String?
        public init(url: String, secret: String? = nil, caCertificate: String? = nil) {
            self.url = url
            self.secret = secret
            self.caCertificate = caCertificate
        }
    }

    public struct Mail: Sendable, Codable, Hashable {
        /// `smtp://HOST[:PORT]`, or `smtps://` for TLS from the first byte.
        public var server: String
        public var from: String
        public var to: [String]
        public var user: String?
        public var password: String?
        /// Without TLS nothing is sent, unless this is true.
        public var allowsPlain: Bool?
        public init(server: String, from: String, to: [String], user: String? = nil, password: String? = nil, allowsPlain: Bool? = nil) {
            self.server = server
            self.from = from
            self.to = to
            self.user = user
            self.password = password
            self.allowsPlain = allowsPlain
        }
    }

    /// For people, without secrets: a webhook's path often is one.
    var summary: String {
        switch self {
        case .webhook(let hook):
            let url = URLComponents(string: hook.url)
            return "\(url?.scheme ?? "http")://\(url?.host ?? "?")\(url?.port.map { ":\($0)" } ?? "")/…"
        case .mail(let mail): return "\(mail.to.joined(separator: ", ")) by \(mail.server)"
        }
    }

    func check() throws(ApplianceError) {
        switch self {
        case .webhook(let hook):
            guard let url = URLComponents(string: hook.url), ["http", "https"].contains(url.scheme), url.host?.isEmpty == false, !hook.url.contains(where: \.isNewline) else {
                throw .invalid("\(hook.url) cannot be a webhook: write http://HOST/… or https://HOST/…")
            }
            if hook.secret?.isEmpty == true { throw .invalid("the secret of a webhook must not be empty") }
            if let pem = hook.caCertificate { _ = try AlertTransport.certificates(pem) }
        case .mail(let mail):
            guard let url = URLComponents(string: mail.server), ["smtp", "smtps"].contains(url.scheme), url.host?.isEmpty == false, url.path.isEmpty || url.path == "/",
                url.user == nil, url.query == nil
            else { throw .invalid("\(mail.server) cannot be a mail server: write smtp://HOST or smtps://HOST, :PORT after it if it is not the usual one") }
            guard (1...50).contains(mail.to.count) else { throw .invalid("mail goes to 1 to 50 addresses; these are \(mail.to.count)") }
            for address in mail.to + [mail.from] where address.wholeMatch(of: /[A-Za-z0-9.!#$%&'*+\/=?^_`{|}~-]+@[A-Za-z0-9.-]+/) == nil {
                throw .invalid("\(address) is not a mail address")
            }
            guard (mail.user == nil) == (mail.password == nil) else { throw .invalid("a mail server wants a user and a password, or neither") }
            for text in [mail.server, mail.user ?? "", mail.password ?? ""] where text.contains(where: \.isNewline) || text.utf8.contains(0) {
                throw .invalid("a mail server's name, user and password have one line each")
            }
        }
    }
}

public struct CreateAlertChannel: Sendable, Codable {
    public var name: String
    /// One of these two.
    public var webhook: AlertTarget.Webhook?
    public var mail: AlertTarget.Mail?
    /// Only alerts of this severity and above; warning if not said.
    public var severity: AlertSeverity?
    public init(name: String, webhook: AlertTarget.Webhook? = nil, mail: AlertTarget.Mail? = nil, severity: AlertSeverity? = nil) {
        self.name = name
        self.webhook = webhook
        self.mail = mail
        self.severity = severity
    }

    func target() throws(ApplianceError) -> AlertTarget {
        switch (webhook, mail) {
        case (let webhook?, nil): .webhook(webhook)
        case (nil, let mail?): .mail(mail)
        default: throw .invalid("a channel is a webhook or mail: give one of them")
        }
    }
}

struct AlertChannelRecord: Codable, Sendable, FetchableRecord, PersistableRecord {
    static let databaseTableName = "alertChannel"
    var name: String
    var target: AlertTarget
    var severity: AlertSeverity
    var created: Date
}

/// One message that a channel is to carry. Those of a channel go one after the other.
struct AlertDeliveryRecord: Codable, Sendable, FetchableRecord, MutablePersistableRecord {
    static let databaseTableName = "alertDelivery"
    var id: Int64?
    var channel: String
    var alert: Int64
    var news: AlertMessage.News
    var created: Date
    var attempts = 0
    var next: Date
    /// Of the last attempt.
    var error: String?
    /// Delivered, or given up (then `error` says why).
    var ended: Date?

    mutating func didInsert(_ inserted: InsertionSuccess) { id = inserted.rowID }
}

public struct AlertChannelView: Sendable, Codable, Hashable {
    public var name: String
    public var kind: String
    /// Where to, without secrets.
    public var target: String
    public var severity: AlertSeverity
    public var created: Date
    /// Messages that have not arrived yet.
    public var waitingCount: Int
    /// Of the oldest of them.
    public var error: String?
    public var lastDelivered: Date?
}

/// What became of a test message.
public struct AlertTestResult: Sendable, Codable, Hashable {
    public var delivered: Bool
    public var detail: String
}

/// What a channel carries; a webhook's body.
struct AlertMessage: Codable, Sendable {
    enum News: String, Codable, Sendable, DatabaseValueConvertible { case raised, cleared, test }
    var news: News
    /// The same when it is sent again. nil: a test.
    var delivery: Int64?
    /// The appliance's host.
    var appliance: String
    var version: String
    var alert: AlertRecord
    /// For people (and for chat programs that show nothing else).
    var text: String

    init(_ news: News, delivery: Int64?, alert: AlertRecord) {
        self.news = news
        self.delivery = delivery
        self.alert = alert
        appliance = ProcessInfo.processInfo.hostName
        version = afterimageVersion
        text = switch news {
        case .raised: "\(alert.severity.rawValue): \(alert.text)"
        case .cleared: "over: \(alert.text)"
        case .test: alert.text
        }
    }
}

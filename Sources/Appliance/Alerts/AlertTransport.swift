import AsyncHTTPClient
import Crypto
import Foundation
import NIOCore
import NIOSSL
import Replica

/// Carries one message to one target. Throws why it did not arrive, in words.
enum AlertTransport {
    static let secondsMax = 20

    static func send(_ message: AlertMessage, to target: AlertTarget) async throws {
        switch target {
        case .webhook(let hook): try await post(message, to: hook)
        case .mail(let mail): try await submit(message, to: mail)
        }
    }

    static func certificates(_ pem: String) throws(ApplianceError) -> [NIOSSLCertificate] {
        do {
            let found = try NIOSSLCertificate.fromPEMBytes(Array(pem.utf8))
            if !found.isEmpty { return found }
        } catch {}
        throw .invalid("the CA certificate of the webhook is not PEM")
    }

    // MARK: webhook

    private static func post(_ message: AlertMessage, to hook: AlertTarget.Webhook) async throws {
        let body = try APIJSON.encoder().encode(message)
        var request = HTTPClientRequest(url: hook.url)
        request.method = .POST
        request.headers.add(name: "Content-Type", value: "application/json")
        request.headers.add(name: "User-Agent", value: "afterimage/\(afterimageVersion)")
        if let delivery = message.delivery { request.headers.add(name: "X-Afterimage-Delivery", value: "\(delivery)") }
        if let secret = hook.secret { request.headers.add(name: "X-Afterimage-Signature", value: "sha256=" + signature(body, secret)) }
        request.body = .bytes(ByteBuffer(data: body))
        var tls = TLSConfiguration.makeClientConfiguration()
        if let pem = hook.caCertificate { tls.trustRoots = .certificates(try certificates(pem)) }
        var configuration = HTTPClient.Configuration(tlsConfiguration: tls, redirectConfiguration: .disallow)
        configuration.timeout.connect = .seconds(10)
        // The channel tries again, later.
        configuration.connectionPool.retryConnectionEstablishment = false
        let client = HTTPClient(eventLoopGroupProvider: .singleton, configuration: configuration)
        let outcome: Result<UInt, any Error>
        do { outcome = .success(try await client.execute(request, timeout: .seconds(Int64(secondsMax))).status.code) } catch { outcome = .failure(error) }
        try? await client.shutdown()
        let status = try outcome.get()
        guard (200..<300).contains(status) else { throw ApplianceError.failed("it answered with status \(status)") }
    }

    static func signature(_ body: Data, _ secret: String) -> String {
        HMAC<SHA256>.authenticationCode(for: body, using: SymmetricKey(data: Data(secret.utf8))).map { String($0 >> 4, radix: 16) + String($0 & 15, radix: 16) }.joined()
    }

    // MARK: mail

    static func curl() throws(ApplianceError) -> HostProgram { try HostProgram.find("curl", package: "curl") }

    private static func submit(_ message: AlertMessage, to mail: AlertTarget.Mail) async throws {
        let file = try NamelessFile("afterimage-mail")
        defer { file.close() }
        try file.write(MailText.text(message, mail))
        // Its configuration on standard input, so that a password is not among a process's arguments.
        var options = [
            ("url", mail.server), ("mail-from", mail.from), ("upload-file", file.path), ("max-time", "\(secondsMax)"), ("connect-timeout", "10"),
        ]
        options += mail.to.map { ("mail-rcpt", $0) }
        if let user = mail.user, let password = mail.password { options.append(("user", "\(user):\(password)")) }
        var lines = options.map { "\($0.0) = \"\($0.1.replacing("\\", with: "\\\\").replacing("\"", with: "\\\""))\"" } + ["silent", "show-error"]
        if mail.server.hasPrefix("smtp:"), mail.allowsPlain != true { lines.append("ssl-reqd") }
        let outcome = try await curl().outcome(["--disable", "--config", "-"], input: lines.joined(separator: "\n") + "\n")
        guard outcome.isSuccess else { throw ApplianceError.failed(outcome.complaint) }
    }
}

/// A message as RFC 5322 and MIME have it.
enum MailText {
    static func text(_ message: AlertMessage, _ mail: AlertTarget.Mail, now: Date = Date()) -> String {
        let alert = message.alert
        var body = message.text + "\n\n"
        if message.news != .test {
            body += "Raised   \(APIJSON.text(alert.raised))\n"
            if let cleared = alert.cleared { body += "Over     \(APIJSON.text(cleared))\n" }
            body += "Kind     \(alert.kind.rawValue)\n"
        }
        body += "From     the appliance on \(message.appliance), Afterimage \(message.version)\n"
        let id = (message.delivery.map { "\($0)." } ?? "test.") + Secrets.random().prefix(16) + "@" + (mail.from.split(separator: "@").last ?? "localhost")
        let head = [
            "From: Afterimage <\(mail.from)>", "To: \(mail.to.joined(separator: ",\r\n "))", "Subject: \(subject(message))", "Date: \(date(now))", "Message-ID: <\(id)>",
            "Auto-Submitted: auto-generated", "MIME-Version: 1.0", "Content-Type: text/plain; charset=utf-8", "Content-Transfer-Encoding: base64",
        ]
        let encoded = Data(body.utf8).base64EncodedString(options: [.lineLength76Characters, .endLineWithCarriageReturn, .endLineWithLineFeed])
        return head.joined(separator: "\r\n") + "\r\n\r\n" + encoded + "\r\n"
    }

    /// One line of plain ASCII, or encoded words (RFC 2047).
    static func subject(_ message: AlertMessage) -> String {
        let text = "[Afterimage] " + String(message.text.map { $0.isNewline ? " " : $0 }.prefix(120))
        if text.utf8.allSatisfy({ (32..<127).contains($0) }) { return text }
        var words: [String] = [], part = ""
        for character in text {
            if part.utf8.count + character.utf8.count > 45 {
                words.append(part)
                part = ""
            }
            part.append(character)
        }
        return (words + [part]).map { "=?utf-8?B?\(Data($0.utf8).base64EncodedString())?=" }.joined(separator: "\r\n ")
    }

    private static func date(_ date: Date) -> String {
        let formatter = DateFormatter()
        formatter.locale = Locale(identifier: "en_US_POSIX")
        formatter.timeZone = TimeZone(secondsFromGMT: 0)
        formatter.dateFormat = "EEE, dd MMM yyyy HH:mm:ss Z"
        return formatter.string(from: date)
    }
}

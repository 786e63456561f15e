import Crypto
import Foundation
import HTTPTypes
import Hummingbird

/// Protection against lost updates (RFC 9110, 13.1.1): a change with `If-Match` is made only if what it changes is still as its writer has seen it.
public struct Precondition: Sendable, Equatable {
    /// nil: whatever it is.
    private var tags: [String]?
    private var isAnything = false

    public static let none = Precondition()

    /// The header as it was sent; nil when it was not. Throws `invalid` when it is none.
    public init(_ header: String?) throws(ApplianceError) {
        guard let header = header?.trimmingCharacters(in: .whitespaces) else { return }
        if header == "*" {
            isAnything = true
            return
        }
        var tags: [String] = []
        for word in header.split(separator: ",").map({ $0.trimmingCharacters(in: .whitespaces) }) {
            guard word.wholeMatch(of: /(W\/)?"[^"]*"/) != nil else { throw .invalid("If-Match is * or ETags in quotation marks as they were given, not \(header)") }
            tags.append(word)
        }
        guard !tags.isEmpty else { throw .invalid("If-Match is * or ETags in quotation marks as they were given, not empty") }
        self.tags = tags
    }

    private init() {}

    /// Part of the transaction that makes the change. `what` is as a sentence names it.
    func check(_ tag: EntityTag, _ what: String) throws(ApplianceError) {
        guard let tags, !tags.contains(tag.text) else { return }
        throw .changed("Somebody has changed \(what) meanwhile: look at it again, then decide anew. Nothing was done.")
    }
}

/// A strong ETag of what requests change of a thing, not of figures that change by themselves.
public struct EntityTag: Sendable, Equatable {
    let text: String

    init(of value: some Encodable) throws {
        let digest = SHA256.hash(data: try APIJSON.encoder().encode(value))
        text = "\"" + digest.prefix(16).map { String(format: "%02x", $0) }.joined() + "\""
    }
}

extension ServerRecord {
    /// Of all that requests set.
    var tag: EntityTag {
        get throws { try EntityTag(of: Settable(id: id, name: name, sitePair: sitePair, settings: settings, policy: policy, alerts: alertsInForce)) }
    }
    var policyTag: EntityTag {
        get throws { try EntityTag(of: [id, policy]) }
    }
    var alertsTag: EntityTag {
        get throws { try EntityTag(of: [id, "\(alertsInForce.rpoTargetSeconds)", "\(alertsInForce.drillEverySeconds)"]) }
    }
    var alertsInForce: AlertSettings { alertSettings ?? .standard }

    private struct Settable: Encodable {
        var id: String
        var name: String
        var sitePair: String
        var settings: ReplicationSettings?
        var policy: String
        var alerts: AlertSettings
    }
}

extension PlanView {
    /// Of its steps, not of its runs.
    var tag: EntityTag {
        get throws { try EntityTag(of: definition) }
    }
}

extension DrillScheduleRecord {
    var tag: EntityTag {
        get throws { try EntityTag(of: Settable(server: server, everyDays: everyDays, minuteOfDay: minuteOfDay, machine: machine)) }
    }

    private struct Settable: Encodable {
        var server: String
        var everyDays: Int
        var minuteOfDay: Int
        var machine: StartMachine
    }
}

extension Request {
    var precondition: Precondition {
        get throws { try Precondition(headers[.ifMatch]) }
    }
}

extension Response {
    func tagged(_ tag: EntityTag) -> Response {
        var response = self
        response.headers[.eTag] = tag.text
        return response
    }
}

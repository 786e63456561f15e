import Foundation
import GRDB
import Replica

/// Something that somebody ought to know, for as long as it is so.
public struct Alert: Sendable, Codable, Hashable {
    public enum Kind: String, Sendable, Codable, CaseIterable {
        case storeFull = "store-full"
        case storeLow = "store-low"
        case badBlocks = "bad-blocks"
        case abnormal
        case interrupted
        case recoveryPointAge = "recovery-point-age"
        case machineStopped = "machine-stopped"
        case drillFailed = "drill-failed"
        case drillOverdue = "drill-overdue"
        case channelFailing = "channel-failing"
        case newDisk = "new-disk"

        public var severity: AlertSeverity {
            switch self {
            case .storeFull, .badBlocks, .abnormal, .interrupted, .machineStopped: .critical
            case .storeLow, .recoveryPointAge, .drillFailed, .drillOverdue, .channelFailing, .newDisk: .warning
            }
        }
    }

    public var kind: Kind
    public var severity: AlertSeverity
    /// What it is about: a server's, group's or channel's name; empty: the appliance. One alert of a kind is raised of each.
    public var subject: String
    /// What is wrong, and what to do.
    public var text: String

    init(kind: Kind, subject: String = "", text: String) {
        self.kind = kind
        severity = kind.severity
        self.subject = subject
        self.text = text
    }

    struct Key: Hashable {
        var kind: Kind
        var subject: String
    }
    var key: Key { Key(kind: kind, subject: subject) }
}

public enum AlertSeverity: String, Sendable, Codable, CaseIterable, Comparable {
    case warning, critical
    public static func < (a: AlertSeverity, b: AlertSeverity) -> Bool { a == .warning && b == .critical }
}

/// An alert that was raised. Kept after it has cleared.
public struct AlertRecord: Codable, Sendable, Hashable, FetchableRecord, MutablePersistableRecord {
    public static let databaseTableName = "alert"
    public var id: Int64?
    public var kind: Alert.Kind
    public var severity: AlertSeverity
    public var subject: String
    /// As it was when it was raised.
    public var text: String
    public var raised: Date
    /// nil: it is still so.
    public var cleared: Date?

    init(_ alert: Alert, raised: Date) {
        (kind, severity, subject, text) = (alert.kind, alert.severity, alert.subject, alert.text)
        self.raised = raised
    }

    public mutating func didInsert(_ inserted: InsertionSuccess) { id = inserted.rowID }
    var key: Alert.Key { Alert.Key(kind: kind, subject: subject) }
}

/// From when on a server's operator wants to hear of it.
public struct AlertSettings: Codable, Sendable, Hashable {
    /// RPO above target: the newest recovery point is older than this; 0 = never.
    public var rpoTargetSeconds: Int
    /// No machine of it has passed a boot check for this long; 0 = never.
    public var drillEverySeconds: Int
    static let secondsMax = 10 * 366 * 86_400
    public static let standard = AlertSettings(rpoTargetSeconds: 5 * 60, drillEverySeconds: 90 * 86_400)

    public init(rpoTargetSeconds: Int, drillEverySeconds: Int) {
        self.rpoTargetSeconds = rpoTargetSeconds
        self.drillEverySeconds = drillEverySeconds
    }

    /// For people.
    public var text: String {
        "RPO target " + (rpoTargetSeconds == 0 ? "none" : Amount.seconds(rpoTargetSeconds)) + ", a proven recovery "
            + (drillEverySeconds == 0 ? "whenever" : "every \(Amount.seconds(drillEverySeconds))")
    }
}

/// What is wrong with a server.
enum AlertRules {
    /// An agent that is restarted or a line that fails for a moment is not worth waking anybody.
    static let interruptedSeconds = 60.0

    static func alerts(of server: ServerRecord, newest: Date?, instances: [InstanceRecord], newDisks: [HostDisk] = [], now: Date = Date()) -> [Alert] {
        var alerts: [Alert] = []
        func raise(_ kind: Alert.Kind, _ text: String) { alerts.append(Alert(kind: kind, subject: server.name, text: "\(server.name): \(text)")) }
        let settings = server.alertSettings ?? .standard
        let why = server.reason.map { ": \($0)" } ?? ""
        switch server.state {
        case .abnormal:
            raise(.abnormal, "it is \(server.state.rawValue) and not followed\(why)")
        case .replicationInterrupted where server.settings?.isPaused != true && now.timeIntervalSince(server.stateSince) > interruptedSeconds:
            raise(.interrupted, "nothing of it arrives since \(APIJSON.text(server.stateSince))\(why)")
        case _ where server.state.phase == .forward && (server.state != .replicationInterrupted || server.settings?.isPaused == true):
            if let newest, settings.rpoTargetSeconds > 0, now.timeIntervalSince(newest) > Double(settings.rpoTargetSeconds) {
                raise(.recoveryPointAge, "its newest recovery point is of \(APIJSON.text(newest)), the target is \(Amount.seconds(settings.rpoTargetSeconds)) "
                    + (server.settings?.isPaused == true ? "(its replication is paused: afterimage replication resume \(server.name))" : "(afterimage status says what holds it up)"))
            }
        default: break
        }
        for machine in instances where machine.kind == .failover && machine.step == .stopped && server.state != .failbackInProgress {
            raise(.machineStopped, "its recovery machine has stopped\(machine.reason.map { ": \($0)" } ?? "") (afterimage failover start-machine \(server.name))")
        }
        if let disk = newDisks.first {
            let what = newDisks.map { "\($0.path) (\(Amount.bytes($0.sizeBytes)))" }.joined(separator: ", ")
            raise(.newDisk, "its host has \(newDisks.count == 1 ? "a disk" : "disks") that nobody protects: \(what) (afterimage server add-disk \(server.name) \(disk.path), or leave-out-disk)")
        }
        if server.drill == .testFailoverInProgress, let reason = server.drillReason {
            raise(.drillFailed, "its drill failed: \(reason) (look at it, then afterimage drill clear \(server.name))")
        }
        if server.state.phase == .forward, newest != nil, settings.drillEverySeconds > 0,
            case let last = server.lastProven?.time ?? server.created, now.timeIntervalSince(last) > Double(settings.drillEverySeconds)
        {
            let words = server.lastProven == nil ? "no machine of it has ever passed a boot check" : "the last machine of it that passed a boot check is of \(APIJSON.text(last))"
            raise(.drillOverdue, "\(words), one every \(Amount.seconds(settings.drillEverySeconds)) is wanted (afterimage drill start \(server.name))")
        }
        return alerts
    }
}

extension Alert.Kind: DatabaseValueConvertible {}
extension AlertSeverity: DatabaseValueConvertible {}

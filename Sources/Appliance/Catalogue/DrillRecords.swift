import Foundation
import GRDB
import Replica

/// When drills of a server are started by the appliance.
public struct DrillScheduleRecord: Codable, Sendable, FetchableRecord, PersistableRecord {
    public static let databaseTableName = "drillSchedule"
    public var server: String
    public var everyDays: Int
    /// Of the appliance's local time.
    public var minuteOfDay: Int
    /// As a drill is asked for; its recovery point is always the newest.
    public var machine: StartMachine
    /// When one is due; in the past: it is made up as soon as it can be.
    public var next: Date
    /// Why one that is due has not been started yet.
    public var waitsFor: String?
    public var created: Date
    public var who: String
}

public enum DrillResult: String, Sendable, Codable, CaseIterable {
    /// Its machine was ready: the boot check passed, or none was asked for.
    case passed
    case failed
    /// It was cleared before it was known.
    case cleared
}

/// What came of a drill. Its id is that of its task.
public struct DrillReportRecord: Codable, Sendable, Hashable, FetchableRecord, PersistableRecord {
    public static let databaseTableName = "drillReport"
    public var id: Int64
    public var server: String
    public var serverName: String
    public var isScheduled: Bool
    public var who: String
    public var recoveryPoint: RecoveryPointID?
    public var recoveryPointTime: Date?
    /// When the drill was asked for.
    public var recoveryPointAgeSeconds: Double?
    public var machine: MachineSettings
    public var started: Date
    public var ended: Date
    public var result: DrillResult
    /// From the request to the machine being ready.
    public var readySeconds: Double?
    /// The console's line that passed the boot check; nil: none was asked for, or it did not pass.
    public var bootLine: String?
    public var accelerator: String?
    public var error: String?
    /// The console's last lines.
    public var console: String?
}

extension DrillResult: DatabaseValueConvertible {}

/// Names of things that both ends of the link and the store agree on. All are opaque strings of [a-z0-9-], at most 64 bytes,
/// safe as a file name.

/// A consistency group: all disks of one protected server; their layers are published together or not at all.
public struct GroupID: RawRepresentable, Hashable, Sendable, Codable, CustomStringConvertible {
    public let rawValue: String
    public init(rawValue: String) { self.rawValue = rawValue }
    public init(_ value: String) { rawValue = value }
    public var description: String { rawValue }
}

/// A protected server, as enrolled: the identity in its client certificate.
public struct ServerID: RawRepresentable, Hashable, Sendable, Codable, CustomStringConvertible {
    public let rawValue: String
    public init(rawValue: String) { self.rawValue = rawValue }
    public init(_ value: String) { rawValue = value }
    public var description: String { rawValue }
}

public struct RecoveryPointID: RawRepresentable, Hashable, Sendable, Codable, CustomStringConvertible {
    public let rawValue: String
    public init(rawValue: String) { self.rawValue = rawValue }
    public init(_ value: String) { rawValue = value }
    public var description: String { rawValue }
}

public struct ForkID: RawRepresentable, Hashable, Sendable, Codable, CustomStringConvertible {
    public let rawValue: String
    public init(rawValue: String) { self.rawValue = rawValue }
    public init(_ value: String) { rawValue = value }
    public var description: String { rawValue }
}

/// Fences the past: raised durably at the replica at failover; a source with an older one is refused.
public struct Generation: RawRepresentable, Hashable, Comparable, Sendable, Codable, CustomStringConvertible {
    public let rawValue: UInt64
    public init(rawValue: UInt64) { self.rawValue = rawValue }
    public init(_ value: UInt64) { rawValue = value }
    public static func < (a: Generation, b: Generation) -> Bool { a.rawValue < b.rawValue }
    public var next: Generation { Generation(rawValue + 1) }
    public var description: String { "generation \(rawValue)" }
}

/// How a recovery point relates to what ran on the disks.
public enum Consistency: String, Sendable, Codable, CaseIterable {
    case crash, filesystem, application
}

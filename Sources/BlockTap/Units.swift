/// The unit of dirty tracking and of checksums, in bytes (design: 4 KiB unless configured otherwise).
public let blockBytes = 4096

/// Number of an epoch within one tap instance; the first cut closes epoch 1.
public struct EpochNumber: RawRepresentable, Hashable, Comparable, Sendable, Codable, CustomStringConvertible {
    public let rawValue: UInt64
    @inlinable public init(rawValue: UInt64) { self.rawValue = rawValue }
    @inlinable public init(_ value: UInt64) { rawValue = value }
    public static let none = EpochNumber(0)
    @inlinable public static func < (a: EpochNumber, b: EpochNumber) -> Bool { a.rawValue < b.rawValue }
    public var next: EpochNumber { EpochNumber(rawValue + 1) }
    public var description: String { "epoch \(rawValue)" }
}

/// Index of a tracking block (`blockBytes` each) on one disk.
public struct BlockIndex: RawRepresentable, Hashable, Comparable, Sendable, CustomStringConvertible {
    public let rawValue: UInt64
    @inlinable public init(rawValue: UInt64) { self.rawValue = rawValue }
    @inlinable public init(_ value: UInt64) { rawValue = value }
    @inlinable public static func < (a: BlockIndex, b: BlockIndex) -> Bool { a.rawValue < b.rawValue }
    @inlinable public var offsetBytes: UInt64 { rawValue &* UInt64(blockBytes) }
    public var description: String { "block \(rawValue)" }
}

/// Shape of anything with blocks behind it.
public struct BlockGeometry: Hashable, Sendable, Codable {
    /// Size in bytes; a multiple of `logicalBlockBytes`, not necessarily of `blockBytes`.
    public var sizeBytes: UInt64
    /// Smallest addressable unit: requests must be aligned to it (512 or 4096 in practice).
    public var logicalBlockBytes: UInt32
    /// Preferred unit of I/O in bytes.
    public var preferredBlockBytes: UInt32

    public init(sizeBytes: UInt64, logicalBlockBytes: UInt32, preferredBlockBytes: UInt32 = 4096) {
        self.sizeBytes = sizeBytes
        self.logicalBlockBytes = logicalBlockBytes
        self.preferredBlockBytes = preferredBlockBytes
    }

    /// Number of tracking blocks, the last one possibly partial.
    public var blockCount: UInt64 { (sizeBytes + UInt64(blockBytes) - 1) / UInt64(blockBytes) }
}

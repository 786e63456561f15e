/// Blocks of one disk that the store cannot read any more, and what that touches.
public struct BadExtent: Codable, Sendable, Hashable {
    public var group: GroupID
    public var volume: Int
    public var disk: String
    public var block: UInt64
    public var count: UInt64
    /// Layers whose blocks these are; none for what a fork wrote since it was last sealed.
    public var layers: [UInt64]
    /// That show these blocks; others have newer ones in their place.
    public var recoveryPoints: [RecoveryPointID]
    public var forks: [ForkID]

    public init(group: GroupID, volume: Int, disk: String, block: UInt64, count: UInt64, layers: [UInt64], recoveryPoints: [RecoveryPointID], forks: [ForkID]) {
        self.group = group
        self.volume = volume
        self.disk = disk
        self.block = block
        self.count = count
        self.layers = layers
        self.recoveryPoints = recoveryPoints
        self.forks = forks
    }
}

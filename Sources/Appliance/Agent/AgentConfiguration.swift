import BlockTap

/// What a person tells `afterimage agent run`.
public struct AgentConfiguration: Sendable {
    public struct Disk: Sendable, Hashable {
        /// The disk's name in recovery: letters, digits, `-` and `_`.
        public var name: String
        public var devicePath: String
        public init(name: String, devicePath: String) {
            self.name = name
            self.devicePath = devicePath
        }
    }

    public enum TapKind: String, Sendable, CaseIterable {
        /// Follows disks where they are, mounted and busy.
        case live
        /// Stands between a disk and whoever uses it by NBD.
        case nbd
    }

    /// Keys, certificate and what is known of the disks; mode 0700.
    public var stateDirectory: String
    public var tapKind: TapKind
    /// Where the NBD taps' sockets (`NAME.sock`) are made.
    public var socketDirectory: String
    public var disks: [Disk]
    /// Accept that a disk is smaller than when it was last protected.
    public var acceptsSmallerDisks: Bool
    public var tap: TapConfiguration
    public var live: LiveTapConfiguration
    /// Programs that run before and after a cut that is to be application-consistent.
    public var preScript: String?
    public var postScript: String?
    public var scriptSeconds = 60
    /// Devices to report when they turn up, of a kind that is not reported by itself.
    public var watchedDevices: [String] = []
    /// The disks are held for nothing but to be brought up to what runs at the appliance: nobody uses them meanwhile.
    public var isRescue = false
    /// In rescue mode: state directory of the agent that followed these disks on this machine until now, or may have.
    public var followerStateDirectory: String?

    public init(
        stateDirectory: String, tapKind: TapKind, socketDirectory: String, disks: [Disk], acceptsSmallerDisks: Bool = false,
        tap: TapConfiguration = TapConfiguration(), live: LiveTapConfiguration = LiveTapConfiguration()
    ) {
        self.tapKind = tapKind
        self.stateDirectory = stateDirectory
        self.socketDirectory = socketDirectory
        self.disks = disks
        self.acceptsSmallerDisks = acceptsSmallerDisks
        self.tap = tap
        self.live = live
    }
}

/// Something about the agent's set-up that a person has to change.
public struct AgentError: Error, CustomStringConvertible, Sendable {
    public var description: String
    public init(_ description: String) { self.description = description }
}

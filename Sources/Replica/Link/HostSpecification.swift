/// What a protected host is, for the machine that takes its place. Read by its agent while it runs; sent with every hello.
public struct HostSpecification: Sendable, Codable, Hashable {
    public enum Firmware: String, Sendable, Codable, CaseIterable { case bios, uefi }

    public struct NetworkCard: Sendable, Codable, Hashable {
        public var name: String
        public var mac: String
        /// With their prefix lengths.
        public var addresses: [String]
        /// Where its default route leads, IPv4.
        public var gateway: String?
        public init(name: String, mac: String, addresses: [String], gateway: String? = nil) {
            self.name = name
            self.mac = mac
            self.addresses = addresses
            self.gateway = gateway
        }
    }

    public var cpus: Int
    public var memoryMiB: Int
    public var firmware: Firmware
    public var kernel: String
    public var networkCards: [NetworkCard]
    /// What would keep its recovery machine from starting as it should, with what to do while there is time.
    public var warnings: [String]
    /// Those that its kernel is known to be without when they are needed: disks' in the initramfs, network cards' at all. nil: nobody has looked.
    public var missingDrivers: [String]?

    public init(
        cpus: Int, memoryMiB: Int, firmware: Firmware, kernel: String, networkCards: [NetworkCard], warnings: [String], missingDrivers: [String]? = nil
    ) {
        self.missingDrivers = missingDrivers
        self.cpus = cpus
        self.memoryMiB = memoryMiB
        self.firmware = firmware
        self.kernel = kernel
        self.networkCards = networkCards
        self.warnings = warnings
    }
}

import BlockTap
import Foundation
import GRDB
import Replica

/// The machine that a drill or a failover starts: from what was asked for and what is known of the source, to what QEMU is told.
extension Lifecycle {
    static let bootCheckSeconds = 120
    static let scriptSeconds = 300
    static let cardsMax = 8
    static let scriptBytesMax = 256 << 10

    /// What was asked for, else what was recorded. `replaced` is the machine whose place it takes.
    func machineSettings(_ server: ServerRecord, _ request: StartMachine, kind: InstanceKind = .failover, replaced: InstanceRecord? = nil) async throws -> MachineSettings {
        let network = try await recoveryNetwork(of: server, request)
        let specification = server.specification
        var settings = MachineSettings(
            cpus: request.cpus ?? server.settings?.cpus ?? 2, memoryMiB: request.memoryMiB ?? server.settings?.memoryMiB ?? 1024,
            network: network.mode, forwards: request.forwards ?? [],
            bootCheck: try BootCheck(texts: (request.bootCheck.map { [$0] } ?? []) + (request.bootChecks ?? [])), bootSecondsMax: request.bootSecondsMax ?? Self.bootCheckSeconds)
        settings.bridge = network.bridge
        settings.networkName = network.name
        settings.firmware = request.firmware ?? .auto
        settings.diskBus = request.diskBus ?? .auto
        settings.diskCache = request.diskCache
        settings.networkModel = request.networkModel ?? .auto
        settings.onEnd = request.onEnd
        settings.allowsOvercommit = request.allowOvercommit
        settings.script = try script(request)
        if let old = replaced?.settings { settings.keep(old, request) }
        settings.settle(specification)
        if settings.network != .none { settings.cards = cards(specification, settings, kind: kind) }
        settings.address = try address(request, specification, settings)
        if request.address == nil, settings.network != .none, let old = replaced?.settings.address {
            try check(old, settings)
            settings.address = old
        }
        try check(settings, kind: kind)
        return settings
    }

    /// Refuses what this host cannot give now, before anything is begun.
    func checkHost(_ settings: MachineSettings, replaced: InstanceRecord? = nil) async throws {
        for path in settings.bootCheck.hostPrograms { try checkScript(path) }
        if case .host(let path)? = settings.script?.place { try checkScript(path) }
        try HostPorts.check(settings.forwards, held: replaced?.settings.forwards ?? [])
        try await machines.check(settings)
        if settings.allowsOvercommit != true { try await machines.checkMemory(settings.memoryMiB, instead: replaced?.id) }
    }

    private func checkScript(_ path: String) throws(ApplianceError) {
        if let why = HostScript.refusal(path) { throw .invalid(why) }
    }

    private func check(_ settings: MachineSettings, kind: InstanceKind) throws {
        try checkMachine(cpus: settings.cpus, memoryMiB: settings.memoryMiB)
        if settings.network == .bridge { try (settings.bridge ?? BridgeSettings()).check() }
        guard settings.bridge == nil || settings.network == .bridge else {
            throw ApplianceError.invalid("a bridge is for the recovery network bridge, not \(settings.network.rawValue)")
        }
        guard settings.forwards.isEmpty || settings.network == .user else {
            throw ApplianceError.invalid("ports are forwarded only on the recovery network user, not \(settings.network.rawValue)")
        }
        guard (1...3600).contains(settings.bootSecondsMax) else {
            throw ApplianceError.invalid("the boot check's time limit is 1 to 3600 seconds, not \(settings.bootSecondsMax)")
        }
        for check in settings.bootCheck.parts {
            if case .tcp(let port) = check, settings.network == .none { throw ApplianceError.invalid("the boot check tcp:\(port) needs a network; this machine is to have none") }
        }
        guard kind == .failover || settings.onEnd != .restart else {
            throw ApplianceError.invalid("a drill's machine that ends is reported: restart is for a failover")
        }
    }

    private func script(_ request: StartMachine) throws -> MachineScript? {
        let seconds = request.scriptSecondsMax ?? Self.scriptSeconds
        guard (1...86_400).contains(seconds) else { throw ApplianceError.invalid("a script's time limit is 1 to 86400 seconds, not \(seconds)") }
        switch (request.guestScript, request.hostScript) {
        case (nil, nil): return nil
        case (.some, .some): throw ApplianceError.invalid("the script after failover runs in the machine or on the appliance's host: give one of them")
        case (nil, let path?): return MachineScript(place: .host(path), secondsMax: seconds)
        case (let text?, nil):
            guard text.utf8.count <= Self.scriptBytesMax else { throw ApplianceError.invalid("a script for the machine has at most \(Self.scriptBytesMax) bytes, not \(text.utf8.count)") }
            return MachineScript(place: .guest(text), secondsMax: seconds)
        }
    }

    /// The source's cards, with their addresses. On a bridge that others are on, too, a drill has none of them: the source may live, and be there.
    private func cards(_ specification: HostSpecification?, _ settings: MachineSettings, kind: InstanceKind) -> [String]? {
        // QEMU's own address is the same for all machines, which share a bridge.
        let made = settings.network == .bridge ? ["52:54:00" + (0..<3).map { _ in ":" + String(UInt8.random(in: 0x10...0xFF), radix: 16) }.joined()] : nil
        if kind == .drill, settings.bridge?.name != nil { return made }
        let macs = (specification?.networkCards ?? []).map { $0.mac.lowercased() }
            .filter { $0.wholeMatch(of: /[0-9a-f][02468ace](:[0-9a-f]{2}){5}/) != nil && $0 != "00:00:00:00:00:00" }
        return macs.isEmpty ? made : Array(macs.prefix(Self.cardsMax))
    }

    /// *IP Address*: keep, or set; nil: by DHCP.
    private func address(_ request: StartMachine, _ specification: HostSpecification?, _ settings: MachineSettings) throws -> MachineAddress? {
        guard let text = request.address, text != "dhcp" else { return nil }
        guard settings.network != .none else { throw ApplianceError.invalid("an IP address needs a network; this machine is to have none") }
        var address: MachineAddress
        if text == "keep" {
            var known: (card: HostSpecification.NetworkCard, interface: IPv4Interface)?
            for card in specification?.networkCards ?? [] where known == nil {
                if let interface = card.addresses.compactMap({ IPv4Interface($0) }).first { known = (card, interface) }
            }
            guard let (card, interface) = known else {
                throw ApplianceError.refused("The source's IP address is not known (its agent reports it while it is connected): set one (--ip A.B.C.D/LENGTH), or use dhcp.")
            }
            address = MachineAddress(interface: interface, gateway: card.gateway.flatMap { IPv4Interface.address($0) }, isKept: true, card: settings.cards?.firstIndex(of: card.mac.lowercased()) ?? 0)
        } else if let interface = IPv4Interface(text) {
            address = MachineAddress(interface: interface, isKept: false, card: 0)
        } else {
            throw ApplianceError.invalid("cannot use the IP address \(text): write keep, dhcp, or an address with its prefix length (10.80.0.20/24)")
        }
        if let gateway = request.gateway {
            guard let number = IPv4Interface.address(gateway) else { throw ApplianceError.invalid("the gateway \(gateway) is not an IPv4 address") }
            address.gateway = number
        }
        try check(address, settings)
        return address
    }

    private func check(_ address: MachineAddress, _ settings: MachineSettings) throws {
        let interface = address.interface
        if let subnet = settings.bridge?.subnet {
            guard subnet.isHost(interface.address) else { throw ApplianceError.refused("\(interface.addressText) is outside of the recovery network \(subnet).") }
            guard interface.address != subnet.address else { throw ApplianceError.refused("\(interface.addressText) is this host's own address on the recovery network \(subnet).") }
        }
        // QEMU's network has addresses of its own beside the machine's.
        guard settings.network == .bridge || interface.prefixLength <= 29 else {
            throw ApplianceError.refused("\(interface) has no room for a network around it: on the recovery network \(settings.network.rawValue) an address has a prefix length of at most 29.")
        }
        guard interface.isHost(interface.address) else { throw ApplianceError.invalid("\(interface) is the address of the network itself, or of all in it") }
        if let gateway = address.gateway {
            guard interface.isHost(gateway), gateway != interface.address else {
                throw ApplianceError.refused("The gateway \(IPv4Interface.text(gateway)) is outside of the network of \(interface), or the machine itself.")
            }
        }
    }

    // MARK: What only the disk says

    /// Settles the firmware by the recovery point's boot disk, once; stored before the machine starts.
    func settleFirmware(_ instance: InstanceRecord, log: @Sendable (String) async -> Void) async throws -> InstanceRecord {
        guard instance.settings.firmware == .auto, let point = instance.point else { return instance }
        let group = GroupID(instance.server)
        let sectors = try await blocking { [store] in
            let reader = try store.openRecoveryPoint(group, point, volume: 0)
            let count = Int(min(UInt64(BootSectors.byteCount), reader.geometry.sizeBytes)) / blockBytes * blockBytes
            let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: max(count, blockBytes), alignment: blockBytes)
            defer { buffer.deallocate() }
            try reader.read(offsetBytes: 0, into: UnsafeMutableRawBufferPointer(rebasing: buffer[..<count]))
            return BootSectors(Array(buffer[..<count]))
        }
        let isUEFI = sectors.hasSystemPartition && !sectors.hasBootCode
        if isUEFI { await log("the boot disk has an EFI system partition and no boot code for a BIOS: the machine gets UEFI") }
        var settled = instance
        settled.settings.firmware = isUEFI ? .uefi : .bios
        let settings = settled.settings
        try await update(instance.id) { $0.settings = settings }
        return settled
    }
}

extension MachineSettings {
    /// What was not said again stays as it was.
    mutating func keep(_ old: MachineSettings, _ request: StartMachine) {
        cpus = request.cpus ?? old.cpus
        memoryMiB = request.memoryMiB ?? old.memoryMiB
        if request.network == nil, request.networkName == nil { (network, networkName) = (old.network, old.networkName) }
        if request.networkName == nil { bridge = network == .bridge ? request.bridge ?? old.bridge : request.bridge }
        forwards = request.forwards ?? (network == .user ? old.forwards : [])
        if request.bootCheck == nil, request.bootChecks == nil { bootCheck = old.bootCheck }
        bootSecondsMax = request.bootSecondsMax ?? old.bootSecondsMax
        firmware = request.firmware ?? old.firmware
        diskBus = request.diskBus ?? old.diskBus
        diskCache = request.diskCache ?? old.diskCache
        networkModel = request.networkModel ?? old.networkModel
        onEnd = request.onEnd ?? old.onEnd
        allowsOvercommit = request.allowOvercommit ?? old.allowsOvercommit
        if request.guestScript == nil, request.hostScript == nil { script = old.script }
    }

    /// `auto`, where the source's specification decides.
    mutating func settle(_ specification: HostSpecification?) {
        let missing = Set(specification?.missingDrivers ?? [])
        if firmware == .auto, specification?.firmware == .uefi { firmware = .uefi }
        // Where neither would do, the faster one: the warning says what to mend.
        if diskBus == .auto { diskBus = !missing.isDisjoint(with: HostInspection.virtioDrivers) && !missing.contains(HostInspection.sataDriver) ? .sata : .virtio }
        if networkModel == .auto { networkModel = missing.contains(HostInspection.networkDriver) ? .e1000e : .virtio }
    }

    /// For a task's log.
    var hardwareText: String {
        var parts = ["\(cpus) CPUs", "\(memoryMiB) MiB", firmware == .uefi ? "UEFI" : "BIOS"]
        if diskBus == .sata { parts.append("disks on SATA") }
        if let diskCache, diskCache != .writeback { parts.append("disk cache \(diskCache.rawValue)") }
        parts.append("network \(network.rawValue)" + (networkModel == .e1000e ? " (e1000e)" : ""))
        if let address { parts.append("address \(address.interface)") }
        return parts.joined(separator: ", ")
    }
}

import Foundation
import Replica
import Testing

@testable import Appliance

@Suite("What a recovery machine is made of")
struct MachineHardwareTests {
    private var settings = MachineSettings(cpus: 1, memoryMiB: 64, network: .isolated, forwards: [], bootCheck: .running, bootSecondsMax: 1)

    private func words(_ settings: MachineSettings, firmware: FirmwareFiles? = nil, taps: [String] = [], exports: [String] = ["vda"]) -> [String] {
        QEMUCommand(
            name: "m", machine: settings, accelerator: .tcg, dataDirectories: [], nbdSocketPath: "/n", exports: exports, qmpSocketPath: "/q", consolePath: "/c",
            vncSocketPath: "/v,w", agentSocketPath: "/a", firmware: firmware, taps: taps
        ).arguments
    }

    private func specification(_ firmware: HostSpecification.Firmware = .bios, missing: [String]?) -> HostSpecification {
        HostSpecification(cpus: 1, memoryMiB: 64, firmware: firmware, kernel: "k", networkCards: [], warnings: [], missingDrivers: missing)
    }

    @Test("a BIOS and virtio are on the old chipset; UEFI and SATA on the new one")
    func chipset() {
        #expect(words(settings).contains("pc") && !words(settings).contains { $0.hasPrefix("if=pflash") })
        let uefi = words(settings, firmware: FirmwareFiles(code: "/code,1", variables: "/vars"))
        #expect(uefi.contains("q35") && uefi.contains("if=pflash,unit=0,format=raw,readonly=on,file=/code,,1") && uefi.contains("if=pflash,unit=1,format=raw,file=/vars"))
    }

    @Test("disks on SATA have a controller for six of them")
    func sata() {
        var sata = settings
        sata.diskBus = .sata
        let all = words(sata, exports: (0..<7).map { "d\($0)" })
        #expect(all.contains("q35") && all.filter { $0.hasPrefix("ich9-ahci") } == ["ich9-ahci,id=sata0", "ich9-ahci,id=sata1"])
        #expect(all.contains("ide-hd,bus=sata0.5,drive=disk5,serial=d5,bootindex=6") && all.contains("ide-hd,bus=sata1.0,drive=disk6,serial=d6,bootindex=7"))
    }

    @Test("a disk's cache is what was asked for")
    func cache() {
        var asked = settings
        asked.diskCache = .writethrough
        #expect(words(asked).contains { $0.hasSuffix(",write-cache=off") } && !words(settings).contains { $0.contains("write-cache") })
        asked.diskCache = .unsafe
        #expect(words(asked).contains { $0.contains(#""cache":{"no-flush":true}"#) } && !words(settings).contains { $0.contains("no-flush") })
    }

    @Test("the screen and the guest agent have sockets of their own")
    func sockets() {
        let all = words(settings)
        #expect(all.contains("unix:/v,,w") && all.contains("socket,id=agent,path=/a,server=on,wait=off") && all.contains("virtserialport,chardev=agent,name=org.qemu.guest_agent.0"))
    }

    @Test("the source's cards keep their addresses, each on a network of its own")
    func cards() {
        var asked = settings
        asked.cards = ["52:54:00:00:00:01", "52:54:00:00:00:02"]
        asked.networkModel = .e1000e
        let all = words(asked)
        #expect(all.contains("e1000e,netdev=net0,mac=52:54:00:00:00:01,romfile=") && all.contains("e1000e,netdev=net1,mac=52:54:00:00:00:02,romfile="))
        #expect(all.contains("user,id=net0,restrict=on") && all.contains("user,id=net1,restrict=on"))
        asked.network = .bridge
        #expect(words(asked, taps: ["t0", "t1"]).contains("tap,id=net1,ifname=t1,script=no,downscript=no"))
    }

    @Test("the network that QEMU plays is laid around the machine's address")
    func userNetwork() throws {
        var asked = settings
        asked.address = MachineAddress(interface: try #require(IPv4Interface("192.168.7.1/24")), gateway: nil, isKept: true, card: 0)
        #expect(words(asked).contains("user,id=net0,restrict=on,net=192.168.7.0/24,host=192.168.7.2,dns=192.168.7.3,dhcpstart=192.168.7.1"))
        asked.address?.gateway = IPv4Interface.address("192.168.7.254")
        #expect(words(asked).contains("user,id=net0,restrict=on,net=192.168.7.0/24,host=192.168.7.254,dns=192.168.7.2,dhcpstart=192.168.7.1"))
    }

    @Test("auto follows what is known of the source", arguments: [
        (nil, DiskBus.virtio, NetworkModel.virtio), ([], .virtio, .virtio), (["virtio_blk"], .sata, .virtio), (["virtio_pci", "virtio_net"], .sata, .e1000e),
        (["virtio_blk", "ahci"], .virtio, .virtio),
    ] as [([String]?, DiskBus, NetworkModel)])
    func settled(missing: [String]?, bus: DiskBus, model: NetworkModel) {
        var asked = settings
        (asked.firmware, asked.diskBus, asked.networkModel) = (.auto, .auto, .auto)
        asked.settle(specification(missing: missing))
        #expect(asked.diskBus == bus && asked.networkModel == model && asked.firmware == .auto, "a BIOS is only sure when the disk has code for it")
        asked.settle(specification(.uefi, missing: missing))
        #expect(asked.firmware == .uefi)
    }

    // MARK: Firmware

    private func disk(bootCode: Bool, type: UInt8 = 0x83) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: BootSectors.byteCount)
        if bootCode { bytes[0] = 0xFA }
        bytes[446 + 4] = type
        (bytes[510], bytes[511]) = (0x55, 0xAA)
        return bytes
    }

    @Test("a boot disk says by which firmware it can be started", arguments: [512, 4096])
    func sectors(sectorBytes: Int) {
        #expect(BootSectors(disk(bootCode: true)) == BootSectors(disk(bootCode: true, type: 0x0C)))
        #expect(BootSectors(disk(bootCode: true)).hasBootCode && !BootSectors(disk(bootCode: true)).hasSystemPartition)
        #expect(BootSectors(disk(bootCode: false, type: 0xEF)).hasSystemPartition && !BootSectors(disk(bootCode: false, type: 0xEF)).hasBootCode)
        var gpt = disk(bootCode: false, type: 0xEE)
        gpt.replaceSubrange(sectorBytes..<(sectorBytes + 8), with: Array("EFI PART".utf8))
        gpt[sectorBytes + 72] = 2
        gpt[sectorBytes + 80] = 128
        gpt[sectorBytes + 84] = 128
        #expect(!BootSectors(gpt).hasSystemPartition)
        let type: [UInt8] = [0x28, 0x73, 0x2A, 0xC1, 0x1F, 0xF8, 0xD2, 0x11, 0xBA, 0x4B, 0x00, 0xA0, 0xC9, 0x3E, 0xC9, 0x3B]
        gpt.replaceSubrange((2 * sectorBytes + 3 * 128)..<(2 * sectorBytes + 3 * 128 + 16), with: type)
        #expect(BootSectors(gpt).hasSystemPartition && !BootSectors(gpt).hasBootCode)
        gpt.replaceSubrange((sectorBytes + 72)..<(sectorBytes + 80), with: [UInt8](repeating: 0xFF, count: 8))
        #expect(!BootSectors(gpt).hasSystemPartition, "entries that lie nowhere")
        #expect(BootSectors([]) == BootSectors([UInt8](repeating: 0, count: 4096)))
    }

    @Test("UEFI's variables are a copy that stays the machine's own; none is an error that says what to install")
    func variables() throws {
        let directory = try TemporaryDirectory()
        try Data("code".utf8).write(to: URL(fileURLWithPath: directory.path + "/OVMF_CODE_4M.fd"))
        try Data("vars".utf8).write(to: URL(fileURLWithPath: directory.path + "/OVMF_VARS_4M.fd"))
        let own = directory.path + "/own"
        #expect(try FirmwareFiles.find([directory.path], standard: []).withOwnVariables(at: own) == FirmwareFiles(code: directory.path + "/OVMF_CODE_4M.fd", variables: own))
        try Data("mine".utf8).write(to: URL(fileURLWithPath: own))
        _ = try FirmwareFiles.find([directory.path], standard: []).withOwnVariables(at: own)
        #expect(FileManager.default.contents(atPath: own) == Data("mine".utf8))
        let error = #expect(throws: ApplianceError.self) { try FirmwareFiles.find(["/nowhere"], standard: []) }
        let errorText = "\(try #require(error))"
        #expect(errorText.contains("apt-get install ovmf"))
    }
}

@Suite("The host of recovery machines")
struct MachineHostTests {
    @Test("memory is refused with the figures, and counts what was promised")
    func memory() throws {
        let host = try #require(HostMemory(parsing: "MemTotal:       8388608 kB\nMemFree: 1 kB\nMemAvailable:    4194304 kB\n"))
        #expect(host == HostMemory(availableMiB: 4096, totalMiB: 8192) && host.reserveMiB == 409)
        try host.check(wantedMiB: 3687, promisedMiB: 0)
        let error = #expect(throws: ApplianceError.self) { try host.check(wantedMiB: 3687, promisedMiB: 1000) }
        let text = "\(try #require(error))"
        #expect(text.contains("3687 MiB") && text.contains("2687 MiB") && text.contains("1000 are promised") && text.contains("--allow-overcommit"))
    }

    @Test("a gate lets in as many as it may, in the order of their coming, and forgets who gave up")
    func gate() async throws {
        let gate = Gate(limit: 1)
        try await gate.enter()
        #expect(await gate.isFull)
        let (order, note) = AsyncStream<String>.makeStream()
        let first = Task {
            try await gate.enter()
            note.yield("first")
            await gate.leave()
        }
        first.cancel()
        await #expect(throws: CancellationError.self) { try await first.value }
        let second = Task {
            try await gate.enter()
            note.yield("second")
            await gate.leave()
        }
        await gate.leave()
        try await second.value
        note.finish()
        var seen: [String] = []
        for await name in order { seen.append(name) }
        #expect(seen == ["second"])
        #expect(await !gate.isFull)
    }

    @Test("ports that cannot be forwarded are refused beforehand")
    func ports() throws {
        let taken = socket(AF_INET, Int32(SOCK_STREAM.rawValue), 0)
        defer { close(taken) }
        var address = sockaddr_in()
        address.sin_family = sa_family_t(AF_INET)
        address.sin_addr.s_addr = UInt32(0x7F00_0001).bigEndian
        var length = socklen_t(MemoryLayout<sockaddr_in>.size)
        let isBound = withUnsafeMutablePointer(to: &address) {
            $0.withMemoryRebound(to: sockaddr.self, capacity: 1) { bind(taken, $0, length) == 0 && listen(taken, 1) == 0 && getsockname(taken, $0, &length) == 0 }
        }
        try #require(isBound)
        let forward = PortForward(hostPort: UInt16(bigEndian: address.sin_port), guestPort: 22)
        let inUse = #expect(throws: ApplianceError.self) { try HostPorts.check([forward]) }
        let inUseText = "\(try #require(inUse))"
        #expect(inUseText.contains("in use"))
        try HostPorts.check([forward], held: [forward])
        let elsewhere = #expect(throws: ApplianceError.self) { try HostPorts.check([PortForward(address: "192.0.2.7", hostPort: 8080, guestPort: 22)]) }
        let elsewhereText = "\(try #require(elsewhere))"
        #expect(elsewhereText.contains("not an address of this host"))
        let free = PortForward(hostPort: try #require(HostPorts.free()), guestPort: 22)
        try HostPorts.check([free])
        #expect(throws: ApplianceError.self) { try HostPorts.check([free, free]) }
    }

    @Test("a connection through QEMU counts when the machine has taken it")
    func connections() {
        let table = "Hub -1 (net0):\r\n  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r\n"
            + "  TCP[SYN_SENT]      25       127.0.0.1 4000       10.0.2.15    22     0     0\r\n  TCP[HOST_FORWARD]  12       127.0.0.1 4000       10.0.2.15    22     0     0\r\n"
        #expect(!UserNetwork.isEstablished(table, hostPort: 4000, guestPort: 22))
        #expect(UserNetwork.isEstablished(table.replacing("SYN_SENT", with: "ESTABLISHED"), hostPort: 4000, guestPort: 22))
        #expect(UserNetwork.forwards(table, of: "127.0.0.1") == [4000] && UserNetwork.forwards(table, of: "10.0.0.1") == [])
    }
}

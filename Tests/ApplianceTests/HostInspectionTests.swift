import Foundation
import Replica
import Testing

@testable import Appliance

@Suite("What a host is to its recovery machine")
struct HostInspectionTests {
    let directory: TemporaryDirectory
    var root: String { directory.path }

    init() throws {
        directory = try TemporaryDirectory()
        try file("proc/sys/kernel/osrelease", "6.1.0-50-amd64\n")
        try file("proc/meminfo", "MemTotal:        2014052 kB\nMemFree: 1 kB\n")
        try file("sys/devices/system/cpu/online", "0-2,6\n")
        try file("sys/class/net/lo/address", "00:00:00:00:00:00\n")
        try file("sys/class/net/eth0/address", "52:54:00:12:34:56\n")
        try file("sys/class/net/eth0/device/vendor", "0x1af4\n")
        try file("lib/modules/6.1.0-50-amd64/modules.builtin", "kernel/drivers/virtio/virtio_pci.ko\nkernel/drivers/block/virtio_blk.ko\n")
        try file("etc/fstab", "# a comment\nUUID=1-2 / ext4 defaults 0 1\n")
    }

    private func file(_ path: String, _ text: String) throws {
        let url = URL(fileURLWithPath: root + "/" + path)
        try FileManager.default.createDirectory(at: url.deletingLastPathComponent(), withIntermediateDirectories: true)
        try Data(text.utf8).write(to: url)
    }

    private func specification() async -> HostSpecification { await HostInspection(root: root).specification() }

    @Test func aHostThatCanBeRecovered() async throws {
        let host = await specification()
        #expect(host.cpus == 4 && host.memoryMiB == 2048 && host.firmware == .bios && host.kernel == "6.1.0-50-amd64")
        #expect(host.networkCards.map(\.name) == ["eth0"] && host.networkCards[0].mac == "52:54:00:12:34:56")
        #expect(host.warnings == [] && host.missingDrivers == [])
    }

    @Test func firmware() async throws {
        try file("sys/firmware/efi/fw_platform_size", "64")
        let host = await specification()
        #expect(host.firmware == .uefi && host.warnings == [])
    }

    @Test func aBootLoaderThatOnlyTheOldFirmwareKnows() async throws {
        try file("sys/firmware/efi/fw_platform_size", "64")
        try file("boot/efi/EFI/debian/shimx64.efi", "")
        let warnings = await specification().warnings
        #expect(warnings.count == 1 && warnings[0].contains("BOOTX64.EFI") && warnings[0].contains("grub-install"))
        try file("boot/efi/EFI/Boot/bootx64.efi", "")
        try FileManager.default.moveItem(atPath: root + "/boot/efi/EFI/Boot", toPath: root + "/boot/efi/EFI/BOOT")
        #expect(await specification().warnings == [])
    }

    @Test func wherePacketsLeave() async throws {
        try file("proc/net/route", "Iface\tDestination\tGateway\tFlags\neth0\t0000000A\t00000000\t0001\neth0\t00000000\t0101500A\t0003\n")
        #expect(await specification().networkCards[0].gateway == "10.80.1.1")
    }

    @Test func aKernelWithoutACardsDriver() async throws {
        try file("lib/modules/6.1.0-50-amd64/modules.dep", "kernel/drivers/net/ethernet/intel/e1000e/e1000e.ko.xz:\n")
        #expect(await specification().missingDrivers == ["virtio_net"])
    }

    @Test func fileSystemsThatAreMountedByAHardwaresName() async throws {
        try file("etc/fstab", "/dev/sda1 / ext4 defaults 0 1\n/dev/sdb1 /scratch ext4 defaults,nofail 0 2\n/dev/disk/by-id/ata-x /srv xfs\n")
        let warnings = await specification().warnings
        #expect(warnings.count == 2)
        #expect(warnings[0].contains("mounts / from /dev/sda1") && warnings[0].contains("UUID="))
        #expect(warnings[1].contains("/srv"))
    }

    @Test func driversThatNobodyHas() async throws {
        try file("lib/modules/6.1.0-50-amd64/modules.builtin", "kernel/drivers/virtio/virtio_pci.ko\n")
        let warnings = await specification().warnings
        #expect(warnings.count == 1 && warnings[0].contains("virtio_blk") && !warnings[0].contains("virtio_pci"))
    }
}

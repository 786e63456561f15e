import Foundation
import Replica
import Subprocess

/// Reads what the recovery machine of this host will need to be, and looks for what would keep that from booting: drivers that the initramfs lacks,
/// file systems that are mounted by a name which only this hardware gives them. `root` is `/`, but for tests.
struct HostInspection {
    var root = "/"
    /// Recovery machines have their disks on virtio, or else on SATA, and virtio network cards, or else Intel's.
    static let virtioDrivers = ["virtio_pci", "virtio_blk"]
    static let sataDriver = "ahci"
    static let networkDriver = "virtio_net"

    func specification() async -> HostSpecification {
        let kernel = text("proc/sys/kernel/osrelease") ?? ""
        let isUEFI = FileManager.default.fileExists(atPath: path("sys/firmware/efi"))
        let drivers = await drivers(kernel)
        return HostSpecification(
            cpus: cpus, memoryMiB: memoryMiB, firmware: isUEFI ? .uefi : .bios, kernel: kernel, networkCards: networkCards(),
            warnings: drivers.warnings + (isUEFI ? loaderWarnings() : []) + fstabWarnings(), missingDrivers: drivers.missing)
    }

    private var cpus: Int {
        // "0-3,8-11"
        let online = text("sys/devices/system/cpu/online") ?? "0"
        return max(1, online.split(separator: ",").reduce(0) { sum, range in
            let ends = range.split(separator: "-").compactMap { Int($0) }
            return sum + (ends.count == 2 ? ends[1] - ends[0] + 1 : ends.count)
        })
    }

    /// To the next 128 MiB: firmware and kernel keep some for themselves.
    private var memoryMiB: Int {
        let line = (text("proc/meminfo") ?? "").split(separator: "\n").first { $0.hasPrefix("MemTotal:") }
        let kibibytes = line.flatMap { $0.split(separator: " ").dropFirst().first }.flatMap { Int($0) } ?? 0
        return max(128, (kibibytes / 1024 + 127) / 128 * 128)
    }

    private func networkCards() -> [HostSpecification.NetworkCard] {
        let net = path("sys/class/net")
        return ((try? FileManager.default.contentsOfDirectory(atPath: net)) ?? []).sorted().compactMap { name in
            // Virtual ones (bridges, tunnels, lo) have no device.
            guard FileManager.default.fileExists(atPath: "\(net)/\(name)/device"), let mac = text("sys/class/net/\(name)/address") else { return nil }
            return HostSpecification.NetworkCard(name: name, mac: mac, addresses: root == "/" ? Self.addresses(name) : [], gateway: gateway(name))
        }
    }

    /// linux, net/ipv4/fib_trie.c: card, destination and gateway, the latter two in hexadecimal of this processor's byte order.
    private func gateway(_ card: String) -> String? {
        for line in (text("proc/net/route") ?? "").split(separator: "\n") {
            let fields = line.split(whereSeparator: \.isWhitespace)
            guard fields.count > 2, fields[0] == card, fields[1] == "00000000", let gateway = UInt32(fields[2], radix: 16), gateway != 0 else { continue }
            return IPv4Interface.text(UInt32(bigEndian: gateway))
        }
        return nil
    }

    private static func addresses(_ card: String) -> [String] {
        var first: UnsafeMutablePointer<ifaddrs>?
        guard getifaddrs(&first) == 0 else { return [] }
        defer { freeifaddrs(first) }
        var found: [String] = []
        var next = first
        while let entry = next {
            next = entry.pointee.ifa_next
            guard String(cString: entry.pointee.ifa_name) == card, let address = entry.pointee.ifa_addr, let mask = entry.pointee.ifa_netmask else { continue }
            let family = Int32(address.pointee.sa_family)
            guard family == AF_INET || family == AF_INET6 else { continue }
            var host = [CChar](repeating: 0, count: Int(NI_MAXHOST))
            let length = socklen_t(family == AF_INET ? MemoryLayout<sockaddr_in>.size : MemoryLayout<sockaddr_in6>.size)
            guard getnameinfo(address, length, &host, socklen_t(host.count), nil, 0, NI_NUMERICHOST) == 0 else { continue }
            let bits = UnsafeRawBufferPointer(start: mask, count: Int(length))[family == AF_INET ? 4..<8 : 8..<24].reduce(0) { $0 + $1.nonzeroBitCount }
            found.append("\(String(decoding: host.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self))/\(bits)")
        }
        return found
    }

    // MARK: Drivers

    private func drivers(_ kernel: String) async -> (missing: [String]?, warnings: [String]) {
        let builtin = text("lib/modules/\(kernel)/modules.builtin") ?? ""
        func isBuiltIn(_ driver: String) -> Bool { builtin.contains("/\(driver).ko") }
        let modules = text("lib/modules/\(kernel)/modules.dep")
        var missing = !isBuiltIn(Self.networkDriver) && modules.map { !$0.contains("/\(Self.networkDriver).ko") } ?? false ? [Self.networkDriver] : []
        let wanted = Self.virtioDrivers.filter { !isBuiltIn($0) }
        if wanted.isEmpty { return (missing, []) }
        guard let image = ["boot/initrd.img-\(kernel)", "boot/initramfs-\(kernel).img"].map(path).first(where: FileManager.default.fileExists) else {
            return (nil, ["no initramfs of kernel \(kernel) was found in /boot, and \(wanted.joined(separator: " and ")) are not built into it: check that it boots from a virtio disk"])
        }
        guard let listed = await list(image) else {
            return (nil, ["cannot read \(image) (lsinitramfs or lsinitrd): check that it has \(wanted.joined(separator: " and "))"])
        }
        let lacking = wanted.filter { !listed.contains("/\($0).ko") }
        if lacking.isEmpty { return (missing, []) }
        missing += lacking
        let mend = "add them to /etc/initramfs-tools/modules, then update-initramfs -u"
        if isBuiltIn(Self.sataDriver) || listed.contains("/\(Self.sataDriver).ko") {
            return (missing, ["the initramfs of kernel \(kernel) lacks \(lacking.joined(separator: " and ")): its recovery machine gets slower disks, on SATA; \(mend)"])
        }
        missing.append(Self.sataDriver)
        return (missing, ["the initramfs of kernel \(kernel) lacks \(lacking.joined(separator: " and ")), and \(Self.sataDriver), too: a recovery machine would not find its disk; \(mend)"])
    }

    // MARK: Boot loader

    /// A recovery machine's firmware knows no boot entries: it starts what every firmware looks for (UEFI specification 2.10, 3.5.1.1).
    private func loaderWarnings() -> [String] {
        let partitions = ["boot/efi", "efi", "boot"].filter { FileManager.default.fileExists(atPath: path("\($0)/EFI")) }
        guard let partition = partitions.first else { return [] }
        let loaders = (try? FileManager.default.contentsOfDirectory(atPath: path("\(partition)/EFI/BOOT"))) ?? []
        if loaders.contains(where: { $0.uppercased() == "BOOTX64.EFI" }) { return [] }
        return ["/\(partition) has no EFI/BOOT/BOOTX64.EFI, and the firmware of a recovery machine knows no other boot loader: put one there (grub-install --force-extra-removable)"]
    }

    private func list(_ image: String) async -> String? {
        for name in ["lsinitramfs", "lsinitrd"] {
            guard let program = try? HostProgram.find(name, package: "initramfs-tools-core") else { continue }
            let run = try? await Subprocess.run(.path(.init(program.path)), arguments: [image], output: .string(limit: 16 << 20), error: .discarded)
            if let run, run.terminationStatus.isSuccess { return run.standardOutput }
        }
        return nil
    }

    // MARK: Names of disks

    /// `/dev/sda1` is `/dev/vda1` in a recovery machine.
    private func fstabWarnings() -> [String] {
        (text("etc/fstab") ?? "").split(separator: "\n").compactMap { line in
            let fields = line.split(whereSeparator: { $0 == " " || $0 == "\t" })
            guard fields.count >= 2, !fields[0].hasPrefix("#"),
                ["/dev/sd", "/dev/hd", "/dev/nvme", "/dev/xvd", "/dev/mmcblk", "/dev/disk/by-id/", "/dev/disk/by-path/"].contains(where: { fields[0].hasPrefix($0) })
            else { return nil }
            let options = fields.count > 3 ? fields[3].split(separator: ",") : []
            if options.contains("nofail") || options.contains("noauto") { return nil }
            return "/etc/fstab mounts \(fields[1]) from \(fields[0]), which has another name in a recovery machine: use UUID= (blkid \(fields[0]) tells it)"
        }
    }

    private func path(_ relative: String) -> String { (root.hasSuffix("/") ? root : root + "/") + relative }

    private func text(_ relative: String) -> String? {
        guard let data = FileManager.default.contents(atPath: path(relative)) else { return nil }
        return String(decoding: data, as: UTF8.self).trimmingCharacters(in: .newlines)
    }
}

import Foundation
import Replica
import Subprocess

/// Reads what the recovery machine of this host will need to be, and looks for what would keep that from booting: drivers that the initramfs lacks,
/// file systems that are mounted by a name which only this hardware gives them. `root` is `/`, but for tests.
struct HostInspection {
    var root = "/"
    /// Recovery machines have their disks on virtio.
    static let drivers = ["virtio_pci", "virtio_blk"]

    func specification() async -> HostSpecification {
        let kernel = text("proc/sys/kernel/osrelease") ?? ""
        let isUEFI = FileManager.default.fileExists(atPath: path("sys/firmware/efi"))
        return HostSpecification(
            cpus: cpus, memoryMiB: memoryMiB, firmware: isUEFI ? .uefi : .bios, kernel: kernel, networkCards: networkCards(),
            warnings: await driverWarnings(kernel) + fstabWarnings())
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
            return HostSpecification.NetworkCard(name: name, mac: mac, addresses: root == "/" ? Self.addresses(name) : [])
        }
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

    private func driverWarnings(_ kernel: String) async -> [String] {
        let builtin = text("lib/modules/\(kernel)/modules.builtin") ?? ""
        let wanted = Self.drivers.filter { !builtin.contains("/\($0).ko") }
        if wanted.isEmpty { return [] }
        guard let image = ["boot/initrd.img-\(kernel)", "boot/initramfs-\(kernel).img"].map(path).first(where: FileManager.default.fileExists) else {
            return ["no initramfs of kernel \(kernel) was found in /boot, and \(wanted.joined(separator: " and ")) are not built into it: check that it boots from a virtio disk"]
        }
        guard let listed = await list(image) else {
            return ["cannot read \(image) (lsinitramfs or lsinitrd): check that it has \(wanted.joined(separator: " and "))"]
        }
        let missing = wanted.filter { !listed.contains("/\($0).ko") }
        if missing.isEmpty { return [] }
        return [
            "the initramfs of kernel \(kernel) lacks \(missing.joined(separator: " and ")): a recovery machine would not find its disk; add them to "
                + "/etc/initramfs-tools/modules, then update-initramfs -u"
        ]
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

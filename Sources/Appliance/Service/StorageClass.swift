import Foundation
import Glibc

/// What the disks below a directory are, as the kernel says (`queue/rotational`). The document's *Use SSD*.
public enum StorageClass: String, Sendable, Codable, CaseIterable {
    case ssd, hdd

    /// With the names of the disks. Through partitions, device-mapper and md: one that rotates makes all of it slow. nil: the kernel does not say, as of a network's
    /// file system.
    static func below(_ directory: String, sysfs: String = "/sys", mountInformation: String = "/proc/self/mountinfo") -> (storageClass: StorageClass, disks: [String])? {
        var information = stat()
        guard stat(directory, &information) == 0 else { return nil }
        return below(device: number(information.st_dev), sysfs: sysfs, mountInformation: mountInformation)
    }

    static func below(device: String, sysfs: String, mountInformation: String) -> (storageClass: StorageClass, disks: [String])? {
        var found = disks(of: "\(sysfs)/dev/block/\(device)", depth: 0)
        // A file system over several devices (btrfs) has a number of its own; its mount names one of them.
        if found.isEmpty, let source = source(of: device, in: mountInformation) {
            var information = stat()
            if stat(source, &information) == 0, information.st_mode & S_IFMT == S_IFBLK { found = disks(of: "\(sysfs)/dev/block/\(number(information.st_rdev))", depth: 0) }
        }
        guard !found.isEmpty else { return nil }
        return (found.contains { $0.isRotational } ? .hdd : .ssd, found.map(\.name).sorted())
    }

    /// sys/sysmacros.h: gnu_dev_major, gnu_dev_minor.
    private static func number(_ device: dev_t) -> String { "\((device >> 8 & 0xfff) | (device >> 32 & ~0xfff)):\((device & 0xff) | (device >> 12 & ~0xff))" }

    private static func disks(of entry: String, depth: Int) -> [(name: String, isRotational: Bool)] {
        // What lies on itself would be a fault of the kernel's; the walk ends all the same.
        guard depth < 8, let real = realpath(entry, nil) else { return [] }
        defer { free(real) }
        let directory = String(cString: real)
        let below = (try? FileManager.default.contentsOfDirectory(atPath: directory + "/slaves")) ?? []
        if !below.isEmpty { return below.flatMap { disks(of: "\(directory)/slaves/\($0)", depth: depth + 1) } }
        if FileManager.default.fileExists(atPath: directory + "/partition") { return disks(of: directory + "/..", depth: depth + 1) }
        guard let text = try? String(contentsOfFile: directory + "/queue/rotational", encoding: .utf8) else { return [] }
        return [(URL(fileURLWithPath: directory).lastPathComponent, text.hasPrefix("1"))]
    }

    /// proc(5), mountinfo: the third field is the device's number, the second after the dash the source.
    private static func source(of device: String, in file: String) -> String? {
        guard let text = try? String(contentsOfFile: file, encoding: .utf8) else { return nil }
        for line in text.split(separator: "\n") {
            let fields = line.split(separator: " ")
            guard fields.count > 3, fields[2] == device, let dash = fields.firstIndex(of: "-"), fields.count > dash + 2 else { continue }
            return String(fields[dash + 2])
        }
        return nil
    }
}

extension Lifecycle {
    /// This appliance has one store: what is asked for has to be so.
    func checkStorageClass(_ wanted: StorageClass?, of server: String) throws(ApplianceError) {
        guard let wanted else { return }
        guard let below = StorageClass.below(settings.storeDirectory) else {
            throw .refused("Nobody knows whether the store \(settings.storeDirectory) is on \(wanted.rawValue): the kernel does not say what is below its file system. Leave --storage-class out.")
        }
        guard below.storageClass == wanted else {
            throw .refused("The store \(settings.storeDirectory) is on \(below.storageClass.rawValue) (\(below.disks.joined(separator: ", "))), not \(wanted.rawValue): \(server) cannot be kept as asked for. Move the store, or leave --storage-class out.")
        }
    }
}

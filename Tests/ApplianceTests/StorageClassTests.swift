import Foundation
import Testing

@testable import Appliance

@Suite("Storage class")
struct StorageClassTests {
    /// A sysfs as the kernel lays it out: two disks, a partition, a volume over both, a loop device.
    private func sysfs(_ root: String, rotating: Set<String>) throws {
        func make(_ path: String) throws { try FileManager.default.createDirectory(atPath: root + path, withIntermediateDirectories: true) }
        func write(_ path: String, _ text: String) throws { try text.write(toFile: root + path, atomically: true, encoding: .utf8) }
        try make("/dev/block")
        for (name, number) in [("sda", "8:0"), ("sdb", "8:16"), ("dm-0", "253:0"), ("loop0", "7:0")] {
            try make("/devices/\(name)/queue")
            try make("/devices/\(name)/slaves")
            try write("/devices/\(name)/queue/rotational", rotating.contains(name) ? "1\n" : "0\n")
            try FileManager.default.createSymbolicLink(atPath: root + "/dev/block/\(number)", withDestinationPath: "../../devices/\(name)")
        }
        try make("/devices/sda/sda1")
        try write("/devices/sda/sda1/partition", "1\n")
        try FileManager.default.createSymbolicLink(atPath: root + "/dev/block/8:1", withDestinationPath: "../../devices/sda/sda1")
        for (name, target) in [("sda1", "../../sda/sda1"), ("sdb", "../../sdb")] {
            try FileManager.default.createSymbolicLink(atPath: root + "/devices/dm-0/slaves/\(name)", withDestinationPath: target)
        }
    }

    @Test("the disks below are found through partitions and volumes; one that rotates makes it hdd", arguments: [
        ([], "8:1", StorageClass.ssd, ["sda"]), (["sda"], "8:1", .hdd, ["sda"]), (["sdb"], "8:1", .ssd, ["sda"]), (["sdb"], "253:0", .hdd, ["sda", "sdb"]), ([], "253:0", .ssd, ["sda", "sdb"]),
        (["dm-0"], "253:0", .ssd, ["sda", "sdb"]), (["loop0"], "7:0", .hdd, ["loop0"]),
    ] as [([String], String, StorageClass, [String])])
    func below(rotating: [String], device: String, expected: StorageClass, disks: [String]) throws {
        let directory = try TemporaryDirectory()
        try sysfs(directory.path, rotating: Set(rotating))
        let found = try #require(StorageClass.below(device: device, sysfs: directory.path, mountInformation: "/nonexistent"))
        #expect(found.storageClass == expected && found.disks == disks)
    }

    @Test("of what has no disk nothing is said, and a class that is asked for is refused")
    func unknown() async throws {
        let directory = try TemporaryDirectory()
        try sysfs(directory.path, rotating: [])
        #expect(StorageClass.below(device: "0:99", sysfs: directory.path, mountInformation: "/proc/self/mountinfo") == nil)
        #expect(StorageClass.below("/proc") == nil && StorageClass.below("/nonexistent") == nil)
        let bed = try LifecycleBed()
        let below = StorageClass.below(bed.directory.path)
        for wanted in StorageClass.allCases {
            do {
                try await bed.lifecycle.checkStorageClass(wanted, of: "web")
                #expect(below?.storageClass == wanted)
            } catch {
                #expect(below?.storageClass != wanted && "\(error)".contains("--storage-class"))
            }
        }
        #expect(try await bed.lifecycle.status().store.storageClass == below?.storageClass)
        try await bed.end()
    }
}

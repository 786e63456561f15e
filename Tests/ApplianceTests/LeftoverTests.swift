import BlockTap
import Foundation
import GRDB
import Replica
import Testing

@testable import Appliance

/// What a killed appliance may leave beside its catalogue is put in order by the next start; what might be wanted is not.
@Suite("Left by a killed appliance") struct LeftoverTests {
    private let volumes = [VolumeSpec(name: "vda", geometry: BlockGeometry(sizeBytes: 1 << 20, logicalBlockBytes: 512))]

    @Test("a group of no server goes when it is empty, and stays when it holds anything")
    func groups() async throws {
        let bed = try LifecycleBed()
        try bed.store.createGroup(GroupID("empty"), volumes: volumes)
        try bed.store.createGroup(GroupID("kept"), volumes: volumes)
        _ = try bed.store.sealNothing(
            GroupID("kept"), generation: Generation(1), cut: Cut(epoch: EpochNumber(1), kind: .exact, timeNanoseconds: 1, blockCount: 0), instance: "i")
        try await bed.restart()
        #expect(bed.store.groups().map(\.id) == [GroupID("kept")])
        #expect(bed.store.recoveryPoints(GroupID("kept")).count == 1)
        try await bed.end()
    }

    @Test("an export whose point is gone ends, and leaves no socket")
    func export() async throws {
        let bed = try LifecycleBed()
        try await protect(bed)
        let server = try await bed.lifecycle.server("web")
        try bed.store.createGroup(server.group, volumes: volumes)
        let socket = bed.directory.path + "/export-gone.sock"
        try Data().write(to: URL(fileURLWithPath: socket))
        try await bed.catalogue.write { db in try PointExportRecord(id: "export-gone", server: server.id, point: RecoveryPointID("rp-9"), created: Date()).insert(db) }
        try await bed.restart()
        #expect(try await bed.catalogue.read { db in try PointExportRecord.fetchCount(db) } == 0)
        #expect(!FileManager.default.fileExists(atPath: socket))
        #expect(try await bed.lifecycle.events(server: "web", limit: 1).first?.what == "End export")
        try await bed.end()
    }

    @Test("a point that several ask to have exported at once is served once, for all of them")
    func exportedAtOnce() async throws {
        let bed = try LifecycleBed()
        try await protect(bed)
        let server = try await bed.lifecycle.server("web")
        try bed.store.createGroup(server.group, volumes: volumes)
        let cut = Cut(epoch: EpochNumber(1), kind: .exact, timeNanoseconds: 1, blockCount: 0)
        let point = try #require(try bed.store.sealNothing(server.group, generation: Generation(1), cut: cut, instance: "i"))
        try await bed.catalogue.write { db in
            var record = try db.server(server.id)
            record.settings = ReplicationSettings(disks: ["vda"], epochMilliseconds: 1000, throttleBytesPerSecond: 0, automaticRestart: true, cpus: 1, memoryMiB: 64)
            try record.update(db)
        }
        for _ in 0..<20 {
            let lifecycle = bed.lifecycle
            let paths = try await withThrowingTaskGroup(of: String.self) { group in
                for _ in 0..<8 { group.addTask { try await lifecycle.export("web", point: point.id.rawValue, who: "me").socketPath } }
                return try await group.reduce(into: Set<String>()) { $0.insert($1) }
            }
            #expect(paths.count == 1)
            try await lifecycle.unexport("web", point: point.id.rawValue, who: "me")
            #expect(!FileManager.default.fileExists(atPath: paths.first ?? ""))
        }
        try await bed.end()
    }

    @Test("the unfinished file of a copy that was cancelled goes; that of one that goes on, and other files, stay")
    func copies() async throws {
        let bed = try LifecycleBed()
        try await protect(bed)
        let server = try await bed.lifecycle.server("web")
        let (ended, going) = (bed.directory.path + "/ended.raw", bed.directory.path + "/going.raw")
        for path in [ended, going] {
            for suffix in ["", Lifecycle.partialSuffix] { try Data([1]).write(to: URL(fileURLWithPath: path + suffix)) }
        }
        try await bed.catalogue.write { db in
            for path in [ended, going] {
                let order = PointCopyOrder(point: RecoveryPointID("rp-1"), disk: "vda", volume: 0, format: .raw, path: path)
                let task = try TaskBoard.plan(.exportRecoveryPoint, server: server, parameters: TaskParameters(copy: order), who: "me", in: db)
                try TaskBoard.finish(task, error: "cancelled by me", in: db)
            }
            // Asked for again since.
            let order = PointCopyOrder(point: RecoveryPointID("rp-1"), disk: "vda", volume: 0, format: .raw, path: going)
            _ = try TaskBoard.plan(.exportRecoveryPoint, server: server, parameters: TaskParameters(copy: order), who: "me", in: db)
        }
        await bed.lifecycle.removeUnfinishedCopies()
        #expect(!FileManager.default.fileExists(atPath: ended + Lifecycle.partialSuffix))
        for path in [ended, going, going + Lifecycle.partialSuffix] { #expect(FileManager.default.fileExists(atPath: path), "\(path)") }
        try await bed.end()
    }

    private func protect(_ bed: LifecycleBed) async throws {
        _ = try await bed.lifecycle.createSitePair(.init(name: "pair", type: .zoneToZone, primarySite: "a", secondarySite: "b"), who: "me")
        _ = try await bed.lifecycle.addServers(.init(sitePair: "pair", names: ["web"]), who: "me")
    }
}

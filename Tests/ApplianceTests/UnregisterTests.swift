import BlockTap
import Foundation
import GRDB
import Replica
import Testing

@testable import Appliance

/// Unregister beside somebody who holds a recovery point in the same moment.
@Suite struct UnregisterTests {
    private static func bed() async throws -> (LifecycleBed, ServerRecord) {
        let bed = try LifecycleBed()
        _ = try await bed.lifecycle.createSitePair(CreateSitePair(name: "pair", type: .zoneToZone, primarySite: "a", secondarySite: "b"), who: "anna")
        _ = try await bed.lifecycle.addServers(AddServers(sitePair: "pair", names: ["s"]), who: "anna")
        let record = try await bed.catalogue.write { db in
            var record = try #require(try ServerRecord.fetchOne(db))
            record.certificateSerial = "serial-1"
            record.state = .initialized
            try record.update(db)
            return record
        }
        try bed.store.createGroup(record.group, volumes: [VolumeSpec(name: "vda", geometry: BlockGeometry(sizeBytes: 1 << 20, logicalBlockBytes: 512))])
        return (bed, record)
    }

    private static func point(_ bed: LifecycleBed, _ record: ServerRecord) throws -> RecoveryPoint {
        let cut = Cut(epoch: EpochNumber(1), kind: .exact, timeNanoseconds: 5, blockCount: 0)
        return try #require(try bed.store.sealNothing(record.group, generation: Generation(1), cut: cut, instance: "a"))
    }

    private static func task(_ bed: LifecycleBed, _ record: ServerRecord, revoked: String? = nil) async throws -> TaskRecord {
        try await bed.catalogue.write { db in
            var parameters = TaskParameters()
            parameters.revoked = revoked
            return try TaskBoard.plan(.unregister, server: record, parameters: parameters, who: "anna", in: db)
        }
    }

    private static func serial(_ bed: LifecycleBed, _ record: ServerRecord) async throws -> String? {
        try await bed.catalogue.read { db in try #require(try ServerRecord.fetchOne(db, key: record.id)).certificateSerial }
    }

    @Test("a point that is held keeps the server, and its agent is let in")
    func held() async throws {
        let (bed, record) = try await Self.bed()
        try bed.store.holdRecoveryPoint(record.group, try Self.point(bed, record).id, name: "audit")
        let task = try await Self.task(bed, record)
        await #expect(throws: ApplianceError.self) { _ = try await bed.lifecycle.performUnregister(task) }
        #expect(try await Self.serial(bed, record) == "serial-1")
        try await bed.end()
    }

    @Test("so it is when the appliance was killed after it had revoked the certificate")
    func killed() async throws {
        let (bed, record) = try await Self.bed()
        try bed.store.holdRecoveryPoint(record.group, try Self.point(bed, record).id, name: "audit")
        try await bed.catalogue.write { db in
            var record = try #require(try ServerRecord.fetchOne(db, key: record.id))
            record.certificateSerial = nil
            try record.update(db)
        }
        let task = try await Self.task(bed, record, revoked: "serial-1")
        await #expect(throws: ApplianceError.self) { _ = try await bed.lifecycle.performUnregister(task) }
        #expect(try await Self.serial(bed, record) == "serial-1")
        try await bed.end()
    }

    @Test("a hold that meets the removal is taken back, and the server goes")
    func meets() async throws {
        let (bed, record) = try await Self.bed()
        let point = try Self.point(bed, record)
        let task = try await Self.task(bed, record)
        // Its look was before the task was there.
        try bed.store.holdRecoveryPoint(record.group, point.id, name: "audit")
        async let removed = bed.lifecycle.performUnregister(task)
        try await Task.sleep(for: .milliseconds(200))
        try bed.store.releaseRecoveryPoint(record.group, point.id)
        _ = try await removed
        #expect(bed.store.group(record.group) == nil)
        await #expect(throws: ApplianceError.self) {
            _ = try await bed.lifecycle.holdPoint("s", point: point.id.rawValue, HoldPoint(name: "audit"), who: "anna")
        }
        try await bed.end()
    }
}

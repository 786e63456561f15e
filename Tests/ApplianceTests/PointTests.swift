import BlockTap
import Foundation
import GRDB
import Replica
import Testing

@testable import Appliance

@Suite("Recovery points by hand")
struct PointTests {
    @Test("a policy is read as it is written", arguments: [
        ("standard", "standard", "all:10m,10m:1h,1h:24h,1d:7d"), ("all:10m,10m:1h,1h:24h,1d:7d", "standard", "all:10m,10m:1h,1h:24h,1d:7d"),
        ("all:600s,600s:60m,60m:1d,24h:1w", "standard", "all:10m,10m:1h,1h:24h,1d:7d"), ("keep-all", "keep-all", "everything"),
        ("all:90s", "all:90s", "all:90s"), ("1h:2d", "1h:2d", "1h:2d"),
    ])
    func policies(text: String, kept: String, tiers: String) throws {
        let policy = try PolicyText(text)
        #expect(policy.description == kept && policy.tiers == tiers)
        #expect(try PolicyText(policy.description) == policy)
    }

    @Test("a policy that makes no sense is refused with how one is written", arguments: [
        "", "all", ":", "all:", ":1h", "1h", "1h:1h:1h", "2h:1h", "all:0s", "0s:1h", "-1h:2h", "+1h:2h", "1.5h:3h", "1y:2y", "all:1h,", "1h:99999999999999999999h",
        "all:9223372036854775807w", Array(repeating: "all:1h", count: 17).joined(separator: ","), "Standard", "all:1h 1h:2h",
    ])
    func refusedPolicies(text: String) {
        let error = #expect(throws: ApplianceError.self) { _ = try PolicyText(text) }
        #expect(error.map { "\($0)".contains("EVERY:FOR") } == true)
    }

    @Test("a catalogue of the first version gets the standard policy")
    func migration() throws {
        let directory = try TemporaryDirectory()
        let queue = try DatabaseQueue(path: directory.path + "/c.sqlite")
        try Catalogue.migrator.migrate(queue, upTo: "1: forward, drill, failover")
        try queue.write { db in
            try db.execute(sql: "INSERT INTO site (name) VALUES ('a'), ('b')")
            try db.execute(sql: "INSERT INTO sitePair VALUES ('p', 'zone-to-zone', 'a', 'b', 'n', 'isolated', '2026-01-01 00:00:00.000')")
            try db.execute(sql: "INSERT INTO server (id, name, sitePair, state, stateSince, disks, created) VALUES ('web-1', 'web', 'p', 'Initialized', '2026-01-01 00:00:00.000', '[]', '2026-01-01 00:00:00.000')")
        }
        try Catalogue.migrator.migrate(queue)
        let record = try queue.read { db in try db.server("web") }
        #expect(record.policy == "standard")
        #expect(try queue.read { db in try PointMountRecord.fetchCount(db) } == 0)
    }

    @Test("findings become one line per disk and kind")
    func damageLines() {
        let (web, db) = (GroupID("web"), GroupID("db"))
        func bad(_ group: GroupID, _ block: UInt64, _ count: UInt64, _ points: [String]) -> ScrubFinding {
            .bad(BadExtent(group: group, volume: 0, disk: "vda", block: block, count: count, layers: [1], recoveryPoints: points.map { RecoveryPointID($0) }, forks: []))
        }
        let lines = DamageWords.lines([
            bad(web, 9, 2, ["rp-1", "rp-2"]), bad(db, 1, 1, []), bad(web, 7, 1, ["rp-2", "rp-3"]), .notRepaired(web, disk: "vda", block: 9, count: 1, why: "it is gone"),
            .repaired(web, disk: "vda", block: 7, count: 1), .notRepaired(web, disk: "vda", block: 10, count: 1, why: "it is gone"),
        ])
        #expect(lines == [
            .init(what: "Damage found", group: web, detail: "disk vda, 3 blocks: 7, 9 to 10; touches 3 recovery points: rp-1, rp-2, rp-3"),
            .init(what: "Damage found", group: db, detail: "disk vda, block 1; no recovery point shows it"),
            .init(what: "Damage not repaired", group: web, detail: "disk vda, 2 blocks: 9 to 10: it is gone"),
            .init(what: "Damage repaired", group: web, detail: "disk vda, block 7"),
        ])
        #expect(DamageWords.list((1...9).map { RecoveryPointID("rp-\($0)") }) == "rp-1, rp-2, rp-3, …, rp-8, rp-9")
    }

    @Test("a recovery point reads the same with and without damage")
    func pointView() throws {
        let point = RecoveryPoint(
            id: RecoveryPointID("rp-1"), group: GroupID("g"), epoch: EpochNumber(1), instance: "i", cutTimeNanoseconds: 5, consistency: .crash,
            receivedTimeNanoseconds: 6, dataBytes: 7)
        for view in [RecoveryPointView(point: point), RecoveryPointView(point: point, damagedBlockCount: 2, isUnreadable: true)] {
            let data = try APIJSON.encoder().encode(view)
            #expect(try APIJSON.decoder().decode(RecoveryPoint.self, from: data) == point, "it is a recovery point, and more")
            let back = try APIJSON.decoder().decode(RecoveryPointView.self, from: data)
            #expect(back.point == point && back.damagedBlockCount == view.damagedBlockCount && back.isUnreadable == view.isUnreadable)
        }
    }

    @Test("zeroes are told from data at every place of a block")
    func zeroes() {
        var bytes = [UInt8](repeating: 0, count: 4096)
        #expect(bytes.withUnsafeBytes { DiskCopy.isZero($0) } && DiskCopy.isZero(UnsafeRawBufferPointer(start: nil, count: 0)))
        for place in [0, 1, 7, 2048, 4094, 4095] {
            bytes[place] = 1
            #expect(bytes.withUnsafeBytes { !DiskCopy.isZero($0) }, "\(place)")
            bytes[place] = 0
        }
    }
}

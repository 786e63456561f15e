import BlockTap
import Foundation
import GRDB
import Replica
import Testing

@testable import Appliance

@Suite("Catalogue")
struct CatalogueTests {
    @Test("what was stored is there after a restart")
    func restart() async throws {
        let directory = try TemporaryDirectory()
        let path = directory.path + "/catalogue.sqlite"
        let settings = ReplicationSettings(disks: ["vda"], epochMilliseconds: 500, throttleBytesPerSecond: 7, automaticRestart: false, cpus: 3, memoryMiB: 300)
        do {
            let catalogue = try Catalogue(path: path)
            try await catalogue.write { db in
                try Fixture.server(db, "web", state: .replicating, settings: settings)
                try InstanceRecord(
                    id: "drill-1", server: "web-1", kind: .drill, step: .ready, point: .init("p1"), pointCutTimeNanoseconds: 5,
                    settings: MachineSettings(cpus: 1, memoryMiB: 64, network: .user, forwards: [.init(hostPort: 1, guestPort: 2)], bootCheck: .serial("ok"), bootSecondsMax: 9),
                    volumes: ["vda"], accepted: Date()
                ).insert(db)
            }
            try catalogue.close()
        }
        let catalogue = try Catalogue(path: path)
        let (server, instance, synchronous, journal) = try await catalogue.read { db in
            (
                try db.server("web"), try InstanceRecord.fetchOne(db, key: "drill-1"), try Int.fetchOne(db, sql: "PRAGMA synchronous"),
                try String.fetchOne(db, sql: "PRAGMA journal_mode")
            )
        }
        #expect(server.settings == settings && server.state == .replicating)
        #expect(instance?.settings.bootCheck == .serial("ok") && instance?.settings.forwards.first?.guestPort == 2)
        #expect(synchronous == 2 && journal == "wal")
        try catalogue.close()
    }

    @Test("nothing is begun with a server that is being removed")
    func removed() async throws {
        let directory = try TemporaryDirectory()
        let catalogue = try Catalogue(path: directory.path + "/c.sqlite")
        try await catalogue.write { db in
            try Fixture.server(db, "web", state: .initialized)
            _ = try TaskBoard.plan(.unregister, server: try db.server("web"), who: "a", in: db)
        }
        for trigger in Trigger.allCases where trigger.isOperation {
            await #expect("\(trigger)") {
                try await catalogue.write { db in
                    var record = try db.server("web")
                    try db.apply(trigger, to: &record, who: "b", hasRecoveryPoint: true)
                }
            } throws: { "\($0)".contains("is being removed") }
        }
        // What happens outside is taken note of.
        let state = try await catalogue.write { db in
            var record = try db.server("web")
            try db.apply(.agentUnfit, to: &record, who: "b", hasRecoveryPoint: true)
            return record.state
        }
        #expect(state == .abnormal)
        try catalogue.close()
    }

    @Test("which disks can carry on what is protected")
    func unfitness() throws {
        func disks(_ disks: (String, UInt64)...) -> [DiskReport] {
            disks.map { DiskReport(name: $0.0, devicePath: "/dev/\($0.0)", geometry: BlockGeometry(sizeBytes: $0.1, logicalBlockBytes: 512), tap: "live") }
        }
        let volumes = ["vda", "vdb"].map { VolumeSpec(name: $0, geometry: BlockGeometry(sizeBytes: 1 << 20, logicalBlockBytes: 512)) }
        func words(_ disks: [DiskReport]) -> String? { Lifecycle.unfitness(of: disks, for: volumes) }
        #expect(words(disks(("vda", 1 << 20), ("vdb", 1 << 20))) == nil)
        #expect(words(disks(("vda", 2 << 20), ("vdb", 1 << 20), ("vdc", 512))) == nil)
        #expect(words(disks(("vda", 1 << 20)))?.contains("disk vdb is protected") == true)
        #expect(words(disks(("vda", 1 << 19), ("vdb", 1 << 20)))?.contains("vda") == true)
        #expect(words(disks(("vdb", 1 << 20), ("vda", 1 << 20)))?.contains("in this order") == true)
        #expect(words(disks(("vda", 1 << 20), ("vdc", 1 << 20), ("vdb", 1 << 20)))?.contains("new ones after them") == true)
        #expect(Lifecycle.unfitness(of: disks(("vdc", 512)), for: []) == nil)
    }

    @Test("a catalogue of a newer version is refused")
    func newer() throws {
        let directory = try TemporaryDirectory()
        let path = directory.path + "/catalogue.sqlite"
        let catalogue = try Catalogue(path: path)
        try catalogue.pool.write { db in try db.execute(sql: "INSERT INTO grdb_migrations VALUES ('99: from the future')") }
        try catalogue.close()
        #expect { try Catalogue(path: path) } throws: { "\($0)".contains("newer version") }
    }

    @Test("a backup is the catalogue of one moment, made while it is written; never half a file, never over another")
    func backup() async throws {
        let directory = try TemporaryDirectory()
        let catalogue = try Catalogue(path: directory.path + "/c.sqlite")
        // Two rows in each transaction: a copy that has one of them is of no moment.
        let writer = Task {
            var count = 0
            while !Task.isCancelled {
                let n = count
                try await catalogue.write { db in
                    try db.event("a", "\(n)")
                    try db.event("b", "\(n)")
                }
                count += 1
            }
        }
        var before = 0
        for round in 0..<5 {
            while try await catalogue.read({ db in try EventRecord.fetchCount(db) }) < before + 100 { try await Task.sleep(for: .milliseconds(1)) }
            let path = directory.path + "/backup-\(round)"
            try await catalogue.backUp(to: path)
            let copy = try Catalogue(path: path)
            let (a, b) = try await copy.read { db in
                (try EventRecord.filter(Column("who") == "a").fetchCount(db), try EventRecord.filter(Column("who") == "b").fetchCount(db))
            }
            #expect(a == b && a + b >= before + 100)
            before = a + b
            try copy.close()
            #expect(try #require(FileManager.default.attributesOfItem(atPath: path)[.posixPermissions] as? Int) == 0o600)
        }
        writer.cancel()
        _ = try? await writer.value
        for (path, words) in [("backup", "absolute path"), (directory.path + "/backup-0", "already"), ("/nonexistent/x", "cannot write"), ("/proc/x", "cannot write")] {
            await #expect { try await catalogue.backUp(to: path) } throws: { "\($0)".contains(words) }
        }
        #expect(try FileManager.default.contentsOfDirectory(atPath: directory.path).filter { $0.hasSuffix("partial") }.isEmpty)
        try catalogue.close()
    }

    @Test("a damaged catalogue is not opened, and its error says what to do")
    func damaged() async throws {
        let directory = try TemporaryDirectory()
        let path = directory.path + "/c.sqlite"
        let catalogue = try Catalogue(path: path)
        try await catalogue.write { db in for n in 0..<2000 { try db.event("me", "something \(n)", detail: String(repeating: "x", count: 200)) } }
        try await catalogue.pool.writeWithoutTransaction { db in _ = try db.checkpoint(.truncate) }
        try catalogue.close()
        let whole = try Data(contentsOf: URL(fileURLWithPath: path))
        try #require(whole.count > 200_000)
        for damage in [whole.count / 2, whole.count / 3 * 2, 0] {
            var bytes = whole
            bytes.replaceSubrange(damage..<damage + 8192, with: Data(repeating: 0xA5, count: 8192))
            for suffix in ["-wal", "-shm"] { try? FileManager.default.removeItem(atPath: path + suffix) }
            try bytes.write(to: URL(fileURLWithPath: path))
            #expect { try Catalogue(path: path) } throws: { "\($0)".contains("is damaged") && "\($0)".contains("catalogue backup") }
        }
    }

    @Test("the audit log can neither be changed nor shortened")
    func appendOnly() async throws {
        let directory = try TemporaryDirectory()
        let catalogue = try Catalogue(path: directory.path + "/c.sqlite")
        try await catalogue.write { db in try db.event("me", "something") }
        for sql in ["UPDATE event SET who = 'you'", "DELETE FROM event"] {
            await #expect(throws: DatabaseError.self) { try await catalogue.write { db in try db.execute(sql: sql) } }
        }
        try catalogue.close()
    }

    @Test("a refused operation changes nothing and says the table's sentence")
    func refusal() async throws {
        let directory = try TemporaryDirectory()
        let catalogue = try Catalogue(path: directory.path + "/c.sqlite")
        try await catalogue.write { db in try Fixture.server(db, "web", state: .failedOver) }
        await #expect(throws: ApplianceError.self) {
            try await catalogue.write { db in
                var server = try db.server("web")
                try db.apply(.startReplication, to: &server, who: "me", hasRecoveryPoint: true)
            }
        }
        let (state, events) = try await catalogue.read { db in (try db.server("web").state, try EventRecord.fetchCount(db)) }
        #expect(state == .failedOver && events == 0)
        try catalogue.close()
    }

    @Test("a permitted operation stores state and event together")
    func permission() async throws {
        let directory = try TemporaryDirectory()
        let catalogue = try Catalogue(path: directory.path + "/c.sqlite")
        try await catalogue.write { db in
            try Fixture.server(db, "web", state: .replicating)
            var server = try db.server("web")
            try db.apply(.linkLost, to: &server, who: "agent of web", hasRecoveryPoint: true, reason: "cable")
        }
        let (server, event) = try await catalogue.read { db in (try db.server("web"), try EventRecord.fetchOne(db)) }
        #expect(server.state == .replicationInterrupted && server.reason == "cable")
        #expect(event?.before == "Replicating" && event?.after == "Replication Interrupted" && event?.detail == "cable")
        try catalogue.close()
    }
}

enum Fixture {
    static func server(_ db: Database, _ name: String, state: ServerState, settings: ReplicationSettings? = nil) throws {
        for site in ["a", "b"] { try SiteRecord(name: site, zone: nil).save(db) }
        try SitePairRecord(
            name: "pair", type: .zoneToZone, primarySite: "a", secondarySite: "b", replicationNetwork: "default", recoveryNetwork: .isolated, created: Date()
        ).save(db)
        try ServerRecord(id: "\(name)-1", name: name, sitePair: "pair", state: state, stateSince: Date(), settings: settings, disks: [], created: Date()).insert(db)
    }
}

/// A directory of the test's own, gone with it. Short, since sockets are made in it.
final class TemporaryDirectory: Sendable {
    let path: String
    init() throws {
        path = "/tmp/ai-" + String(UInt32.random(in: 0...UInt32.max), radix: 36)
        try FileManager.default.createDirectory(atPath: path, withIntermediateDirectories: false, attributes: [.posixPermissions: 0o700])
    }
    deinit { try? FileManager.default.removeItem(atPath: path) }
}

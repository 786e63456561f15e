import BlockTap
import Foundation
import GRDB
import Replica
import Testing

@testable import Appliance

@Suite struct GracefulFailoverTests {
    @Test("a host is moved only by an agent that says that it can hold its writes: one that is older, or may not freeze, is refused", arguments: [nil, false, true])
    func canHold(says: Bool?) async throws {
        let bed = try LifecycleBed()
        _ = try await bed.lifecycle.createSitePair(CreateSitePair(name: "pair", type: .zoneToZone, primarySite: "a", secondarySite: "b"), who: "anna")
        _ = try await bed.lifecycle.addServers(AddServers(sitePair: "pair", names: ["s"]), who: "anna")
        let disk = DiskReport(name: "vda", devicePath: "/dev/vda", geometry: BlockGeometry(sizeBytes: 1 << 20, logicalBlockBytes: 512), tap: AgentConfiguration.TapKind.live.rawValue)
        let record = try await bed.catalogue.write { db in
            var record = try #require(try ServerRecord.fetchOne(db))
            record.state = .replicating
            record.disks = [disk]
            record.settings = ReplicationSettings(disks: ["vda"], epochMilliseconds: 500, throttleBytesPerSecond: 0, automaticRestart: true, cpus: 1, memoryMiB: 64)
            try record.update(db)
            return record
        }
        try bed.store.createGroup(record.group, volumes: [VolumeSpec(name: disk.name, geometry: disk.geometry)])
        let cut = Cut(epoch: EpochNumber(1), kind: .exact, timeNanoseconds: 5, blockCount: 0)
        _ = try #require(try bed.store.sealNothing(record.group, generation: Generation(1), cut: cut, instance: "a"))
        _ = await bed.lifecycle.agentConnected(record.serverID, AgentHello(agentVersion: "1", hostName: "h", kernel: "6", instance: "a", disks: [disk]))
        var status = AgentStatus()
        status.phase = .replicating
        status.canHold = says
        await bed.lifecycle.agentStatus(record.serverID, status)
        var request = StartMachine()
        request.graceful = true
        if says == true {
            let preview = try await bed.lifecycle.failoverPreview("s", request)
            #expect(preview.words.contains { $0.contains("frozen") })
        } else {
            await #expect(throws: ApplianceError.self) { _ = try await bed.lifecycle.failoverPreview("s", request) }
        }
        try await bed.end()
    }
}

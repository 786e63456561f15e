import Foundation
import Testing

@testable import Appliance

/// What the model of the lifecycle found: tasks that nobody ended.
@Suite("Every task ends", .serialized, .enabled(if: Program.canBoot, Program.missing))
struct TaskEndProcessTests {
    @Test("Start Replication, asked for again after an interruption, leaves one task; unregistering the server ends that")
    func startReplication() async throws {
        let sites = try TwoSites()
        try await sites.protect()
        #expect(try await sites.cli("replication stop shop").code == 0)
        sites.endAgent(SIGKILL)
        let first = try await sites.json(TaskView.self, "replication start shop")
        sites.endAppliance(SIGKILL)
        try await sites.startAppliance()
        #expect(try await sites.view().state == .replicationInterrupted)
        let second = try await sites.json(TaskView.self, "replication start shop")
        let ended = try await sites.json(TaskView.self, "task show \(first.id)")
        #expect(ended.status == .failed && ended.error?.contains("started again") == true)
        sites.endAppliance(SIGKILL)
        try await sites.startAppliance()
        #expect(try await sites.cli("server remove shop --yes shop --delete-points --wait").code == 0)
        let last = try await sites.json(TaskView.self, "task show \(second.id)")
        #expect(last.status == .failed && last.error?.contains("unregistered") == true)
        #expect(try await sites.json([TaskView].self, "task list").allSatisfy { $0.status != .running })
    }

    @Test("replication that was paused stays so, whatever its agent had said just before")
    func paused() async throws {
        let sites = try TwoSites()
        try await sites.protect()
        for _ in 0..<10 {
            #expect(try await sites.cli("replication pause shop").code == 0)
            // The agent has done as it was told, and has said so.
            try await until("the agent to be idle") { try await sites.view().agent?.phase == .idle }
            #expect(try await sites.view().state == .replicationInterrupted)
            let resumed = try await sites.cli("replication resume shop --wait")
            #expect(resumed.code == 0, "\(resumed.errors)")
        }
    }
}

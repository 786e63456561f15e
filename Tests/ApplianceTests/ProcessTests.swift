import Foundation
import Testing

@testable import Appliance

@Suite("Appliance process")
struct ProcessTests {
    @Test("writes a private profile, answers, refuses a second appliance, ends on SIGTERM")
    func life() async throws {
        let sites = try TwoSites()
        try await sites.startAppliance(qemu: nil)
        let mode = try #require(FileManager.default.attributesOfItem(atPath: sites.profile)[.posixPermissions] as? Int)
        #expect(mode == 0o600)
        let profile = try ClientProfile.load(path: sites.profile)
        let health: Health = try await APIClient.with(profile) { try await $0.get("/v1/health") }
        #expect(health.status == "ok")

        let second = try await Program.run(["appliance", "--state", sites.state, "--runtime-dir", sites.runtime, "--listen", "127.0.0.1:0", "--link", "127.0.0.1:0"])
        #expect(second.code == 1 && second.errors.contains("another appliance runs on"))

        sites.appliance?.end(SIGTERM)
        #expect(sites.appliance?.process.terminationStatus == 0)
        #expect(try await sites.cli("status").code == 5)
        // The token stays good.
        try await sites.startAppliance(qemu: nil)
        #expect(try ClientProfile.load(path: sites.profile).token == profile.token)
    }

    @Test("exit codes and JSON errors")
    func exitCodes() async throws {
        let sites = try TwoSites()
        try await sites.startAppliance(qemu: nil)
        #expect(try await sites.cli("site-pair create pair").code == 0)
        #expect(try await sites.cli("site-pair create pair").code == 3)
        #expect(try await sites.cli("server show nobody").code == 4)
        #expect(try await sites.cli("site-pair create UPPER").code == 64)
        #expect(try await sites.cli("fly").code == 64)
        let outcome = try await sites.cli("server show nobody --json")
        let problem = try JSONDecoder().decode(Problem.self, from: Data(outcome.errors.utf8))
        #expect(problem.status == 404 && outcome.output.isEmpty)
        let nowhere = try await Program.run(["status", "--profile", "/nonexistent"])
        #expect(nowhere.code == 5 && nowhere.errors.contains("/nonexistent"))
    }

    @Test("a viewer's profile shows and does nothing else; a revoked one does nothing at all")
    func viewer() async throws {
        let sites = try TwoSites()
        try await sites.startAppliance(qemu: nil)
        let file = sites.state + "/viewer.json"
        let made = try await sites.cli("token create watch --role viewer --days 1 --write-profile \(file)")
        #expect(made.code == 0, "\(made.errors)")
        let mode = try #require(FileManager.default.attributesOfItem(atPath: file)[.posixPermissions] as? Int)
        #expect(mode == 0o600)
        #expect(!made.output.contains(try ClientProfile.load(path: file).token))
        let view = ["AFTERIMAGE_PROFILE": file]
        #expect(try await Program.run(["status"], environment: view).code == 0)
        let refused = try await Program.run(["site-pair", "create", "pair"], environment: view)
        #expect(refused.code == 6 && refused.errors.contains("watch has the role viewer"))
        let again = try await sites.cli("token create watch --role operator --write-profile \(sites.state)/other.json")
        #expect(again.code == 3 && !FileManager.default.fileExists(atPath: sites.state + "/other.json"))
        #expect(try await sites.cli("token create other --role operator --write-profile /nonexistent/x.json").code == 1)
        let listed = try await sites.json([TokenView].self, "token list")
        #expect(listed.map(\.name) == ["administrator", "watch"] && listed.map(\.role) == [.administrator, .viewer])
        #expect(try await sites.cli("token revoke watch").code == 0)
        #expect(try await Program.run(["status"], environment: view).code == 6)
    }

    @Test("a client that trusts another CA gets nothing")
    func pinned() async throws {
        let sites = try TwoSites(), other = try TwoSites()
        try await sites.startAppliance(qemu: nil)
        try await other.startAppliance(qemu: nil)
        var profile = try ClientProfile.load(path: sites.profile)
        profile.caFile = other.state + "/ca/ca.pem"
        let wrong = profile
        await #expect(throws: APIClient.Failure.self) { try await APIClient.with(wrong) { client in let _: Health = try await client.get("/v1/health") } }
    }
}

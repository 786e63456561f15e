import Foundation
import GRDB
import Logging
import Synchronization
import Testing

@testable import Appliance
@testable import afterimage

@Suite("Support bundle")
struct SupportTests {
    @Test("it unpacks, has what is needed to help, and none of the secrets, wherever they stand")
    func bundle() async throws {
        let bed = try LifecycleBed()
        let token = try await AccessTokens(catalogue: bed.catalogue).create(.init(name: "ops", role: .viewer), who: "me")
        let administrator = try await AccessTokens(catalogue: bed.catalogue).administrator(profilePath: bed.directory.path + "/client.json")
        let desk = AlertDesk(catalogue: bed.catalogue, logger: Logger(label: "test") { _ in SwiftLogNoOpLogHandler() })
        _ = try await desk.create(.init(name: "hook", webhook: .init(url: "https://hooks.example/T00/B00/url-secret", secret: "hook-secret"), severity: .warning), who: "me")
        _ = try await desk.create(.init(name: "mail", mail: .init(server: "smtp://mail.example", from: "a@b.example", to: ["c@d.example"], user: "mail-user", password: "p\"ss/word é"), severity: .warning), who: "me")
        _ = try await bed.lifecycle.createSitePair(.init(name: "pair", type: .zoneToZone, primarySite: "a", secondarySite: "b"), who: "me")
        let enrolment = try EnrolmentToken(text: try await bed.lifecycle.addServers(.init(sitePair: "pair", names: ["web"]), who: "me")[0].token)
        let script = try bed.script("turn", "echo said by the script")
        _ = try await bed.lifecycle.createPlan(PlanDefinition(name: "shop", groups: [PlanGroup(name: "g", scripts: [PlanScript(path: script, arguments: ["--key=argument-secret"])])]), who: "me")
        _ = try await bed.lifecycle.runPlan("shop", RunPlan(kind: .drill), who: "me")
        try await until("the run") { try await bed.lifecycle.plan("shop").lastRun?.status == .succeeded }
        let log = RecentLog()
        let logger = Logger(label: "appliance") { log.handler(label: $0) }
        logger.error("cannot deliver to https://hooks.example/T00/B00/url-secret with p\"ss/word é", metadata: ["server": "web"])
        let machine = bed.directory.path + "/instances/drill-1"
        try FileManager.default.createDirectory(atPath: machine, withIntermediateDirectories: true)
        try (String(repeating: "x", count: 300_000) + "the console's end\n").write(toFile: machine + "/console.log", atomically: true, encoding: .utf8)

        let bytes = Mutex<[UInt8]>([])
        var bundle = SupportBundle(lifecycle: bed.lifecycle, catalogue: bed.catalogue)
        bundle.log = log
        try await bundle.write { piece in bytes.withLock { $0 += piece } }
        let file = bed.directory.path + "/bundle.tar.gz", unpacked = bed.directory.path + "/unpacked"
        try Data(bytes.withLock { $0 }).write(to: URL(fileURLWithPath: file))
        try FileManager.default.createDirectory(atPath: unpacked, withIntermediateDirectories: true)
        let tar = try await Program.run("/usr/bin/tar", ["-xzf", file, "-C", unpacked])
        #expect(tar.code == 0 && tar.errors.isEmpty, "\(tar.errors)")
        let root = unpacked + "/afterimage-support/"
        func text(_ name: String) throws -> String { try String(contentsOfFile: root + name, encoding: .utf8) }
        #expect(try text("README").contains("look before you") && text("version").contains(afterimageVersion))
        #expect(try text("tasks").contains("said by the script") && text("catalogue/server.json").contains("\"web\"") && text("catalogue/alertChannel.json").contains("\"hook\""))
        #expect(try text("appliance.log").contains("server=web cannot deliver to [removed] with [removed]"))
        #expect(try text("machines/drill-1/console.log").hasSuffix("the console's end\n") && text("machines/drill-1/console.log").utf8.count <= SupportBundle.tailBytesMax)
        #expect(try text("host/uname").hasPrefix("Linux ") && text("host/memory").contains("MemTotal"))
        #expect(try text("status.json").contains("\"web\"") && text("catalogue/event.json").contains("Create recovery plan"))
        let everything = try FileManager.default.subpathsOfDirectory(atPath: root).compactMap { try? String(contentsOfFile: root + $0, encoding: .utf8) }.joined()
        for secret in [
            token.secret, Secrets.hash(token.secret), administrator, Secrets.hash(administrator), enrolment.secret, Secrets.hash(enrolment.secret), "url-secret", "hook-secret", "ss/word", "ss\\/word",
            "mail-user", "argument-secret",
        ] {
            #expect(!everything.contains(secret), "\(secret)")
        }
        try await bed.end()
    }

    @Test("the newest lines are kept, long ones cut, in their order")
    func log() {
        let log = RecentLog()
        for line in 0..<RecentLog.lineCountMax + 3 { log.note("line \(line)") }
        log.note(String(repeating: "x", count: 10_000))
        let lines = log.all
        #expect(lines.count == RecentLog.lineCountMax && lines[0] == "line 4" && lines[lines.count - 2] == "line \(RecentLog.lineCountMax + 2)")
        #expect(lines[lines.count - 1].utf8.count < RecentLog.lineBytesMax + 10)
    }

    @Test("columns that hold secrets are known by their names")
    func columns() {
        for name in ["hash", "enrolmentHash", "passwordHash", "sessionToken", "webhookSecret"] { #expect(SupportSecrets.isSecret(column: name)) }
        for name in ["name", "server", "who", "status"] { #expect(!SupportSecrets.isSecret(column: name)) }
    }

    @Test("its command parses")
    func parses() throws { _ = try Afterimage.parseAsRoot(["support-bundle", "/x/bundle.tar.gz", "--json"]) }
}

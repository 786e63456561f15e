import BlockTap
import Foundation
import Logging
import Testing

@testable import Appliance

@Suite("Scripts around a cut")
struct ScriptedSourceTests {
    /// Proves every cut, as well as it is asked to.
    private final class Source: EpochSource {
        let proves: CutConsistency
        init(proves: CutConsistency = .fileSystem) { self.proves = proves }
        var instance: String { "test" }
        var disks: [SourceDisk] { [] }
        static var drainBufferBytes: Int { 1 << 20 }
        func beginFullSync() {}
        var needsFuzzyCut: Bool { get async { false } }
        func cut(fuzzyBytesMax: UInt64, consistency: CutConsistency) async throws -> Cut {
            let proof = CutProof(method: .rounds, consistency: consistency.rawValue <= proves.rawValue ? consistency : .crash)
            return Cut(epoch: EpochNumber(1), kind: .exact, timeNanoseconds: 1, blockCount: 0, proof: proof)
        }
        func nextItem() -> DrainItem? { nil }
        func setWakeup(_ wakeup: (@Sendable () -> Void)?) {}
        func release(_ buffer: DrainBuffer) {}
        func acknowledge(_ epoch: EpochNumber) {}
        func abandonAll() async {}
        var statistics: SourceStatistics { get async { SourceStatistics() } }
    }

    let directory: TemporaryDirectory
    init() throws { directory = try TemporaryDirectory() }

    private var said: String { (try? String(contentsOfFile: directory.path + "/said", encoding: .utf8)) ?? "" }
    private var pending: String { directory.path + "/pending" }

    private func script(_ name: String, _ status: Int = 0) throws -> String {
        let path = directory.path + "/" + name
        try Data("#!/bin/sh\necho $AFTERIMAGE_PHASE >>\(directory.path)/said\nexit \(status)\n".utf8).write(to: URL(fileURLWithPath: path))
        try FileManager.default.setAttributes([.posixPermissions: 0o700], ofItemAtPath: path)
        return path
    }

    private func source(_ source: Source = Source(), before: String?, after: String?) -> ScriptedSource {
        ScriptedSource(source, .init(before: before, after: after, limitSeconds: 60, pendingFile: pending), logger: Logger(label: "test"))
    }

    private func consistency(_ source: ScriptedSource, _ asked: CutConsistency) async throws -> CutConsistency? {
        try await source.cut(fuzzyBytesMax: 0, consistency: asked).proof?.consistency
    }

    @Test func bothRunAroundAnApplicationConsistentCutOnly() async throws {
        let source = source(before: try script("a"), after: try script("b"))
        #expect(try await consistency(source, .crash) == .crash)
        #expect(try await consistency(source, .fileSystem) == .fileSystem)
        #expect(said == "")
        #expect(try await consistency(source, .application) == .application)
        #expect(said == "pre\npost\n")
        #expect(!FileManager.default.fileExists(atPath: pending))
    }

    @Test func aPointIsNeverCalledMoreThanItIs() async throws {
        #expect(try await consistency(source(before: nil, after: nil), .application) == .fileSystem)
        #expect(try await consistency(source(before: try script("a", 1), after: try script("b")), .application) == .fileSystem)
        #expect(said == "pre\npost\n")
        #expect(try await consistency(source(Source(proves: .crash), before: try script("a"), after: nil), .application) == .crash)
    }

    @Test func theSecondIsRunByTheNextProcessIfThisOneWasKilled() async throws {
        try Data().write(to: URL(fileURLWithPath: pending))
        let next = source(before: try script("a"), after: try script("b"))
        await next.finishPending()
        #expect(said == "post\n")
        await next.finishPending()
        #expect(said == "post\n")
    }
}

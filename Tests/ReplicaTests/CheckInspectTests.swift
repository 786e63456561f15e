import BlockTap
import Foundation
import Testing

@testable import Replica

/// `store inspect` and `store check` on real directories: what they say.
@Suite struct CheckInspectTests {
    /// Two points of one disk; the second has block 1 anew.
    private func sample() throws -> TemporaryDirectory {
        let directory = TemporaryDirectory()
        let store = try openStore(directory)
        try store.createGroup(webGroup, volumes: [spec("vda", bytes: 16 * 4096)])
        var random = SeededRandom(seed: 5)
        let first = try store.begin(1)
        try first.append(volume: 0, offsetBytes: 0, noise(4 * 4096, &random))
        _ = try first.seal()
        let second = try store.begin(2)
        try second.append(volume: 0, offsetBytes: 4096, noise(4096, &random))
        try second.zero(volume: 0, offsetBytes: 8 * 4096, lengthBytes: 4096)
        let point = try second.seal()!
        try store.fork(ForkID("drill"), of: webGroup, at: point.id, purpose: "a drill")
        let fork = try store.openFork(ForkID("drill"), volume: 0)
        try noise(8192, &random).withUnsafeBytes { try fork.write(offsetBytes: 0, $0) }
        try fork.close()
        store.close()
        return directory
    }

    private func inspect(_ path: String, all: Bool = false) throws -> (text: String, damages: Int) {
        nonisolated(unsafe) var lines: [String] = []
        let damages = try StoreInspect.run(path: path, all: all) { lines.append(($0.isDamage ? "DAMAGE " : "") + $0.text) }
        return (lines.joined(separator: "\n"), damages)
    }

    private func flip(_ path: String, _ byte: Int) throws {
        var bytes = try Data(contentsOf: URL(fileURLWithPath: path))
        bytes[byte] ^= 1
        try bytes.write(to: URL(fileURLWithPath: path))
    }

    private func name(_ directory: TemporaryDirectory, _ prefix: String, _ index: Int = 0) throws -> String {
        directory.path + "/" + (try directory.files().filter { $0.hasPrefix(prefix) }[index])
    }

    @Test func everyFileIsToldInWords() throws {
        let directory = try sample()
        let overview = try inspect(directory.path)
        #expect(overview.damages == 0)
        for words in ["group web-1", "2 recovery points", "disk vda, 64 KiB: 2 layers", "rp-1", "fork drill of group web-1 at rp-2 (a drill)"] { #expect(overview.text.contains(words), "\(words)\n\(overview.text)") }
        let manifest = try inspect(directory.path + "/MANIFEST")
        for words in ["manifest file", "snapshot", "epoch 1 of group web-1 (exact", "recovery point rp-2", "fork drill of group web-1"] { #expect(manifest.text.contains(words), "\(words)\n\(manifest.text)") }
        let layer = try inspect(try name(directory, "layers/", 1), all: true)
        for words in ["layer file", "layer on layer", "epoch 2 (exact, consistency crash)", "block 1: segment", "block 8: zero", "1 blocks of data, 1 blocks of zeroes"] { #expect(layer.text.contains(words), "\(words)\n\(layer.text)") }
        let segment = try inspect(try name(directory, "segments/"))
        #expect(segment.text.contains("segment file") && segment.text.contains(": 4 blocks, the last before block 5"), "\(segment.text)")
        let journal = try inspect(try name(directory, "journals/"), all: true)
        for words in ["journal file", "of disk vda of fork drill", "1 writes, 2 blocks of data", "blocks 0 to 1: segment"] { #expect(journal.text.contains(words), "\(words)\n\(journal.text)") }
        for file in try directory.files() { #expect(try inspect(directory.path + "/" + file).damages == 0, "\(file)") }
    }

    @Test func itTellsWhereTheDamageIsAndGoesOn() throws {
        let directory = try sample()
        let manifest = directory.path + "/MANIFEST"
        // Inside the record of the group, the second one.
        let text = String(decoding: try Data(contentsOf: URL(fileURLWithPath: manifest)), as: UTF8.self)
        let place = text.utf8.distance(from: text.utf8.startIndex, to: try #require(text.range(of: "groupCreated")).lowerBound.samePosition(in: text.utf8)!)
        // Decoding may have made three bytes of one before it: look for the word in the bytes themselves.
        let bytes = [UInt8](try Data(contentsOf: URL(fileURLWithPath: manifest)))
        let word = Array("groupCreated".utf8)
        let offset = try #require((0..<bytes.count - word.count).first { Array(bytes[$0..<$0 + word.count]) == word })
        #expect(place >= offset)
        try flip(manifest, offset)
        let said = try inspect(manifest)
        #expect(said.damages > 0 && said.text.contains("DAMAGE") && said.text.contains("no record that matches its checksum") && said.text.contains("fork drill of group web-1"), "\(said.text)")
        let layer = try name(directory, "layers/", 0)
        try flip(layer, 4096 + 5)
        #expect(try inspect(layer).text.contains("DAMAGE a page of extents does not match its checksum"))
        let journal = try name(directory, "journals/", 0)
        try flip(journal, 100)
        #expect(try inspect(journal).damages == 1)
    }

    @Test func anyDamageIsSurvived() throws {
        let directory = try sample()
        var random = SeededRandom(seed: 9)
        for file in try directory.files() where file != "LOCK" && file != "RESERVE" {
            let path = directory.path + "/" + file
            let good = try Data(contentsOf: URL(fileURLWithPath: path))
            for _ in 0..<40 {
                var bytes = good
                for _ in 0..<1 + random.below(8) { bytes[random.below(bytes.count)] = UInt8(truncatingIfNeeded: random.next()) }
                if random.below(3) == 0 { bytes = bytes.prefix(random.below(bytes.count)) }
                try bytes.write(to: URL(fileURLWithPath: path))
                _ = try inspect(path, all: true)
                _ = try inspect(directory.path)
                _ = try? StoreCheck.run(directory: directory.path, readsData: true)
            }
            try good.write(to: URL(fileURLWithPath: path))
        }
        #expect(try StoreCheck.run(directory: directory.path, readsData: true).isClean)
    }

    /// A bad block spoils only the points that show it.
    @Test func checkSaysWhichPointsAreTouched() throws {
        let directory = try sample()
        #expect(try StoreCheck.run(directory: directory.path, readsData: true).isClean)
        let segment = try name(directory, "segments/")
        // Block 1 of the volume as the first epoch brought it: the second epoch and the fork have newer ones.
        try flip(segment, 2 * 4096 + 17)
        var report = try StoreCheck.run(directory: directory.path, readsData: true)
        #expect(report.badExtents == [BadExtent(group: webGroup, volume: 0, disk: "vda", block: 1, count: 1, layers: report.badExtents.first?.layers ?? [], recoveryPoints: [RecoveryPointID("rp-1")], forks: [])])
        #expect(report.views.filter { $0.state == .unreadable }.map(\.name) == ["rp-1"])
        // Without data nothing of that can be known.
        report = try StoreCheck.run(directory: directory.path, readsData: false)
        #expect(report.isClean && report.views.allSatisfy { $0.state == .indexed })
        // Block 3 shows everywhere.
        try flip(segment, 4 * 4096)
        report = try StoreCheck.run(directory: directory.path, readsData: true)
        #expect(report.badExtents.map(\.block) == [1, 3])
        #expect(report.badExtents.last?.recoveryPoints == [RecoveryPointID("rp-1"), RecoveryPointID("rp-2")] && report.badExtents.last?.forks == [ForkID("drill")])
        #expect(report.views.allSatisfy { $0.state == .unreadable })
    }

    @Test func aShortSegmentIsFoundWithoutReadingData() throws {
        let directory = try sample()
        let segment = try name(directory, "segments/")
        truncate(segment, 5 * 4096)
        let report = try StoreCheck.run(directory: directory.path, readsData: false)
        #expect(report.damages.contains { $0.what.contains("the segment has 20480 bytes, its layers need 24576") })
        #expect(report.views.filter { $0.kind == "recovery point" }.map(\.state) == [.indexed, .unreadable])
    }

    @Test func filesThatNothingNamesAreListedAndLeftAlone() throws {
        let directory = try sample()
        FileManager.default.createFile(atPath: directory.path + "/layers/00000099.layer", contents: Data([1]))
        let report = try StoreCheck.run(directory: directory.path, readsData: true)
        #expect(report.isClean && report.unnamedFiles == ["layers/00000099.layer"])
        #expect(FileManager.default.fileExists(atPath: directory.path + "/layers/00000099.layer"))
    }

    @Test func itChangesNothing() throws {
        let directory = try sample()
        try flip(try name(directory, "segments/"), 5000)
        // A record that a crash cut off.
        let handle = try FileHandle(forWritingTo: URL(fileURLWithPath: directory.path + "/MANIFEST"))
        try handle.seekToEnd()
        try handle.write(contentsOf: Data([0x41, 0x46, 0x52, 0x4D, 1, 0, 0, 0]))
        try handle.close()
        func contents() throws -> [String: Data] { try Dictionary(uniqueKeysWithValues: directory.files().map { ($0, try Data(contentsOf: URL(fileURLWithPath: directory.path + "/" + $0))) }) }
        let before = try contents()
        let report = try StoreCheck.run(directory: directory.path, readsData: true)
        #expect(report.notes.contains { $0.contains("unfinished record") })
        _ = try inspect(directory.path + "/MANIFEST")
        #expect(try contents() == before)
    }

    @Test func aStoreInUseOrNoStoreIsRefused() throws {
        let directory = try sample()
        let store = try openStore(directory)
        #expect { try StoreCheck.run(directory: directory.path, readsData: true) } throws: { if case .busy? = $0 as? StoreError { true } else { false } }
        // Looking at files is no trouble.
        #expect(try inspect(directory.path).damages == 0)
        store.close()
        #expect(try StoreCheck.run(directory: directory.path, readsData: true).isClean)
        let empty = TemporaryDirectory()
        #expect(throws: StoreError.self) { try StoreCheck.run(directory: empty.path, readsData: true) }
        #expect(throws: StoreError.self) { try StoreCheck.run(directory: empty.path + "/nowhere", readsData: true) }
        #expect(try empty.files().isEmpty && !FileManager.default.fileExists(atPath: empty.path + "/nowhere"))
    }

    @Test func versionOneIsRefusedInClearWords() throws {
        let directory = try sample()
        let path = directory.path + "/MANIFEST"
        var bytes = try Data(contentsOf: URL(fileURLWithPath: path))
        let header = bytes.withUnsafeBytes { $0.loadUnaligned(as: FileHeader.self) }
        let old = FileHeader(kind: .manifest, id: 0, store: header.store, version: 1)
        withUnsafeBytes(of: old) { bytes.replaceSubrange(0..<64, with: $0) }
        try bytes.write(to: URL(fileURLWithPath: path))
        let error = #expect(throws: StoreError.self) { try openStore(directory) }
        #expect(error == .versionTooOld(path: path, found: 1, supported: 2))
        #expect("\(error!)".contains("has format version 1, this program reads 2 only"))
        #expect(try inspect(path).text.contains("format version 1"))
    }
}

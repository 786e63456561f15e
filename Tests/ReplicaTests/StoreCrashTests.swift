import BlockTap
import Foundation
import Glibc
import Testing

@testable import Replica

/// What a crash, a torn write or a flipped bit leaves: right data, less of what was not promised, or an error with a name.
@Suite struct StoreCrashTests {
    /// A store of one group with a few points and a fork, and what each must hold.
    struct Sample {
        let directory = TemporaryDirectory()
        var points: [(RecoveryPointID, [UInt8])] = []
        /// After each write to the fork; the last one has been flushed and closed.
        var forkImages: [[UInt8]] = []
        let size = 24 * 4096 + 512
        static let fork = ForkID("f")

        init(seed: UInt64, flushEvery: Int = 3, close: Bool = true) throws {
            var random = SeededRandom(seed: seed)
            let store = try openStore(directory)
            try store.createGroup(webGroup, volumes: [spec("vda", bytes: UInt64(size))])
            var model = [UInt8](repeating: 0, count: size)
            for epoch in 1...5 as ClosedRange<UInt64> {
                let writer = try store.begin(epoch)
                for _ in 0..<4 {
                    let start = random.below(25) * 4096
                    let bytes = noise(min(size, start + 4096 * (1 + random.below(3))) - start, &random)
                    try writer.append(volume: 0, offsetBytes: UInt64(start), bytes)
                    model.replaceSubrange(start..<start + bytes.count, with: bytes)
                }
                points.append((try writer.seal()!.id, model))
            }
            try store.fork(Self.fork, of: webGroup, at: points[2].0, purpose: "test")
            let fork = try store.openFork(Self.fork, volume: 0)
            var image = points[2].1
            forkImages.append(image)
            for step in 1...12 {
                let start = random.below(24) * 4096
                let bytes = noise(4096, &random)
                try bytes.withUnsafeBytes { try fork.write(offsetBytes: UInt64(start), $0) }
                image.replaceSubrange(start..<start + 4096, with: bytes)
                forkImages.append(image)
                if step % flushEvery == 0 { try fork.flush() }
            }
            try fork.close()
            store.close()
        }
    }

    @Test func aManifestCutAnywhereGivesACleanPrefixOfThePoints() throws {
        let sample = try Sample(seed: 31)
        let length = try Data(contentsOf: URL(fileURLWithPath: sample.directory.path + "/MANIFEST")).count
        var random = SeededRandom(seed: 1)
        var seen: Set<Int> = []
        for cut in (0..<60).map({ _ in random.below(length - 64) + 64 }) + [length, length - 1, length - 32] {
            let copy = try sample.directory.copy()
            #expect(truncate(copy.path + "/MANIFEST", off_t(cut)) == 0)
            do {
                let store = try openStore(copy)
                let points = store.recoveryPoints(webGroup)
                #expect(points.map(\.id) == sample.points.prefix(points.count).map(\.0))
                seen.insert(points.count)
                for (index, point) in points.enumerated() { #expect(try store.image(point.id, volume: 0) == sample.points[index].1) }
                // Whatever no record names is gone, and the store goes on.
                let layers = try copy.files().filter { $0.hasPrefix("layers/") }
                #expect(layers.count == points.count)
                if store.group(webGroup) != nil { _ = try store.begin(100).seal() }
                store.close()
            } catch let error as StoreError {
                guard case .damaged(_, _, let what) = error else { throw error }
                #expect(what == "there is no record")
            }
        }
        #expect(seen.count > 3)
    }

    @Test func aBadRecordInTheMiddleOfTheManifestIsAnErrorThatNamesTheOffset() throws {
        let sample = try Sample(seed: 32)
        let path = sample.directory.path + "/MANIFEST"
        var bytes = [UInt8](try Data(contentsOf: URL(fileURLWithPath: path)))
        bytes[bytes.count / 2] ^= 4
        try Data(bytes).write(to: URL(fileURLWithPath: path))
        let error = try #require(throws: StoreError.self) { try openStore(sample.directory) }
        guard case .damaged(let where_, let offset, _) = error else { throw error }
        #expect(where_ == path && offset > 64 && offset < UInt64(bytes.count / 2 + 1))
    }

    @Test func aJournalCutAnywhereGivesAPrefixOfTheWrites() throws {
        let sample = try Sample(seed: 33)
        let journal = try #require(try sample.directory.files().first { $0.hasPrefix("journals/") })
        let length = try Data(contentsOf: URL(fileURLWithPath: sample.directory.path + "/" + journal)).count
        var random = SeededRandom(seed: 2)
        var seen: Set<Int> = []
        for cut in (0..<60).map({ _ in random.below(length - 64) + 64 }) + [length, length - 1] {
            let copy = try sample.directory.copy()
            #expect(truncate(copy.path + "/" + journal, off_t(cut)) == 0)
            let store = try openStore(copy)
            let fork = try store.openFork(Sample.fork, volume: 0)
            let writes = try #require(sample.forkImages.firstIndex(of: try fork.image()))
            #expect(writes % 3 == 0)
            seen.insert(writes)
            try fork.close()
            store.close()
        }
        #expect(seen == [0, 3, 6, 9, 12])
    }

    @Test func dataThatDidNotReachTheDiskCutsTheWritesAfterTheLastFlushOff() throws {
        // All twelve writes in one frame that no marker confirms, the data of the eighth lost.
        let sample = try Sample(seed: 34, flushEvery: 100)
        let journal = try #require(try sample.directory.files().first { $0.hasPrefix("journals/") })
        let path = sample.directory.path + "/" + journal
        let length = try Data(contentsOf: URL(fileURLWithPath: path)).count
        let segment = "segments/" + fileNumber(UInt64(journal.dropFirst("journals/".count).dropLast(".journal".count))! - 1) + ".seg"
        for lost in 0..<12 {
            let copy = try sample.directory.copy()
            #expect(truncate(copy.path + "/" + journal, off_t(length - FramedLog.frameHeaderBytes)) == 0)
            let file = try FileHandle(forUpdating: URL(fileURLWithPath: copy.path + "/" + segment))
            try file.seek(toOffset: UInt64(lost + 1) * 4096)
            try file.write(contentsOf: Data(count: 4096))
            try file.close()
            for _ in 0..<2 {
                let store = try openStore(copy)
                let fork = try store.openFork(Sample.fork, volume: 0)
                // Neighbouring writes may share an entry: then all of it goes.
                let writes = try #require(sample.forkImages.firstIndex(of: try fork.image()))
                #expect(writes <= lost)
                #expect(writes >= lost - 2)
                try fork.close()
                store.close()
            }
        }
    }

    @Test func aBadBlockOfAFlushedWriteIsAnErrorAndNeverARollback() throws {
        let sample = try Sample(seed: 35)
        let segment = try #require(try sample.directory.files().last { $0.hasPrefix("segments/") })
        let file = try FileHandle(forUpdating: URL(fileURLWithPath: sample.directory.path + "/" + segment))
        try file.seek(toOffset: 12 * 4096 + 77)
        try file.write(contentsOf: Data([1, 2, 3, 4]))
        try file.close()
        let store = try openStore(sample.directory)
        let fork = try store.openFork(Sample.fork, volume: 0)
        let error = try #require(throws: StoreError.self) { try fork.image() }
        guard case .badBlock(let volume, _, _, _) = error else { throw error }
        #expect(volume == "vda" && store.statistics().badBlockCount == 1)
        try fork.close()
        store.close()
    }

    @Test(arguments: [41, 42, 43, 44] as [UInt64])
    func aFlippedBitGivesRightDataOrANamedError(seed: UInt64) throws {
        let sample = try Sample(seed: seed)
        var random = SeededRandom(seed: seed)
        let files = try sample.directory.files().filter { $0 != "RESERVE" && $0 != "LOCK" }
        var refused = 0
        for round in 0..<120 {
            let copy = try sample.directory.copy()
            // Every file, however small, gets its share.
            let name = files[round % files.count]
            var bytes = [UInt8](try Data(contentsOf: URL(fileURLWithPath: copy.path + "/" + name)))
            let bit = random.below(min(bytes.count, name.hasPrefix("segments/") ? 40 * 4096 : bytes.count) * 8)
            bytes[bit / 8] ^= 1 << (bit % 8)
            try Data(bytes).write(to: URL(fileURLWithPath: copy.path + "/" + name))
            let context = Comment(rawValue: "seed \(seed): bit \(bit) of \(name)")
            do {
                let store = try openStore(copy)
                defer { store.close() }
                // Nothing that was promised may be missing without a word.
                #expect(store.recoveryPoints(webGroup).map(\.id) == sample.points.map(\.0), context)
                #expect(store.forks().map(\.id) == [Sample.fork], context)
                for (id, image) in sample.points {
                    do { #expect(try store.image(id, volume: 0) == image, context) } catch is StoreError { refused += 1 }
                }
                do {
                    let fork = try store.openFork(Sample.fork, volume: 0)
                    #expect(try fork.image() == sample.forkImages.last!, context)
                    try fork.close()
                } catch is StoreError { refused += 1 }
            } catch is StoreError { refused += 1 }
        }
        #expect(refused > 30)
    }

    @Test func filesThatNothingNamesAreRemovedAtStart() throws {
        let sample = try Sample(seed: 36)
        let before = try sample.directory.files()
        for name in ["layers/99999999.layer", "segments/99999998.seg", "journals/99999997.journal", "layers/x.tmp", "MANIFEST.new"] {
            try Data("left behind".utf8).write(to: URL(fileURLWithPath: sample.directory.path + "/" + name))
        }
        let store = try openStore(sample.directory)
        #expect(try sample.directory.files() == before)
        store.close()
    }

    @Test func aMissingManifestDoesNotMakeAllDataGarbage() throws {
        let sample = try Sample(seed: 40)
        try FileManager.default.removeItem(atPath: sample.directory.path + "/MANIFEST")
        let before = try sample.directory.files()
        #expect(throws: StoreError.self) { try openStore(sample.directory) }
        #expect(try sample.directory.files() == before)
    }

    @Test func aMissingFileIsANamedErrorOfWhatNeedsIt() throws {
        let sample = try Sample(seed: 37)
        let layer = try #require(try sample.directory.files().filter { $0.hasPrefix("layers/") }.last)
        try FileManager.default.removeItem(atPath: sample.directory.path + "/" + layer)
        let store = try openStore(sample.directory)
        for (id, image) in sample.points.dropLast() { #expect(try store.image(id, volume: 0) == image) }
        let error = try #require(throws: StoreError.self) { try store.image(sample.points.last!.0, volume: 0) }
        guard case .io(ENOENT, let what) = error else { throw error }
        #expect(what.contains(layer))
        store.close()
    }

    @Test func aLongManifestIsRewrittenAtOpenAndSaysTheSame() throws {
        let sample = try Sample(seed: 38)
        var options = smallOptions
        options.manifestRewriteBytes = 100
        let length = try Data(contentsOf: URL(fileURLWithPath: sample.directory.path + "/MANIFEST")).count
        for _ in 0..<2 {
            let store = try openStore(sample.directory, options)
            for (id, image) in sample.points { #expect(try store.image(id, volume: 0) == image) }
            store.close()
            #expect(try Data(contentsOf: URL(fileURLWithPath: sample.directory.path + "/MANIFEST")).count < length)
        }
    }

    @Test func aSecondOpenerIsRefused() throws {
        let directory = TemporaryDirectory()
        let store = try openStore(directory)
        let error = try #require(throws: StoreError.self) { try openStore(directory) }
        #expect(error == .busy("the store \(directory.path) is in use by another process: stop it first"))
        store.close()
        try openStore(directory).close()
    }

    @Test func aNewerVersionIsRefused() throws {
        let sample = try Sample(seed: 39)
        func makeNewer(_ name: String, _ kind: FileKind) throws {
            let url = URL(fileURLWithPath: sample.directory.path + "/" + name)
            var bytes = [UInt8](try Data(contentsOf: url))
            var header = bytes.withUnsafeBytes { $0.loadUnaligned(as: FileHeader.self) }
            header = FileHeader(kind: kind, id: header.id, store: header.store, version: FileHeader.versionNow + 1)
            withUnsafeBytes(of: header) { bytes.replaceSubrange(0..<64, with: $0) }
            try Data(bytes).write(to: url)
        }
        let layer = try #require(try sample.directory.files().filter { $0.hasPrefix("layers/") }.last)
        try makeNewer(layer, .layer)
        let store = try openStore(sample.directory)
        var error = try #require(throws: StoreError.self) { try store.image(sample.points.last!.0, volume: 0) }
        #expect(error == .versionTooNew(path: sample.directory.path + "/" + layer, found: 3, supported: 2))
        store.close()
        try makeNewer("MANIFEST", .manifest)
        error = try #require(throws: StoreError.self) { try openStore(sample.directory) }
        #expect("\(error)".contains("MANIFEST has format version 3, this program knows up to 2: use a newer afterimage"))
    }
}

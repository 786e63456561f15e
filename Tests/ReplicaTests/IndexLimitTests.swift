import Testing

@testable import Replica

/// The packed extents of an index, where they have no more room.
@Suite struct IndexLimitTests {
    static let last = IndexExtent.blockLimit - 1

    @Test func everyFieldHoldsItsLargestValueBesideTheOthers() {
        for start in [0, 1, Self.last] as [UInt64] {
            for count in [1, IndexExtent.blockCountMax] as [UInt32] {
                for slot in [0, 1, IndexExtent.openSlot - 1, IndexExtent.openSlot, IndexExtent.zeroSlot] as [UInt32] {
                    for cluster in [ClusterPart.plain, ClusterPart(storedBlocks: 15, blockCount: 16, skip: 15), ClusterPart(storedBlocks: 1, blockCount: 1, skip: 0)] {
                        let extent = IndexExtent(startBlock: start, blockCount: count, slot: slot, segment: .max, segmentBlock: .max, checksumIndex: .max, cluster: cluster)
                        #expect(extent.startBlock == start && extent.blockCount == count && extent.slot == slot && extent.cluster == cluster)
                        #expect(extent.segment == .max && extent.segmentBlock == .max && extent.checksumIndex == .max)
                        #expect(extent.endBlock == start + UInt64(count))
                        var other = extent
                        other.startBlock = Self.last - start
                        other.blockCount = 7
                        other.slot = 5
                        #expect(other.startBlock == Self.last - start && other.blockCount == 7 && other.slot == 5 && other.cluster == cluster)
                    }
                }
            }
        }
        #expect(MemoryLayout<IndexExtent>.stride == 24)
    }

    @Test func theLongestExtentFitsALayerFile() {
        let extent = IndexExtent(startBlock: 0, blockCount: IndexExtent.blockCountMax, slot: 3, segment: 1, segmentBlock: 1, checksumIndex: 9)
        let stored = StoredExtent(extent)
        #expect(UInt64(stored.storedBytes) == UInt64(IndexExtent.blockCountMax) * 4096)
        #expect(stored.indexed(slot: 3) == extent)
    }

    @Test func aClusterIsCutToEveryPartOfIt() {
        for blocks in 1...16 {
            let whole = IndexExtent(
                startBlock: 1000, blockCount: UInt32(blocks), slot: 1, segment: 2, segmentBlock: 50, checksumIndex: 400,
                cluster: ClusterPart(storedBlocks: max(1, blocks - 1), blockCount: blocks, skip: 0))
            for from in 0..<blocks {
                for to in from + 1...blocks {
                    let part = whole.clipped(from: 1000 + UInt64(from), to: 1000 + UInt64(to))
                    #expect(part.startBlock == 1000 + UInt64(from) && Int(part.blockCount) == to - from)
                    #expect(part.segmentBlock == 50 && part.checksumIndex == 400 + UInt32(from))
                    #expect(part.cluster == ClusterPart(storedBlocks: max(1, blocks - 1), blockCount: blocks, skip: from))
                    // A part of a part, and through the file.
                    let last = part.clipped(from: part.endBlock - 1, to: part.endBlock + 5)
                    #expect(last.cluster.skip == to - 1 && last.blockCount == 1)
                    #expect(StoredExtent(part).indexed(slot: 1) == part && Int(StoredExtent(part).segmentBlockCount) == max(1, blocks - 1))
                }
            }
        }
    }

    @Test func neighboursBecomeOneOnlyWhenOnePlaceHoldsBoth() {
        func extent(_ start: UInt64, _ count: UInt32, slot: UInt32 = 1, place: UInt32, sum: UInt32, cluster: ClusterPart = .plain) -> IndexExtent {
            IndexExtent(startBlock: start, blockCount: count, slot: slot, segment: 1, segmentBlock: place, checksumIndex: sum, cluster: cluster)
        }
        let first = extent(10, 5, place: 100, sum: 20)
        #expect(first.continues(into: extent(15, 3, place: 105, sum: 25)))
        #expect(!first.continues(into: extent(16, 3, place: 105, sum: 25)))
        #expect(!first.continues(into: extent(15, 3, place: 106, sum: 25)))
        #expect(!first.continues(into: extent(15, 3, place: 105, sum: 26)))
        #expect(!first.continues(into: extent(15, 3, slot: 2, place: 105, sum: 25)))
        #expect(!first.continues(into: extent(15, IndexExtent.blockCountMax - 4, place: 105, sum: 25)))
        #expect(first.continues(into: extent(15, IndexExtent.blockCountMax - 5, place: 105, sum: 25)))
        let part = ClusterPart(storedBlocks: 2, blockCount: 8, skip: 0)
        #expect(!extent(10, 5, place: 100, sum: 20, cluster: part).continues(into: extent(15, 3, place: 105, sum: 25)))
        #expect(!first.continues(into: extent(15, 3, place: 105, sum: 25, cluster: part)))
    }

    @Test func theLastBlocksOfTheLargestVolumeAreFound() {
        var index = ExtentIndex()
        let limit = IndexExtent.blockLimit
        for block in stride(from: limit - 3000, to: limit, by: 3) {
            index.apply(IndexExtent(startBlock: block, blockCount: 2, slot: 0, segment: 1, segmentBlock: UInt32(limit - block), checksumIndex: 0))
        }
        #expect(index.isConsistent && index.count == 1000)
        #expect(index.piece(at: limit - 3, end: limit).extent?.segmentBlock == 3)
        #expect(index.piece(at: limit - 1, end: limit) == (nil, limit))
        index.apply(IndexExtent(startBlock: limit - 1, blockCount: 1, slot: 0, segment: 2, segmentBlock: 9, checksumIndex: 0))
        #expect(index.piece(at: limit - 1, end: limit).extent?.segment == 2)
        index.erase(from: limit - 2999, to: limit)
        #expect(index.extents.map(\.blockCount) == [1] && index.isConsistent)
        index.erase(from: 0, to: limit)
        #expect(index.isEmpty)
    }

    /// Clusters, plain runs and gaps over each other in random order, block by block.
    @Test(arguments: [1, 2, 3, 4] as [UInt64])
    func clustersAreReadInPartsWhateverLiesOverThem(seed: UInt64) {
        var random = SeededRandom(seed: seed)
        var index = ExtentIndex()
        // Which write, and which block of it.
        var model = [(UInt32, Int)?](repeating: nil, count: 4000)
        for step in 1...6000 as ClosedRange<UInt32> {
            let start = random.below(3980)
            let count = 1 + random.below(16)
            if random.below(5) == 0 {
                index.erase(from: UInt64(start), to: UInt64(start + count))
                for block in start..<start + count { model[block] = nil }
                continue
            }
            let cluster = count > 1 && random.below(2) == 0 ? ClusterPart(storedBlocks: 1 + random.below(count - 1), blockCount: count, skip: 0) : .plain
            index.apply(IndexExtent(startBlock: UInt64(start), blockCount: UInt32(count), slot: step % 7, segment: step, segmentBlock: 100, checksumIndex: step * 16, cluster: cluster))
            for block in start..<start + count { model[block] = (step, block - start) }
        }
        #expect(index.isConsistent)
        for block in model.indices {
            let extent = index.piece(at: UInt64(block), end: UInt64(block + 1)).extent
            guard let (step, place) = model[block] else {
                #expect(extent == nil)
                continue
            }
            #expect(extent?.segment == step && extent?.slot == step % 7 && extent?.checksumIndex == step * 16 + UInt32(place))
            if let extent { #expect(extent.cluster.isCompressed ? extent.cluster.skip == place && extent.segmentBlock == 100 : extent.segmentBlock == 100 + UInt32(place)) }
        }
    }

    @Test func anIndexTakesLittleMoreThanItsExtents() {
        func apply(_ block: UInt64, _ index: inout ExtentIndex) {
            index.apply(IndexExtent(startBlock: block, blockCount: 1, slot: 0, segment: 1, segmentBlock: UInt32(truncatingIfNeeded: block &* 7), checksumIndex: 0))
        }
        var inOrder = ExtentIndex()
        for block in stride(from: 0, to: 400_000, by: 2) as StrideTo<UInt64> { apply(block, &inOrder) }
        #expect(inOrder.count == 200_000 && inOrder.room * 24 <= inOrder.count * 25)
        var random = SeededRandom(seed: 3)
        var scattered = ExtentIndex()
        for _ in 0..<200_000 { apply(UInt64(random.below(1 << 30)) * 2, &scattered) }
        #expect(scattered.isConsistent && scattered.room * 24 <= scattered.count * 31)
        for _ in 0..<50_000 { apply(UInt64(random.below(200_000)) * 2 + 1, &inOrder) }
        #expect(inOrder.isConsistent && inOrder.room * 24 <= inOrder.count * 31)
    }
}

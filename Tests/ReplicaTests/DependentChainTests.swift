import BlockTap
import Glibc
import Testing

@testable import order_check

/// The judge of `order-check`: what it lets pass and what it does not.
@Suite struct DependentChainTests {
    /// Two disks in memory that keep what they held after every so many writes.
    private final class Disks: @unchecked Sendable {
        typealias Image = [[(chain: UInt64, sequence: UInt64)]]

        let blocks = [256, 512]
        var image: Image
        var images: [Image] = []
        var before: Image = []
        var writeCount = 0
        let wanted: Int
        var onEnough: () -> Void = {}

        init(wanted: Int) {
            self.wanted = wanted
            image = blocks.map { Array(repeating: (0, 0), count: $0) }
        }
    }

    private struct Target: ChainTarget {
        let disks: Disks
        let disk: Int

        func write(_ memory: UnsafeRawPointer, count: Int, offset: Int, durable: Bool) -> Bool {
            disks.before = disks.image
            for block in 0..<count / blockBytes {
                disks.image[disk][offset / blockBytes + block] = (
                    memory.load(fromByteOffset: block * blockBytes, as: UInt64.self), memory.load(fromByteOffset: block * blockBytes + 8, as: UInt64.self))
            }
            disks.writeCount += 1
            if disks.writeCount % 100 == 0 { disks.images.append(disks.image) }
            if disks.writeCount == disks.wanted { disks.onEnough() }
            return true
        }
    }

    private func written(_ count: Int) -> (Disks, DependentChain) {
        let disks = Disks(wanted: count)
        let chain = DependentChain(number: 1, chainCount: 4, diskBlocks: disks.blocks, pauseMicroseconds: 0)
        disks.onEnough = { chain.stop() }
        chain.run { Target(disks: disks, disk: $0) }
        return (disks, chain)
    }

    private func newest(_ chain: DependentChain, _ model: inout DependentChain.Model, _ image: Disks.Image) -> UInt64? {
        if case .exact(let newest) = chain.check(&model, chain.writes, { image[$0][$1] }) { return newest }
        return nil
    }

    @Test func everyStateIsExactAndNoneGoesBack() {
        let (disks, chain) = written(3000)
        var model = DependentChain.Model(chain)
        for (number, image) in disks.images.enumerated() { #expect(newest(chain, &model, image) == UInt64((number + 1) * 100)) }
        let nothing = disks.image.map { $0.map { _ in (chain: UInt64(0), sequence: UInt64(0)) } }
        for older in [disks.images[disks.images.count - 2], nothing] {
            #expect(newest(chain, &model, older) == nil)
            var fresh = DependentChain.Model(chain)
            #expect(newest(chain, &fresh, older) != nil)
        }
    }

    /// The newest write may be there in part; nothing else may be missing, or from elsewhere.
    @Test func whatIsMissingOrFromElsewhereIsFound() throws {
        let (disks, chain) = written(2000)
        var partial = 0
        for disk in disks.image.indices {
            for block in disks.image[disk].indices where disks.image[disk][block].chain != 0 {
                let sequence = disks.image[disk][block].sequence
                for (changed, isRight) in [
                    ((chain: UInt64(2), sequence: sequence - 1), false), ((chain: UInt64(0), sequence: UInt64(0)), false), ((chain: UInt64(3), sequence: sequence), false),
                    ((chain: UInt64(2), sequence: UInt64(2001)), false), (disks.before[disk][block], disks.before[disk][block].sequence != sequence),
                ] {
                    if changed == disks.image[disk][block] { continue }
                    var image = disks.image
                    image[disk][block] = changed
                    var model = DependentChain.Model(chain)
                    // What the last write changed may be as it was.
                    let isExact = newest(chain, &model, image) != nil
                    let wasSo = changed == disks.before[disk][block] && disks.before[disk][block] != disks.image[disk][block]
                    if wasSo { partial += 1 }
                    #expect(isExact == (isRight || wasSo), "disk \(disk) block \(block): \(changed)")
                }
            }
        }
        #expect(partial > 0)
    }
}

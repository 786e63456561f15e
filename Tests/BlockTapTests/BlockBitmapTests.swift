import Testing

@testable import BlockTap

/// The two-level bitmap against a plain array, on sizes at which the second level has several words (the epoch simulation's disks
/// are too small for that).
@Suite struct BlockBitmapTests {
    @Test(arguments: 0..<UInt64(12))
    func behavesLikeAnArrayOfBooleans(seed: UInt64) {
        var rng = SplitMix(seed: seed)
        let blockCount = 1 + rng.below(seed % 3 == 0 ? 5000 : 700_000)
        let bitmap = BlockBitmap(blockCount: UInt64(blockCount)), other = BlockBitmap(blockCount: UInt64(blockCount))
        var model = [Bool](repeating: false, count: blockCount), otherModel = model
        for _ in 0..<300 {
            let first = rng.below(blockCount)
            let length = min(blockCount - first, 1 + (rng.chance(10) ? rng.below(20_000) : rng.below(100)))
            switch rng.below(12) {
            case 0..<4:
                bitmap.set(first: UInt64(first), length: UInt64(length))
                for block in first..<(first + length) { model[block] = true }
            case 4..<8:
                bitmap.clear(first: UInt64(first), length: UInt64(length))
                for block in first..<(first + length) { model[block] = false }
            case 8:
                other.set(first: UInt64(first), length: UInt64(length))
                for block in first..<(first + length) { otherModel[block] = true }
            case 9 where rng.chance(20):
                bitmap.formUnion(other)
                for block in 0..<blockCount where otherModel[block] { model[block] = true }
            case 10 where rng.chance(10):
                bitmap.clearAll()
                model = [Bool](repeating: false, count: blockCount)
            default:
                let limit = first + length
                #expect(bitmap.nextSet(from: UInt64(first)) == model[first...].firstIndex(of: true).map(UInt64.init))
                #expect(bitmap.nextSet(from: UInt64(first), limit: UInt64(limit)) == model[first..<limit].firstIndex(of: true).map(UInt64.init))
                #expect(bitmap.intersects(first: UInt64(first), length: UInt64(length)) == model[first..<limit].contains(true))
                let run = model[first..<limit].firstIndex { $0 != model[first] }.map { $0 - first } ?? length
                #expect(bitmap.runLength(first: UInt64(first), limit: UInt64(length)) == UInt64(run))
            }
        }
        #expect(bitmap.count == UInt64(model.count { $0 }))
    }
}

import BlockTap
import Glibc

/// Data of a fork's open layer: its segment, and the checksum of every block in it (8 bytes per block written).
/// Used by one thread at a time.
final class OpenLayerData {
    let segment: SegmentFile
    private var sums: UnsafeMutablePointer<UInt64>
    private var capacity: Int

    init(segment: SegmentFile) {
        self.segment = segment
        capacity = 1024
        sums = .allocate(capacity: capacity)
    }

    deinit { sums.deallocate() }

    /// By block of the segment file. Valid until the next `reserve`.
    @inline(__always)
    func base(_ segmentBlock: UInt32) -> UnsafePointer<UInt64> { UnsafePointer(sums + Int(segmentBlock)) }

    @inline(__always)
    func set(_ sum: UInt64, segmentBlock: Int) { sums[segmentBlock] = sum }

    /// Makes room for checksums of the segment's blocks before `endBlock`.
    func reserve(_ endBlock: Int) {
        if endBlock <= capacity { return }
        let grown = max(endBlock, capacity * 2)
        let moved = UnsafeMutablePointer<UInt64>.allocate(capacity: grown)
        memcpy(moved, sums, capacity * 8)
        sums.deallocate()
        sums = moved
        capacity = grown
    }
}

/// The journal of a fork's open layer: which blocks were written where, in the order in which the writes completed.
///
/// A frame (type 1 of the `FramedLog`) holds the writes since the frame before:
///
///     offset size
///          0    4  number of entries n
///          4    4  number of checksums m
///          8  n×32 entries (`StoredExtent`; `checksumIndex` counts within the frame)
///          …   m×8 checksums of the blocks written, in the order of the entries
///
/// A frame is written at each flush, beside the sync of the data; the next one only after both are durable, announced by a
/// `synced` marker. So at recovery frames before a marker are whole, and of what follows the entries count up to the first whose
/// data does not match its checksums.
enum ForkJournal {
    static let frameType: UInt32 = 1
    static func path(_ id: UInt64) -> String { "journals/\(fileNumber(id)).journal" }

    static func payload(_ entries: [StoredExtent], _ data: OpenLayerData) -> [UInt8] {
        let count = entries.reduce(0) { $0 + ($1.isZero ? 0 : Int($1.blockCount)) }
        return [UInt8](unsafeUninitializedCapacity: 8 + entries.count * 32 + count * 8) { bytes, length in
            let raw = UnsafeMutableRawBufferPointer(bytes)
            raw.storeBytes(of: UInt32(entries.count), toByteOffset: 0, as: UInt32.self)
            raw.storeBytes(of: UInt32(count), toByteOffset: 4, as: UInt32.self)
            var next = 0
            let sums = 8 + entries.count * 32
            for (index, entry) in entries.enumerated() {
                var entry = entry
                entry.checksumIndex = entry.isZero ? 0 : UInt32(next)
                raw.storeBytes(of: entry, toByteOffset: 8 + index * 32, as: StoredExtent.self)
                if entry.isZero { continue }
                memcpy(raw.baseAddress! + sums + next * 8, data.base(entry.segmentBlock), Int(entry.blockCount) * 8)
                next += Int(entry.blockCount)
            }
            length = raw.count
        }
    }

    struct Batch {
        var entries: [StoredExtent]
        var sums: [UInt64]
    }

    /// Nil when the payload contradicts itself, which its checksum should have told.
    static func parse(_ payload: [UInt8]) -> Batch? {
        payload.withUnsafeBytes { raw in
            guard raw.count >= 8 else { return nil }
            let entryCount = Int(raw.loadUnaligned(fromByteOffset: 0, as: UInt32.self))
            let sumCount = Int(raw.loadUnaligned(fromByteOffset: 4, as: UInt32.self))
            guard raw.count == 8 + entryCount * 32 + sumCount * 8 else { return nil }
            let entries = (0..<entryCount).map { raw.loadUnaligned(fromByteOffset: 8 + $0 * 32, as: StoredExtent.self) }
            let sums = (0..<sumCount).map { raw.loadUnaligned(fromByteOffset: 8 + entryCount * 32 + $0 * 8, as: UInt64.self) }
            for entry in entries {
                if entry.blockCount == 0 || (!entry.isZero && (Int(entry.checksumIndex) + Int(entry.blockCount) > sumCount || entry.segmentBlock == 0)) { return nil }
            }
            return Batch(entries: entries, sums: sums)
        }
    }
}

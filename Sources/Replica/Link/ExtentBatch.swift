import BlockTap
import Glibc
import NIOCore

/// Collects drained bytes into the payload of one EXTENTS frame, and runs of zero blocks into one ZERO frame.
///
/// Each byte is looked at once: a block is tested for zeroes, hashed, and copied while it is in the cache; afterwards the
/// source's buffer is free again. Consecutive blocks become one extent.
struct ExtentBatch {
    private(set) var extents: [WireExtent] = []
    private(set) var checksums: [UInt64] = []
    private(set) var zeroRuns: [WireExtent] = []
    private(set) var zeroBytes: UInt64 = 0
    private(set) var payload: ByteBuffer

    /// Shorter runs of zeroes inside data are sent as data: a frame's table entry and an extent at the replica cost more.
    static let zeroRunBlocksMin = 8

    init(allocator: ByteBufferAllocator) {
        payload = allocator.buffer(capacity: FrameLimits.batchBytes)
    }

    var dataBytes: Int { payload.readableBytes }
    var hasData: Bool { !extents.isEmpty }
    var hasZeroes: Bool { !zeroRuns.isEmpty }

    /// Whether a run of `count` bytes more could break the limits of a frame; `isScattered`: of which any blocks may be left out.
    func isFull(forAnother count: Int, isScattered: Bool = false) -> Bool {
        // In the worst case every other run of `zeroRunBlocksMin` blocks, or every other block, starts a new extent.
        let pieces = count / ((isScattered ? 2 : Self.zeroRunBlocksMin) * blockBytes) + 2
        return dataBytes + count > FrameLimits.payloadBytesMax || extents.count + pieces > FrameLimits.extentsMax
            || zeroRuns.count + pieces > FrameLimits.zeroRunsMax
    }

    /// Keeps the memory for the next frame if nobody else holds it any more.
    mutating func clearData() {
        extents.removeAll(keepingCapacity: true)
        checksums.removeAll(keepingCapacity: true)
        payload.clear(minimumCapacity: FrameLimits.batchBytes)
    }

    mutating func clearZeroes() {
        zeroRuns.removeAll(keepingCapacity: true)
        zeroBytes = 0
    }

    mutating func append(disk: Int, offsetBytes: UInt64, bytes: UnsafeRawBufferPointer) {
        precondition(offsetBytes % UInt64(blockBytes) == 0 && !bytes.isEmpty)
        var start = 0
        while start < bytes.count {
            // A run of zero blocks, if one starts here that is long enough or all there is.
            var end = start
            while end < bytes.count, isZero(block(bytes, end)) { end += blockBytes }
            end = min(end, bytes.count)
            if end > start, end - start >= Self.zeroRunBlocksMin * blockBytes || end - start == bytes.count {
                appendZero(disk: disk, offsetBytes: offsetBytes + UInt64(start), lengthBytes: UInt64(end - start))
                start = end
                continue
            }
            // Data up to the next long run of zeroes.
            var zeroes = end - start
            while end < bytes.count, zeroes < Self.zeroRunBlocksMin * blockBytes {
                let next = block(bytes, end)
                zeroes = isZero(next) ? zeroes + next.count : 0
                end += next.count
            }
            if zeroes >= Self.zeroRunBlocksMin * blockBytes { end -= zeroes }
            appendData(disk, offsetBytes + UInt64(start), UnsafeRawBufferPointer(rebasing: bytes[start..<end]))
            start = end
        }
    }

    mutating func appendZero(disk: Int, offsetBytes: UInt64, lengthBytes: UInt64) {
        zeroBytes += lengthBytes
        let blocks = (lengthBytes + UInt64(blockBytes) - 1) / UInt64(blockBytes)
        if let last = zeroRuns.indices.last, zeroRuns[last].volume == UInt32(disk),
            zeroRuns[last].offsetBytes + UInt64(zeroRuns[last].length) * UInt64(blockBytes) == offsetBytes,
            UInt64(zeroRuns[last].length) + blocks <= UInt64(UInt32.max)
        {
            zeroRuns[last].length += UInt32(blocks)
            return
        }
        var offset = offsetBytes
        var left = blocks
        while left > 0 {
            let length = UInt32(min(left, UInt64(UInt32.max)))
            zeroRuns.append(WireExtent(volume: UInt32(disk), length: length, offsetBytes: offset))
            offset += UInt64(length) * UInt64(blockBytes)
            left -= UInt64(length)
        }
    }

    private mutating func appendData(_ disk: Int, _ offsetBytes: UInt64, _ bytes: UnsafeRawBufferPointer) {
        if let last = extents.indices.last, extents[last].volume == UInt32(disk),
            extents[last].offsetBytes + UInt64(extents[last].length) == offsetBytes
        {
            extents[last].length += UInt32(bytes.count)
        } else {
            extents.append(WireExtent(volume: UInt32(disk), length: UInt32(bytes.count), offsetBytes: offsetBytes))
        }
        let first = offsetBytes / UInt64(blockBytes)
        payload.writeWithUnsafeMutableBytes(minimumWritableBytes: bytes.count) { target in
            var offset = 0
            var index = first
            while offset < bytes.count {
                let block = block(bytes, offset)
                checksums.append(BlockChecksum.of(block.baseAddress!, count: block.count, blockIndex: index))
                (target.baseAddress! + offset).copyMemory(from: block.baseAddress!, byteCount: block.count)
                offset += block.count
                index += 1
            }
            return bytes.count
        }
    }
}

private func block(_ bytes: UnsafeRawBufferPointer, _ offset: Int) -> UnsafeRawBufferPointer {
    UnsafeRawBufferPointer(rebasing: bytes[offset..<min(offset + blockBytes, bytes.count)])
}

/// Compares the bytes with themselves, eight further on; nearly always decided by the first word.
func isZero(_ bytes: UnsafeRawBufferPointer) -> Bool {
    guard bytes.count >= 8 else { return bytes.allSatisfy { $0 == 0 } }
    guard bytes.loadUnaligned(as: UInt64.self) == 0 else { return false }
    return memcmp(bytes.baseAddress!, bytes.baseAddress! + 8, bytes.count - 8) == 0
}

/// The checksums of a layer's blocks, kept in memory while anybody reads through the layer. Immutable.
final class LayerChecksums: @unchecked Sendable {
    let layer: UInt64
    /// Size of the volume at the layer's cut: tells how much of a last block was hashed.
    let sizeBytes: UInt64
    let count: Int
    let sums: UnsafeMutablePointer<UInt64>

    init(layer: UInt64, sizeBytes: UInt64, copying sums: UnsafeBufferPointer<UInt64>) {
        self.layer = layer
        self.sizeBytes = sizeBytes
        count = sums.count
        self.sums = .allocate(capacity: max(1, sums.count))
        if count > 0 { self.sums.update(from: sums.baseAddress!, count: count) }
    }

    deinit { sums.deallocate() }
}

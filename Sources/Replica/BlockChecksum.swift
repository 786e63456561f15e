import CXXHash

/// The checksum kept for every 4 KiB block, from the moment it is read at the source until it is read back at the replica:
/// XXH3-64 of the block's bytes, seeded with its block index so that a misdirected block does not verify.
/// A partial last block is hashed at its own length.
public enum BlockChecksum {
    @inlinable
    public static func of(_ bytes: UnsafeRawPointer, count: Int, blockIndex: UInt64) -> UInt64 {
        cxxhash_64_seeded(bytes, count, blockIndex)
    }
}

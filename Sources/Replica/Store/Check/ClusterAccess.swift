/// What checks need of compressed clusters.
enum ClusterAccess {
    /// The cluster's blocks. False when it cannot be decompressed; no store of this version writes any.
    static func unpack(_ stored: UnsafeRawBufferPointer, _ part: ClusterPart, into target: UnsafeMutableRawBufferPointer) -> Bool { false }
}

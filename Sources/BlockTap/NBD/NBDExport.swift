/// A store under a name, as the server's connections see it: what is asked per request is kept flat, and the only call that
/// depends on the store's type is `submit`.
class NBDExport {
    let name: String
    let geometry: BlockGeometry
    let isReadOnly: Bool
    let supportsTrim: Bool

    init(name: String, geometry: BlockGeometry, isReadOnly: Bool, supportsTrim: Bool) {
        precondition(geometry.logicalBlockBytes.nonzeroBitCount == 1, "logical blocks are a power of two")
        self.name = name
        self.geometry = geometry
        self.isReadOnly = isReadOnly
        self.supportsTrim = supportsTrim
    }

    func submit(_ request: BlockRequestPointer) { fatalError("abstract") }

    /// Flushes of all our stores cover the whole device, so several connections may share it (NBD_FLAG_CAN_MULTI_CONN).
    var transmissionFlags: NBD.TransmissionFlags {
        var flags: NBD.TransmissionFlags = [.hasFlags, .sendFlush, .sendFUA, .canMultiConn]
        if isReadOnly {
            flags.insert(.readOnly)
        } else if supportsTrim {
            flags.formUnion([.sendTrim, .sendWriteZeroes])
        }
        return flags
    }

    /// Minimum, preferred and maximum block of NBD_INFO_BLOCK_SIZE.
    var blockSizes: (minimum: UInt32, preferred: UInt32, maximum: UInt32) {
        let minimum = geometry.logicalBlockBytes
        let preferred = min(max(geometry.preferredBlockBytes, minimum), UInt32(NBDArena.requestBytesMax))
        return (minimum, preferred.nonzeroBitCount == 1 ? preferred : max(4096, minimum), UInt32(NBDArena.requestBytesMax))
    }
}

final class NBDStoreExport<Store: BlockStore>: NBDExport {
    private let store: Store

    init(name: String, store: Store) {
        self.store = store
        super.init(
            name: name, geometry: store.geometry, isReadOnly: store.isReadOnly, supportsTrim: store.supportsTrim)
    }

    override func submit(_ request: BlockRequestPointer) { store.submit(request) }
}

/// The merged index of a volume up to one layer. A value; copies share what they have in common.
struct IndexSnapshot: Sendable {
    /// The newest layer in it; 0 = none.
    var top: UInt64 = 0
    var index = ExtentIndex()
    /// By `IndexExtent.slot`. A free slot repeats a layer that is in use.
    private(set) var layers: ContiguousArray<LayerChecksums> = []
    private var freeSlots: [UInt32] = []
    /// What the slot of an extent has room for; less in tests.
    var slotsMax = Int(IndexExtent.openSlot)

    init() {}

    /// As an index file has it: all slots in use.
    init(top: UInt64, index: ExtentIndex, layers: ContiguousArray<LayerChecksums>) {
        self.top = top
        self.index = index
        self.layers = layers
    }

    /// Puts a layer on top. Throws `.invalid` when extents of more layers than an index can tell apart are to be seen; the snapshot is as
    /// before then.
    mutating func apply(_ extents: [StoredExtent], _ checksums: LayerChecksums) throws(StoreError) {
        let slot = try takeSlot(checksums)
        extents.withUnsafeBufferPointer { put($0, slot) }
        top = checksums.layer
    }

    /// The same out of a file; after an error the snapshot is of no use.
    mutating func apply(_ reader: LayerReader, _ checksums: LayerChecksums) throws(StoreError) {
        let slot = try takeSlot(checksums)
        try reader.forEachExtents { extents throws(StoreError) in put(extents, slot) }
        top = checksums.layer
    }

    private mutating func put(_ extents: UnsafeBufferPointer<StoredExtent>, _ slot: UInt32) {
        for extent in extents {
            if extent.isZero {
                // Absence reads as zeroes and nothing lies below the merged index.
                index.erase(from: extent.startBlock, to: extent.endBlock)
            } else {
                index.apply(extent.indexed(slot: slot))
            }
        }
    }

    /// Layers `replaced` (neighbours, oldest first) became one: what they have in the index is turned to the places that the new one names,
    /// which may be others when data moved with it. False when the snapshot ends among them; after that, and after an error, it is of
    /// no use.
    mutating func rebase(replaced: [UInt64], by reader: LayerReader, _ checksums: LayerChecksums, turnsExtents: Bool = true) throws(StoreError) -> Bool {
        if replaced.dropLast().contains(top) { return false }
        let gone = Set(replaced)
        if top == replaced.last { top = checksums.layer }
        if !layers.contains(where: { gone.contains($0.layer) }) { return true }
        // Taken first: a free slot may repeat a layer that is gone now.
        let slot = try takeSlot(checksums)
        var old = SlotSet(count: layers.count)
        for (number, layer) in layers.enumerated() where gone.contains(layer.layer) { old.insert(UInt32(number)) }
        // Out of `self`, so that it is changed in place.
        var turned = ExtentIndex()
        swap(&turned, &index)
        var hint = 0
        try reader.forEachExtents { extents throws(StoreError) in
            for extent in extents where !extent.isZero && turnsExtents { turned.repoint(extent.indexed(slot: slot), from: old, hint: &hint) }
        }
        swap(&turned, &index)
        var free = SlotSet(count: layers.count)
        for number in freeSlots { free.insert(number) }
        for number in layers.indices where old.contains(UInt32(number)) {
            layers[number] = checksums
            if !free.contains(UInt32(number)) { freeSlots.append(UInt32(number)) }
        }
        return true
    }

    private mutating func takeSlot(_ checksums: LayerChecksums) throws(StoreError) -> UInt32 {
        if freeSlots.isEmpty, layers.count == slotsMax {
            // Layers of which nothing is to be seen any more.
            let used = index.usedSlots(below: layers.count)
            freeSlots = (0..<UInt32(layers.count)).filter { !used.contains($0) }
            for slot in freeSlots { layers[Int(slot)] = checksums }
        }
        if let slot = freeSlots.popLast() {
            layers[Int(slot)] = checksums
            return slot
        }
        guard layers.count < slotsMax else { throw .invalid("the blocks of a disk are spread over more than \(slotsMax) layers: let upkeep merge them") }
        layers.append(checksums)
        return UInt32(layers.count - 1)
    }

    func names(_ gone: Set<UInt64>) -> Bool { gone.contains(top) || layers.contains { gone.contains($0.layer) } }

    /// How many layers of `chain` (oldest first) are in it; nil when it is not a snapshot of that chain: it ends elsewhere, or names
    /// layers that have been replaced, whose data may be gone.
    func covered(of chain: [LayerRecord]) -> Int? {
        if top == 0 { return 0 }
        guard let position = chain.lastIndex(where: { $0.id == top }) else { return nil }
        let ids = Set(chain[...position].lazy.map(\.id))
        return layers.allSatisfy { ids.contains($0.layer) } ? position + 1 : nil
    }
}

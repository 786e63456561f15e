import CIoUring

/// Memory that the kernel has pinned for this ring. Without the kernel's consent (old kernel, memory-lock limit) it stays
/// empty and everything works as before.
struct FixedBuffers: ~Copyable {
    static let placeCount = 16

    private struct Place {
        var base: UInt = 0
        var end: UInt = 0
    }

    private let places: UnsafeMutablePointer<Place>
    /// Places below this may be in use; 0 while fixed buffers are not available.
    private var highWater = 0
    private let isAvailable: Bool

    init(_ ring: OpaquePointer) {
        places = .allocate(capacity: Self.placeCount)
        places.initialize(repeating: Place(), count: Self.placeCount)
        isAvailable = ciouring_reserve_buffers(ring, UInt32(Self.placeCount)) >= 0
    }

    mutating func add(_ memory: UnsafeMutableRawBufferPointer, to ring: OpaquePointer) {
        guard isAvailable, let base = memory.baseAddress else { return }
        guard let index = (0..<Self.placeCount).first(where: { places[$0].end == 0 }) else { return }
        guard ciouring_set_buffer(ring, UInt32(index), base, UInt64(memory.count)) >= 0 else { return }
        places[index] = Place(base: UInt(bitPattern: base), end: UInt(bitPattern: base) + UInt(memory.count))
        highWater = max(highWater, index + 1)
    }

    mutating func remove(_ memory: UnsafeMutableRawBufferPointer, from ring: OpaquePointer) {
        let base = UInt(bitPattern: memory.baseAddress)
        guard let index = (0..<highWater).first(where: { places[$0].base == base && places[$0].end != 0 }) else { return }
        _ = ciouring_set_buffer(ring, UInt32(index), nil, 0)
        places[index] = Place()
    }

    deinit { places.deallocate() }

    @inline(__always) func index(of pointer: UnsafeRawPointer, count: Int) -> UInt32? {
        let start = UInt(bitPattern: pointer)
        var index = 0
        while index < highWater {
            if start >= places[index].base, start &+ UInt(count) <= places[index].end { return UInt32(index) }
            index &+= 1
        }
        return nil
    }
}

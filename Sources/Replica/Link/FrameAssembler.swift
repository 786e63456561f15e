import NIOCore

/// A whole frame, in the assembler's memory: valid only while `FrameAssembler.consume` calls back.
struct FrameView {
    var header: FrameHeader
    /// Starts at a multiple of 16 bytes.
    var meta: UnsafeRawBufferPointer
    /// Page-aligned.
    var payload: UnsafeRawBufferPointer
}

/// Cuts the byte stream of one direction of one connection into frames.
///
/// Every byte is copied once, from the TLS layer's buffer into the frame's place. Memory is bounded by the limits of the
/// frame types: nothing is set aside before the header that asks for it has been checked.
struct FrameAssembler: ~Copyable {
    /// Header and meta part, contiguous for the checksum; the meta part starts at 32.
    private var head: UnsafeMutableRawBufferPointer
    private var payload: UnsafeMutableRawBufferPointer
    private var headFilled = 0
    private var payloadFilled = 0
    /// Known once `headFilled` ≥ 32.
    private var header: FrameHeader?
    private var nextSequence: UInt64 = 0
    /// All bytes seen, for liveness reports.
    private(set) var receivedBytes: UInt64 = 0

    init() {
        head = .allocate(byteCount: 4096, alignment: 16)
        payload = .init(start: nil, count: 0)
    }

    deinit {
        head.deallocate()
        if payload.baseAddress != nil { payload.deallocate() }
    }

    /// Takes all of `bytes`; calls `body` for each frame that became whole. After an error the stream is unusable.
    mutating func consume(_ bytes: inout ByteBuffer, _ body: (FrameView) throws -> Void) throws {
        receivedBytes &+= UInt64(bytes.readableBytes)
        while true {
            if headFilled < FrameLimits.headerBytes {
                guard take(&bytes, into: head, at: &headFilled, upTo: FrameLimits.headerBytes) else { return }
            }
            let header = try self.header ?? parseHeader()
            self.header = header
            let headEnd = FrameLimits.headerBytes + header.metaBytes
            if headFilled < headEnd {
                guard take(&bytes, into: head, at: &headFilled, upTo: headEnd) else { return }
            }
            if payloadFilled == 0 { try checkHead(header, headEnd) }
            if payloadFilled < header.payloadBytes {
                guard take(&bytes, into: payload, at: &payloadFilled, upTo: header.payloadBytes) else { return }
            }
            nextSequence &+= 1
            headFilled = 0
            payloadFilled = 0
            self.header = nil
            try body(
                FrameView(
                    header: header,
                    meta: UnsafeRawBufferPointer(rebasing: head[FrameLimits.headerBytes..<headEnd]),
                    payload: UnsafeRawBufferPointer(rebasing: payload[..<header.payloadBytes])))
        }
    }

    private mutating func parseHeader() throws(FrameError) -> FrameHeader {
        func get<T: FixedWidthInteger>(_ offset: Int, _: T.Type) -> T {
            T(littleEndian: head.load(fromByteOffset: offset, as: T.self))
        }
        guard get(0, UInt32.self) == FrameHeader.magic else { throw .notOurs(get(0, UInt32.self).byteSwapped) }
        guard get(4, UInt16.self) == FrameHeader.version else { throw .version(get(4, UInt16.self)) }
        guard let type = FrameType(rawValue: get(6, UInt8.self)) else { throw .unknownType(get(6, UInt8.self)) }
        guard get(7, UInt8.self) == 0 else { throw .flags(get(7, UInt8.self)) }
        let meta = Int(get(8, UInt32.self))
        let payloadBytes = Int(get(12, UInt32.self))
        guard meta <= type.metaBytesMax, payloadBytes <= type.payloadBytesMax else {
            throw .tooLong(type, meta: meta, payload: payloadBytes)
        }
        let headEnd = FrameLimits.headerBytes + meta
        if head.count < headEnd {
            let larger = UnsafeMutableRawBufferPointer.allocate(byteCount: headEnd, alignment: 16)
            larger.copyMemory(from: UnsafeRawBufferPointer(rebasing: head[..<FrameLimits.headerBytes]))
            head.deallocate()
            head = larger
        }
        return FrameHeader(
            type: type, metaBytes: meta, payloadBytes: payloadBytes, sequence: get(16, UInt64.self))
    }

    /// The head is whole: only a head that verifies may ask for payload memory.
    private mutating func checkHead(_ header: FrameHeader, _ headEnd: Int) throws(FrameError) {
        let sum = UInt64(littleEndian: head.load(fromByteOffset: 24, as: UInt64.self))
        guard FrameHeader.checksum(of: UnsafeRawBufferPointer(rebasing: head[..<headEnd])) == sum else {
            throw .checksum(header.type)
        }
        guard header.sequence == nextSequence else { throw .sequence(expected: nextSequence, got: header.sequence) }
        if payload.count < header.payloadBytes {
            if payload.baseAddress != nil { payload.deallocate() }
            payload = .allocate(byteCount: header.payloadBytes, alignment: 4096)
        }
    }
}

/// Moves bytes to `target` until it is filled up to `end`; true when it is.
private func take(
    _ bytes: inout ByteBuffer, into target: UnsafeMutableRawBufferPointer, at filled: inout Int, upTo end: Int
) -> Bool {
    let count = min(end - filled, bytes.readableBytes)
    if count > 0 {
        bytes.readWithUnsafeReadableBytes { source in
            (target.baseAddress! + filled).copyMemory(from: source.baseAddress!, byteCount: count)
            return count
        }
        filled += count
    }
    return filled == end
}

/// A framed log read without changing it, for tools that look at damaged stores: what is valid, and what lies between.
struct LogScan {
    enum Part {
        case frame(FramedLog.Frame)
        /// A synced marker at this offset.
        case marker(UInt64)
        /// Bytes that are no frame although something durable follows.
        case damage(Range<UInt64>, String)
        /// What a crash left unfinished at the end; opening the store cuts it off.
        case torn(Range<UInt64>)
    }

    /// In the order of the file.
    private(set) var parts: [Part] = []
    let sizeBytes: UInt64

    /// The frames up to the first damage: what opening the store would take, were the rest not there.
    var soundFrames: [FramedLog.Frame] {
        var frames: [FramedLog.Frame] = []
        for part in parts {
            switch part {
            case .frame(let frame): frames.append(frame)
            case .marker: break
            case .damage, .torn: return frames
            }
        }
        return frames
    }

    var damages: [(offsetBytes: UInt64, what: String)] {
        parts.compactMap { if case .damage(let range, let what) = $0 { (range.lowerBound, what) } else { nil } }
    }

    /// `bytes` is the whole file; its header has been looked at by the caller.
    init(_ bytes: UnsafeMutableRawBufferPointer) {
        sizeBytes = UInt64(bytes.count)
        var offset = FramedLog.headerBytes
        var sequence: UInt64? = 1
        while offset < bytes.count {
            if let end = FramedLog.validFrame(bytes, at: offset, sequence: sequence) {
                add(bytes, at: offset)
                sequence = bytes.loadUnaligned(fromByteOffset: offset + 24, as: UInt64.self) &+ 1
                offset = end
                continue
            }
            // The next frame that is valid by itself, wherever the count is; a marker among them tells damage from a torn end.
            var next = offset
            var resumed: Int?
            var isDamage = false
            while next + FramedLog.frameHeaderBytes <= bytes.count {
                guard let end = FramedLog.validFrame(bytes, at: next, sequence: nil) else {
                    next += 8
                    continue
                }
                if resumed == nil { resumed = next }
                if bytes.loadUnaligned(fromByteOffset: next + 4, as: UInt32.self) == FramedLog.syncedType {
                    isDamage = true
                    break
                }
                next = end
            }
            guard isDamage, let resumed else {
                parts.append(.torn(UInt64(offset)..<UInt64(bytes.count)))
                return
            }
            let what = resumed == offset ? "the count of records jumps here: some are missing" : "\(resumed - offset) bytes are no record that matches its checksum, but later ones were synced"
            parts.append(.damage(UInt64(offset)..<UInt64(resumed), what))
            offset = resumed
            sequence = nil
        }
    }

    private mutating func add(_ bytes: UnsafeMutableRawBufferPointer, at offset: Int) {
        let type = bytes.loadUnaligned(fromByteOffset: offset + 4, as: UInt32.self)
        let length = Int(bytes.loadUnaligned(fromByteOffset: offset + 8, as: UInt32.self))
        if type == FramedLog.syncedType {
            var index = parts.count - 1
            loop: while index >= 0 {
                if case .frame(var frame) = parts[index] {
                    if frame.isSynced { break loop }
                    frame.isSynced = true
                    parts[index] = .frame(frame)
                }
                index -= 1
            }
            parts.append(.marker(UInt64(offset)))
        } else {
            let start = offset + FramedLog.frameHeaderBytes
            parts.append(.frame(FramedLog.Frame(
                type: type, offsetBytes: UInt64(offset), sequence: bytes.loadUnaligned(fromByteOffset: offset + 24, as: UInt64.self), isSynced: false,
                payload: [UInt8](bytes[start..<start + length]))))
        }
    }
}

/// The handshake of one connection: bytes in, bytes out, no I/O (NBD specification, "Handshake phase").
///
/// greeted → (client flags) → options* → transmission | closed
struct NBDNegotiation {
    enum Outcome: Equatable {
        /// Needs more bytes.
        case goesOn
        /// The client has chosen an export; requests follow.
        case transmission(exportIndex: Int)
        /// Send what there is, then close. The reason is for the log; nil when the client just left.
        case closes(reason: String?)
    }

    /// Longest option data accepted: a 4,096-byte name with its frame, generously.
    static let optionBytesMax = 16384

    private let exports: [NBDExport]
    private var hasClientFlags = false
    private var omitsZeroes = false

    init(exports: [NBDExport]) { self.exports = exports }

    /// What the server says first.
    var greeting: [UInt8] {
        var bytes: [UInt8] = []
        bytes.append(bigEndian: NBD.initMagic)
        bytes.append(bigEndian: NBD.optionMagic)
        bytes.append(bigEndian: NBD.flagFixedNewstyle | NBD.flagNoZeroes)
        return bytes
    }

    /// Takes one message off the front of `input`: returns how many bytes it had (0 when it is not whole yet).
    mutating func consume(_ input: UnsafeRawBufferPointer, output: inout [UInt8]) -> (bytes: Int, outcome: Outcome) {
        var reader = WireReader(input)
        guard hasClientFlags else {
            guard let flags: UInt32 = reader.next() else { return (0, .goesOn) }
            let known = UInt32(NBD.flagFixedNewstyle | NBD.flagNoZeroes)
            guard flags & ~known == 0 else {
                return (4, .closes(reason: "unknown handshake flags 0x\(String(flags, radix: 16))"))
            }
            hasClientFlags = true
            omitsZeroes = flags & UInt32(NBD.flagNoZeroes) != 0
            return (4, .goesOn)
        }
        guard let magic: UInt64 = reader.next() else { return (0, .goesOn) }
        guard magic == NBD.optionMagic else { return (8, .closes(reason: "not an NBD option (wrong magic number)")) }
        guard let number: UInt32 = reader.next(), let length: UInt32 = reader.next() else { return (0, .goesOn) }
        guard length <= Self.optionBytesMax else {
            return (16, .closes(reason: "option \(number) with \(length) bytes of data, more than \(Self.optionBytesMax)"))
        }
        guard let data = reader.bytes(Int(length)) else { return (0, .goesOn) }
        return (16 + Int(length), answer(option: number, data: data, output: &output))
    }

    private func answer(option number: UInt32, data: UnsafeRawBufferPointer, output: inout [UInt8]) -> Outcome {
        switch NBD.Option(rawValue: number) {
        case .exportName:
            return answerExportName(data, output: &output)
        case .abort:
            reply(.ack, to: number, output: &output)
            return .closes(reason: nil)
        case .list:
            guard data.isEmpty else { return refuse(.errorInvalid, number, "LIST has no data", &output) }
            for export in exports {
                var body: [UInt8] = []
                body.append(bigEndian: UInt32(export.name.utf8.count))
                body.append(contentsOf: export.name.utf8)
                reply(.server, to: number, body, output: &output)
            }
            reply(.ack, to: number, output: &output)
            return .goesOn
        case .info, .go:
            return answerGo(number, data, output: &output)
        case .startTLS:
            return refuse(.errorUnsupported, number, "this server does not support TLS; use its unix socket", &output)
        case .structuredReply:
            return refuse(.errorUnsupported, number, "structured replies are not supported", &output)
        case nil:
            return refuse(.errorUnsupported, number, "option \(number) is not supported", &output)
        }
    }

    /// The one option that has no way to refuse but to close.
    private func answerExportName(_ data: UnsafeRawBufferPointer, output: inout [UInt8]) -> Outcome {
        guard let index = exportIndex(named: data) else {
            return .closes(reason: "there is no export named '\(String(decoding: data.prefix(256), as: UTF8.self))'")
        }
        output.append(bigEndian: exports[index].geometry.sizeBytes)
        output.append(bigEndian: exports[index].transmissionFlags.rawValue)
        if !omitsZeroes { output.append(contentsOf: repeatElement(0, count: 124)) }
        return .transmission(exportIndex: index)
    }

    private func answerGo(_ number: UInt32, _ data: UnsafeRawBufferPointer, output: inout [UInt8]) -> Outcome {
        var reader = WireReader(data)
        guard let nameLength: UInt32 = reader.next(), let name = reader.bytes(Int(nameLength)),
            let infoCount: UInt16 = reader.next(), reader.remaining == 2 * Int(infoCount)
        else { return refuse(.errorInvalid, number, "malformed request for an export", &output) }
        guard let index = exportIndex(named: name) else {
            return refuse(.errorUnknown, number, "there is no export of that name", &output)
        }
        let export = exports[index]
        var wantsName = false
        while let info: UInt16 = reader.next() { if info == NBD.Info.name.rawValue { wantsName = true } }

        var body: [UInt8] = []
        body.append(bigEndian: NBD.Info.export.rawValue)
        body.append(bigEndian: export.geometry.sizeBytes)
        body.append(bigEndian: export.transmissionFlags.rawValue)
        reply(.info, to: number, body, output: &output)
        let sizes = export.blockSizes
        body.removeAll()
        body.append(bigEndian: NBD.Info.blockSize.rawValue)
        for size in [sizes.minimum, sizes.preferred, sizes.maximum] { body.append(bigEndian: size) }
        reply(.info, to: number, body, output: &output)
        if wantsName {
            body.removeAll()
            body.append(bigEndian: NBD.Info.name.rawValue)
            body.append(contentsOf: export.name.utf8)
            reply(.info, to: number, body, output: &output)
        }
        reply(.ack, to: number, output: &output)
        return number == NBD.Option.go.rawValue ? .transmission(exportIndex: index) : .goesOn
    }

    /// The empty name means the first export.
    private func exportIndex(named name: UnsafeRawBufferPointer) -> Int? {
        if name.isEmpty { return exports.firstIndex { $0.name.isEmpty } ?? 0 }
        return exports.firstIndex { $0.name.utf8.elementsEqual(name) }
    }

    private func refuse(
        _ error: NBD.OptionReply, _ option: UInt32, _ text: String, _ output: inout [UInt8]
    ) -> Outcome {
        reply(error, to: option, Array(text.utf8), output: &output)
        return .goesOn
    }

    private func reply(_ type: NBD.OptionReply, to option: UInt32, _ body: [UInt8] = [], output: inout [UInt8]) {
        output.append(bigEndian: NBD.optionReplyMagic)
        output.append(bigEndian: option)
        output.append(bigEndian: type.rawValue)
        output.append(bigEndian: UInt32(body.count))
        output.append(contentsOf: body)
    }
}

/// Big-endian values off the front of a buffer; nil once it is too short.
struct WireReader {
    private var rest: UnsafeRawBufferPointer
    init(_ buffer: UnsafeRawBufferPointer) { rest = buffer }
    var remaining: Int { rest.count }

    mutating func next<T: FixedWidthInteger>() -> T? {
        guard let bytes = bytes(MemoryLayout<T>.size) else { return nil }
        return T(bigEndian: bytes.loadUnaligned(as: T.self))
    }

    mutating func bytes(_ count: Int) -> UnsafeRawBufferPointer? {
        guard count <= rest.count else { return nil }
        defer { rest = UnsafeRawBufferPointer(rebasing: rest[count...]) }
        return UnsafeRawBufferPointer(rebasing: rest[..<count])
    }
}

extension [UInt8] {
    mutating func append<T: FixedWidthInteger>(bigEndian value: T) {
        Swift.withUnsafeBytes(of: value.bigEndian) { append(contentsOf: $0) }
    }
}

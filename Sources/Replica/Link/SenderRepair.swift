import BlockTap
import NIOCore

// Blocks that the replica lost and this source may still have: read, and sent when their checksum is the one asked for. Whatever is
// being written there meanwhile does not match, so nothing has to stand still.

extension SenderLoop {
    /// One question at a time, at a bounded rate; the answer says at least that there is nothing.
    func answer(_ wanted: BlocksWantedMeta, _ handler: FrameHandler) throws(FrameError) {
        guard !isAnswering else { throw .unexpected(.blocksWanted, "the question before it has not been answered") }
        guard source.disks.indices.contains(wanted.volume) else { throw .malformed(.blocksWanted, "there is no disk number \(wanted.volume)") }
        isAnswering = true
        let begin = max(nextAnswer, .now())
        nextAnswer = begin + .nanoseconds(Int64(Double(wanted.blocks.count * blockBytes) * 1e9 / Double(max(1, timing.repairBytesPerSecond))))
        let bound = NIOLoopBound(handler, eventLoop: eventLoop)
        eventLoop.scheduleTask(deadline: begin) { [self] in
            guard isStreaming(bound.value) else { return }
            let source = source
            Task { [self] in
                let size = source.disks[wanted.volume].geometry.sizeBytes
                var found: [(place: Int, bytes: [UInt8])] = []
                for (place, block) in wanted.blocks.enumerated() {
                    let offset = block.block * UInt64(blockBytes)
                    guard offset < size, UInt64(block.byteCount) <= size - offset,
                        let bytes = await source.read(disk: wanted.volume, offsetBytes: offset, lengthBytes: block.byteCount), bytes.count == block.byteCount
                    else { continue }
                    let sum = bytes.withUnsafeBytes { BlockChecksum.of($0.baseAddress!, count: $0.count, blockIndex: block.block) }
                    if sum == block.checksum { found.append((place, bytes)) }
                }
                eventLoop.execute { [found, self] in send(found, wanted, bound.value) }
            }
        }
    }

    private func isStreaming(_ handler: FrameHandler) -> Bool {
        if case .streaming(let current) = link { current === handler } else { false }
    }

    private func send(_ found: [(place: Int, bytes: [UInt8])], _ wanted: BlocksWantedMeta, _ handler: FrameHandler) {
        guard isStreaming(handler) else { return }
        isAnswering = false
        var payload = ByteBuffer()
        for block in found {
            payload.writeBytes(block.bytes)
            payload.writeRepeatingByte(0, count: blockBytes - block.bytes.count)
        }
        if !found.isEmpty { logger.notice("the replica lost \(wanted.blocks.count) blocks of disk \(source.disks[wanted.volume].name) and gets \(found.count) of them again") }
        throttle.spend(payload.readableBytes)
        handler.send(.blocks, payload: found.isEmpty ? nil : payload, { BlocksMeta(question: wanted.question, places: found.map(\.place)).write(&$0) }, digest: { _ in })
    }
}

import BlockTap
import Glibc

/// A process that has a live tap and does what it is told on its standard input, one byte each: `s` begin a full sync, `c` cut and hand out the
/// epoch, `a` it is acknowledged, `z` freeze the file systems mounted where FREEZE says (a:b, in this order), for two seconds at most, and hang. What it hands out goes to standard output. For tests that kill it at any moment.
///
/// Frames: kind (u8), 3 bytes 0, disk (u32), offset or number (u64), length (u64), then `length` bytes for `h`ello (the instance) and `d`ata.
/// `h`: the number is 1 when the tap of an earlier process was taken over. `c`: the number is the epoch, the disk 1 when it is exact, the length 1
/// when a full sync has more. `z`: zeroes. `e`: the end of an epoch; the offset is how many completions the kernel has not shown so far.
/// `f`: it is frozen. `x`: an error; the length is that of its words.
@main
struct Holder {
    static func main() async {
        let arguments = CommandLine.arguments
        switch arguments.dropFirst().first {
        case "--measure": return await Measurement.run(Array(arguments.dropFirst(2)))
        case "check": return await Check.main(Array(arguments.dropFirst(2)))
        default: break
        }
        guard arguments.count >= 3 else {
            print("usage: live-tap-holder PIN-DIRECTORY DEVICE... (or --measure, which says its own)\n\(Check.usage)")
            exit(2)
        }
        do {
            let disks = arguments[2...].enumerated().map { (name: "d\($0.offset)", path: $0.element) }
            let group = try await LiveTapGroup(disks: disks, pinDirectory: arguments[1])
            put("h", number: group.wasAdopted ? 1 : 0, length: UInt64(group.instance.utf8.count))
            write(Array(group.instance.utf8))
            let (stream, continuation) = AsyncStream<Void>.makeStream(bufferingPolicy: .bufferingNewest(1))
            var signal = stream.makeAsyncIterator()
            group.setWakeup { continuation.yield() }
            var last = EpochNumber.none
            var command: UInt8 = 0
            while read(0, &command, 1) == 1 {
                switch command {
                case UInt8(ascii: "s"): group.beginFullSync()
                case UInt8(ascii: "a"): group.acknowledge(last)
                case UInt8(ascii: "c"):
                    let cut = try await group.cut(fuzzyBytesMax: 64 << 20)
                    last = cut.epoch
                    put("c", disk: cut.kind == .exact ? 1 : 0, number: cut.epoch.rawValue, length: await group.needsFuzzyCut ? 1 : 0)
                    handOut: while true {
                        guard let item = group.nextItem() else {
                            _ = await signal.next()
                            continue
                        }
                        switch item {
                        case .data(_, let buffer):
                            put("d", disk: UInt32(buffer.disk), number: buffer.offsetBytes, length: UInt64(buffer.lengthBytes))
                            write(UnsafeRawBufferPointer(start: buffer.memory, count: buffer.lengthBytes))
                            group.release(buffer)
                        case .zero(_, let disk, let offset, let length): put("z", disk: UInt32(disk), number: offset, length: UInt64(length))
                        case .end:
                            put("e", number: await group.liveStatistics.unseenCompletionCount)
                            break handOut
                        case .abandoned(_, let reason): throw SystemError(errno: EIO, what: reason.rawValue)
                        }
                    }
                case UInt8(ascii: "z"):
                    _ = try FileSystemFreeze.hold(mountPoints: String(cString: getenv("FREEZE")).split(separator: ":").map(String.init), limitMilliseconds: 2000)
                    put("f")
                    while true { sleep(1) }
                default: break
                }
            }
            group.close()
        } catch {
            let words = Array("\(error)".utf8)
            put("x", length: UInt64(words.count))
            write(words)
            exit(1)
        }
    }

    private static func put(_ kind: Unicode.Scalar, disk: UInt32 = 0, number: UInt64 = 0, length: UInt64 = 0) {
        withUnsafeTemporaryAllocation(byteCount: 24, alignment: 8) { frame in
            frame.storeBytes(of: UInt32(UInt8(ascii: kind)), as: UInt32.self)
            frame.storeBytes(of: disk, toByteOffset: 4, as: UInt32.self)
            frame.storeBytes(of: number, toByteOffset: 8, as: UInt64.self)
            frame.storeBytes(of: length, toByteOffset: 16, as: UInt64.self)
            write(UnsafeRawBufferPointer(frame))
        }
    }

    private static func write(_ bytes: [UInt8]) { bytes.withUnsafeBytes { write($0) } }

    private static func write(_ bytes: UnsafeRawBufferPointer) {
        var done = 0
        while done < bytes.count {
            let count = Glibc.write(1, bytes.baseAddress! + done, bytes.count - done)
            if count < 0 && errno == EINTR { continue }
            guard count > 0 else { exit(0) }                       // nobody listens any more
            done += count
        }
    }
}

import BlockTap
import Glibc

/// `--measure`: cuts at an interval for some seconds, takes what is handed out and throws it away; then one line of figures. For the load of
/// somebody else (fio) on the disk.
enum Measurement {
    static func run(_ arguments: [String]) async {
        guard arguments.count >= 4, let seconds = Double(arguments[0]), let interval = Double(arguments[1]) else {
            print("usage: live-tap-holder --measure SECONDS INTERVAL-MS PIN-DIRECTORY DEVICE [stage=MIB] [depth=N] [depth-max=N] [rounds-ms=N]")
            exit(2)
        }
        var configuration = LiveTapConfiguration()
        for option in arguments[4...] {
            let parts = option.split(separator: "=")
            guard parts.count == 2, let number = Int(parts[1]) else { continue }
            switch parts[0] {
            case "stage": configuration.stagingBytesMax = number << 20
            case "depth": configuration.readDepth = number
            case "depth-max": configuration.readDepthMax = number
            case "rounds-ms": configuration.roundsMilliseconds = number
            default: break
            }
        }
        do {
            let group = try await LiveTapGroup(disks: [(name: "d0", path: arguments[3])], pinDirectory: arguments[2], configuration: configuration) { line in
                print(line)
            }
            let (stream, continuation) = AsyncStream<Void>.makeStream(bufferingPolicy: .bufferingNewest(1))
            var signal = stream.makeAsyncIterator()
            group.setWakeup { continuation.yield() }
            let clock = ContinuousClock()
            let end = clock.now + .seconds(seconds)
            var next = clock.now
            var proofs: [Double] = []
            var unproven = 0
            var blocks: UInt64 = 0
            while clock.now < end {
                if next > clock.now { try await Task.sleep(until: next, clock: clock) }
                next = max(next, clock.now) + .milliseconds(interval)
                let began = clock.now
                let cut = try await group.cut(fuzzyBytesMax: 0)
                blocks += cut.blockCount
                if cut.proof != nil { proofs.append((clock.now - began) / .milliseconds(1)) } else { unproven += 1 }
                handOut: while true {
                    guard let item = group.nextItem() else {
                        _ = await signal.next()
                        continue
                    }
                    switch item {
                    case .data(_, let buffer): group.release(buffer)
                    case .zero: break
                    case .end(let epoch):
                        group.acknowledge(epoch)
                        break handOut
                    case .abandoned(_, let reason): throw SystemError(errno: EIO, what: reason.rawValue)
                    }
                }
            }
            let figures = await group.liveStatistics
            proofs.sort()
            func quantile(_ q: Double) -> Int { proofs.isEmpty ? 0 : Int(proofs[min(proofs.count - 1, Int(q * Double(proofs.count)))]) }
            print(
                "proven \(proofs.count), not \(unproven) (\(figures.unstagedCount) larger than the stage); cut to proof \(quantile(0.5)) ms median, \(quantile(0.99)) ms p99; "
                    + "\(figures.roundCount) rounds, at most \(figures.roundsMax); \(figures.collisionCount) collisions; \((blocks * 4096) >> 20) MiB in epochs, "
                    + "\(figures.readBytes >> 20) MiB read; \(figures.issuedCount) writes; resyncs \(figures.resyncCount)")
            group.close()
            LiveTapGroup.detach(pinDirectory: arguments[2])
        } catch {
            print(error)
            exit(1)
        }
    }
}

import BlockTap
import Dispatch
import Foundation
import Logging
import ServiceLifecycle

/// `afterimage tap serve`: one disk behind its NBD tap, replicating nowhere. For measuring what the tap costs, and for looking at a
/// disk through it.
public struct TapServer: Service {
    public enum Tracking: Sendable {
        /// Straight to the device, no tap at all.
        case none
        /// The tap marks blocks; no cuts.
        case marksOnly
        /// A cut every so many milliseconds; closed epochs are drained, thrown away and acknowledged.
        case cuts(everyMilliseconds: Int)
    }

    let devicePath: String
    let socketPath: String
    let tracking: Tracking
    let logger: Logger

    public init(devicePath: String, socketPath: String, tracking: Tracking, logger: Logger) {
        self.devicePath = devicePath
        self.socketPath = socketPath
        self.tracking = tracking
        self.logger = logger
    }

    public func run() async throws {
        let device = try BlockDevice.open(path: devicePath, access: .readWrite, exclusive: true)
        let loop = try EventLoop(name: "tap")
        defer { loop.shutdown() }
        if case .none = tracking {
            let store = DeviceStore(device: device, loop: loop)
            let server = try NBDServer(loop: loop, exports: [(name: "disk", store: store)], listen: .unix(path: socketPath))
            logger.info("\(devicePath) is served on \(socketPath), without a tap")
            try? await gracefulShutdown()
            await server.stop()
            return
        }
        let group = await TapGroup(loop: loop, disks: [(name: "disk", device: device)], instance: UUID().uuidString)
        let server = try NBDServer(loop: loop, exports: [(name: "disk", store: group.disk(0))], listen: .unix(path: socketPath))
        logger.info("\(devicePath) is served on \(socketPath)")
        if case .cuts(let milliseconds) = tracking {
            let discard = Discard(group)
            try? await cancelWhenGracefulShutdown {
                while true {
                    try await Task.sleep(for: .milliseconds(milliseconds))
                    _ = try? await group.cut(fuzzyBytesMax: 0)
                }
            }
            discard.stop()
            let figures = await group.statistics
            logger.info("\(figures.cutCount) cuts, \(figures.abandonedCount) abandoned, \(figures.preservedPeakBytes >> 10) KiB preserved at most")
        } else {
            try? await gracefulShutdown()
        }
        await server.stop()
    }

    /// Takes what the tap hands out and throws it away.
    private final class Discard: Sendable {
        private let group: TapGroup

        init(_ group: TapGroup) {
            self.group = group
            let queue = DispatchQueue(label: "discard")
            group.setWakeup { queue.async { Self.drain(group) } }
        }

        func stop() { group.setWakeup(nil) }

        private static func drain(_ group: TapGroup) {
            while let item = group.nextItem() {
                switch item {
                case .data(_, let buffer): group.release(buffer)
                case .end(let epoch): group.acknowledge(epoch)
                case .zero, .abandoned: break
                }
            }
        }
    }
}

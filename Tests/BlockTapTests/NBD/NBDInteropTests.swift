import Foundation
import Testing

@testable import BlockTap

/// Other people's clients.
@Suite(.serialized) struct NBDInteropTests {
    @Test(.enabled(if: Program.exists("nbdinfo"), "needs nbdinfo"), arguments: Backing.available)
    func nbdinfoUnderstandsTheExport(_ backing: Backing) async throws {
        try await serve(backing) { served in
            let text = try Program.run(["nbdinfo", served.uri])
            #expect(text.contains("export-size: 4194304"))
            #expect(text.contains("can_multi_conn: true") && text.contains("can_fua: true") && text.contains("block_size_minimum: 512"))
            #expect(try Program.run(["nbdinfo", "--list", served.uri]).contains("export=\"disk\""))
            #expect(throws: Program.Failure.self) { try Program.run(["nbdinfo", "nbd+unix:///nosuch?socket=\(served.socket)"]) }
        }
    }

    @Test(.enabled(if: Program.exists("nbdcopy"), "needs nbdcopy"), arguments: Backing.available)
    func nbdcopyCopiesInAndOut(_ backing: Backing) async throws {
        try await serve(backing, bytes: 64 << 20) { served in
            let source = try image(bytes: 64 << 20), copy = try TemporaryFile(bytes: 0)
            try Program.run(["nbdcopy", "--flush", source.path, served.uri])
            try Program.run(["nbdcopy", served.uri, copy.path])
            try Program.run(["cmp", source.path, copy.path])
        }
    }

    @Test(.enabled(if: Program.exists("qemu-img"), "needs qemu-img"), arguments: Backing.available)
    func qemuImgShowsConvertsAndCompares(_ backing: Backing) async throws {
        try await serve(backing, bytes: 64 << 20) { served in
            let source = try image(bytes: 64 << 20), copy = try TemporaryFile(bytes: 0)
            #expect(try Program.run(["qemu-img", "info", served.uri]).contains("67108864 bytes"))
            try Program.run(["qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source.path, served.uri])
            #expect(try Program.run(["qemu-img", "compare", "-f", "raw", "-F", "raw", source.path, served.uri]).contains("identical"))
            try Program.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", served.uri, copy.path])
            #expect(try Program.run(["qemu-img", "compare", "-f", "raw", "-F", "qcow2", source.path, copy.path]).contains("identical"))
        }
    }

    @Test(.enabled(if: Program.exists("qemu-io"), "needs qemu-io"), arguments: Backing.available)
    func qemuIoReadsWritesZeroesAndDiscards(_ backing: Backing) async throws {
        try await serve(backing, bytes: 64 << 20) { served in
            let commands = [
                "write -P 0x55 0 64k", "read -P 0x55 0 64k", "write -z 4k 8k", "read -P 0 4k 8k", "discard 16k 16k", "read -P 0 16k 16k",
                "write -f -P 3 1M 33M", "read -P 3 1M 33M", "aio_write -P 4 40M 1M", "aio_flush", "flush", "read -P 4 40M 1M",
                "write -z -u 1M 31M", "read -P 0 1M 31M",
            ]
            let text = try Program.run(["qemu-io", "-f", "raw"] + commands.flatMap { ["-c", $0] } + [served.uri])
            #expect(!text.contains("failed"), "\(text)")
        }
    }

    @Test(.enabled(if: Program.exists("nbdcopy"), "needs nbdcopy"))
    func worksOverTCP() async throws {
        let loop = try EventLoop(name: "nbd test")
        defer { loop.shutdown() }
        let server = try NBDServer(
            loop: loop, exports: [("", MemoryStore(bytes: 64 << 20))], listen: .tcp(host: "127.0.0.1", port: 0))
        let uri = "nbd://127.0.0.1:\(server.port ?? 0)"
        let source = try image(bytes: 64 << 20)
        #expect(throws: Never.self) {
            try Program.run(["nbdcopy", source.path, uri])
            let copy = try TemporaryFile(bytes: 0)
            try Program.run(["nbdcopy", uri, copy.path])
            try Program.run(["cmp", source.path, copy.path])
        }
        await server.stop()
    }

    /// Data with holes, different in every block.
    private func image(bytes: Int) throws -> TemporaryFile {
        let file = try TemporaryFile(bytes: bytes)
        var random = SplitMix(seed: 3)
        for offset in stride(from: 0, to: bytes, by: 1 << 20) where random.next() % 4 != 0 {
            let chunk = (0..<(1 << 17)).map { _ in random.next() }
            _ = chunk.withUnsafeBytes { pwrite(file.fd, $0.baseAddress, $0.count, offset) }
        }
        return file
    }
}

import Glibc
import Synchronization

@testable import Replica

/// A store's files as a value in memory: copied in no time, so that thousands of damaged copies can be tried.
final class MemoryStorage: Storage, @unchecked Sendable {
    /// An open file stays what it is when its name changes.
    private final class Node: Sendable {
        let bytes: Mutex<[UInt8]>
        init(_ bytes: [UInt8] = []) { self.bytes = Mutex(bytes) }
    }

    private let nodes: Mutex<[String: Node]>
    let location = "memory"

    init(_ files: [String: [UInt8]] = [:]) { nodes = Mutex(files.mapValues { Node($0) }) }

    /// As they are now.
    var files: [String: [UInt8]] { nodes.withLock { $0.mapValues { node in node.bytes.withLock { $0 } } } }

    func flip(_ path: String, byte: Int, bit: UInt8 = 0) { nodes.withLock { $0[path]! }.bytes.withLock { $0[byte] ^= 1 << bit } }

    func lock() throws(StoreError) {}
    func unlock() {}
    func createDirectory(_ path: String) throws(StoreError) {}
    func open(_ path: String, _ mode: StorageOpenMode, direct: Bool) throws(StoreError) -> any StorageFile {
        let node = nodes.withLock { nodes in
            if mode == .create {
                if let node = nodes[path] { node.bytes.withLock { $0 = [] } } else { nodes[path] = Node() }
            }
            return nodes[path]
        }
        guard let node else { throw .io(errno: ENOENT, what: "cannot open \(path)") }
        return File(node: node, path: path)
    }
    func exists(_ path: String) throws(StoreError) -> Bool { nodes.withLock { $0[path] != nil } }
    func remove(_ path: String) throws(StoreError) { nodes.withLock { $0[path] = nil } }
    func rename(_ from: String, to: String) throws(StoreError) {
        nodes.withLock { files in
            files[to] = files[from]
            files[from] = nil
        }
    }
    func list(_ directory: String) throws(StoreError) -> [String] {
        nodes.withLock { $0.keys.filter { $0.hasPrefix(directory + "/") }.map { String($0.dropFirst(directory.count + 1)) }.sorted() }
    }
    func syncDirectory(_ path: String) throws(StoreError) {}
    func space() -> (freeBytes: UInt64, capacityBytes: UInt64) { (1 << 30, 1 << 30) }

    private final class File: StorageFile, @unchecked Sendable {
        private let node: Node
        let path: String
        let descriptor: Int32 = -1
        init(node: Node, path: String) {
            self.node = node
            self.path = path
        }
        func size() throws(StoreError) -> UInt64 { node.bytes.withLock { UInt64($0.count) } }
        func read(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(StoreError) -> Int {
            nonisolated(unsafe) let buffer = buffer
            return node.bytes.withLock { bytes in
                guard offset < UInt64(bytes.count) else { return 0 }
                let count = min(buffer.count, bytes.count - Int(offset))
                bytes.withUnsafeBytes { memcpyBytes(buffer.baseAddress!, $0.baseAddress! + Int(offset), count) }
                return count
            }
        }
        func write(_ buffer: UnsafeRawBufferPointer, at offset: UInt64) throws(StoreError) {
            nonisolated(unsafe) let buffer = buffer
            node.bytes.withLock { bytes in
                let end = Int(offset) + buffer.count
                if bytes.count < end { bytes += [UInt8](repeating: 0, count: end - bytes.count) }
                bytes.withUnsafeMutableBytes { memcpyBytes($0.baseAddress! + Int(offset), buffer.baseAddress!, buffer.count) }
            }
        }
        func dataSync() throws(StoreError) {}
        func truncate(to size: UInt64) throws(StoreError) {
            node.bytes.withLock { bytes in
                if bytes.count > Int(size) { bytes.removeLast(bytes.count - Int(size)) } else { bytes += [UInt8](repeating: 0, count: Int(size) - bytes.count) }
            }
        }
        func preallocate(offsetBytes: UInt64, lengthBytes: UInt64) -> Bool { false }
        func punch(offsetBytes: UInt64, lengthBytes: UInt64) throws(StoreError) -> Bool {
            node.bytes.withLock { bytes in
                for index in Int(offsetBytes)..<min(bytes.count, Int(offsetBytes + lengthBytes)) { bytes[index] = 0 }
            }
            return true
        }
        func allocatedBytes() throws(StoreError) -> UInt64 { try size() }
    }
}

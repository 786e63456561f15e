import Foundation
import Glibc
import Synchronization

@testable import Replica

/// What each thread is doing, in a file that is mapped: who was killed in the middle of what can be read in it afterwards.
final class Stages: @unchecked Sendable {
    static let slotBytes = 64
    static let slotCount = 16
    private let memory: UnsafeMutableRawPointer
    private let next = Atomic(0)

    init(_ path: String) throws {
        let descriptor = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0o600)
        let byteCount = Self.slotBytes * Self.slotCount
        guard descriptor >= 0, ftruncate(descriptor, off_t(byteCount)) == 0 else { throw WrongData(description: "cannot make \(path)") }
        defer { close(descriptor) }
        memory = mmap(nil, byteCount, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0)
        guard memory != MAP_FAILED else { throw WrongData(description: "cannot map \(path)") }
    }

    /// For one thread at a time.
    func slot() -> Slot {
        let number = next.add(1, ordering: .relaxed).oldValue
        precondition(number < Self.slotCount)
        return Slot(memory + number * Self.slotBytes)
    }

    final class Slot: @unchecked Sendable {
        private let memory: UnsafeMutableRawPointer
        init(_ memory: UnsafeMutableRawPointer) { self.memory = memory }
        func set(_ name: String) {
            memory.storeBytes(of: 0, as: UInt8.self)
            let bytes = Array(name.utf8.prefix(Stages.slotBytes - 2)) + [0]
            if bytes.count > 1 { bytes[1...].withUnsafeBytes { memcpy(memory + 1, $0.baseAddress!, $0.count) } }
            memory.storeBytes(of: bytes[0], as: UInt8.self)
        }
    }

    /// What was under way.
    static func read(_ path: String) -> [String] {
        guard let data = FileManager.default.contents(atPath: path) else { return [] }
        let bytes = [UInt8](data)
        return stride(from: 0, to: bytes.count, by: slotBytes).compactMap { start in
            let name = bytes[start..<start + slotBytes].prefix { $0 != 0 }
            return name.isEmpty ? nil : String(decoding: name, as: UTF8.self)
        }
    }
}

/// Says what upkeep does, by the files that it touches. Opened by upkeep only; all else goes to the real one.
final class StagedStorage: Storage {
    private let real: any Storage
    private let slot: Stages.Slot
    private let isMoving = Atomic(false)

    init(_ real: any Storage, _ slot: Stages.Slot) {
        self.real = real
        self.slot = slot
    }

    func begin() {
        isMoving.store(false, ordering: .relaxed)
        slot.set("upkeep: looking")
    }

    var location: String { real.location }
    func lock() throws(StoreError) { try real.lock() }
    func unlock() { real.unlock() }
    func createDirectory(_ path: String) throws(StoreError) { try real.createDirectory(path) }
    func open(_ path: String, _ mode: StorageOpenMode, direct: Bool) throws(StoreError) -> any StorageFile {
        if mode == .create, path.hasPrefix("segments/") {
            isMoving.store(true, ordering: .relaxed)
            slot.set("upkeep: evacuating")
        } else if mode == .create, path.hasPrefix("layers/"), !isMoving.load(ordering: .relaxed) {
            slot.set("upkeep: merging")
        } else if mode == .readWrite {
            slot.set("upkeep: punching")
        }
        return try real.open(path, mode, direct: direct)
    }
    func exists(_ path: String) throws(StoreError) -> Bool { try real.exists(path) }
    func remove(_ path: String) throws(StoreError) { try real.remove(path) }
    func rename(_ from: String, to: String) throws(StoreError) { try real.rename(from, to: to) }
    func list(_ directory: String) throws(StoreError) -> [String] { try real.list(directory) }
    func syncDirectory(_ path: String) throws(StoreError) { try real.syncDirectory(path) }
    func space() -> (freeBytes: UInt64, capacityBytes: UInt64) { real.space() }
}

import Foundation

/// Whether this host has the memory that another machine is to get.
struct HostMemory: Sendable, Hashable {
    /// /proc/meminfo: what can be had without swapping (MemAvailable), and all there is.
    var availableMiB: Int
    var totalMiB: Int

    /// Kept free for the appliance and everything else.
    var reserveMiB: Int { max(256, totalMiB / 20) }

    init(availableMiB: Int, totalMiB: Int) {
        self.availableMiB = availableMiB
        self.totalMiB = totalMiB
    }

    static func now() -> HostMemory? {
        guard let data = FileManager.default.contents(atPath: "/proc/meminfo") else { return nil }
        return HostMemory(parsing: String(decoding: data, as: UTF8.self))
    }

    init?(parsing text: String) {
        func mebibytes(_ name: String) -> Int? {
            text.split(separator: "\n").first { $0.hasPrefix(name + ":") }?.split(separator: " ").dropFirst().first.flatMap { Int($0) }.map { $0 / 1024 }
        }
        guard let available = mebibytes("MemAvailable"), let total = mebibytes("MemTotal") else { return nil }
        self.init(availableMiB: available, totalMiB: total)
    }

    /// `promisedMiB`: what running machines may still ask for, since a machine takes its memory only when it uses it.
    func check(wantedMiB: Int, promisedMiB: Int) throws(ApplianceError) {
        let free = availableMiB - promisedMiB - reserveMiB
        guard wantedMiB > free else { return }
        throw .refused(
            "The machine is to have \(wantedMiB) MiB, and this host has \(max(0, free)) MiB for it: \(availableMiB) MiB are available of \(totalMiB), "
                + (promisedMiB > 0 ? "\(promisedMiB) are promised to running machines, " : "")
                + "\(reserveMiB) are kept for the host. Give it less (--memory), end other machines, or start it all the same (--allow-overcommit).")
    }

    /// Of a process, in memory now.
    static func residentMiB(_ pid: Int32) -> Int {
        // proc(5), statm: the second field, in pages.
        guard let data = FileManager.default.contents(atPath: "/proc/\(pid)/statm"),
            let pages = String(decoding: data, as: UTF8.self).split(separator: " ").dropFirst().first.flatMap({ Int($0) })
        else { return 0 }
        return pages * sysconf(Int32(_SC_PAGESIZE)) / (1 << 20)
    }
}

import Foundation
import Glibc

/// One QEMU that belongs to a recovery instance. It lives in a session of its own, so it survives the appliance; the appliance
/// finds it again by the machine's name on its command line, and knows it from a later process with the same pid by its start time.
public struct QEMUProcess: Sendable, Hashable {
    public let pid: pid_t
    /// Clock ticks after boot at which the process started (/proc/PID/stat, field 22).
    public let startTicks: UInt64

    /// Starts `executable`; both output streams are appended to `logPath`. Nothing of the appliance's is inherited: an inherited
    /// lock would keep the next appliance out.
    /// `environment` is added to what the appliance has.
    public static func spawn(executable: String, arguments: [String], logPath: String, environment: [String: String] = [:]) throws(ApplianceError) -> QEMUProcess {
        var actions = posix_spawn_file_actions_t()
        posix_spawn_file_actions_init(&actions)
        defer { posix_spawn_file_actions_destroy(&actions) }
        posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0)
        posix_spawn_file_actions_addopen(&actions, 1, logPath, O_WRONLY | O_CREAT | O_APPEND, 0o600)
        posix_spawn_file_actions_adddup2(&actions, 1, 2)
        guard closeFrom(&actions, 3) == 0 else { throw .failed("cannot start \(executable): the C library has no posix_spawn_file_actions_addclosefrom_np (glibc 2.34 is needed)") }

        var attributes = posix_spawnattr_t()
        posix_spawnattr_init(&attributes)
        defer { posix_spawnattr_destroy(&attributes) }
        var none = sigset_t()
        var all = sigset_t()
        sigemptyset(&none)
        sigfillset(&all)
        posix_spawnattr_setsigmask(&attributes, &none)
        posix_spawnattr_setsigdefault(&attributes, &all)
        let setSession: Int16 = 0x80  // POSIX_SPAWN_SETSID (glibc: spawn.h)
        posix_spawnattr_setflags(&attributes, setSession | Int16(POSIX_SPAWN_SETSIGMASK) | Int16(POSIX_SPAWN_SETSIGDEF))

        var argv: [UnsafeMutablePointer<CChar>?] = ([executable] + arguments).map { strdup($0) } + [nil]
        var envp: [UnsafeMutablePointer<CChar>?] = ProcessInfo.processInfo.environment.merging(environment) { $1 }.map { strdup("\($0.key)=\($0.value)") } + [nil]
        defer {
            for p in argv { free(p) }
            for p in envp { free(p) }
        }
        var pid: pid_t = 0
        let error = posix_spawn(&pid, executable, &actions, &attributes, &argv, &envp)
        guard error == 0 else {
            throw .failed("cannot start \(executable): \(String(cString: strerror(error))) (set the path with afterimage appliance --qemu)")
        }
        return QEMUProcess(pid: pid, startTicks: startTicks(of: pid) ?? 0)
    }

    /// glibc's headers show this function only to those who ask for GNU extensions, which Swift's Glibc module does not.
    private static func closeFrom(_ actions: UnsafeMutablePointer<posix_spawn_file_actions_t>, _ lowest: Int32) -> Int32 {
        typealias Function = @convention(c) (UnsafeMutablePointer<posix_spawn_file_actions_t>, Int32) -> Int32
        guard let symbol = dlsym(nil, "posix_spawn_file_actions_addclosefrom_np") else { return ENOSYS }
        return unsafeBitCast(symbol, to: Function.self)(actions, lowest)
    }

    /// The live process that was started with `-name NAME`, whoever started it.
    public static func find(name: String) -> QEMUProcess? {
        find { words in
            guard let i = words.firstIndex(of: "-name"), i + 1 < words.count else { return false }
            return words[i + 1] == name
        }
    }

    /// A live process of another program that was started as ours are, with `argument` on its command line.
    static func find(naming program: String, _ argument: String) -> QEMUProcess? {
        find { words in words.first.map { ($0 as NSString).lastPathComponent } == program && words.contains(argument) }
    }

    private static func find(_ matches: ([String]) -> Bool) -> QEMUProcess? {
        let entries = (try? FileManager.default.contentsOfDirectory(atPath: "/proc")) ?? []
        for entry in entries {
            guard let pid = pid_t(entry), let data = FileManager.default.contents(atPath: "/proc/\(pid)/cmdline") else { continue }
            let words = data.split(separator: 0).map { String(decoding: $0, as: UTF8.self) }
            guard matches(words), let ticks = startTicks(of: pid) else { continue }
            let process = QEMUProcess(pid: pid, startTicks: ticks)
            if process.isAlive { return process }
        }
        return nil
    }

    /// Whether this very process still runs. Collects it when it was our child and has ended.
    public var isAlive: Bool {
        var status: Int32 = 0
        if waitpid(pid, &status, WNOHANG) == pid { return false }
        guard let (state, ticks) = Self.stat(of: pid) else { return false }
        return ticks == startTicks && state != "Z"
    }

    /// SIGTERM, and SIGKILL when it does not end within `graceSeconds`. Returns when the process is gone.
    public func terminate(graceSeconds: Double = 5) async {
        guard isAlive else { return }
        kill(pid, SIGTERM)
        if await waitForEnd(seconds: graceSeconds) { return }
        if isAlive { kill(pid, SIGKILL) }
        _ = await waitForEnd(seconds: 10)
    }

    /// Whether the process ended within `seconds`.
    public func waitForEnd(seconds: Double) async -> Bool {
        let deadline = ContinuousClock.now + .seconds(seconds)
        while isAlive {
            if ContinuousClock.now >= deadline { return false }
            // A child that was re-parented sends us no signal: its end can only be asked for.
            await Self.pause(milliseconds: 20)
        }
        return true
    }

    /// Also pauses when the task is cancelled: taking a machine down must not spin.
    private static func pause(milliseconds: Int) async {
        await withUnsafeContinuation { (done: UnsafeContinuation<Void, Never>) in
            DispatchQueue.global().asyncAfter(deadline: .now() + .milliseconds(milliseconds)) { done.resume() }
        }
    }

    private static func startTicks(of pid: pid_t) -> UInt64? { stat(of: pid)?.ticks }

    /// proc(5): the fields after the command name in parentheses, which may itself hold anything.
    private static func stat(of pid: pid_t) -> (state: Substring, ticks: UInt64)? {
        guard let data = FileManager.default.contents(atPath: "/proc/\(pid)/stat") else { return nil }
        let text = String(decoding: data, as: UTF8.self)
        guard let close = text.lastIndex(of: ")") else { return nil }
        let fields = text[text.index(after: close)...].split(separator: " ")
        guard fields.count > 19, let ticks = UInt64(fields[19]) else { return nil }
        return (fields[0], ticks)
    }
}

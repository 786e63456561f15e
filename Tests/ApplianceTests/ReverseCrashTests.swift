import Foundation
import GRDB
import Replica
import Testing

@testable import Appliance

/// The way back, killed after each step of each of its operations, and the agent with the original disks in each step of it: an operation is done or taken
/// back, never do both places have the machine, and in the end the disk is, byte by byte, what ran here.
@Suite("Killed at every step of the way back", .serialized, .enabled(if: Program.canBoot, Program.missing))
struct ReverseCrashTests {
    @Test("of a Reversed Register, of Initiate Reverse Replication, of its end")
    func reverse() async throws {
        let sites = try TwoSites()
        try await sites.failOver()
        try await sites.register()
        let machine = try #require(try await sites.view().instances.first)
        for number in FaultPoint.passed(by: .startReverse).indices {
            // Both sides differ from what they were in the round before, and it is the same agent.
            let original = try sites.changeDisk(number)
            try await sites.writeToMachine(number)
            let task = try await sites.crash(.startReverse, number) { try await sites.cli("reverse start shop --original-machine --confirm \(sites.disk)") }
            #expect(task.status == .succeeded, "\(task)")
            try await sites.expectFollowed()
            let view = try await sites.view()
            #expect(view.instances.map(\.pid) == [machine.pid])
            let kept = try #require(view.reverse?.originalPoint)
            #expect(try await sites.image(of: kept) == original, "what the disk held, killed at \(FaultPoint.passed(by: .startReverse)[number].rawValue)")
            let points = try await sites.json([TwoSites.Point].self, "recovery-point list shop")
            #expect(points.first { $0.id == kept.rawValue }?.hold?.hasPrefix("original-") == true)
            #expect(number > 0 || points.contains { $0.note == "as the failover was committed" })

            try await sites.crashRequest(.stopReverse, number) { try await sites.cli("reverse stop shop") }
            #expect(try await sites.view().state == .reversedInitialized)
            try await sites.expectOnly(try await sites.view().instances)
            #expect(try await sites.cli("reverse stop shop").code == 0)
            #expect(try await sites.view().state == .failoverCommitted)
            // Whoever asked has no token; the agent with the old one is let in, or it is asked for again.
            try await sites.crashRequest(.reversedRegister, number) { try await sites.cli("reverse register shop") }
            try await until("Reversed Initialized") { try await sites.view().state == .reversedInitialized }
            #expect(try await sites.cli("reverse register shop").code == 0)
        }
    }

    @Test("of a failback, of its cancelling, of Registration")
    func failback() async throws {
        let sites = try TwoSites()
        try await sites.failOver()
        try await sites.register()
        let points = FaultPoint.passed(by: .failback)
        for number in points.indices {
            try await sites.follow()
            if number < FaultPoint.passed(by: .cancelFailback).count { try await cancel(sites, number) }

            let before = try await sites.view()
            let machine = try #require(before.instances.first)
            var expected = Data()
            let hasStopped = points[...number].contains(.machineStopped)
            let task = try await sites.crash(.failback, points[number], always: { !hasStopped || sites.machineProcess(machine) == nil }) {
                try await until("the disk follows") { try await sites.follows() }
                // Just before: the last cut has to bring it.
                expected = try await sites.writeToMachine(100 + number)
                return try await sites.cli("failback start shop --forced --yes shop")
            }
            #expect(task.status == .succeeded, "\(task)")
            #expect(try sites.diskBytes() == expected, "the disk, killed at \(points[number].rawValue)")
            let view = try await sites.view()
            // Committed, and killed before that was stored: committed once more, and never after it.
            let again = [.forkCommitted, .positionGiven].contains(points[number]) ? 1 : 0 as UInt64
            #expect(view.state == .failedBack && view.reason == nil && view.generation == (before.generation ?? 0) + 1 + again, "\(points[number].rawValue): \(view)")
            try await sites.expectOnly([])
            let point = try #require(task.result?.recoveryPoint)
            #expect(try await sites.image(of: point) == expected)
            #expect(try await sites.json([TwoSites.Point].self, "recovery-point list shop").first { $0.id == point.rawValue }?.note == "as it was failed back")
            try await until("the agent says it") { sites.rescue?.log.components(separatedBy: "the disks hold everything").count == number + 2 }

            if points[number] == points.last { break }
            // Lost again before it was registered: the machine has what it was failed back with.
            #expect(try await sites.cli("failover start shop --yes shop --boot-check serial:RUNS --wait").code == 0)
            let bytes = try await sites.machineBytes()
            #expect(bytes == expected)
            #expect(try await sites.cli("failover commit shop --yes shop").code == 0)
            try await sites.register()
        }
        try await sites.crashRequest(.registration, .requestStored) { try await sites.cli("registration shop") }
        let registered = try await sites.view()
        #expect(registered.state == .registration && registered.reverse == nil)
        try await until("the old agent is told") { sites.rescue?.log.contains("enrolled again") == true }
        sites.endRescue(SIGTERM)
        let token = try await sites.json(TwoSites.EnrolledServer.self, "registration shop").token
        try FileManager.default.removeItem(atPath: sites.directory.path + "/g")
        #expect(try await sites.cli("agent enroll --token \(token) --state \(sites.directory.path)/g").code == 0)
        try sites.startAgent()
        try await until("Initialized") { try await sites.view().state == .initialized }
    }

    /// The machine is stopped already, and the last cut does not come.
    private func cancel(_ sites: TwoSites, _ number: Int) async throws {
        var expected = Data()
        let machine = try #require(try await sites.view().instances.first)
        try await sites.crashRequest(.cancelFailback, FaultPoint.passed(by: .cancelFailback)[number]) {
            try await until("the disk follows") { try await sites.follows() }
            sites.signalRescue(SIGSTOP)
            expected = try await sites.writeToMachine(200 + number)
            #expect(try await sites.cli("failback start shop --forced --yes shop").code == 0)
            try await until("the machine is stopped") { sites.machineProcess(machine) == nil }
            return try await sites.cli("failback cancel shop")
        }
        sites.signalRescue(SIGCONT)
        try await until("the machine runs again") {
            let view = try await sites.view()
            return view.state == .reversedReplicating && view.instances.first?.step == .ready && view.instances.first?.pid == sites.machineProcess(machine)?.pid
        }
        let failback = try await sites.json([TaskView].self, "task list --limit 20").first { $0.operation == .failback }
        #expect(failback?.status == .failed && failback?.error?.contains("cancelled by") == true)
        #expect(try await sites.machineBytes() == expected)
        try await sites.expectFollowed()
    }

    @Test("of a failback that failed: it is taken back, and not gone on with", arguments: [ReverseStep.cancelling, .sending])
    func takenBack(step: ReverseStep) async throws {
        let sites = try TwoSites()
        try await sites.failOver()
        try await sites.register()
        try await sites.follow()
        let expected = try await sites.writeToMachine(1)
        let machine = try #require(try await sites.view().instances.first)
        let task = try await sites.crash(.failback, .stopStored, always: { sites.machineProcess(machine) != nil }) {
            try await until("the disk follows") { try await sites.follows() }
            _ = try await sites.cli("failback start shop --yes shop")
            try await until("the appliance's end") { sites.appliance?.process.isRunning == false }
            // As the kill leaves it before, or after, the machine was started again, and before the task has ended; the test cannot hit that.
            let catalogue = try DatabaseQueue(path: sites.state + "/catalogue.sqlite")
            try await catalogue.write { db in
                try db.execute(sql: "UPDATE reverse SET step = ?", arguments: [step.rawValue])
                if step == .sending {
                    try db.execute(sql: "UPDATE server SET state = ?", arguments: [ServerState.reversedReplicating.rawValue])
                    try db.execute(sql: "UPDATE instance SET step = 'ready'")
                }
            }
            try catalogue.close()
            return try await sites.cli("--version")
        }
        #expect(task.status == .failed && task.error?.contains("taken back") == true, "\(task)")
        try await sites.expectFollowed()
        let view = try await sites.view()
        #expect(view.instances.map(\.id) == [machine.id] && view.instances.first?.step == .ready && view.instances.first?.pid == machine.pid)
        #expect(try await sites.machineBytes() == expected)
    }

    /// But `fenced`, which another appliance as the target has: `failback-appliance.sh`.
    @Test("and the agent, in each step", arguments: ReverseStep.allCases.filter { $0 != .fenced })
    func agent(step: ReverseStep) async throws {
        let sites = try TwoSites()
        try await sites.failOver()
        try await sites.register()
        let original = try sites.changeDisk(1)
        let start = "reverse start shop --original-machine --confirm \(sites.disk)"
        var expected = Data()
        var failback: TaskView?
        func killAgent() throws {
            sites.endRescue(SIGKILL)
            try sites.startRescue()
        }
        func ended() async throws -> TaskView {
            var last: TaskView?
            try await until("the failback's end") {
                last = try await sites.json([TaskView].self, "task list --limit 20").first { $0.operation == .failback }
                return last.map { $0.status != .running } ?? false
            }
            return try #require(last)
        }
        if ![.registered, .keeping, .sending].contains(step) { try await sites.follow() }
        let machine = try #require(try await sites.view().instances.first)
        switch step {
        case .fenced: return
        case .registered:
            try killAgent()
            #expect(try await sites.cli(start).code == 0)
        case .keeping:
            sites.signalRescue(SIGSTOP)
            #expect(try await sites.cli(start).code == 0)
            #expect(try await sites.view().reverse?.step == .keeping)
            try killAgent()
        case .sending:
            try await sites.writeToMachine(1, megabytes: 4)
            #expect(try await sites.cli(start + " --throttle 1MiB").code == 0)
            try await until("some of it is sent") { try await sites.view().reverse.map { $0.step == .sending && $0.sentBytes > 0 } ?? false }
            #expect(try await sites.view().state != .reversedReplicating)
            try killAgent()
        case .stopping:
            sites.signalRescue(SIGSTOP)
            expected = try await sites.writeToMachine(2)
            #expect(try await sites.cli("failback start shop --forced --yes shop").code == 0)
            try await until("the machine is stopped") { sites.machineProcess(machine) == nil }
            #expect(try await sites.view().reverse?.step == .stopping)
            try killAgent()
            failback = try await ended()
        case .handedOver:
            failback = try await sites.crash(.failback, .handedOver) {
                try await until("the disk follows") { try await sites.follows() }
                expected = try await sites.writeToMachine(3)
                _ = try await sites.cli("failback start shop --forced --yes shop")
                try await until("the appliance's end") { sites.appliance?.process.isRunning == false }
                try killAgent()
                return try await sites.cli("--version")
            }
        case .cancelling:
            try await sites.crashRequest(.cancelFailback, .requestStored) {
                try await until("the disk follows") { try await sites.follows() }
                sites.signalRescue(SIGSTOP)
                try await sites.writeToMachine(4)
                #expect(try await sites.cli("failback start shop --forced --yes shop").code == 0)
                try await until("the machine is stopped") { sites.machineProcess(machine) == nil }
                _ = try await sites.cli("failback cancel shop")
                try killAgent()
                return try await sites.cli("--version")
            }
        }
        if let failback {
            #expect(failback.status == .succeeded && sites.machineProcess(machine) == nil, "\(failback)")
            #expect(try await sites.view().state == .failedBack)
            #expect(try sites.diskBytes() == expected)
            try await sites.expectOnly([])
            try await until("the agent says it") { sites.rescue?.log.contains("the disks hold everything") == true }
        } else {
            try await sites.expectFollowed()
            let view = try await sites.view()
            #expect(view.instances.first?.step == .ready && view.instances.first?.pid == sites.machineProcess(machine)?.pid)
            let kept = try #require(view.reverse?.originalPoint)
            #expect(try await sites.image(of: kept) == original)
        }
    }

    @Test("every operation of the way back has its steps")
    func complete() {
        func isBack(_ state: ServerState) -> Bool { state.phase == .reverse || state.phase == .failback }
        /// What it makes of a state, when it makes anything of it.
        func target(_ state: ServerState, _ operation: Trigger) -> ServerState?? {
            switch StateTable.outcome(state, operation) {
            case .to(let next), .toWithPoint(let next): .some(next)
            case .removes, .endsDrill: .some(nil)
            case .stays, .refused: nil
            }
        }
        func isPermitted(_ state: ServerState, _ operation: Trigger) -> Bool {
            if case .refused = StateTable.outcome(state, operation) { false } else { true }
        }
        let operations = Trigger.operations.filter { operation in
            let moves = ServerState.allCases.contains { state in target(state, operation).map { isBack(state) || $0.map(isBack) == true } ?? false }
            return moves || ServerState.allCases.allSatisfy { !isPermitted($0, operation) || isBack($0) }
        }
        #expect(Set(operations).isSuperset(of: [.reversedRegister, .startReverse, .stopReverse, .failback, .cancelFailback, .registration]))
        for operation in operations { #expect(!FaultPoint.passed(by: operation).isEmpty, "\(operation.rawValue) has no points at which a test kills the appliance") }
    }
}

extension TwoSites {
    /// Protected, lost, failed over, committed.
    fileprivate func failOver() async throws {
        try await protect()
        endAgent(SIGKILL)
        let failover = try await cli("failover start \(server) --yes \(server) --boot-check serial:RUNS --wait")
        try #require(failover.code == 0, "\(failover.errors)")
        #expect(try await cli("failover commit \(server) --yes \(server)").code == 0)
    }

    /// Reversed Register, with the original disk held by an agent that knows the new certificate.
    fileprivate func register() async throws {
        endRescue(SIGTERM)
        let token = try await json(EnrolledServer.self, "reverse register \(server)").token
        try? FileManager.default.removeItem(atPath: directory.path + "/rescue")
        let enrolled = try await cli("agent enroll --token \(token) --state \(directory.path)/rescue")
        try #require(enrolled.code == 0, "\(enrolled.errors)")
        try startRescue()
        try await until("Reversed Initialized") { try await view().state == .reversedInitialized }
    }

    /// Until the disk follows what runs, from wherever reverse replication is.
    fileprivate func follow() async throws {
        if try await view().state == .reversedInitialized {
            let started = try await cli("reverse start \(server) --original-machine --confirm \(disk) --wait")
            #expect(started.code == 0, "\(started.errors)")
        }
        try await until("the disk follows") { try await follows() }
    }

    fileprivate func follows() async throws -> Bool {
        let view = try await view()
        return view.state == .reversedReplicating && view.reverse?.phase == .replicating && view.reverse?.lastCutTime != nil
    }

    /// It follows, and comes to be what runs here; nobody may be writing.
    fileprivate func expectFollowed() async throws {
        try await until("the disk follows") { try await follows() }
        let machine = try await machineBytes()
        try await until("the disk is what runs here") { try diskBytes() == machine }
    }

    fileprivate func diskBytes() throws -> Data { try Data(contentsOf: URL(fileURLWithPath: disk)) }

    /// Others than before, past everybody, where no boot code is; what the disk then holds.
    fileprivate func changeDisk(_ number: Int) throws -> Data {
        let file = try #require(FileHandle(forWritingAtPath: disk))
        try file.seek(toOffset: UInt64(5 << 20 + number << 16))
        try file.write(contentsOf: random(20 << 10))
        try file.synchronize()
        try file.close()
        return try diskBytes()
    }

    private func random(_ count: Int) -> Data {
        var generator = SplitMix(seed: UInt64.random(in: .min ... .max))
        return Data((0..<count / 8).flatMap { _ in withUnsafeBytes(of: generator.next()) { Array($0) } })
    }

    /// As the machine would, on its own disks; what they then hold.
    @discardableResult
    fileprivate func writeToMachine(_ number: Int, megabytes: Int? = nil) async throws -> Data {
        let file = directory.path + "/written"
        try random(megabytes.map { $0 << 20 } ?? 40 << 10).write(to: URL(fileURLWithPath: file))
        let socket = try #require(try await view().instances.first?.nbdSocketPath)
        let outcome = try await Program.run(Program.qemuIO, ["-f", "raw", "-c", "write -f -s \(file) \(1 << 20 + (number % 16) << 16) \(megabytes.map { $0 << 20 } ?? 40 << 10)", "nbd+unix:///vda?socket=\(socket)"])
        try #require(outcome.code == 0, "\(outcome.errors) \(outcome.output)")
        return try await machineBytes()
    }

    fileprivate func machineBytes() async throws -> Data {
        let socket = try #require(try await view().instances.first?.nbdSocketPath)
        return try await copy("nbd+unix:///vda?socket=\(socket)")
    }

    fileprivate func image(of point: RecoveryPointID) async throws -> Data {
        struct Export: Decodable { var uris: [String] }
        let export = try await json(Export.self, "recovery-point export \(server) --point \(point)")
        let bytes = try await copy(try #require(export.uris.first))
        #expect(try await cli("recovery-point unexport \(server) --point \(point)").code == 0)
        return bytes
    }

    private func copy(_ uri: String) async throws -> Data {
        let file = directory.path + "/copy"
        let outcome = try await Program.run("/usr/bin/qemu-img", ["convert", "-f", "raw", "-O", "raw", uri, file])
        try #require(outcome.code == 0, "\(outcome.errors)")
        return try Data(contentsOf: URL(fileURLWithPath: file))
    }

    fileprivate func machineProcess(_ machine: InstanceView) -> QEMUProcess? { QEMUProcess.find(name: "afterimage-\(machine.id)") }

    fileprivate func signalRescue(_ signal: Int32) {
        if let rescue { kill(rescue.process.processIdentifier, signal) }
    }
}

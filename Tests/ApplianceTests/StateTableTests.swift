import Foundation
import Testing

@testable import Appliance

@Suite("State table")
struct StateTableTests {
    @Test("every state has an answer to every trigger")
    func closed() {
        for state in ServerState.allCases {
            for trigger in Trigger.allCases {
                if case .refused(let why) = StateTable.outcome(state, trigger) {
                    #expect(trigger.isOperation, "\(trigger.rawValue) happened in \(state.rawValue): it cannot be refused")
                    #expect(why.hasSuffix(".") || why.hasSuffix(")."), "not a sentence: \(why)")
                }
            }
        }
    }

    @Test("a main state never becomes a drill's and a drill's never a main one")
    func phasesStayApart() {
        for state in ServerState.allCases {
            for trigger in Trigger.allCases {
                switch StateTable.outcome(state, trigger) {
                case .to(let next), .toWithPoint(let next):
                    if state.phase == .drill { #expect(next.phase == .drill) }
                    if next.phase == .drill { #expect(state.phase == .drill || trigger == .drill) }
                case .endsDrill: #expect(state.phase == .drill)
                default: break
                }
            }
        }
    }

    @Test("random triggers never leave the table")
    func walk() {
        var generator = SplitMix(seed: 0x5eed)
        for _ in 0..<200 {
            var state = LifecycleState(main: .agentInstalling)
            for _ in 0..<100 {
                let trigger = Trigger.allCases[Int(generator.next() % UInt64(Trigger.allCases.count))]
                switch StateTable.verdict(state, trigger, hasRecoveryPoint: generator.next() % 4 != 0) {
                case .permitted(let next):
                    state = next
                    #expect(state.main.phase != .drill && (state.drill.map { $0.phase == .drill } ?? true))
                case .removed: state = LifecycleState(main: .agentInstalling)
                case .refused(let why): #expect(!why.isEmpty)
                }
            }
        }
    }

    @Test("the document's rules", arguments: [
        (ServerState.replicating, Trigger.drill, true), (.initialFullSync, .drill, false), (.replicationInterrupted, .drill, false),
        (.replicationInterrupted, .failover, true), (.failoverInProgress, .failover, false), (.failedOver, .failover, false),
        (.failedOver, .changeRecoveryPoint, true), (.failoverCommitted, .changeRecoveryPoint, false), (.failoverInProgress, .commitFailover, false),
        (.failedOver, .commitFailover, true), (.replicating, .unregister, false), (.failedOver, .startReplication, false),
        (.failedOver, .reversedRegister, false), (.failoverCommitted, .reversedRegister, true), (.reversedRegistering, .startReverse, false), (.reversedInitialized, .startReverse, true),
        (.reversedEnableReplicating, .failback, false), (.reversedFullSync, .failback, false), (.reversedReplicating, .failback, true), (.reversedReplicating, .startReplication, false),
        (.reversedReplicating, .startMachine, true), (.failbackInProgress, .startMachine, false), (.failedBack, .startMachine, false), (.failbackInProgress, .failover, false),
        (.failbackInProgress, .cancelFailback, true), (.failedBack, .cancelFailback, false), (.failedBack, .registration, true), (.failedBack, .startReplication, false), (.failedBack, .failover, true),
    ])
    func rules(state: ServerState, trigger: Trigger, isPermitted: Bool) {
        let verdict = StateTable.verdict(LifecycleState(main: state), trigger, hasRecoveryPoint: true)
        if case .refused = verdict { #expect(!isPermitted) } else { #expect(isPermitted) }
    }

    @Test("a failover at the other appliance stops what is sent there, and only that", arguments: ServerState.allCases)
    func failedOverElsewhere(state: ServerState) {
        let isSent = [.reversedEnableReplicating, .reversedFullSync, .reversedReplicating].contains(state)
        #expect(StateTable.outcome(state, .failedOverElsewhere) == (isSent ? .to(.failbackInProgress) : .stays))
    }

    @Test("nothing is recovered from where there is no recovery point")
    func needsPoint() {
        for state in ServerState.allCases where state.phase != .drill {
            for trigger in [Trigger.drill, .failover] {
                guard case .refused = StateTable.verdict(LifecycleState(main: state), trigger, hasRecoveryPoint: false) else {
                    Issue.record("\(trigger.rawValue) in \(state.rawValue) without a point")
                    continue
                }
            }
        }
    }

    @Test("a drill stands beside a failover and in the way of a second drill and of unregistering")
    func drillBeside() {
        let state = LifecycleState(main: .replicating, drill: .testFailoverReady)
        #expect(StateTable.verdict(state, .failover, hasRecoveryPoint: true) == .permitted(.init(main: .failoverInProgress, drill: .testFailoverReady)))
        for trigger in [Trigger.drill, .unregister] {
            guard case .refused = StateTable.verdict(state, trigger, hasRecoveryPoint: true) else {
                Issue.record("\(trigger.rawValue) during a drill")
                continue
            }
        }
        let clearing = StateTable.verdict(state, .clearDrill, hasRecoveryPoint: true)
        #expect(clearing == .permitted(.init(main: .replicating, drill: .clearTestFailoverEnvironment)))
        #expect(
            StateTable.verdict(.init(main: .failedOver, drill: .clearTestFailoverEnvironment), .drillCleared, hasRecoveryPoint: true)
                == .permitted(.init(main: .failedOver)))
    }

    @Test("docs/lifecycle.md holds the table")
    func document() throws {
        try Documentation.expect(StateTableDocument.render(), between: StateTableDocument.beginMarker, and: StateTableDocument.endMarker)
    }
}

struct SplitMix: RandomNumberGenerator {
    private var state: UInt64
    init(seed: UInt64) { state = seed }
    mutating func next() -> UInt64 {
        state &+= 0x9e37_79b9_7f4a_7c15
        var z = state
        z = (z ^ (z >> 30)) &* 0xbf58_476d_1ce4_e5b9
        z = (z ^ (z >> 27)) &* 0x94d0_49bb_1331_11eb
        return z ^ (z >> 31)
    }
}

/// docs/lifecycle.md as the repository has it. AFTERIMAGE_RENDER_DOCS=1 writes what the code says instead of complaining.
enum Documentation {
    static let url = URL(fileURLWithPath: #filePath).deletingLastPathComponent().deletingLastPathComponent().deletingLastPathComponent()
        .appendingPathComponent("docs/lifecycle.md")

    static func expect(_ rendered: String, between begin: String, and end: String) throws {
        let text = try String(contentsOf: url, encoding: .utf8)
        let first = try #require(text.range(of: begin)), last = try #require(text.range(of: end))
        if ProcessInfo.processInfo.environment["AFTERIMAGE_RENDER_DOCS"] == "1" {
            try text.replacingCharacters(in: first.lowerBound..<last.upperBound, with: rendered).write(to: url, atomically: true, encoding: .utf8)
            return
        }
        #expect(text[first.lowerBound..<last.upperBound] == rendered, "docs/lifecycle.md differs from the code: AFTERIMAGE_RENDER_DOCS=1 swift test --filter document renders it")
    }
}

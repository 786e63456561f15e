/// The state table as it stands in docs/lifecycle.md, between its two markers.
public enum StateTableDocument {
    public static let beginMarker = "<!-- state table: rendered from code, do not edit -->"
    public static let endMarker = "<!-- end of state table -->"

    public static func render() -> String {
        var text = beginMarker + "\n"
        text += "### Operations\n\n" + matrix(Trigger.operations)
        text += "\n### What happens by itself\n\n" + matrix(Trigger.happenings)
        text += "\n### Why not\n\n" + reasons()
        return text + endMarker
    }

    private static func matrix(_ triggers: [Trigger]) -> String {
        var text = "| state | " + triggers.map { "*\($0.rawValue)*" }.joined(separator: " | ") + " |\n"
        text += "| --- |" + String(repeating: " --- |", count: triggers.count) + "\n"
        for state in ServerState.allCases {
            let cells = triggers.map { symbol(StateTable.outcome(state, $0)) }
            text += "| \(state.rawValue) | " + cells.joined(separator: " | ") + " |\n"
        }
        return text
    }

    private static func symbol(_ outcome: StateOutcome) -> String {
        switch outcome {
        case .to(let state): "→ \(state.rawValue)"
        case .toWithPoint(let state): "→ \(state.rawValue) ¹"
        case .stays: "stays"
        case .endsDrill: "→ no drill"
        case .removes: "→ removed"
        case .refused: "no"
        }
    }

    private static func reasons() -> String {
        var text = "¹ once a recovery point exists; before that: *\(StateTable.noRecoveryPoint)*\n\n"
        text += "| in | not | because |\n| --- | --- | --- |\n"
        for state in ServerState.allCases {
            var bySentence: [(sentence: String, triggers: [String])] = []
            for trigger in Trigger.operations {
                guard case .refused(let why) = StateTable.outcome(state, trigger) else { continue }
                if let i = bySentence.firstIndex(where: { $0.sentence == why }) {
                    bySentence[i].triggers.append(trigger.rawValue)
                } else {
                    bySentence.append((why, [trigger.rawValue]))
                }
            }
            for (sentence, triggers) in bySentence {
                text += "| \(state.rawValue) | \(triggers.joined(separator: ", ")) | \(sentence) |\n"
            }
        }
        return text + "\n"
    }
}

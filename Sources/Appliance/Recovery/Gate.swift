/// Lets at most so many in at once; the others wait in the order of their coming.
actor Gate {
    let limit: Int
    private var inside = 0
    private var waiting: [(ticket: UInt64, enter: CheckedContinuation<Void, any Error>)] = []
    private var nextTicket: UInt64 = 0

    init(limit: Int) {
        precondition(limit > 0)
        self.limit = limit
    }

    /// Whether one who comes now would have to wait.
    var isFull: Bool { inside >= limit }

    /// Throws `CancellationError` when the task is cancelled while it waits. Whoever is let in has to `leave`.
    func enter() async throws {
        try Task.checkCancellation()
        if inside < limit {
            inside += 1
            return
        }
        let ticket = nextTicket
        nextTicket += 1
        try await withTaskCancellationHandler {
            try await withCheckedThrowingContinuation { (enter: CheckedContinuation<Void, any Error>) in
                if Task.isCancelled { enter.resume(throwing: CancellationError()) } else { waiting.append((ticket, enter)) }
            }
        } onCancel: {
            Task { await self.giveUp(ticket) }
        }
    }

    func leave() {
        precondition(inside > 0)
        // The place is handed on: nobody who comes just now gets before those who wait.
        if waiting.isEmpty { inside -= 1 } else { waiting.removeFirst().enter.resume() }
    }

    private func giveUp(_ ticket: UInt64) {
        guard let index = waiting.firstIndex(where: { $0.ticket == ticket }) else { return }
        waiting.remove(at: index).enter.resume(throwing: CancellationError())
    }
}

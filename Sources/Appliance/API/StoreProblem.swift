import Replica

extension Problem {
    /// What the store says to a request. A recovery point may expire, and a group go with its server, while somebody asks for it: that is no failure of the appliance.
    init(_ error: StoreError) {
        switch error {
        case .unknownGroup, .unknownRecoveryPoint, .unknownFork: self.init(.notFound, "\(error).")
        case .invalid, .busy, .shrunk, .fenced, .abandoned, .full: self.init(.refused, "\(error).")
        case .versionTooNew, .versionTooOld, .damaged, .badBlock, .io, .closed: self.init(.failed, "\(error)")
        }
    }
}

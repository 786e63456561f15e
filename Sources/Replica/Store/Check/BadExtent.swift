import BlockTap

/// Blocks of one disk that the store cannot read any more, and what that touches.
public struct BadExtent: Codable, Sendable, Hashable {
    public var group: GroupID
    public var volume: Int
    public var disk: String
    public var block: UInt64
    public var count: UInt64
    /// Layers whose blocks these are; none for what a fork wrote since it was last sealed.
    public var layers: [UInt64]
    /// That show these blocks; others have newer ones in their place.
    public var recoveryPoints: [RecoveryPointID]
    public var forks: [ForkID]

    public init(group: GroupID, volume: Int, disk: String, block: UInt64, count: UInt64, layers: [UInt64], recoveryPoints: [RecoveryPointID], forks: [ForkID]) {
        self.group = group
        self.volume = volume
        self.disk = disk
        self.block = block
        self.count = count
        self.layers = layers
        self.recoveryPoints = recoveryPoints
        self.forks = forks
    }
}

extension StoreState {
    /// The runs of `bad` (per layer) with what shows them; `seen` are the runs that each of `views` shows.
    func badExtents(_ bad: [UInt64: BlockRuns], views: [StoreView], seen: [BlockRuns]) -> [BadExtent] {
        var touched: [BlockRuns.Run: (points: [RecoveryPointID], forks: [ForkID])] = [:]
        for (view, runs) in zip(views, seen) {
            for run in runs.runs where run.layer != 0 {
                // As it was found in the layer, whatever of it is seen here.
                let whole = bad[run.layer]?.runs.first { $0.start <= run.start && run.end <= $0.end } ?? run
                switch view.kind {
                case .point(let id): if touched[whole]?.points.contains(id) != true { touched[whole, default: ([], [])].points.append(id) }
                case .fork(let id): if touched[whole]?.forks.contains(id) != true { touched[whole, default: ([], [])].forks.append(id) }
                case .newest: break
                }
            }
        }
        let owners = owners(of: Set(bad.keys), views: views)
        var extents: [BadExtent] = []
        for (layer, runs) in bad.sorted(by: { $0.key < $1.key }) {
            guard let view = owners[layer] else { continue }
            for run in runs.runs {
                extents.append(BadExtent(
                    group: view.group, volume: view.volume, disk: view.spec.name, block: run.start, count: run.count, layers: [layer],
                    recoveryPoints: touched[run]?.points ?? [], forks: touched[run]?.forks ?? []))
            }
        }
        return extents
    }

    /// For each layer a view whose chain it is in; one of the group itself rather than a fork.
    func owners(of wanted: Set<UInt64>, views: [StoreView]) -> [UInt64: StoreView] {
        var owners: [UInt64: StoreView] = [:]
        var passed: Set<UInt64> = []
        for view in views where owners.count < wanted.count {
            var id = view.top
            while id != 0, passed.insert(id).inserted {
                if wanted.contains(id) { owners[id] = view }
                id = layers[id]?.parent ?? 0
            }
        }
        return owners
    }
}

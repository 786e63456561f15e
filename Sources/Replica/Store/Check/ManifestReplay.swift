import Foundation

/// A MANIFEST's records applied one after the other as far as they make sense, for tools that look at damaged stores.
enum ManifestReplay {
    static func decode(_ frame: FramedLog.Frame) throws -> ManifestRecord { try JSONDecoder().decode(ManifestRecord.self, from: Data(frame.payload)) }

    /// The state up to the first record that does not fit, and what is wrong.
    static func replay(_ frames: [FramedLog.Frame], store: StoreUUID) -> (state: StoreState, problems: [(UInt64, String)]) {
        var state = StoreState(uuid: store)
        for (index, frame) in frames.enumerated() {
            if let problem = apply(frame, to: &state, isFirst: index == 0) { return (state, [(frame.offsetBytes, problem)]) }
        }
        return (state, frames.isEmpty ? [(UInt64(FramedLog.headerBytes), "there is no record")] : [])
    }

    /// Nil when the record fits.
    static func apply(_ frame: FramedLog.Frame, to state: inout StoreState, isFirst: Bool) -> String? {
        guard frame.type == Manifest.recordType else { return "a record of unknown type \(frame.type)" }
        let record: ManifestRecord
        do { record = try decode(frame) } catch { return "a record cannot be understood: \(error)" }
        if isFirst { guard case .snapshot = record else { return "the first record is no snapshot" } }
        if let conflict = state.conflict(record) { return "a record contradicts those before it: \(conflict)" }
        state.apply(record)
        return nil
    }
}

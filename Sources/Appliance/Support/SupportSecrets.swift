import Foundation
import GRDB

/// What must not leave the appliance in a support bundle, wherever it may stand: in an error's text, in a log.
struct SupportSecrets: Sendable {
    private var words: [String] = []
    static let placeholder = "[removed]"
    /// Shorter ones would take away half of the text, and are no secrets.
    private static let lengthMin = 4

    /// Columns with such names are never exported.
    static func isSecret(column: String) -> Bool {
        let name = column.lowercased()
        return ["hash", "secret", "password", "token"].contains { name.contains($0) }
    }

    init(_ db: Database) throws {
        for channel in try AlertChannelRecord.fetchAll(db) {
            switch channel.target {
            case .webhook(let hook): words += [hook.url, hook.secret].compactMap { $0 }
            case .mail(let mail): words += [mail.user, mail.password].compactMap { $0 }
            }
        }
        words += try TokenRecord.fetchAll(db).map(\.hash)
        words += try ServerRecord.fetchAll(db).compactMap(\.enrolmentHash)
        // One may be a part of another.
        words = Set(words.filter { $0.count >= Self.lengthMin }).sorted { $0.count > $1.count }
    }

    func removed(from text: String) -> String {
        words.reduce(text) { text, word in
            // As JSON has it, too: with escaped characters.
            let quoted = (try? JSONEncoder().encode(word)).map { String(decoding: $0.dropFirst().dropLast(), as: UTF8.self) } ?? word
            return text.replacingOccurrences(of: word, with: Self.placeholder).replacingOccurrences(of: quoted, with: Self.placeholder)
        }
    }
}

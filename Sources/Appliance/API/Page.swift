import Foundation
import HTTPTypes
import Hummingbird

/// A page of a list that grows. All of them are asked for in one way: `?limit=N`, then what `Link: <…>; rel="next"` names, until there is none. A page begins where the last
/// one ended, at a thing, not at a count: what is added or goes meanwhile neither repeats nor hides anything else.
struct Page<Item: Encodable & Sendable>: Sendable {
    static var limitStandard: Int { 50 }
    var items: [Item]
    /// The parameter that asks for the next page.
    var next: (name: String, value: String)?

    init(items: [Item], next: (name: String, value: String)? = nil) {
        self.items = items
        self.next = next
    }

    /// Newest first, by number. `fetch` gets how many, and before which number.
    init(in request: Request, before number: (Item) -> Int64?, _ fetch: (Int, Int64?) async throws -> [Item]) async throws {
        let limit = request.limit ?? Self.limitStandard
        // One more than is shown says whether there are more.
        items = try await fetch(limit + 1, request.text("before").flatMap { Int64($0) })
        if items.count > limit {
            items.removeLast(items.count - limit)
            if let last = items.last.flatMap(number) { next = ("before", "\(last)") }
        }
    }

    /// By name; all of them unless there is a limit.
    init(_ all: [Item], in request: Request, after name: (Item) -> String) {
        var rest = all[...]
        if let after = request.text("after") { rest = rest.drop { name($0) <= after } }
        items = Array(request.limit.map { rest.prefix($0) } ?? rest)
        if items.count < rest.count, let last = items.last { next = ("after", name(last)) }
    }
}

extension Request {
    /// A parameter of the query; what it may be has been checked (`APIShapeCheck`).
    func text(_ name: String) -> String? { uri.queryParameters[name[...]].map(String.init) }
    var limit: Int? { text("limit").flatMap { Int($0) } }
}

extension APIResponse {
    static func json<Item>(_ page: Page<Item>, for request: Request) throws -> Response {
        var response = try json(page.items)
        guard let next = page.next else { return response }
        let kept = request.uri.queryParameters.filter { $0.key != next.name[...] }.map { (String($0.key), String($0.value)) }
        let query = (kept + [next]).map { "\($0)=\(APIClient.segment($1))" }.joined(separator: "&")
        response.headers[HTTPField.Name("Link")!] = "<\(request.uri.path)?\(query)>; rel=\"next\""
        return response
    }
}

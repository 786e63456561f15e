/// The list of routes as it stands in docs/lifecycle.md, between its two markers.
enum APIDocument {
    static let beginMarker = "<!-- routes: rendered from code, do not edit -->"
    static let endMarker = "<!-- end of routes -->"

    static func render(_ routes: [APIRoute]) -> String {
        var text = beginMarker + "\n| route | does | for |\n| --- | --- | --- |\n"
        for route in routes {
            text += "| `\(route.method.rawValue) \(route.path)` | \(route.summary) | \(route.access.text) |\n"
        }
        return text + endMarker
    }
}

extension APIRoute.Access {
    var text: String {
        switch self {
        case .open: "anyone"
        case .role(let role): role.rawValue
        }
    }
}

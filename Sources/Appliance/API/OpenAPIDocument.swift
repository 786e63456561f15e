import HTTPTypes

/// The API as OpenAPI 3.1 describes it, made from the list of routes.
struct OpenAPIDocument {
    private let book = SchemaBook()

    /// Throws when a route does not say its shape, or a type has no schema.
    static func make(_ routes: [APIRoute]) throws -> JSONValue { try OpenAPIDocument().document(routes) }

    private func document(_ routes: [APIRoute]) throws -> JSONValue {
        var paths: [String: [String: JSONValue]] = [:]
        for route in routes {
            guard let shape = route.shape else { throw SchemaBook.Unknown(description: "\(route.method.rawValue) \(route.path) does not say its shape") }
            paths[route.path, default: [:]][route.method.rawValue.lowercased()] = try operation(route, shape)
        }
        let problem = try book.schema(of: Problem.self)
        return [
            "openapi": "3.1.0",
            "info": [
                "title": "Afterimage", "version": .string(afterimageVersion),
                "description": "Continuous disaster recovery for Linux disks. Dates are in UTC with milliseconds. Errors are application/problem+json (RFC 9457) with a sentence for the operator.",
            ],
            "paths": .object(paths.mapValues { .object($0) }),
            "components": [
                "schemas": .object(closed(routes)),
                "securitySchemes": ["token": ["type": "http", "scheme": "bearer", "description": "An access token (afterimage token create), or a session's secret (POST /v1/sessions)."]],
                "responses": ["Problem": ["description": "What is wrong, and what to do.", "content": ["application/problem+json": ["schema": problem]]]],
            ],
        ]
    }

    /// What only requests are made of has no other fields than these; answers of later versions may have more.
    private func closed(_ routes: [APIRoute]) -> [String: JSONValue] {
        var components = book.components
        let inner = SchemaBook()
        for case let body? in routes.map({ $0.shape?.body }) where !body.isOpen { _ = try? inner.schema(of: body.type) }
        for name in inner.components.keys {
            guard case .object(var schema) = components[name], schema["properties"] != nil else { continue }
            schema["additionalProperties"] = false
            components[name] = .object(schema)
        }
        return components
    }

    private func operation(_ route: APIRoute, _ shape: APIShape) throws -> JSONValue {
        var operation: [String: JSONValue] = ["summary": .string(route.summary), "operationId": .string(Self.identifier(route))]
        let names = route.path.split(separator: "/").filter { $0.hasPrefix("{") }.map { String($0.dropFirst().dropLast()) }
        let parameters: [JSONValue] =
            names.map { ["name": .string($0), "in": "path", "required": true, "schema": ["type": "string", "minLength": 1]] }
            + shape.query.map { ["name": .string($0.name), "in": "query", "description": .string($0.summary), "schema": $0.schema] }
            + shape.headers.map { ["name": .string($0.name), "in": "header", "description": .string($0.summary), "schema": ["type": "string"]] }
        if !parameters.isEmpty { operation["parameters"] = .array(parameters) }
        if let body = shape.body {
            let schema = try book.schema(of: body.type)
            let name = schema["$ref"]?.string?.split(separator: "/").last.map(String.init) ?? ""
            // An empty body is an empty object.
            operation["requestBody"] = ["required": .bool(book.components[name]?["required"] != nil), "content": ["application/json": ["schema": schema]]]
        }
        var responses: [String: JSONValue] = [:]
        for answer in shape.answers {
            var response: [String: JSONValue] = ["description": .string(answer.status.reasonPhrase)]
            if let type = answer.type { response["content"] = [answer.contentType: ["schema": try book.schema(of: type)]] }
            if answer.type == nil, answer.status == .ok { response["content"] = [answer.contentType: [:]] }
            if !answer.headers.isEmpty {
                response["headers"] = .object(Dictionary(uniqueKeysWithValues: answer.headers.map { ($0.name, ["description": .string($0.summary), "schema": ["type": "string"]]) }))
            }
            responses["\(answer.status.code)"] = .object(response)
        }
        for status in Self.problems(route, shape) { responses["\(status)"] = ["$ref": "#/components/responses/Problem"] }
        operation["responses"] = .object(responses)
        if case .role(let role) = route.access {
            operation["security"] = [["token": []]]
            operation["description"] = .string("For the role \(role.rawValue)\(role == .administrator ? "" : " and those above it").")
        }
        return .object(operation)
    }

    /// `GET /v1/servers/{server}/policy` is `getServersServerPolicy`.
    private static func identifier(_ route: APIRoute) -> String {
        let words = route.path.split(whereSeparator: { !$0.isLetter && !$0.isNumber }).dropFirst()
        return route.method.rawValue.lowercased() + words.map { $0.prefix(1).uppercased() + $0.dropFirst() }.joined()
    }

    private static func problems(_ route: APIRoute, _ shape: APIShape) -> [Int] {
        var statuses: Set<Int> = [400, 422, 500]
        if case .role = route.access { statuses.formUnion([401, 403, 429]) }
        if route.path.contains("{") || shape.body != nil { statuses.formUnion([404, 409]) }
        if route.method != .get { statuses.insert(409) }
        if shape.body != nil {
            statuses.formUnion([413, 415])
            // Passwords and secrets of enrolment are guessed at like tokens.
            if route.access == .open { statuses.formUnion([401, 429]) }
        }
        if shape.headers.contains(where: { $0.name == "If-Match" }) { statuses.insert(412) }
        return statuses.sorted()
    }
}

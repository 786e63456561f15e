import Hummingbird

extension API {
    var networks: [APIRoute] {
        [
            APIRoute(method: .get, path: "/v1/networks", access: .role(.viewer), summary: "list networks", shape: .gives([NetworkRecord].self)) { _, _ in
                try APIResponse.json(try await lifecycle.networks())
            },
            APIRoute(method: .post, path: "/v1/networks", access: .role(.administrator), summary: "create a replication or a recovery network", shape: .gives(NetworkRecord.self, .created).takes(CreateNetwork.self)) { request, context in
                try APIResponse.json(try await lifecycle.createNetwork(try await request.decoded(CreateNetwork.self), who: context.who), status: .created)
            },
            APIRoute(method: .delete, path: "/v1/networks/{network}", access: .role(.administrator), summary: "delete a network that nothing uses", shape: .nothing) { _, context in
                try await lifecycle.deleteNetwork(try context.parameters.require("network"), who: context.who)
                return Response(status: .noContent)
            },
        ]
    }
}

import Hummingbird

/// The way back.
extension API {
    var reverse: [APIRoute] {
        [
            APIRoute(method: .post, path: "/v1/servers/{server}/reverse/registration", access: .role(.administrator), summary: "Reversed Register: a token for the agent that holds the original disks", shape: .gives(Enrolment.self, .created)) { _, context in
                try APIResponse.json(try await lifecycle.reversedRegister(try name(context), who: context.who), status: .created)
            },
            APIRoute(method: .post, path: "/v1/servers/{server}/reverse/appliance", access: .role(.administrator), summary: "Reversed Register of another appliance, by the token of its server", shape: .gives(ServerView.self).takes(RegisterReverse.self)) { request, context in
                try APIResponse.json(try await lifecycle.registerAppliance(try name(context), try await request.decoded(RegisterReverse.self), who: context.who))
            },
            APIRoute(method: .get, path: "/v1/servers/{server}/reverse", access: .role(.viewer), summary: "what Initiate Reverse Replication would overwrite and keep", shape: .gives(OperationPreview.self)) { _, context in
                try APIResponse.json(try await lifecycle.reversePreview(try name(context)))
            },
            APIRoute(method: .post, path: "/v1/servers/{server}/reverse", access: .role(.operator), summary: "Initiate Reverse Replication; confirmed by the disks' serials, or to another appliance by the server's name", shape: .starts.takes(StartReverse.self)) { request, context in
                try accepted(try await lifecycle.startReverse(try name(context), try await request.decoded(StartReverse.self), who: context.who))
            },
            APIRoute(method: .delete, path: "/v1/servers/{server}/reverse", access: .role(.operator), summary: "stop reverse replication, or take its registration back", shape: .gives(ServerView.self)) { _, context in
                try APIResponse.json(try await lifecycle.stopReverse(try name(context), who: context.who))
            },
            APIRoute(method: .get, path: "/v1/servers/{server}/failback", access: .role(.viewer), summary: "what a Failback would stop and delete (?forced=true)", shape: .gives(OperationPreview.self).asks(.forced)) { request, context in
                try APIResponse.json(try await lifecycle.failbackPreview(try name(context), forced: request.text("forced") == "true"))
            },
            APIRoute(method: .post, path: "/v1/servers/{server}/failback", access: .role(.operator), summary: "Failback; confirmed by the server's name", shape: .starts.takes(StartFailback.self)) { request, context in
                try accepted(try await lifecycle.startFailback(try name(context), try await request.decoded(StartFailback.self), who: context.who))
            },
            APIRoute(method: .delete, path: "/v1/servers/{server}/failback", access: .role(.operator), summary: "cancel a Failback: the machine starts here again", shape: .gives(ServerView.self)) { _, context in
                try APIResponse.json(try await lifecycle.cancelFailback(try name(context), who: context.who))
            },
            APIRoute(method: .post, path: "/v1/servers/{server}/registration", access: .role(.administrator), summary: "Registration: a token for the agent of a server that has failed back", shape: .gives(Enrolment.self, .created)) { _, context in
                try APIResponse.json(try await lifecycle.registration(try name(context), who: context.who), status: .created)
            },
        ]
    }
}

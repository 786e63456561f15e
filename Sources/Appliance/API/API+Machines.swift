import HTTPTypes
import Hummingbird

/// What is done with a recovery machine's disks.
extension API {
    var machines: [APIRoute] {
        [
            APIRoute(method: .post, path: "/v1/servers/{server}/machine/hydration", access: .role(.operator), summary: "Hydrate Machine: its disks become independent of recovery points, while it runs", shape: .starts.takes(HydrateMachine.self)) { request, context in
                try accepted(try await lifecycle.hydrateMachine(try name(context), try await request.decoded(HydrateMachine.self), who: context.who))
            },
            APIRoute(method: .post, path: "/v1/servers/{server}/machine/copy", access: .role(.administrator), summary: "Promote Machine: a disk of it into a file or onto a device of the appliance's host", shape: .starts.takes(PromoteMachine.self)) { request, context in
                try accepted(try await lifecycle.promoteMachine(try name(context), try await request.decoded(PromoteMachine.self), who: context.who))
            },
        ]
    }
}

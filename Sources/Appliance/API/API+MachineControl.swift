import Foundation
import HTTPTypes
import Hummingbird
import NIOCore

/// Recovery machines: what they are started with, how they are stopped, what they showed.
extension API {
    var machineControl: [APIRoute] {
        [
            APIRoute(method: .delete, path: "/v1/servers/{server}/failover/machine", access: .role(.operator), summary: "Stop Machine: shut a failed-over machine down; its disks stay", shape: .starts) { _, context in
                try accepted(try await lifecycle.stopMachine(try name(context), who: context.who))
            },
            APIRoute(method: .get, path: "/v1/tasks/{task}/screenshot", access: .role(.viewer), summary: "what a task's machine showed when its boot check ended (image/png)", shape: APIShape(answers: [APIShape.Answer(status: .ok, contentType: "image/png")])) { _, context in
                let image = try await lifecycle.screenshot(task: try taskID(context))
                return Response(status: .ok, headers: [.contentType: "image/png", .cacheControl: "no-store"], body: .init(byteBuffer: ByteBuffer(data: image)))
            },
        ]
    }

    func machine(_ request: Request, _ context: APIContext) async throws -> StartMachine {
        let wanted = try await request.decoded(StartMachine.self)
        try checkPrograms(of: wanted, context)
        return wanted
    }

    /// Programs of the appliance's host run with its rights, so naming one is for who has these anyway.
    func checkPrograms(of wanted: StartMachine?, _ context: APIContext) throws(ApplianceError) {
        guard let wanted, wanted.namesHostPrograms, context.role < .administrator else { return }
        throw .forbidden("A program of the appliance's host (a script: boot check, a script after failover on the host) may be named by administrators only; \(context.who) has the role \(context.role.rawValue).")
    }
}

import Hummingbird
import NIOCore

extension API {
    var support: [APIRoute] {
        [
            APIRoute(method: .get, path: "/v1/support-bundle", access: .role(.administrator), summary: "a .tar.gz of what somebody who helps needs to see, without secrets", shape: APIShape(answers: [APIShape.Answer(status: .ok, contentType: "application/gzip")])) { _, context in
                try await catalogue.write { db in try db.event(context.who, "Make support bundle") }
                let bundle = SupportBundle(lifecycle: lifecycle, catalogue: catalogue)
                return Response(status: .ok, headers: [.contentType: "application/gzip", .cacheControl: "no-store"], body: ResponseBody { writer in
                    try await bundle.write { piece in try await writer.write(ByteBuffer(bytes: piece)) }
                    try await writer.finish(nil)
                })
            }
        ]
    }
}

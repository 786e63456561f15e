import Hummingbird

/// People and their sessions.
extension API {
    var people: [APIRoute] {
        [
            APIRoute(method: .post, path: "/v1/sessions", access: .open, summary: "log in: a session for a user's name and password", shape: .gives(CreatedSession.self, .created).takes(CreateSession.self)) { request, context in
                // Unlike a token a password can be guessed: after too many wrong ones not even the right one is looked at.
                try passwordLimiter.check(context.remoteAddress)
                do { return try APIResponse.json(try await users.open(try await request.decoded(CreateSession.self)), status: .created) } catch let error as ApplianceError {
                    if case .unauthorized = error { try passwordLimiter.failed(context.remoteAddress) }
                    throw error
                }
            },
            APIRoute(method: .get, path: "/v1/sessions/current", access: .role(.viewer), summary: "who asks, and for how long", shape: .gives(HolderView.self)) { request, _ in
                try APIResponse.json(HolderView(try await own(request)))
            },
            APIRoute(method: .delete, path: "/v1/sessions/current", access: .role(.viewer), summary: "log out: the session ends", shape: .nothing) { request, context in
                try await users.close(try await ownSession(request), who: context.who)
                return Response(status: .noContent)
            },
            APIRoute(method: .put, path: "/v1/sessions/current/password", access: .role(.viewer), summary: "change one's own password; one's other sessions end", shape: .nothing.takes(ChangePassword.self)) { request, context in
                let session = try await ownSession(request), change = try await request.decoded(ChangePassword.self)
                try passwordLimiter.check(context.remoteAddress)
                guard try await users.isRight(session.user, change.old) else {
                    try passwordLimiter.failed(context.remoteAddress)
                    throw ApplianceError.refused("The old password is another.")
                }
                try await users.setPassword(session.user, change.password, kept: session.hash, who: context.who)
                return Response(status: .noContent)
            },
            APIRoute(method: .get, path: "/v1/users", access: .role(.administrator), summary: "list users", shape: .gives([UserView].self)) { _, _ in
                try APIResponse.json(try await users.list())
            },
            APIRoute(method: .post, path: "/v1/users", access: .role(.administrator), summary: "create a user", shape: .gives(UserView.self, .created).takes(CreateUser.self)) { request, context in
                try APIResponse.json(try await users.create(try await request.decoded(CreateUser.self), who: context.who), status: .created)
            },
            APIRoute(method: .put, path: "/v1/users/{user}/password", access: .role(.administrator), summary: "set a user's password; its sessions end", shape: .nothing.takes(SetPassword.self)) { request, context in
                let password = try await request.decoded(SetPassword.self).password
                try await users.setPassword(try context.parameters.require("user"), password, who: context.who)
                return Response(status: .noContent)
            },
            APIRoute(method: .delete, path: "/v1/users/{user}", access: .role(.administrator), summary: "delete a user; its sessions end", shape: .nothing) { _, context in
                try await users.delete(try context.parameters.require("user"), who: context.who)
                return Response(status: .noContent)
            },
        ]
    }

    private func own(_ request: Request) async throws -> Holder {
        guard let holder = try await holder(request) else { throw ApplianceError.unauthorized("This session is over.") }
        return holder
    }

    private func ownSession(_ request: Request) async throws -> SessionRecord {
        guard let session = try await own(request).session else { throw ApplianceError.refused("This is a token, not a session: afterimage token revoke ends it.") }
        return session
    }
}

import Subprocess

extension PlatformOptions {
    /// For other people's programs: a session of its own, so that what the program has started is ended with it when the task is cancelled. It is all asked to end, and
    /// killed if the program itself has not ended some seconds later; with 0, killed at once.
    static func ended(withChildrenAfterSeconds seconds: Int) -> PlatformOptions {
        var options = PlatformOptions()
        options.createSession = true
        options.teardownSequence = [.send(signal: .kill, toProcessGroup: true, allowedDurationToNextStep: .milliseconds(100))]
        if seconds > 0 { options.teardownSequence.insert(.send(signal: .terminate, toProcessGroup: true, allowedDurationToNextStep: .seconds(seconds)), at: 0) }
        return options
    }
}

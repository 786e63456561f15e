/// This program's version, as the agent, the appliance and the CLI say it.
public let afterimageVersion = "0.1.0"

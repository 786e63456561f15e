import GRDB

extension Catalogue {
    /// Each version that was ever released stays here unchanged; a new one is added below it.
    static var migrator: DatabaseMigrator {
        var migrator = DatabaseMigrator()
        migrator.registerMigration("1: forward, drill, failover") { db in
            try db.create(table: "site") { t in
                t.primaryKey("name", .text)
                t.column("zone", .text)
            }
            try db.create(table: "sitePair") { t in
                t.primaryKey("name", .text)
                t.column("type", .text).notNull()
                t.column("primarySite", .text).notNull().references("site", column: "name")
                t.column("secondarySite", .text).notNull().references("site", column: "name")
                t.column("replicationNetwork", .text).notNull()
                t.column("recoveryNetwork", .text).notNull()
                t.column("created", .datetime).notNull()
            }
            try db.create(table: "server") { t in
                t.primaryKey("id", .text)
                t.column("name", .text).notNull().unique()
                t.column("sitePair", .text).notNull().references("sitePair", column: "name")
                t.column("state", .text).notNull()
                t.column("stateSince", .datetime).notNull()
                t.column("reason", .text)
                t.column("drill", .text)
                t.column("drillReason", .text)
                t.column("settings", .text)
                t.column("disks", .text).notNull()
                t.column("hostName", .text)
                t.column("agentVersion", .text)
                t.column("kernel", .text)
                t.column("certificateSerial", .text)
                t.column("enrolmentHash", .text)
                t.column("enrolmentExpires", .datetime)
                t.column("created", .datetime).notNull()
                t.column("lastSeen", .datetime)
            }
            try db.create(index: "serverByEnrolment", on: "server", columns: ["enrolmentHash"])
            try db.create(table: "instance") { t in
                t.primaryKey("id", .text)
                t.column("server", .text).notNull().references("server", column: "id", onDelete: .restrict)
                t.column("kind", .text).notNull()
                t.column("step", .text).notNull()
                t.column("point", .text)
                t.column("pointCutTimeNanoseconds", .integer).notNull()
                t.column("settings", .text).notNull()
                t.column("volumes", .text).notNull()
                t.column("generation", .integer)
                t.column("pid", .integer)
                t.column("accelerator", .text)
                t.column("accepted", .datetime).notNull()
                t.column("ready", .datetime)
                t.column("rtoMilliseconds", .integer)
                t.column("bootLine", .text)
                t.column("reason", .text)
            }
            try db.create(table: "task") { t in
                t.autoIncrementedPrimaryKey("id")
                t.column("server", .text)
                t.column("serverName", .text)
                t.column("operation", .text).notNull()
                t.column("parameters", .text).notNull()
                t.column("status", .text).notNull()
                t.column("progress", .text)
                t.column("result", .text)
                t.column("error", .text)
                t.column("who", .text).notNull()
                t.column("created", .datetime).notNull()
                t.column("finished", .datetime)
            }
            try db.create(index: "taskByServer", on: "task", columns: ["server", "status"])
            try db.create(table: "taskLog") { t in
                t.autoIncrementedPrimaryKey("id")
                t.column("task", .integer).notNull().references("task", column: "id", onDelete: .cascade).indexed()
                t.column("time", .datetime).notNull()
                t.column("line", .text).notNull()
            }
            try db.create(table: "event") { t in
                t.autoIncrementedPrimaryKey("id")
                t.column("time", .datetime).notNull()
                t.column("who", .text).notNull()
                t.column("what", .text).notNull()
                t.column("server", .text)
                t.column("before", .text)
                t.column("after", .text)
                t.column("detail", .text)
            }
            for (name, verb) in [("eventNeverChanges", "UPDATE"), ("eventNeverGoes", "DELETE")] {
                try db.execute(sql: "CREATE TRIGGER \(name) BEFORE \(verb) ON event BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END")
            }
            try db.create(table: "pointExport") { t in
                t.primaryKey("id", .text)
                t.column("server", .text).notNull().references("server", column: "id", onDelete: .restrict)
                t.column("point", .text).notNull()
                t.column("created", .datetime).notNull()
            }
            try db.create(table: "token") { t in
                t.primaryKey("name", .text)
                t.column("hash", .text).notNull().unique()
                t.column("created", .datetime).notNull()
            }
        }
        migrator.registerMigration("2: recovery point policy, mounted points") { db in
            try db.alter(table: "server") { t in
                // As people write it; see RecoveryPointPolicy(text:).
                t.add(column: "policy", .text).notNull().defaults(to: "standard")
            }
            try db.create(table: "pointMount") { t in
                t.primaryKey("id", .text)
                t.column("server", .text).notNull().references("server", column: "id", onDelete: .restrict)
                t.column("point", .text).notNull()
                t.column("disk", .text).notNull()
                t.column("partition", .integer)
                t.column("directory", .text).notNull().unique()
                t.column("fileSystem", .text)
                t.column("warning", .text)
                t.column("created", .datetime).notNull()
            }
        }
        migrator.registerMigration("3: how recovery points were proven, hosts' specifications") { db in
            try db.alter(table: "server") { t in t.add(column: "specification", .text) }
            try db.create(table: "pointProof") { t in
                t.column("server", .text).notNull().references("server", column: "id", onDelete: .cascade)
                t.column("instance", .text).notNull()
                t.column("epoch", .integer).notNull()
                t.column("proof", .text).notNull()
                t.primaryKey(["server", "instance", "epoch"])
            }
        }
        migrator.registerMigration("4: roles and ends of tokens") { db in
            try db.alter(table: "token") { t in
                t.add(column: "role", .text).notNull().defaults(to: Role.administrator.rawValue)
                t.add(column: "expires", .datetime)
            }
        }
        migrator.registerMigration("5: servers that go on when their disks are back") { db in
            try db.alter(table: "server") { t in t.add(column: "resumes", .boolean).notNull().defaults(to: false) }
        }
        migrator.registerMigration("6: the last recovery that was proven") { db in
            try db.alter(table: "server") { t in t.add(column: "lastProven", .text) }
        }
        migrator.registerMigration("7: alerts and where they are delivered") { db in
            try db.alter(table: "server") { t in t.add(column: "alertSettings", .text) }
            try db.create(table: "alert") { t in
                t.autoIncrementedPrimaryKey("id")
                t.column("kind", .text).notNull()
                t.column("severity", .text).notNull()
                t.column("subject", .text).notNull()
                t.column("text", .text).notNull()
                t.column("raised", .datetime).notNull()
                t.column("cleared", .datetime).indexed()
            }
            try db.create(table: "alertChannel") { t in
                t.primaryKey("name", .text)
                t.column("target", .text).notNull()
                t.column("severity", .text).notNull()
                t.column("created", .datetime).notNull()
            }
            try db.create(table: "alertDelivery") { t in
                t.autoIncrementedPrimaryKey("id")
                t.column("channel", .text).notNull().references("alertChannel", column: "name", onDelete: .cascade)
                t.column("alert", .integer).notNull().references("alert", column: "id", onDelete: .cascade).indexed()
                t.column("news", .text).notNull()
                t.column("created", .datetime).notNull()
                t.column("attempts", .integer).notNull()
                t.column("next", .datetime).notNull()
                t.column("error", .text)
                t.column("ended", .datetime)
            }
            try db.create(index: "alertDeliveryByChannel", on: "alertDelivery", columns: ["channel", "ended"])
        }
        migrator.registerMigration("8: users and their sessions") { db in
            try db.create(table: "user") { t in
                t.primaryKey("name", .text)
                t.column("role", .text).notNull()
                t.column("password", .text).notNull()
                t.column("created", .datetime).notNull()
                t.column("changed", .datetime).notNull()
            }
            try db.create(table: "session") { t in
                t.primaryKey("hash", .text)
                t.column("user", .text).notNull().references("user", column: "name", onDelete: .cascade).indexed()
                t.column("created", .datetime).notNull()
                t.column("expires", .datetime).notNull()
            }
        }
        migrator.registerMigration("10: scheduled drills, reports of drills") { db in
            try db.create(table: "drillSchedule") { t in
                t.primaryKey("server", .text).references("server", column: "id", onDelete: .cascade)
                t.column("everyDays", .integer).notNull()
                t.column("minuteOfDay", .integer).notNull()
                t.column("machine", .text).notNull()
                t.column("next", .datetime).notNull()
                t.column("waitsFor", .text)
                t.column("created", .datetime).notNull()
                t.column("who", .text).notNull()
            }
            try db.create(table: "drillReport") { t in
                // Its task's number. Kept after the server is gone.
                t.primaryKey("id", .integer)
                t.column("server", .text).notNull()
                t.column("serverName", .text).notNull()
                t.column("isScheduled", .boolean).notNull()
                t.column("who", .text).notNull()
                t.column("recoveryPoint", .text)
                t.column("recoveryPointTime", .datetime)
                t.column("recoveryPointAgeSeconds", .double)
                t.column("machine", .text).notNull()
                t.column("started", .datetime).notNull()
                t.column("ended", .datetime).notNull()
                t.column("result", .text).notNull()
                t.column("readySeconds", .double)
                t.column("bootLine", .text)
                t.column("accelerator", .text)
                t.column("error", .text)
                t.column("console", .text)
            }
            try db.create(index: "drillReportByServer", on: "drillReport", columns: ["serverName"])
        }
        migrator.registerMigration("12: reverse replication and failback") { db in
            try db.create(table: "reverse") { t in
                t.primaryKey("server", .text).references("server", column: "id", onDelete: .cascade)
                t.column("instance", .text).notNull()
                t.column("source", .text).notNull()
                t.column("step", .text).notNull()
                t.column("keepsOriginal", .boolean).notNull()
                t.column("disks", .text).notNull()
                t.column("confirmed", .text).notNull()
                t.column("originalPoint", .text)
                t.column("throttleBytesPerSecond", .integer).notNull()
                t.column("created", .datetime).notNull()
            }
        }
        migrator.registerMigration("9: recovery plans") { db in
            try db.create(table: "plan") { t in
                t.primaryKey("name", .text)
                t.column("groups", .text).notNull()
                t.column("created", .datetime).notNull()
                t.column("changed", .datetime).notNull()
            }
            try db.create(table: "planRun") { t in
                t.autoIncrementedPrimaryKey("id")
                t.column("plan", .text).notNull().references("plan", column: "name", onDelete: .cascade).indexed()
                t.column("kind", .text).notNull()
                t.column("isGraceful", .boolean).notNull()
                t.column("status", .text).notNull()
                t.column("who", .text).notNull()
                t.column("started", .datetime).notNull()
                t.column("ended", .datetime)
                t.column("task", .integer)
                t.column("error", .text)
            }
            try db.create(table: "planStep") { t in
                t.column("run", .integer).notNull().references("planRun", column: "id", onDelete: .cascade)
                t.column("number", .integer).notNull()
                t.column("stage", .integer).notNull()
                t.column("groupName", .text).notNull()
                t.column("kind", .text).notNull()
                t.column("work", .text).notNull()
                t.column("status", .text).notNull()
                t.column("since", .datetime)
                t.column("until", .datetime)
                t.column("tasks", .text).notNull()
                t.column("error", .text)
                t.primaryKey(["run", "number"])
            }
        }
        migrator.registerMigration("9.1: networks") { db in
            try db.create(table: "network") { t in
                t.primaryKey("name", .text)
                t.column("site", .text).notNull().references("site", column: "name")
                t.column("zone", .text).notNull()
                t.column("purpose", .text).notNull()
                t.column("mode", .text)
                t.column("bridge", .text)
                t.column("address", .text)
                t.column("created", .datetime).notNull()
            }
            try db.alter(table: "sitePair") { t in t.add(column: "recoveryNetworkName", .text) }
        }
        migrator.registerMigration("12.1: reverse replication into another appliance") { db in
            try db.alter(table: "reverse") { t in
                t.add(column: "appliance", .text)
                t.add(column: "hold", .text)
                t.add(column: "generation", .integer)
            }
        }
        migrator.registerMigration("13.1: where the source was at a machine's recovery point") { db in
            try db.alter(table: "instance") { t in t.add(column: "pointPosition", .text) }
        }
        return migrator
    }
}

#!/usr/bin/env bash
# Whatever a target imports of this package is among its dependencies. If it is not, it still builds, but a later build may leave it as it was when
# the imported module changes, with another idea of that module's types.
source "$(dirname "$(readlink -f "$0")")/../lib/testing.sh"
source "$repository/tools/lib/build.sh"

find_swift
make_run_dir
as_owner "$swift" package --package-path "$repository" --scratch-path "$build_dir" dump-package >"$run_dir/package.json" 2>/dev/null ||
    { not_ok "package" "swift package dump-package failed"; finish; }
if undeclared=$(python3 - "$repository" "$run_dir/package.json" <<'PYTHON'
import json, os, re, sys
root, package = sys.argv[1], json.load(open(sys.argv[2]))
targets = {target["name"]: target for target in package["targets"]}
wrong = []
for name, target in targets.items():
    directory = os.path.join(root, "Tests" if target["type"] == "test" else "Sources", name)
    declared = {d[kind][0] for d in target["dependencies"] for kind in ("byName", "target") if kind in d}
    for folder, _, files in os.walk(directory):
        for file in files:
            if not file.endswith(".swift"): continue
            for module in re.findall(r"^(?:@testable |package |public |internal |private )*import (?:struct |class |enum )?(\w+)", open(os.path.join(folder, file)).read(), re.M):
                if module in targets and module != name and module not in declared: wrong.append(f"{name} imports {module} ({file})")
print("; ".join(sorted(set(wrong))[:8]))
sys.exit(bool(wrong))
PYTHON
); then ok "every import is a declared dependency"; else not_ok "every import is a declared dependency" "$undeclared"; fi
finish

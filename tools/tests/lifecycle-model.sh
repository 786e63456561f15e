#!/usr/bin/env bash
# limit: 900
# Random operations on appliances, agents and machines that are killed, against a model of the state table: 10 sequences. tools/lifecycle-model runs more.
source "$(dirname "$(readlink -f "$0")")/../lib/testing.sh"

# Machines without a system boot nothing: any QEMU that is here will do, and none is fetched.
for qemu in "${AFTERIMAGE_QEMU:-}" "$cache_dir/qemu/bin/qemu-system-x86_64" "$(command -v qemu-system-x86_64 || true)"; do
    [ -z "$qemu" ] || [ ! -x "$qemu" ] || break
    qemu=
done
if [ -z "$qemu" ]; then
    skip "random operations against the model" "needs QEMU: none at AFTERIMAGE_QEMU, in the cache of tools/, or in the PATH"
else
    make_run_dir
    seed=${LIFECYCLE_SEED:-$RANDOM$RANDOM}
    check "10 random sequences from seed $seed against the model" "$(dirname "$AFTERIMAGE")/lifecycle-model" --sequences 10 --seed "$seed" --qemu "$qemu" --directory "$run_dir/m"
fi
finish

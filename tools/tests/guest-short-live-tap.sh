#!/usr/bin/env bash
# alone
# tier: short-guest
# limit: 900
# The short form of guest-live-tap.sh: the newest kernel for this Debian, a group with one disk of every kind, requests sent back, commands past the block layer, events dropped on purpose,
# and a kernel without BTF. (Deliberate mistakes are in the long form: that one is caught is likely, not certain.)
exec "$(dirname "$(readlink -f "$0")")/guest-live-tap.sh" --seconds 20 --suite "" mixed busy-host pass-through drops btf

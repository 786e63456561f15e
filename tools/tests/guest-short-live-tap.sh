#!/usr/bin/env bash
# tier: short-guest
# limit: 900
# The short form of guest-live-tap.sh: the newest kernel for this Debian, a group with one disk of every kind, and one deliberate mistake.
exec "$(dirname "$(readlink -f "$0")")/guest-live-tap.sh" --seconds 20 --suite "" mixed mutants btf

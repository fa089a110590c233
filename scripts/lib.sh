# shellcheck shell=bash
# What the scripts share; to be sourced, with `set -euo pipefail` already on.

# The top of the checkout, whatever directory the caller is in.
top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Where cargo puts what it builds. (Read by the scripts that source this.)
# shellcheck disable=SC2034
target=${CARGO_TARGET_DIR:-$top/target}

say() { printf '%s\n' "$*" >&2; }
die() {
    say "$(basename "$0"): $*"
    exit 1
}
have() { command -v "$1" >/dev/null 2>&1 || [ -x "/usr/sbin/$1" ] || [ -x "/sbin/$1" ]; }

# Runs a command as root: as it is for root, else with sudo.
as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif have sudo; then
        sudo -- "$@"
    else
        die "this needs root or sudo: $*"
    fi
}

# Common ground of the shell tests.  A test is a script that begins with
#
#     . "$(dirname "$0")/functions.sh"
#
# and then runs in an empty directory of its own, which is removed at the end.  It succeeds when it
# reaches its end, is skipped with `skip REASON`, fails with `fail REASON` or at the first command that
# fails.  From the build system: QEMU_IMG and QEMU_IO, the tools under test.  Peers are the tools of the
# same names that the system has installed: PEER_IMG, PEER_IO, empty where there are none.
#
# SPDX-License-Identifier: MIT

set -eu
export LC_ALL=C

QEMU_IMG=${QEMU_IMG:-qemu-img}
QEMU_IO=${QEMU_IO:-qemu-io}
PEER_IMG=$(command -v qemu-img || true)
PEER_IO=$(command -v qemu-io || true)
test_name=$(basename "$0")
test_source=$(cd "$(dirname "$0")" && pwd)
work_dir=$(mktemp -d "${TMPDIR:-/tmp}/qb-iotest-XXXXXX")
cleanup_commands=:
holder_pid=

# cleanup_fn COMMAND: runs COMMAND at the end, whatever happens; the last one given runs first.
cleanup_fn()
{
    cleanup_commands="$1; $cleanup_commands"
}

finish()
{
    status=$?
    trap - EXIT
    set +e
    if [ -n "$holder_pid" ]; then
        kill "$holder_pid" 2>/dev/null
        wait "$holder_pid" 2>/dev/null
    fi
    eval "$cleanup_commands"
    cd /
    rm -rf "$work_dir"
    exit $status
}
trap finish EXIT
trap 'exit 130' INT TERM
cd "$work_dir"

fail()
{
    echo "$test_name: FAIL: $*" >&2
    exit 1
}

skip()
{
    echo "$test_name: skipped: $*" >&2
    exit 77
}

# requires COMMAND...: skips the test unless the command succeeds.
requires()
{
    "$@" >/dev/null 2>&1 || skip "'$*' does not work here"
}

requires_peer()
{
    [ -n "$PEER_IMG" ] && [ -n "$PEER_IO" ] || skip "no QEMU tools installed to compare with"
}

requires_root()
{
    [ "$(id -u)" = 0 ] || skip "needs root"
}

# run COMMAND...: runs it; leaves its output, both kinds, in $out and its exit code in $rc.
run()
{
    rc=0
    out=$("$@" 2>&1) || rc=$?
}

# ok COMMAND...: must exit with 0.
ok()
{
    run "$@"
    [ "$rc" = 0 ] || fail "'$*' exited with $rc: $out"
}

# refused TEXT COMMAND...: must exit with 1 and print the line TEXT.
refused()
{
    wanted=$1
    shift
    run "$@"
    [ "$rc" = 1 ] || fail "'$*' exited with $rc, not 1: $out"
    printf '%s\n' "$out" | grep -qxF -- "$wanted" || fail "'$*' did not say '$wanted' but: $out"
}

# says TEXT: the output of the last run has the line TEXT.
says()
{
    printf '%s\n' "$out" | grep -qxF -- "$1" || fail "expected '$1' in: $out"
}

# is EXPECTED ACTUAL WHAT
is()
{
    [ "$1" = "$2" ] || fail "$3: expected '$1', got '$2'"
}

file_length()
{
    stat -c %s "$1"
}

file_usage()
{
    echo $(($(stat -c %b "$1") * 512))
}

# hold QEMU-IO-COMMAND...: starts the program with the options given, which keeps the image open, and
# returns when it has it open: its first line was answered.
hold()
{
    rm -f hold.in hold.out
    mkfifo hold.in
    "$@" <hold.in >hold.out 2>&1 &
    holder_pid=$!
    exec 9>hold.in
    echo length >&9
    hold_tries=0
    until [ -n "$(sed 's/^qemu-io> //' hold.out | grep '[0-9]')" ]; do
        kill -0 "$holder_pid" 2>/dev/null || fail "'$*' ended: $(cat hold.out)"
        hold_tries=$((hold_tries + 1))
        [ $hold_tries -lt 200 ] || fail "'$*' does not answer: $(cat hold.out)"
        sleep 0.05
    done
}

# release: ends the holder in good order.
release()
{
    exec 9>&-
    rc=0
    wait "$holder_pid" || rc=$?
    holder_pid=
    [ "$rc" = 0 ] || fail "the holder of the image exited with $rc: $(cat hold.out)"
}

# Common ground of the shell tests.  A test is a script that begins with
#
#     . "$(dirname "$0")/common.sh"
#
# and then runs in an empty directory of its own, which is removed at the end (KEEP=1 keeps it).  It
# succeeds when it reaches its end, is skipped with `skip REASON`, fails with `fail REASON` or at
# the first command that fails.  The build system gives QEMU_IMG and QEMU_IO, the tools under test;
# by hand:
#
#     QEMU_IMG=build/qemu-img/qemu-img QEMU_IO=build/qemu-io/qemu-io sh tests/qemu-iotests/NAME
#
# Peers are QEMU's own tools where the system has them installed: PEER_IMG, PEER_IO, else empty.
#
#     ok CMD...                   must succeed                     is WANTED SEEN WHAT
#     refused TEXT CMD...         must exit with 1, saying TEXT    says TEXT: the last run did
#     expect_fail STATUS CMD...   must exit with STATUS            lacks TEXT: it did not
#     expect_output WANTED CMD... must succeed and print WANTED, a text or the file of that name
#     io FORMAT FILE COMMAND...   qemu-io with each COMMAND as -c; "-": no format, no file
#     check_clean IMAGE   same_content A B   md5_of_guest IMAGE
#     requires CMD...   requires_peer   requires_root   cleanup_fn COMMAND   hold CMD...   release
#
# SPDX-License-Identifier: MIT

set -eu
export LC_ALL=C

# Absolute, as the test leaves the directory it was started in.
QEMU_IMG=$(realpath -e "${QEMU_IMG:?the qemu-img to be tested}")
QEMU_IO=$(realpath -e "${QEMU_IO:?the qemu-io to be tested}")
PEER_IMG=$(command -v qemu-img || true)
PEER_IO=$(command -v qemu-io || true)
export QEMU_IMG QEMU_IO PEER_IMG PEER_IO
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
    if [ -n "${KEEP:-}" ]; then
        echo "$test_name: kept $work_dir" >&2
    else
        rm -rf "$work_dir"
    fi
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

# lacks TEXT: it has not.
lacks()
{
    ! printf '%s\n' "$out" | grep -qxF -- "$1" || fail "did not expect '$1' in: $out"
}

# expect_fail STATUS COMMAND...: must exit with that very status, which is not 0.
expect_fail()
{
    wanted=$1
    shift
    run "$@"
    [ "$rc" = "$wanted" ] || fail "'$*' exited with $rc, not $wanted: $out"
}

# filter: makes outputs comparable.  Times and rates become T and R, the test's directory DIR.
filter()
{
    sed -E -e "s|$work_dir|DIR|g" \
        -e 's/ops; [0-9:.]+( sec)? \([0-9.]+ [A-Za-z]+\/sec and [0-9.]+ ops\/sec\)$/ops; T (R)/' \
        -e 's/^([0-9]+,[0-9]+),[0-9]+:[0-9:.]+,[0-9.]+,[0-9.]+$/\1,T,R,R/'
}

# expect_output WANTED COMMAND...: must succeed; what it prints, filtered, must be WANTED: the content
# of the file of that name, or the text itself.
expect_output()
{
    wanted=$1
    shift
    ok "$@"
    [ ! -f "$wanted" ] || wanted=$(cat "$wanted")
    out=$(printf '%s\n' "$out" | filter)
    [ "$out" = "$wanted" ] || {
        printf '%s\n' "$wanted" >wanted.txt
        printf '%s\n' "$out" | diff -u --label wanted wanted.txt --label printed - >&2 || true
        fail "'$*' printed something else"
    }
}

# io_with TOOL FORMAT FILE COMMAND...
io_with()
{
    tool=$1 format=$2 file=$3
    shift 3
    n=$#
    for command; do # each argument becomes two, at the end
        set -- "$@" -c "$command"
    done
    shift "$n"
    [ "$file" = - ] || set -- "$@" "$file"
    [ "$format" = - ] || set -- -f "$format" "$@"
    "$tool" "$@" </dev/null
}

# io FORMAT FILE COMMAND...: our qemu-io; "-" for no format, no file.
io()
{
    io_with "$QEMU_IO" "$@"
}

peer_io()
{
    io_with "$PEER_IO" "$@"
}

# check_clean IMAGE: neither our check nor the peer's finds anything.
check_clean()
{
    ok "$QEMU_IMG" check "$1"
    [ -z "$PEER_IMG" ] || ok "$PEER_IMG" check "$1"
}

# same_content A B: a guest reads the same from both.
same_content()
{
    ok "$QEMU_IMG" compare "$1" "$2"
}

# md5_of_guest IMAGE: checksum of what a guest reads.
md5_of_guest()
{
    "$QEMU_IMG" convert -O raw "$1" guest.raw
    md5sum <guest.raw
    rm -f guest.raw
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

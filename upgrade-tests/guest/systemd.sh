#!/bin/bash
# Runs in the guest of `cargo xtask systemd-guest`, as root, under a systemd that is the init: the
# units as an operator uses them, with verified load throughout. Tells on the console what was done
# (GUEST-OK), what failed (GUEST-FAILED, and the journal), and that it is over (GUEST-DONE).
set -uo pipefail
export PATH=/usr/sbin:/usr/bin

load_pids=()

power_off() {
    systemctl poweroff --force --force
    sleep infinity
}

fail() {
    echo "GUEST-FAILED $*"
    echo "---- units"
    systemctl --no-pager --full status 'nebd-*' 2>&1
    echo "---- load"
    head -n 40 /tmp/load.* 2>/dev/null
    echo "---- journal"
    journalctl -b --no-pager -o short-monotonic | tail -n 400
    power_off
}

ok() {
    echo "GUEST-OK $*"
}

# Waits for a command to succeed, 60 s at most. The guest is slow, and says so by being late only.
until_true() {
    local end=$((SECONDS + 60))
    until "$@" >/dev/null 2>&1; do
        [ "$SECONDS" -lt "$end" ] || fail "waited for: $*"
        sleep 0.1
    done
}

# property UNIT NAME
property() {
    systemctl show --value --property "$2" "$1"
}

# status LABEL: a line of nebdctl status
status() {
    nebdctl status | awk -v label="$1" 'index($0, label) == 1 {
        sub("^" label " *", ""); print; exit }'
}

server_pid() {
    nebdctl status --json | tail -n 1 | grep -o '"pid":[0-9]*' | head -n 1 | cut -d : -f 2
}

is_new_pid() {
    local now
    now=$(server_pid) && [ -n "$now" ] && [ "$now" != "$1" ]
}

# All sessions of the load are served, and a session counts its takeovers.
are_served() {
    local sessions
    sessions=$(nebdctl status --json | tail -n 1 | grep -o '"state":"serving"' | wc -l)
    [ "$sessions" -eq "${#load_pids[@]}" ]
}

# start_load VOLUME…: each until stop_load. The kill command of the load only waits: the kills are
# systemctl's.
start_load() {
    local volume
    rm -f /tmp/load.* /run/stop-load
    load_pids=()
    for volume in "$@"; do
        nice -n 10 upgrade-tests run "$volume" --depth 8 --seconds 1 --stall-seconds 120 --kill-every-ms 100 \
            --kill-command 'until test -e /run/stop-load; do sleep 0.2; done' \
            >"/tmp/load.$volume" 2>&1 &
        load_pids+=($!)
    done
    until_true are_served
}

# Ends the load, has every block read again, and fails unless all were right.
stop_load() {
    touch /run/stop-load
    local pid bad=0
    for pid in "${load_pids[@]}"; do
        wait "$pid" || bad=1
    done
    load_pids=()
    local file
    for file in /tmp/load.*; do
        echo "  ${file#/tmp/load.}: $(tr '\n' ';' <"$file")"
    done
    [ "$bad" -eq 0 ] || fail "verified load during: $1"
    ok "$1, under verified load"
}

# Bytes change hands, and not only the last server's.
load_moves() {
    local before
    before=$(requests)
    until_true more_requests_than "$before"
}

requests() {
    nebdctl status --json | tail -n 1 | grep -o '"requests":[0-9]*' | cut -d : -f 2 |
        awk '{ sum += $1 } END { print sum + 0 }'
}

more_requests_than() {
    [ "$(requests)" -gt "$1" ]
}

# taken_over OLD_PID GENERATION CAUSE: a new server has the sessions, knows the last one's
# generation, and how it ended.
taken_over() {
    until_true is_new_pid "$1"
    until_true are_served
    [ "$(status generation)" = "$(($2 + 1))" ] || fail "generation $(status generation) after $2"
    [ "$(status 'last death')" = "$3" ] || fail "last death: $(status 'last death'), not $3"
    [ "$(status 'fds kept')" = yes ] || fail "fds kept: $(status 'fds kept')"
    load_moves
}

# nothing_runs: no process of nebd's is left.
nothing_runs() {
    ! grep -l -s -e '^nebd-' /proc/[0-9]*/comm
}

# has_upgrade: whether nebdctl can do a planned takeover.
has_upgrade() {
    nebdctl upgrade --help >/dev/null 2>&1
}

# reload UNIT: the planned takeover, asked for with systemctl.
reload() {
    if ! has_upgrade; then
        echo "GUEST-SKIPPED reload of $1: nebdctl has no upgrade"
        return
    fi
    local old generation
    old=$(server_pid)
    generation=$(status generation)
    systemctl reload "$1" || fail "systemctl reload $1"
    is_new_pid "$old" || fail "reload of $1: the server is still $old"
    [ "$(status generation)" = "$((generation + 1))" ] || fail "reload of $1: generation"
    [ "$(property "$1" SubState)" = running ] || fail "reload of $1: $(property "$1" SubState)"
    if [ "$1" = nebd-server.service ]; then
        [ "$(property "$1" MainPID)" = "$(server_pid)" ] || fail "reload of $1: MainPID"
        [ "$(property "$1" NRestarts)" = "$restarts" ] || fail "reload of $1: it was restarted"
    fi
    until_true are_served
    load_moves
    ok "systemctl reload $1"
}

# As an operator installs it, see systemd/README.md. udev, which is not here, would give the device
# its group.
prepare() {
    systemd-sysusers && systemd-tmpfiles --create || fail "sysusers, tmpfiles"
    chgrp disk /dev/nvme1n1 && chmod 660 /dev/nvme1n1 || fail "the second disk"
}

activation() {
    systemctl start nebd-server.socket nebd-server-admin.socket || fail "sockets"
    [ "$(property nebd-server.service ActiveState)" = inactive ] || fail "active too early"
    nebdctl status >/dev/null || fail "no server after a connect"
    [ "$(property nebd-server.service ActiveState)" = active ] || fail "not active"
    [ "$(property nebd-server.service MainPID)" = "$(server_pid)" ] || fail "MainPID"
    [ "$(status 'fds kept')" = yes ] || fail "fds kept: $(status 'fds kept')"
    [ "$(status generation)" = 1 ] || fail "generation: $(status generation)"
    [ "$(property nebd-server.service NFileDescriptorStore)" -ge 1 ] ||
        fail "the server has not given its host page to systemd"
    nebdctl status
    ok "socket activation"
    nebdctl volume create file:image --size 16MiB >/dev/null || fail "create an image"
    nebdctl volume create file:device --path /dev/nvme1n1 >/dev/null || fail "open a block device"
    nebdctl volume create mem:memory --size 16MiB >/dev/null || fail "create memory"
    ok "an image, a block device and memory, with all the hardening"
}

under_systemd() {
    local unit=nebd-server.service pid generation restarts=0 signal cause
    start_load file:image file:device mem:memory
    [ "$(property "$unit" NFileDescriptorStore)" -ge 15 ] ||
        fail "descriptors stored: $(property "$unit" NFileDescriptorStore)"
    for signal in KILL SEGV TERM; do
        cause=killed
        [ "$signal" != SEGV ] || cause=crash
        pid=$(server_pid)
        generation=$(status generation)
        systemctl kill --signal "$signal" --kill-whom main "$unit" || fail "systemctl kill"
        taken_over "$pid" "$generation" "$cause"
        restarts=$((restarts + 1))
        [ "$(property "$unit" NRestarts)" = "$restarts" ] || fail "restarts"
        ok "systemctl kill --signal $signal: $cause, generation $((generation + 1))"
    done

    # Clients that cannot say a word: what is served comes from the store.
    pid=$(server_pid)
    kill -STOP "${load_pids[@]}"
    systemctl kill --signal KILL --kill-whom main "$unit" || fail "systemctl kill"
    until_true is_new_pid "$pid"
    until_true are_served
    nebdctl status | grep -q 'not connected' || fail "a stopped client has connected"
    kill -CONT "${load_pids[@]}"
    restarts=$((restarts + 1))
    load_moves
    ok "sessions are served out of systemd's descriptor store"

    pid=$(server_pid)
    generation=$(status generation)
    systemctl restart "$unit" || fail "systemctl restart"
    restarts=0
    taken_over "$pid" "$generation" killed
    ok "systemctl restart"

    if [ "$(property "$unit" WatchdogUSec)" != 0 ]; then
        pid=$(server_pid)
        generation=$(status generation)
        kill -STOP "$pid"
        taken_over "$pid" "$generation" watchdog
        restarts=$((restarts + 1))
        ok "a stopped server meets the watchdog"
    else
        echo "GUEST-SKIPPED watchdog: the unit has none"
    fi

    reload "$unit"
    if has_upgrade; then
        # What a planned takeover left is as good as what a start leaves.
        pid=$(server_pid)
        generation=$(status generation)
        systemctl kill --signal KILL --kill-whom main "$unit" || fail "systemctl kill"
        taken_over "$pid" "$generation" killed
        ok "a kill after a planned takeover"
    fi
    stop_load "systemd's own store"

    systemctl stop nebd-server.socket nebd-server-admin.socket "$unit" || fail "systemctl stop"
    [ "$(property "$unit" ActiveState) $(property "$unit" Result)" = "inactive success" ] ||
        fail "after stop: $(property "$unit" ActiveState) $(property "$unit" Result)"
    nothing_runs || fail "processes are left after systemctl stop"
    [ ! -e /run/nebd/nebd.sock ] || fail "the socket is left after systemctl stop"
    ok "systemctl stop"
}

under_keeper() {
    local unit=nebd-keeper.service pid generation keeper
    sed -i 's/^#standby = false/standby = true/' /etc/nebd/nebd.toml
    systemctl start "$unit" || fail "systemctl start $unit"
    start_load file:image mem:memory

    pid=$(server_pid)
    generation=$(status generation)
    kill -KILL "$pid"
    taken_over "$pid" "$generation" killed
    ok "the standby takes over"

    pid=$(server_pid)
    keeper=$(property "$unit" MainPID)
    systemctl kill --signal KILL --kill-whom main "$unit" || fail "systemctl kill"
    until_true is_other_keeper "$keeper"
    [ "$(server_pid)" = "$pid" ] || fail "the server did not outlive its keeper"
    load_moves
    ok "systemctl kill of the keeper: the server serves on"

    keeper=$(property "$unit" MainPID)
    systemctl kill --signal HUP --kill-whom main "$unit" || fail "systemctl kill"
    load_moves
    [ "$(property "$unit" MainPID) $(server_pid)" = "$keeper $pid" ] || fail "the keeper's HUP"
    ok "the keeper replaces itself"

    reload "$unit"
    stop_load "the keeper"
    systemctl stop "$unit" || fail "systemctl stop $unit"
    [ "$(property "$unit" Result)" = success ] || fail "$unit: $(property "$unit" Result)"
    until_true nothing_runs
    ok "systemctl stop of the keeper"
}

is_other_keeper() {
    [ "$(property nebd-keeper.service ActiveState)" = active ] &&
        [ "$(property nebd-keeper.service MainPID)" != "$1" ]
}

# An instance whose configuration is the sample with every key set to what it says.
instance() {
    sed -e 's/^#\([a-z_]* = \)/\1/' -e "s/^gid = .*/gid = $(getent_gid)/" -e '/^dir = /d' \
        /usr/share/nebd/nebd.toml >/etc/nebd/two.toml
    systemctl start nebd-server@two.socket nebd-server-admin@two.socket || fail "sockets of two"
    export NEBD_SOCKET=/run/nebd/two.sock
    nebdctl volume create file:image --size 16MiB >/dev/null || fail "an instance"
    local unit=nebd-server@two.service pid generation
    [ -d /var/lib/nebd-two/images ] || fail "images of the instance"
    start_load file:image
    pid=$(server_pid)
    generation=$(status generation)
    systemctl kill --signal KILL --kill-whom main "$unit" || fail "systemctl kill"
    taken_over "$pid" "$generation" killed
    stop_load "an instance"
    systemctl stop nebd-server@two.socket nebd-server-admin@two.socket "$unit" || fail "stop of two"
    unset NEBD_SOCKET
}

getent_gid() {
    awk -F : '$1 == "nebd" { print $3 }' /etc/group
}

echo "GUEST systemd $(systemctl --version | head -n 1), $(uname -r), after $(cut -d ' ' -f 1 /proc/uptime) s"
prepare
activation
under_systemd
instance
under_keeper
echo "GUEST-DONE after $(cut -d ' ' -f 1 /proc/uptime) s"
power_off

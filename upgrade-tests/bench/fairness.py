#!/usr/bin/env python3
"""A modest session beside greedy ones: what it pays, and what its share of the disk explains.

Needs nebd-server and nebdctl (cargo build --release).
Usage: upgrade-tests/bench/fairness.py [--rounds 5] [--seconds 3] [--backends mem,null,file]
                                       [--shards 1,2] [--beside 4k,1m,4k+1m] [--before DIRECTORY]

The modest session reads 4 KiB at random, one request at a time. Beside it run, each on a volume and in
a process of its own: `4k`, 4 KiB random reads at depth 128; `1m`, 1 MiB writes at depth 32; `4k+1m`, both.
In each round the modest one runs alone and beside each in turn, so that the noise of the machine is
the same for all; with `--before` the binaries there are measured in the same rounds.

What the share explains. With N sessions a fair server gives each 1/N of its shard and of the disk; a
request of the modest one waits for one turn of each of the others, there and there:

    p99 <= p99 alone + sum over the others of (turn + held)
    turn = the larger of 256 KiB and one request, at the pace of the other when it runs alone
           (a 4 KiB request costs 12 KiB of a turn; 0 on other shards)
    held = what the other may have at the disk: 32 requests and 2 MiB, at the pace of all others together
           beside the modest one (0 for `mem` and `null`, which answer at once)

Turn and held are computed from IOPS measured in the same run; without the processor time that the
other processes on the host take from the modest one. So the last columns also say what a load that
only burns processors (as many threads as the greedy sessions have, client and server) does to the modest
one: with fewer cores than threads that part is the host's scheduler, not the server. `ok` compares with the
larger of both.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
TARGET = os.environ.get("CARGO_TARGET_DIR", os.path.join(ROOT, "target"))
VOLUME_MIB = 256
MIB = 1 << 20

# op, block size, depth
MODEST = ("randread", 4096, 1)
GREEDY = {"4k": ("randread", 4096, 128), "1m": ("write", MIB, 32)}
TURN, REQUEST_COST, HELD_REQUESTS, HELD_BYTES = 256 << 10, 8 << 10, 32, 2 * MIB


def binary(directory, name):
    path = os.path.join(directory, name)
    if not os.path.exists(path):
        sys.exit(f"{path} is missing: run `cargo build --release` first")
    return path


class Host:
    """A keeper, its server with so many shards, and volumes."""

    def __init__(self, binaries, backend, shards):
        self.directory = tempfile.mkdtemp(prefix="nebd-fairness-")
        self.state = os.path.join(self.directory, "state")
        self.socket = os.path.join(self.directory, "nebd.sock")
        self.backend = backend
        config = os.path.join(self.directory, "nebd.toml")
        with open(config, "w") as file:
            file.write(f"shards = {shards}\n")
        self.nebdctl = binary(binaries, "nebdctl")
        self.log = open(os.path.join(self.directory, "log"), "w")
        self.keeper = subprocess.Popen(
            [binary(binaries, "nebd-server"), "keeper", "--config", config, "--socket", self.socket,
             "--state-dir", self.state], stderr=self.log)
        for _ in range(500):
            if os.path.exists(os.path.join(self.state, "server.pid")):
                break
            time.sleep(0.02)
        for name in ("modest", *GREEDY):
            volume = f"{backend}:{name}"
            command = [self.nebdctl, "--socket", self.socket, "volume", "create", volume, "--size",
                       f"{VOLUME_MIB}MiB"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            # Written once, so that reads meet allocated blocks.
            if backend != "null":
                finish(self.load(name, ("write", MIB, 4), 2))

    def load(self, name, load, seconds):
        op, block_size, depth = load
        return subprocess.Popen(
            [self.nebdctl, "--socket", self.socket, "bench", "--volume", f"{self.backend}:{name}",
             "--op", op, "--block-size", str(block_size), "--iodepth", str(depth), "--queues", "1",
             "--seconds", str(seconds), "--json"], stdout=subprocess.PIPE, text=True)

    def beside(self, names, seconds):
        """The modest one's result and the IOPS of each of the others."""
        # They begin earlier and end later.
        others = [self.load(name, GREEDY[name], seconds + 2) for name in names]
        time.sleep(0.7 if others else 0)
        modest = finish(self.load("modest", MODEST, seconds))
        return modest, [finish(other)["iops"] for other in others]

    def beside_burners(self, count, seconds):
        """The modest one's result beside threads that only burn processors."""
        burners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
        try:
            return finish(self.load("modest", MODEST, seconds))
        finally:
            for burner in burners:
                burner.kill()
                burner.wait()

    def stop(self):
        self.keeper.terminate()
        self.keeper.wait()
        shutil.rmtree(self.directory, ignore_errors=True)


def finish(process):
    out, _ = process.communicate()
    if process.returncode:
        sys.exit(f"{process.args} failed")
    result = json.loads(out.strip().splitlines()[-1])
    if result["errors"] or result["mismatches"]:
        sys.exit(f"nebdctl bench: {result}")
    return result


def explained_us(backend, shards, names, alone_iops, beside_iops):
    """What turns and shares at the disk add, by the formula above."""
    total = 0
    for name in names:
        _, block_size, depth = GREEDY[name]
        turn = max(1, TURN // (block_size + REQUEST_COST))
        # With two shards the modest one has its own, as long as there are no more than two sessions.
        if shards == 1 or len(names) > 1:
            total += turn / alone_iops[name] * 1e6
        if backend == "file":
            held = max(1, min(depth, HELD_REQUESTS, HELD_BYTES // block_size))
            total += held / beside_iops[name] * 1e6
    return total


def measure(host, shards, beside, seconds):
    """One round: a row for each of what is beside."""
    alone = finish(host.load("modest", MODEST, seconds))["latency_us"]
    kinds = sorted({name for names in beside for name in names})
    paces = {name: finish(host.load(name, GREEDY[name], 1))["iops"] for name in kinds}
    burnt = {count: host.beside_burners(count, seconds)["latency_us"]["p99"]
             for count in sorted({len(names) + 1 for names in beside})}
    rows = {}
    for names in beside:
        modest, iops = host.beside(names, seconds)
        iops = dict(zip(names, iops))
        rows["+".join(names)] = {
            "alone_p50": alone["p50"], "alone_p99": alone["p99"],
            "p50": modest["latency_us"]["p50"], "p99": modest["latency_us"]["p99"],
            "share": alone["p99"] + explained_us(host.backend, shards, names, paces, iops),
            "burnt": burnt[len(names) + 1], "greedy": sum(iops.values()),
        }
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", default="mem,null,file")
    parser.add_argument("--shards", default="1,2")
    parser.add_argument("--beside", default="4k,1m,4k+1m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=3)
    parser.add_argument("--before", help="directory of other binaries, measured in turn with ours")
    options = parser.parse_args()
    beside = [names.split("+") for names in options.beside.split(",")]
    sides = {"now": os.path.join(TARGET, "release")}
    if options.before:
        sides = {"before": options.before, **sides}
    print(f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, kernel {platform.release()}, "
          f"{options.rounds} rounds of {options.seconds} s; µs of the modest session, medians\n")
    print("| backend, shards | beside | binaries | p50 alone | p50 beside | p99 alone | p99 beside "
          "| p99 by its share | p99 beside burners | greedy IOPS | ok |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for backend in options.backends.split(","):
        for shards in map(int, options.shards.split(",")):
            hosts = {}
            try:
                for side, binaries in sides.items():
                    hosts[side] = Host(binaries, backend, shards)
                rounds = [{side: measure(host, shards, beside, options.seconds)
                           for side, host in hosts.items()} for _ in range(options.rounds)]
            finally:
                for host in hosts.values():
                    host.stop()
            for names in map("+".join, beside):
                for side in sides:
                    row(f"{backend}, {shards}", names, side, [rows[side][names] for rows in rounds])


def row(case, names, side, rows):
    median = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    is_ok = median["p99"] <= max(median["share"], median["burnt"])
    keys = ("alone_p50", "p50", "alone_p99", "p99", "share", "burnt", "greedy")
    print(f"| {case} | {names} | {side} | " + " | ".join(f"{median[key]:,.0f}" for key in keys)
          + f" | {'yes' if is_ok else 'no'} |", flush=True)


if __name__ == "__main__":
    main()

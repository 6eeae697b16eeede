#!/usr/bin/env python3
"""Blackouts of takeovers: for each volume the longest gap between completions while requests waited.

Needs nebd-server and nebdctl (cargo build --release).
Usage: upgrade-tests/bench/takeover.py [--sessions 1,64,256,1024] [--cases file-1,null-8] [--rounds 3]
                                       [--kinds none,planned,sigkill,sigsegv]
       upgrade-tests/bench/takeover.py --throughput [--sessions 64] [--cases null-8] [--rounds 10] [--seconds 60]

Each round runs the same load without a takeover and with one of each kind, in turn, so that the noise
of the machine can be told from the takeover. Printed are medians over the rounds of each run's
median, 99th percentile and worst volume, in milliseconds. With --throughput: requests of a run with
a planned takeover in its middle over those of one without, in pairs. Everything runs in a temporary
directory.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
VOLUME_MIB = 4
SIGNALS = {"sigkill": signal.SIGKILL, "sigsegv": signal.SIGSEGV}
CORE_BYTES = resource.RLIM_INFINITY


def binary(name):
    target = os.environ.get("CARGO_TARGET_DIR", os.path.join(ROOT, "target"))
    path = os.path.join(target, "release", name)
    if not os.path.exists(path):
        sys.exit(f"{path} is missing: run `cargo build --release` first")
    return path


def set_limits():
    """Core dumps, and as many descriptors as may be: a session of `file` takes some 20."""
    resource.setrlimit(resource.RLIMIT_CORE, (CORE_BYTES, CORE_BYTES))
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


class NotMeasured(Exception):
    """This machine cannot carry out a case."""


class Host:
    """A keeper with a warm standby, and volumes."""

    def __init__(self, backend, sessions):
        self.directory = tempfile.mkdtemp(prefix="nebd-takeover-")
        self.state = os.path.join(self.directory, "state")
        self.socket = os.path.join(self.directory, "nebd.sock")
        config = os.path.join(self.directory, "nebd.toml")
        with open(config, "w") as file:
            file.write("[keeper]\nstandby = true\n")
        self.log = open(os.path.join(self.directory, "log"), "w")
        self.keeper = subprocess.Popen(
            [binary("nebd-server"), "keeper", "--config", config, "--socket", self.socket,
             "--state-dir", self.state], stderr=self.log, cwd=self.directory,
            preexec_fn=set_limits)
        for _ in range(500):
            if os.path.exists(os.path.join(self.state, "server.pid")):
                break
            time.sleep(0.02)
        self.backend, self.sessions, self.client = backend, sessions, None
        for index in range(sessions):
            self.ctl("volume", "create", f"{backend}:v{index}", "--size", f"{VOLUME_MIB}MiB")

    def command(self, *arguments):
        return [binary("nebdctl"), "--socket", self.socket, *arguments]

    def ctl(self, *arguments):
        return subprocess.run(self.command(*arguments), check=True, stdout=subprocess.PIPE,
                              text=True).stdout

    def server_pid(self):
        with open(os.path.join(self.state, "server.pid")) as file:
            return int(file.read())

    def load(self, op, block_size, depth, seconds):
        self.client = subprocess.Popen(
            self.command("bench", "--volume", f"{self.backend}:v{{}}", "--sessions",
                         str(self.sessions), "--op", op, "--block-size", str(block_size),
                         "--iodepth", str(depth), "--queues", "1", "--seconds", str(seconds),
                         "--json"), stdout=subprocess.PIPE, text=True)
        return self.client

    def run(self, kind, depth, seconds):
        load = self.load("randwrite", 4096, depth, seconds)
        time.sleep(seconds / 2 + self.sessions * 0.002)
        steps = None
        if kind == "planned":
            try:
                out = self.ctl("upgrade", "--probation", "none", "--json")
            except subprocess.CalledProcessError as error:
                raise NotMeasured("the upgrade is refused or failed, see above") from error
            steps = {step["name"]: step for step in json.loads(out)["steps"]}
        elif kind in SIGNALS:
            os.kill(self.server_pid(), SIGNALS[kind])
        out, _ = load.communicate()
        if load.returncode and not out.strip():
            raise NotMeasured("the volumes cannot be attached, see above")
        result = json.loads(out.strip().splitlines()[-1])
        if result["errors"] or result["mismatches"]:
            sys.exit(f"nebdctl bench: {result}")
        return result, steps

    def stop(self):
        # Without a server it would wait for ever.
        if self.client and self.client.poll() is None:
            self.client.kill()
            self.client.wait()
        self.keeper.terminate()
        self.keeper.wait()
        shutil.rmtree(self.directory, ignore_errors=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sessions", default="1,64,256,1024")
    parser.add_argument("--cases", default="file-1,null-8")
    parser.add_argument("--kinds", default="none,planned,sigkill")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=4)
    parser.add_argument("--throughput", action="store_true")
    options = parser.parse_args()
    print(f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, kernel {platform.release()}, "
          f"{options.rounds} rounds of {options.seconds} s\n")
    if options.throughput:
        print("| volumes | load | IOPS without | with a takeover over without: median [each pair] |")
        print("| --- | --- | --- | --- |")
    else:
        print("The longest gap of each volume, in ms:\n")
        print("| volumes | load | kind | p50 | p99 | worst | less no takeover: p50 / p99 / worst |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
    for case in options.cases.split(","):
        backend, depth = case.rsplit("-", 1)
        for sessions in map(int, options.sessions.split(",")):
            measured = throughput if options.throughput else measure
            try:
                measured(backend, int(depth), sessions, options)
            except NotMeasured as why:
                print(f"| {sessions} | {backend}, depth {depth} | not measured: {why} |", flush=True)


def throughput(backend, depth, sessions, options):
    host = Host(backend, sessions)
    try:
        ratios, without = [], []
        for pair in range(options.rounds):
            iops = {}
            # The order changes, so that a machine that gets slower favours neither.
            for kind in ("none", "planned") if pair % 2 else ("planned", "none"):
                iops[kind] = host.run(kind, depth, options.seconds)[0]["iops"]
            ratios.append(iops["planned"] / iops["none"])
            without.append(iops["none"])
    finally:
        host.stop()
    pairs = " ".join(f"{ratio:.3f}" for ratio in sorted(ratios))
    print(f"| {sessions} | {backend}, depth {depth} | {statistics.median(without):,.0f} "
          f"| {statistics.median(ratios):.3f} [{pairs}] |", flush=True)


def measure(backend, depth, sessions, options):
    host = Host(backend, sessions)
    try:
        if backend == "file":
            host.load("write", 1 << 20, 1, 2).communicate()
        rows = {kind: [] for kind in options.kinds.split(",")}
        for _ in range(options.rounds):
            for kind, results in rows.items():
                result, _ = host.run(kind, depth, options.seconds)
                results.append([result[f"blackout_ms_{q}"] for q in ("p50", "p99", "max")])
    finally:
        host.stop()
    medians = {kind: [statistics.median(column) for column in zip(*results)]
               for kind, results in rows.items()}
    quiet = medians.get("none", [0, 0, 0])
    for kind, (p50, p99, worst) in medians.items():
        less = " / ".join(f"{max(0, a - b):.1f}" for a, b in zip((p50, p99, worst), quiet))
        print(f"| {sessions} | {backend}, depth {depth} | {kind} | {p50:.1f} | {p99:.1f} | {worst:.1f} "
              f"| {less if kind != 'none' else '–'} |", flush=True)


if __name__ == "__main__":
    main()

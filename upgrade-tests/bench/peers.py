#!/usr/bin/env python3
"""nebd beside its peers in one run: pairs of runs, in turn, so that a noisy machine is noisy for both.

Needs: nebd-server, nebdctl and upgrade-tests (cargo build --release), fio with its nbd engine, nbdkit,
qemu-nbd, qemu-storage-daemon; for the last cases a C compiler. libnebd is built on demand.
vhost-user-blk is driven without a guest by `upgrade-tests drive`, our server and the peer alike; with
-poll the driver looks for answers all the time, otherwise it sleeps until it is called, as a guest.
Usage: upgrade-tests/bench/peers.py [--pairs 10] [--seconds 3] [--only mem-randread-1,...]

Prints one row a case: medians, the ratio pair by pair (median, min, max), CPU per IO of client and
server together. Everything runs in a temporary directory and on Unix sockets, and is ended by pid.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
TICKS = os.sysconf("SC_CLK_TCK")
SIZE_MIB = 1024
# Of the peer's disk in memory: the faster of the two that tmpfs knows.
QSD_AIO = "threads"

# name, backend, op, block size, depth, peer
CASES = [
    ("mem-randread-1", "mem", "randread", 4096, 1, "nbdkit"),
    ("mem-randwrite-1", "mem", "randwrite", 4096, 1, "nbdkit"),
    # Both sides poll and never sleep.
    ("mem-randread-1-poll", "mem", "randread", 4096, 1, "nbdkit"),
    ("mem-randread-32", "mem", "randread", 4096, 32, "nbdkit"),
    ("mem-randwrite-32", "mem", "randwrite", 4096, 32, "nbdkit"),
    ("mem-read-1m-8", "mem", "read", 1 << 20, 8, "nbdkit"),
    ("mem-write-1m-8", "mem", "write", 1 << 20, 8, "nbdkit"),
    ("file-randread-1", "file", "randread", 4096, 1, "fio"),
    ("file-randread-32", "file", "randread", 4096, 32, "fio"),
    ("file-randwrite-1", "file", "randwrite", 4096, 1, "fio"),
    ("file-randwrite-32", "file", "randwrite", 4096, 32, "fio"),
    # The part client beside the peer's vhost-user-blk.
    ("null-randread-32", "null", "randread", 4096, 32, "vhost-user-blk"),
    ("null-randwrite-32", "null", "randwrite", 4096, 32, "vhost-user-blk"),
    # vhost-user-blk on both sides: names begin with vhost.
    *((f"vhost-{backend}-{op}-{depth}{poll}", backend, op, 4096, depth, "vhost-user-blk")
      for backend in ("mem", "null") for op in ("randread", "randwrite") for depth in (1, 32)
      for poll in ("", "-poll")),
    # libnebd.h beside nebd.h, by the same C program.
    ("api-randread-1", "mem", "randread", 4096, 1, "nebd.h"),
    ("api-randread-32", "mem", "randread", 4096, 32, "nebd.h"),
    ("file-randwrite-32-nbd", "file", "randwrite", 4096, 32, "qemu-nbd"),
]


def binary(name):
    target = os.environ.get("CARGO_TARGET_DIR", os.path.join(ROOT, "target"))
    path = os.path.join(target, "release", name)
    if not os.path.exists(path):
        sys.exit(f"{path} is missing: run `cargo build --release` first")
    return path


TARGET = os.environ.get("CARGO_TARGET_DIR", os.path.join(ROOT, "target"))


def drive(socket, server, op, block_size, depth, seconds, poll):
    """Loads a vhost-user-blk server, whose process is `server`, without a guest."""
    command = [binary("upgrade-tests"), "drive", socket, "--op", op, "--block-size", str(block_size),
               "--depth", str(depth), "--seconds", str(seconds), "--no-straddling", *(["--poll"] if poll else [])]
    before, own = cpu_s(server), os.times()
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    after = os.times()
    result = json.loads(out)
    cpu = (after.children_user - own.children_user) + (after.children_system - own.children_system)
    cpu += cpu_s(server) - before
    return {"iops": result["iops"], "p50_us": result["latency_us"]["p50"],
            "p99_us": result["latency_us"]["p99"], "cpu_us": cpu / result["requests"] * 1e6}


def api_program(curve):
    """The C program over libnebd.h or nebd.h, linked with an installed libnebd; its environment."""
    prefix = os.path.join(TARGET, "bench-prefix")
    library = os.path.join(prefix, "lib")
    if not os.path.exists(os.path.join(library, "libnebd.so")):
        subprocess.run(["cargo", "xtask", "install", "--library-only", "--prefix", prefix], cwd=ROOT,
                       check=True, stdout=subprocess.DEVNULL)
    program = os.path.join(TARGET, "bench-api-curve" if curve else "bench-api")
    subprocess.run(["cc", "-O2", *(["-DCURVE"] if curve else []), "-I", os.path.join(prefix, "include"),
                    "-o", program, os.path.join(ROOT, "upgrade-tests/bench/api.c"), "-L", library,
                    "-lnebd"], check=True)
    return program, {**os.environ, "LD_LIBRARY_PATH": library}


def cpu_s(pid):
    """User and system time of a process and its waited-for children, in seconds."""
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rsplit(")", 1)[1].split()
    return sum(int(field) for field in fields[11:15]) / TICKS


def wait_for(path, process):
    for _ in range(500):
        if os.path.exists(path):
            return
        if process.poll() is not None:
            break
        time.sleep(0.02)
    sys.exit(f"{process.args[0]} did not start")


class Nebd:
    """A keeper, its server, and one volume."""

    def __init__(self, directory, backend):
        self.socket = os.path.join(directory, "nebd.sock")
        self.state = os.path.join(directory, "state")
        self.log = open(os.path.join(directory, "nebd.log"), "w")
        self.keeper = subprocess.Popen(
            [binary("nebd-server"), "keeper", "--socket", self.socket, "--state-dir", self.state],
            stderr=self.log,
        )
        wait_for(self.socket, self.keeper)
        wait_for(os.path.join(self.state, "server.pid"), self.keeper)
        self.volume = f"{backend}:bench"
        self.ctl("volume", "create", self.volume, "--size", f"{SIZE_MIB}MiB")

    def ctl(self, *arguments):
        command = [binary("nebdctl"), "--socket", self.socket, *arguments]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

    def run(self, op, block_size, depth, seconds, poll=False):
        output = self.ctl(
            "bench", "--volume", self.volume, "--op", op, "--block-size", str(block_size),
            "--iodepth", str(depth), "--queues", "1", "--seconds", str(seconds), "--json",
            *(["--poll"] if poll else []),
        )
        result = json.loads(output.strip().splitlines()[-1])
        if result["errors"] or result["mismatches"]:
            sys.exit(f"nebdctl bench: {result}")
        requests = result["iops"] * seconds
        cpu = result["cpu_s"]["client"] + result["cpu_s"]["server"]
        return {
            "iops": result["iops"],
            "p50_us": result["latency_us"]["p50"],
            "p99_us": result["latency_us"]["p99"],
            "cpu_us": cpu / requests * 1e6 if requests else 0,
        }

    def server(self):
        with open(os.path.join(self.state, "server.pid")) as pid:
            return int(pid.read())

    def attach(self):
        """Has the volume served by vhost-user-blk."""
        output = self.ctl("attach", self.volume, "--as", "vhost-user", "--json")
        self.vhost = json.loads(output.strip().splitlines()[-1])["socket"]

    def run_vhost(self, *load):
        return drive(self.vhost, self.server(), *load)

    def run_api(self, depth, seconds, curve):
        """The same load by a C program."""
        program, environment = api_program(curve)
        server = self.server()
        before = cpu_s(server)
        out = subprocess.run([program, self.volume, str(depth), str(seconds)], check=True,
                             env={**environment, "NEBD_SOCKET": self.socket},
                             stdout=subprocess.PIPE, text=True).stdout
        result = json.loads(out)
        cpu = result["cpu_s"] + cpu_s(server) - before
        return {"iops": result["iops"], "p50_us": 0, "p99_us": 0,
                "cpu_us": cpu / result["requests"] * 1e6}

    def stop(self):
        self.keeper.terminate()
        self.keeper.wait()


def fio(target, op, block_size, depth, seconds, server=None):
    command = [
        "fio", "--name=peer", *target, f"--rw={op}", f"--bs={block_size}", f"--iodepth={depth}",
        f"--runtime={seconds}", "--time_based", f"--size={SIZE_MIB}M", "--norandommap",
        "--lat_percentiles=1", "--output-format=json",
    ]
    before = cpu_s(server) if server else 0
    own = os.times()
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    after = os.times()
    job = json.loads(out[out.index("{"):])["jobs"][0]
    side = max(job["read"], job["write"], key=lambda side: side["total_ios"])
    cpu = (after.children_user - own.children_user) + (after.children_system - own.children_system)
    cpu += (cpu_s(server) - before) if server else 0
    percentile = side["lat_ns"]["percentile"]
    return {
        "iops": side["iops"],
        "p50_us": percentile["50.000000"] / 1e3,
        "p99_us": percentile["99.000000"] / 1e3,
        "cpu_us": cpu / side["total_ios"] * 1e6,
    }


class Peer:
    """What the case is measured beside."""

    def __init__(self, kind, directory, image, backend):
        self.server = self.memory = None
        self.is_vhost = kind == "vhost-user-blk"
        self.socket = socket = os.path.join(directory, "peer.sock")
        # fio works on the very file of our volume: where a file lies changes what a disk does.
        image = image if kind == "fio" else os.path.join(directory, "peer.img")
        if kind == "nbdkit":
            self.server = subprocess.Popen(
                ["nbdkit", "--foreground", "--unix", socket, "memory", f"{SIZE_MIB}M"])
        elif kind == "vhost-user-blk":
            if backend == "null":
                node = f"driver=null-co,node-name=disk,size={SIZE_MIB << 20},read-zeroes=off"
            else:
                self.memory = tempfile.NamedTemporaryFile(dir="/dev/shm", prefix="nebd-bench-")
                self.memory.truncate(SIZE_MIB << 20)
                node = f"driver=file,node-name=disk,filename={self.memory.name},aio={QSD_AIO}"
            export = f"type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={socket},writable=on"
            self.server = subprocess.Popen(
                ["qemu-storage-daemon", "--blockdev", node, "--export", export])
        elif kind == "qemu-nbd":
            # Written once, so that reads meet allocated blocks, as on our side.
            subprocess.run(["dd", "if=/dev/urandom", f"of={image}", "bs=1M", f"count={SIZE_MIB}"],
                           check=True, stderr=subprocess.DEVNULL)
        if kind == "qemu-nbd":
            self.server = subprocess.Popen(
                ["qemu-nbd", "--format=raw", "--cache=none", "--aio=io_uring", "--persistent",
                 "--socket", socket, image])
        if self.server:
            wait_for(socket, self.server)
            self.target = ["--ioengine=nbd", f"--uri=nbd+unix:///?socket={socket}"]
        else:
            self.target = ["--ioengine=io_uring", "--direct=1", f"--filename={image}"]

    def run_vhost(self, *load):
        return drive(self.socket, self.server.pid, *load)

    def run(self, op, block_size, depth, seconds):
        if self.is_vhost:
            return self.run_vhost(op, block_size, depth, seconds, False)
        pid = self.server.pid if self.server else None
        return fio(self.target, op, block_size, depth, seconds, pid)

    def stop(self):
        if self.server:
            self.server.send_signal(signal.SIGTERM)
            self.server.wait()
        if self.memory:
            self.memory.close()


def spread(values, digits=2):
    return f"{statistics.median(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def run_case(case, pairs, seconds):
    name, backend, op, block_size, depth, kind = case
    directory = tempfile.mkdtemp(prefix="nebd-bench-")
    ours = peer = None
    try:
        ours = Nebd(directory, backend)
        if kind == "nebd.h":
            ours.run("write", 1 << 20, 8, 2)
            return report(name, kind, [
                (ours.run_api(depth, seconds, True), ours.run_api(depth, seconds, False))
                for _ in range(pairs)])
        peer = Peer(kind, directory, os.path.join(ours.state, "images", "bench.img"), backend)
        # Fill, so that both sides read what was written.
        ours.run("write", 1 << 20, 8, 2)
        if kind == "nbdkit":
            peer.run("write", 1 << 20, 8, 2)
        poll = name.endswith("-poll")
        if name.startswith("vhost"):
            ours.attach()
            for side in (ours, peer):
                side.run_vhost("write", 64 << 10, 8, 1, False)
            load = (op, block_size, depth, seconds, poll)
            return report(name, kind, [
                (ours.run_vhost(*load), peer.run_vhost(*load)) for _ in range(pairs)])
        rows = [(ours.run(op, block_size, depth, seconds, poll),
                 peer.run(op, block_size, depth, seconds)) for _ in range(pairs)]
    finally:
        for side in (ours, peer):
            if side:
                side.stop()
        shutil.rmtree(directory, ignore_errors=True)
    report(name, kind, rows)


def report(name, kind, rows):
    median = lambda side, key: statistics.median(row[side][key] for row in rows)
    ratios = [a["iops"] / b["iops"] for a, b in rows]
    cpu = [a["cpu_us"] / b["cpu_us"] for a, b in rows if b["cpu_us"]]
    print(f"| {name} | {kind} | {median(0, 'iops'):,.0f} | {median(1, 'iops'):,.0f} | {spread(ratios)} "
          f"| {median(0, 'p50_us'):.1f} / {median(1, 'p50_us'):.1f} "
          f"| {median(0, 'cpu_us'):.1f} / {median(1, 'cpu_us'):.1f} ({spread(cpu)}) |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--seconds", type=int, default=3)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    wanted = [name for name in options.only.split(",") if name]
    print(f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, kernel {platform.release()}, "
          f"{options.pairs} pairs of {options.seconds} s; medians, ratios as median [min, max]\n")
    print("| case | peer | IOPS nebd | IOPS peer | IOPS ratio | p50 µs nebd / peer "
          "| CPU µs per IO nebd / peer (ratio) |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for case in CASES:
        if not wanted or case[0] in wanted:
            run_case(case, options.pairs, options.seconds)


if __name__ == "__main__":
    main()

/* SPDX-License-Identifier: Apache-2.0
 *
 * The only program of the guest: stamps and verifies its disk, tells how it went on the console, and
 * powers off. Compiled with `cc -static`; SECONDS is how long.
 *
 * Four processes have a quarter of the disk each. A sector's stamp is its number and how often it
 * was written; reads and writes begin and end at any sector, so that most blocks of the volume are
 * written in parts too.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <linux/fs.h>

#define SECTOR 512
#define SECTORS_MAX 128
#define WORKERS 4

static const char *const modules[] = {
    "virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci",
    "virtio_blk",
};

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static void power_off(void) {
    fflush(stdout);
    reboot(RB_POWER_OFF);
    for (;;)
        pause();
}

static void fail(const char *what) {
    printf("GUEST-FAILED %s: %s\n", what, strerror(errno));
    fflush(stdout);
}

static void stamp(uint64_t *words, uint64_t sector, uint64_t count) {
    for (unsigned i = 0; i < SECTOR / 8; i++)
        words[i] = count == 0 ? 0 : (sector << 24 ^ count) * 0x9e3779b97f4a7c15u + i;
}

/* Never written reads as zeros. */
static int is_right(const uint64_t *words, uint64_t sector, uint64_t count) {
    uint64_t expected[SECTOR / 8];
    stamp(expected, sector, count);
    return memcmp(words, expected, SECTOR) == 0;
}

static int check(int disk, char *buffer, const uint32_t *counts, uint64_t base, uint64_t from,
                 uint64_t sectors) {
    ssize_t bytes = (ssize_t)(sectors * SECTOR);
    if (pread(disk, buffer, (size_t)bytes, (off_t)((base + from) * SECTOR)) != bytes) {
        fail("read");
        return 1;
    }
    for (uint64_t i = 0; i < sectors; i++) {
        if (!is_right((uint64_t *)(buffer + i * SECTOR), base + from + i, counts[from + i])) {
            printf("GUEST-WRONG sector %llu\n", (unsigned long long)(base + from + i));
            return 1;
        }
    }
    return 0;
}

static int work(int disk, unsigned worker, uint64_t base, uint64_t sectors) {
    uint32_t *counts = calloc(sectors, sizeof *counts);
    char *buffer = NULL;
    if (!counts || posix_memalign((void **)&buffer, 4096, SECTORS_MAX * SECTOR)) {
        fail("memory");
        return 1;
    }
    unsigned long writes = 0, reads = 0;
    double end = now() + SECONDS, gap = 0;
    srandom(worker + 1);
    while (now() < end) {
        uint64_t length = 1 + (uint64_t)random() % SECTORS_MAX;
        uint64_t from = (uint64_t)random() % (sectors - length);
        if (random() % 2) { /* whole blocks of 4 KiB */
            from &= ~7ull;
            length = (length + 7) & ~7ull;
        }
        double begin = now();
        if (random() % 2) {
            for (uint64_t i = 0; i < length; i++)
                stamp((uint64_t *)(buffer + i * SECTOR), base + from + i, ++counts[from + i]);
            ssize_t bytes = (ssize_t)(length * SECTOR);
            if (pwrite(disk, buffer, (size_t)bytes, (off_t)((base + from) * SECTOR)) != bytes) {
                fail("write");
                return 1;
            }
            if (++writes % 64 == 0 && fsync(disk)) {
                fail("fsync");
                return 1;
            }
        } else {
            reads++;
            if (check(disk, buffer, counts, base, from, length))
                return 1;
        }
        if (now() - begin > gap)
            gap = now() - begin;
    }
    for (uint64_t at = 0; at < sectors; at += SECTORS_MAX) {
        uint64_t left = sectors - at;
        if (check(disk, buffer, counts, base, at, left < SECTORS_MAX ? left : SECTORS_MAX))
            return 1;
    }
    printf("GUEST-WORKER %u writes %lu reads %lu longest-ms %.0f\n", worker, writes, reads,
           gap * 1000);
    fflush(stdout);
    return 0;
}

int main(void) {
    mkdir("/dev", 0755);
    mount("dev", "/dev", "devtmpfs", 0, NULL);
    int console = open("/dev/console", O_RDWR);
    if (console >= 0)
        for (int fd = 0; fd < 3; fd++)
            dup2(console, fd);
    for (unsigned i = 0; i < sizeof modules / sizeof *modules; i++) {
        char path[64];
        snprintf(path, sizeof path, "/modules/%s.ko", modules[i]);
        int file = open(path, O_RDONLY | O_CLOEXEC);
        if (file < 0 || (syscall(SYS_finit_module, file, "", 0) && errno != EEXIST))
            fail(path);
    }
    int disk = -1;
    for (int tries = 0; tries < 100 && disk < 0; tries++) {
        disk = open("/dev/vda", O_RDWR | O_DIRECT | O_CLOEXEC);
        if (disk < 0)
            usleep(50000);
    }
    uint64_t bytes = 0;
    if (disk < 0 || ioctl(disk, BLKGETSIZE64, &bytes)) {
        fail("/dev/vda");
        power_off();
    }
    printf("GUEST-READY %llu\n", (unsigned long long)bytes);
    fflush(stdout);
    uint64_t quarter = bytes / SECTOR / WORKERS;
    for (unsigned worker = 0; worker < WORKERS; worker++)
        if (fork() == 0)
            _exit(work(disk, worker, quarter * worker, quarter));
    int failed = 0, status;
    while (wait(&status) > 0)
        failed |= status != 0;
    printf(failed ? "GUEST-FAILED\n" : "GUEST-DONE\n");
    power_off();
}

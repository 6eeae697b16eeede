/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Verified IO on a nebd volume, through the asynchronous C interface.
 *
 *   cc -o verified_io verified_io.c $(pkg-config --cflags --libs nebd)
 *   ./verified_io [--seconds N] [--depth N] [--blocks N] [--poll] BACKEND:NAME
 *
 * Keeps `depth` requests in flight on the volume's first blocks, WHOSE CONTENTS IT OVERWRITES. Every
 * write carries a stamp of its own (block, version) through the whole block; every read is compared
 * with what the last completed request left there. FUA, flush, discard and write-zeroes are mixed
 * in. At the end, which SIGINT and SIGTERM bring on early, all blocks are read again. The server may
 * be killed or replaced meanwhile.
 *
 * Exit code: 0 if every byte was right and no request failed, 1 otherwise, 2 for wrong usage.
 */
#include <nebd.h>

#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { BLOCK_BYTES = 4096, WORDS = BLOCK_BYTES / 8, DEPTH_MAX = 128, HOT_BLOCKS = 8 };

enum operation { READ, WRITE, FLUSH, DISCARD, WRITE_ZEROES };
static const char *const operation_names[] = {"read", "write", "flush", "discard", "write-zeroes"};

/* What a block may hold: the stamp of `version`, or zeros, or either; nothing is known at first. */
struct block {
    uint64_t version;
    bool may_be_stamp;
    bool may_be_zero;
    bool in_use; /* by a request in flight: two at once on one block have no order */
};

/* One of the requests in flight. */
struct slot {
    struct test *test;
    enum operation operation;
    uint64_t block;
    uint64_t version;
    uint64_t *data;
    bool in_arena;
    bool busy;
    bool done; /* under the test's lock, as `result` is */
    int result;
};

struct test {
    nebd_volume *volume;
    bool poll_mode;
    uint32_t can; /* NEBD_INFO_CAN_... */
    uint32_t depth;
    uint64_t block_count;
    struct block *blocks;
    struct slot slots[DEPTH_MAX];
    uint64_t random;
    uint64_t version_next;

    pthread_mutex_t lock;
    pthread_cond_t some_done;

    uint64_t requests;
    uint64_t errors;
    uint64_t mismatches;
    uint64_t gap_us_max;
    uint64_t server_changes; /* under the lock */
};

static volatile sig_atomic_t is_told_to_end;

static void on_signal(int signal)
{
    (void)signal;
    is_told_to_end = 1;
}

static uint64_t now_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
}

/* splitmix64 */
static uint64_t mix(uint64_t x)
{
    x += UINT64_C(0x9e3779b97f4a7c15);
    x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
    return x ^ (x >> 31);
}

static uint64_t draw(struct test *test, uint64_t below)
{
    test->random = mix(test->random);
    return test->random % below;
}

/* ---- Stamps ------------------------------------------------------------------------------------ */

/* Word 0 is the block, word 1 the version, the rest follows from both and from its place. */
static uint64_t stamp_word(uint64_t block, uint64_t version, size_t i)
{
    return i == 0 ? block : i == 1 ? version : mix(mix(block) ^ version ^ ((uint64_t)i << 48));
}

static void stamp(uint64_t *data, uint64_t block, uint64_t version)
{
    for (size_t i = 0; i < WORDS; i++)
        data[i] = stamp_word(block, version, i);
}

/* The first word that is not the stamp's, WORDS if there is none. */
static size_t differs_from_stamp(const uint64_t *data, uint64_t block, uint64_t version)
{
    size_t i = 0;
    while (i < WORDS && data[i] == stamp_word(block, version, i))
        i++;
    return i;
}

static size_t differs_from_zero(const uint64_t *data)
{
    size_t i = 0;
    while (i < WORDS && data[i] == 0)
        i++;
    return i;
}

static void check(struct test *test, uint64_t index, const uint64_t *data)
{
    struct block *block = &test->blocks[index];
    size_t not_stamp = differs_from_stamp(data, index, block->version);
    size_t not_zero = differs_from_zero(data);
    bool is_known = block->may_be_stamp || block->may_be_zero;
    if (!is_known || (block->may_be_stamp && not_stamp == WORDS) ||
        (block->may_be_zero && not_zero == WORDS))
        return;
    test->mismatches++;
    size_t wrong = block->may_be_stamp ? not_stamp : not_zero;
    fprintf(stderr,
            "block %" PRIu64 ": expected version %" PRIu64 "%s, found block %" PRIu64
            " version %" PRIu64 ", first wrong word %zu: %016" PRIx64 "\n",
            index, block->version,
            !block->may_be_zero ? "" : block->may_be_stamp ? " or zeros" : ", then zeroed", data[0],
            data[1], wrong, data[wrong]);
}

/* ---- Requests ---------------------------------------------------------------------------------- */

/* On the library's thread, or in nebd_poll on ours. */
static void on_done(void *user_data, int result)
{
    struct slot *slot = (struct slot *)user_data;
    struct test *test = slot->test;
    pthread_mutex_lock(&test->lock);
    slot->done = true;
    slot->result = result;
    pthread_cond_signal(&test->some_done);
    pthread_mutex_unlock(&test->lock);
}

static void on_event(void *user_data, const struct nebd_event *event)
{
    struct test *test = (struct test *)user_data;
    pthread_mutex_lock(&test->lock);
    if (event->kind == NEBD_EVENT_SERVER_CHANGED)
        test->server_changes++;
    pthread_mutex_unlock(&test->lock);
    if (event->kind == NEBD_EVENT_DETACHED)
        fprintf(stderr, "detached: %s\n", strerror(-event->error));
}

static void choose(struct slot *slot)
{
    struct test *test = slot->test;
    uint64_t dice = draw(test, 100);
    slot->operation = dice < 50   ? WRITE
                      : dice < 88 ? READ
                      : dice < 92 ? FLUSH
                      : dice < 96 ? DISCARD
                                  : WRITE_ZEROES;
    /* A quarter of the requests goes to a few blocks that are rewritten all the time. */
    do
        slot->block = draw(test, draw(test, 4) == 0 ? (uint64_t)HOT_BLOCKS : test->block_count);
    while (test->blocks[slot->block].in_use);
    struct block *block = &test->blocks[slot->block];
    if ((!block->may_be_stamp && !block->may_be_zero) ||
        (slot->operation == DISCARD && !(test->can & NEBD_INFO_CAN_DISCARD)) ||
        (slot->operation == WRITE_ZEROES && !(test->can & NEBD_INFO_CAN_WRITE_ZEROES)))
        slot->operation = WRITE;
    slot->version = test->version_next++;
}

static int submit(struct slot *slot)
{
    struct test *test = slot->test;
    uint64_t offset = slot->block * BLOCK_BYTES;
    /* Uneven pieces: the volume wants its blocks aligned, memory may be as it likes. */
    char *data = (char *)slot->data;
    struct iovec iov[3] = {{data, 1000}, {data + 1000, 3000}, {data + 4000, 96}};
    switch (slot->operation) {
    case READ:
        memset(data, 0xee, BLOCK_BYTES);
        return nebd_aio_readv(test->volume, iov, 3, offset, 0, on_done, slot);
    case WRITE:
        stamp(slot->data, slot->block, slot->version);
        return nebd_aio_writev(test->volume, iov, 3, offset, slot->version % 8 == 0 ? NEBD_FUA : 0,
                               on_done, slot);
    case FLUSH:
        return nebd_aio_flush(test->volume, 0, on_done, slot);
    case DISCARD:
        return nebd_aio_discard(test->volume, offset, BLOCK_BYTES, 0, on_done, slot);
    case WRITE_ZEROES:
        return nebd_aio_write_zeroes(test->volume, offset, BLOCK_BYTES,
                                     slot->version % 2 == 0 ? NEBD_NO_UNMAP : 0, on_done, slot);
    }
    return -EINVAL;
}

static void failed(struct slot *slot, const char *how, int result)
{
    struct test *test = slot->test;
    test->errors++;
    fprintf(stderr, "%s of block %" PRIu64 " %s: %s\n", operation_names[slot->operation],
            slot->block, how, strerror(-result));
    /* Carried out or not, or in part: nothing is known. */
    if (slot->operation != READ && slot->operation != FLUSH)
        test->blocks[slot->block].may_be_stamp = test->blocks[slot->block].may_be_zero = false;
}

static void start(struct slot *slot)
{
    choose(slot);
    struct block *block = &slot->test->blocks[slot->block];
    slot->busy = block->in_use = true;
    int result = submit(slot);
    if (result < 0) {
        failed(slot, "was refused", result);
        slot->busy = block->in_use = false;
    }
}

static void finish(struct slot *slot)
{
    struct test *test = slot->test;
    struct block *block = &test->blocks[slot->block];
    test->requests++;
    slot->busy = slot->done = block->in_use = false;
    if (slot->result < 0) {
        failed(slot, "failed", slot->result);
        return;
    }
    switch (slot->operation) {
    case READ:
        check(test, slot->block, slot->data);
        break;
    case WRITE:
        block->version = slot->version;
        block->may_be_stamp = true;
        block->may_be_zero = false;
        break;
    case DISCARD:
        block->may_be_zero = true;
        break;
    case WRITE_ZEROES:
        block->may_be_stamp = false;
        block->may_be_zero = true;
        break;
    case FLUSH:
        break;
    }
}

/* ---- The loop ---------------------------------------------------------------------------------- */

static uint32_t count_done(struct test *test)
{
    uint32_t done = 0;
    for (uint32_t i = 0; i < test->depth; i++)
        done += test->slots[i].done;
    return done;
}

/* A request that cannot even begin is done before nebd_aio_... returns, with nothing to poll. */
static bool any_done(struct test *test)
{
    pthread_mutex_lock(&test->lock);
    bool any = count_done(test) > 0;
    pthread_mutex_unlock(&test->lock);
    return any;
}

/* Sleeps until a request is done, as a host with an event loop of its own does. */
static void wait_in_own_loop(struct test *test)
{
    while (nebd_poll(test->volume, 0, 0) == 0 && !any_done(test)) {
        if (nebd_arm(test->volume, 0) > 0)
            continue;
        struct pollfd readable = {nebd_eventfd(test->volume, 0), POLLIN, 0};
        poll(&readable, 1, -1);
    }
}

/* Takes in what is done, after waiting for it; returns how much. */
static uint32_t take_done(struct test *test)
{
    bool is_done[DEPTH_MAX];
    if (test->poll_mode)
        wait_in_own_loop(test);
    pthread_mutex_lock(&test->lock);
    while (count_done(test) == 0)
        pthread_cond_wait(&test->some_done, &test->lock);
    for (uint32_t i = 0; i < test->depth; i++)
        is_done[i] = test->slots[i].done;
    pthread_mutex_unlock(&test->lock);

    uint32_t taken = 0;
    for (uint32_t i = 0; i < test->depth; i++) {
        if (is_done[i]) {
            finish(&test->slots[i]);
            taken++;
        }
    }
    return taken;
}

static void run(struct test *test, uint64_t seconds)
{
    uint64_t last = now_us(), deadline = last + seconds * 1000000;
    for (uint32_t in_flight = 0;;) {
        bool is_over =
            now_us() >= deadline || is_told_to_end || test->errors + test->mismatches > 10;
        for (uint32_t i = 0; i < test->depth && !is_over; i++) {
            if (!test->slots[i].busy) {
                start(&test->slots[i]);
                in_flight += test->slots[i].busy;
            }
        }
        if (in_flight == 0 && is_over)
            return;
        if (in_flight == 0)
            continue;
        in_flight -= take_done(test);
        uint64_t now = now_us();
        if (now - last > test->gap_us_max)
            test->gap_us_max = now - last;
        last = now;
    }
}

/* Every block once more, by blocking reads into memory of our own. */
static void check_all(struct test *test)
{
    static uint64_t data[WORDS];
    int result = nebd_flush(test->volume, 0);
    for (uint64_t i = 0; i < test->block_count && result == 0; i++) {
        result = nebd_read(test->volume, data, sizeof data, i * BLOCK_BYTES, 0);
        if (result == 0)
            check(test, i, data);
    }
    if (result < 0) {
        test->errors++;
        fprintf(stderr, "final check: %s\n", strerror(-result));
    }
}

/* ---- Beginning and end ------------------------------------------------------------------------- */

static int open_volume(struct test *test, const char *name)
{
    nebd_options *options = nebd_options_new();
    int result = options == NULL ? -ENOMEM : 0;
    if (result == 0)
        result = nebd_options_set_event_callback(options, on_event, test);
    if (result == 0 && test->poll_mode)
        result = nebd_options_set_completion(options, NEBD_COMPLETE_BY_POLL);
    if (result == 0)
        result = nebd_open(name, options, &test->volume);
    nebd_options_free(options);
    return result;
}

/* Half of the buffers need no copy, half lie in ordinary memory. */
static bool prepare(struct test *test)
{
    for (uint32_t i = 0; i < test->depth; i++) {
        struct slot *slot = &test->slots[i];
        slot->test = test;
        slot->in_arena = i % 2 == 0;
        slot->data = (uint64_t *)(slot->in_arena ? nebd_alloc(test->volume, BLOCK_BYTES)
                                                 : malloc(BLOCK_BYTES));
        if (slot->data == NULL)
            return false;
    }
    test->blocks = (struct block *)calloc(test->block_count, sizeof *test->blocks);
    return test->blocks != NULL;
}

static void release(struct test *test)
{
    for (uint32_t i = 0; i < test->depth; i++) {
        if (test->slots[i].in_arena)
            nebd_free(test->volume, test->slots[i].data);
        else
            free(test->slots[i].data);
    }
    free(test->blocks);
}

static void report(const struct test *test, const char *name, double seconds)
{
    struct nebd_stats stats;
    memset(&stats, 0, sizeof stats);
    nebd_stats(test->volume, &stats, sizeof stats);
    printf("verified_io %s: %" PRIu64 " requests in %.1f s, %" PRIu64 " errors, %" PRIu64
           " mismatches, %" PRIu64 " takeovers (%" PRIu64 " events), worst blackout %.1f ms,"
           " longest gap %.1f ms\n",
           name, test->requests, seconds, test->errors, test->mismatches, stats.takeovers,
           test->server_changes, (double)stats.blackout_worst_us / 1000,
           (double)test->gap_us_max / 1000);
}

static int explain(const char *what, int result)
{
    char text[512];
    fprintf(stderr, "%s: %s%s%s\n", what, strerror(-result),
            nebd_error_text(text, sizeof text) > 0 ? ": " : "", text);
    return 1;
}

static int usage(void)
{
    fprintf(stderr, "usage: verified_io [--seconds N] [--depth N] [--blocks N] [--poll] "
                    "BACKEND:NAME\n");
    return 2;
}

/* The number after an option; 0, which no option allows, if there is none. */
static uint64_t number(const char *text)
{
    char *end = NULL;
    unsigned long long value = text == NULL ? 0 : strtoull(text, &end, 10);
    return end == NULL || *end != '\0' ? 0 : value;
}

int main(int argc, char **argv)
{
    static struct test test;
    const char *name = NULL;
    uint64_t seconds = 10, depth = 16, blocks = 1024;
    for (int i = 1; i < argc; i++) {
        uint64_t *option = strcmp(argv[i], "--seconds") == 0  ? &seconds
                           : strcmp(argv[i], "--depth") == 0  ? &depth
                           : strcmp(argv[i], "--blocks") == 0 ? &blocks
                                                              : NULL;
        if (option != NULL)
            *option = number(argv[++i]);
        else if (strcmp(argv[i], "--poll") == 0)
            test.poll_mode = true;
        else if (argv[i][0] == '-' || name != NULL)
            return usage();
        else
            name = argv[i];
    }
    /* With twice as many blocks as requests, a block that is not in use is soon found. */
    if (name == NULL || seconds == 0 || depth == 0 || depth > DEPTH_MAX || blocks < 2 * depth ||
        blocks < 2 * HOT_BLOCKS)
        return usage();
    test.depth = (uint32_t)depth;
    test.block_count = blocks;
    test.random = now_us();
    test.version_next = 1;
    pthread_mutex_init(&test.lock, NULL);
    pthread_cond_init(&test.some_done, NULL);

    int result = open_volume(&test, name);
    if (result < 0)
        return explain(name, result);
    struct nebd_info info;
    result = nebd_info(test.volume, &info, sizeof info);
    if (result < 0)
        return explain(name, result);
    if (info.size_bytes / BLOCK_BYTES < test.block_count) {
        fprintf(stderr, "%s is too small for %" PRIu64 " blocks\n", name, test.block_count);
        nebd_close(test.volume);
        return 1;
    }
    test.can = info.flags;
    if (!prepare(&test)) {
        fprintf(stderr, "out of memory\n");
        return 1;
    }
    signal(SIGINT, on_signal);
    signal(SIGTERM, on_signal);
    uint64_t begin = now_us();
    run(&test, seconds);
    uint64_t end = now_us();
    check_all(&test);
    report(&test, name, (double)(end - begin) / 1000000);
    release(&test);
    result = nebd_close(test.volume);
    if (result < 0)
        return explain("close", result);
    return test.errors == 0 && test.mismatches == 0 ? 0 : 1;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Verified IO through Curve's interface alone: nothing here knows of nebd but its header's place.
 *
 *   cc -o curve_io curve_io.c -L/usr/local/lib/nebd -lnebdclient
 *   ./curve_io [--conf FILE] [--seconds N] BACKEND:NAME
 *
 * OVERWRITES THE FIRST MEBIBYTE. Keeps requests in flight on cells: the first half are whole blocks, the
 * second half 1000 bytes each, so that several share a block. Every write stamps its cell with (cell,
 * version); every read is compared with what the last completed request left there. Flushes and
 * discards are mixed in. At the end, which SIGINT and SIGTERM bring on early, all cells are
 * read again. The server may be killed or replaced meanwhile.
 *
 * Exit code: 0 if every byte was right and no request failed, 1 otherwise, 2 for wrong usage.
 */
#include <nebd/libnebd.h>

#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <time.h>

enum { BLOCK = 4096, PART = 1000, HALF = 512 * 1024, DEPTH = 24 };
enum { BLOCK_CELLS = HALF / BLOCK, CELLS = BLOCK_CELLS + HALF / PART };

/* What a cell may hold: the stamp of `version`, or zeros, or, after a discard, either. */
struct cell {
    uint64_t version;
    bool may_be_stamp;
    bool may_be_zero;
    bool in_use;
};

/* A request; the context comes first, so that a callback finds the rest. */
struct request {
    NebdClientAioContext aio;
    unsigned cell;
    uint64_t version;
    bool busy;
    bool done; /* under the lock, and the context's too until then */
    unsigned char data[BLOCK];
};

static struct cell cells[CELLS];
static struct request requests[DEPTH];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t some_done = PTHREAD_COND_INITIALIZER;
static uint64_t random_state, version_next = 1, count, errors, mismatches;
static volatile sig_atomic_t is_told_to_end;

static void on_signal(int signal)
{
    (void)signal;
    is_told_to_end = 1;
}

static uint64_t mix(uint64_t x)
{
    x += UINT64_C(0x9e3779b97f4a7c15);
    x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
    return x ^ (x >> 31);
}

static unsigned draw(unsigned below)
{
    random_state = mix(random_state);
    return (unsigned)(random_state % below);
}

static size_t cell_length(unsigned cell)
{
    return cell < BLOCK_CELLS ? BLOCK : PART;
}

static off_t cell_offset(unsigned cell)
{
    return cell < BLOCK_CELLS ? (off_t)cell * BLOCK : HALF + (off_t)(cell - BLOCK_CELLS) * PART;
}

static void stamp(unsigned char *data, unsigned cell, uint64_t version)
{
    for (size_t at = 0; at < cell_length(cell); at += 8) {
        uint64_t word = mix(mix(cell) ^ version ^ ((uint64_t)at << 40));
        memcpy(data + at, &word, 8);
    }
}

static bool is_zero(const unsigned char *data, size_t length)
{
    return data[0] == 0 && memcmp(data, data + 1, length - 1) == 0;
}

static void check(unsigned cell, const unsigned char *data)
{
    unsigned char expected[BLOCK];
    stamp(expected, cell, cells[cell].version);
    if ((cells[cell].may_be_stamp && memcmp(data, expected, cell_length(cell)) == 0) ||
        (cells[cell].may_be_zero && is_zero(data, cell_length(cell))))
        return;
    mismatches++;
    fprintf(stderr, "cell %u at %lld: not what version %" PRIu64 " left there\n", cell,
            (long long)cell_offset(cell), cells[cell].version);
}

static void on_done(struct NebdClientAioContext *context)
{
    pthread_mutex_lock(&lock);
    ((struct request *)context)->done = true;
    pthread_cond_signal(&some_done);
    pthread_mutex_unlock(&lock);
}

static int submit(int fd, struct request *request)
{
    switch (request->aio.op) {
    case LIBAIO_OP_READ:
        return nebd_lib_aio_pread(fd, &request->aio);
    case LIBAIO_OP_WRITE:
        return nebd_lib_aio_pwrite(fd, &request->aio);
    case LIBAIO_OP_DISCARD:
        return nebd_lib_discard(fd, &request->aio);
    case LIBAIO_OP_FLUSH:
        return nebd_lib_flush(fd, &request->aio);
    }
    return -1;
}

static void start(int fd, struct request *request)
{
    unsigned dice = draw(100);
    LIBAIO_OP op = dice < 55   ? LIBAIO_OP_WRITE
                   : dice < 90 ? LIBAIO_OP_READ
                   : dice < 95 ? LIBAIO_OP_FLUSH
                               : LIBAIO_OP_DISCARD;
    do
        request->cell = draw(CELLS);
    while (cells[request->cell].in_use);
    struct cell *cell = &cells[request->cell];
    /* Nothing is known of a cell at first, and a discard concerns whole blocks. */
    if ((!cell->may_be_stamp && !cell->may_be_zero) ||
        (op == LIBAIO_OP_DISCARD && request->cell >= BLOCK_CELLS))
        op = LIBAIO_OP_WRITE;
    memset(&request->aio, 0, sizeof request->aio);
    request->aio.op = op;
    request->aio.offset = cell_offset(request->cell);
    request->aio.length = cell_length(request->cell);
    request->aio.cb = on_done;
    request->aio.buf = request->data;
    request->version = version_next++;
    if (op == LIBAIO_OP_WRITE)
        stamp(request->data, request->cell, request->version);
    else
        memset(request->data, 0xee, sizeof request->data);
    request->busy = cell->in_use = true;
    if (submit(fd, request) < 0) {
        errors++;
        fprintf(stderr, "a request of kind %d was refused\n", (int)op);
        request->busy = cell->in_use = false;
    }
}

static void finish(struct request *request)
{
    struct cell *cell = &cells[request->cell];
    count++;
    request->busy = request->done = cell->in_use = false;
    if (request->aio.ret != 0) {
        errors++;
        fprintf(stderr, "a request of kind %d failed: %d\n", (int)request->aio.op,
                request->aio.ret);
        return;
    }
    if (request->aio.op == LIBAIO_OP_READ) {
        check(request->cell, request->data);
    } else if (request->aio.op == LIBAIO_OP_WRITE) {
        cell->version = request->version;
        cell->may_be_stamp = true;
        cell->may_be_zero = false;
    } else if (request->aio.op == LIBAIO_OP_DISCARD) {
        cell->may_be_zero = true;
    }
}

/* Takes in what is done, after waiting for it; returns how much. */
static unsigned take_done(void)
{
    bool is_done[DEPTH];
    unsigned taken = 0;
    pthread_mutex_lock(&lock);
    while (taken == 0) {
        for (unsigned i = 0; i < DEPTH; i++)
            taken += is_done[i] = requests[i].done;
        if (taken == 0)
            pthread_cond_wait(&some_done, &lock);
    }
    pthread_mutex_unlock(&lock);
    for (unsigned i = 0; i < DEPTH; i++)
        if (is_done[i])
            finish(&requests[i]);
    return taken;
}

static void run(int fd, time_t seconds)
{
    time_t deadline = time(NULL) + seconds;
    for (unsigned in_flight = 0;;) {
        bool is_over = time(NULL) >= deadline || is_told_to_end || errors + mismatches > 10;
        for (unsigned i = 0; i < DEPTH && !is_over; i++) {
            if (!requests[i].busy) {
                start(fd, &requests[i]);
                in_flight += requests[i].busy;
            }
        }
        if (in_flight > 0)
            in_flight -= take_done();
        else if (is_over)
            return;
    }
}

/* Every cell that was written, by blocking reads. */
static void check_all(int fd)
{
    static unsigned char data[BLOCK];
    if (nebd_lib_sync(fd) != 0)
        errors++;
    for (unsigned cell = 0; cell < CELLS; cell++) {
        if (!cells[cell].may_be_stamp && !cells[cell].may_be_zero)
            continue;
        if (nebd_lib_pread(fd, data, cell_offset(cell), cell_length(cell)) != 0)
            errors++;
        else
            check(cell, data);
    }
}

static int usage(void)
{
    fprintf(stderr, "usage: curve_io [--conf FILE] [--seconds N] BACKEND:NAME\n");
    return 2;
}

int main(int argc, char **argv)
{
    const char *conf = NULL, *name = NULL;
    long seconds = 10;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--conf") == 0 && i + 1 < argc)
            conf = argv[++i];
        else if (strcmp(argv[i], "--seconds") == 0 && i + 1 < argc)
            seconds = strtol(argv[++i], NULL, 10);
        else if (argv[i][0] == '-' || name != NULL)
            return usage();
        else
            name = argv[i];
    }
    if (name == NULL || seconds <= 0)
        return usage();
    random_state = (uint64_t)time(NULL);

    struct NebdOpenFlags flags;
    nebd_lib_init_open_flags(&flags);
    if ((conf == NULL ? nebd_lib_init() : nebd_lib_init_with_conf(conf)) != 0) {
        fprintf(stderr, "cannot initialize\n");
        return 1;
    }
    int fd = nebd_lib_open_with_flags(name, &flags);
    if (fd <= 0 || nebd_lib_filesize(fd) < 2 * HALF || nebd_lib_blocksize(fd) > BLOCK) {
        fprintf(stderr, "%s cannot be opened, or is smaller than a mebibyte\n", name);
        return 1;
    }
    signal(SIGINT, on_signal);
    signal(SIGTERM, on_signal);
    run(fd, seconds);
    check_all(fd);
    printf("curve_io %s: %" PRIu64 " requests, %" PRIu64 " errors, %" PRIu64 " mismatches\n", name,
           count, errors, mismatches);
    if (nebd_lib_close(fd) != 0 || nebd_lib_uninit() != 0)
        errors++;
    return errors == 0 && mismatches == 0 ? 0 : 1;
}

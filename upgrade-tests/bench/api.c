/* SPDX-License-Identifier: Apache-2.0
 *
 * One load through either API of libnebd: random 4 KiB reads at a fixed depth, each submitted from the
 * callback of the one before. With -DCURVE through libnebd.h, else through nebd.h. Prints one line of JSON.
 *
 *   api VOLUME DEPTH SECONDS       (the socket is NEBD_SOCKET)
 */
#include <semaphore.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <time.h>

#ifdef CURVE
#include <libnebd.h>
#else
#include <nebd.h>
#endif

enum { BLOCK_BYTES = 4096, DEPTH_MAX = 256 };

struct slot {
#ifdef CURVE
    struct NebdClientAioContext context; /* first: a callback gets its address */
#else
    struct iovec buffer;
#endif
    uint64_t random;
    void *data;
    uint64_t requests;
};

static struct slot slots[DEPTH_MAX];
static uint64_t blocks;
static atomic_int is_over;
static sem_t ended;

#ifdef CURVE
static int volume;
#else
static nebd_volume *volume;
#endif

static void fail(const char *what) {
    fprintf(stderr, "%s\n", what);
    exit(1);
}

static void submit(struct slot *slot);

static void answered(struct slot *slot, int result) {
    if (result < 0)
        fail("a request failed");
    slot->requests++;
    if (atomic_load_explicit(&is_over, memory_order_relaxed))
        sem_post(&ended);
    else
        submit(slot);
}

#ifdef CURVE
static void call(struct NebdClientAioContext *context) {
    answered((struct slot *)context, context->ret);
}
#else
static void call(void *slot, int result) {
    answered(slot, result);
}
#endif

static void submit(struct slot *slot) {
    slot->random ^= slot->random << 13;
    slot->random ^= slot->random >> 7;
    slot->random ^= slot->random << 17;
    uint64_t offset = slot->random % blocks * BLOCK_BYTES;
#ifdef CURVE
    slot->context = (struct NebdClientAioContext){
        .offset = (off_t)offset, .length = BLOCK_BYTES, .op = LIBAIO_OP_READ, .cb = call, .buf = slot->data};
    int result = nebd_lib_aio_pread(volume, &slot->context);
#else
    slot->buffer = (struct iovec){slot->data, BLOCK_BYTES};
    int result = nebd_aio_readv(volume, &slot->buffer, 1, offset, 0, call, slot);
#endif
    if (result != 0)
        fail("a request was not accepted");
}

int main(int argc, char **argv) {
    if (argc != 4)
        fail("usage: api VOLUME DEPTH SECONDS");
    int depth = atoi(argv[2]);
    if (depth < 1 || depth > DEPTH_MAX)
        fail("the depth is 1 to 256");
#ifdef CURVE
    if (nebd_lib_init() != 0 || (volume = nebd_lib_open(argv[1])) <= 0)
        fail("cannot open the volume");
    blocks = (uint64_t)nebd_lib_filesize(volume) / BLOCK_BYTES;
#else
    struct nebd_info info;
    if (nebd_open(argv[1], NULL, &volume) != 0 || nebd_info(volume, &info, sizeof info) != 0)
        fail("cannot open the volume");
    blocks = info.size_bytes / BLOCK_BYTES;
#endif
    sem_init(&ended, 0, 0);
    struct timespec start, end;
    clock_gettime(CLOCK_MONOTONIC, &start);
    for (int i = 0; i < depth; i++) {
        slots[i].random = 0x9e3779b97f4a7c15u + (uint64_t)i * 0xbf58476d1ce4e5b9u;
        if (posix_memalign(&slots[i].data, BLOCK_BYTES, BLOCK_BYTES) != 0)
            fail("no memory");
        submit(&slots[i]);
    }
    struct timespec left = {atoi(argv[3]), 0};
    while (nanosleep(&left, &left) != 0) {
    }
    atomic_store(&is_over, 1);
    for (int i = 0; i < depth; i++)
        sem_wait(&ended);
    clock_gettime(CLOCK_MONOTONIC, &end);
    uint64_t requests = 0;
    for (int i = 0; i < depth; i++)
        requests += slots[i].requests;
#ifdef CURVE
    nebd_lib_close(volume);
    nebd_lib_uninit();
#else
    nebd_close(volume);
#endif
    double seconds = (double)(end.tv_sec - start.tv_sec) + (double)(end.tv_nsec - start.tv_nsec) / 1e9;
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    double cpu = (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
                 (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
    printf("{\"iops\":%.0f,\"cpu_s\":%.3f,\"requests\":%llu}\n", (double)requests / seconds, cpu,
           (unsigned long long)requests);
    return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Calls every function of nebd.h once at least, on a fresh volume of 64 MiB at a real server, and
 * checks what nebd.h says of it. `cargo xtask c-example` runs it: tour BACKEND:NAME.
 */
#define _GNU_SOURCE
#include <nebd.h>

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { BLOCK = 4096, MIB = 1 << 20, DEPTH = 8, BURST = 64 };

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "tour.c:%d: %s\n", __LINE__, #condition);                              \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

#define CHECK_RESULT(expected, call)                                                               \
    do {                                                                                           \
        int result_ = (call);                                                                      \
        if (result_ != (expected)) {                                                               \
            fprintf(stderr, "tour.c:%d: %s: %d, not %d\n", __LINE__, #call, result_, (expected));  \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static uint64_t resized_to;
static int completed;
static int last_result;

static void on_event(void *user_data, const struct nebd_event *event)
{
    CHECK(user_data == &resized_to);
    pthread_mutex_lock(&lock);
    if (event->kind == NEBD_EVENT_RESIZED)
        resized_to = event->value;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

/* Its user data is the volume: what waits for callbacks is refused inside one. */
static void on_done(void *user_data, int result)
{
    nebd_volume *volume = (nebd_volume *)user_data;
    CHECK_RESULT(-EDEADLK, nebd_close(volume));
    int polled = nebd_poll(volume, 0, 0);
    CHECK(polled == -EDEADLK || polled == -EOPNOTSUPP);
    pthread_mutex_lock(&lock);
    completed++;
    last_result = result;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

static void wait_for_completed(int count)
{
    pthread_mutex_lock(&lock);
    while (completed < count)
        pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
}

static nebd_options *new_options(void)
{
    nebd_options *options = nebd_options_new();
    CHECK(options != NULL);
    CHECK_RESULT(0, nebd_options_set_socket(options, getenv("NEBD_SOCKET")));
    CHECK_RESULT(0, nebd_options_set_arena_bytes(options, 4 * MIB));
    CHECK_RESULT(0, nebd_options_set_connect_timeout_ms(options, 10000));
    CHECK_RESULT(0, nebd_options_set_io_timeout_ms(options, 0));
    CHECK_RESULT(0, nebd_options_set_stall_after_ms(options, 1000));
    CHECK_RESULT(0, nebd_options_set_spin_us(options, 0));
    CHECK_RESULT(0, nebd_options_set_exclusive(options, 0));
    CHECK_RESULT(0, nebd_options_set_event_callback(options, on_event, &resized_to));
    return options;
}

/* What the library fills in fits a caller that knows less, or more. */
static void check_info(nebd_volume *volume, uint64_t size)
{
    struct {
        struct nebd_info info;
        uint64_t appended;
    } longer;
    struct nebd_info info;
    uint64_t short_size[2] = {0, 77};
    CHECK_RESULT(0, nebd_info(volume, &info, sizeof info));
    CHECK(info.size_bytes == size && info.block_size >= 512 && info.queue_count >= 1);
    CHECK_RESULT(0, nebd_refresh(volume, (struct nebd_info *)short_size, sizeof short_size[0]));
    CHECK(short_size[0] == size && short_size[1] == 77);
    memset(&longer, 0xff, sizeof longer);
    CHECK_RESULT(0, nebd_info(volume, &longer.info, sizeof longer));
    CHECK(longer.info.size_bytes == size && longer.appended == 0);
    CHECK_RESULT(-EINVAL, nebd_info(volume, NULL, sizeof info));

    struct nebd_stats stats;
    CHECK_RESULT(0, nebd_stats(volume, &stats, sizeof stats));
    CHECK(stats.generation > 0 && stats.connected == 1);
}

static void check_blocking(nebd_volume *volume)
{
    static char wrote[3 * BLOCK], read[3 * BLOCK];
    memset(wrote, 'w', sizeof wrote);
    struct iovec out[2] = {{wrote, 100}, {wrote + 100, sizeof wrote - 100}};
    struct iovec in[2] = {{read, BLOCK + 1}, {read + BLOCK + 1, sizeof read - BLOCK - 1}};
    CHECK_RESULT(0, nebd_writev(volume, out, 2, BLOCK, NEBD_FUA));
    CHECK_RESULT(0, nebd_readv(volume, in, 2, BLOCK, 0));
    CHECK(memcmp(wrote, read, sizeof read) == 0);
    CHECK_RESULT(0, nebd_write_zeroes(volume, 2 * BLOCK, BLOCK, NEBD_FUA | NEBD_NO_UNMAP));
    CHECK_RESULT(0, nebd_flush(volume, 0));
    CHECK_RESULT(0, nebd_read(volume, read, sizeof read, BLOCK, 0));
    CHECK(read[0] == 'w' && read[BLOCK] == 0 && read[2 * BLOCK - 1] == 0 && read[2 * BLOCK] == 'w');
    CHECK_RESULT(0, nebd_discard(volume, BLOCK, BLOCK, 0));

    CHECK_RESULT(-EINVAL, nebd_write(volume, wrote, BLOCK, 1, 0));
    CHECK_RESULT(-EINVAL, nebd_write(volume, wrote, 100, 0, 0));
    CHECK_RESULT(-EINVAL, nebd_write(volume, wrote, BLOCK, 0, NEBD_NO_UNMAP));
    CHECK_RESULT(-EINVAL, nebd_read(volume, read, BLOCK, 0, NEBD_FUA));
    CHECK_RESULT(-EINVAL, nebd_read(volume, NULL, BLOCK, 0, 0));
    CHECK_RESULT(-EINVAL, nebd_read(volume, read, BLOCK, 0, NEBD_QUEUE(0)));
    CHECK_RESULT(-EINVAL, nebd_readv(volume, in, -1, 0, 0));
    CHECK(nebd_write(volume, wrote, BLOCK, (uint64_t)64 * MIB, 0) < 0);
    CHECK(nebd_read(volume, read, BLOCK, UINT64_MAX - BLOCK + 1, 0) < 0);
}

static void check_memory(nebd_volume *volume)
{
    char *arena = (char *)nebd_alloc(volume, 2 * BLOCK);
    CHECK(arena != NULL && (uintptr_t)arena % BLOCK == 0);
    CHECK(nebd_alloc(volume, 64 * MIB) == NULL);

    int memfd = memfd_create("tour", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    CHECK(memfd >= 0 && ftruncate(memfd, MIB) == 0);
    CHECK(fcntl(memfd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) == 0);
    char *mapped = (char *)mmap(NULL, MIB, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
    CHECK(mapped != MAP_FAILED);
    CHECK_RESULT(-EBADF, nebd_register_memory(volume, -1, MIB, mapped));
    CHECK(nebd_register_memory(volume, memfd, 2 * MIB, mapped) < 0);
    int id = nebd_register_memory(volume, memfd, MIB, mapped);
    CHECK(id >= 1);
    close(memfd);

    memset(mapped + BLOCK, 'm', 2 * BLOCK);
    CHECK_RESULT(0, nebd_write(volume, mapped + BLOCK, 2 * BLOCK, 0, 0));
    memset(arena, 0, 2 * BLOCK);
    CHECK_RESULT(0, nebd_read(volume, arena, 2 * BLOCK, 0, 0));
    CHECK(memcmp(arena, mapped + BLOCK, 2 * BLOCK) == 0);
    memset(arena, 'a', BLOCK);
    CHECK_RESULT(0, nebd_write(volume, arena, BLOCK, 0, 0));
    CHECK_RESULT(0, nebd_read(volume, mapped, BLOCK, 0, 0));
    CHECK(mapped[0] == 'a' && mapped[BLOCK - 1] == 'a');

    CHECK_RESULT(0, nebd_unregister_memory(volume, id));
    CHECK_RESULT(-EINVAL, nebd_unregister_memory(volume, id));
    CHECK(munmap(mapped, MIB) == 0);
    nebd_free(volume, arena);
    nebd_free(volume, &completed);
}

/* One request of each kind, through `flags`' queue; returns how many were accepted. */
static int start_each(nebd_volume *volume, struct iovec *iov, uint32_t flags)
{
    CHECK_RESULT(0, nebd_aio_writev(volume, iov, 1, 0, flags | NEBD_FUA, on_done, volume));
    CHECK_RESULT(0, nebd_aio_readv(volume, iov + 1, 1, 8 * BLOCK, flags, on_done, volume));
    CHECK_RESULT(0, nebd_aio_flush(volume, flags, on_done, volume));
    CHECK_RESULT(0, nebd_aio_discard(volume, MIB, MIB, flags, on_done, volume));
    CHECK_RESULT(0, nebd_aio_write_zeroes(volume, 2 * MIB, MIB, flags, on_done, volume));
    return 5;
}

/* A child of fork has no business with its parent's volume, and says so wherever it can. */
static int in_a_child(nebd_volume *volume, int is_polled)
{
    static char data[BLOCK];
    struct nebd_info info;
    struct nebd_stats stats;
    int refused = nebd_read(volume, data, BLOCK, 0, 0) == -EBADFD &&
                  nebd_aio_flush(volume, 0, on_done, volume) == -EBADFD &&
                  nebd_info(volume, &info, sizeof info) == -EBADFD &&
                  nebd_refresh(volume, &info, sizeof info) == -EBADFD &&
                  nebd_stats(volume, &stats, sizeof stats) == -EBADFD &&
                  nebd_resize(volume, MIB) == -EBADFD &&
                  nebd_unregister_memory(volume, 1) == -EBADFD &&
                  nebd_alloc(volume, BLOCK) == NULL;
    if (is_polled)
        refused = refused && nebd_poll(volume, 1, 0) == -EBADFD &&
                  nebd_arm(volume, 1) == -EBADFD && nebd_eventfd(volume, 1) == -EBADFD;
    nebd_free(volume, data);
    return refused && nebd_close(volume) == -EBADFD;
}

static void check_fork(nebd_volume *volume, int is_polled)
{
    pid_t child = fork();
    if (child == 0)
        _exit(in_a_child(volume, is_polled) ? 0 : 1);
    int status = -1;
    CHECK(child > 0 && waitpid(child, &status, 0) == child && status == 0);
}

static void check_threaded(nebd_volume *volume)
{
    static char data[2][BLOCK];
    struct iovec iov[2] = {{data[0], BLOCK}, {data[1], BLOCK}};
    completed = 0;
    wait_for_completed(start_each(volume, iov, 0));
    CHECK_RESULT(0, last_result);
    CHECK_RESULT(-EINVAL, nebd_aio_readv(volume, iov, 1, 0, 0, NULL, NULL));
    CHECK(nebd_aio_readv(volume, iov, 1, 0, NEBD_QUEUE(0), on_done, volume) < 0);
    CHECK_RESULT(-EOPNOTSUPP, nebd_poll(volume, 0, 0));
    CHECK_RESULT(-EOPNOTSUPP, nebd_arm(volume, 0));
    CHECK_RESULT(-EOPNOTSUPP, nebd_eventfd(volume, 0));

    CHECK_RESULT(0, nebd_resize(volume, (uint64_t)96 * MIB));
    pthread_mutex_lock(&lock);
    while (resized_to != (uint64_t)96 * MIB)
        pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
    check_info(volume, (uint64_t)96 * MIB);

    check_fork(volume, 0);
    CHECK_RESULT(0, nebd_read(volume, data[0], BLOCK, 0, 0));
}

/* Polls queue 1 as nebd.h tells a host with an event loop to do. */
static void poll_until(nebd_volume *volume, int count)
{
    struct pollfd readable = {nebd_eventfd(volume, 1), POLLIN, 0};
    CHECK(readable.fd >= 0);
    while (completed < count) {
        CHECK(nebd_poll(volume, 1, 0) >= 0);
        int armed = nebd_arm(volume, 1);
        CHECK(armed >= 0);
        if (armed == 0 && completed < count)
            CHECK(poll(&readable, 1, -1) == 1);
    }
    CHECK(completed == count);
}

static void check_polled(const char *name)
{
    static char data[BURST][BLOCK];
    nebd_options *options = new_options();
    nebd_volume *volume = NULL;
    CHECK_RESULT(0, nebd_options_set_queues(options, 2, DEPTH));
    CHECK_RESULT(0, nebd_options_set_completion(options, NEBD_COMPLETE_BY_POLL));
    CHECK_RESULT(0, nebd_open(name, options, &volume));
    nebd_options_free(options);

    struct iovec iov[2] = {{data[0], BLOCK}, {data[1], BLOCK}};
    completed = 0;
    poll_until(volume, start_each(volume, iov, NEBD_QUEUE(1)));
    CHECK_RESULT(0, last_result);
    CHECK_RESULT(-EINVAL, nebd_aio_flush(volume, NEBD_QUEUE(2), on_done, volume));
    check_fork(volume, 1);

    /* A queue takes what it has room for, and the library's list takes the rest. */
    int accepted = 0, refused = 0;
    completed = 0;
    for (int i = 0; i < BURST; i++) {
        struct iovec one = {data[i], BLOCK};
        int result =
            nebd_aio_readv(volume, &one, 1, (uint64_t)i * BLOCK, NEBD_QUEUE(1), on_done, volume);
        CHECK(result == 0 || result == -EAGAIN);
        accepted += result == 0;
        refused += result != 0;
    }
    CHECK(accepted >= DEPTH && refused > 0);
    poll_until(volume, accepted);
    CHECK_RESULT(0, nebd_aio_readv(volume, iov, 1, 0, NEBD_QUEUE(1), on_done, volume));
    CHECK(nebd_poll(volume, 1, -1) >= 0);

    completed = 0;
    for (int i = 0; i < BURST; i++) {
        struct iovec one = {data[i], BLOCK};
        CHECK_RESULT(0, nebd_aio_writev(volume, &one, 1, (uint64_t)i * BLOCK, 0, on_done, volume));
    }
    CHECK_RESULT(0, nebd_read(volume, data[0], BLOCK, 0, 0));
    /* Closing waits for them, and runs their callbacks. */
    CHECK_RESULT(0, nebd_close(volume));
    CHECK(completed >= BURST);
}

static void check_refusals(const char *name)
{
    char text[256];
    nebd_options *options = new_options();
    nebd_volume *first = NULL, *second = NULL;
    CHECK_RESULT(0, nebd_options_set_exclusive(options, 1));
    CHECK_RESULT(0, nebd_open(name, options, &first));
    CHECK(nebd_open(name, options, &second) < 0 && second == NULL);
    CHECK(nebd_error_text(text, sizeof text) > 0 && strstr(text, name) != NULL);
    CHECK_RESULT(0, nebd_close(first));

    CHECK_RESULT(-ENOENT, nebd_open("file:there-is-none", options, &second));
    CHECK_RESULT(0, nebd_options_set_exclusive(options, 0));
    CHECK_RESULT(0, nebd_options_set_read_only(options, 1));
    CHECK_RESULT(0, nebd_open(name, options, &first));
    CHECK_RESULT(-EROFS, nebd_write(first, text, BLOCK, 0, 0));
    CHECK_RESULT(0, nebd_close(first));
    nebd_options_free(options);
}

/* What is asked in the very moment that a volume is attached is asked of that volume. */
static void check_at_once(const char *name)
{
    int memfd = memfd_create("tour", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    CHECK(memfd >= 0 && ftruncate(memfd, MIB) == 0);
    CHECK(fcntl(memfd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) == 0);
    char *mapped = (char *)mmap(NULL, MIB, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
    CHECK(mapped != MAP_FAILED);
    for (int i = 0; i < 200; i++) {
        nebd_volume *volume = NULL;
        struct nebd_info info;
        CHECK_RESULT(0, nebd_open(name, NULL, &volume));
        if (i % 2 == 0) {
            CHECK_RESULT(0, nebd_refresh(volume, &info, sizeof info));
        } else {
            CHECK(nebd_register_memory(volume, memfd, MIB, mapped) >= 1);
            CHECK_RESULT(0, nebd_write(volume, mapped, BLOCK, 0, 0));
        }
        CHECK_RESULT(0, nebd_close(volume));
    }
    munmap(mapped, MIB);
    close(memfd);
}

int main(int argc, char **argv)
{
    CHECK(argc == 2);
    CHECK(strncmp(nebd_version(), "0.1", 3) == 0);
    nebd_options *options = new_options();
    nebd_volume *volume = NULL;
    CHECK_RESULT(0, nebd_open(argv[1], options, &volume));
    nebd_options_free(options);
    check_info(volume, (uint64_t)64 * MIB);
    check_blocking(volume);
    check_memory(volume);
    check_threaded(volume);
    CHECK_RESULT(0, nebd_close(volume));
    check_polled(argv[1]);
    check_refusals(argv[1]);
    check_at_once(argv[1]);
    printf("tour: every function did what nebd.h says\n");
    return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * nebd: block IO to a server that can be replaced, or die, at any time.
 *
 *   nebd_volume *volume;
 *   int rc = nebd_open("file:disk1", NULL, &volume);
 *   if (rc == 0) rc = nebd_read(volume, block, sizeof block, 0, 0);
 *   if (rc < 0) fprintf(stderr, "%s\n", strerror(-rc));
 *   nebd_close(volume);
 *
 * RESULTS    Functions that return int return 0 (or a count) on success and a negative errno value
 *            on failure; so does `result` in callbacks. Reads and writes move all bytes or fail:
 *            there is no short transfer. A NULL where a pointer is needed is -EINVAL. A bug in the
 *            library shows as -EIO, never as a crash of its host on purpose.
 *
 * WAITING    A server that dies or is replaced is no error: requests wait, without limit unless
 *            nebd_options_set_io_timeout_ms says otherwise, and go on with its successor.
 *
 * THREADS    A volume may be used from any number of threads at once, except that nothing may run
 *            on it beside or after nebd_close. An options object belongs to one thread at a time.
 *            The library runs threads of its own, with all signals blocked; it installs no signal
 *            handler, and writes to no log.
 *
 * CALLBACKS  Run exactly once for each request that was accepted, on a thread of the library, or
 *            in nebd_poll with NEBD_COMPLETE_BY_POLL. They may submit requests. On the library's
 *            thread they hold up the callbacks of all volumes: let them be short. They must not
 *            throw C++ exceptions, longjmp, or call nebd_close or nebd_poll (-EDEADLK).
 *
 * FORK       A forked child must not use volumes of its parent: calls there return -EBADFD, and
 *            the parent's requests are not disturbed.
 *
 * ALIGNMENT  Offsets and lengths are multiples of the volume's block size, or -EINVAL.
 *            Memory may be aligned as it likes.
 *
 * GROWTH     Programs built against this header run with every later libnebd.so.0. Symbols have
 *            versions (NEBD_0.1 and so on). What the library fills in (nebd_info, nebd_stats) comes
 *            with the caller's size, so it can be appended to. Options are an opaque object with
 *            setters and no struct: a program that sets an option which an older library lacks
 *            fails to load, by the option's name, where a struct's unknown tail would be dropped
 *            in silence (think of a lost NEBD_FUA); and no default is ever compiled into a program.
 */
#ifndef NEBD_H
#define NEBD_H

#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Version of this header. nebd_version() has that of the library: "MAJOR.MINOR.PATCH[-SUFFIX]". */
#define NEBD_VERSION_MAJOR 0
#define NEBD_VERSION_MINOR 1
#define NEBD_VERSION_PATCH 0
const char *nebd_version(void);

/*
 * Copies the explanation of this thread's last failed nebd_open, nebd_resize, nebd_refresh,
 * nebd_register_memory or nebd_close into `text`, cut to `size` bytes with the final NUL. Returns its
 * full length, 0 if there is none. With size 0 `text` may be NULL.
 */
size_t nebd_error_text(char *text, size_t size);

/* An attached volume. */
typedef struct nebd_volume nebd_volume;
/* How to attach it. */
typedef struct nebd_options nebd_options;

/* result is 0 or a negative errno value. */
typedef void (*nebd_callback)(void *user_data, int result);

/* ---- Flags of requests. Unknown ones, and those that do not fit the request, are -EINVAL. ---- */

/* Writes, write-zeroes: durable once completed, as if a flush followed. */
#define NEBD_FUA (UINT32_C(1) << 0)
/* Write-zeroes: the range stays allocated. */
#define NEBD_NO_UNMAP (UINT32_C(1) << 1)
/*
 * NEBD_COMPLETE_BY_POLL only, any asynchronous request: through queue `index`, whose nebd_poll
 * then completes it. If that queue is full the request is refused with -EAGAIN: poll, try again.
 * Without this the library chooses a queue, keeps a list of what finds no room, and with several
 * queues the host has to poll them all.
 */
#define NEBD_QUEUE(index) (((uint32_t)(index) + 1) << 16)

/* ---- Events ---------------------------------------------------------------------------------- */

enum {
    NEBD_EVENT_RESIZED = 1,        /* value: the new size in bytes */
    NEBD_EVENT_SERVER_CHANGED = 2, /* value: the generation of the new server */
    NEBD_EVENT_STALLED = 3,        /* requests wait, and none completes: time for an alarm */
    NEBD_EVENT_RESUMED = 4,        /* requests complete again after NEBD_EVENT_STALLED */
    NEBD_EVENT_PARKED = 5,         /* the volume waits for its operator */
    NEBD_EVENT_UNPARKED = 6,       /* the volume is served again */
    NEBD_EVENT_DETACHED = 7        /* the session is over, error says why; requests fail with it */
};

/* Later versions may send other kinds (ignore them) and append fields. */
struct nebd_event {
    uint32_t kind;
    int32_t error; /* a negative errno value, or 0 */
    uint64_t value;
};

/* Called on a thread of the library. `event` is valid during the call. */
typedef void (*nebd_event_callback)(void *user_data, const struct nebd_event *event);

/* ---- Options --------------------------------------------------------------------------------- */

/* All defaults; NULL if there is no memory. Reusable for many nebd_open, which copies it. */
nebd_options *nebd_options_new(void);
/* NULL is allowed. */
void nebd_options_free(nebd_options *options);

/* The server's socket. Default: the environment's NEBD_SOCKET, else /run/nebd/nebd.sock. */
int nebd_options_set_socket(nebd_options *options, const char *path);
/* Not 0: mutations are refused with -EROFS. Default 0. */
int nebd_options_set_read_only(nebd_options *options, int read_only);
/* Not 0: nobody else may have the volume attached. Default 0. */
int nebd_options_set_exclusive(nebd_options *options, int exclusive);
/* Queues, 1 to 64, and requests in flight in each, a power of two up to 4096. Default 1, 128. */
int nebd_options_set_queues(nebd_options *options, uint32_t count, uint32_t depth);
/* Shared memory for nebd_alloc and for copies of other memory. Default 16 MiB. */
int nebd_options_set_arena_bytes(nebd_options *options, uint64_t bytes);
/* How long nebd_open looks for a server. Default 10 s. */
int nebd_options_set_connect_timeout_ms(nebd_options *options, uint64_t milliseconds);
/*
 * Longest wait of a request before it fails with -ETIMEDOUT; 0, the default, is no limit. A write
 * that timed out may still be carried out later; where memory of nebd_alloc or
 * nebd_register_memory was used in place, with what it holds then, and a read may still change it.
 */
int nebd_options_set_io_timeout_ms(nebd_options *options, uint64_t milliseconds);
/* Requests wait this long without any completion before NEBD_EVENT_STALLED. Default 1 s. */
int nebd_options_set_stall_after_ms(nebd_options *options, uint64_t milliseconds);
/* Longest spin of a waiting call before it sleeps; tried only while it pays; 0 never spins. Default 100 us. */
int nebd_options_set_spin_us(nebd_options *options, uint64_t microseconds);

enum {
    NEBD_COMPLETE_BY_THREAD = 0, /* callbacks run on a thread of the library: the default */
    NEBD_COMPLETE_BY_POLL = 1    /* callbacks run in nebd_poll */
};
int nebd_options_set_completion(nebd_options *options, int mode);

/* NULL: no events, the default. */
int nebd_options_set_event_callback(nebd_options *options, nebd_event_callback callback,
                                    void *user_data);

/* ---- Volumes --------------------------------------------------------------------------------- */

/*
 * Attaches a volume, named BACKEND:NAME. `options` may be NULL: all defaults. *volume is set on
 * success, and to NULL otherwise.
 */
int nebd_open(const char *name, const nebd_options *options, nebd_volume **volume);

/*
 * Waits until every accepted request has completed and its callback has returned (with
 * NEBD_COMPLETE_BY_POLL they run here), then detaches, and frees the volume and all memory from
 * nebd_alloc. NULL is allowed. -EDEADLK from within a callback: then the volume stays open. With any
 * other result it is gone; -ETIMEDOUT says that no server was there to be told.
 */
int nebd_close(nebd_volume *volume);

#define NEBD_INFO_READ_ONLY (UINT32_C(1) << 0)
#define NEBD_INFO_CAN_DISCARD (UINT32_C(1) << 1)
#define NEBD_INFO_CAN_WRITE_ZEROES (UINT32_C(1) << 2)

struct nebd_info {
    uint64_t size_bytes;
    uint64_t transfer_bytes_max; /* longer reads and writes are split */
    uint32_t block_size;         /* 512 or 4096 */
    uint32_t flags;              /* NEBD_INFO_... */
    uint32_t epoch_major;        /* granted by the storage when the volume was opened */
    uint32_t epoch_minor;        /* raised at each takeover */
    uint32_t queue_count;
    uint32_t reserved; /* 0 */
};

/*
 * What the volume is, as last told by the server; asks nobody. `size` is sizeof *info as the caller
 * knows it: no more is written, and what this library does not know is zeroed.
 */
int nebd_info(nebd_volume *volume, struct nebd_info *info, size_t size);
/* Asks the server anew, then as nebd_info. */
int nebd_refresh(nebd_volume *volume, struct nebd_info *info, size_t size);

struct nebd_stats {
    uint64_t generation; /* of the server that attached the session last */
    uint64_t connected;  /* 1 if attached right now */
    uint64_t reconnects;
    uint64_t in_flight;
    uint64_t takeovers;        /* servers that took over */
    uint64_t blackout_last_us; /* longest gap between completions at the last takeover */
    uint64_t blackout_worst_us;
};

/* What the session has seen so far; `size` as with nebd_info. */
int nebd_stats(nebd_volume *volume, struct nebd_stats *stats, size_t size);

/* Changes the size of the volume; done once, however many servers die meanwhile. */
int nebd_resize(nebd_volume *volume, uint64_t size_bytes);

/* ---- Blocking IO. NEBD_QUEUE does not apply. -------------------------------------------------- */

int nebd_read(nebd_volume *volume, void *data, size_t length, uint64_t offset, uint32_t flags);
int nebd_write(nebd_volume *volume, const void *data, size_t length, uint64_t offset,
               uint32_t flags);
int nebd_readv(nebd_volume *volume, const struct iovec *iov, int iovcnt, uint64_t offset,
               uint32_t flags);
int nebd_writev(nebd_volume *volume, const struct iovec *iov, int iovcnt, uint64_t offset,
                uint32_t flags);
/* The range reads as zeros or as before. */
int nebd_discard(nebd_volume *volume, uint64_t offset, uint64_t length, uint32_t flags);
/* The range reads as zeros. */
int nebd_write_zeroes(nebd_volume *volume, uint64_t offset, uint64_t length, uint32_t flags);
/* Every write that completed before this call is durable once it returns 0. */
int nebd_flush(nebd_volume *volume, uint32_t flags);

/* ---- Asynchronous IO -------------------------------------------------------------------------
 * 0: accepted, and `callback` will run once, perhaps before the call returns. Otherwise nothing was
 * started and it never runs. The iovec array is copied; the memory it names is the library's until
 * the callback: not to be freed, and not to be written (a write's) or touched (a read's). Requests
 * in flight are not ordered.
 */
int nebd_aio_readv(nebd_volume *volume, const struct iovec *iov, int iovcnt, uint64_t offset,
                   uint32_t flags, nebd_callback callback, void *user_data);
int nebd_aio_writev(nebd_volume *volume, const struct iovec *iov, int iovcnt, uint64_t offset,
                    uint32_t flags, nebd_callback callback, void *user_data);
int nebd_aio_discard(nebd_volume *volume, uint64_t offset, uint64_t length, uint32_t flags,
                     nebd_callback callback, void *user_data);
int nebd_aio_write_zeroes(nebd_volume *volume, uint64_t offset, uint64_t length, uint32_t flags,
                          nebd_callback callback, void *user_data);
int nebd_aio_flush(nebd_volume *volume, uint32_t flags, nebd_callback callback, void *user_data);

/* ---- A host's own event loop (NEBD_COMPLETE_BY_POLL, else -EOPNOTSUPP) ------------------------
 *
 *   for (;;) {
 *       nebd_poll(volume, 0, 0);
 *       if (nebd_arm(volume, 0) > 0) continue;
 *       ... sleep until nebd_eventfd(volume, 0), or anything else, is readable ...
 *   }
 *
 * One thread at a time should poll a queue. A host that never sleeps calls nebd_poll alone.
 */

/*
 * Runs the callbacks of what completed on a queue; returns how many requests completed. If none has, waits
 * up to timeout_ms milliseconds for one: 0 not at all, -1 without limit.
 */
int nebd_poll(nebd_volume *volume, uint32_t queue, int timeout_ms);
/* 1: completions are there already, poll instead of sleeping. 0: the eventfd will tell. */
int nebd_arm(nebd_volume *volume, uint32_t queue);
/*
 * A descriptor that becomes readable with completions once nebd_arm has returned 0. For poll, epoll
 * and the like only: not to be read, written or closed. Lives as long as the volume.
 */
int nebd_eventfd(nebd_volume *volume, uint32_t queue);

/* ---- Memory that is not copied ---------------------------------------------------------------
 * Any memory will do for IO; what lies wholly in one of these is used in place.
 */

/* Page-aligned shared memory, contents undefined; NULL if the arena has no room for it now. */
void *nebd_alloc(nebd_volume *volume, size_t length);
/* Only with no request in flight that uses it. NULL is allowed; foreign pointers are ignored. */
void nebd_free(nebd_volume *volume, void *data);

/*
 * Registers memory of the host's own, such as a guest's: a memfd of `length` bytes (whole pages),
 * sealed with F_SEAL_SHRINK and F_SEAL_GROW, that this process has mapped, whole and shared, at
 * `address`. Returns its id, from 1. The descriptor may be closed afterwards; the mapping must stay
 * until nebd_unregister_memory or nebd_close.
 */
int nebd_register_memory(nebd_volume *volume, int memfd, uint64_t length, void *address);
/* Requests in flight that use it are completed first. */
int nebd_unregister_memory(nebd_volume *volume, int id);

#ifdef __cplusplus
}
#endif

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * libnebd.h: the interface of Curve's NEBD client, served by nebd.
 *
 * A program that was written for Curve compiles and links against this header and library unchanged:
 * names, signatures and layouts are Curve's. New programs are better off with <nebd.h>, which tells
 * errors apart. docs/curve-api.md says what every function does, and where it does more than Curve.
 *
 *   nebd_lib_init();
 *   int fd = nebd_lib_open("file:disk1");
 *   NebdClientAioContext aio = {0, 4096, 0, LIBAIO_OP_READ, on_done, block, 0};
 *   if (fd > 0 && nebd_lib_aio_pread(fd, &aio) == 0) ... on_done(&aio) runs, with aio.ret set
 *   nebd_lib_close(fd);
 *   nebd_lib_uninit();
 *
 * RESULTS    -1 on failure, for every reason alike; nebd_error_text of <nebd.h> explains the last
 *            failed open and resize of a thread. Otherwise 0, or what a function is asked for.
 *
 * REQUESTS   The aio functions, and nebd_lib_discard and nebd_lib_flush, take a context that belongs to
 *            the library, with its buffer, from the call to the callback. If they return 0 the
 *            callback runs exactly once, on a thread of the library, with `ret` 0 or -1. If they
 *            return -1 (a NULL, no such fd, a volume that is gone) nothing was started. Callbacks may
 *            free their context, start requests, and close. They must be short, and throw nothing.
 *
 * ALIGNMENT  Any offset and length. What is no whole block of the volume costs a read of the blocks at
 *            its ends; see docs/curve-api.md for what is promised about such writes side by side.
 *
 * WAITING    A server that dies or is replaced is no error: requests wait for the next one.
 *
 * THREADS    Everything may be called from any thread at any time.
 */
#ifndef LIBNEBD_H
#define LIBNEBD_H

/* Those that Curve's header brings along, which its users may have come to rely on. */
#include <aio.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Longest file name, in bytes. */
#define NEBD_MAX_FILE_PATH_LEN 1024

/* What a request is. The function that is called decides; this is for the program's own use. */
typedef enum LIBAIO_OP {
    LIBAIO_OP_READ,
    LIBAIO_OP_WRITE,
    LIBAIO_OP_DISCARD,
    LIBAIO_OP_FLUSH
} LIBAIO_OP;

typedef struct NebdOpenFlags {
    int exclusive; /* not 0: nobody else may have the volume open */
} NebdOpenFlags;

struct NebdClientAioContext;

/* Told that a request is done. */
typedef void (*LibAioCallBack)(struct NebdClientAioContext *context);

typedef struct NebdClientAioContext {
    off_t offset;            /* where in the volume, in bytes */
    size_t length;           /* bytes */
    int ret;                 /* set before the callback: 0, or -1 */
    LIBAIO_OP op;            /* not looked at */
    LibAioCallBack cb;       /* called once */
    void *buf;               /* data of a read or write */
    unsigned int retryCount; /* not touched */
} NebdClientAioContext;

/* ---- The library ------------------------------------------------------------------------------- */

/*
 * Must come first. Reads /etc/nebd/nebd-client.conf if there is such a file; otherwise the server is the
 * one that the environment variable NEBD_SOCKET names, or /run/nebd/nebd.sock. Once initialized, further
 * calls return 0 and change nothing.
 */
int nebd_lib_init(void);

/*
 * The same with a file of `key=value` lines, of which `nebdserver.serverAddress`, the path of the
 * server's socket, must be there. Curve's other keys have no meaning here; they are named once on
 * the standard error output. -1 if the file cannot be read or has no address.
 */
int nebd_lib_init_with_conf(const char *confPath);

/* Closes what is open. One call undoes any number of nebd_lib_init. Always 0. */
int nebd_lib_uninit(void);

/* ---- Volumes ----------------------------------------------------------------------------------- */

/* Sets `exclusive` to 1. */
void nebd_lib_init_open_flags(NebdOpenFlags *flags);

/*
 * Opens a volume: BACKEND:NAME such as file:disk1, or cbd:POOL/PATH_USER_:CONF. Returns an fd, a
 * positive number that has nothing to do with the process's file descriptors, or -1. Without flags it
 * is exclusive.
 */
int nebd_lib_open(const char *filename);
int nebd_lib_open_with_flags(const char *filename, const NebdOpenFlags *openflags);

/*
 * Waits until every request has completed and its callback has returned. In a callback it does not
 * wait: the volume is closed once its last callback has returned. 0 too if there is no such fd.
 */
int nebd_lib_close(int fd);

/* ---- Blocking IO: 0 or -1 ---------------------------------------------------------------------- */

int nebd_lib_pread(int fd, void *buf, off_t offset, size_t length);
int nebd_lib_pwrite(int fd, const void *buf, off_t offset, size_t length);

/* Makes every write that has completed durable. */
int nebd_lib_sync(int fd);

/* ---- Requests with a callback: 0 or -1 --------------------------------------------------------- */

int nebd_lib_aio_pread(int fd, struct NebdClientAioContext *context);
int nebd_lib_aio_pwrite(int fd, struct NebdClientAioContext *context);

/* Forgets the whole blocks in a range: they read as zeros or as before. */
int nebd_lib_discard(int fd, struct NebdClientAioContext *context);

/* Makes every write that has completed durable. */
int nebd_lib_flush(int fd, struct NebdClientAioContext *context);

/* ---- What a volume is -------------------------------------------------------------------------- */

/* Size in bytes, or -1. */
int64_t nebd_lib_filesize(int fd);
int64_t nebd_lib_getinfo(int fd);

/* Size of a block in bytes, or -1. */
int64_t nebd_lib_blocksize(int fd);

/* Changes the size, in bytes: whole blocks. */
int nebd_lib_resize(int fd, int64_t size);

/* There is no cache: 0 for an fd that is open. */
int nebd_lib_invalidcache(int fd);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* LIBNEBD_H */

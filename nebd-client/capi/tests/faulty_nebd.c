/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What verified_io.c needs of libnebd, over memory and with the fault that FAULT names, once in a
 * while: so that a test can prove that the example notices.
 */
#include <nebd.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum { PERIOD = 400, BLOCK_BYTES = 4096 };

struct nebd_volume {
    unsigned requests;
};

struct nebd_options {
    int unused;
};

static char disk[8 << 20];

static int is_faulty(nebd_volume *volume, const char *fault)
{
    const char *chosen = getenv("FAULT");
    return chosen != NULL && strcmp(chosen, fault) == 0 && ++volume->requests % PERIOD == 0;
}

nebd_options *nebd_options_new(void)
{
    return (nebd_options *)calloc(1, sizeof(nebd_options));
}

void nebd_options_free(nebd_options *options)
{
    free(options);
}

int nebd_options_set_completion(nebd_options *options, int mode)
{
    options->unused = mode;
    return 0;
}

int nebd_options_set_event_callback(nebd_options *options, nebd_event_callback callback,
                                    void *user_data)
{
    options->unused = callback != NULL && user_data != NULL;
    return 0;
}

int nebd_open(const char *name, const nebd_options *options, nebd_volume **volume)
{
    *volume = (nebd_volume *)calloc(1, sizeof(nebd_volume));
    return name == NULL || options == NULL || *volume == NULL ? -EINVAL : 0;
}

int nebd_close(nebd_volume *volume)
{
    free(volume);
    return 0;
}

size_t nebd_error_text(char *text, size_t size)
{
    if (size > 0)
        *text = '\0';
    return 0;
}

int nebd_info(nebd_volume *volume, struct nebd_info *info, size_t size)
{
    memset(info, 0, size);
    info->size_bytes = sizeof disk;
    info->flags = NEBD_INFO_CAN_DISCARD | NEBD_INFO_CAN_WRITE_ZEROES;
    return volume == NULL ? -EINVAL : 0;
}

int nebd_stats(nebd_volume *volume, struct nebd_stats *stats, size_t size)
{
    memset(stats, 0, size);
    return volume == NULL ? -EINVAL : 0;
}

void *nebd_alloc(nebd_volume *volume, size_t length)
{
    return volume == NULL ? NULL : malloc(length);
}

void nebd_free(nebd_volume *volume, void *data)
{
    if (volume != NULL)
        free(data);
}

int nebd_aio_readv(nebd_volume *volume, const struct iovec *iov, int iovcnt, uint64_t offset,
                   uint32_t flags, nebd_callback callback, void *user_data)
{
    int failed = is_faulty(volume, "read-error");
    if (is_faulty(volume, "short-read"))
        iovcnt--;
    if (is_faulty(volume, "misplaced-read"))
        offset ^= BLOCK_BYTES;
    for (int i = 0; i < iovcnt; offset += iov[i++].iov_len)
        memcpy(iov[i].iov_base, disk + offset, iov[i].iov_len);
    callback(user_data, failed || flags != 0 ? -EIO : 0);
    return 0;
}

int nebd_aio_writev(nebd_volume *volume, const struct iovec *iov, int iovcnt, uint64_t offset,
                    uint32_t flags, nebd_callback callback, void *user_data)
{
    if (is_faulty(volume, "refused-write"))
        return -EAGAIN;
    if (is_faulty(volume, "lost-write"))
        iovcnt = 0;
    if (is_faulty(volume, "torn-write"))
        iovcnt--;
    if (is_faulty(volume, "misplaced-write"))
        offset ^= BLOCK_BYTES;
    for (int i = 0; i < iovcnt; offset += iov[i++].iov_len)
        memcpy(disk + offset, iov[i].iov_base, iov[i].iov_len);
    callback(user_data, (flags & ~NEBD_FUA) != 0 ? -EINVAL : 0);
    return 0;
}

int nebd_aio_discard(nebd_volume *volume, uint64_t offset, uint64_t length, uint32_t flags,
                     nebd_callback callback, void *user_data)
{
    /* Both are allowed: to read as zeros, or as before. */
    if (offset / BLOCK_BYTES % 2 == 0)
        memset(disk + offset, 0, length);
    if (is_faulty(volume, "wide-discard"))
        memset(disk + (offset ^ BLOCK_BYTES), 0, length);
    callback(user_data, flags != 0 ? -EINVAL : 0);
    return 0;
}

int nebd_aio_write_zeroes(nebd_volume *volume, uint64_t offset, uint64_t length, uint32_t flags,
                          nebd_callback callback, void *user_data)
{
    if (is_faulty(volume, "lost-zeroes"))
        length = 0;
    memset(disk + offset, 0, length);
    callback(user_data, (flags & ~NEBD_NO_UNMAP) != 0 ? -EINVAL : 0);
    return 0;
}

int nebd_aio_flush(nebd_volume *volume, uint32_t flags, nebd_callback callback, void *user_data)
{
    callback(user_data, volume == NULL || flags != 0 ? -EINVAL : 0);
    return 0;
}

int nebd_flush(nebd_volume *volume, uint32_t flags)
{
    return volume == NULL || flags != 0 ? -EINVAL : 0;
}

int nebd_read(nebd_volume *volume, void *data, size_t length, uint64_t offset, uint32_t flags)
{
    memcpy(data, disk + offset, length);
    return volume == NULL || flags != 0 ? -EINVAL : 0;
}

/* Everything completes at once, so there is never anything to poll. */
int nebd_poll(nebd_volume *volume, uint32_t queue, int timeout_ms)
{
    return volume == NULL || queue != 0 || timeout_ms != 0 ? -EINVAL : 0;
}

int nebd_arm(nebd_volume *volume, uint32_t queue)
{
    return volume == NULL || queue != 0 ? -EINVAL : 1;
}

int nebd_eventfd(nebd_volume *volume, uint32_t queue)
{
    return volume == NULL || queue != 0 ? -EINVAL : 0;
}

// SPDX-License-Identifier: Apache-2.0
//
// Verified IO through Curve's interface alone, as C++ programs use it: contexts are objects that free
// themselves in their callback, which starts the next request.
//
//   c++ -std=c++17 -o curve_io curve_io.cpp -L/usr/local/lib/nebd -lnebdclient -pthread
//   ./curve_io [--conf FILE] [--seconds N] BACKEND:NAME
//
// OVERWRITES THE FIRST MEBIBYTE. Workers have pieces of the volume of their own, of odd lengths, wall to
// wall, so that neighbours share blocks. Each writes parts of its piece and reads it back, without
// end. SIGINT and SIGTERM bring on the end early: the whole is then read once more. The
// server may be killed or replaced meanwhile.
//
// Exit code: 0 if every byte was right and no request failed, 1 otherwise, 2 for wrong usage.
#include <nebd/libnebd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace {

constexpr size_t kSize = 1 << 20;

volatile std::sig_atomic_t isToldToEnd = 0;
std::atomic<uint64_t> requests{0}, errors{0}, mismatches{0};

// A request that lives until its callback has run.
class Request : private NebdClientAioContext {
public:
    using Then = std::function<void(std::vector<uint8_t>)>;

    static void start(int fd, LIBAIO_OP kind, off_t at, std::vector<uint8_t> data, Then then)
    {
        auto request = std::make_unique<Request>(kind, at, std::move(data), std::move(then));
        NebdClientAioContext *context = request.get();
        const int started = kind == LIBAIO_OP::LIBAIO_OP_READ ? nebd_lib_aio_pread(fd, context)
                            : kind == LIBAIO_OP_WRITE         ? nebd_lib_aio_pwrite(fd, context)
                                                              : nebd_lib_flush(fd, context);
        if (started == 0) {
            request.release(); // the callback's
        } else {
            std::fprintf(stderr, "a request of kind %d was refused\n", static_cast<int>(kind));
            std::_Exit(1);
        }
    }

    Request(LIBAIO_OP kind, off_t at, std::vector<uint8_t> bytes, Then next)
        : NebdClientAioContext{}, data_(std::move(bytes)), then_(std::move(next))
    {
        op = kind;
        offset = at;
        length = data_.size();
        buf = data_.data();
        cb = &Request::onDone;
    }

private:
    static void onDone(NebdClientAioContext *context)
    {
        std::unique_ptr<Request> request(static_cast<Request *>(context));
        requests++;
        if (request->ret != 0) {
            errors++;
            std::fprintf(stderr, "a request of kind %d failed\n", static_cast<int>(request->op));
        }
        auto then = std::move(request->then_);
        auto data = std::move(request->data_);
        request.reset();
        then(std::move(data));
    }

    std::vector<uint8_t> data_;
    Then then_;
};

// Counts workers that are not done.
class Gate {
public:
    void enter()
    {
        std::lock_guard<std::mutex> guard(mutex_);
        inside_++;
    }

    void leave()
    {
        std::lock_guard<std::mutex> guard(mutex_);
        if (--inside_ == 0)
            empty_.notify_all();
    }

    void wait()
    {
        std::unique_lock<std::mutex> guard(mutex_);
        empty_.wait(guard, [this] { return inside_ == 0; });
    }

private:
    std::mutex mutex_;
    std::condition_variable empty_;
    int inside_ = 0;
};

// One piece of the volume, and what it holds.
class Worker {
public:
    Worker(int fd, size_t offset, size_t length, Gate &gate, const std::atomic<bool> &isOver)
        : fd_(fd), offset_(offset), bytes_(length), gate_(gate), isOver_(isOver),
          random_(static_cast<uint32_t>(offset) + 1)
    {
        gate_.enter();
        write(0, length);
    }

    void check(const std::vector<uint8_t> &found) const
    {
        if (found != bytes_ && mismatches++ < 10)
            std::fprintf(stderr, "%zu bytes at %zu are wrong\n", bytes_.size(), offset_);
    }

    size_t offset() const { return offset_; }
    size_t length() const { return bytes_.size(); }

private:
    void next()
    {
        if (isOver_ || errors > 10)
            return gate_.leave();
        const auto dice = random_() % 8;
        if (dice < 5) {
            const size_t at = random_() % bytes_.size();
            write(at, 1 + random_() % (bytes_.size() - at));
        } else if (dice < 7) {
            start(LIBAIO_OP_READ, 0, std::vector<uint8_t>(bytes_.size(), 0xee),
                  [this](std::vector<uint8_t> found) {
                      check(found);
                      next();
                  });
        } else {
            start(LIBAIO_OP_FLUSH, 0, {}, [this](std::vector<uint8_t>) { next(); });
        }
    }

    void write(size_t at, size_t length)
    {
        std::vector<uint8_t> data(length);
        for (auto &byte : data)
            byte = static_cast<uint8_t>(random_() >> 3);
        std::copy(data.begin(), data.end(), bytes_.begin() + static_cast<std::ptrdiff_t>(at));
        start(LIBAIO_OP_WRITE, at, std::move(data), [this](std::vector<uint8_t>) { next(); });
    }

    void start(LIBAIO_OP kind, size_t at, std::vector<uint8_t> data, Request::Then then)
    {
        Request::start(fd_, kind, static_cast<off_t>(offset_ + at), std::move(data),
                       std::move(then));
    }

    int fd_;
    size_t offset_;
    std::vector<uint8_t> bytes_;
    Gate &gate_;
    const std::atomic<bool> &isOver_;
    std::minstd_rand random_;
};

void run(int fd, std::chrono::seconds limit)
{
    Gate gate;
    std::atomic<bool> isOver{false};
    std::vector<std::unique_ptr<Worker>> workers;
    const size_t lengths[] = {4096, 1000, 8192, 3, 12288, 5000, 511};
    for (size_t offset = 0, i = 0; offset < kSize / 4; offset += lengths[i++ % 7])
        workers.push_back(std::make_unique<Worker>(fd, offset, lengths[i % 7], gate, isOver));
    const auto deadline = std::chrono::steady_clock::now() + limit;
    while (!isToldToEnd && errors == 0 && std::chrono::steady_clock::now() < deadline)
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
    isOver = true;
    gate.wait();
    for (const auto &worker : workers) {
        std::vector<uint8_t> found(worker->length());
        if (nebd_lib_pread(fd, found.data(), static_cast<off_t>(worker->offset()), found.size()))
            errors++;
        worker->check(found);
    }
}

int usage()
{
    std::fprintf(stderr, "usage: curve_io [--conf FILE] [--seconds N] BACKEND:NAME\n");
    return 2;
}

} // namespace

int main(int argc, char **argv)
{
    std::string conf, name;
    long seconds = 10;
    for (int i = 1; i < argc; i++) {
        const std::string argument = argv[i];
        if (argument == "--conf" && i + 1 < argc)
            conf = argv[++i];
        else if (argument == "--seconds" && i + 1 < argc)
            seconds = std::strtol(argv[++i], nullptr, 10);
        else if (argument[0] == '-' || !name.empty())
            return usage();
        else
            name = argument;
    }
    if (name.empty() || seconds <= 0)
        return usage();
    if ((conf.empty() ? nebd_lib_init() : nebd_lib_init_with_conf(conf.c_str())) != 0) {
        std::fprintf(stderr, "cannot initialize\n");
        return 1;
    }
    const int fd = nebd_lib_open(name.c_str());
    if (fd <= 0 || nebd_lib_filesize(fd) < static_cast<int64_t>(kSize)) {
        std::fprintf(stderr, "%s cannot be opened, or is smaller than a mebibyte\n", name.c_str());
        return 1;
    }
    const auto onSignal = [](int) { isToldToEnd = 1; };
    std::signal(SIGINT, onSignal);
    std::signal(SIGTERM, onSignal);
    run(fd, std::chrono::seconds(seconds));
    std::printf("curve_io %s: %llu requests, %llu errors, %llu mismatches\n", name.c_str(),
                static_cast<unsigned long long>(requests), static_cast<unsigned long long>(errors),
                static_cast<unsigned long long>(mismatches));
    if (nebd_lib_close(fd) != 0 || nebd_lib_uninit() != 0)
        errors++;
    return errors == 0 && mismatches == 0 ? 0 : 1;
}

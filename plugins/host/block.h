// One CTA on a CPU: every CUDA thread a fiber, switched where threads wait for each other, in random order.
//
// Everything that waits is checked: threads that wait for each other at different places of the source, and
// waits that nobody can end, abort with a message that says who waits where (README.md).
#pragma once

#include <link.h>

#include <cstdarg>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include "host/fiber.h"

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct uint3 {
    unsigned x, y, z;
};

inline uint3 threadIdx, blockIdx;  // of the fiber that runs
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace xlstm::host {

constexpr unsigned WARP_SIZE = 32, MOST_THREADS = 1024, BARRIERS = 16;

// A place in a kernel's source.
struct Site {
    const char *file;
    int line;
    bool operator==(const Site &other) const {
        return line == other.line && std::strcmp(file, other.file) == 0;
    }
};

// What the lanes of a warp bring to a collective operation and take from it; null for lanes without part in it.
struct Lanes {
    const void *in[WARP_SIZE];
    void *out[WARP_SIZE];
};

// The machine that kernels see, and the seed that the order of threads comes from.
struct Device {
    int shared_limit = 227 << 10, processors = 1;
    uint64_t random = 0x9e3779b97f4a7c15u;
    std::mutex busy;
};
inline Device device;

class Block {
public:
    // Runs `kernel` as all threads of the CTA blockIdx.
    template <class Kernel>
    void run(unsigned threads, const Kernel &kernel) {
        kernel_ = [](const void *kernel) { (*static_cast<const Kernel *>(kernel))(); };
        closure_ = &kernel;
        threads_ = live_ = threads;
        gone_ = 0;
        ++generation_;
        runnable_.clear();
        for (Barrier &barrier : barriers_) barrier = {};
        for (unsigned w = 0; w * WARP_SIZE < threads; ++w) {
            const unsigned lanes = threads - w * WARP_SIZE;
            warps_[w].live = lanes >= WARP_SIZE ? ~0u : (1u << lanes) - 1;
            warps_[w].groups.clear();
        }
        for (unsigned t = 0; t < threads; ++t) {
            fibers_[t].prepare([] { active().begin(); });
            waits_[t] = {};
            passed_[t] = 0;
            runnable_.push_back(t);
        }
        current_ = next();
        main_.switch_to(fibers_[current_]);
    }

    // Waits until `count` threads (0: all that have not returned) are at barrier `id`.
    void barrier(unsigned id, unsigned count, Site site) {
        if (id >= BARRIERS) fail("barrier %u: there are %u", id, BARRIERS);
        if (count % WARP_SIZE != 0)
            fail("barrier %u waits for %u threads, which are no whole warps", id, count);
        Barrier &barrier = barriers_[id];
        if (barrier.waiting.empty()) {
            barrier.site = site, barrier.count = count;
        } else if (!(barrier.site == site) || barrier.count != count) {
            fail("barrier %u: thread %u is at %s:%d, others wait at %s:%d", id, current_, site.file,
                 site.line, barrier.site.file, barrier.site.line);
        }
        barrier.waiting.push_back(current_);
        waits_[current_] = {"a barrier", site};
        complete(barrier);
        switch_to_next();
    }

    // Joins the lanes of `mask` in an operation on all their data: the last to arrive calls `operation` with it
    // for all of them. `what` names the kind of operation and must be the same for all.
    void collective(unsigned mask, const char *what, Site site, const void *in, void *out,
                    void (*operation)(const Lanes &, const void *), const void *closure) {
        Warp &warp = warps_[current_ / WARP_SIZE];
        const unsigned bit = 1u << current_ % WARP_SIZE;
        if ((mask & bit) == 0)
            fail("%s at %s:%d: thread %u is not in its mask", what, site.file, site.line, current_);
        Group *group = nullptr;
        for (Group &candidate : warp.groups)
            if (candidate.mask == mask) group = &candidate;
        if (group == nullptr) {
            warp.groups.push_back({mask, 0, what, site, operation, closure, {}});
            group = &warp.groups.back();
        } else if (!(group->site == site) || std::strcmp(group->what, what) != 0) {
            fail("warp %u: thread %u is in %s at %s:%d, other lanes in %s at %s:%d", current_ / WARP_SIZE,
                 current_, what, site.file, site.line, group->what, group->site.file, group->site.line);
        }
        group->arrived |= bit;
        group->lanes.in[current_ % WARP_SIZE] = in;
        group->lanes.out[current_ % WARP_SIZE] = out;
        waits_[current_] = {what, site};
        complete(warp, *group);
        switch_to_next();
    }

    unsigned thread() const { return current_; }
    uint64_t generation() const { return generation_; }

    [[noreturn]] __attribute__((format(printf, 2, 3))) void fail(const char *format, ...) const {
        std::fprintf(stderr, "CTA (%u, %u, %u), thread %u: ", blockIdx.x, blockIdx.y, blockIdx.z, current_);
        std::va_list values;
        va_start(values, format);
        std::vfprintf(stderr, format, values);
        va_end(values);
        std::fputc('\n', stderr);
        std::abort();
    }

    static Block &active() {
        static Block block;
        return block;
    }

private:
    struct Wait {
        const char *what = nullptr;  // null: it does not wait
        Site site = {};
    };
    struct Barrier {
        unsigned count = 0;
        Site site = {};
        std::vector<unsigned> waiting;
    };
    struct Group {  // lanes with one mask
        unsigned mask, arrived;
        const char *what;
        Site site;
        void (*operation)(const Lanes &, const void *);
        const void *closure;
        Lanes lanes;
    };
    struct Warp {
        unsigned live = 0;
        std::vector<Group> groups;
    };

    // The body of every fiber.
    [[noreturn]] void begin() {
        fibers_[current_].arrived();
        set_thread();
        kernel_(closure_);
        const unsigned thread = current_;
        gone_ += passed_[thread] > 0;
        Warp &warp = warps_[thread / WARP_SIZE];
        --live_;
        warp.live &= ~(1u << thread % WARP_SIZE);
        // Who has returned is no longer waited for.
        complete(barriers_[0]);
        for (size_t g = warp.groups.size(); g-- > 0;) complete(warp, warp.groups[g]);
        if (live_ == 0) {
            fibers_[thread].switch_to(main_, true);
        } else {
            current_ = next();
            fibers_[thread].switch_to(fibers_[current_], true);
        }
        std::abort();
    }

    // Ends a wait if all are there.
    void complete(Barrier &barrier) {
        const size_t count = barrier.count == 0 ? live_ : barrier.count;
        if (barrier.waiting.size() < count || barrier.waiting.empty()) return;
        if (barrier.count == 0 && gone_ > 0) {
            fail("barrier at %s:%d: %u threads have returned that took part in an earlier one",
                 barrier.site.file, barrier.site.line, gone_);
        }
        for (unsigned thread : barrier.waiting) {
            passed_[thread] += barrier.count == 0;
            release(thread);
        }
        barrier.waiting.clear();
    }

    void complete(Warp &warp, Group &group) {
        if (group.arrived != (group.mask & warp.live) || group.arrived == 0) return;
        group.operation(group.lanes, group.closure);
        const unsigned first = static_cast<unsigned>(&warp - warps_) * WARP_SIZE;
        for (unsigned lane = 0; lane < WARP_SIZE; ++lane)
            if (group.arrived >> lane & 1) release(first + lane);
        if (&group != &warp.groups.back()) group = warp.groups.back();
        warp.groups.pop_back();
    }

    void release(unsigned thread) {
        waits_[thread] = {};
        runnable_.push_back(thread);
    }

    void switch_to_next() {
        const unsigned from = current_;
        current_ = next();
        if (current_ != from) fibers_[from].switch_to(fibers_[current_]);
        set_thread();
    }

    void set_thread() { threadIdx = {current_, 0, 0}; }

    unsigned next() {
        if (runnable_.empty()) deadlock();
        uint64_t &x = device.random;
        x ^= x << 13, x ^= x >> 7, x ^= x << 17;
        const size_t at = static_cast<size_t>((x >> 32) * runnable_.size() >> 32);
        const unsigned thread = runnable_[at];
        runnable_[at] = runnable_.back();
        runnable_.pop_back();
        return thread;
    }

    [[noreturn]] void deadlock() const {
        std::fprintf(stderr, "CTA (%u, %u, %u): its threads wait for each other\n", blockIdx.x, blockIdx.y,
                     blockIdx.z);
        for (unsigned t = 0; t < threads_; ++t) {
            const auto same = [&](unsigned other) {
                return waits_[t].what == waits_[other].what && waits_[t].site.line == waits_[other].site.line;
            };
            unsigned last = t;
            while (last + 1 < threads_ && same(last + 1)) ++last;
            std::fprintf(stderr, "  threads %u to %u ", t, last);
            if (waits_[t].what == nullptr) std::fprintf(stderr, "have returned\n");
            else
                std::fprintf(stderr, "wait in %s at %s:%d\n", waits_[t].what, waits_[t].site.file,
                             waits_[t].site.line);
            t = last;
        }
        std::abort();
    }

    void (*kernel_)(const void *) = nullptr;
    const void *closure_ = nullptr;
    Fiber main_, fibers_[MOST_THREADS];
    Wait waits_[MOST_THREADS];
    unsigned passed_[MOST_THREADS];  // barriers of the whole CTA behind this thread
    unsigned gone_ = 0;              // threads that have returned after such a barrier
    Warp warps_[MOST_THREADS / WARP_SIZE];
    Barrier barriers_[BARRIERS];
    std::vector<unsigned> runnable_;
    unsigned threads_ = 0, live_ = 0, current_ = 0;
    uint64_t generation_ = 0;  // of the CTA
};

// --- What a thread of a CTA can ask for -----------------------------------------------------------------------

inline unsigned lane_index() { return Block::active().thread() % WARP_SIZE; }

#define XLSTM_HOST_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

// `operation(lanes)` on the data of all lanes of `mask` at once, called by one of them: lanes.in[l] is the `in` of
// lane l, lanes.out[l] its `out`, null for lanes outside of the mask and lanes that have returned.
template <class Operation>
void warp_collective(unsigned mask, const char *what, const void *in, void *out, const Operation &operation,
                     XLSTM_HOST_SITE) {
    const auto call = [](const Lanes &lanes, const void *closure) {
        (*static_cast<const Operation *>(closure))(lanes);
    };
    Block::active().collective(mask, what, {file, line}, in, out, call, &operation);
}

inline void warp_barrier(unsigned mask = ~0u, XLSTM_HOST_SITE) {
    warp_collective(mask, "__syncwarp", nullptr, nullptr, [](const Lanes &) {}, file, line);
}

// Every lane's value for every lane of a whole warp. Copies 32 x 32 values; warp_collective needs none.
template <class T>
void warp_all(const T &mine, T (&lanes)[WARP_SIZE], XLSTM_HOST_SITE) {
    const auto gather = [](const Lanes &all) {
        for (void *out : all.out) {
            for (unsigned l = 0; l < WARP_SIZE; ++l) {
                if (out == nullptr) Block::active().fail("a lane of a whole warp's operation has returned");
                std::memcpy(static_cast<T *>(out) + l, all.in[l], sizeof(T));
            }
        }
    };
    warp_collective(~0u, "an operation of a whole warp", &mine, lanes, gather, file, line);
}

// An object of type T for each thread, new in every CTA.
template <class T>
T &per_thread() {
    struct Slot {
        uint64_t generation = 0;
        T value;
    };
    static std::unique_ptr<Slot[]> slots(new Slot[MOST_THREADS]);
    Slot &slot = slots[Block::active().thread()];
    if (slot.generation != Block::active().generation()) {
        slot.value = T();
        slot.generation = Block::active().generation();
    }
    return slot.value;
}

inline unsigned char *&dynamic_shared() {
    static unsigned char *memory = nullptr;
    return memory;
}

// --- Launch ---------------------------------------------------------------------------------------------------

// Fills with 0xff, NaN in every type of float, what `__shared__` declares: the thread-local variables of this
// library (cuda.h), of which only the program headers know where they lie.
inline void poison_static_shared() {
    const auto visit = [](dl_phdr_info *info, size_t, void *) {
        bool ours = false;
        const ElfW(Phdr) *thread_local_part = nullptr;
        for (int x = 0; x < info->dlpi_phnum; ++x) {
            const ElfW(Phdr) &part = info->dlpi_phdr[x];
            const auto begin = static_cast<uintptr_t>(info->dlpi_addr + part.p_vaddr);
            const auto here = reinterpret_cast<uintptr_t>(&device);
            if (part.p_type == PT_LOAD && here >= begin && here - begin < part.p_memsz) ours = true;
            if (part.p_type == PT_TLS) thread_local_part = &part;
        }
        if (!ours) return 0;
        if (thread_local_part != nullptr && info->dlpi_tls_data != nullptr)
            std::memset(info->dlpi_tls_data, 0xff, thread_local_part->p_memsz);
        return 1;
    };
    dl_iterate_phdr(visit, nullptr);
}

// All CTAs of a grid, one after another, on this thread. Returns 0 or a cudaError_t.
template <class Kernel>
int run(dim3 grid, int threads, size_t shared, const Kernel &kernel) {
    constexpr int invalid_value = 1, invalid_configuration = 9;
    if (threads < 1 || threads > int(MOST_THREADS) || grid.x == 0 || grid.y == 0 || grid.z == 0)
        return invalid_configuration;
    if (shared > size_t(device.shared_limit)) return invalid_value;
    const std::lock_guard<std::mutex> lock(device.busy);
    // Memory of exactly this size, so that AddressSanitizer sees an access behind its end.
    constexpr size_t alignment = 128;
    void *memory = nullptr;
    if (posix_memalign(&memory, alignment, shared) != 0) return 2;
    dynamic_shared() = static_cast<unsigned char *>(memory);
    gridDim = grid;
    blockDim = dim3(static_cast<unsigned>(threads));
    for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
        for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
            for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
                if (shared > 0) std::memset(memory, 0xff, shared);
                poison_static_shared();
                Block::active().run(static_cast<unsigned>(threads), kernel);
            }
        }
    }
    std::free(memory);
    return 0;
}

}  // namespace xlstm::host

// Seeds the order of threads; a library starts with a fixed seed.
extern "C" __attribute__((used, visibility("default"))) inline void xlstm_host_seed(uint64_t seed) {
    seed += 0x9e3779b97f4a7c15u;  // the seeds of neighbours shall have nothing in common, and no state be 0
    seed = (seed ^ seed >> 30) * 0xbf58476d1ce4e5b9u;
    seed = (seed ^ seed >> 27) * 0x94d049bb133111ebu;
    xlstm::host::device.random = (seed ^ seed >> 31) | 1;
}

// The device that kernels are told they run on: shared memory of a CTA, and streaming multiprocessors.
extern "C" __attribute__((used, visibility("default"))) inline void xlstm_host_device(int shared_limit,
                                                                                      int processors) {
    xlstm::host::device.shared_limit = shared_limit;
    xlstm::host::device.processors = processors;
}

// How a CPU kernel asks for threads: whoever calls it brings them.
#pragma once

#include <cstddef>
#include <type_traits>

namespace xlstm {

// Runs task(data, 0) … task(data, count - 1), in any order and on any threads, and returns when all are done.
struct Parallel {
    void (*run)(const void *pool, size_t count, void (*task)(void *data, size_t index), void *data);
    const void *pool;
};

// `body(index)` for every index; one after another without a pool.
template <typename Body>
void parallel_for(const Parallel *parallel, size_t count, Body &&body) {
    if (parallel == nullptr || count == 1) {
        for (size_t index = 0; index < count; ++index) body(index);
        return;
    }
    using Plain = typename std::remove_reference<Body>::type;
    const auto task = [](void *data, size_t index) { (*static_cast<Plain *>(data))(index); };
    parallel->run(parallel->pool, count, task, const_cast<void *>(static_cast<const void *>(&body)));
}

}  // namespace xlstm

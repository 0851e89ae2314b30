/* Runs an exported xLSTM as a TensorRT engine: streams of any length with a state of constant size.
 *
 * A runner holds one engine, its state and its memory, for a fixed batch; the rows of the batch are streams
 * that do not know of each other. The first call after xlstm_open starts from the all-zero state.
 *
 * Errors      Every function that can fail returns a status and leaves a text, which xlstm_error returns. No
 *             C++ exception leaves the library. Arguments are checked before anything is done, and a call
 *             refused with XLSTM_USAGE or XLSTM_BAD_INPUT has changed nothing. After XLSTM_ENVIRONMENT from
 *             xlstm_prefill, xlstm_step or a reset the state is unknown: it cannot be run or saved until a
 *             reset of all rows or a saved state has set it.
 * Threads     A runner is for one thread at a time: any thread, but calls must not overlap, and nothing in it
 *             takes a lock. Different runners may be used by different threads at once. Text of errors is
 *             per thread.
 * Ownership   Buffers passed in are the caller's, are used only during the call, and need no alignment beyond
 *             their type's. A runner belongs to the caller until xlstm_close. Names in xlstm_tensor live as
 *             long as their runner; an error's text until the same thread's next failing call.
 * Layout      Tensors are dense and row-major: inputs and outputs that have a sequence axis are
 *             (batch, length, ...), with all of a call's positions of the first row before the second row's.
 */
#ifndef XLSTM_RUNNER_H
#define XLSTM_RUNNER_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define XLSTM_API __attribute__((visibility("default")))
#else
#define XLSTM_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define XLSTM_RUNNER_VERSION 2 /* of this interface; functions and fields are only ever added */

/* The numbers are the exit codes of xlstm-run, and those of xlstm-export. */
typedef enum xlstm_status {
    XLSTM_OK = 0,
    XLSTM_USAGE = 2,       /* an argument is wrong: the caller's mistake */
    XLSTM_ENVIRONMENT = 3, /* GPU, driver, memory, disk, TensorRT's version or the plugin library */
    XLSTM_BAD_INPUT = 4    /* engine or saved state are damaged or do not belong together */
} xlstm_status;

/* Element types; the numbers are those of saved states. */
typedef enum xlstm_type {
    XLSTM_FLOAT32 = 1,
    XLSTM_FLOAT16 = 2,
    XLSTM_BFLOAT16 = 3,
    XLSTM_INT8 = 4,
    XLSTM_INT32 = 5,
    XLSTM_INT64 = 6,
    XLSTM_BOOL = 7,
    XLSTM_UINT8 = 8
} xlstm_type;

typedef enum xlstm_role { XLSTM_INPUT = 0, XLSTM_OUTPUT = 1, XLSTM_STATE = 2 } xlstm_role;

#define XLSTM_MAX_RANK 8
#define XLSTM_SEQUENCE (-1) /* in xlstm_tensor.dims: the length of the call */

typedef struct xlstm_tensor {
    const char *name; /* a state's is that of its input, past_… */
    int32_t type;     /* xlstm_type */
    int32_t rank;
    int64_t dims[XLSTM_MAX_RANK]; /* the batch filled in */
} xlstm_tensor;

/* Zero all of it, then set `size` and what differs from zero. */
typedef struct xlstm_options {
    uint32_t size;          /* sizeof(xlstm_options) */
    int32_t batch;          /* streams; 0: 1 */
    const char *engine;     /* path of the serialized engine; required */
    const char *io;         /* not read since version 2, where the engine says it; may be null */
    const char *plugin;     /* path of libxlstm_trt.so, for engines that use it; may be null */
    const char *model_hash; /* 64 hexadecimal digits that name the model in saved states; null: zeros */
    int64_t piece;          /* longest piece of a prefill; 0: the engine's longest. Bounds memory */
    int32_t device;         /* number of the GPU */
    int32_t no_graph;       /* 1: steps without a CUDA graph */
} xlstm_options;

typedef struct xlstm_runner xlstm_runner;

/* Load engine and plugin library and allocate all memory; later calls allocate nothing on the GPU but two
 * CUDA graphs, at the second and the third single step. *runner is null after an error. */
XLSTM_API xlstm_status xlstm_open(const xlstm_options *options, xlstm_runner **runner);

/* Free it; null is ignored. */
XLSTM_API void xlstm_close(xlstm_runner *runner);

/* Text of this thread's last failed call: what is wrong, what was found. Never null. */
XLSTM_API const char *xlstm_error(void);

/* XLSTM_RUNNER_VERSION of the library. */
XLSTM_API int32_t xlstm_version(void);

/* How many inputs, outputs or states there are, and the description of one; names are those of
 * io.json, the order is the engine's. */
XLSTM_API int32_t xlstm_count(const xlstm_runner *runner, xlstm_role role);
XLSTM_API xlstm_status xlstm_describe(const xlstm_runner *runner, xlstm_role role, int32_t index,
                                      xlstm_tensor *tensor);

/* Run `length` ≥ 1 positions of every row and move the state on; longer inputs than the engine takes run in
 * pieces. inputs[i] and outputs[i] are the buffers of input and output i; an output that is null is not copied
 * to the host, nor is any if outputs is null. An output without a sequence axis holds the value of the last
 * position. Returns when the outputs are there. */
XLSTM_API xlstm_status xlstm_prefill(xlstm_runner *runner, int64_t length, const void *const *inputs,
                                     void *const *outputs);

/* The same for one position: the decode step. */
XLSTM_API xlstm_status xlstm_step(xlstm_runner *runner, const void *const *inputs, void *const *outputs);

/* Start all rows afresh, or those of the given numbers. */
XLSTM_API xlstm_status xlstm_reset(xlstm_runner *runner);
XLSTM_API xlstm_status xlstm_reset_rows(xlstm_runner *runner, const int32_t *rows, int32_t count);

/* The state of all rows, as README.md describes its bytes. xlstm_get_state writes into a buffer of
 * xlstm_state_bytes. Files are replaced whole or not at all. A state is taken only if all of it fits: model
 * hash, batch, names, types, shapes, checksum. */
XLSTM_API size_t xlstm_state_bytes(const xlstm_runner *runner);
XLSTM_API xlstm_status xlstm_get_state(xlstm_runner *runner, void *buffer, size_t bytes);
XLSTM_API xlstm_status xlstm_set_state(xlstm_runner *runner, const void *buffer, size_t bytes);
XLSTM_API xlstm_status xlstm_save_state(xlstm_runner *runner, const char *path);
XLSTM_API xlstm_status xlstm_load_state(xlstm_runner *runner, const char *path);

#ifdef __cplusplus
}
#endif

#endif

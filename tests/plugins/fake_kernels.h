// Kernels that compute nothing: they remember the call, and answer what the test told them to.
#pragma once

#include "common/call.h"

struct FakeKernels {
    xlstm::Mlstm mlstm;
    xlstm::Slstm slstm;
    void *workspace;
    void *context;
    int runs;
    int status;           // what run returns
    const char *refusal;  // what check returns
    int processors;       // of the GPU
};

extern "C" FakeKernels *fake_kernels();

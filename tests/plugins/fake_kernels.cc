#include "fake_kernels.h"

FakeKernels *fake_kernels() {
    static FakeKernels fake{};
    return &fake;
}

int xlstm_processors() { return fake_kernels()->processors > 0 ? fake_kernels()->processors : 1; }

// Largest for 2 or 7 sequences of length 1, as if the kernels shared those out over more blocks.
static size_t workspace_of(int32_t batch, int32_t length) {
    if (length == 1 && (batch == 2 || batch == 7)) return size_t{1} << (batch == 2 ? 20 : 21);
    return size_t{256} * batch * length;
}

static int note(void *workspace, void *context) {
    fake_kernels()->workspace = workspace;
    fake_kernels()->context = context;
    ++fake_kernels()->runs;
    return fake_kernels()->status;
}

const char *xlstm_mlstm_check(const xlstm::Mlstm *call) {
    fake_kernels()->mlstm = *call;
    return fake_kernels()->refusal;
}
size_t xlstm_mlstm_workspace(const xlstm::Mlstm *call) { return workspace_of(call->batch, call->length); }
int xlstm_mlstm_run(const xlstm::Mlstm *call, void *workspace, void *context) {
    fake_kernels()->mlstm = *call;
    return note(workspace, context);
}

const char *xlstm_slstm_check(const xlstm::Slstm *call) {
    fake_kernels()->slstm = *call;
    return fake_kernels()->refusal;
}
size_t xlstm_slstm_workspace(const xlstm::Slstm *call) { return workspace_of(call->batch, call->length); }
int xlstm_slstm_run(const xlstm::Slstm *call, void *workspace, void *context) {
    fake_kernels()->slstm = *call;
    return note(workspace, context);
}

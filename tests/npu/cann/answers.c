/* A stand-in for CANN, the run time of Ascend NPUs: one Ascend910B1 that computes nothing.

   torch_npu links against CANN, so that it cannot even be imported where CANN is not installed. These are the
   functions that have to answer something, for that import, for fake tensors on device "npu", and for copies between
   the host and the device, whose memory is the host's. Every other function that torch_npu links against is made by
   build.py and answers 0, which is ACL_SUCCESS. To launch an operator is an error: none may seem to have run.
   Signatures: CANN's public AscendCL reference, "acl API (C)". */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int aclError;
enum { ACL_SUCCESS = 0, ACL_ERROR_BAD_ALLOC = 200000, ACL_ERROR_FEATURE_UNSUPPORTED = 200006 };

static char handle; /* what every stream, event and context is: an address that is not null */
static const size_t memory = (size_t)64 << 30;

/* The device. */
aclError aclrtGetDeviceCount(uint32_t *count) { *count = 1; return ACL_SUCCESS; }
aclError aclrtGetDevice(int32_t *device) { *device = 0; return ACL_SUCCESS; }
const char *aclrtGetSocName(void) { return "Ascend910B1"; }
aclError aclrtGetMemInfo(int kind, size_t *unused, size_t *total) { *unused = *total = memory; return ACL_SUCCESS; }
aclError aclGetDeviceCapability(uint32_t device, int what, int64_t *value) { *value = 24; return ACL_SUCCESS; }
aclError aclrtGetSysParamOpt(int option, int64_t *value) { *value = 0; return ACL_SUCCESS; }
aclError aclrtCtxSetSysParamOpt(int option, int64_t value) { return ACL_SUCCESS; }
aclError aclrtSetDeviceSatMode(int mode) { return ACL_SUCCESS; }
aclError aclrtSetOpExecuteTimeOut(uint32_t seconds) { return ACL_SUCCESS; }
const char *aclGetRecentErrMsg(void) { return "the stand-in for CANN computes nothing"; }

/* Handles. */
aclError aclrtGetCurrentContext(void **context) { *context = &handle; return ACL_SUCCESS; }
aclError aclrtCreateStream(void **stream) { *stream = &handle; return ACL_SUCCESS; }
aclError aclrtCreateStreamWithConfig(void **stream, uint32_t priority, uint32_t flag) {
    *stream = &handle;
    return ACL_SUCCESS;
}
aclError aclrtDestroyStreamForce(void *stream) { return ACL_SUCCESS; }
aclError aclrtCreateEventExWithFlag(void **event, uint32_t flag) { *event = &handle; return ACL_SUCCESS; }

/* Operators. The header's arguments are many, and of no use here. */
aclError aclopCompileAndExecute() { return ACL_ERROR_FEATURE_UNSUPPORTED; }
aclError aclrtSynchronizeStreamWithTimeout(void *stream, int32_t milliseconds) { return ACL_SUCCESS; }

/* Memory: the host's. */
static aclError take(void **pointer, size_t size) {
    *pointer = malloc(size ? size : 1);
    return *pointer ? ACL_SUCCESS : ACL_ERROR_BAD_ALLOC;
}
aclError aclrtMalloc(void **pointer, size_t size, int policy) { return take(pointer, size); }
aclError aclrtMallocAlign32(void **pointer, size_t size, int policy) { return take(pointer, size); }
aclError aclrtMallocHost(void **pointer, size_t size) { return take(pointer, size); }
aclError aclrtFree(void *pointer) { free(pointer); return ACL_SUCCESS; }
aclError aclrtFreeHost(void *pointer) { free(pointer); return ACL_SUCCESS; }

aclError aclrtMemcpy(void *to, size_t room, const void *from, size_t size, int kind) {
    memcpy(to, from, size);
    return ACL_SUCCESS;
}
aclError aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t size, int kind, void *stream) {
    memcpy(to, from, size);
    return ACL_SUCCESS;
}

/* Options of CANN's compiler: all of them "0". */
size_t aclGetCompileoptSize(int option) { return 2; }
aclError aclGetCompileopt(int option, char *value, size_t size) {
    strncpy(value, "0", size);
    return ACL_SUCCESS;
}
aclError aclSetCompileopt(int option, const char *value) { return ACL_SUCCESS; }

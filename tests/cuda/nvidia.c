// A stand-in for the libraries of NVIDIA's driver.
//
// As libnvidia-ml.so.1 it counts one device, an H100 with 80 GB. vLLM and torch count devices with it.
// As libcuda.so.1 it has the functions that libraries of vLLM and Triton link to. All of them fail, so nothing can use the device.
#include <stdio.h>

enum { SUCCESS = 0, INVALID_ARGUMENT = 2 };

typedef struct { unsigned long long total, free, used; } Memory;

int nvmlInit(void) { return SUCCESS; }
int nvmlInitWithFlags(unsigned flags) { return SUCCESS; }
int nvmlShutdown(void) { return SUCCESS; }

int nvmlDeviceGetCount_v2(unsigned *count) {
    *count = 1;
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
    if (index != 0) return INVALID_ARGUMENT;
    *device = 0;
    return SUCCESS;
}

int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) {
    *major = 9;
    *minor = 0;
    return SUCCESS;
}

int nvmlDeviceGetName(void *device, char *name, unsigned length) {
    snprintf(name, length, "NVIDIA H100 80GB HBM3");
    return SUCCESS;
}

int nvmlDeviceGetUUID(void *device, char *uuid, unsigned length) {
    snprintf(uuid, length, "GPU-00000000-0000-0000-0000-000000000000");
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo(void *device, Memory *memory) {
    memory->total = memory->free = 81559ULL << 20;
    memory->used = 0;
    return SUCCESS;
}

enum { NO_DEVICE = 100 };
#define FAILS(name) int name(void) { return NO_DEVICE; }

FAILS(cuCtxGetCurrent)
FAILS(cuCtxGetLimit)
FAILS(cuCtxSetCurrent)
FAILS(cuCtxSetLimit)
FAILS(cuDeviceGet)
FAILS(cuDeviceGetAttribute)
FAILS(cuDevicePrimaryCtxRetain)
FAILS(cuFuncGetAttribute)
FAILS(cuFuncSetAttribute)
FAILS(cuFuncSetCacheConfig)
FAILS(cuGetErrorString)
FAILS(cuGetProcAddress_v2)
FAILS(cuMemAddressFree)
FAILS(cuMemAddressReserve)
FAILS(cuMemCreate)
FAILS(cuMemGetAllocationGranularity)
FAILS(cuMemMap)
FAILS(cuMemRelease)
FAILS(cuMemSetAccess)
FAILS(cuMemUnmap)
FAILS(cuModuleGetFunction)
FAILS(cuModuleLoadData)
FAILS(cuOccupancyMaxActiveClusters)
FAILS(cuPointerGetAttribute)
FAILS(cuTensorMapEncodeTiled)

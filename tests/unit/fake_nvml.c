/* A driver library for tests: NVML's C interface over a table that the test fills through the fake_* functions.
 *
 * A value that was not set is a call that is not supported. With -DOLD_DRIVER the symbols of later drivers are missing.
 * Handles and samples hold what they were made of, so that a wrong use of them is an error, as it is in a driver.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum {
    SUCCESS = 0,
    UNINITIALIZED = 1,
    INVALID_ARGUMENT = 2,
    NOT_SUPPORTED = 3,
    NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7,
    ARGUMENT_VERSION_MISMATCH = 25,
};

#define ANY (-1)
#define NUM_ENTRIES 1024
#define NUM_PROCESSES 64
#define FIRST_MIG_DEVICE 64
#define NUM_DEVICES 128
#define NAME_BYTES 64
#define TEXT_BYTES 96

typedef unsigned int uint;
typedef unsigned long long ulong64;

typedef struct {
    char name[NAME_BYTES];
    int device;
    double value;
    char text[TEXT_BYTES];
} Entry;

typedef struct {
    Entry entries[NUM_ENTRIES];
    int count;
} Table;

typedef struct {
    int device, parent, place;
    uint gpu_instance;
} Mig;

typedef struct {
    int device;
    uint pid;
    ulong64 memory;
    ulong64 timestamp;
    uint sm;
} Process;

typedef struct {
    int device;
    uint gpu_instance;
    long order;
} Sample;

static Table values, errors, calls;
static Mig migs[NUM_DEVICES];
static Process processes[NUM_PROCESSES];
static int num_gpus, num_migs, num_processes, num_inits, live_samples;
static uintptr_t generation;

static Entry *find(Table *table, const char *name, int device) {
    for (int i = 0; i < table->count; i++)
        if (table->entries[i].device == device && !strcmp(table->entries[i].name, name)) return &table->entries[i];
    return NULL;
}

static Entry *entry(Table *table, const char *name, int device) {
    Entry *found = find(table, name, device);
    if (found) return found;
    if (table->count == NUM_ENTRIES) abort();
    found = &table->entries[table->count++];
    memset(found, 0, sizeof *found);
    strncpy(found->name, name, NAME_BYTES - 1);
    found->device = device;
    return found;
}

/* What the test calls. */

void fake_reset(void) {
    values.count = errors.count = calls.count = 0;
    num_gpus = num_migs = num_processes = num_inits = live_samples = 0;
    generation++;
}
int fake_add_gpu(void) { return num_gpus++; }
void fake_set_num_gpus(int count) { num_gpus = count; }
int fake_add_mig(int parent, int place, uint gpu_instance) {
    migs[num_migs] = (Mig){FIRST_MIG_DEVICE + num_migs, parent, place, gpu_instance};
    return migs[num_migs++].device;
}
void fake_remove_migs(void) { num_migs = 0; }
void fake_set(int device, const char *name, double value) { entry(&values, name, device)->value = value; }
void fake_unset(int device, const char *name) {
    Entry *found = find(&values, name, device);
    if (found) found->name[0] = 0;
}
void fake_set_text(int device, const char *name, const char *text) {
    strncpy(entry(&values, name, device)->text, text, TEXT_BYTES - 1);
}
/* Of one function, or of all with "*"; of one device, or of all with -1; 0 heals. */
void fake_fail(const char *function, int device, int error) { entry(&errors, function, device)->value = error; }
void fake_add_process(int device, uint pid, ulong64 memory, ulong64 timestamp, uint sm) {
    processes[num_processes++] = (Process){device, pid, memory, timestamp, sm};
}
void fake_remove_processes(void) { num_processes = 0; }
void fake_unload(void) {
    num_inits = 0;
    generation++;
}
int fake_calls(const char *function, int device) {
    int sum = 0;
    for (int i = 0; i < calls.count; i++)
        if ((!strcmp(function, "*") || !strcmp(function, calls.entries[i].name)) &&
            (device == ANY || device == calls.entries[i].device))
            sum += (int)calls.entries[i].value;
    return sum;
}
void fake_forget_calls(void) { calls.count = 0; }
int fake_live_samples(void) { return live_samples; }
int fake_num_inits(void) { return num_inits; }

/* Every call counts itself and asks whether it fails. */

static int failure(const char *function, int device) {
    const char *names[] = {function, "*"};
    int devices[] = {device, ANY};
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 2; j++) {
            Entry *found = find(&errors, names[i], devices[j]);
            if (found && found->value) return (int)found->value;
        }
    return SUCCESS;
}

static int enter(const char *function, int device) {
    entry(&calls, function, device)->value++;
    int error = failure(function, device);
    if (error) return error;
    return num_inits > 0 ? SUCCESS : UNINITIALIZED;
}

static void *handle_of(int device) { return (void *)(generation * NUM_DEVICES * 2 + NUM_DEVICES + device); }

static int device_of(void *handle) {
    uintptr_t number = (uintptr_t)handle;
    return number / (NUM_DEVICES * 2) == generation ? (int)(number % NUM_DEVICES) : -2;
}

#define ENTER(device) \
    do { \
        int error = enter(__func__, device); \
        if (error) return error; \
    } while (0)
#define ENTER_DEVICE(handle) \
    int device = device_of(handle); \
    ENTER(device); \
    if (device < 0) return INVALID_ARGUMENT

static int give(int device, const char *name, uint *value) {
    Entry *found = find(&values, name, device);
    if (!found) return NOT_SUPPORTED;
    *value = (uint)found->value;
    return SUCCESS;
}

static int give_text(int device, const char *name, char *text, uint length) {
    Entry *found = find(&values, name, device);
    if (!found) return NOT_SUPPORTED;
    strncpy(text, found->text, length);
    return SUCCESS;
}

static double number(int device, const char *name) {
    Entry *found = find(&values, name, device);
    return found ? found->value : 0;
}

/* What the binding calls. */

int nvmlInitWithFlags(uint flags) {
    (void)flags;
    entry(&calls, __func__, ANY)->value++;
    int error = failure(__func__, ANY);
    if (!error && num_inits++ == 0) generation++;
    return error;
}
int nvmlShutdown(void) {
    ENTER(ANY);
    num_inits--;
    return SUCCESS;
}
const char *nvmlErrorString(int error) {
    (void)error;
    return "an error";
}
int nvmlDeviceGetCount_v2(uint *count) {
    ENTER(ANY);
    *count = (uint)num_gpus;
    return SUCCESS;
}
int nvmlDeviceGetHandleByIndex_v2(uint index, void **handle) {
    ENTER((int)index);
    if (index >= (uint)num_gpus) return INVALID_ARGUMENT;
    *handle = handle_of((int)index);
    return SUCCESS;
}
int nvmlDeviceGetUUID(void *handle, char *uuid, uint length) {
    ENTER_DEVICE(handle);
    return give_text(device, "uuid", uuid, length);
}
int nvmlDeviceGetName(void *handle, char *name, uint length) {
    ENTER_DEVICE(handle);
    return give_text(device, "name", name, length);
}
int nvmlDeviceGetUtilizationRates(void *handle, uint *rates) {
    ENTER_DEVICE(handle);
    rates[1] = 0;
    return give(device, "utilization", &rates[0]);
}
int nvmlDeviceGetMemoryInfo(void *handle, ulong64 *memory) {
    ENTER_DEVICE(handle);
    if (!find(&values, "memory_total", device)) return NOT_SUPPORTED;
    memory[0] = (ulong64)number(device, "memory_total");
    memory[2] = (ulong64)number(device, "memory_used");
    memory[1] = memory[0] - memory[2];
    return SUCCESS;
}
int nvmlDeviceGetPowerUsage(void *handle, uint *milliwatts) {
    ENTER_DEVICE(handle);
    return give(device, "power", milliwatts);
}
int nvmlDeviceGetEnforcedPowerLimit(void *handle, uint *milliwatts) {
    ENTER_DEVICE(handle);
    return give(device, "power_limit", milliwatts);
}
int nvmlDeviceGetClockInfo(void *handle, uint type, uint *megahertz) {
    ENTER_DEVICE(handle);
    return type == 1 ? give(device, "sm_clock", megahertz) : INVALID_ARGUMENT;
}
int nvmlDeviceGetMaxClockInfo(void *handle, uint type, uint *megahertz) {
    ENTER_DEVICE(handle);
    return type == 1 ? give(device, "max_sm_clock", megahertz) : INVALID_ARGUMENT;
}
static int give_clock_events(int device, ulong64 *bits) {
    uint low;
    int error = give(device, "clock_events", &low);
    *bits = low;
    return error;
}
int nvmlDeviceGetCurrentClocksThrottleReasons(void *handle, ulong64 *bits) {
    ENTER_DEVICE(handle);
    return give_clock_events(device, bits);
}
int nvmlDeviceGetMigMode(void *handle, uint *current, uint *pending) {
    ENTER_DEVICE(handle);
    *pending = (uint)number(device, "mig_mode");
    return give(device, "mig_mode", current);
}
int nvmlDeviceGetMaxMigDeviceCount(void *handle, uint *count) {
    ENTER_DEVICE(handle);
    *count = 7;
    return SUCCESS;
}
int nvmlDeviceGetMigDeviceHandleByIndex(void *handle, uint index, void **mig) {
    ENTER_DEVICE(handle);
    for (int i = 0; i < num_migs; i++)
        if (migs[i].parent == device && migs[i].place == (int)index) {
            *mig = handle_of(migs[i].device);
            return SUCCESS;
        }
    return NOT_FOUND;
}
int nvmlDeviceGetGpuInstanceId(void *handle, uint *id) {
    ENTER_DEVICE(handle);
    if (device < FIRST_MIG_DEVICE) return INVALID_ARGUMENT;
    *id = migs[device - FIRST_MIG_DEVICE].gpu_instance;
    return SUCCESS;
}

typedef struct {
    uint pid;
    ulong64 memory;
    uint gpu_instance, compute_instance;
} ProcessInfo;

static int give_processes(int device, uint *count, ProcessInfo *infos) {
    uint found = 0;
    for (int i = 0; i < num_processes; i++) {
        if (processes[i].device != device) continue;
        if (infos && found < *count) infos[found] = (ProcessInfo){processes[i].pid, processes[i].memory, 0, 0};
        found++;
    }
    int error = found > *count ? INSUFFICIENT_SIZE : SUCCESS;
    *count = found;
    return error;
}
int nvmlDeviceGetComputeRunningProcesses_v2(void *handle, uint *count, ProcessInfo *infos) {
    ENTER_DEVICE(handle);
    return give_processes(device, count, infos);
}

typedef struct {
    uint pid;
    ulong64 timestamp;
    uint sm, memory, encoder, decoder;
} ProcessSample;

/* "process_samples" is 1 where the driver has them, and 2 where it says success when there are none. */
int nvmlDeviceGetProcessUtilization(void *handle, ProcessSample *samples, uint *count, ulong64 since) {
    ENTER_DEVICE(handle);
    if (!number(device, "process_samples")) return NOT_SUPPORTED;
    uint found = 0;
    for (int i = 0; i < num_processes; i++) {
        if (processes[i].device != device || processes[i].timestamp <= since) continue;
        if (samples) samples[found] = (ProcessSample){processes[i].pid, processes[i].timestamp, processes[i].sm, 0, 0, 0};
        found++;
    }
    *count = found;
    if (!found) return number(device, "process_samples") == 2 ? SUCCESS : NOT_FOUND;
    return samples ? SUCCESS : INSUFFICIENT_SIZE;
}

#ifndef OLD_DRIVER
static long num_samples_taken;

int nvmlDeviceGetCurrentClocksEventReasons(void *handle, ulong64 *bits) {
    ENTER_DEVICE(handle);
    return give_clock_events(device, bits);
}
int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, uint *count, ProcessInfo *infos) {
    ENTER_DEVICE(handle);
    return give_processes(device, count, infos);
}

typedef struct {
    uint version, is_supported;
} GpmSupport;

typedef struct {
    uint id, error;
    double value;
    const char *names[3];
} GpmMetric;

typedef struct {
    uint version, count;
    Sample *older, *newer;
    GpmMetric metrics[];
} GpmRequest;

int nvmlGpmQueryDeviceSupport(void *handle, GpmSupport *support) {
    ENTER_DEVICE(handle);
    if (support->version != 1) return ARGUMENT_VERSION_MISMATCH;
    support->is_supported = (uint)number(device, "gpm");
    return SUCCESS;
}
int nvmlGpmSampleAlloc(Sample **sample) {
    ENTER(ANY);
    *sample = calloc(1, sizeof **sample);
    (*sample)->device = ANY;
    live_samples++;
    return SUCCESS;
}
int nvmlGpmSampleFree(Sample *sample) {
    ENTER(ANY);
    free(sample);
    live_samples--;
    return SUCCESS;
}
int nvmlGpmSampleGet(void *handle, Sample *sample) {
    ENTER_DEVICE(handle);
    *sample = (Sample){device, 0, ++num_samples_taken};
    return SUCCESS;
}
int nvmlGpmMigSampleGet(void *handle, uint gpu_instance, Sample *sample) {
    ENTER_DEVICE(handle);
    for (int i = 0; i < num_migs; i++)
        if (migs[i].parent == device && migs[i].gpu_instance == gpu_instance) {
            *sample = (Sample){migs[i].device, gpu_instance, ++num_samples_taken};
            return SUCCESS;
        }
    return INVALID_ARGUMENT;
}
int nvmlGpmMetricsGet(GpmRequest *request) {
    Sample *older = request->older, *newer = request->newer;
    ENTER(newer->device);
    if (request->version != 1) return ARGUMENT_VERSION_MISMATCH;
    if (older->device == ANY || older->device != newer->device || older->order >= newer->order) return INVALID_ARGUMENT;
    for (uint i = 0; i < request->count; i++) {
        GpmMetric *metric = &request->metrics[i];
        char name[NAME_BYTES] = "gpm_00";
        name[4] = (char)('0' + metric->id / 10);
        name[5] = (char)('0' + metric->id % 10);
        Entry *found = find(&values, name, newer->device);
        metric->error = found ? SUCCESS : NOT_SUPPORTED;
        metric->value = found ? found->value : 0;
    }
    return SUCCESS;
}
#endif

/* Selective scan for CPUs, forward and backward, float32. Plain C with GCC/Clang vector types; called by c_path.py.
 *
 * One work item walks one block of 16 channels (one cache line of a channels-last tensor) of one sequence through all
 * directions, so that a direction is only an order of visiting pixels and nothing is copied. Items share no output that
 * both add to, and each adds in its own fixed order: results do not depend on the threads. This file has what is done
 * per item and per chunk; scan_lanes.h, the arithmetic, is included once per instruction set, chosen at run time.
 */
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { BLOCK = 16, CHUNK = 64, FORWARD_STATES = 4, BACKWARD_STATES = 4, MAX_THREADS = 256 };
#define LOG2E 1.44269504088896341f
#define LN2 0.69314718055994531f
/* Added to a float, it leaves the nearest integer, plus the bias of the exponent, in the low bits. */
#define MAGIC (12582912.0f + 127.0f)

enum { ROWS, COLUMNS, ROWS_REVERSED, COLUMNS_REVERSED, LINES, LINES_REVERSED };

/* Every field is 8 bytes wide: c_path.py declares the same structure. Strides are in elements, the last axis has 1;
 * outputs are contiguous. A null pointer means: not given, or not wanted. Gradients that several items add to have a
 * leading axis: splits for B, C and delta of low rank, runs for the parameters. */
typedef struct {
    int64_t batch, height, width, channels, directions, groups, state;
    int64_t rank; /* 0: delta has one value per channel */
    int64_t softplus, merge, threads;
    int64_t isa;    /* 0: the best there is; else 1 plain, 2 AVX2, 3 AVX-512 at most */
    int64_t splits; /* backward: parts into which the channel blocks are divided */
    int64_t runs;   /* backward: parts into which the sequences are divided */
    const int64_t *orders;
    const float *x, *delta, *a, *b, *c, *skip, *delta_weight, *delta_bias, *z, *initial;
    float *y, *final;
    float *saved; /* (sequence, block, direction, chunk, state, BLOCK): the states before each chunk */
    const float *grad_y, *grad_final;
    float *grad_x, *grad_delta, *grad_a, *grad_b, *grad_c, *grad_skip, *grad_weight, *grad_bias, *grad_z, *grad_initial;
    int64_t x_stride[3], delta_stride[4], b_stride[5], c_stride[5], z_stride[3], grad_y_stride[4];
} scan_args;

typedef struct {
    int64_t h, w;
} pixel;

/* Channels [first, first + count) of one group. */
typedef struct {
    int64_t first, count, group;
} block;

/* Buffers of one thread. [CHUNK] [BLOCK] unless said. */
typedef struct {
    pixel pixels[CHUNK];
    float *x, *dt, *slope, *dtx, *y, *z; /* slope: derivative of dt by what softplus received */
    float *grad_y, *grad_dt, *grad_dtx;
    float *b, *c, *grad_b, *grad_c;    /* [CHUNK][state] */
    float *a, *h, *carry, *grad_a;     /* [state][BLOCK]; a is A / ln 2 */
    float *weight, *grad_weight;       /* [rank][BLOCK] */
    float *history;                    /* [CHUNK][BACKWARD_STATES][LANES], states before each step */
    float *decay;                      /* [CHUNK][BACKWARD_STATES][LANES] */
    float *bias, *skip, *grad_bias, *grad_skip; /* [BLOCK] */
    float *memory;
} workspace;

typedef void (*item_function)(const scan_args *, workspace *, int64_t item);

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int is_lines(const scan_args *s) { return s->orders[0] >= LINES; }
static int64_t sequence_count(const scan_args *s) { return is_lines(s) ? s->batch * s->width : s->batch; }
static int64_t sequence_length(const scan_args *s) { return is_lines(s) ? s->height : s->height * s->width; }
static int64_t chunk_count(const scan_args *s) { return (sequence_length(s) + CHUNK - 1) / CHUNK; }
static int64_t group_blocks(const scan_args *s) { return (s->channels / s->groups + BLOCK - 1) / BLOCK; }
static int64_t block_count(const scan_args *s) { return s->groups * group_blocks(s); }

static block get_block(const scan_args *s, int64_t index) {
    int64_t width = s->channels / s->groups, start = index % group_blocks(s) * BLOCK;
    block out = {index / group_blocks(s) * width + start, least(BLOCK, width - start), index / group_blocks(s)};
    return out;
}

/* The pixels of steps [start, start + count) of one direction. */
static void find_pixels(const scan_args *s, int64_t order, int64_t line, int64_t start, int64_t count, pixel *out) {
    int reversed = order == ROWS_REVERSED || order == COLUMNS_REVERSED || order == LINES_REVERSED;
    int by_column = order == COLUMNS || order == COLUMNS_REVERSED;
    int64_t inner = is_lines(s) || by_column ? s->height : s->width;
    int64_t at = reversed ? sequence_length(s) - 1 - start : start, step = reversed ? -1 : 1;
    int64_t major = at / inner, minor = at % inner;
    for (int64_t t = 0; t < count; t++) {
        pixel row_major = {major, minor}, column_major = {minor, is_lines(s) ? line : major};
        out[t] = is_lines(s) || by_column ? column_major : row_major;
        minor += step;
        if (minor == inner) minor = 0, major++;
        if (minor < 0) minor = inner - 1, major--;
    }
}

static int64_t offset(const int64_t *stride, int64_t batch, pixel p) {
    return batch * stride[0] + p.h * stride[1] + p.w * stride[2];
}

static float *take(float **memory, int64_t count) {
    float *out = *memory;
    *memory += (count + BLOCK - 1) / BLOCK * BLOCK;
    return out;
}

static int open_workspace(const scan_args *s, workspace *w) {
    int64_t tile = CHUNK * BLOCK, states = s->state * BLOCK, rows = CHUNK * s->state, ranks = s->rank * BLOCK;
    int64_t history = 2 * CHUNK * BACKWARD_STATES * BLOCK;
    size_t size = 4 * (9 * tile + 4 * rows + 4 * states + 2 * ranks + history + 8 * BLOCK);
    void *memory = NULL;
    if (posix_memalign(&memory, 64, (size + 63) / 64 * 64)) return 0;
    float *m = w->memory = memory, **tiles[] = {&w->x, &w->dt, &w->slope, &w->dtx, &w->y, &w->z, &w->grad_y,
                                                &w->grad_dt, &w->grad_dtx};
    for (int i = 0; i < 9; i++) *tiles[i] = take(&m, tile);
    w->b = take(&m, rows), w->c = take(&m, rows), w->grad_b = take(&m, rows), w->grad_c = take(&m, rows);
    w->a = take(&m, states), w->h = take(&m, states), w->carry = take(&m, states), w->grad_a = take(&m, states);
    w->weight = take(&m, ranks), w->grad_weight = take(&m, ranks);
    w->history = take(&m, CHUNK * BACKWARD_STATES * BLOCK);
    w->decay = take(&m, CHUNK * BACKWARD_STATES * BLOCK);
    w->bias = take(&m, BLOCK), w->skip = take(&m, BLOCK);
    w->grad_bias = take(&m, BLOCK), w->grad_skip = take(&m, BLOCK);
    return 1;
}

/* Copies (count, n) of a row-major array to [n][BLOCK], zeros in the lanes beyond count; and back, adding or not. */
static void to_lanes(float *out, const float *in, int64_t n, int64_t count) {
    memset(out, 0, n * BLOCK * sizeof(float));
    if (in)
        for (int64_t d = 0; d < count; d++)
            for (int64_t i = 0; i < n; i++) out[i * BLOCK + d] = in[d * n + i];
}

static void from_lanes(float *out, const float *in, int64_t n, int64_t count, int add) {
    if (out)
        for (int64_t d = 0; d < count; d++)
            for (int64_t i = 0; i < n; i++) out[d * n + i] = in[i * BLOCK + d] + (add ? out[d * n + i] : 0);
}

static float *at_or_null(float *base, int64_t index) { return base ? base + index : NULL; }
static const float *const_at(const float *base, int64_t index) { return base ? base + index : NULL; }

static void add_row(float *restrict out, const float *restrict in, int64_t n) {
    if (out)
        for (int64_t i = 0; i < n; i++) out[i] += in[i];
}

static void load_parameters(const scan_args *s, workspace *w, int64_t k, block blk) {
    int64_t channel = k * s->channels + blk.first;
    to_lanes(w->a, s->a + channel * s->state, s->state, blk.count);
    for (int64_t i = 0; i < s->state * BLOCK; i++) w->a[i] *= LOG2E;
    to_lanes(w->weight, const_at(s->delta_weight, channel * s->rank), s->rank, blk.count);
    to_lanes(w->bias, const_at(s->delta_bias, channel), 1, blk.count);
    to_lanes(w->skip, const_at(s->skip, channel), 1, blk.count);
}

/* Where the states of (sequence, direction, block) begin in initial, final and their gradients. */
static int64_t state_index(const scan_args *s, int64_t sequence, int64_t k, block blk) {
    return ((sequence * s->directions + k) * s->channels + blk.first) * s->state;
}

static float *saved_states(const scan_args *s, int64_t sequence, int64_t index, int64_t k, int64_t chunk) {
    int64_t row = ((sequence * block_count(s) + index) * s->directions + k) * chunk_count(s) + chunk;
    return at_or_null(s->saved, row * s->state * BLOCK);
}

static int64_t pixel_row(const scan_args *s, int64_t batch, pixel p) {
    return (batch * s->height + p.h) * s->width + p.w;
}

static void clear_parameter_gradients(const scan_args *s, workspace *w) {
    memset(w->grad_a, 0, s->state * BLOCK * sizeof(float));
    memset(w->grad_weight, 0, s->rank * BLOCK * sizeof(float));
    memset(w->grad_bias, 0, BLOCK * sizeof(float));
    memset(w->grad_skip, 0, BLOCK * sizeof(float));
}

static void add_parameter_gradients(const scan_args *s, const workspace *w, int64_t run, int64_t k, block blk) {
    int64_t channel = (run * s->directions + k) * s->channels + blk.first;
    from_lanes(at_or_null(s->grad_a, channel * s->state), w->grad_a, s->state, blk.count, 1);
    from_lanes(at_or_null(s->grad_weight, channel * s->rank), w->grad_weight, s->rank, blk.count, 1);
    from_lanes(at_or_null(s->grad_bias, channel), w->grad_bias, 1, blk.count, 1);
    from_lanes(at_or_null(s->grad_skip, channel), w->grad_skip, 1, blk.count, 1);
}

/* Denormal numbers would make decayed states very slow, so each thread flushes them to zero while it works. */
static uint64_t flush_denormals(void) {
#if defined(__x86_64__)
    unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040);
    return before;
#elif defined(__aarch64__)
    uint64_t before;
    __asm__ volatile("mrs %0, fpcr" : "=r"(before));
    __asm__ volatile("msr fpcr, %0" ::"r"(before | (1ull << 24)));
    return before;
#else
    return 0;
#endif
}

static void restore_denormals(uint64_t before) {
#if defined(__x86_64__)
    _mm_setcsr((unsigned)before);
#elif defined(__aarch64__)
    __asm__ volatile("msr fpcr, %0" ::"r"(before));
#else
    (void)before;
#endif
}

typedef struct {
    const scan_args *scan;
    item_function run;
    int64_t items;
    atomic_llong next;
    atomic_int finished; /* threads that had memory and worked to the end */
} pool;

static void *work(void *argument) {
    pool *p = argument;
    workspace w;
    if (!open_workspace(p->scan, &w)) return NULL;
    uint64_t mode = flush_denormals();
    for (int64_t item; (item = atomic_fetch_add(&p->next, 1)) < p->items;) p->run(p->scan, &w, item);
    restore_denormals(mode);
    free(w.memory);
    atomic_fetch_add(&p->finished, 1);
    return NULL;
}

/* Threads live for one call: nothing survives a fork, and no second OpenMP runtime is loaded beside torch's. */
static int run_items(const scan_args *s, item_function run, int64_t items) {
    pool p = {s, run, items, 0, 0};
    pthread_t threads[MAX_THREADS];
    /* Half a million updates of a state, about 0.1 ms, are worth a thread. */
    int64_t updates = sequence_count(s) * sequence_length(s) * s->channels * s->directions * s->state;
    int64_t wanted = least(least(s->threads, items), least(MAX_THREADS, 1 + updates / 500000)), started = 0;
    while (started < wanted - 1 && !pthread_create(&threads[started], NULL, work, &p)) started++;
    work(&p);
    for (int64_t i = 0; i < started; i++) pthread_join(threads[i], NULL);
    return atomic_load(&p.finished) ? 0 : 1;
}

#define PASTE_(a, b) a##_##b
#define PASTE(a, b) PASTE_(a, b)
#define NAME(a) PASTE(a, ISA)

#if defined(__x86_64__)
#define ISA avx512
#define LANES 16
#define TARGET __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,fma")))
#include "scan_lanes.h"
#define ISA avx2
#define LANES 8
#define TARGET __attribute__((target("avx2,fma")))
#include "scan_lanes.h"
#endif
#define ISA plain
#define LANES 4
#define TARGET
#include "scan_lanes.h"

static int best_isa(const scan_args *s) {
    int64_t limit = s->isa ? s->isa : 3;
#if defined(__x86_64__)
    if (limit >= 3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw"))
        return 3;
    if (limit >= 2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 2;
#endif
    (void)limit;
    return 1;
}

/* What c_path.py must agree with. */
int64_t vision_ssm_scan_layout(void) { return sizeof(scan_args) * 1000000 + CHUNK * 1000 + BLOCK; }

/* Both return 0, or 1 when there is no memory. */

int64_t vision_ssm_scan_forward(const scan_args *s) {
    item_function run = forward_item_plain;
#if defined(__x86_64__)
    run = best_isa(s) == 3 ? forward_item_avx512 : best_isa(s) == 2 ? forward_item_avx2 : run;
#endif
    return run_items(s, run, sequence_count(s) * block_count(s));
}

int64_t vision_ssm_scan_backward(const scan_args *s) {
    item_function run = backward_item_plain;
#if defined(__x86_64__)
    run = best_isa(s) == 3 ? backward_item_avx512 : best_isa(s) == 2 ? backward_item_avx2 : run;
#endif
    return run_items(s, run, s->runs * s->splits);
}

/* Decoding's products in bfloat16, for processors with AVX512-BF16. kernels.py compiles and calls this.

   A weight is read once a step and is larger than the caches. It is packed so that a thread reads it front to back:
   blocks of LANES outputs, and in a block, for each pair of inputs, LANES times two values: one register. It is
   prefetched past the second-level cache, so that what runs between two products finds its own data and code there.

   Outputs and inputs are padded to multiples of LANES. Sums are float32.

   The threads of a process that wait give way (sched_yield) instead of holding their core, so that several processes
   can share the same cores and work by turns: OpenMP's threads cannot. */

#define _GNU_SOURCE
#include <immintrin.h>
#include <linux/futex.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#ifndef __AVX512BF16__
#error "this processor has no AVX512-BF16"
#endif

enum { LANES = 16, TILE = 12, PREFETCH_BYTES = 4096, TASK_BLOCKS = 4, TASK_ROWS = 16, LOOK_OUT_NS = 50000 };

typedef uint16_t bf16;

/* ---- Threads: one that calls, and helpers that take tasks of the same job while there are any. ---- */

typedef void (*Task)(const void *arguments, long number);

enum { CLOSED = -1 };

static struct {
    long num_threads; /* with the one that calls */
    Task task;
    const void *arguments;
    long num_tasks;
    atomic_long next;
    atomic_int num_joined; /* helpers at work, or CLOSED */
    atomic_uint num_jobs;  /* changes when there is a new one */
    atomic_int num_sleeping;
} team = {.num_threads = 1, .num_joined = CLOSED};

static long long now_ns(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static void await_job(unsigned last) {
    long long deadline = now_ns() + LOOK_OUT_NS;
    while (atomic_load(&team.num_jobs) == last) {
        if (now_ns() < deadline) {
            sched_yield();
            continue;
        }
        atomic_fetch_add(&team.num_sleeping, 1);
        syscall(SYS_futex, &team.num_jobs, FUTEX_WAIT_PRIVATE, last, NULL, NULL, 0);
        atomic_fetch_sub(&team.num_sleeping, 1);
    }
}

static void work(void) {
    for (long number; (number = atomic_fetch_add(&team.next, 1)) < team.num_tasks;) team.task(team.arguments, number);
}

static void *help(void *unused) {
    for (unsigned last = 0;;) {
        await_job(last);
        last = atomic_load(&team.num_jobs);
        int num_joined = atomic_load(&team.num_joined);
        while (num_joined != CLOSED && !atomic_compare_exchange_weak(&team.num_joined, &num_joined, num_joined + 1));
        if (num_joined == CLOSED) continue; /* woken too late: the others have done it all */
        work();
        atomic_fetch_sub(&team.num_joined, 1);
    }
    return unused;
}

/* Called once; cpus has num_threads processors, or is none. Returns how many threads there are then. */
long afd_start_threads(long num_threads, const int32_t *cpus) {
    while (team.num_threads < num_threads) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, help, NULL)) break;
        if (cpus) {
            cpu_set_t set;
            CPU_ZERO(&set);
            CPU_SET(cpus[team.num_threads], &set);
            pthread_setaffinity_np(thread, sizeof set, &set);
        }
        pthread_detach(thread);
        team.num_threads++;
    }
    return team.num_threads;
}

/* Returns when all tasks are done. Who begins late takes fewer of them, so nobody waits for a thread to wake up. */
static void run(Task task, const void *arguments, long num_tasks) {
    if (team.num_threads == 1 || num_tasks == 1) {
        for (long number = 0; number < num_tasks; number++) task(arguments, number);
        return;
    }
    team.task = task, team.arguments = arguments, team.num_tasks = num_tasks;
    atomic_store(&team.next, 0);
    atomic_store(&team.num_joined, 0);
    atomic_fetch_add(&team.num_jobs, 1);
    if (atomic_load(&team.num_sleeping))
        syscall(SYS_futex, &team.num_jobs, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
    work();
    for (int none = 0; !atomic_compare_exchange_weak(&team.num_joined, &none, CLOSED); none = 0) sched_yield();
}

static inline long parts_of(long total, long size) { return (total + size - 1) / size; }

/* What a task does that has up to `size` of `total` things. */
#define EACH(n, number, size, total)                                                                                   \
    for (long n = (number) * (size); n < (number) * (size) + (size) && n < (total); n++)

/* ---- Arithmetic. ---- */

static inline void store_bf16(bf16 *to, __m512 y) {
    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(y));
}

static inline __m512 load_bf16(const bf16 *from) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16));
}

/* e^x: 2^n times a polynomial of degree 6 on [-ln 2 / 2, ln 2 / 2]. */
static inline __m512 exponential(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-88.0f), _mm512_min_ps(_mm512_set1_ps(88.0f), x)); /* in this order NaN stays */
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.0f / 720);
    const float terms[] = {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    for (int i = 0; i < 6; i++) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(terms[i]));
    return _mm512_scalef_ps(p, n);
}

static inline __m512 silu(__m512 x) {
    __m512 one = _mm512_set1_ps(1.0f);
    return _mm512_div_ps(x, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

/* One block of outputs for num_rows rows: y[m] = w x[m]. Several sums per row hide the latency of the multiply-add. */
static inline __attribute__((always_inline)) void
tile(const bf16 *const *x, const bf16 *w, long inputs, __m512 *y, int num_rows, int num_sums) {
    __m512 sums[TILE][8];
    for (int m = 0; m < num_rows; m++)
        for (int s = 0; s < num_sums; s++) sums[m][s] = _mm512_setzero_ps();
    for (long k = 0; k < inputs; k += 2 * num_sums) {
#pragma GCC unroll 8
        for (int s = 0; s < num_sums; s++) {
            const bf16 *pairs = w + (k + 2 * s) * LANES;
            __builtin_prefetch((const char *)pairs + PREFETCH_BYTES, 0, 0);
            __m512bh weights = (__m512bh)_mm512_loadu_si512(pairs);
#pragma GCC unroll 12
            for (int m = 0; m < num_rows; m++) {
                __m512bh pair = (__m512bh)_mm512_set1_epi32(*(const int32_t *)(x[m] + k + 2 * s));
                sums[m][s] = _mm512_dpbf16_ps(sums[m][s], weights, pair);
            }
        }
    }
    for (int m = 0; m < num_rows; m++) {
        for (int s = 1; s < num_sums; s++) sums[m][0] = _mm512_add_ps(sums[m][0], sums[m][s]);
        y[m] = sums[m][0];
    }
}

/* The same for 1 to TILE rows; x has TILE pointers, those beyond num_rows to any row. */
static void block(const bf16 *const *x, int num_rows, const bf16 *w, long inputs, __m512 *y) {
    switch (num_rows) {
    case 1: return tile(x, w, inputs, y, 1, 8);
    case 2: return tile(x, w, inputs, y, 2, 4);
    case 3: return tile(x, w, inputs, y, 3, 4);
    case 4: return tile(x, w, inputs, y, 4, 4);
    case 5:
    case 6: return tile(x, w, inputs, y, 6, 2);
    case 7:
    case 8: return tile(x, w, inputs, y, 8, 2);
    default: return tile(x, w, inputs, y, TILE, 2);
    }
}

static inline int smaller(long a, long b) { return (int)(a < b ? a : b); }

typedef struct {
    const bf16 *x;
    long rows, x_stride;
    const bf16 *w;
    long inputs, outputs;
    const bf16 *residual; /* [rows, outputs] added to the product, or NULL */
    bf16 *y;
} Linear;

static void linear(const void *arguments, long number) {
    const Linear *a = arguments;
    EACH(n, number, TASK_BLOCKS, a->outputs / LANES) {
        for (long first = 0; first < a->rows; first += TILE) {
            int num_rows = smaller(a->rows - first, TILE);
            const bf16 *rows[TILE];
            __m512 out[TILE];
            for (int m = 0; m < TILE; m++) rows[m] = a->x + (first + (m < num_rows ? m : 0)) * a->x_stride;
            block(rows, num_rows, a->w + n * LANES * a->inputs, a->inputs, out);
            for (int m = 0; m < num_rows; m++) {
                long offset = (first + m) * a->outputs + n * LANES;
                if (a->residual) out[m] = _mm512_add_ps(out[m], load_bf16(a->residual + offset));
                store_bf16(a->y + offset, out[m]);
            }
        }
    }
}

static void run_linear(Linear arguments) { run(linear, &arguments, parts_of(arguments.outputs / LANES, TASK_BLOCKS)); }

/* y [rows, outputs] = x [rows, inputs] w^T */
void afd_linear(const bf16 *x, long rows, long x_stride, const bf16 *w, long inputs, long outputs, bf16 *y) {
    run_linear((Linear){x, rows, x_stride, w, inputs, outputs, NULL, y});
}

typedef struct {
    const bf16 *x;
    long rows, x_stride, size;
    const bf16 *weight;
    float eps;
    bf16 *y;
    long y_stride;
} RmsNorm;

static void rms_norm(const void *arguments, long number) {
    const RmsNorm *a = arguments;
    EACH(row, number, TASK_ROWS, a->rows) {
        const bf16 *x = a->x + row * a->x_stride;
        bf16 *y = a->y + row * a->y_stride;
        __m512 squares = _mm512_setzero_ps();
        for (long i = 0; i < a->size; i += LANES) squares = _mm512_fmadd_ps(load_bf16(x + i), load_bf16(x + i), squares);
        __m512 scale = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(squares) / (float)a->size + a->eps));
        for (long i = 0; i < a->size; i += LANES)
            store_bf16(y + i, _mm512_mul_ps(_mm512_mul_ps(load_bf16(x + i), scale), load_bf16(a->weight + i)));
    }
}

static void run_rms_norm(RmsNorm arguments) { run(rms_norm, &arguments, parts_of(arguments.rows, TASK_ROWS)); }

/* y [rows, size] = x / sqrt(mean(x^2) + eps) * weight */
void afd_rms_norm(const bf16 *x, long rows, long x_stride, long size, const bf16 *weight, float eps, bf16 *y) {
    run_rms_norm((RmsNorm){x, rows, x_stride, size, weight, eps, y, size});
}

/* One head, half-split: pairs are (i, i + size / 2); the sines of the first half are negative. */
static void rotate(const bf16 *x, const float *cosines, const float *sines, long size, bf16 *y) {
    for (long i = 0; i < size; i += LANES) {
        __m512 other = load_bf16(x + (i < size / 2 ? i + size / 2 : i - size / 2));
        __m512 turned = _mm512_mul_ps(load_bf16(x + i), _mm512_loadu_ps(cosines + i));
        store_bf16(y + i, _mm512_fmadd_ps(other, _mm512_loadu_ps(sines + i), turned));
    }
}

typedef struct {
    bf16 *q;
    const bf16 *k, *v;
    long rows, kv_stride, heads, size;
    const float *cosines, *sines;
    const int64_t *slots;
    bf16 *keys, *values;
} RotateAndCache;

/* Rotates each row's query heads in place, and puts its rotated key and its value where the cache has them. */
static void rotate_and_cache(const void *arguments, long number) {
    const RotateAndCache *a = arguments;
    EACH(row, number, TASK_ROWS, a->rows) {
        const float *cosines = a->cosines + row * a->size, *sines = a->sines + row * a->size;
        bf16 turned[a->size];
        for (bf16 *q = a->q + row * a->heads * a->size; q < a->q + (row + 1) * a->heads * a->size; q += a->size) {
            rotate(q, cosines, sines, a->size, turned);
            memcpy(q, turned, sizeof turned);
        }
        rotate(a->k + row * a->kv_stride, cosines, sines, a->size, a->keys + a->slots[row] * a->size);
        memcpy(a->values + a->slots[row] * a->size, a->v + row * a->kv_stride, sizeof turned);
    }
}

/* LANES query heads as the weights of a product whose rows are keys. */
static void pack_heads(const bf16 *q, long heads, long size, bf16 *packed) {
    for (long i = 0; i < size; i += 2)
        for (long head = 0; head < LANES; head++)
            for (long half = 0; half < 2; half++)
                packed[(i * LANES) + head * 2 + half] = head < heads ? q[head * size + i + half] : 0;
}

/* scores [length, LANES] = e^(q k * scale - the head's largest); returns each head's sum. */
static __m512 softmax_scores(const bf16 *packed, const bf16 *keys, const int64_t *slots, long length, long size,
                             float *scores) {
    __m512 largest = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
    __m512 scale = _mm512_set1_ps(1.0f / sqrtf((float)size));
    for (long first = 0; first < length; first += TILE) {
        int num_rows = smaller(length - first, TILE);
        const bf16 *rows[TILE];
        __m512 out[TILE];
        for (int m = 0; m < TILE; m++) rows[m] = keys + slots[first + (m < num_rows ? m : 0)] * size;
        block(rows, num_rows, packed, size, out);
        for (int m = 0; m < num_rows; m++) {
            out[m] = _mm512_mul_ps(out[m], scale);
            largest = _mm512_max_ps(largest, out[m]);
            _mm512_storeu_ps(scores + (first + m) * LANES, out[m]);
        }
    }
    for (long i = 0; i < length; i++) {
        __m512 p = exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + i * LANES), largest));
        sum = _mm512_add_ps(sum, p);
        _mm512_storeu_ps(scores + i * LANES, p);
    }
    return sum;
}

/* y [heads, size] = the scores' mean of the values; four heads and four registers of their outputs at a time. */
static void weigh_values(const float *scores, const float *sums, const bf16 *values, const int64_t *slots, long length,
                         long heads, long size, bf16 *y) {
    enum { HEADS = 4, REGISTERS = 4 };
    for (long column = 0; column < size; column += REGISTERS * LANES) {
        int width = smaller((size - column) / LANES, REGISTERS);
        for (long head = 0; head < heads; head += HEADS) {
            __m512 out[HEADS][REGISTERS];
            for (int h = 0; h < HEADS; h++)
                for (int r = 0; r < REGISTERS; r++) out[h][r] = _mm512_setzero_ps();
            for (long i = 0; i < length; i++) {
                const bf16 *value = values + slots[i] * size + column;
#pragma GCC unroll 4
                for (int r = 0; r < REGISTERS; r++) {
                    __m512 v = r < width ? load_bf16(value + r * LANES) : _mm512_setzero_ps();
#pragma GCC unroll 4
                    for (int h = 0; h < HEADS; h++)
                        out[h][r] = _mm512_fmadd_ps(_mm512_set1_ps(scores[i * LANES + head + h]), v, out[h][r]);
                }
            }
            for (int h = 0; h < HEADS && head + h < heads; h++)
                for (int r = 0; r < width; r++)
                    store_bf16(y + (head + h) * size + column + r * LANES,
                               _mm512_div_ps(out[h][r], _mm512_set1_ps(sums[head + h])));
        }
    }
}

typedef struct {
    const bf16 *q;
    long rows, heads, size;
    const bf16 *keys, *values;
    const int64_t *slots, *starts, *lengths; /* a row's context: `length` slots from `start` on */
    bf16 *y;
} Attention;

/* Attention of one row, LANES of its heads, to its context, which all heads share. */
static void attention(const void *arguments, long number) {
    const Attention *a = arguments;
    long groups = parts_of(a->heads, LANES), size = a->size;
    long row = number / groups, head = number % groups * LANES, offset = (row * a->heads + head) * size;
    const int64_t *slots = a->slots + a->starts[row];
    float *scores = malloc((size_t)a->lengths[row] * LANES * sizeof *scores), sums[LANES];
    bf16 packed[LANES * size];
    pack_heads(a->q + offset, a->heads - head, size, packed);
    _mm512_storeu_ps(sums, softmax_scores(packed, a->keys, slots, a->lengths[row], size, scores));
    weigh_values(scores, sums, a->values, slots, a->lengths[row], smaller(a->heads - head, LANES), size, a->y + offset);
    free(scores);
}

typedef struct {
    const bf16 *x;
    long rows, size;
    const bf16 *gate;
    long num_experts, top_k, renormalise;
    int32_t *ids;   /* [rows, top_k] */
    float *weights; /* [rows, top_k] */
} Router;

/* The top_k likeliest of a row, likeliest first; probs is -1 afterwards where one was taken. */
static void choose(const Router *a, float *probs, int32_t *ids, float *weights) {
    float sum = 0.0f;
    for (long k = 0; k < a->top_k; k++) {
        long best = -1;
        for (long e = 0; e < a->num_experts; e++)
            if (probs[e] != -1.0f && (best < 0 || probs[e] > probs[best])) best = e;
        ids[k] = (int32_t)best, weights[k] = probs[best];
        sum += probs[best];
        probs[best] = -1.0f;
    }
    for (long k = 0; a->renormalise && k < a->top_k; k++) weights[k] /= sum;
}

/* Softmax over all experts, then the top ones, of TILE rows. */
static void router(const void *arguments, long number) {
    const Router *a = arguments;
    long first = number * TILE, padded = parts_of(a->num_experts, LANES) * LANES;
    int num_rows = smaller(a->rows - first, TILE);
    const bf16 *rows[TILE];
    float probs[TILE][padded];
    for (int m = 0; m < TILE; m++) rows[m] = a->x + (first + (m < num_rows ? m : 0)) * a->size;
    for (long e = 0; e < padded; e += LANES) {
        __m512 out[TILE];
        block(rows, num_rows, a->gate + e * a->size, a->size, out);
        for (int m = 0; m < num_rows; m++) _mm512_storeu_ps(probs[m] + e, out[m]);
    }
    for (int m = 0; m < num_rows; m++) {
        __m512 largest = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
        for (long e = a->num_experts; e < padded; e++) probs[m][e] = -INFINITY;
        for (long e = 0; e < padded; e += LANES) largest = _mm512_max_ps(largest, _mm512_loadu_ps(probs[m] + e));
        largest = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
        for (long e = 0; e < padded; e += LANES) {
            __m512 p = exponential(_mm512_sub_ps(_mm512_loadu_ps(probs[m] + e), largest));
            sum = _mm512_add_ps(sum, p);
            _mm512_storeu_ps(probs[m] + e, p);
        }
        __m512 total = _mm512_set1_ps(_mm512_reduce_add_ps(sum));
        for (long e = 0; e < padded; e += LANES)
            _mm512_storeu_ps(probs[m] + e, _mm512_div_ps(_mm512_loadu_ps(probs[m] + e), total));
        choose(a, probs[m], a->ids + (first + m) * a->top_k, a->weights + (first + m) * a->top_k);
    }
}

/* A layer up to the handoff. Sizes: of the hidden states, the low-rank query, a head. */
typedef struct {
    const bf16 *input_norm, *qkv, *inter_norm, *wq, *o_proj, *post_attention_norm, *gate; /* no gate: a dense layer */
    long size, q_size, heads, head_size, num_experts, top_k, renormalise;
    float eps;
} AttentionLayer;

/* What attention must know of `rows` tokens. */
typedef struct {
    long rows;
    const float *cosines, *sines;
    const int64_t *new_slots, *slots, *starts, *lengths;
} AttentionBatch;

/* hidden [rows, size] becomes after: with attention added; ffn_input, ids and weights are what the FFN gets of it.
   keys and values are the layer's cache; scratch has room for [rows, size + q_size + 2 * head_size + 2 * heads *
   head_size]. */
void afd_attend(const AttentionLayer *layer, const AttentionBatch *batch, const bf16 *hidden, bf16 *keys, bf16 *values,
                bf16 *scratch, bf16 *after, bf16 *ffn_input, int32_t *ids, float *weights) {
    long rows = batch->rows, size = layer->size, head_size = layer->head_size;
    long q_size = layer->q_size, qkv_size = q_size + 2 * head_size, heads_size = layer->heads * head_size;
    bf16 *normed = scratch, *qkv = normed + rows * size, *q = qkv + rows * qkv_size, *attended = q + rows * heads_size;
    bf16 *k = qkv + q_size, *v = k + head_size;
    run_rms_norm((RmsNorm){hidden, rows, size, size, layer->input_norm, layer->eps, normed, size});
    run_linear((Linear){normed, rows, size, layer->qkv, size, qkv_size, NULL, qkv});
    run_rms_norm((RmsNorm){qkv, rows, qkv_size, q_size, layer->inter_norm, layer->eps, qkv, qkv_size});
    run_linear((Linear){qkv, rows, qkv_size, layer->wq, q_size, heads_size, NULL, q});
    RotateAndCache placed = {q, k, v, rows, qkv_size, layer->heads, head_size,
                             batch->cosines, batch->sines, batch->new_slots, keys, values};
    run(rotate_and_cache, &placed, parts_of(rows, TASK_ROWS));
    Attention core = {q, rows, layer->heads, head_size, keys, values, batch->slots, batch->starts, batch->lengths, attended};
    run(attention, &core, rows * parts_of(layer->heads, LANES));
    run_linear((Linear){attended, rows, heads_size, layer->o_proj, heads_size, size, hidden, after});
    run_rms_norm((RmsNorm){after, rows, size, size, layer->post_attention_norm, layer->eps, ffn_input, size});
    if (!layer->gate) return;
    Router routing = {ffn_input, rows, size, layer->gate, layer->num_experts, layer->top_k, layer->renormalise, ids, weights};
    run(router, &routing, parts_of(rows, TILE));
}

/* down(silu(gate x) * up x) of some rows: an expert with those that chose it, or a dense or shared FFN with all. */
typedef struct {
    const bf16 *gate_up; /* blocks of gate and up by turns */
    const bf16 *down;
    long width;
    /* filled anew for every call: */
    long num_rows;
    int32_t *rows;  /* of x and y */
    float *weights; /* what each row's output is multiplied by */
    bf16 *hidden;   /* [num_rows, width] */
} Part;

/* Gives each part its rows: the first one all of them, the experts from `first_expert` on those that chose them. */
static void group_rows(Part *parts, long num_experts, long first_expert, long num_rows, const int32_t *topk_ids,
                       const float *topk_weights, long top_k, int32_t *rows, float *weights, bf16 *hidden) {
    parts[0].num_rows = num_rows;
    for (long e = 1; e <= num_experts; e++) parts[e].num_rows = 0;
    for (long i = 0; i < num_rows * top_k; i++) {
        long expert = topk_ids[i] - first_expert;
        if (0 <= expert && expert < num_experts) parts[1 + expert].num_rows++;
    }
    for (long e = 0; e <= num_experts; e++) {
        parts[e].rows = rows, parts[e].weights = weights, parts[e].hidden = hidden;
        rows += parts[e].num_rows, weights += parts[e].num_rows, hidden += parts[e].num_rows * parts[e].width;
        if (e) parts[e].num_rows = 0;
    }
    for (long i = 0; i < num_rows; i++) parts[0].rows[i] = (int32_t)i, parts[0].weights[i] = 1.0f;
    for (long i = 0; i < num_rows * top_k; i++) {
        long expert = topk_ids[i] - first_expert;
        if (expert < 0 || expert >= num_experts) continue;
        Part *part = parts + 1 + expert;
        part->rows[part->num_rows] = (int32_t)(i / top_k);
        part->weights[part->num_rows++] = topk_weights[i];
    }
}

typedef struct {
    const bf16 *x;
    long num_rows, size;
    const Part *const *parts; /* those that have rows */
    long num_parts, tasks_per_part;
    float *sums; /* [num_rows, size] */
    bf16 *y;
} Ffn;

/* Some blocks of one part's hidden values. */
static void gate_up(const void *arguments, long number) {
    const Ffn *a = arguments;
    const Part *part = a->parts[number / a->tasks_per_part];
    EACH(n, number % a->tasks_per_part, TASK_BLOCKS, part->width / LANES) {
        const bf16 *gate = part->gate_up + n * 2 * LANES * a->size, *up = gate + LANES * a->size;
        for (long first = 0; first < part->num_rows; first += TILE) {
            int num_rows = smaller(part->num_rows - first, TILE);
            const bf16 *rows[TILE];
            __m512 g[TILE], u[TILE];
            for (int m = 0; m < TILE; m++) rows[m] = a->x + part->rows[first + (m < num_rows ? m : 0)] * a->size;
            block(rows, num_rows, gate, a->size, g);
            block(rows, num_rows, up, a->size, u);
            for (int m = 0; m < num_rows; m++)
                store_bf16(part->hidden + (first + m) * part->width + n * LANES, _mm512_mul_ps(silu(g[m]), u[m]));
        }
    }
}

/* Adds one block of a part's output to the sums. */
static void add_down(const Part *part, long n, float *sums, long size) {
    for (long first = 0; first < part->num_rows; first += TILE) {
        int num_rows = smaller(part->num_rows - first, TILE);
        const bf16 *rows[TILE];
        __m512 out[TILE];
        for (int m = 0; m < TILE; m++) rows[m] = part->hidden + (first + (m < num_rows ? m : 0)) * part->width;
        block(rows, num_rows, part->down + n * LANES * part->width, part->width, out);
        for (int m = 0; m < num_rows; m++) {
            float *sum = sums + part->rows[first + m] * size + n * LANES;
            __m512 weight = _mm512_set1_ps(part->weights[first + m]);
            _mm512_storeu_ps(sum, _mm512_fmadd_ps(out[m], weight, _mm512_loadu_ps(sum)));
        }
    }
}

/* Some columns of the output, of all parts. */
static void down(const void *arguments, long number) {
    const Ffn *a = arguments;
    EACH(n, number, TASK_BLOCKS, a->size / LANES)
        for (long i = n * LANES; i < a->num_rows * a->size; i += a->size) _mm512_storeu_ps(a->sums + i, _mm512_setzero_ps());
    for (long p = 0; p < a->num_parts; p++)
        EACH(n, number, TASK_BLOCKS, a->size / LANES) add_down(a->parts[p], n, a->sums, a->size);
    EACH(n, number, TASK_BLOCKS, a->size / LANES)
        for (long i = n * LANES; i < a->num_rows * a->size; i += a->size) store_bf16(a->y + i, _mm512_loadu_ps(a->sums + i));
}

/* y [num_rows, size] = the sum of all parts of x. parts has 1 + num_experts; scratch has room, one after the other, for
   [num_rows, size] sums, the weights and rows of all parts, the ids, and the hidden values. Returns -1, and computes
   nothing, for an expert that is none of all_experts. */
long afd_ffn(const bf16 *x, long num_rows, long size, Part *parts, long num_experts, long first_expert,
             long all_experts, const int32_t *topk_ids, const float *topk_weights, long top_k, float *scratch,
             bf16 *y) {
    long num_pairs = num_rows * (1 + top_k), num_used = 0, widest = 0;
    const Part *used[1 + num_experts];
    float *weights = scratch + num_rows * size;
    int32_t *rows = (int32_t *)(weights + num_pairs), *ids = rows + num_pairs;
    for (long i = 0; i < num_rows * top_k; i++) {
        ids[i] = topk_ids[i]; /* another process can change its own while they are used here */
        if (ids[i] < 0 || ids[i] >= all_experts) return -1;
    }
    group_rows(parts, num_experts, first_expert, num_rows, ids, topk_weights, top_k, rows, weights,
               (bf16 *)(ids + num_rows * top_k));
    for (long p = 0; p <= num_experts; p++) {
        if (!parts[p].num_rows) continue;
        used[num_used++] = parts + p;
        widest = parts[p].width > widest ? parts[p].width : widest;
    }
    long tasks_per_part = parts_of(widest / LANES, TASK_BLOCKS);
    Ffn arguments = {x, num_rows, size, used, num_used, tasks_per_part, scratch, y};
    run(gate_up, &arguments, num_used * tasks_per_part);
    run(down, &arguments, parts_of(size / LANES, TASK_BLOCKS));
    return 0;
}

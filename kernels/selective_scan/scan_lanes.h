/* The arithmetic of scan.c for one instruction set; LANES, ISA and TARGET say which. No include guard on purpose.
 *
 * Vector lanes are channels: B and C are scalars there and the sum over states needs no addition across lanes. A chunk
 * of CHUNK steps is gathered first; then a few states at a time, held in registers, are taken through the whole chunk.
 * Never compile it with -ffast-math: exp2 rounds by adding and subtracting a large constant.
 */

#define vf NAME(vf)
#define vi NAME(vi)
#define INLINE static inline __attribute__((always_inline)) TARGET
#define AT(p) (*(vf *)(p))
#define ANYWHERE(p) (*(NAME(unaligned) *)(p))
/* One pass over the BLOCK channels of a step, i is the first lane. */
#define EACH_LANE(i) for (int64_t i = 0; i < BLOCK; i += LANES)
#if LANES == 16
#define MM(name) _mm512_##name
#elif LANES == 8
#define MM(name) _mm256_##name
#else
#define MM(name) _mm_##name
#endif

typedef float vf __attribute__((vector_size(4 * LANES), may_alias));
typedef float NAME(unaligned) __attribute__((vector_size(4 * LANES), may_alias, aligned(4)));
typedef int32_t vi __attribute__((vector_size(4 * LANES), may_alias));

INLINE vf NAME(select)(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }

/* x between low and high, NaN where x is. */
INLINE vf NAME(clamp)(vf x, float low, float high) {
#if defined(__x86_64__)
    return MM(min_ps)(MM(set1_ps)(high), MM(max_ps)(MM(set1_ps)(low), x)); /* they give the second operand for NaN */
#else
    vf zero = {0};
    x = NAME(select)((vi)(x < low), zero + low, x);
    return NAME(select)((vi)(x > high), zero + high, x);
#endif
}

/* The sums over the lanes of up to four vectors, added to out. */
INLINE void NAME(add_sums)(float *out, const vf *in, const int count) {
#if defined(__x86_64__)
    if (count == 4) {
        vf ab = MM(unpacklo_ps)(in[0], in[1]) + MM(unpackhi_ps)(in[0], in[1]);
        vf cd = MM(unpacklo_ps)(in[2], in[3]) + MM(unpackhi_ps)(in[2], in[3]);
        vf all = MM(shuffle_ps)(ab, cd, 0x44) + MM(shuffle_ps)(ab, cd, 0xee);
        __m128 sums = _mm_loadu_ps(out);
        for (int i = 0; i < LANES / 4; i++) sums += ((__m128 *)&all)[i];
        _mm_storeu_ps(out, sums);
        return;
    }
#endif
    for (int j = 0; j < count; j++)
        for (int i = 0; i < LANES; i++) out[j] += in[j][i];
}

/* 2^(n + f) to 1e-7 for -1/2 <= f <= 1/2, exactly 1 at 0; n is the integer in the low bits of n + MAGIC. */
INLINE vf NAME(power)(vf f, vf shifted) {
    vf p = f * (f * 1.535336206298435e-4f + 1.3398874558019878e-3f) + 9.618437358241555e-3f;
    p = f * (f * (f * p + 5.550332470781298e-2f) + 2.4022647913615497e-1f) + 6.931472028552136e-1f;
    return (f * p + 1.0f) * (vf)((vi)shifted << 23);
}

/* 2^x, exactly 0 below -127; finite for finite x. */
INLINE vf NAME(exp2)(vf x) {
    x = NAME(clamp)(x, -127.0f, 127.49f);
    vf shifted = x + MAGIC;
    return NAME(power)(x - (shifted - MAGIC), shifted);
}

/* e^x; ln 2 in two parts keeps the relative error at 1e-7 for large arguments too. */
INLINE vf NAME(exp)(vf x) {
    x = NAME(clamp)(x, -87.9f, 88.3f);
    vf shifted = x * LOG2E + MAGIC, n = shifted - MAGIC;
    return NAME(power)((x - n * 0.693359375f + n * 2.12194440e-4f) * LOG2E, shifted);
}

/* log(1 + u) for 0 <= u <= 1 as 2 atanh(u / (2 + u)), relative error 1e-7 down to the smallest u. */
INLINE vf NAME(log1p)(vf u) {
    vf s = u / (u + 2.0f), q = s * s;
    vf p = q * (q * 1.4095773785582026e-1f + 1.397883304766373e-1f) + 2.0012557137384762e-1f;
    return 2.0f * s * (q * (q * p + 3.333315507355994e-1f) + 1.0f);
}

INLINE vf NAME(sigmoid)(vf x) { return 1.0f / (1.0f + NAME(exp)(-x)); }

/* One row of a block from and to a tensor; lanes beyond width are zero and never written. */
INLINE void NAME(read)(float *out, const float *row, int64_t width) {
    if (width == BLOCK)
        EACH_LANE(i) AT(out + i) = ANYWHERE(row + i);
    else
        for (int64_t i = 0; i < BLOCK; i++) out[i] = i < width ? row[i] : 0;
}

INLINE void NAME(write)(float *row, const float *in, int64_t width, int add) {
    if (width < BLOCK)
        for (int64_t i = 0; i < width; i++) row[i] = add ? row[i] + in[i] : in[i];
    else if (add)
        EACH_LANE(i) ANYWHERE(row + i) += AT(in + i);
    else
        EACH_LANE(i) ANYWHERE(row + i) = AT(in + i);
}

/* dt, its derivative by what softplus received, and dt * x of one step. */
INLINE void NAME(activate)(const scan_args *s, workspace *w, int64_t at, vf raw, int derivative) {
    vf zero = {0}, dt = raw, slope = zero + 1.0f;
    if (s->softplus) {
        vf u = NAME(exp)(-(vf)((vi)raw & 0x7fffffff));
        dt = NAME(clamp)(raw, 0.0f, INFINITY) + NAME(log1p)(u);
        if (derivative) slope = NAME(select)((vi)(raw < 0.0f), u, slope) / (u + 1.0f);
    }
    AT(w->dt + at) = dt;
    AT(w->dtx + at) = dt * AT(w->x + at);
    if (derivative) AT(w->slope + at) = slope;
}

/* Gathers x, dt, B and C of the chunk whose pixels are set. */
INLINE void NAME(gather)(const scan_args *s, workspace *w, int64_t batch, int64_t k, block blk, int64_t count,
                         int derivative) {
    const float *delta = s->delta + k * s->delta_stride[3] + (s->rank ? 0 : blk.first);
    const float *b = s->b + k * s->b_stride[3] + blk.group * s->b_stride[4];
    const float *c = s->c + k * s->c_stride[3] + blk.group * s->c_stride[4];
    float given[BLOCK] __attribute__((aligned(64))) = {0};
    for (int64_t t = 0; t < count; t++) {
        pixel p = w->pixels[t];
        const float *row = delta + offset(s->delta_stride, batch, p);
        NAME(read)(w->x + t * BLOCK, s->x + offset(s->x_stride, batch, p) + blk.first, blk.count);
        memcpy(w->b + t * s->state, b + offset(s->b_stride, batch, p), s->state * sizeof(float));
        memcpy(w->c + t * s->state, c + offset(s->c_stride, batch, p), s->state * sizeof(float));
        if (!s->rank) NAME(read)(given, row, blk.count);
        EACH_LANE(i) {
            vf raw = AT(given + i);
            for (int64_t r = 0; r < s->rank; r++) raw += AT(w->weight + r * BLOCK + i) * row[r];
            NAME(activate)(s, w, t * BLOCK + i, raw + AT(w->bias + i), derivative);
        }
    }
}

/* y starts with the skip connection. */
INLINE void NAME(start_y)(const workspace *w, int64_t count) {
    for (int64_t t = 0; t < count; t++)
        EACH_LANE(i) AT(w->y + t * BLOCK + i) = AT(w->skip + i) * AT(w->x + t * BLOCK + i);
}

/* Takes `states` states from n on of LANES channels from lane i on through the chunk. */
INLINE void NAME(sweep)(const scan_args *s, workspace *w, int64_t count, int64_t n, int64_t i, const int states) {
    vf h[FORWARD_STATES], a[FORWARD_STATES];
    for (int j = 0; j < states; j++) h[j] = AT(w->h + (n + j) * BLOCK + i), a[j] = AT(w->a + (n + j) * BLOCK + i);
    for (int64_t t = 0; t < count; t++) {
        const float *b = w->b + t * s->state + n, *c = w->c + t * s->state + n;
        vf dt = AT(w->dt + t * BLOCK + i), dtx = AT(w->dtx + t * BLOCK + i), y = AT(w->y + t * BLOCK + i);
        for (int j = 0; j < states; j++) {
            h[j] = NAME(exp2)(dt * a[j]) * h[j] + dtx * b[j];
            y += h[j] * c[j];
        }
        AT(w->y + t * BLOCK + i) = y;
    }
    for (int j = 0; j < states; j++) AT(w->h + (n + j) * BLOCK + i) = h[j];
}

INLINE void NAME(write_y)(const scan_args *s, workspace *w, int64_t batch, int64_t k, block blk, int64_t count) {
    for (int64_t t = 0; t < count; t++) {
        int64_t row = pixel_row(s, batch, w->pixels[t]);
        if (s->z) {
            NAME(read)(w->z, s->z + offset(s->z_stride, batch, w->pixels[t]) + blk.first, blk.count);
            EACH_LANE(i) AT(w->y + t * BLOCK + i) *= AT(w->z + i) * NAME(sigmoid)(AT(w->z + i));
        }
        if (!s->merge) row = row * s->directions + k;
        NAME(write)(s->y + row * s->channels + blk.first, w->y + t * BLOCK, blk.count, s->merge && k);
    }
}

static TARGET void NAME(forward_item)(const scan_args *s, workspace *w, int64_t item) {
    int64_t sequence = item / block_count(s), index = item % block_count(s), length = sequence_length(s);
    int64_t lines = is_lines(s) ? s->width : 1, states = s->state;
    block blk = get_block(s, index);
    for (int64_t k = 0; k < s->directions; k++) {
        int64_t at = state_index(s, sequence, k, blk);
        load_parameters(s, w, k, blk);
        to_lanes(w->h, const_at(s->initial, at), states, blk.count);
        for (int64_t chunk = 0; chunk < chunk_count(s); chunk++) {
            int64_t count = least(CHUNK, length - chunk * CHUNK), n;
            if (s->saved) memcpy(saved_states(s, sequence, index, k, chunk), w->h, states * BLOCK * sizeof(float));
            find_pixels(s, s->orders[k], sequence % lines, chunk * CHUNK, count, w->pixels);
            NAME(gather)(s, w, sequence / lines, k, blk, count, 0);
            NAME(start_y)(w, count);
            EACH_LANE(i) {
                for (n = 0; n + FORWARD_STATES <= states; n += FORWARD_STATES)
                    NAME(sweep)(s, w, count, n, i, FORWARD_STATES);
                for (; n < states; n++) NAME(sweep)(s, w, count, n, i, 1);
            }
            NAME(write_y)(s, w, sequence / lines, k, blk, count);
        }
        from_lanes(at_or_null(s->final, at), w->h, states, blk.count, 0);
    }
}

/* Gathers the gradient of y before the gate; leaves d(loss)/d(z) / y in w->z. */
INLINE void NAME(gather_grad_y)(const scan_args *s, workspace *w, int64_t batch, int64_t k, block blk, int64_t count) {
    const float *grad = s->grad_y + k * s->grad_y_stride[3] + blk.first;
    for (int64_t t = 0; t < count; t++) {
        float *g = w->grad_y + t * BLOCK, *gate = w->z + t * BLOCK;
        NAME(read)(g, grad + offset(s->grad_y_stride, batch, w->pixels[t]), blk.count);
        if (!s->z) continue;
        NAME(read)(gate, s->z + offset(s->z_stride, batch, w->pixels[t]) + blk.first, blk.count);
        EACH_LANE(i) {
            vf z = AT(gate + i), sigmoid = NAME(sigmoid)(z);
            AT(gate + i) = AT(g + i) * sigmoid * (1.0f + z * (1.0f - sigmoid));
            AT(g + i) *= z * sigmoid;
        }
    }
}

/* Recomputes the states of the chunk into w->history, then walks it from the end. */
INLINE void NAME(sweep_back)(const scan_args *s, workspace *w, int64_t count, int64_t n, int64_t i, const int states) {
    vf h[BACKWARD_STATES], a[BACKWARD_STATES], carry[BACKWARD_STATES], grad_a[BACKWARD_STATES];
    for (int j = 0; j < states; j++) {
        int64_t at = (n + j) * BLOCK + i;
        h[j] = AT(w->h + at), a[j] = AT(w->a + at), carry[j] = AT(w->carry + at), grad_a[j] = AT(w->grad_a + at);
    }
    for (int64_t t = 0; t < count; t++) {
        const float *b = w->b + t * s->state + n, *c = w->c + t * s->state + n;
        vf dt = AT(w->dt + t * BLOCK + i), dtx = AT(w->dtx + t * BLOCK + i);
        for (int j = 0; j < states; j++) {
            vf decay = NAME(exp2)(dt * a[j]);
            AT(w->decay + (t * BACKWARD_STATES + j) * LANES) = decay;
            AT(w->history + (t * BACKWARD_STATES + j) * LANES) = h[j];
            h[j] = decay * h[j] + dtx * b[j];
            if (s->grad_z) AT(w->y + t * BLOCK + i) += h[j] * c[j];
        }
    }
    for (int64_t t = count - 1; t >= 0; t--) {
        int64_t at = t * BLOCK + i, row = t * s->state + n;
        vf dt = AT(w->dt + at), dtx = AT(w->dtx + at), grad_y = AT(w->grad_y + at);
        vf grad_dt = AT(w->grad_dt + at), grad_dtx = AT(w->grad_dtx + at);
        vf grad_b[BACKWARD_STATES], grad_c[BACKWARD_STATES];
        for (int j = 0; j < states; j++) {
            vf before = AT(w->history + (t * BACKWARD_STATES + j) * LANES);
            vf grad_h = carry[j] + grad_y * w->c[row + j];
            grad_c[j] = grad_y * h[j], grad_b[j] = grad_h * dtx;
            grad_dtx += grad_h * w->b[row + j];
            carry[j] = grad_h * AT(w->decay + (t * BACKWARD_STATES + j) * LANES);
            vf grad_exponent = carry[j] * before;
            grad_dt += grad_exponent * a[j];
            grad_a[j] += grad_exponent * dt;
            h[j] = before;
        }
        NAME(add_sums)(w->grad_b + row, grad_b, states);
        NAME(add_sums)(w->grad_c + row, grad_c, states);
        AT(w->grad_dt + at) = grad_dt, AT(w->grad_dtx + at) = grad_dtx;
    }
    for (int j = 0; j < states; j++) {
        int64_t at = (n + j) * BLOCK + i;
        AT(w->carry + at) = carry[j], AT(w->grad_a + at) = grad_a[j];
    }
}

/* Passes the gradient of one step's delta on to its low-rank form and to the weight. */
INLINE void NAME(to_low_rank)(const scan_args *s, workspace *w, float *grad_low, const float *low, int64_t i, vf raw) {
    vf products[4];
    for (int64_t r = 0; r < s->rank; r++) {
        AT(w->grad_weight + r * BLOCK + i) += raw * low[r];
        products[r % 4] = raw * AT(w->weight + r * BLOCK + i);
        if (!grad_low) continue;
        if (r % 4 == 3) NAME(add_sums)(grad_low + r - 3, products, 4);
        else if (r >= s->rank / 4 * 4) NAME(add_sums)(grad_low + r, &products[r % 4], 1);
    }
}

/* From the gradients of dt and dt * x to those of x, z, delta, its weight and bias, and the skip connection. */
INLINE void NAME(finish_steps)(const scan_args *s, workspace *w, int64_t k, block blk, int64_t batch, int64_t split,
                               int64_t count) {
    int64_t pixels = s->batch * s->height * s->width;
    float grad_x[BLOCK] __attribute__((aligned(64))), grad_raw[BLOCK] __attribute__((aligned(64)));
    for (int64_t t = 0; t < count; t++) {
        int64_t pixel_at = pixel_row(s, batch, w->pixels[t]), channel = pixel_at * s->channels + blk.first;
        int64_t row = pixel_at * s->directions + k;
        const float *low = s->delta + offset(s->delta_stride, batch, w->pixels[t]) + k * s->delta_stride[3];
        float *grad_low = s->rank ? at_or_null(s->grad_delta, (split * pixels * s->directions + row) * s->rank) : NULL;
        EACH_LANE(i) {
            int64_t at = t * BLOCK + i;
            vf x = AT(w->x + at), grad_y = AT(w->grad_y + at), grad_dtx = AT(w->grad_dtx + at);
            vf raw = (AT(w->grad_dt + at) * LN2 + grad_dtx * x) * AT(w->slope + at);
            AT(grad_raw + i) = raw;
            AT(grad_x + i) = grad_dtx * AT(w->dt + at) + AT(w->skip + i) * grad_y;
            AT(w->grad_bias + i) += raw;
            AT(w->grad_skip + i) += grad_y * x;
            if (s->rank) NAME(to_low_rank)(s, w, grad_low, low, i, raw);
            if (s->grad_z) AT(w->z + at) *= AT(w->y + at);
        }
        if (s->grad_x) NAME(write)(s->grad_x + channel, grad_x, blk.count, k > 0);
        if (s->grad_z) NAME(write)(s->grad_z + channel, w->z + t * BLOCK, blk.count, 0);
        if (s->grad_delta && !s->rank)
            NAME(write)(s->grad_delta + row * s->channels + blk.first, grad_raw, blk.count, 0);
        row = ((split * pixels * s->directions + row) * s->groups + blk.group) * s->state;
        add_row(at_or_null(s->grad_b, row), w->grad_b + t * s->state, s->state);
        add_row(at_or_null(s->grad_c, row), w->grad_c + t * s->state, s->state);
    }
}

INLINE void NAME(backward_chunk)(const scan_args *s, workspace *w, int64_t sequence, int64_t k, int64_t index,
                                 int64_t split, int64_t chunk) {
    int64_t count = least(CHUNK, sequence_length(s) - chunk * CHUNK), lines = is_lines(s) ? s->width : 1, n;
    int64_t batch = sequence / lines;
    block blk = get_block(s, index);
    find_pixels(s, s->orders[k], sequence % lines, chunk * CHUNK, count, w->pixels);
    NAME(gather)(s, w, batch, k, blk, count, 1);
    NAME(gather_grad_y)(s, w, batch, k, blk, count);
    if (s->grad_z) NAME(start_y)(w, count);
    memcpy(w->h, saved_states(s, sequence, index, k, chunk), s->state * BLOCK * sizeof(float));
    memset(w->grad_b, 0, count * s->state * sizeof(float));
    memset(w->grad_c, 0, count * s->state * sizeof(float));
    memset(w->grad_dt, 0, count * BLOCK * sizeof(float));
    memset(w->grad_dtx, 0, count * BLOCK * sizeof(float));
    EACH_LANE(i) {
        for (n = 0; n + BACKWARD_STATES <= s->state; n += BACKWARD_STATES)
            NAME(sweep_back)(s, w, count, n, i, BACKWARD_STATES);
        for (; n < s->state; n++) NAME(sweep_back)(s, w, count, n, i, 1);
    }
    NAME(finish_steps)(s, w, k, blk, batch, split, count);
}

static TARGET void NAME(backward_item)(const scan_args *s, workspace *w, int64_t item) {
    int64_t run = item / s->splits, split = item % s->splits, blocks = block_count(s), sequences = sequence_count(s);
    for (int64_t sequence = sequences * run / s->runs; sequence < sequences * (run + 1) / s->runs; sequence++)
        for (int64_t k = 0; k < s->directions; k++)
            for (int64_t index = blocks * split / s->splits; index < blocks * (split + 1) / s->splits; index++) {
                block blk = get_block(s, index);
                int64_t at = state_index(s, sequence, k, blk);
                load_parameters(s, w, k, blk);
                to_lanes(w->carry, const_at(s->grad_final, at), s->state, blk.count);
                clear_parameter_gradients(s, w);
                for (int64_t chunk = chunk_count(s) - 1; chunk >= 0; chunk--)
                    NAME(backward_chunk)(s, w, sequence, k, index, split, chunk);
                from_lanes(at_or_null(s->grad_initial, at), w->carry, s->state, blk.count, 0);
                add_parameter_gradients(s, w, run, k, blk);
            }
}

#undef vf
#undef vi
#undef INLINE
#undef AT
#undef ANYWHERE
#undef EACH_LANE
#undef MM
#undef ISA
#undef LANES
#undef TARGET

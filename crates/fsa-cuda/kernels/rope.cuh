// WHAT   Stage rope: pair k of a row's head, elements k and k + head_dim / 2, turns by position * frequency[k]. The backward is the same with
//        the angle negated. Memory-bound: every element is read and written once.
// GRID   (groups of rows).
// ROLES  8 to 64 threads a row, as many as it has pieces. First, threads compute sines and cosines, one per pair; then a thread keeps those of
//        its pairs in registers and goes through the heads.
// SMEM   Sines and cosines of the rows.
// SYNC   One barrier, between the two.
#include "block/sequence.cuh"
#include "tile/pieces.cuh"

constexpr int CTA_THREADS = 256;
constexpr int MAX_PAIRS = HEAD_DIM / 2;
typedef double f64;

// Position of a row, or -1 for a row that no sequence has.
FSA_DEVICE i64 row_position(const RopeParams& p, i64 row) {
    if (row >= p.rows) return -1;
    if (p.positions != nullptr) return (i64)p.positions[row] * p.multiplier;
    if (row >= p.cu_rows[p.batch]) return -1;
    const int s = find_sequence(p.cu_rows, p.batch, (int)row);
    int local = (int)row - p.cu_rows[s];
    if (p.cu_seqlens_kv != nullptr) local += p.cu_seqlens_kv[s + 1] - p.cu_seqlens_kv[s] - (p.cu_rows[s + 1] - p.cu_rows[s]);
    return (i64)local * p.multiplier;
}

// Sine and cosine of an angle below 2^40, to 1.6 ulp. The angle is reduced by multiples of a quarter turn in f64, whose half in two
// parts makes the remainder exact to 2^-60 of the multiple; polynomials of Cephes' sinf and cosf on [-pi / 4, pi / 4] do the rest.
struct Turn {
    f32 sine, cosine;
};
FSA_DEVICE Turn turn(f64 angle) {
    constexpr f64 TO_INTEGER = 6755399441055744.0;      // 1.5 * 2^52: adding it leaves no bits of a fraction
    const f64 quarters = (angle * 0.63661977236758134 + TO_INTEGER) - TO_INTEGER;
    const f64 remainder = fma(-quarters, 6.123233995736766e-17, fma(-quarters, 1.5707963267948966, angle));
    const int quadrant = (int)((i64)quarters & 3);
    const f32 x = (f32)remainder, z = x * x;
    const f32 sine = fmaf(fmaf(fmaf(-1.9515295891e-4f, z, 8.3321608736e-3f), z, -1.6666654611e-1f) * z, x, x);
    const f32 cosine = fmaf(fmaf(fmaf(2.443315711809948e-5f, z, -1.388731625493765e-3f), z, 4.166664568298827e-2f), z * z, fmaf(-0.5f, z, 1.0f));
    const f32 s = quadrant & 1 ? cosine : sine, c = quadrant & 1 ? sine : cosine;
    return {quadrant & 2 ? -s : s, (quadrant + 1) & 2 ? -c : c};
}

// WIDTH neighbouring elements, in one access of 16, 8 or 2 bytes.
struct __align__(8) Pair { u32 x, y; };
template <int WIDTH>
struct Elements {
    u32 words[WIDTH == 1 ? 1 : WIDTH / 2];

    FSA_DEVICE void load(const char* at) {
        if constexpr (WIDTH == 8) {
            const Vec4 v = load_global_once(at);
            words[0] = v.x; words[1] = v.y; words[2] = v.z; words[3] = v.w;
        } else if constexpr (WIDTH == 4) {
            const Pair v = *(const Pair*)at;
            words[0] = v.x; words[1] = v.y;
        } else {
            words[0] = *(const u16*)at;
        }
    }
    FSA_DEVICE void store(char* at) const {
        if constexpr (WIDTH == 8) store_global(at, Vec4{words[0], words[1], words[2], words[3]});
        else if constexpr (WIDTH == 4) store_global8(at, words[0], words[1]);
        else *(u16*)at = (u16)words[0];
    }
    FSA_DEVICE f32 get(int e) const { return e & 1 ? unpack_hi(words[e / 2]) : unpack_lo(words[e / 2]); }
    FSA_DEVICE void set(const f32 (&x)[WIDTH]) {
        if constexpr (WIDTH == 1) words[0] = pack2(x[0], 0.0f);
        else FSA_UNROLL for (int e = 0; e < WIDTH; e += 2) words[e / 2] = pack2(x[e], x[e + 1]);
    }
};

// One row: a thread has WIDTH pairs of every phases-th head.
template <int WIDTH>
FSA_DEVICE void rotate_row(const RopeParams& p, int row, int lane, const f32* sines, const f32* cosines) {
    constexpr int AHEAD = 2;     // heads whose loads are under way: with four ctas on an SM, 64 KB
    const int half = p.head_dim / 2, groups = half / WIDTH;
    const int columns = min_i(groups, p.row_threads), phases = p.row_threads / columns, phase = lane / columns;
    if (phase >= phases) return;
    const i64 input_step = phases * p.input.head_stride * ELEMENT_BYTES, out_step = phases * p.out.head_stride * ELEMENT_BYTES;
    for (int group = lane % columns; group < groups; group += WIDTH == 8 ? MAX_PAIRS : columns) {   // a row has a thread for every eight pairs
        f32 sine[WIDTH], cosine[WIDTH];
        FSA_UNROLL for (int e = 0; e < WIDTH; ++e) {
            sine[e] = sines[group * WIDTH + e];
            cosine[e] = cosines[group * WIDTH + e];
        }
        const int at = group * WIDTH * ELEMENT_BYTES, partner = half * ELEMENT_BYTES;
        const char* input = tensor_row(p.input, row, phase) + at;
        char* out = (char*)tensor_row(p.out, row, phase) + at;
        FSA_NO_UNROLL for (int head = phase; head < p.heads; head += AHEAD * phases) {
            Elements<WIDTH> first[AHEAD], second[AHEAD];
            FSA_UNROLL for (int a = 0; a < AHEAD; ++a) {
                if (head + a * phases >= p.heads) break;
                first[a].load(input + a * input_step);
                second[a].load(input + a * input_step + partner);
            }
            FSA_UNROLL for (int a = 0; a < AHEAD; ++a) {
                if (head + a * phases >= p.heads) break;
                f32 x[WIDTH], y[WIDTH];
                FSA_UNROLL for (int e = 0; e < WIDTH; ++e) {
                    x[e] = first[a].get(e) * cosine[e] - second[a].get(e) * sine[e];
                    y[e] = second[a].get(e) * cosine[e] + first[a].get(e) * sine[e];
                }
                first[a].set(x);
                second[a].set(y);
                first[a].store(out + a * out_step);
                second[a].store(out + a * out_step + partner);
            }
            input += AHEAD * input_step;
            out += AHEAD * out_step;
        }
    }
}

// Elements head_dim .. HEAD_DIM - 1 of a row, which are not rotated.
template <int WIDTH>
FSA_DEVICE void copy_padding(const RopeParams& p, int row, int lane) {
    const int groups = (HEAD_DIM - p.head_dim) / WIDTH;
    for (int n = lane; n < groups * p.heads; n += p.row_threads) {
        const int head = n / groups, at = (p.head_dim + n % groups * WIDTH) * ELEMENT_BYTES;
        Elements<WIDTH> x;
        x.load(tensor_row(p.input, row, head) + at);
        x.store((char*)tensor_row(p.out, row, head) + at);
    }
}

extern "C" __global__ void __launch_bounds__(CTA_THREADS, 4) rope(const __grid_constant__ RopeParams p) {
    extern __shared__ __align__(16) char shared[];
    const int local = threadIdx.x / p.row_threads, lane = threadIdx.x % p.row_threads, half = p.head_dim / 2;
    f32 *sines = (f32*)shared + 2 * MAX_PAIRS * local, *cosines = sines + MAX_PAIRS;
    const i64 row = (i64)blockIdx.x * (CTA_THREADS / p.row_threads) + local, position = row_position(p, row);
    if (position >= 0)
        for (int k = lane; k < half; k += p.row_threads) {
            const Turn t = turn((f64)position * p.frequencies[k]);
            sines[k] = p.inverse ? -t.sine : t.sine;
            cosines[k] = t.cosine;
        }
    __syncthreads();
    if (position < 0) return;
    if (p.head_dim < HEAD_DIM && p.input.data != p.out.data) {
        if (p.head_dim % 8 == 0) copy_padding<8>(p, (int)row, lane); else copy_padding<1>(p, (int)row, lane);
    }
    if (half % 8 == 0) rotate_row<8>(p, (int)row, lane, sines, cosines);
    else if (half % 4 == 0) rotate_row<4>(p, (int)row, lane, sines, cosines);
    else rotate_row<1>(p, (int)row, lane, sines, cosines);
}

use super::*;
use crate::params::TILE_ROWS;
use crate::source::HEAD_DIMS;
use proptest::prelude::*;

const MILLION: usize = 1 << 20;

fn problem(tokens: usize, heads: (usize, usize), (block_size, topk): (usize, usize)) -> Problem {
    Problem {
        total_q: tokens,
        total_kv: tokens,
        sequences: 1,
        num_q_heads: heads.0,
        num_kv_heads: heads.1,
        head_dim: 128,
        block_size,
        topk,
        dtype: DType::Bf16,
    }
}

fn forward(problem: &Problem) -> ForwardPlan {
    ForwardPlan::new(problem, KernelSet::Sm90, &DeviceFacts::h200(), &PlanOptions::default())
}

fn backward(problem: &Problem) -> BackwardPlan {
    BackwardPlan::new(problem, KernelSet::Sm90, &DeviceFacts::h200(), &PlanOptions::default())
}

/// Scratch besides one copy of `topk_indices`.
fn besides_indices(problem: &Problem, workspace: &Workspace) -> usize {
    workspace.size_bytes().saturating_sub(problem.topk_indices_bytes())
}

#[test]
fn scratch_of_the_forward_stays_within_the_budget_up_to_a_million_tokens() {
    for tokens in [1, 100, 8192, 65_536, 262_144, MILLION] {
        for heads in [(32, 32), (32, 8), (32, 2), (40, 8), (64, 4)] {
            for selection in [(64, 16), (128, 8)] {
                let problem = problem(tokens, heads, selection);
                let plan = forward(&problem);
                let bytes = besides_indices(&problem, &plan.workspace);
                assert!(bytes <= DEFAULT_BUDGET_BYTES, "{plan}");
            }
        }
    }
}

#[test]
fn a_chunk_of_one_sequence_has_units_for_the_blocks_before_its_last_row() {
    let whole = problem(65_536, (32, 8), (64, 16));
    let index = forward(&whole).index;
    assert_eq!((index.num_chunks, index.chunk_tiles), (2, 512));
    let blocks = |problem: &Problem, chunk| index.units_of(problem, chunk) - index.spare_units;
    assert_eq!([0, 1].map(|chunk| blocks(&whole, chunk)), [512, 1024]);
    // The rows are the last of the keys: the chunk's last row sees those before it, too.
    let behind = Problem { total_q: 65_000, ..whole };
    assert_eq!([0, 1].map(|chunk| blocks(&behind, chunk)), [521, 1024]);
    // Which blocks a chunk of several sequences lists is known on the device only.
    let packed = Problem { sequences: 2, ..whole };
    assert_eq!([0, 1].map(|chunk| blocks(&packed, chunk)), [1024, 1024]);
}

#[test]
fn scratch_of_the_backward_stays_within_the_budget_up_to_a_million_tokens() {
    for tokens in [1, 100, 8192, 65_536, 262_144, 1_048_576] {
        for heads in [(32, 32), (32, 8), (32, 2), (40, 8), (64, 4)] {
            for selection in [(64, 16), (128, 8)] {
                let problem = problem(tokens, heads, selection);
                let plan = backward(&problem);
                let most = DEFAULT_BUDGET_BYTES + problem.topk_indices_bytes();
                assert!(plan.workspace.size_bytes() <= most, "{plan}");
            }
        }
    }
}

#[test]
fn ranges_of_keys_cover_all_keys_in_whole_blocks() {
    let problem = problem(1_048_576, (32, 8), (64, 16));
    let plan = backward(&problem);
    let ranges: Vec<_> = plan.key_ranges().collect();
    assert!(ranges.len() > 1 && plan.sum_rows < problem.total_kv, "{plan}");
    assert!(plan.index.chunk_rows(&problem) >= 65_536, "short chunks cost more than ranges: {plan}");
    assert_eq!((ranges[0].start, ranges[ranges.len() - 1].end), (0, problem.total_kv));
    assert!(ranges.windows(2).all(|pair| pair[0].end == pair[1].start && pair[1].start % problem.block_size == 0));
    assert_eq!(backward(&super::tests::problem(65_536, (32, 8), (64, 16))).key_ranges().count(), 1);
}

#[test]
fn heads_of_a_group_share_units_where_launches_are_long() {
    let unit_heads = |tokens, heads, change: fn(&mut Problem, &mut PlanOptions)| {
        let (mut problem, mut options) = (problem(tokens, heads, (64, 16)), PlanOptions::default());
        change(&mut problem, &mut options);
        let plan = BackwardPlan::new(&problem, KernelSet::Sm90, &DeviceFacts::h200(), &options);
        let shares = plan.heads > plan.unit_heads && plan.unit_heads < plan.problem.gqa_group_size();
        assert!(plan.unit_heads == 1 || shares || plan.finishes_sums, "{plan}");
        plan.unit_heads
    };
    let lengths = [4096, 8192, 32_768, 65_536].map(|tokens| unit_heads(tokens, (32, 8), |_, _| ()));
    assert_eq!(lengths, [1, 4, 4, 4]);
    let groups = [(32, 32), (32, 16), (64, 4), (40, 8)].map(|heads| unit_heads(65_536, heads, |_, _| ()));
    assert_eq!(groups, [1, 2, 4, 1]);
    assert_eq!(unit_heads(65_536, (32, 8), |problem, _| problem.dtype = DType::F16), 1);
    assert_eq!(unit_heads(65_536, (32, 8), |_, options| options.query_sums = Some(QuerySums::F32)), 1);
    assert_eq!(unit_heads(65_536, (32, 8), |_, options| options.deterministic = true), 1);
}

#[test]
fn a_usual_length_of_the_backward_is_one_index_and_sums_of_few_keys() {
    let plans = [(32, 32), (32, 8), (32, 2)].map(|heads| backward(&problem(65_536, heads, (64, 16))));
    let choices = |plan: &BackwardPlan| (plan.kv_heads, plan.lanes, plan.heads, plan.index.packs_sums);
    assert_eq!(plans.each_ref().map(choices), [(32, 3, 1, true), (8, 2, 4, true), (2, 2, 4, false)]);
    assert!(plans[1].sum_rows < plans[1].problem.total_kv / 2, "{}", plans[1]);
    // A lane for every turn at most.
    assert_eq!(backward(&problem(1024, (32, 8), (64, 16))).lanes, 1);
}

#[test]
fn sums_of_gradients_of_queries_are_in_place_where_units_take_more_heads_and_nothing_is_there() {
    let plan = |tokens, heads, adds_to_grads, query_sums| {
        let options = PlanOptions { adds_to_grads, query_sums, ..PlanOptions::default() };
        let problem = problem(tokens, heads, (64, 16));
        let plan = BackwardPlan::new(&problem, KernelSet::Sm90, &DeviceFacts::h200(), &options);
        assert!(plan.workspace.size_bytes() <= DEFAULT_BUDGET_BYTES + problem.topk_indices_bytes(), "{plan}");
        plan
    };
    let choices = |plan: &BackwardPlan| (plan.lanes, plan.lanes_in_place, plan.heads);
    assert_eq!(choices(&plan(65_536, (32, 8), false, None)), (2, 0, 4), "there is room");
    let sixteen = plan(65_536, (32, 2), false, None);
    assert_eq!(choices(&sixteen), (2, 1, 4));
    assert!(sixteen.sums(0).grad_query.bytes > 0 && !sixteen.sums(0).in_place, "{sixteen}");
    assert!(sixteen.sums(1).grad_query.bytes == 0 && sixteen.sums(1).in_place, "{sixteen}");
    assert_eq!(choices(&plan(65_536, (32, 2), true, None)), (2, 0, 2));
    assert_eq!(plan(65_536, (32, 2), false, Some(QuerySums::F32)).lanes_in_place, 0);
    assert_eq!(choices(&plan(131_072, (32, 8), false, None)), (1, 0, 2), "a second lane alone is no reason");
    // Ranges of keys add to what those before wrote.
    let million = plan(MILLION, (32, 8), false, None);
    assert!(million.key_ranges().count() == 1 || million.lanes_in_place == 0, "{million}");
}

/// Blocks of one kv head, by how many rows list them, that have several units.
fn split_blocks(counts: impl Iterator<Item = usize>, plan: &BackwardPlan) -> usize {
    counts.filter(|count| *count > plan.index.unit_entries).count()
}

#[test]
fn packed_sums_have_room_for_all_blocks_of_several_units() {
    for tokens in [1, 3000, 8192, 20_000, 65_536, 131_072] {
        for (heads, selection) in [((32, 32), (64, 16)), ((32, 8), (64, 16)), ((32, 16), (16, 64)), ((32, 8), (128, 8))]
        {
            let problem = problem(tokens, heads, selection);
            let plan = backward(&problem);
            if !plan.index.packs_sums {
                continue;
            }
            let (entries, unit) = (tokens * problem.topk, plan.index.unit_entries);
            let lists = [
                // All rows list the same blocks; all list one; as many blocks as can have more than a unit; no row lists any.
                split_blocks(std::iter::repeat_n(tokens, problem.topk), &plan),
                split_blocks([entries].into_iter(), &plan),
                split_blocks(std::iter::repeat_n(unit + 1, (entries / (unit + 1)).min(plan.index.max_blocks)), &plan),
                split_blocks(std::iter::repeat_n(0, plan.index.max_blocks), &plan),
            ];
            let rows = lists.map(|blocks| blocks * problem.block_size);
            assert!(rows.iter().all(|rows| *rows <= plan.sum_rows), "{rows:?}: {plan}");
            let bytes = plan.kv_heads_per_launch * plan.sum_rows * problem.head_dim * size_of::<f32>();
            assert!(plan.sums(0).grad_key.bytes >= bytes && plan.sums(0).grad_value.bytes >= bytes, "{plan}");
        }
    }
}

#[test]
fn a_usual_length_is_one_index_and_two_buffers() {
    let plan = forward(&problem(65_536, (32, 8), (64, 16)));
    assert_eq!((plan.kv_heads, plan.buffers), (8, 2), "{plan}");
    assert_eq!(plan.index.chunk_tiles % plan.index.sub_tiles, 0);
    assert_eq!(plan.launches(), 2 + 2 * plan.index.num_chunks * 32usize.div_ceil(plan.heads));
}

#[test]
fn entries_of_usual_lengths_are_put_in_order_in_shared_memory() {
    let most = DeviceFacts::h200().smem_per_cta_bytes / 2;
    for (tokens, staged) in [(1024, true), (65_536, true), (MILLION, false)] {
        for heads in [(32, 32), (32, 8), (32, 2)] {
            let problem = problem(tokens, heads, (64, 16));
            let deterministic = PlanOptions { deterministic: true, ..PlanOptions::default() };
            let ordered = BackwardPlan::new(&problem, KernelSet::Sm90, &DeviceFacts::h200(), &deterministic).index;
            for index in [forward(&problem).index, backward(&problem).index, ordered] {
                assert_eq!(index.staged, staged, "{problem}: {index:?}");
                assert!(!staged || index.scatter_smem_bytes() <= most, "{problem}: {index:?}");
                assert_eq!(index.builds, staged && !index.ordered, "{problem}: {index:?}");
            }
        }
    }
}

#[test]
fn no_index_waits_for_more_ctas_than_the_device_has_places_for() {
    // Two CTAs of half of a multiprocessor's memory each, but for 128 bytes, do not fit.
    let full = Problem { total_q: 81_920, total_kv: 163_840, ..problem(81_920, (1, 1), (16, 16)) };
    for problem in [full, problem(262_144, (1, 1), (64, 16)), problem(90_112, (2, 2), (16, 16))] {
        let index = backward(&problem).index;
        let pieces = index.num_subs.min(index.chunk_tiles / index.sub_tiles);
        assert!(!index.builds || pieces <= 132, "{problem}: {index:?}");
    }
}

#[test]
fn a_short_call_is_four_launches() {
    let plan = forward(&problem(1024, (32, 8), (64, 16)));
    assert_eq!((plan.index.num_chunks, plan.heads, plan.launches()), (1, 32, 4), "{plan}");
}

#[test]
fn unsupported_sizes_are_named() {
    let base = problem(1024, (32, 8), (64, 16));
    let cases = [
        (Problem { dtype: DType::F32, ..base }, "dtype"),
        (Problem { head_dim: 80, ..base }, "head_dim"),
        (Problem { block_size: 48, ..base }, "block_size"),
        (Problem { topk: 65, ..base }, "topk"),
        (Problem { topk: 0, ..base }, "topk"),
        (Problem { num_q_heads: 30, ..base }, "heads"),
        (Problem { total_kv: 1 << 24, block_size: 16, ..base }, "blocks of all sequences"),
    ];
    for (problem, constraint) in cases {
        let error = problem.check(&DeviceFacts::h200(), &[]).expect_err(constraint);
        assert!(matches!(&error, Error::Unsupported { constraint: c, .. } if c.starts_with(constraint)), "{error}");
    }
    assert!(base.check(&DeviceFacts::h200(), &[]).is_ok());
}

#[test]
fn a_kernel_that_does_not_fit_names_the_device() {
    let large = Problem { head_dim: 256, ..problem(1024, (32, 8), (256, 16)) };
    let kernel = large.specialisation(Kernel::Attend, KernelSet::Sm90);
    let error = large.check(&DeviceFacts::h200(), &[kernel]).expect_err("key and value tiles of 128 KB each");
    assert!(error.to_string().contains("NVIDIA H200") && error.to_string().contains("shared memory"), "{error}");
}

/// Regions follow each other without overlap.
fn check_workspace(workspace: &Workspace) -> Result<(), TestCaseError> {
    let mut end = 0;
    for (name, slot) in workspace.regions() {
        prop_assert!(slot.offset >= end && slot.offset.is_multiple_of(256), "{name} at {}", slot.offset);
        end = slot.offset + slot.bytes;
    }
    prop_assert!(end <= workspace.size_bytes());
    Ok(())
}

fn check_index(problem: &Problem, plan: &IndexPlan, facts: &DeviceFacts) -> Result<(), TestCaseError> {
    prop_assert_eq!(plan.chunk_tiles % plan.sub_tiles, 0);
    prop_assert!(plan.num_chunks * plan.chunk_tiles >= plan.max_tiles);
    prop_assert!(plan.num_subs * plan.sub_tiles >= plan.max_tiles);
    prop_assert!(plan.chunk_tiles * TILE_ROWS <= 1 << 24, "a token of a chunk has 24 bits");
    prop_assert!(plan.chunk_tiles * TILE_ROWS * plan.slots < 1 << 31, "entries of a chunk are counted in i32");
    prop_assert!(plan.window_blocks > 0 && plan.scatter_smem_bytes() <= facts.smem_per_cta_bytes);
    prop_assert!(plan.max_blocks.div_ceil(plan.window_blocks) <= 65_535 && problem.num_kv_heads <= 65_535);
    if plan.builds {
        // All of a chunk are on the device at once, besides two thirds of what fits: 64 registers a thread, and each has 2 KB of shared memory that it did not ask for.
        let pieces = plan.num_subs.min(plan.chunk_tiles / plan.sub_tiles);
        let memory = facts.smem_per_cta_bytes + 1024;
        let fit = |n: &usize| n * plan.build_threads <= 1024 && n * (plan.build_smem_bytes() + 2048) <= memory;
        prop_assert!(plan.build_threads <= 512 && pieces <= facts.multiprocessors);
        prop_assert!(3 * pieces <= (1..=32).rfind(fit).unwrap_or(0) * facts.multiprocessors, "{plan:?}");
        // A place in a run and the offset of a counter have 16 bits, a row of a piece has 10.
        prop_assert!(
            plan.sub_tiles.is_power_of_two()
                && plan.sub_tiles * TILE_ROWS <= 1024
                && plan.sub_tiles * TILE_ROWS * problem.topk < 1 << 16
        );
        prop_assert!((plan.max_blocks + 32) * 4 <= 1 << 16 && problem.topk <= 64 && !plan.ordered);
    }
    // However the entries of a chunk spread over blocks, their full units fit.
    let entries = plan.chunk_tiles * TILE_ROWS * plan.slots;
    prop_assert!(plan.full_units >= entries / plan.unit_entries);
    // Nor those that are twice as large exceed what a launch has CTAs for besides one a block.
    prop_assert!(plan.spare_units >= entries / (2 * plan.unit_entries) && plan.spare_units <= plan.full_units);
    // Neither do the blocks that rows of the last chunk list exceed those for which a launch has CTAs.
    prop_assert_eq!(plan.units_of(problem, plan.num_chunks - 1), plan.max_units());
    Ok(())
}

proptest! {
    #[test]
    fn plans_of_any_shape_hold_together(
        total_q in 0usize..3_000_000,
        extra in 0usize..10_000,
        sequences in 1usize..300,
        kv_heads in 1usize..33,
        group in 1usize..17,
        head_dim in proptest::sample::select(&HEAD_DIMS),
        block_size in proptest::sample::select(&BLOCK_SIZES),
        topk in 1usize..=MAX_TOPK,
        hopper in any::<bool>(),
        deterministic in any::<bool>(),
        dtype in proptest::sample::select(&[DType::Bf16, DType::F16]),
    ) {
        let facts = if hopper { DeviceFacts::h200() } else { DeviceFacts::a100() };
        let problem = Problem {
            total_q,
            total_kv: total_q + extra,
            sequences,
            num_q_heads: kv_heads * group,
            num_kv_heads: kv_heads,
            head_dim,
            block_size,
            topk,
            dtype,
        };
        let plan = ForwardPlan::new(&problem, facts.arch.kernels(), &facts, &PlanOptions::default());
        check_workspace(&plan.workspace)?;
        check_index(&problem, &plan.index, &facts)?;
        prop_assert!(plan.heads > 0 && plan.heads <= plan.kv_heads * group);
        let options = PlanOptions { deterministic, ..PlanOptions::default() };
        let plan = BackwardPlan::new(&problem, facts.arch.kernels(), &facts, &options);
        check_workspace(&plan.workspace)?;
        check_index(&problem, &plan.index, &facts)?;
        prop_assert!(plan.heads.is_multiple_of(plan.unit_heads) && group.is_multiple_of(plan.unit_heads));
    }
}

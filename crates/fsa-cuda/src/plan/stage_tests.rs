use super::*;
use crate::source::HEAD_DIMS;
use fsa_core::config::BLOCK_SIZES;
use fsa_core::{NsaConfig, ScoreHeads};
use proptest::prelude::*;

fn sizes(tokens: usize, (num_q_heads, num_kv_heads): (usize, usize)) -> Sizes {
    let (total_q, total_kv, sequences) = (tokens, tokens, 1);
    Sizes { total_q, total_kv, sequences, num_q_heads, num_kv_heads, head_dim: 128, dtype: DType::Bf16 }
}

fn nsa(tokens: usize, heads: (usize, usize), rope: bool) -> NsaProblem {
    NsaProblem::new(&sizes(tokens, heads), &NsaConfig::default(), [CompressionKind::Mean; 2], rope)
}

fn forward(problem: &NsaProblem, saves: bool) -> NsaForwardPlan {
    let (facts, options) = (DeviceFacts::h200(), PlanOptions::default());
    NsaForwardPlan::new(problem, KernelSet::Sm90, &facts, &options, saves).expect("fits")
}

fn backward(problem: &NsaProblem) -> NsaBackwardPlan {
    NsaBackwardPlan::new(problem, KernelSet::Sm90, &DeviceFacts::h200(), &PlanOptions::default())
}

fn band_backward(problem: &BandProblem, options: &PlanOptions) -> BandBackwardPlan {
    let kernel = problem.sizes.specialisation(Kernel::BandBackward, KernelSet::Sm90, 64);
    BandBackwardPlan::new(problem, &kernel, &DeviceFacts::h200(), options)
}

#[test]
fn usual_groups_fill_their_tiles() {
    for (heads, expected) in
        [((32, 32), (1, 128, 1)), ((32, 8), (4, 32, 1)), ((40, 8), (5, 25, 1)), ((64, 4), (16, 8, 1))]
    {
        let RowTiles { tile_heads, tile_tokens, head_tiles, .. } = RowTiles::new(&sizes(4096, heads), 128);
        assert_eq!((tile_heads, tile_tokens, head_tiles), expected);
    }
    let wide = RowTiles::new(&sizes(4096, (150, 1)), 128);
    assert_eq!((wide.tile_heads, wide.tile_tokens, wide.head_tiles), (75, 1, 2), "two tiles of one size");
}

#[test]
fn steps_of_a_window_leave_little_over() {
    let steps = |heads, window_size, head_dim, set| {
        let sizes = Sizes { head_dim, ..sizes(8192, heads) };
        let tiles = RowTiles::new(&sizes, 128);
        BandProblem { sizes, keys: Keys::Window { window_size } }.kernel(set, &tiles).step_keys
    };
    let hopper = |heads, window_size| steps(heads, window_size, 128, KernelSet::Sm90);
    assert_eq!(hopper((32, 32), 512), None, "640 keys: five steps of 128");
    assert_eq!(hopper((32, 16), 512), Some(144), "576 keys: four of 144");
    assert_eq!(hopper((32, 8), 512), Some(112), "544 keys: five of 112");
    assert_eq!(hopper((32, 2), 512), Some(112));
    assert_eq!(hopper((32, 8), 8192), None, "rows see every earlier key");
    assert_eq!(steps((32, 8), 512, 192, KernelSet::Sm90), None);
    assert_eq!(steps((32, 8), 512, 128, KernelSet::Sm80), None);
}

#[test]
fn rows_of_few_keys_are_split_and_those_of_many_are_not() {
    let options = PlanOptions::default();
    let compressed = Keys::Compressed(Windows { kernel_size: 32, kernel_stride: 16 });
    let few = BandProblem { sizes: sizes(8192, (32, 2)), keys: compressed };
    assert_eq!(band_backward(&few, &options).splits, 32, "4 tiles of keys on 2 heads, 198 ctas wanted");
    let many = BandProblem { keys: Keys::Dense, sizes: sizes(65_536, (32, 8)) };
    let plan = band_backward(&many, &options);
    assert_eq!((plan.splits, plan.kv_heads), (1, 8), "{plan}");
    let tight = band_backward(&few, &PlanOptions { budget_bytes: 8 << 20, ..options });
    assert!(tight.splits < 32 && tight.workspace.size_bytes() <= (8 << 20) + 4096, "{tight}");
}

#[test]
fn gradients_of_queries_are_added_up_in_memory_where_that_pays_and_is_exact_enough() {
    let options = PlanOptions::default();
    let compressed = Keys::Compressed(Windows { kernel_size: 32, kernel_stride: 16 });
    let problem = |tokens, keys| BandProblem { sizes: sizes(tokens, (32, 8)), keys };
    let sums = |problem: &BandProblem, options: &PlanOptions| band_backward(problem, options).query_sums;
    let long = problem(65_536, compressed);
    let plan = band_backward(&long, &options);
    assert_eq!((plan.query_sums, plan.splits, plan.tiles.tile_tokens), (QuerySums::Scaled, 1, 20), "{plan}");
    let tile = |heads| {
        let sizes = sizes(65_536, (heads, 1));
        let plan = band_backward(&BandProblem { sizes, ..long }, &options);
        let wide = plan.specialisation(KernelSet::Sm90).wide_rows;
        (plan.tiles.tile_heads * plan.tiles.tile_tokens, wide)
    };
    let wide = [(80, true), (78, true), (80, true), (63, false), (80, true), (64, false), (80, true), (64, false)];
    assert_eq!([1, 3, 5, 9, 16, 32, 40, 64].map(tile), wide, "80 rows where that is a fifth more than 64 would be");
    assert_eq!(sums(&long, &PlanOptions { deterministic: true, ..options }), QuerySums::F32);
    assert_eq!(sums(&long, &PlanOptions { query_sums: Some(QuerySums::F32), ..options }), QuerySums::F32);
    let f16 = BandProblem { sizes: Sizes { dtype: DType::F16, ..long.sizes }, ..long };
    assert_eq!(sums(&f16, &options), QuerySums::F32, "its results have as many bits as the sums");
    let short = problem(2048, compressed);
    assert_eq!(sums(&short, &options), QuerySums::F32, "32 splits");
    assert_eq!(sums(&short, &PlanOptions { query_sums: Some(QuerySums::Scaled), ..options }), QuerySums::Scaled);
    assert_eq!(sums(&problem(1 << 20, Keys::Window { window_size: 512 }), &options), QuerySums::Scaled);
    assert_eq!(sums(&problem(1 << 20, Keys::Dense), &options), QuerySums::F32, "8192 tiles of keys");
}

#[test]
fn branches_share_sums_of_gradients_of_queries_where_the_kernels_can() {
    let plan = |problem: &NsaProblem, set, options: &PlanOptions| {
        NsaBackwardPlan::new(problem, set, &DeviceFacts::h200(), options)
    };
    let (hopper, options) = (KernelSet::Sm90, PlanOptions::default());
    let usual = |tokens| nsa(tokens, (32, 8), false);
    for (tokens, together) in [(512, true), (4096, true), (8192, false), (65_536, false)] {
        let plan = plan(&usual(tokens), hopper, &options);
        assert_eq!((plan.shares_query_sums, plan.window.is_none()), (true, together), "{plan}");
    }
    let long = usual(65_536);
    let shares = |problem: &NsaProblem, set, options: &PlanOptions| plan(problem, set, options).shares_query_sums;
    assert!(!shares(&long, hopper, &PlanOptions { deterministic: true, ..options }));
    assert!(!shares(&long, hopper, &PlanOptions { query_sums: Some(QuerySums::F32), ..options }));
    assert!(!shares(&long, KernelSet::Sm80, &options));
    let with = |dtype, head_dim| NsaProblem { sizes: Sizes { dtype, head_dim, ..long.sizes }, ..long };
    assert!(!shares(&with(DType::F16, 128), hopper, &options));
    assert!(!shares(&with(DType::Bf16, 64), hopper, &options));
    let million = plan(&usual(1 << 20), hopper, &options);
    assert!(!million.shares_query_sums, "512 tiles of compressed keys, and those of the window: {million}");
    assert_eq!(million.compressed.query_sums, QuerySums::Scaled, "{million}");
}

#[test]
fn windows_that_do_not_fit_shared_memory_are_refused() {
    let config = |kernel_size, kernel_stride| NsaConfig { kernel_size, kernel_stride, ..NsaConfig::default() };
    let plan = |config: &NsaConfig| {
        let problem = SelectProblem::new(&sizes(4096, (32, 32)), config);
        let facts = DeviceFacts::a100();
        problem.check(&facts, &[])?;
        SelectPlan::new(&problem, KernelSet::Sm80, &facts, &PlanOptions::default())
    };
    assert!(plan(&NsaConfig::default()).is_ok());
    let long = plan(&config(1 << 14, 1)).expect("fewer tokens in a tile");
    let ListPlan::OwnPass(scores) = long.lists else { panic!("no portable kernel does both: {long}") };
    assert!(scores.tiles.tile_tokens < 64, "{long}");
    let error = plan(&config(1 << 20, 1)).expect_err("scores of 16,384 blocks under way");
    assert!(
        matches!(&error, Error::Unsupported { constraint, .. } if constraint == "windows of stage select"),
        "{error}"
    );
}

/// Whether compressed attention makes the lists, alone and in the whole; what it keeps until then is in the budget.
fn makes_lists(problem: &NsaProblem, options: &PlanOptions) -> bool {
    let (facts, set) = (DeviceFacts::h200(), KernelSet::Sm90);
    let alone = SelectPlan::new(&problem.select(), set, &facts, options).expect("fits");
    let wholes = [false, true].map(|saves| {
        let plan = NsaForwardPlan::new(problem, set, &facts, options, saves).expect("fits");
        let most = options.budget_bytes + problem.topk_indices_bytes();
        assert!(options.one_pass.is_some() || plan.workspace.size_bytes() <= most, "{plan}");
        plan.lists.is_one_pass()
    });
    assert_eq!(wholes, [alone.lists.is_one_pass(); 2], "{alone}");
    wholes[0]
}

#[test]
fn the_first_rows_of_a_short_sequence_are_apart_however_many_heads_a_pass_has() {
    let early = |tokens: usize, heads, saves, problem: fn(NsaProblem) -> NsaProblem| {
        let problem = problem(nsa(tokens, heads, true));
        let plan = NsaForwardPlan::new(&problem, KernelSet::Sm90, &DeviceFacts::h200(), &PlanOptions::default(), saves);
        plan.expect("fits").early.map(|early| (early.end, early.tiles.num_tiles, early.beside))
    };
    let same = |problem| problem;
    for saves in [false, true] {
        let found = [1024, 1280, 1536, 2048, 4096].map(|tokens| early(tokens, (32, 8), saves, same));
        assert_eq!(found, [None, Some((1024, 32, true)), Some((1024, 32, false)), Some((1024, 32, false)), None]);
        assert_eq!(early(2048, (32, 2), saves, same), Some((1024, 128, false)));
        assert_eq!(early(2048, (4, 1), saves, same), None, "not work for every multiprocessor");
        let two = |problem: NsaProblem| NsaProblem { sizes: Sizes { sequences: 2, ..problem.sizes }, ..problem };
        let before = |problem: NsaProblem| NsaProblem { sizes: Sizes { total_q: 1800, ..problem.sizes }, ..problem };
        assert_eq!([two, before].map(|problem| early(2048, (32, 8), saves, problem)), [None; 2]);
    }
}

#[test]
fn a_window_goes_on_to_all_keys_where_rows_list_all_blocks() {
    for saves in [false, true] {
        for (tokens, goes_on) in [(512, true), (1024, true), (1025, false), (65_536, false)] {
            let plan = forward(&nsa(tokens, (32, 8), false), saves);
            assert_eq!(plan.window_goes_on, goes_on, "{plan}");
        }
    }
    let (facts, options) = (DeviceFacts::h200(), PlanOptions::default());
    let portable = NsaForwardPlan::new(&nsa(1024, (32, 8), false), KernelSet::Sm80, &facts, &options, true);
    assert!(!portable.expect("fits").window_goes_on);
}

#[test]
fn selected_blocks_and_window_take_one_walk_where_a_mask_is_made() {
    let (facts, options) = (DeviceFacts::h200(), PlanOptions::default());
    for saves in [false, true] {
        for (tokens, beside) in [(1024, false), (1025, true), (2048, true), (65_536, false)] {
            let plan = forward(&nsa(tokens, (32, 8), false), saves);
            assert_eq!(plan.window_beside, beside, "{plan}");
            assert!(!(plan.window_beside && plan.window_goes_on));
        }
        let mut long_vectors = nsa(2048, (32, 8), false);
        long_vectors.sizes.head_dim = 192;
        assert!(!forward(&long_vectors, saves).window_beside);
        let portable = NsaForwardPlan::new(&nsa(2048, (32, 8), false), KernelSet::Sm80, &facts, &options, saves);
        assert!(!portable.expect("fits").window_beside);
    }
}

#[test]
fn lists_are_made_without_scores_where_rows_list_all_blocks() {
    let facts = DeviceFacts::h200();
    let lists = |problem: &NsaProblem, set, options: &PlanOptions| {
        let all = [false, true].map(|saves| {
            let plan = NsaForwardPlan::new(problem, set, &facts, options, saves).expect("fits");
            let kernels = plan.pass().select().kernels(set, &plan.lists);
            assert_eq!(kernels.len() == 1, plan.lists.is_all_blocks() || plan.lists.is_one_pass(), "{plan}");
            plan.lists.is_all_blocks()
        });
        assert_eq!(all[0], all[1], "the same bits with the state and without");
        all[0]
    };
    let options = PlanOptions::default();
    for set in [KernelSet::Sm80, KernelSet::Sm90] {
        for (tokens, all) in [(0, true), (512, true), (1024, true), (1025, false), (65_536, false)] {
            for heads in [(32, 32), (32, 8), (40, 8)] {
                assert_eq!(lists(&nsa(tokens, heads, true), set, &options), all, "{tokens} {heads:?} {set}");
            }
        }
        for one_pass in [true, false] {
            assert!(!lists(&nsa(1024, (32, 8), false), set, &PlanOptions { one_pass: Some(one_pass), ..options }));
        }
    }
}

#[test]
fn compressed_attention_runs_beside_selected_blocks_and_window_in_scratch_of_its_own() {
    for (tokens, splits) in [(512, 8), (1024, 4), (2048, 4), (4096, 2)] {
        let plan = backward(&nsa(tokens, (32, 8), false));
        assert_eq!(plan.compressed.splits, splits, "{plan}");
        assert!(plan.compressed_scratch.offset >= plan.scratch.offset + plan.scratch.bytes, "{plan}");
    }
    let long = backward(&nsa(65_536, (32, 8), false));
    assert_eq!(long.compressed_scratch, long.scratch, "{long}");
}

#[test]
fn selected_blocks_and_window_have_about_three_ctas_for_two_multiprocessors() {
    let (facts, options) = (DeviceFacts::h200(), PlanOptions::default());
    let splits = |tokens, kv_heads| {
        let problem = nsa(tokens, (32, kv_heads), false);
        let device = (KernelSet::Sm90, &facts);
        let plan = SelectedBackwardPlan::of_branch(&problem.selected(), device, &options, problem.window_size);
        plan.attention().expect("one pass").splits
    };
    let lengths = [512, 768, 1024, 1280, 1536, 2048, 3072, 3584, 4096];
    assert_eq!(lengths.map(|tokens| splits(tokens, 8)), [4, 4, 3, 2, 2, 2, 2, 1, 1]);
    assert_eq!([1024, 2048, 4096].map(|tokens| splits(tokens, 32)), [1, 1, 1]);
    assert_eq!([1024, 2048, 4096].map(|tokens| splits(tokens, 2)), [16, 8, 3]);
}

#[test]
fn compressed_attention_makes_the_lists_where_it_can_and_has_room() {
    let options = PlanOptions::default();
    for heads in [(32, 32), (32, 16), (32, 8), (32, 2)] {
        assert!(makes_lists(&nsa(65_536, heads, false), &options), "{heads:?}");
        assert!(!makes_lists(&nsa(262_144, heads, false), &options), "more than the budget: {heads:?}");
    }
    let one_head = |tokens, sequences| {
        let problem = nsa(tokens, (32, 32), true);
        NsaProblem { sizes: Sizes { sequences, ..problem.sizes }, ..problem }
    };
    let made = [(4096, 1), (2048, 1), (2048, 2)]
        .map(|(tokens, sequences)| makes_lists(&one_head(tokens, sequences), &options));
    assert_eq!(made, [true, true, false], "one head");
    let long = PlanOptions { one_pass: Some(true), ..options };
    assert!(makes_lists(&nsa(262_144, (32, 8), false), &long));
    let never = PlanOptions { one_pass: Some(false), ..options };
    assert!(!makes_lists(&nsa(4096, (32, 8), true), &never));
    assert!(!makes_lists(&nsa(4096, (40, 8), true), &long), "five heads");
    let usual = nsa(4096, (32, 8), true);
    for problem in [
        NsaProblem { windows: Windows { kernel_size: 64, kernel_stride: 16 }, ..usual },
        NsaProblem { block_size: 128, ..usual },
        NsaProblem { topk: 28, ..usual },
        NsaProblem { score_heads: ScoreHeads::FirstHead, ..usual },
        NsaProblem { sizes: Sizes { head_dim: 192, ..usual.sizes }, ..usual },
    ] {
        assert!(!makes_lists(&problem, &long), "{problem}");
    }
}

#[test]
fn a_forward_that_saves_is_one_pass_with_little_scratch() {
    for heads in [(32, 32), (32, 8), (32, 2)] {
        let plan = forward(&nsa(65_536, heads, true), true);
        assert_eq!(plan.kv_heads, heads.1);
        let most = DEFAULT_BUDGET_BYTES + plan.problem.topk_indices_bytes();
        assert!(plan.workspace.size_bytes() <= most, "{plan}");
    }
}

#[test]
fn a_forward_that_saves_nothing_is_one_pass_unless_rotated_queries_are_long() {
    let of = |tokens, heads, rope| {
        let plan = forward(&nsa(tokens, heads, rope), false);
        let most = DEFAULT_BUDGET_BYTES + plan.problem.topk_indices_bytes();
        assert!(plan.workspace.size_bytes() <= most, "{plan}");
        plan
    };
    for heads in [(32, 32), (32, 8), (32, 2)] {
        let plan = of(65_536, heads, false);
        assert_eq!(plan.kv_heads, heads.1, "{plan}");
        let selected =
            |options| ForwardPlan::new(&plan.problem.selected(), KernelSet::Sm90, &DeviceFacts::h200(), &options);
        let options = PlanOptions { budget_bytes: plan.stage_budget_bytes, ..PlanOptions::default() };
        let [inside, alone] = [options, PlanOptions::default()].map(|options| selected(options).index.num_chunks);
        assert_eq!(inside, alone, "chunks of stage `selected`: {plan}");
        assert_eq!(of(4096, heads, true).kv_heads, heads.1, "all of a short call");
    }
    let rotated = of(65_536, (32, 8), true);
    assert_eq!(rotated.kv_heads, 1, "two would leave stage `selected` a third of the budget: {rotated}");
    assert_eq!(rotated.compress_heads, 8, "{rotated}");
}

#[test]
fn a_backward_is_one_pass_within_the_budget_unless_it_is_very_long() {
    let passes = |tokens, heads: (usize, usize)| {
        let plan = backward(&nsa(tokens, heads, true));
        let most = DEFAULT_BUDGET_BYTES + plan.problem.topk_indices_bytes();
        assert!(plan.workspace.size_bytes() <= most, "{plan}");
        (heads.1 / plan.kv_heads, plan.key_ranges)
    };
    for heads in [(32, 32), (32, 8), (32, 2)] {
        assert_eq!([passes(4096, heads), passes(65_536, heads)], [(1, 1); 2], "{heads:?}");
    }
    assert_eq!(passes(262_144, (32, 2)), (2, 2));
    assert_eq!(passes(1 << 20, (32, 8)), (8, 2), "rather more passes than more ranges of keys");
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

fn check_tiles(tiles: &RowTiles, sizes: &Sizes, rows: usize) -> Result<(), TestCaseError> {
    let group = sizes.gqa_group_size();
    prop_assert!(tiles.tile_heads >= 1 && tiles.tile_tokens >= 1 && tiles.tile_heads * tiles.tile_tokens <= rows);
    prop_assert!(tiles.head_tiles * tiles.tile_heads >= group && (tiles.head_tiles - 1) * tiles.tile_heads < group);
    prop_assert!(tiles.num_tiles * tiles.tile_tokens >= sizes.total_q);
    Ok(())
}

proptest! {
    #[test]
    fn plans_of_any_shape_hold_together(
        total_q in 0usize..300_000,
        extra in 0usize..10_000,
        sequences in 1usize..300,
        kv_heads in 1usize..9,
        group in 1usize..200,
        head_dim in proptest::sample::select(&HEAD_DIMS),
        block_size in proptest::sample::select(&BLOCK_SIZES),
        (kernel_stride, ratio) in (proptest::sample::select(&[1usize, 2, 4, 8, 16]), 1usize..9),
        (budget_bytes, rope) in (0usize..1 << 30, any::<bool>()),
        set in proptest::sample::select(&[KernelSet::Sm80, KernelSet::Sm90]),
    ) {
        let sizes = Sizes { total_q, total_kv: total_q + extra, sequences, head_dim, ..sizes(0, (kv_heads * group, kv_heads)) };
        let config = NsaConfig { kernel_size: ratio * kernel_stride, kernel_stride, block_size, ..NsaConfig::default() };
        let kinds = [CompressionKind::Weighted, CompressionKind::Linear { position: true }];
        let problem = NsaProblem::new(&sizes, &config, kinds, rope);
        let (facts, options) = (DeviceFacts::h200(), PlanOptions { budget_bytes, ..PlanOptions::default() });
        problem.check(&facts).expect("supported");
        for saves in [false, true] {
            let plan = NsaForwardPlan::new(&problem, set, &facts, &options, saves).expect("fits");
            check_workspace(&plan.workspace)?;
            prop_assert!(kv_heads.is_multiple_of(plan.kv_heads) && (!saves || plan.kv_heads == kv_heads));
            check_tiles(&plan.attention, &sizes, 128)?;
            if let ListPlan::OwnPass(scores) = plan.lists {
                check_tiles(&scores.tiles, &sizes, 192)?;
            }
        }
        let plan = NsaBackwardPlan::new(&problem, set, &facts, &options);
        check_workspace(&plan.workspace)?;
        let of_window = plan.window.iter().map(|window| (window, plan.scratch));
        for (attention, scratch) in [(&plan.compressed, plan.compressed_scratch)].into_iter().chain(of_window) {
            check_workspace(&attention.workspace)?;
            check_tiles(&attention.tiles, &sizes, 128)?;
            prop_assert!(attention.splits.is_power_of_two() && attention.splits <= 32);
            prop_assert!(attention.workspace.size_bytes() <= scratch.bytes);
        }
    }
}

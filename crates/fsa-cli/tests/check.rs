//! `fsa check`: the schema, single cases, and misuse.

mod common;

use common::fsa;

#[test]
fn json_is_a_list_of_groups() {
    let rows = fsa(&["check", "--cases", "3", "--stage", "window", "--stage", "combine", "--json"]).json();
    let rows = rows.as_array().expect("a list");
    assert_eq!(rows.len(), 2 * 2 * 3, "stages x passes x dtypes");
    for row in rows {
        assert!(["window", "combine"].contains(&row["stage"].as_str().expect("text")));
        assert!(["forward", "backward"].contains(&row["pass"].as_str().expect("text")));
        assert_eq!((&row["cases"], &row["failures"]), (&3.into(), &0.into()));
        assert!(row["worst_ratio"].as_f64().is_some_and(|ratio| (0.0..=1.0).contains(&ratio)), "{row}");
    }
}

#[test]
fn stages_dtypes_and_passes_can_be_chosen() {
    let arguments = ["check", "--cases", "2", "--stage", "dense", "--dtype", "bf16", "--pass", "backward", "--json"];
    let rows = fsa(&arguments).json();
    assert_eq!(rows.as_array().expect("a list").len(), 1);
    assert_eq!((&rows[0]["dtype"], &rows[0]["pass"]), (&"bf16".into(), &"backward".into()));
}

#[test]
fn the_line_of_a_case_repeats_it() {
    let rows = fsa(&["check", "--cases", "2", "--seed", "7", "--stage", "selected", "--dtype", "f32", "--json"]).json();
    let (line, ratio) = (rows[0]["worst_case"].as_str().expect("a line"), &rows[0]["worst_ratio"]);
    let repeated = fsa(&["check", "--case", line, "--json"]).json();
    assert_eq!((&repeated[0]["worst_ratio"], &repeated[0]["cases"]), (ratio, &1.into()));
}

#[test]
fn threads_do_not_change_a_bit() {
    let run = fsa(&["check", "--cases", "4", "--threads", "1", "--compare-threads", "3", "--dtype", "f32"]);
    assert_eq!(run.code, 0, "{run:?}");
}

#[test]
fn the_table_ends_with_a_count() {
    let run = fsa(&["check", "--cases", "1", "--stage", "rope"]);
    assert!(run.code == 0 && run.stdout.contains("6 cases, 0 failures"), "{run:?}");
}

#[test]
fn misuse_names_the_flag_and_the_choices() {
    fsa(&["check", "--stage", "dens"]).is_misuse(&["--stage", "dens", "one of compress"]);
    fsa(&["check", "--stage", "index"]).is_misuse(&["--stage", "index has no operation of its own"]);
    fsa(&["check", "--dtype", "f64"]).is_misuse(&["--dtype", "f32, bf16, f16"]);
    fsa(&["check", "--case", "nonsense"]).is_misuse(&["--case"]);
    fsa(&["check", "--case", "dense:forward:f32:seed=1:hq=3:hkv=2"]).is_misuse(&["--case"]);
    fsa(&["check", "--case", "x", "--cases", "3"]).is_misuse(&["--case"]);
}

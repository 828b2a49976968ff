//! `fsa demo` on small texts: the schema, the picture, and misuse.

mod common;

use common::{Folder, fsa};

#[test]
fn the_demo_reports_what_it_promises() {
    let folder = Folder::new();
    let png = folder.argument("map.png");
    let demo = fsa(&["demo", "--tokens", "3000", "--png", &png, "--json"]).json();
    assert_eq!(demo["tokens"], 3000);
    for name in ["dense", "nsa", "window", "selected", "compressed"] {
        let accuracy = demo["accuracy"][name].as_f64().expect("a number");
        assert!((0.0..=1.0).contains(&accuracy), "{name}: {accuracy}");
    }
    for name in ["dense", "nsa", "compress", "select", "selected", "window", "combine"] {
        assert!(demo["time_ms"][name].as_f64().is_some_and(|time| time > 0.0), "{name}");
    }
    let number = |name: &str| demo[name].as_f64().unwrap_or_else(|| panic!("{name} is a number"));
    assert!(number("selected_mass") > 0.5 && number("selected_mass") <= 1.0 + 1e-5);
    assert!(number("speedup") > 0.0 && number("workspace_bytes") > 0.0);
    assert!(number("max_error") <= number("error_bound"));
    assert_eq!(demo["wrong_selections"], 0);
    assert_eq!(folder.names(), ["map.png"]);
    let bytes = std::fs::read(&png).expect("readable");
    let reader = png::Decoder::new(std::io::Cursor::new(bytes)).read_info().expect("a PNG");
    assert!(reader.info().width > 1000 && reader.info().height > 600);
}

#[test]
fn attention_beats_its_window_where_the_text_repeats_beyond_it() {
    // A long line of words in an order that never repeats, twice: the second half is predictable from the first,
    // which lies far outside of the window.
    let folder = Folder::new();
    let word = |i: usize| format!("{:05} ", i * i * 7919 % 99_991);
    let half: String = (0..600).map(word).collect();
    let text = folder.argument("text");
    std::fs::write(&text, half.repeat(2)).expect("written");
    let png = folder.argument("map.png");
    let demo = fsa(&["demo", &text, "--png", &png, "--json"]).json();
    let accuracy = |name: &str| demo["accuracy"][name].as_f64().expect("a number");
    assert!(accuracy("dense") > accuracy("window") + 0.2, "{}", demo["accuracy"]);
    assert!(accuracy("nsa") > accuracy("window") + 0.2, "{}", demo["accuracy"]);
}

#[test]
fn a_text_of_two_bytes_is_enough() {
    let folder = Folder::new();
    let (text, png) = (folder.argument("text"), folder.argument("map.png"));
    std::fs::write(&text, "ab").expect("written");
    let run = fsa(&["demo", &text, "--png", &png]);
    assert!(run.code == 0 && run.stdout.contains("2 tokens") && run.stdout.contains("map.png"), "{run:?}");
}

#[test]
fn misuse_is_named_and_leaves_no_picture() {
    let folder = Folder::new();
    let (text, png) = (folder.argument("text"), folder.argument("map.png"));
    std::fs::write(&text, "a").expect("written");
    fsa(&["demo", &text, "--png", &png]).is_misuse(&["text: expected at least 2 bytes, got 1"]);
    std::fs::write(&text, "abc").expect("written");
    fsa(&["demo", &text, "--tokens", "4", "--png", &png]).is_misuse(&["--tokens: expected 2 to 3", "got 4"]);
    fsa(&["demo", &folder.argument("none"), "--png", &png]).is_misuse(&["none", "cannot be read"]);
    fsa(&["demo", &text, "--png", &folder.argument("no/map.png")]).is_misuse(&["no/map.png", "cannot be written"]);
    assert_eq!(folder.names(), ["text"]);
}

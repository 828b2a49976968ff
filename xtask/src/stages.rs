//! `cargo xtask stages`: every stage has its place, under its name, wherever a stage must stand.
//!
//! A place is a file or folder whose stem is the name, or a line that says ``Stage `name` ``, so that
//! ``grep -rn 'tage `selected`'`` and a look at the file names find all of a stage.

use crate::{Findings, files, read};
use fsa_core::Stage;
use std::path::Path;

/// Where every stage stands, and the stages that have no place there.
const PLACES: [(&str, &[Stage]); 4] = [
    // The oracle has no inverse index: it is what the index is tested against.
    ("crates/fsa-oracle/src", &[Stage::Index]),
    // The inverse index is built by fsa-core, for every backend that wants it on the host.
    ("crates/fsa-cpu/src", &[Stage::Index]),
    // It is a step inside a backend, not an operation of the public face.
    ("crates/fsa/src", &[Stage::Index]),
    ("docs", &[]),
];

/// Names every stage that lacks a place.
pub fn run(root: &Path) -> Findings {
    let files = files(root, &["rs", "md"])?;
    let mut found = Vec::new();
    for (place, exempt) in PLACES {
        let mut texts = Vec::new();
        for path in files.iter().filter(|path| path.starts_with(place)) {
            let inside = path.strip_prefix(place).unwrap_or(path);
            texts.push((inside, read(&root.join(path))?));
        }
        for stage in Stage::ALL.into_iter().filter(|stage| !exempt.contains(stage)) {
            if !texts.iter().any(|(path, text)| stands_in(stage, path, text)) {
                found.push(format!(
                    "{place} has no place for {stage}: a file of that stem, or a line with Stage `{stage}`"
                ));
            }
        }
    }
    Ok(found)
}

fn stands_in(stage: Stage, path: &Path, text: &str) -> bool {
    let named = path.with_extension("").components().any(|part| part.as_os_str() == stage.name());
    named || text.contains(&format!("tage `{stage}`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stem_a_folder_or_a_line_is_a_place() {
        let stands = |path: &str, text| stands_in(Stage::Select, Path::new(path), text);
        assert!(stands("select.rs", "") && stands("select/scores.rs", "") && stands("stages/select.rs", ""));
        assert!(stands("topk.rs", "//! Stage `select`: scores and top-k.") && stands("a.md", "the stage `select`"));
    }

    #[test]
    fn another_stage_or_a_mention_is_none() {
        let stands = |path: &str, text| stands_in(Stage::Select, Path::new(path), text);
        assert!(!stands("selected.rs", "Stage `selected`") && !stands("lib.rs", "mod select;"));
    }

    #[test]
    fn exemptions_name_places_that_exist() {
        let root = crate::repository();
        assert!(PLACES.iter().all(|(place, _)| root.join(place).is_dir()));
    }
}

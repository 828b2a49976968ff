//! `cargo xtask sizes`: no source file is longer than one idea. Clippy's `too_many_lines`, with the
//! threshold in `clippy.toml`, does the same for functions.

use crate::{Findings, files, read};
use std::path::Path;

/// Lines that a source file may have.
const MAX_LINES: usize = 500;

/// What counts as source.
const EXTENSIONS: [&str; 4] = ["rs", "cu", "cuh", "py"];

/// Names every source file of the repository that is too long.
pub fn run(root: &Path) -> Findings {
    let mut found = Vec::new();
    for path in files(root, &EXTENSIONS)? {
        let lines = read(&root.join(&path))?.lines().count();
        found.extend(finding(&path, lines));
    }
    Ok(found)
}

fn finding(path: &Path, lines: usize) -> Option<String> {
    (lines > MAX_LINES).then(|| format!("{} has {lines} lines, at most {MAX_LINES}: split it", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_file_beyond_the_limit_is_named() {
        let path = Path::new("crates/fsa/src/nsa.rs");
        assert_eq!(finding(path, MAX_LINES), None);
        let expected = "crates/fsa/src/nsa.rs has 501 lines, at most 500: split it";
        assert_eq!(finding(path, MAX_LINES + 1).as_deref(), Some(expected));
    }
}
